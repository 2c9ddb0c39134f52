"""Speed of LabelMe files to masks: samray against labelme's functions, on the same files.

    python benchmarks/rasterize.py [FOLDER] [--rounds 5]

From a file's bytes to the COCO RLE of each shape, on one core. FOLDER holds LabelMe JSON in it or
below; the default is drawn sample data. The labelme side is `json.load`, then
`labelme.utils.shape.shape_to_mask` and pycocotools' encoding for every shape, as in labelme's own
export scripts. Needs `pip install -c constraints.txt -e ".[reference]"`. The two sides alternate
file by file, so that a busy machine slows both; the figures are medians of the rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco

from samray.data.annotation import Annotation
from samray.data.labelme import read_annotation
from samray.data.sample_data import write_sample_data
from samray.errors import AnnotationError
from samray.geometry.masks import encode_rle, rasterize_instance

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")  # labelme imports Qt; no screen is needed


def by_samray(raw: bytes) -> int:
    """Convert the shapes of one file to RLE; return their number."""
    annotation = read_annotation(raw)
    assert annotation.size is not None
    for shape in annotation.shapes:
        encode_rle(rasterize_instance([shape], annotation.size), annotation.size)
    return len(annotation.shapes)


def by_labelme(raw: bytes) -> int:
    """The same with labelme's functions."""
    from labelme.utils.shape import shape_to_mask

    document = json.loads(raw)
    size = (document["imageHeight"], document["imageWidth"])
    for shape in document["shapes"]:
        mask = shape_to_mask(size, shape["points"], shape["shape_type"])
        coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return len(document["shapes"])


def usable_by_both(annotation: Annotation) -> bool:
    """Whether both sides make the same number of masks from a file, so that times compare."""
    if annotation.size is None or len(annotation.shapes) != annotation.num_shapes:
        return False
    try:
        for shape in annotation.shapes:
            rasterize_instance([shape], annotation.size)
    except AnnotationError:
        return False
    plain = all(len(shape.points) == 2 for shape in annotation.shapes if shape.kind == "rectangle")
    return plain and not any(shape.kind == "mask" for shape in annotation.shapes)


def main() -> None:
    """Print instances per second of both sides and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or write_sample_data(Path(temporary) / "drawn", 40, 0)
        every = [path.read_bytes() for path in sorted(folder.rglob("*.json"))]
    files = [raw for raw in every if usable_by_both(read_annotation(raw))]
    if not files:
        parser.error(f"{folder} has no LabelMe JSON that both sides can read")
    by_samray(files[0]), by_labelme(files[0])  # imports
    rates: dict[str, list[float]] = {"samray": [], "labelme": []}
    for _ in range(arguments.rounds):
        seconds = dict.fromkeys(rates, 0.0)
        number = 0
        for raw in files:
            for name, work in (("samray", by_samray), ("labelme", by_labelme)):
                started = time.perf_counter()
                count = work(raw)
                seconds[name] += time.perf_counter() - started
            number += count
        for name in rates:
            rates[name].append(number / seconds[name])
    ratios = [a / b for a, b in zip(rates["samray"], rates["labelme"], strict=True)]
    print(f"{number} instances of {len(files)} files ({len(every) - len(files)} left out)")
    for name, values in rates.items():
        print(f"{name:8}{statistics.median(values):8.0f} instances per second")
    spread = f"{min(ratios):.1f} to {max(ratios):.1f}"
    print(f"samray is {statistics.median(ratios):.1f} times as fast ({spread})")


if __name__ == "__main__":
    main()
