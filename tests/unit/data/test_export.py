"""What is exported is the same dataset again: every annotation on its own picture. No Ray."""

import base64
import hashlib
import io
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from samray.config import PrepareConfig, load_config
from samray.data.coco import is_coco, read_coco
from samray.data.dataset import FORMAT, SCHEMA
from samray.data.discovery import find_files
from samray.data.export import export
from samray.data.intake import Entry, Rules, read_entry
from samray.data.splits import SplitRule

TRIANGLE = [[5, 5], [30, 5], [30, 30]]


def picture(seed: int, form: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def labelme(image_path: str, label: str = "nut", **keys: Any) -> dict[str, Any]:
    shape = {"label": label, "points": TRIANGLE, "shape_type": "polygon", "group_id": None}
    sizes = {"imageHeight": 40, "imageWidth": 60}
    return {"shapes": [shape], "imagePath": image_path, **sizes, **keys}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows that `prepare` would store of a folder."""
    files = find_files(folder)
    entries = []
    for name in list(files.annotations):
        raw = (folder / name).read_bytes()
        if is_coco(raw):
            files.annotations.remove(name)
            files.coco.append(name)
            images, problems = read_coco(raw, name)
            assert problems == []
            entries += [Entry.of_coco(image) for image in images]
        else:
            entries.append(Entry(name, "labelme", files.stamps[name]))
    rules = Rules(PrepareConfig(), {}, frozenset())
    rows, claimed = [], set()
    for entry in entries:
        outcome, found = read_entry(entry, files, rules, folder)
        assert outcome.rejected == []
        claimed.add(outcome.claims)
        rows += found
    for name in sorted(set(files.images) - claimed):
        rows += read_entry(Entry(name, "image", files.stamps[name]), files, rules, folder)[1]
    return rows


def exported(rows: list[dict[str, Any]], folder: Path, form: str) -> Path:
    """Export a prepared dataset of these rows, all annotated ones in train."""
    (folder / "prepared/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "prepared/data/part-0.parquet")
    annotated = [row["name"] for row in rows if row["annotation"]]
    manifest = {
        "format": FORMAT,
        "digest": "d",
        "labels": dict.fromkeys(i["label"] for row in rows for i in row["instances"]),
        "splits": {"train": annotated, "val": [], "test": []},
        "unlabelled": [row["name"] for row in rows if not row["annotation"]],
        "shards": ["data/part-0.parquet"],
        "dropped_annotations": [],
    }
    write(folder / "prepared/manifest.json", manifest)
    words = [f"export.data_dir={folder / 'prepared'}", f"export.output_dir={folder / 'out'}"]
    export(load_config(None, [*words, f"export.format={form}"]))
    return folder / "out"


def content(rows: list[dict[str, Any]]) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """Each picture by its digest, with its labels and masks."""
    return sorted(
        (
            hashlib.sha256(row["image"]).hexdigest(),
            [(instance["label"], instance["rle"]) for instance in row["instances"]],
        )
        for row in rows
    )


@pytest.mark.parametrize("form", ["labelme", "coco"])
def test_an_embedded_image_replaces_no_other_and_keeps_its_annotation(
    form: str, tmp_path: Path
) -> None:
    """`a.png` was written over it, and its annotation lay on that picture."""
    inside = labelme("gone.png", "inside", imageData=base64.b64encode(picture(0)).decode())
    raw = tmp_path / "raw"
    write(raw / "a.json", inside)
    for seed, name in enumerate(("a.png", "a.jpg", "A_2.png", "b/b.png", "b.png/c.png"), 1):
        write(raw / name, picture(seed))
    write(raw / "b.json", inside | {"imageData": base64.b64encode(picture(9)).decode()})
    write(raw / "b/b.json", labelme("b.png"))
    rows = rows_of(raw)
    assert {row["name"] for row in rows if row["annotation"]} == {"a.json", "b.json", "b/b.png"}
    folder = exported(rows, tmp_path, form)
    assert content(rows_of(folder)) == content(rows)
    names = {str(path.relative_to(folder / "images")) for path in folder.glob("images/**/*.*")}
    assert {"a.png", "a_3.png", "b_2.png"} <= names


@pytest.mark.parametrize("form", ["labelme", "coco"])
def test_an_embedded_picture_of_a_phone_gets_an_extension_that_is_read(
    form: str, tmp_path: Path
) -> None:
    """A JPEG with a second picture in it is an MPO to Pillow, and `.mpo` no name of an image."""
    second = Image.new("RGB", (60, 40))
    raw = picture(0, "MPO", save_all=True, append_images=[second])
    write(tmp_path / "raw/m.json", labelme("m.x", imageData=base64.b64encode(raw).decode()))
    rows = rows_of(tmp_path / "raw")
    folder = exported(rows, tmp_path, form)
    assert content(rows_of(folder)) == content(rows)
    assert (folder / "images/m.jpg").read_bytes() == raw


@pytest.mark.parametrize("form", ["labelme", "coco"])
def test_the_splits_are_written_as_a_split_file(form: str, tmp_path: Path) -> None:
    """Prepared again, tiles of one picture went to several splits, each by its own hash."""
    raw = tmp_path / "raw"
    names = ["a, b.png", "c\N{LINE SEPARATOR}d.png", 'sub/"e".png', "f\ng.png"]
    for seed, name in enumerate([*names, "unlabelled.png"]):
        write(raw / name, picture(seed))
    for name in names:
        write((raw / name).with_suffix(".json"), labelme(PurePosixPath(name).name))
    write(raw / "g.json", labelme("x.png", imageData=base64.b64encode(picture(9)).decode()))
    folder = exported(rows_of(raw), tmp_path, form)
    rule = SplitRule(PrepareConfig(split_file=str(folder / "splits.csv")))
    assert rule.listed == dict.fromkeys(["images/g.png", *(f"images/{n}" for n in names)], "train")
    assert find_files(folder).skipped == []


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.png", "train/2.png", "test/3.png"),
        ("x.png", "a/x.png", "b/a/x.png", "a/y.png"),
        ("1.png", "2.png", "train/1.png", "val/2.png"),
        ("1.png", "images/1.png"),
    ],
    ids=["other splits", "one name in several folders", "a split's folder", "images/images/"],
)
def test_an_exported_coco_file_names_each_picture_exactly(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    """Those in test/ that are in the train split were refused, and x.png could be either of two.

    1.png got the masks of train/1.png, too, for the sake of instances_train.json.
    """
    for seed, name in enumerate(names):
        path = tmp_path / "raw" / name
        write(path, picture(seed))
        write(path.with_suffix(".json"), labelme(path.name, f"on {name}"))
    rows = rows_of(tmp_path / "raw")
    folder = exported(rows, tmp_path, "coco")
    assert content(rows_of(folder)) == content(rows)
    listed = json.loads((folder / "annotations/instances_train.json").read_text())["images"]
    assert all((folder / "images" / image["file_name"]).is_file() for image in listed)
