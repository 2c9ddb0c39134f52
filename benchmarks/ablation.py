"""Which recipe helps every kind of prompt: trainings that differ in a few settings, scored alike.

    python benchmarks/ablation.py --data PREPARED [PREPARED ...] --recipe NAME=SETTING,SETTING ...
        [--seeds 0 1 2] [--output FILE.jsonl]

For example: --recipe frozen=model.adapt=none all=model.adapt=full,train.augment=true

Each recipe is trained by the plain loop in this process, without Ray, from `tiny` as it ships; the
best checkpoint by the val split is scored on the test split. One JSON line a training: IoU by row
of the prompt matrix, of base and tuned, and minutes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.evaluation.scoring import MATRIX, score_image
from samray.geometry.images import decode_image
from samray.sam.adapt import num_blocks, num_frozen_blocks
from samray.sam.checkpoint import RunFolder, load_checkpoint, save_checkpoint
from samray.sam.embeddings import EmbeddingCache, encode_images
from samray.training.finetuning import FineTuning
from samray.training.loop import Worker, train_loop
from samray.training.train import base_checkpoint


def main() -> None:
    """Train and score every recipe on every dataset, with every seed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--recipe", nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", default="/dev/stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for data in arguments.data:
        dataset = PreparedDataset(Path(data))
        for recipe in arguments.recipe:
            name, _, settings = recipe.partition("=")
            for seed in arguments.seeds:
                with tempfile.TemporaryDirectory(prefix="samray-ablation-") as folder:
                    words = [word for word in settings.split(",") if word]
                    line = compare(dataset, [*words, f"train.seed={seed}"], Path(folder))
                line = {"data": Path(data).name, "recipe": name, "seed": seed, **line}
                with open(arguments.output, "a") as file:
                    print(json.dumps(line), file=file, flush=True)
                print(name, line["data"], seed, line["gain"], file=sys.stderr, flush=True)


def compare(dataset: PreparedDataset, words: list[str], folder: Path) -> dict[str, Any]:
    """Train one recipe; return the IoU of base and tuned on the test split."""
    base, config = base_checkpoint(load_config(overrides=words))
    run = RunFolder.create(folder / "run", config, dataset.digest)
    save_checkpoint(run.base, base.weights, config, base.progress)
    started = time.perf_counter()
    sam = load_checkpoint(run.base).model()
    frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    cache = None
    if frozen:
        cache = EmbeddingCache(folder / "cache", sam, frozen)
        for record in dataset.split("train") + dataset.split("val"):
            image = decode_image(dataset.image_bytes(record))
            cache.save(record.digest, encode_images(sam, [image], frozen)[0].numpy())
    worker = Worker(0, 1, torch.device("cpu"))
    train_loop(config, run, lambda sam: FineTuning(config, dataset, cache, sam), worker)
    minutes = (time.perf_counter() - started) / 60
    run = RunFolder(run.path)
    before = score(dataset, load_checkpoint(run.base).model())
    after = score(dataset, load_checkpoint(run.path).model())
    return {
        "base": before,
        "tuned": after,
        "gain": {row: round(after[row] - before[row], 4) for row in before},
        "best": run.state["best"],
        "val": [round(epoch["val_iou"], 4) for epoch in run.state["epochs"]],
        "minutes": round(minutes, 2),
    }


def score(dataset: PreparedDataset, sam: Any) -> dict[str, float]:
    """Mean IoU of the test split by row of the prompt matrix."""
    found: dict[str, list[float]] = {row: [] for row in MATRIX}
    for record in dataset.split("test"):
        image = decode_image(dataset.image_bytes(record))
        embedding = encode_images(sam, [image])[0]
        for result in score_image(sam, embedding, record, seed=0):
            found[result.strategy].append(result.iou)
    means = {row: sum(values) / len(values) for row, values in found.items()}
    return {**means, "mean": sum(means.values()) / len(means)}


if __name__ == "__main__":
    main()
