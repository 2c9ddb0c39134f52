"""How long a large run takes, what it costs, and what saturates: a model in a few formulas.

    python benchmarks/scaling.py [--images 1000000] [--gpus 1 8 64 512] [--set step_s=0.4 ...]
    python benchmarks/scaling.py --check [--processes 1 2 4]

The first prints a table for `docs/scaling.md` from FIGURES, each of which `--set` replaces, as by
those of `samray benchmark` on your machine. The second checks the same formulas on this machine:
it encodes and trains `tiny` on drawn photos with some processes, takes its figures from the first
number and prints what they predict for the others beside what was measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import ray

import samray
from samray import cli

BATCH, CALLS = 8, 2000  # of the check: images of a step, and calls that measure the driver

FIGURES = {
    # Of the model: ViT-H with LoRA in its last quarter, of which the frozen part is cached.
    "encode_s": 0.45,  # an image on one GPU; published for ViT-H, not measured here
    "step_s": 0.45,  # an image on one GPU: a quarter forward and backward, the decoder; a guess
    "entry_mb": 10.5,  # of the cache an image, float16
    "learned_mb": 20.0,  # gradients of a step: LoRA, decoder and prompt encoder
    "batch": 64,  # images of a step, over all workers
    # Of the data.
    "image_mb": 1.0,
    "shard_images": 32,
    # Of the cluster.
    "gpus_per_node": 8,
    "node_mb_s": 1200.0,  # of a node to and from S3, about 10 Gbit/s
    "net_mb_s": 3000.0,  # between nodes, for gradients
    "latency_s": 0.03,  # of a request to S3
    "loaders": 2,  # batches that a worker makes at once
    "put_s": 3500.0,  # requests a second that a prefix of a bucket takes, as AWS says
    "get_s": 5500.0,
    "dispatch_s": 0.001,  # of the driver for a task, see --check
    "task_images": 64.0,  # of a task that encodes; 1 on CPUs
    "feed_s": 0.015,  # of a worker's CPU for an image of a batch
    "cores": 1e9,  # that compute; below the number of workers they share them
    # Prices in dollars, of no particular day.
    "gpu_hour": 4.0,
    "gb_month": 0.023,
    "put_1000": 0.005,
    "get_1000": 0.0004,
}


@dataclass(frozen=True)
class Forecast:
    """What one part takes.

    Attributes:
        seconds: of the part.
        bound_by: what it waits for.
        puts, gets: requests to S3.
        read_gb, written_gb: from and to S3.
    """

    seconds: float
    bound_by: str
    puts: float
    gets: float
    read_gb: float
    written_gb: float


def encode(figures: dict[str, float], images: int, gpus: int) -> Forecast:
    """Fill the cache: every node copies all shards, every GPU encodes its share."""
    nodes = -(-gpus // figures["gpus_per_node"])
    shards = images / figures["shard_images"]
    read_mb, written_mb = nodes * images * figures["image_mb"], images * figures["entry_mb"]
    gets = nodes * shards * 2  # one to ask for the version, one to fetch
    parts = {
        "GPUs": images * figures["encode_s"] / min(gpus, figures["cores"]),
        "copy of the shards to each node": read_mb / nodes / figures["node_mb_s"],
        "writes of a node": written_mb / nodes / figures["node_mb_s"],
        "PUTs of a prefix": images / figures["put_s"],
        "the driver": images / figures["task_images"] * figures["dispatch_s"],
    }
    return _slowest(parts, images, gets, read_mb, written_mb)


def epoch(figures: dict[str, float], images: int, gpus: int) -> Forecast:
    """Train one epoch from the cache."""
    busy = min(gpus, figures["batch"])  # others have no image in a step
    nodes = -(-gpus // figures["gpus_per_node"])
    steps = images / figures["batch"]
    read_mb = images * figures["entry_mb"]
    exchange = 2 * figures["learned_mb"] / figures["net_mb_s"] if gpus > 1 else 0.0
    parts = {
        "GPUs": images * figures["step_s"] / min(busy, figures["cores"]) + steps * exchange,
        "batches on CPUs": images * figures["feed_s"] / min(busy, figures["cores"]),
        "requests one after the other": images * figures["latency_s"] / busy / figures["loaders"],
        "reads of a node": read_mb / nodes / figures["node_mb_s"],
        "GETs of a prefix": images / figures["get_s"],
    }
    return _slowest(parts, 0, images, read_mb, 0.0)


def _slowest(
    parts: dict[str, float], puts: float, gets: float, read_mb: float, written_mb: float
) -> Forecast:
    """The parts overlap, so the slowest one counts."""
    bound_by = max(parts, key=lambda part: parts[part])
    return Forecast(parts[bound_by], bound_by, puts, gets, read_mb / 1000, written_mb / 1000)


def table(figures: dict[str, float], images: int, numbers: list[int]) -> list[str]:
    """Return the lines of a table in Markdown, a line for each number of GPUs."""
    lines = [
        "| GPUs | encode | bound by | an epoch | bound by | read from S3, encode and epoch "
        "| GPU cost, encode and epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in numbers:
        encoded, trained = encode(figures, images, gpus), epoch(figures, images, gpus)
        costs = [gpus * part.seconds / 3600 * figures["gpu_hour"] for part in (encoded, trained)]
        lines.append(
            f"| {gpus} | {_time(encoded.seconds)} | {encoded.bound_by} | {_time(trained.seconds)} "
            f"| {trained.bound_by} | {encoded.read_gb / 1000:,.0f} TB, "
            f"{trained.read_gb / 1000:,.1f} TB | ${costs[0]:,.0f}, ${costs[1]:,.0f} |"
        )
    once = encode(figures, images, 1)
    month = once.written_gb * figures["gb_month"]
    requests = once.puts / 1000 * figures["put_1000"] + images / 1000 * figures["get_1000"]
    lines += [
        "",
        f"The cache: {once.written_gb / 1000:,.1f} TB, ${month:,.0f} a month; {once.puts:,.0f} "
        f"PUTs, and {images:,} GETs an epoch, ${requests:,.2f} together.",
    ]
    return lines


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def check(processes: list[int], images: int) -> None:
    """Encode and train with some numbers of processes; print predicted beside measured times."""
    with tempfile.TemporaryDirectory(prefix="samray-") as folder:
        measured = {number: _run(Path(folder), number, images) for number in processes}
    first, number = measured[processes[0]], processes[0]
    cores = float(os.cpu_count() or 1)
    working = min(number, cores)
    figures = FIGURES | {
        "cores": cores,
        "dispatch_s": first["dispatch_s"],
        "task_images": 1.0,
        "encode_s": first["encode_s"] * working / first["encoded"],
        "step_s": first["epoch_s"] * working / first["trained"],
        "batch": BATCH,
        "entry_mb": 0.07,  # of `tiny`
        "image_mb": 0.1,
        "latency_s": 0.0,  # a folder on this machine
        "feed_s": 0.0,  # in step_s
        "learned_mb": 0.0,
    }
    for number, found in measured.items():
        forecasts = {
            "encode_s": encode(figures, int(found["encoded"]), number).seconds,
            "epoch_s": epoch(figures, int(found["trained"]), number).seconds,
        }
        line: dict[str, object] = {"processes": number, "load": found["load"]}
        for part, seconds in forecasts.items():
            line[part] = {"predicted": round(seconds, 2), "measured": round(found[part], 2)}
        print(json.dumps(line), flush=True)
    print(json.dumps({"dispatch_ms": round(1000 * first["dispatch_s"], 2)}))


def _run(root: Path, processes: int, images: int) -> dict[str, float]:
    """Encode and train in a Ray of so many CPUs; return the seconds of each part."""
    ray.init(address="local", num_cpus=processes, log_to_driver=False, logging_level="ERROR")
    photos, prepared, run = root / "photos", root / "prepared", root / f"run{processes}"
    if not prepared.exists():
        assert cli.main(["sample-data", str(photos), "--num-images", str(images)]) == 0
        words = [f"prepare.data_dir={photos}", f"prepare.output_dir={prepared}"]
        samray.prepare(samray.load_config(None, words))
    words = [
        f"train.data_dir={prepared}", f"train.output_dir={run}", "train.num_epochs=3",
        f"train.batch_size={BATCH}", "model.adapt=none", f"scaling.num_workers={processes}",
        "scaling.cpus_per_worker=1", f"embeddings.cache_dir={root / f'cache{processes}'}",
        "train.instances=false", "prompts.point_selection=center",
    ]  # fmt: skip
    samray.fit(samray.load_config(None, words))
    state = json.loads((run / "run.json").read_text())
    found = {
        "encode_s": state["embeddings"]["seconds"],
        "encoded": state["embeddings"]["encoded"],
        "epoch_s": statistics.median(epoch["seconds"] for epoch in state["epochs"]),
        "trained": len(samray.PreparedDataset(prepared).split("train")),
        "dispatch_s": _dispatch_seconds(),
        "load": round(os.getloadavg()[0], 1),
    }
    ray.shutdown()
    return found


@ray.remote(num_cpus=0)
class _Idle:
    def call(self, name: str, view: int) -> str:
        return name


def _dispatch_seconds() -> float:
    """What a task costs the driver: seconds of a call of an actor that does nothing."""
    actor = _Idle.remote()
    ray.get(actor.call.remote("images/a.jpg", 0))
    started = time.perf_counter()
    ray.get([actor.call.remote("images/a.jpg", 0) for _ in range(CALLS)])
    return (time.perf_counter() - started) / CALLS


def main() -> None:
    """Print the table, or the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--set", metavar="NAME=VALUE", nargs="+", default=[])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.processes, arguments.images or 120)
        return
    given = dict(word.split("=") for word in arguments.set)
    if unknown := set(given) - set(FIGURES):
        parser.error(f"unknown {sorted(unknown)}; there are {', '.join(FIGURES)}")
    figures = FIGURES | {name: float(value) for name, value in given.items()}
    print("\n".join(table(figures, arguments.images or 10**6, arguments.gpus)))


if __name__ == "__main__":
    main()
