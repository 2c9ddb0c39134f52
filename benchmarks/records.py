"""Memory and time of a prepared dataset's records, by their number.

    python benchmarks/records.py [--numbers 2000 20000 200000] [--objects 10] [--folder DIR]

Writes shards of the prepared format with tiny drawn images (32 x 32, one PNG for all, and masks of
their own), then opens each dataset in a process of its own, as each worker does. One JSON line a
number: MiB that the process grew by until the train split is there, at its peak while it reads
2,000 records and images in random order, seconds of both, and files open at the end.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samray.data.dataset import FORMAT, SCHEMA, PreparedDataset
from samray.geometry.masks import CroppedMask, encode_rle

PER_SHARD, SIDE, READS = 32, 1024, 2000


def main() -> None:
    """Print one line of figures a number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numbers", type=int, nargs="+", default=[2000, 20000])
    parser.add_argument("--objects", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    for number in arguments.numbers:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            write_dataset(Path(folder), number, arguments.objects)
            print(json.dumps({"images": number, **in_a_process(Path(folder))}), flush=True)


def write_dataset(folder: Path, number: int, objects: int) -> None:
    """Write shards and a manifest of so many images; a fifth of them are for validation."""
    rng = np.random.default_rng(0)
    png = cv2.imencode(".png", rng.integers(0, 255, (32, 32, 3), np.uint8))[1].tobytes()
    rows = [
        {
            "name": "", "source": "", "tile": None, "annotation": "", "image": png,
            "image_digest": "", "height": SIDE, "width": SIDE,
            "instances": [_instance(rng) for _ in range(objects)],
        }
        for _ in range(PER_SHARD)
    ]  # fmt: skip
    drawn = pa.Table.from_pylist(rows, SCHEMA)
    names = [f"images/photo_{place:08d}.jpg" for place in range(number)]
    (folder / "data").mkdir()
    shards = []
    for start in range(0, number, PER_SHARD):
        own = names[start : start + PER_SHARD]
        columns = {
            "name": own,
            "source": own,
            "annotation": [f"{name}.json" for name in own],
            "image_digest": [f"{start + place:064x}" for place in range(len(own))],
        }
        table = drawn.slice(0, len(own))
        for column, values in columns.items():
            place = SCHEMA.get_field_index(column)
            table = table.set_column(place, SCHEMA.field(column), pa.array(values))
        shards.append(f"data/part-{start // PER_SHARD:06d}.parquet")
        pq.write_table(table, folder / shards[-1])
    manifest = {
        "format": FORMAT,
        "digest": "drawn",
        "splits": {"train": names[number // 5 :], "val": names[: number // 5], "test": []},
        "shards": shards,
        "dropped_annotations": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _instance(rng: np.random.Generator) -> dict[str, Any]:
    """A drawn polygon of about 100 pixels across, as prepare stores it."""
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radii = rng.uniform(30, 60, 40)
    points = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + 64
    pixels = np.zeros((128, 128), np.uint8)
    cv2.fillPoly(pixels, [np.rint(points).astype(np.int32)], 1)
    mask = CroppedMask(pixels > 0, tuple(int(v) for v in rng.integers(0, SIDE - 128, 2)))
    return {
        "label": str(rng.choice(["nut", "bolt", "washer"])),
        "box": mask.box,
        "area": int(pixels.sum()),
        "rle": encode_rle(mask, (SIDE, SIDE)),
        "area_outside": 0,
    }


def in_a_process(folder: Path) -> dict[str, Any]:
    """Open a dataset in a new process; return its figures."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_open, (folder,))


def _open(folder: Path) -> dict[str, Any]:
    before, started = _resident(), time.perf_counter()
    dataset = PreparedDataset(folder)
    records = dataset.split("train")
    opened, seconds = _resident() - before, time.perf_counter() - started
    started = time.perf_counter()
    order = np.random.default_rng(1).integers(0, len(records), READS)
    masks, failure = 0, None
    try:
        for place in order.tolist():
            record = records[place]
            masks += len(record.instances)
            record.decode_crop(record.instances[0])
            dataset.image_bytes(record)
    except OSError as exc:
        failure = str(exc)[:100]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {
        "open_mib": round(opened / 2**20, 1),
        "bytes_an_image": round(opened / len(records) * 0.8),
        "open_s": round(seconds, 2),
        "read_ms_an_image": round(1000 * (time.perf_counter() - started) / READS, 2),
        "peak_mib": round(peak / 2**20, 1),
        "files_open": len(list(Path("/proc/self/fd").iterdir())),
        "masks": masks,
        "failure": failure,
    }


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
