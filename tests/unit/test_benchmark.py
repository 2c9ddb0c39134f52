"""`samray benchmark` measures real work, and leaves nothing behind."""

import json

import pytest
import torch

from samray import benchmark
from samray.config import load_config
from samray.errors import ConfigError
from samray.sam.attention import fuse_attention
from samray.sam.embeddings import encode_images
from samray.storage import list_objects, resolve


def test_a_benchmark_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SECONDS", 0.05)
    storage = tmp_path / "storage"
    storage.mkdir()
    words = ["benchmark.num_images=50", f"benchmark.storage={storage}", "model.adapt_blocks=1"]
    config = load_config(overrides=[*words, f"benchmark.output={tmp_path / 'found.json'}"])
    found = benchmark.benchmark(config)
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert list(storage.iterdir()) == []
    figures = {row["what"]: row["value"] for row in found["figures"]}
    assert all(value > 0 for value in figures.values())
    assert {"matrix product, float32", "encoder", "feed", "training step", "read"} <= set(figures)
    forecast = found["forecast"]
    step, feed = figures["training step"], 1 / figures["feed"]
    assert forecast["epoch_seconds"] == pytest.approx(50 * max(step, feed))
    assert forecast["encode_seconds"] == pytest.approx(50 * figures["encoder"])
    assert forecast["cache_bytes"] > 50 * 2**19  # two of the three stages are cached


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(benchmark, "_measure", None)
    (tmp_path / "file").write_text("")
    for output, said in ((tmp_path, "is a folder; name a file"), (tmp_path / "file/b", "created")):
        with pytest.raises(ConfigError, match=rf"--output: .*{said}"):
            benchmark.benchmark(load_config(overrides=[f"benchmark.output={output}"]))


def test_the_folder_of_the_output_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "_measure", lambda *_: {})
    output = tmp_path / "missing/found.json"
    found = benchmark.benchmark(load_config(overrides=[f"benchmark.output={output}"]))
    assert json.loads(output.read_text()) == found


def test_the_operations_of_an_encoder_are_counted():
    from sam_parts import small_sam

    sam = small_sam()
    layer = sam.image_encoder.neck[0]  # 1 x 1 convolution, without a bias
    counted = benchmark.encoder_flops(sam)
    own = 2 * layer.weight.numel() * sam.prompt_encoder.image_embedding_size[0] ** 2
    assert counted > own
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        encode_images(sam, [torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()])
    assert counted == counter.get_total_flops()


def test_the_longer_vectors_of_fused_attention_are_not_counted():
    from sam_parts import small_vit

    sam = small_vit()
    counted = benchmark.encoder_flops(sam)
    fuse_attention(sam.image_encoder)
    assert benchmark.encoder_flops(sam) == counted


def test_storage_that_is_missing_is_refused_and_not_created(tmp_path):
    with pytest.raises(ConfigError, match=r"--storage: .*nowhere does not exist"):
        benchmark.storage_figures(str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_storage_in_s3_is_measured_and_left_empty(bucket):
    figures = benchmark.storage_figures(f"{bucket}/place")
    assert [row.what for row in figures] == ["write", "read", "read a small file"]
    assert all(row.value > 0 for row in figures)
    assert list(list_objects(resolve(f"{bucket}/place", "x"))) == []
