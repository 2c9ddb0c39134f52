"""A prepared dataset of five small pictures, written without Ray."""

import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samray.data.dataset import FORMAT, SCHEMA, PreparedDataset
from samray.geometry.masks import CroppedMask, encode_rle

SPLITS = {"train": ["0.png", "1.png", "2.png"], "val": ["3.png"], "test": ["4.png"]}


def write_dataset(folder):
    """Five pictures of 48 x 64 with two discs and a square, two labels."""
    rows = []
    for name in sorted(name for names in SPLITS.values() for name in names):
        rng = np.random.default_rng(int(name[0]))
        image = rng.integers(0, 60, (48, 64, 3), np.uint8)
        y, x = np.mgrid[:48, :64]
        left, right, top = rng.integers(10, 16), rng.integers(40, 46), rng.integers(12, 18)
        masks = [
            np.hypot(y - 30, x - left) < 9,
            np.hypot(y - top, x - right) < 8,
            (abs(y - 40) < 6) & (abs(x - right) < 7),
        ]
        for mask, colour in zip(masks, ((220, 80, 80), (220, 80, 80), (80, 200, 90)), strict=True):
            image[mask] = colour
        rows.append(
            {
                "name": name,
                "source": name,
                "tile": None,
                "annotation": f"{name}.json",
                "image": cv2.imencode(".png", image[..., ::-1])[1].tobytes(),
                "image_digest": f"{int(name[0]):064x}",
                "height": 48,
                "width": 64,
                "instances": [
                    {
                        "label": label,
                        "box": CroppedMask(mask, (0, 0)).box,
                        "area": int(mask.sum()),
                        "rle": encode_rle(CroppedMask(mask, (0, 0)), (48, 64)),
                        "area_outside": 0,
                    }
                    for mask, label in zip(masks, ("disc", "disc", "square"), strict=True)
                ],
            }
        )
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "data" / "part-00000.parquet")
    manifest = {
        "format": FORMAT,
        "digest": "d",
        "splits": SPLITS,
        "shards": ["data/part-00000.parquet"],
        "dropped_annotations": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return PreparedDataset(folder)
