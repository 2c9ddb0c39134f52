"""Images of a prepared dataset are made when they are asked for, and memory stays small."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from samray.data import dataset as module
from samray.data.dataset import FORMAT, SCHEMA, ImageRecord, PreparedDataset
from samray.errors import DatasetError
from samray.geometry.masks import CroppedMask, encode_rle

LABELS = ("nut", "bolt", "Ärmel")


def row(number, objects, source=None):
    """An image of 8 x 8 with as many objects, each a pixel of its own."""
    name = f"images/{number:03d}.png"
    instances = []
    for place in range(objects):
        mask = CroppedMask(np.ones((1, 1), bool), (place, number % 8))
        instances.append(
            {
                "label": LABELS[(number + place) % 3],
                "box": mask.box,
                "area": 1,
                "rle": encode_rle(mask, (8, 8)),
                "area_outside": place,
            }
        )
    return {
        "name": name,
        "source": source or name,
        "tile": None,
        "annotation": None if not objects else f"{name}.json",
        "image": f"bytes of {number}".encode(),
        "image_digest": f"{number:064x}",
        "height": 8,
        "width": 8,
        "instances": instances,
        "ignored": b"x" if number == 3 else None,
    }


@pytest.fixture
def rows():
    """24 images; every fifth has no object."""
    return [
        row(number, number % 5, "images/big.tif" if number == 7 else None) for number in range(24)
    ]


def written(folder, rows, per_shard=5, group=2, dropped=(), **more):
    """A dataset of shards with several groups of rows, in no order."""
    (folder / "data").mkdir(parents=True)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    shards = []
    for start in range(0, len(rows), per_shard):
        shards.append(f"data/{start:05d}.parquet")
        table = pa.Table.from_pylist([rows[i] for i in order[start : start + per_shard]], SCHEMA)
        pq.write_table(table, folder / shards[-1], row_group_size=group)
    names = [row["name"] for row in rows]
    manifest = {
        "format": FORMAT,
        "digest": "d",
        "splits": {"train": names[:16], "val": names[16:], "test": names[:1]},
        "shards": shards,
        "dropped_annotations": list(dropped),
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return PreparedDataset(folder)


def test_an_image_is_what_its_row_says(tmp_path, rows):
    images = written(tmp_path / "p", rows).images
    assert list(images) == sorted(row["name"] for row in rows)
    assert len(images) == len(rows)
    for row in rows:
        record = images[row["name"]]
        assert (record.name, record.source) == (row["name"], row["source"])
        assert (record.digest, record.size) == (row["image_digest"], (8, 8))
        assert record.ignored == row["ignored"]
        assert record.num_instances == len(record.instances) == len(row["instances"])
        for found, wanted in zip(record.instances, row["instances"], strict=True):
            assert vars(found) == {**wanted, "box": tuple(wanted["box"])}
            assert record.decode(found).sum() == 1
    assert "images/none.png" not in images
    with pytest.raises(KeyError):
        images["images/none.png"]


def test_a_split_is_a_sequence(tmp_path, rows):
    dataset = written(tmp_path / "p", rows)
    train, val = dataset.split("train"), dataset.split("val")
    names = [row["name"] for row in rows[:16] if row["instances"]]
    assert [record.name for record in train] == names
    assert len(train) == len(names)
    assert [record.name for record in train[1::3]] == names[1::3]
    assert train[-1].name == names[-1]
    assert [record.name for record in train + val][len(names)] == val[0].name
    assert train.labels == tuple(sorted(LABELS))
    assert train[:1].labels == ("bolt",)
    with pytest.raises(IndexError):
        train[len(names)]
    with pytest.raises(DatasetError, match="the test split has no instance"):
        dataset.split("test")


def test_images_annotated_as_empty_are_there_for_who_asks(tmp_path, rows):
    empty = [row["name"] for row in rows[:16:5]]  # 0, 5, 10, 15
    rows[5]["width"] = 9
    dataset = written(tmp_path / "some", rows, background=empty[1:], tiles=None)
    assert len(dataset.split("train")) == 12
    assert [record.name for record in dataset.split("train", background=True)] == [
        row["name"] for row in rows[1:16]
    ]
    with pytest.raises(DatasetError, match="the test split has no instance"):
        dataset.split("test", background=True)
    tiled = written(tmp_path / "tiled", rows, background=empty, tiles={"size": 8})
    found = [record.name for record in tiled.split("train", background=True)]
    assert rows[5]["name"] not in found  # the model would see it smaller than the tiles
    assert len(found) == 15
    earlier = written(tmp_path / "earlier", rows)
    assert len(earlier.split("train", background=True)) == 12


def test_few_files_are_open_and_little_is_kept(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(module, "OPEN_FILES", 2)
    monkeypatch.setattr(module, "LATEST_ROWS", 3)
    dataset = written(tmp_path / "p", rows, per_shard=2, group=1)
    for row in [*rows, *reversed(rows)]:
        record = dataset.images[row["name"]]
        assert dataset.image_bytes(record) == row["image"]
        assert len(record.instances) == len(row["instances"])
    opened = [link for link in Path("/proc/self/fd").iterdir() if str(tmp_path) in target(link)]
    assert len(opened) <= 2
    assert len(dataset._rows) == 3
    columns = dataset.columns
    arrow = (columns.names, columns.sources, columns.digests, columns.labels)
    kept = sum(array.nbytes for array in arrow)
    kept += sum(a.nbytes for a in (columns.heights, columns.widths, columns.shards, columns.rows))
    assert kept / len(rows) < 200, "bytes an image"


def target(link):
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def test_what_crosses_processes_needs_no_dataset(tmp_path, rows):
    dataset = written(tmp_path / "p", rows)
    record = dataset.images["images/003.png"]
    copied = pickle.loads(pickle.dumps(record))
    assert type(copied) is ImageRecord
    assert copied.instances == record.instances
    assert copied.ignored == b"x"
    changed = replace(record, ignored=b"y")
    assert (changed.ignored, changed.instances, record.ignored) == (b"y", record.instances, b"x")
    again = pickle.loads(pickle.dumps(dataset))
    assert again.images["images/003.png"].instances == record.instances
    assert len(pickle.dumps(dataset)) < 5000


def test_dropped_annotations_are_left_out_and_the_later_shard_counts(tmp_path, rows):
    dataset = written(tmp_path / "a", rows[:10], dropped=["images/001.png.json"])
    assert "images/001.png" not in dataset.images
    assert len(dataset.images) == 9
    twice = [row(1, 1), {**row(1, 3), "image": b"later"}]
    folder = tmp_path / "b"
    (folder / "data").mkdir(parents=True)
    for number, one in enumerate(twice):
        pq.write_table(pa.Table.from_pylist([one], SCHEMA), folder / "data" / f"{number}.parquet")
    manifest = {
        "format": FORMAT, "digest": "d", "splits": {}, "dropped_annotations": [],
        "shards": ["data/0.parquet", "data/1.parquet"],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    dataset = PreparedDataset(folder)
    (record,) = dataset.images.values()
    assert (record.num_instances, dataset.image_bytes(record)) == (3, b"later")


def test_a_shard_that_is_damaged_is_named(tmp_path, rows):
    dataset = written(tmp_path / "p", rows)
    (tmp_path / "p" / "data" / "00005.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(DatasetError, match=r"00005.parquet: cannot be read .*prepare the dataset"):
        len(dataset.images)
