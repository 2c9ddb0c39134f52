"""Seconds and peak memory of finding all objects, by the size of the picture.

    python benchmarks/large.py --run RUN --image IMAGE [--sides 256 1024 4096 10000] [--tile 512]

The picture is the image, mirrored and repeated to the size. Ways: `watershed` and `prompts`, on the
maps of the run's instance decoder of the picture as it is; `windows` and `prompts-windows`, the
same through windows of --tile pixels; `grid`, SAM's mask generator. Each measurement has a process
of its own. One JSON line each.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from samray.config import PredictConfig
from samray.geometry.images import decode_image
from samray.instances.saved import load_instances
from samray.prediction.segmentation import find_everything, find_instances, generator_settings
from samray.sam.checkpoint import find_checkpoint, load_checkpoint

WAYS = ("watershed", "windows", "prompts", "prompts-windows", "grid")


def main() -> None:
    """Measure every way at every size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", type=int, default=[256, 1024, 4096, 10000])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--here", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    if arguments.here:
        (side,), (way,) = arguments.sides, arguments.ways
        measure(arguments.run, arguments.image, side, way, arguments.tile)
        return
    for way in arguments.ways:
        for side in arguments.sides:
            words = ["--run", arguments.run, "--image", arguments.image, "--sides", side]
            words += ["--ways", way, "--tile", arguments.tile, "--here"]
            subprocess.run([sys.executable, __file__, *map(str, words)], check=True)


def measure(run: Path, path: Path, side: int, way: str, tile: int) -> None:
    """Print one line."""
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(find_checkpoint(run))
    sam = checkpoint.model()
    model = load_instances(checkpoint, sam)
    assert model is not None
    kind: Literal["watershed", "both"] = "both" if way.startswith("prompts") else "watershed"
    used = replace(model, way=replace(model.way, kind=kind))
    image = decode_image(path.read_bytes())
    grown = [(0, max(0, side - length)) for length in image.shape[:2]]
    picture = np.pad(image, [*grown, (0, 0)], mode="symmetric")[:side, :side]
    find_instances(sam, used, picture[:256, :256])  # warm up
    before, started = peak(), time.perf_counter()
    if way == "grid":
        found = find_everything(sam, picture, generator_settings(PredictConfig(), "tiny"))
    else:
        found = find_instances(sam, used, picture, tile if way.endswith("windows") else None)
    line = {
        **{"way": way, "side": side, "objects": len(found)},
        **{"seconds": round(time.perf_counter() - started, 2)},
        **{"peak_mib": peak(), "before_mib": before},
    }
    print(json.dumps(line), flush=True)


def peak() -> int:
    """Return the peak of this process's resident memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
