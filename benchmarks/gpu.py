"""ViT encoders, training steps and clicks on a GPU, samray's beside segment_anything's.

    python benchmarks/gpu.py [--model-type vit_b vit_l vit_h] [--device cuda]

Random weights, which do not change the time. One JSON line a model: images a second through the
stock encoder in float32 and in bfloat16, one image at a time as `SamPredictor` does, and through
samray's, with and without decoded photos on their way to the GPU; each one's peak memory; the share
of the rate that a large matrix product reaches in bfloat16. Then seconds of a training step of one
image with 8 prompts, its frozen blocks cached, and clicks a second on one embedding.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch import Tensor

from samray.benchmark import encoder_flops, matrix_rate, seconds_of
from samray.config import load_config, resolve_model, with_learning_rate
from samray.geometry.prompts import Prompt
from samray.sam.adapt import num_blocks, num_frozen_blocks
from samray.sam.decode import PromptGroup, predict_masks
from samray.sam.embeddings import encode_many, entry_shape
from samray.sam.model import build_model, low_res_size
from samray.training.loop import Worker, prompted_sam, train_step
from samray.training.optimizer import Optimizer
from samray.training.step import Batch

TOGETHER, PHOTOS, PROMPTS, CLICKS = 8, 64, 8, (1, 32, 256)
WAYS = {  # of training: words of the command line
    "frozen": ["model.adapt=none"],
    "late LoRA": ["model.adapt=lora"],
    "full": ["model.adapt=full", "model.adapt_blocks=all", "train.recompute_encoder=true"],
}


def main() -> None:
    """Print one line of figures for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    rate = matrix_rate(device, torch.bfloat16)
    print(json.dumps({"device": name, "bfloat16_tflops": round(rate / 1e12, 2)}), flush=True)
    for model_type in arguments.model_type:
        print(json.dumps({"model": model_type, "encoder": encoders(model_type, device, rate)}))
        steps = {way: step(model_type, words, device) for way, words in WAYS.items()}
        figures = {"step": steps, "clicks_a_second": clicks(model_type, device)}
        print(json.dumps({"model": model_type, **figures}), flush=True)


@torch.inference_mode()
def encoders(model_type: str, device: torch.device, rate: float) -> dict[str, Any]:
    """Images a second, peak memory and share of the rate of each way."""
    ours: Any = build_model(model_type).to(device)
    stock = sam_model_registry[model_type]().image_encoder.eval().to(device)
    flops, side = encoder_flops(ours), ours.image_encoder.img_size
    one, some = (torch.randn(count, 3, side, side, device=device) for count in (1, TOGETHER))
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    loads = [functools.partial(np.copy, photo)] * PHOTOS
    half = functools.partial(torch.autocast, device.type, torch.bfloat16)

    def in_half(encoder: Any, pixels: Tensor) -> None:
        with half():
            encoder(pixels)

    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "stock float32": (1, lambda: stock(one)),
        "stock bfloat16": (1, lambda: in_half(stock, one)),
        "samray, 1 image": (1, lambda: in_half(ours.image_encoder, one)),
        f"samray, {TOGETHER} images": (TOGETHER, lambda: in_half(ours.image_encoder, some)),
        "samray, photos": (PHOTOS, lambda: list(encode_many(ours, loads))),
    }
    figures: dict[str, Any] = {}
    for way, (count, work) in ways.items():
        peak, seconds = measured(work, device)
        figures[way] = {
            "images_a_second": round(count / seconds, 2),
            "share_of_rate": round(count * flops / seconds / rate, 3),
            "gib": peak,
        }
    return figures


def step(model_type: str, words: list[str], device: torch.device) -> dict[str, float]:
    """Seconds and peak memory of a training step."""
    words = [f"model.type={model_type}", *words]
    config = with_learning_rate(resolve_model(load_config(overrides=words), weights_given=True))
    sam: Any = build_model(model_type)
    num_frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    side, cells = sam.image_encoder.img_size, low_res_size(sam)
    shape = entry_shape(sam, num_frozen) if num_frozen else (3, side, side)
    given = torch.randn(1, *shape)
    batch = Batch(
        images=None if num_frozen else given,
        encoded=given if num_frozen else None,
        groups=[
            PromptGroup(
                torch.zeros(PROMPTS, dtype=torch.int64),
                side * torch.rand(PROMPTS, 1, 2),
                torch.ones(PROMPTS, 1, dtype=torch.int64),
            )
        ],
        targets=[torch.rand(PROMPTS, 1, cells, cells).round()],
        valid=torch.ones(1, 1, cells, cells),
    )
    module = prompted_sam(config, sam).to(device)
    optimizer, worker = Optimizer(module.sam, config.train, device), Worker(0, 1, device)
    work = functools.partial(train_step, module, optimizer, [batch], PROMPTS, worker)
    peak, seconds = measured(work, device)
    return {"seconds": round(seconds, 4), "gib": peak}


def clicks(model_type: str, device: torch.device) -> dict[int, float]:
    """Clicks a second on one embedding, by the number decoded together."""
    sam: Any = build_model(model_type).to(device)
    embedding = torch.randn(*entry_shape(sam, num_blocks(sam.image_encoder)), device=device)
    rng, figures = np.random.default_rng(0), {}
    for count in CLICKS:
        points = rng.uniform(0, 1000, (count, 1, 2)).astype(np.float32)
        prompts = [Prompt(point, np.ones(1, np.int64)) for point in points]
        work = functools.partial(predict_masks, sam, embedding, prompts, (1024, 1024))
        figures[count] = round(count / seconds_of(lambda: list(work()), device), 1)  # noqa: B023
    return figures


def measured(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Peak GPU memory in GiB, 0 on a CPU, and seconds of some work."""
    if device.type != "cuda":
        return 0.0, seconds_of(work, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(work, device)
    return round(torch.cuda.max_memory_allocated() / 2**30, 2), seconds


if __name__ == "__main__":
    main()
