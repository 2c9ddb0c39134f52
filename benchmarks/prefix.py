"""A training step on cached activations beside one that computes the frozen blocks again.

    python benchmarks/prefix.py [--model-type tiny vit_b] [--steps N] [--epoch PREPARED]

Random weights and images; both ways alternate in one process. One JSON line a model: seconds a step
(median), size of the cache an image, and the largest difference of the embeddings, as a share of
their largest value, due to the cache's float16.

With --epoch, a whole epoch of `samray train` on a prepared dataset instead: its seconds with
validation, losses and scores of both ways, and the seconds that filling the cache takes once.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samray.config import Config, load_config, resolve_model
from samray.data.dataset import PreparedDataset
from samray.geometry.images import decode_image
from samray.runs import RunFolder
from samray.sam.adapt import num_blocks, num_frozen_blocks, prefix, set_trainable, suffix
from samray.sam.checkpoint import save_checkpoint
from samray.sam.embeddings import EmbeddingCache, encode_images, entry_bytes
from samray.sam.model import build_model
from samray.training.finetuning import FineTuning
from samray.training.loop import Worker, train_loop

BLOCKS = {"tiny": 2, "vit_b": 3}  # that learn


def main() -> None:
    """Print one line of figures for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", nargs="+", default=list(BLOCKS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epoch", type=Path, metavar="PREPARED")
    arguments = parser.parse_args()
    for model_type in arguments.model_type:
        if arguments.epoch:
            row = compare_epochs(model_type, PreparedDataset(arguments.epoch))
        else:
            row = compare(model_type, arguments.steps)
        print(json.dumps(row), flush=True)


def compare(model_type: str, steps: int) -> dict[str, Any]:
    """Time the encoder's part of a step, forward and backward, with and without the cache."""
    config = settings(model_type)
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


def settings(model_type: str) -> Config:
    """Return the default settings of a model whose last blocks learn."""
    words = [f"model.type={model_type}", f"model.adapt_blocks={BLOCKS[model_type]}"]
    return resolve_model(load_config(overrides=[*words, "train.num_epochs=1"]), weights_given=True)


class Computed(EmbeddingCache):
    """In place of the cache: computes the frozen blocks of an image each time it is asked for."""

    images: Callable[[str], np.ndarray]
    sam: torch.nn.Module

    def load(self, image_digest: str, view: int = 0) -> np.ndarray | None:
        """Return the activations of an image, C x h x w float32."""
        image = self.images(image_digest)
        found: np.ndarray = encode_images(self.sam, [image], self.num_frozen)[0].numpy()
        return found


def compare_epochs(model_type: str, dataset: PreparedDataset) -> dict[str, Any]:
    """Train an epoch on cached activations, and an epoch that computes them each time."""
    torch.manual_seed(0)
    config, sam = settings(model_type), build_model(model_type)
    frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    records = {r.digest: r for split in ("train", "val") for r in dataset.split(split)}
    row: dict[str, Any] = {"model": model_type, "images": len(dataset.split("train"))}

    def images(digest: str) -> np.ndarray:
        return decode_image(dataset.image_bytes(records[digest]))

    with tempfile.TemporaryDirectory(prefix="samray-prefix-") as folder:
        for way, kind in (("cached", EmbeddingCache), ("uncached", Computed)):
            run = RunFolder.create(Path(folder) / way, config, dataset.digest)
            save_checkpoint(run.base, sam.state_dict(), config, {})
            cache = kind(Path(folder) / "cache", sam, frozen)
            if isinstance(cache, Computed):
                cache.images, cache.sam = images, sam
            else:
                started = time.perf_counter()
                for digest in records:
                    entry = encode_images(sam, [images(digest)], frozen)[0]
                    cache.save(digest, entry.numpy())
                row["filling_s"] = round(time.perf_counter() - started, 2)
            source = functools.partial(FineTuning, config, dataset, cache)
            train_loop(config, run, source, Worker(0, 1, torch.device("cpu")))
            row[way] = RunFolder(run.path).state["epochs"][0]
    return row


if __name__ == "__main__":
    main()
