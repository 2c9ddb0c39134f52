"""ViT-B's image encoder on a CPU: samray's beside segment_anything's and its matrix products.

    python benchmarks/encode.py [--repeats N] [--wall]

Random weights; the ways alternate in one process. One JSON line: median seconds of processor time,
or with --wall of the clock, which needs an idle machine; the number of threads, ratios, the largest
difference of the embeddings as a share of their largest value, and the peak memory that each way
adds (of a process of its own).
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from segment_anything import sam_model_registry

from samray.sam.model import build_model

SIDE, WIDTH, HEADS, BLOCKS, GLOBAL = 64, 768, 12, 12, 4  # ViT-B
WINDOWS, WINDOW = 25, 14


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--wall", action="store_true", help="seconds of the clock")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.wall else time.process_time
    peaks = {way: in_a_process(way) for way in ("stock", "samray")}
    ours = build_model("vit_b").image_encoder
    stock = sam_model_registry["vit_b"]().image_encoder.eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "rel_pos" in name or name == "pos_embed":  # zero in a new model
                parameter.normal_(std=0.02)
    stock.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 1024, 1024)
    ways: dict[str, Callable[[], Any]] = {
        "stock": lambda: stock(image),
        "samray": lambda: ours(image),
        "products": products,
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(arguments.repeats):
            for way, run in ways.items():
                started = clock()
                run()
                seconds[way].append(clock() - started)
        expected, found = stock(image), ours(image)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    figures = {
        **{f"{way}_s": round(value, 2) for way, value in medians.items()},
        "threads": torch.get_num_threads(),
        "speed-up": round(medians["stock"] / medians["samray"], 2),
        "share of the floor": round(medians["products"] / medians["samray"], 2),
        "difference": float((expected - found).abs().max() / expected.abs().max()),
        "peak_mib": peaks,
    }
    print(json.dumps(figures))


def products() -> None:
    """The matrix products of all blocks, of the same shapes, and nothing else."""
    tokens = torch.ones(SIDE * SIDE, WIDTH)
    weights = [torch.ones(WIDTH, width) for width in (3 * WIDTH, WIDTH, 4 * WIDTH)]
    for block in range(BLOCKS):
        for weight in weights:
            wide = tokens @ weight
        wide @ torch.ones(4 * WIDTH, WIDTH)
        count, length = (HEADS, SIDE**2) if block < GLOBAL else (HEADS * WINDOWS, WINDOW**2)
        query = torch.ones(count, length, WIDTH // HEADS)
        (query @ query.transpose(1, 2)) @ query


def in_a_process(way: str) -> int:
    """MiB that encoding an image adds to the peak memory of a new process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(added_memory, (way,))


def added_memory(way: str) -> int:
    """Encode once; return the MiB that the peak has grown by."""
    sam = build_model("vit_b") if way == "samray" else sam_model_registry["vit_b"]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        sam.image_encoder.eval()(torch.zeros(1, 3, 1024, 1024))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


if __name__ == "__main__":
    main()
