"""A training step on cached activations beside one that computes the frozen blocks again.

    python benchmarks/prefix.py [--model-type tiny vit_b] [--steps N]

Random weights and images; both ways alternate in one process. One JSON line a model: seconds a step
(median), size of the cache an image, and the largest difference of the embeddings, as a share of
their largest value, due to the cache's float16.
"""

import argparse
import json
import statistics
import time

import torch

from samray.config import load_config, resolve_model
from samray.sam.adapt import num_blocks, num_frozen_blocks, prefix, set_trainable, suffix
from samray.sam.embeddings import entry_bytes
from samray.sam.model import build_model

BLOCKS = {"tiny": 2, "vit_b": 3}  # that learn


def main() -> None:
    """Print one line of figures for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", nargs="+", default=list(BLOCKS))
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    for model_type in arguments.model_type:
        print(json.dumps(compare(model_type, arguments.steps)), flush=True)


def compare(model_type: str, steps: int) -> dict[str, float | str]:
    """Time the encoder's part of a step, forward and backward, with and without the cache."""
    words = [f"model.type={model_type}", f"model.adapt_blocks={BLOCKS[model_type]}"]
    config = resolve_model(load_config(overrides=words), weights_given=True)
    sam = build_model(model_type)
    set_trainable(sam, config.model)
    encoder = sam.image_encoder
    frozen = num_frozen_blocks(num_blocks(encoder), config.model)
    image = torch.randn(1, 3, encoder.img_size, encoder.img_size)
    with torch.no_grad():
        computed = prefix(encoder, image, frozen)
        cached = computed.half().float()
        exact, rounded = suffix(encoder, computed, frozen), suffix(encoder, cached, frozen)
    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    for _ in range(steps):
        for way, taken in seconds.items():
            started = time.perf_counter()
            given = cached
            if way == "uncached":
                with torch.no_grad():
                    given = prefix(encoder, image, frozen)
            suffix(encoder, given, frozen).square().mean().backward()
            taken.append(time.perf_counter() - started)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    return {
        "model": f"{model_type}, {config.model.adapt} in the last {BLOCKS[model_type]} blocks",
        **{f"{way}_s": round(value, 3) for way, value in medians.items()},
        "ratio": round(medians["uncached"] / medians["cached"], 2),
        "cache_mib": round(entry_bytes(sam, frozen) / 2**20, 2),
        "difference": float((exact - rounded).abs().max() / exact.abs().max()),
    }


if __name__ == "__main__":
    main()
