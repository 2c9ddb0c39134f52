"""Time of a sweep against the same trials as separate, consecutive `samray train` runs.

    python benchmarks/sweep.py --data PREPARED [--num-trials 8] [--num-epochs 27]

Both train `tiny` with the same settings, which the sweep draws. The sweep shares one cache of
embeddings and stops poor trials early; each separate run has its own cache and trains to the end.
Printed are the wall-clock seconds of both, including the start of Ray, and each run's seconds
outside its epochs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

SPACE = {
    "train.learning_rate": {"loguniform": [3e-5, 3e-3]},
    "prompts.point_selection": {"choice": ["center", "random", "bbox", "mixed", "interactive"]},
    "loss.focal_weight": {"loguniform": [1.0, 40.0]},
}


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="PREPARED")
    parser.add_argument("--num-trials", type=int, default=8)
    parser.add_argument("--num-epochs", type=int, default=27)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
        compare(Path(folder), arguments.data, arguments.num_trials, arguments.num_epochs)


def compare(root: Path, data: Path, num_trials: int, num_epochs: int) -> None:
    """Run the sweep, then each of its trials as a separate run."""
    common = {"train": {"num_epochs": num_epochs, "batch_size": 4}, "model": {"type": "tiny"}}
    space = {"search_space": SPACE, "num_trials": num_trials, "grace_epochs": 3}
    sweep_config = write(
        root / "sweep.yaml",
        {**common, "tune": space, "embeddings": {"cache_dir": str(root / "cache")}},
    )
    sweep_seconds = timed(
        "tune", "--data-dir", data, "--output-dir", root / "sweep", "--config", sweep_config
    )
    state = json.loads((root / "sweep" / "sweep.json").read_text())
    trials = state["trials"]
    encoded = state["embeddings"]["encoded"]
    files = len(list((root / "cache").rglob("*.npy")))
    print(f"sweep: {sweep_seconds:.0f} s; {encoded} images encoded, {files} embeddings in all")
    starts = [trial["startup_seconds"] for trial in trials]
    print(f"  start of a trial to its first step: {statistics.median(starts):.1f} s (median)")
    print(f"  epochs trained: {state['cost']['epochs']} of {num_trials * num_epochs}")
    separate = 0.0
    overheads = []
    for number, trial in enumerate(trials):
        settings = [f"{key}={value}" for key, value in trial["settings"].items()]
        config = write(
            root / "run.yaml",
            {**common, "embeddings": {"cache_dir": str(root / f"cache{number}")}},
        )
        run = root / f"run{number}"
        seconds = timed(
            "train", "--data-dir", data, "--output-dir", run, "--config", config, *settings
        )
        epochs = json.loads((run / "run.json").read_text())["epochs"]
        overheads.append(seconds - sum(epoch["seconds"] for epoch in epochs))
        separate += seconds
    print(f"{num_trials} separate runs: {separate:.0f} s")
    print(f"  seconds of a run outside its epochs: {statistics.median(overheads):.1f} s (median)")
    print(f"ratio: {sweep_seconds / separate:.2f}")


def write(path: Path, content: dict[str, object]) -> Path:
    """Write a config."""
    path.write_text(yaml.safe_dump(content))
    return path


def timed(stage: str, *words: object) -> float:
    """Run a stage in a separate process; return its seconds."""
    started = time.perf_counter()
    command = [sys.executable, "-m", f"jobs.{stage}", *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
