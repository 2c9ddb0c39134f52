"""Which recipe helps every kind of prompt: trainings that differ in a few settings, scored alike.

    python benchmarks/ablation.py --data PREPARED [PREPARED ...] --recipe NAME=SETTING,SETTING ...
        [--seeds 0 1 2] [--device cpu|cuda] [--output FILE.jsonl] [--runs FOLDER]

For example: --recipe frozen=model.adapt=none all=model.adapt=full,train.augment=true

Each recipe is trained by the plain loop in this process, without Ray, from `tiny` as it ships; the
best checkpoint by the val split is scored on the test split. One JSON line a training: IoU by row
of the prompt matrix, of base and tuned, their paired change with its 95 % interval, and minutes.
With --runs the RUN folders stay there, for `benchmarks/instances.py`.
"""

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.evaluation.metrics import Score, bootstrap_interval, mean_by
from samray.evaluation.scoring import MATRIX, score_image
from samray.geometry.images import decode_image
from samray.geometry.views import cached_view
from samray.runs import RunFolder
from samray.sam.adapt import num_blocks, num_frozen_blocks
from samray.sam.checkpoint import load_checkpoint, save_checkpoint
from samray.sam.embeddings import EmbeddingCache, encode_images
from samray.training.finetuning import FineTuning, cache_entries, finish_instances, instance_labels
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
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", default="/dev/stdout")
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    for data in arguments.data:
        dataset = PreparedDataset(Path(data))
        for recipe in arguments.recipe:
            name, _, settings = recipe.partition("=")
            for seed in arguments.seeds:
                words = [*(word for word in settings.split(",") if word), f"train.seed={seed}"]
                line = {"data": Path(data).name, "recipe": name, "seed": seed}
                with tempfile.TemporaryDirectory(prefix="samray-ablation-") as folder:
                    run, minutes = train(dataset, words, Path(folder), device)
                    line |= {**compare(dataset, run, device), "minutes": minutes}
                    if arguments.runs:
                        kept = arguments.runs / f"{line['data']}-{name}-{seed}"
                        shutil.copytree(run.path, kept)
                with open(arguments.output, "a") as file:
                    print(json.dumps(line), file=file, flush=True)
                print(name, line["data"], seed, line["change"], file=sys.stderr, flush=True)


def train(
    dataset: PreparedDataset, words: list[str], folder: Path, device: torch.device
) -> tuple[RunFolder, float]:
    """Train one recipe; return its run, and how many minutes it took."""
    base, config = base_checkpoint(load_config(overrides=words))
    run = RunFolder.create(folder / "run", config, dataset.digest)
    save_checkpoint(run.base, base.weights, config, base.progress)
    started = time.perf_counter()
    sam = load_checkpoint(run.base).model().to(device)
    frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    cache = None
    if frozen:
        full = device.type == "cpu"
        cache = EmbeddingCache(folder / "cache", sam, frozen, full_precision=full)
        for record, view in cache_entries(config, dataset):
            image = decode_image(dataset.image_bytes(record))
            shown = cached_view(record.digest, view).show(image)
            cache.save(record.digest, encode_images(sam, [shown], frozen)[0].cpu().numpy(), view)
    worker = Worker(0, 1, device)
    labels = instance_labels(config, dataset)
    source = functools.partial(FineTuning, config, dataset, cache)
    train_loop(config, run, source, worker, labels=labels)
    run = RunFolder(run.path)
    if labels is not None:
        finish_instances(config, run, dataset, cache, worker.device)
    return run, round((time.perf_counter() - started) / 60, 2)


def compare(dataset: PreparedDataset, run: RunFolder, device: torch.device) -> dict[str, Any]:
    """Return the IoU of base and tuned on the test split."""
    before = score(dataset, load_checkpoint(run.base).model().to(device))
    after = score(dataset, load_checkpoint(run.path).model().to(device))
    return {
        "base": mean_by(before, "strategy", "iou"),
        "tuned": mean_by(after, "strategy", "iou"),
        "change": change(before, after),
        "best": run.state["best"],
        "val": [round(epoch["val_iou"], 4) for epoch in run.state["epochs"]],
    }


def score(dataset: PreparedDataset, sam: Any) -> list[Score]:
    """Score every instance of the test split under every row of the prompt matrix."""
    found: list[Score] = []
    for record in dataset.split("test"):
        image = decode_image(dataset.image_bytes(record))
        found += score_image(sam, encode_images(sam, [image])[0], record, seed=0)
    return found


def change(before: list[Score], after: list[Score]) -> dict[str, list[float]]:
    """Mean paired change of IoU and its 95 % interval, by row and over all rows."""
    paired = [(b.strategy, b.source, a.iou - b.iou) for b, a in zip(before, after, strict=True)]
    found = {}
    for name, rows in [*((row, (row,)) for row in MATRIX), ("mean", MATRIX)]:
        chosen = [(source, value) for row, source, value in paired if row in rows]
        sources, values = zip(*chosen, strict=True)
        interval = bootstrap_interval(sources, values)
        found[name] = [round(x, 4) for x in (sum(values) / len(values), *interval)]
    return found


if __name__ == "__main__":
    main()
