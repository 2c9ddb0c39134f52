"""What a run needs, from shapes alone."""

import pytest
import torch
from sam_parts import small_sam
from small_dataset import write_dataset

from samray.config import load_config, resolve_model
from samray.sam.adapt import suffix
from samray.sam.model import build_model
from samray.training.dry_run import encoder_bytes, forecast, saved_bytes


def needed(*words, dtype=torch.float32, num_images=1):
    return encoder_bytes(resolve_model(load_config(overrides=words), True), dtype, num_images)


def test_fake_tensors_need_what_real_ones_do():
    sam = build_model("tiny")
    images = torch.zeros(2, 3, 256, 256)
    real = saved_bytes(sam, lambda: suffix(sam.image_encoder, images, 0))
    assert needed("model.type=tiny", num_images=2) == real > 2**23


def test_what_autograd_keeps_is_counted_once_and_without_parameters():
    sam = small_sam()
    layer = torch.nn.Linear(64, 64, bias=False)
    x = torch.zeros(8, 64)
    assert saved_bytes(sam, lambda: torch.zeros(3) + 1) == 0
    assert saved_bytes(layer, lambda: layer(x) + layer(x)) == x.nbytes


def test_the_seed_does_not_decide_how_many_clicks_are_measured(tmp_path):
    """A step draws their number; "at most" means all of them."""
    dataset = write_dataset(tmp_path / "prepared")
    words = ["model.adapt=none", "prompts.mixture.random=0", "prompts.mixture.bbox=0"]
    found = set()
    for seed in range(4):
        config = resolve_model(load_config(overrides=[*words, f"train.seed={seed}"]), True)
        found.add(forecast(config, dataset, torch.device("cpu")).memory.decoder)
    assert len(found) == 1


@pytest.mark.slow
def test_memory_by_how_the_encoder_learns():
    """ViT-B at 1024 pixels: less of it for fewer blocks, for bfloat16 and for recomputed blocks."""
    vit = "model.type=vit_b"
    quarter, whole = needed(vit), needed(vit, "model.adapt=full", "model.adapt_blocks=all")
    assert needed(vit, "model.adapt=none") == 0
    assert 2**28 < quarter < whole / 3
    assert needed(vit, num_images=2) == pytest.approx(2 * quarter, rel=0.05)
    assert needed(vit, dtype=torch.bfloat16) < 0.7 * quarter
    again = needed(
        vit, "model.adapt=full", "model.adapt_blocks=all", "train.recompute_encoder=true"
    )
    assert again < whole / 3
