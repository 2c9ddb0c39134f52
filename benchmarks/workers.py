"""An epoch of Ray Train beside the bare loop, and two workers beside one, on a CPU.

    python benchmarks/workers.py --data PREPARED [--rounds 2] [--num-epochs 4] [--set KEY=VALUE ...]

Ways, in turn: `bare`, the training loop in a process without Ray; `both`, two of those at once,
which share the machine as two workers do; `1` and `2`, `samray train` with that many workers. A
worker has one thread, and the batch is the same for all. The last line is JSON: median seconds of
an epoch, validation included and without each run's first, which warms up; their least and most;
and the ratios. `limit` is what two workers could reach on this machine: twice the speed of `bare`,
less what two processes cost each other. The machine must be idle, with two cores or more.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.runs import RunFolder
from samray.sam.checkpoint import save_checkpoint
from samray.training.finetuning import FineTuning, instance_labels
from samray.training.loop import Worker, train_loop
from samray.training.train import base_checkpoint

WAYS = ("bare", "both", "1", "2")


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PREPARED")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--num-epochs", type=int, default=4)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    # Nothing is frozen by default, and so nothing is cached.
    words = [f"train.num_epochs={arguments.num_epochs}", *arguments.set]
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
                runs = [Path(folder) / "run", Path(folder) / "other"][: 2 if way == "both" else 1]
                if way in ("bare", "both"):
                    with multiprocessing.get_context("spawn").Pool(len(runs)) as pool:
                        pool.starmap(bare, [(arguments.data, words, run) for run in runs])
                else:
                    with_ray(arguments.data, [*words, f"scaling.num_workers={way}"], runs[0])
                for run in runs:
                    seconds = [epoch["seconds"] for epoch in RunFolder(run).state["epochs"]][1:]
                    print(way, seconds, flush=True)
                    taken[way] += seconds
    medians = {way: statistics.median(seconds) for way, seconds in taken.items()}
    figures = {
        **{
            way: [round(median, 2), min(taken[way]), max(taken[way])]
            for way, median in medians.items()
        },
        "1 to bare": round(medians["1"] / medians["bare"], 3),
        "1 to 2": round(medians["1"] / medians["2"], 2),
        "limit": round(2 * medians["bare"] / medians["both"], 2),
    }
    print(json.dumps(figures))


def bare(data: Path, words: list[str], folder: Path) -> None:
    """Train without Ray."""
    torch.set_num_threads(1)
    dataset = PreparedDataset(data)
    base, config = base_checkpoint(load_config(overrides=words))
    run = RunFolder.create(folder, config, dataset.digest)
    save_checkpoint(run.base, base.weights, config, base.progress)
    source = functools.partial(FineTuning, config, dataset, None)
    labels = instance_labels(config, dataset)
    train_loop(config, run, source, Worker(0, 1, torch.device("cpu")), labels=labels)


def with_ray(data: Path, words: list[str], run: Path) -> None:
    """Train in a process of its own, with a Ray of its own."""
    command = [
        sys.executable,
        "-m",
        "jobs.train",
        "--data-dir",
        str(data),
        "--output-dir",
        str(run),
    ]
    words = [*words, "scaling.device=cpu", "scaling.cpus_per_worker=1"]
    subprocess.run([*command, *words], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
