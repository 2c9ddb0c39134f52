"""`samray prepare` end to end: inputs, outputs, and interruptions."""

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from PIL import Image

from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.data.prepare import prepare
from samray.errors import ConfigError, DatasetError

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "datasets"
SPLITS = ("train", "val", "test")
ALL_TRAIN = ("prepare.val_fraction=0", "prepare.test_fraction=0")
SQUARE = [[4, 6], [20, 6], [20, 30], [4, 30]]


def run(data: Path, output: Path, *overrides: str, **settings: object) -> dict:
    options = {f"prepare.{key}": value for key, value in settings.items()}
    options |= {"prepare.data_dir": str(data), "prepare.output_dir": str(output)}
    return prepare(load_config(overrides=overrides, options=options))


def draw(path: Path, seed: int, size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def shape(label: str, points: list, kind: str = "polygon", group: int | None = None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group, "flags": {}}


def annotate(
    path: Path, image_path: str, shapes: list[dict], size: tuple[int, int] = (48, 64)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image_path}
    document |= {"imageData": None, "imageHeight": size[0], "imageWidth": size[1]}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def shapes_of(json_path: Path) -> list[dict]:
    return json.loads(json_path.read_text(encoding="utf-8"))["shapes"]


def instances_of(shapes: list[dict]) -> dict[tuple, list[dict]]:
    """Shapes joined by label and group, as this test understands the rule."""
    joined: dict[tuple, list[dict]] = {}
    for number, entry in enumerate(shapes):
        group = entry["group_id"]
        key = (entry["label"], "alone", number) if group is None else (entry["label"], group)
        joined.setdefault(key, []).append(entry)
    return joined


def filled(shapes: list[dict], size: tuple[int, int]) -> np.ndarray:
    """The union of polygons, drawn on the whole frame."""
    canvas = np.zeros(size, np.uint8)
    for entry in shapes:
        cv2.fillPoly(canvas, [np.floor(np.array(entry["points"])).astype(np.int32)], 1)
    return canvas.astype(bool)


def expected_split(digest: str, val: float = 0.2, test: float = 0.2) -> str:
    u = int(digest[:8], 16) / 2**32
    return "val" if u < val else "test" if u < val + test else "train"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each shard and its list of outcomes was written, and as which file."""
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in sorted((folder / "data").iterdir())
    }


def accounted(manifest: dict) -> int:
    """Number of shapes that the manifest accounts for."""
    rejected = sum(entry["num_shapes"] for entry in manifest["rejected"])
    filtered = sum(manifest["filtered"].values())
    not_instances = sum(manifest["not_instances"].values())
    return manifest["num_instances"] + manifest["joined"] + rejected + filtered + not_instances


def test_the_manifest_counts_what_is_in_the_folder(photos, prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    jsons = sorted(photos.glob("annotations/*.json"))
    instances = [key for path in jsons for key in instances_of(shapes_of(path))]
    num_shapes = sum(len(shapes_of(path)) for path in jsons)
    assert manifest["num_images"] == len(jsons) == 24
    assert manifest["num_shapes"] == num_shapes
    assert manifest["num_instances"] == len(instances) < num_shapes  # some were joined
    assert manifest["labels"] == Counter(label for label, *_ in instances)
    assert accounted(manifest) == num_shapes
    assert manifest["joined"] == num_shapes - len(instances)
    assert manifest["rejected"] == manifest["warnings"] == manifest["unlabelled"] == []
    assert manifest["empty"] == []
    assert re.fullmatch("[0-9a-f]{64}", manifest["digest"])
    assert PreparedDataset(prepared).digest == manifest["digest"]
    assert all((prepared / shard).is_file() for shard in manifest["shards"])
    assert not (prepared / "preparing.json").exists()
    assert not list(prepared.rglob(".*")), "temporary files stayed"
    assert load_config(prepared / "config.yaml").prepare.data_dir == str(photos)


def test_splits_are_disjoint_complete_and_follow_the_hash(photos, prepared):
    splits = PreparedDataset(prepared).manifest["splits"]
    expected: dict[str, list[str]] = {split: [] for split in SPLITS}
    for path in sorted(photos.glob("images/*.jpg")):
        expected[expected_split(sha256(path))].append(f"images/{path.name}")
    assert splits == expected
    assert all(expected.values())  # else the fixture's seed tests nothing
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 24


def test_image_bytes_come_through_as_they_are(photos, prepared):
    dataset = PreparedDataset(prepared)
    assert len(dataset.images) == 24
    for name, record in dataset.images.items():
        raw = (photos / name).read_bytes()
        assert dataset.image_bytes(record) == raw
        assert record.digest == hashlib.sha256(raw).hexdigest()
        with Image.open(photos / name) as picture:
            assert record.size == (picture.height, picture.width)


def test_masks_are_those_of_the_json(photos, prepared):
    dataset = PreparedDataset(prepared)
    num_checked = 0
    for name, record in dataset.images.items():
        shapes = shapes_of(photos / "annotations" / f"{Path(name).stem}.json")
        for key, instance in zip(instances_of(shapes), record.instances, strict=True):
            expected = filled(instances_of(shapes)[key], record.size)
            np.testing.assert_array_equal(record.decode(instance), expected)
            rows, columns = np.nonzero(expected)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (instance.label, instance.area) == (key[0], expected.sum())
            assert instance.box == box
            num_checked += 1
    assert num_checked == dataset.manifest["num_instances"]


def test_every_known_layout_is_paired(tmp_path):
    """Each pair has a different polygon, so that a swap would show."""
    data = tmp_path / "data"
    pairs = {  # image: (JSON, what its imagePath says)
        "images/split.png": ("annotations/split.json", "../images/split.png"),
        "beside.png": ("beside.json", "beside.png"),
        "größe 1/кольцо.png": ("größe 1/кольцо.json", "кольцо.png"),
        "deep/er/images/nest.jpg": ("deep/er/labels/nest.json", "nest.jpg"),
        "deep/windows.png": ("deep/windows.json", "C:\\Users\\me\\old\\windows.png"),
        "cam1/images/0.png": ("cam1/annotations/0.json", "..\\stale\\0.png"),
        "cam2/images/0.png": ("cam2/annotations/0.json", ""),
        "other/name.png": ("other/note.json", "name.png"),
    }
    for number, (image, (annotation, image_path)) in enumerate(pairs.items()):
        draw(data / image, number)
        triangle = [[2, 2], [30 + number, 4], [10, 20 + number]]
        annotate(data / annotation, image_path, [shape(f"кольцо {number}", triangle)])
    manifest = run(data, tmp_path / "prepared", *ALL_TRAIN)
    assert manifest["rejected"] == manifest["unlabelled"] == []
    dataset = PreparedDataset(tmp_path / "prepared")
    assert set(dataset.images) == set(pairs) == set(manifest["splits"]["train"])
    for number, (image, (annotation, _)) in enumerate(pairs.items()):
        record = dataset.images[image]
        (instance,) = record.instances
        assert instance.label == f"кольцо {number}"
        expected = filled(shapes_of(data / annotation), (48, 64))
        np.testing.assert_array_equal(record.decode(instance), expected)
        assert dataset.image_bytes(record) == (data / image).read_bytes()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A folder with one of each kind of input other than a good pair."""
    data = tmp_path_factory.mktemp("mixed") / "data"
    for number, name in enumerate(("good", "joined", "bad_shapes", "empty", "alone", "twice")):
        draw(data / f"{name}.png", number)
    annotate(data / "good.json", "good.png", [shape("a", SQUARE), shape("b", SQUARE)])
    far = [[50, 40], [60, 40], [60, 46]]
    joined = [shape("a", SQUARE, group=7), shape("a", far, group=7), shape("b", far, group=7)]
    annotate(data / "joined.json", "joined.png", joined)
    bad = [
        shape("a", SQUARE),
        shape("a", SQUARE[:2]),  # a polygon of two points
        shape("a", SQUARE[:2], "line"),
        shape("a", [[900, 900], [910, 900], [910, 910]], group=1),  # outside, both of the group
        shape("a", [[900, 900], [910, 900], [910, 920]], group=1),
        shape("c", SQUARE),
    ]
    annotate(data / "bad_shapes.json", "bad_shapes.png", bad)
    annotate(data / "empty.json", "empty.png", [])
    annotate(data / "twice.json", "twice.png", [shape("a", SQUARE)])
    second = [shape("b", SQUARE), shape("b", SQUARE[:2]), shape("b", far)]
    annotate(data / "twice_too.json", "twice.png", second)
    return data


def test_what_is_not_a_good_pair_is_counted_once(mixed, tmp_path):
    manifest = run(mixed, tmp_path / "prepared", *ALL_TRAIN)
    rejected = {(r["file"], r["field"]): r for r in manifest["rejected"]}
    assert set(rejected) == {
        ("bad_shapes.json", "shapes[1].points"),
        ("bad_shapes.json", "shapes[3].points"),  # both parts of one group, each by itself
        ("bad_shapes.json", "shapes[4].points"),
        ("twice_too.json", "imagePath"),
    }
    assert len(rejected) == len(manifest["rejected"])
    assert rejected["bad_shapes.json", "shapes[3].points"]["num_shapes"] == 1
    assert rejected["bad_shapes.json", "shapes[4].points"]["num_shapes"] == 1
    assert "twice.json" in rejected["twice_too.json", "imagePath"]["reason"]
    assert "2 points" in rejected["bad_shapes.json", "shapes[1].points"]["reason"]
    assert manifest["num_shapes"] == 2 + 3 + 6 + 0 + 1 + 3
    assert accounted(manifest) == manifest["num_shapes"]
    assert manifest["labels"] == {"a": 4, "b": 2, "c": 1}
    assert (manifest["num_images"], manifest["num_instances"]) == (6, 7)
    assert manifest["unlabelled"] == ["alone.png"]
    assert manifest["empty"] == manifest["background"] == ["empty.png"]
    annotated = {f"{name}.png" for name in ("good", "joined", "bad_shapes", "empty", "twice")}
    assert set(manifest["splits"]["train"]) == annotated
    dataset = PreparedDataset(tmp_path / "prepared")
    assert set(dataset.images) == annotated | {"alone.png"}
    assert dataset.images["alone.png"].instances == dataset.images["empty.png"].instances == ()
    assert [i.label for i in dataset.images["twice.png"].instances] == ["a"]  # the first JSON's
    union, lone = dataset.images["joined.png"].instances
    assert (union.label, lone.label) == ("a", "b")
    assert union.area == filled(shapes_of(mixed / "joined.json")[:2], (48, 64)).sum()
    assert len(dataset.split("train")) == 4  # the empty image is not trained on


def test_labels_are_renamed_and_filtered_and_accounted_for(mixed, tmp_path):
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({"a": "apple", "c": None}))
    label_map = str(tmp_path / "map.yaml")
    mapped = run(mixed, tmp_path / "mapped", *ALL_TRAIN, label_map=label_map)
    assert mapped["labels"] == {"apple": 4, "b": 2}
    assert mapped["filtered"] == {"c": 1}
    assert accounted(mapped) == mapped["num_shapes"] == 15
    kept = run(mixed, tmp_path / "kept", *ALL_TRAIN, label_map=label_map, labels=["b"])
    assert kept["labels"] == {"b": 2}
    # By their names in the files; the two outside the image are filtered before that is checked.
    assert kept["filtered"] == {"a": 7, "c": 1}
    assert accounted(kept) == kept["num_shapes"] == 15
    assert kept["empty"] == ["bad_shapes.png", "empty.png", "twice.png"]
    assert kept["background"] == ["empty.png"]  # others had shapes that were rejected
    with pytest.raises(DatasetError, match="no instance is usable"):
        run(mixed, tmp_path / "none", *ALL_TRAIN, labels=["nobody"])
    assert not (tmp_path / "none" / "manifest.json").exists()


def test_as_many_overlays_as_asked_for(photos, tmp_path, run_cli):
    output = tmp_path / "prepared"
    status, _, err = run_cli(
        "prepare", "--data-dir", photos, "--output-dir", output, "--visualize", "--num-samples", 3,
        "prepare.images_per_shard=2",
    )  # fmt: skip
    assert (status, err) == (0, "")
    overlays = sorted((output / "overlays").rglob("*.*"))
    assert len(overlays) == 3
    for overlay in overlays:
        original = photos / "images" / overlay.name.removesuffix(".overlay.jpg")
        with Image.open(overlay) as drawn, Image.open(original) as plain:
            assert drawn.size == plain.size
            change = np.abs(np.asarray(drawn, int) - np.asarray(plain.convert("RGB"), int))
        assert change.max() > 40


def test_the_same_inputs_again_do_nothing_and_others_are_refused(mixed, tmp_path):
    data, output = tmp_path / "data", tmp_path / "prepared"
    shutil.copytree(mixed, data)  # keeps the modification times
    first = run(data, output, *ALL_TRAIN)
    before = stamps(output)
    published = (output / "manifest.json").read_bytes()
    assert run(data, output, *ALL_TRAIN) == first
    with pytest.raises(ConfigError, match="other settings"):
        run(data, output, *ALL_TRAIN, labels=["a"])
    draw(tmp_path / "elsewhere" / "e.png", 7)
    annotate(tmp_path / "elsewhere" / "e.json", "e.png", [shape("a", SQUARE)])
    with pytest.raises(ConfigError, match="from other files; choose another folder"):
        run(tmp_path / "elsewhere", output, *ALL_TRAIN)
    assert stamps(output) == before
    assert (output / "manifest.json").read_bytes() == published


def test_what_was_added_changed_or_removed_is_all_that_is_prepared_again(photos, tmp_path, capsys):
    data, output = tmp_path / "photos", tmp_path / "prepared"
    shutil.copytree(photos, data)
    small = "prepare.images_per_shard=4"
    run(data, output, small)
    before = stamps(output)

    def names(number: int) -> tuple[Path, Path]:
        stem = f"sample_{number:05d}"
        return data / "images" / f"{stem}.jpg", data / "annotations" / f"{stem}.json"

    def same_as_afresh(manifest: dict, number: int) -> None:
        fresh = run(data, tmp_path / f"fresh{number}", small)
        layout = dict.fromkeys(("shards", "shard_bytes", "generation"))
        assert fresh | layout == manifest | layout
        assert list(PreparedDataset(output).images) == list(fresh_images(number))

    def fresh_images(number: int) -> dict:
        return PreparedDataset(tmp_path / f"fresh{number}").images

    # One more image: one more small shard, and the earlier ones are unchanged.
    draw(data / "images" / "new.png", 5)
    annotate(data / "annotations" / "new.json", "../images/new.png", [shape("disc", SQUARE)])
    manifest = run(data, output, small)
    assert "24 files are prepared already, 1 are not" in capsys.readouterr().out
    after = stamps(output)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    same_as_afresh(manifest, 1)

    # A changed image, a changed JSON, a removed pair: only those three shards are made again.
    before = stamps(output)
    pixels = np.asarray(Image.open(names(0)[0]))
    Image.fromarray(255 - pixels).save(names(0)[0])
    document = json.loads(names(9)[1].read_text())
    document["shapes"] = document["shapes"][:1]
    names(9)[1].write_text(json.dumps(document))
    for path in names(23):
        path.unlink()
    manifest = run(data, output, small)
    after = stamps(output)
    kept = [name for name in before if after.get(name) == before[name]]
    assert len(kept) == len(before) - 6
    assert set(after) - set(kept)
    assert len(set(after) - set(kept)) == 6
    same_as_afresh(manifest, 2)

    # A new file that makes an unchanged one ambiguous causes that one to be rejected.
    named = json.loads(names(4)[1].read_text())
    names(4)[1].write_text(json.dumps({**named, "imagePath": "gone.jpg"}))
    assert run(data, output, small)["rejected"] == []
    for extension in ("png", "bmp"):
        draw(data / "images" / f"{names(4)[1].stem}.{extension}", 6)
    names(4)[0].unlink()
    manifest = run(data, output, small)
    assert [item["file"] for item in manifest["rejected"]] == ["annotations/sample_00004.json"]
    assert "2 images have this stem" in manifest["rejected"][0]["reason"]
    same_as_afresh(manifest, 3)


def write_coco(path: Path, *images: tuple[str, list[float]], size: tuple[int, int] = (48, 64)):
    """A COCO file of (file name, polygon) pairs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = list(enumerate(images, start=1))
    listed = [
        {"id": n, "file_name": name, "height": size[0], "width": size[1]}
        for n, (name, _) in numbered
    ]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "segmentation": [polygon]}
        for n, (_, polygon) in numbered
    ]
    content = {"images": listed, "annotations": annotations}
    path.write_text(json.dumps(content | {"categories": [{"id": 1, "name": "nut"}]}))


def test_pictures_of_other_folders_are_not_taken_now_or_after_a_change(tmp_path):
    """Frames of one name in several clips, of which some were not copied."""
    data, output, small = tmp_path / "data", tmp_path / "prepared", "prepare.images_per_shard=1"
    for number, name in enumerate(("c_1/2", "c_2/1", "c_3/1", "set/images/a", "other/a")):
        draw(data / f"{name}.png", number)
    annotate(data / "c_1/1.json", "1.png", [shape("one", SQUARE)])
    annotate(data / "c_1/2.json", "2.png", [shape("two", SQUARE)])
    annotate(data / "c_2/1.json", "1.png", [shape("right", SQUARE)])
    embedded = annotate(data / "c_4/1.json", "1.png", [shape("inside", SQUARE)])
    content = json.loads(embedded.read_text()) | {"imageData": as_base64(data / "c_1/2.png")}
    embedded.write_text(json.dumps(content))
    annotate(data / "a_copy.json", "c_1/2.png", [shape("copy", SQUARE)])  # before c_1/2.json
    write_coco(data / "set/annotations/c.json", ("a.png", [4, 6, 20, 6, 20, 30, 4, 30]))
    write_coco(data / "lost/annotations/c.json", ("a.png", [4, 6, 9, 6, 9, 30, 4, 30]))

    def labels(manifest: dict) -> dict[str, list[str]]:
        images = PreparedDataset(output).images
        assert accounted(manifest) == manifest["num_shapes"]
        return {name: [i.label for i in record.instances] for name, record in images.items()}

    def as_afresh(manifest: dict, number: int) -> dict:
        fresh = run(data, tmp_path / f"fresh{number}", small, *ALL_TRAIN)
        layout = dict.fromkeys(("shards", "shard_bytes", "generation"))
        assert fresh | layout == manifest | layout
        return manifest

    manifest = as_afresh(run(data, output, small, *ALL_TRAIN), 0)
    assert labels(manifest) == {
        "c_1/2.png": ["two"], "c_2/1.png": ["right"], "c_3/1.png": [], "c_4/1.json": ["inside"],
        "set/images/a.png": ["nut"], "other/a.png": [],
    }  # fmt: skip
    assert manifest["unlabelled"] == ["c_3/1.png", "other/a.png"]
    rejected = {r["file"]: r["reason"] for r in manifest["rejected"]}
    assert set(rejected) == {"c_1/1.json", "a_copy.json", "lost/annotations/c.json#1"}
    assert "is not used" in rejected["c_1/1.json"]
    assert "already annotated by c_1/2.json" in rejected["a_copy.json"]

    draw(data / "c_1/1.png", 7)  # copied after all
    draw(data / "lost/images/a.png", 8)
    (data / "c_1/2.json").unlink()
    manifest = as_afresh(run(data, output, small, *ALL_TRAIN), 1)
    found = labels(manifest)
    assert found["c_1/1.png"] == ["one"]
    assert found["lost/images/a.png"] == ["nut"]
    assert found["c_1/2.png"] == ["copy"]
    assert manifest["rejected"] == []


def test_a_coco_file_with_the_name_of_an_image_is_rejected(tmp_path):
    data = tmp_path / "data"
    for number, name in enumerate(("one", "two")):
        draw(data / f"{name}.png", number)
    annotate(data / "one.json", "one.png", [shape("a", SQUARE)])
    (data / "two.json").write_text('{"images": [], "annotations": [], "categories": []}')
    manifest = run(data, tmp_path / "prepared", *ALL_TRAIN)
    assert [r["file"] for r in manifest["rejected"]] == ["two.json"]
    assert "rename it, e.g. to instances.json" in manifest["rejected"][0]["reason"]
    assert manifest["num_instances"] == 1
    assert manifest["unlabelled"] == []


def test_large_pictures_are_cut_into_tiles(tmp_path):
    data, output = tmp_path / "data", tmp_path / "prepared"
    size = (100, 400)
    draw(data / "long.png", 1, size)
    across = [[100, 10], [180, 10], [180, 30], [100, 30]]  # from one tile into the next
    wide = [[5, 60], [395, 60], [395, 70], [5, 70]]  # longer than any tile
    small = [[300, 80], [310, 80], [310, 90], [300, 90]]
    shapes = [shape("a", SQUARE), shape("a", across), shape("b", wide), shape("b", small)]
    annotate(data / "long.json", "long.png", shapes, size)
    draw(data / "short.png", 2, (48, 64))
    annotate(data / "short.json", "short.png", [shape("a", SQUARE)])
    manifest = run(data, output, *ALL_TRAIN, tile=128, overlap=0)
    assert manifest["num_images"] == 2
    assert manifest["num_instances"] == 5
    assert manifest["tiles"] == {
        "size": 128, "overlap": 0, "num_tiles": 3, "num_instances_cut": 2,
    }  # fmt: skip
    dataset = PreparedDataset(output)
    whole = np.asarray(Image.open(data / "long.png").convert("RGB"))
    assert set(dataset.images) == set(manifest["splits"]["train"])
    total = 0
    for name, record in dataset.images.items():
        if record.source == "short.png":
            assert name == "short.png"
            assert [i.area_outside for i in record.instances] == [0]
            continue
        x, y = map(int, re.fullmatch(r"long\.png@(\d+),(\d+)\.png", name).groups())
        pixels = np.asarray(Image.open(io.BytesIO(dataset.image_bytes(record))))
        assert np.array_equal(pixels, whole[y : y + 100, x : x + 128])
        for instance in record.instances:
            mask = record.decode(instance)
            assert mask.sum() == instance.area
            (truth,) = [
                full
                for full in (filled([s], size) for s in shapes)
                if np.array_equal(full[y : y + 100, x : x + 128], mask) and mask.any()
            ]
            assert truth.sum() == instance.area + instance.area_outside
            total += 1
    assert total == 4
    twice = run(data, tmp_path / "again", *ALL_TRAIN, tile=128, overlap=64)
    assert twice["tiles"]["num_instances_cut"] == 1  # the one longer than any tile
    with pytest.raises(ConfigError, match="overlap 65 must be at most half of tile 128"):
        run(data, tmp_path / "no", tile=128, overlap=65)


def test_a_damaged_or_lost_shard_is_made_again(photos, tmp_path):
    output, small = tmp_path / "prepared", "prepare.images_per_shard=8"
    first = run(photos, output, small)
    before = stamps(output)
    damaged, lost, _ = (output / shard for shard in first["shards"])
    damaged.write_bytes(damaged.read_bytes()[:1000])
    lost.unlink()
    again = run(photos, output, small)
    assert again["digest"] == first["digest"]
    dataset = PreparedDataset(output)
    assert all(dataset.image_bytes(record) for record in dataset.images.values())
    after = stamps(output)
    assert sum(after.get(name) == before[name] for name in before) == 2  # of the third shard


def test_a_folder_with_something_else_in_it_is_left_alone(mixed, tmp_path):
    (tmp_path / "letters.txt").write_text("dear diary")
    with pytest.raises(ConfigError, match="not empty"):
        run(mixed, tmp_path, *ALL_TRAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
    with pytest.raises(ConfigError, match="inside --data-dir"):
        run(mixed, mixed / "prepared", *ALL_TRAIN)
    assert not (mixed / "prepared").exists()


def test_only_the_missing_shard_is_made_again(photos, prepared, tmp_path):
    """All shards are made, then the split fails; another split rule reuses them."""
    output = tmp_path / "prepared"
    with pytest.raises(DatasetError, match="split would be empty"):
        run(photos, output, "prepare.images_per_shard=6", "prepare.group_by=folder")
    before = stamps(output)
    assert len(before) == 8  # four shards, four lists
    assert (output / "preparing.json").exists()
    gone = sorted(before)[2]  # a list; without it the shard does not count
    (output / "data" / gone).unlink()
    (output / "data" / ".part-1-0.parquet.0a1b2c3d.tmp").write_bytes(b"half a shard")
    again = run(photos, output, "prepare.images_per_shard=6")
    after = stamps(output)
    assert {name for name in after if after[name] != before.get(name)} == {
        gone, gone.replace(".json", ".parquet"),
    }  # fmt: skip
    assert set(after) == set(before)
    assert again["digest"] == PreparedDataset(prepared).digest
    assert not (output / "preparing.json").exists()


def test_a_killed_run_is_resumed(photos, prepared, tmp_path):
    """SIGKILL while it prepares; then the same command again."""
    output = tmp_path / "prepared"
    words = ["prepare", "--data-dir", str(photos), "--output-dir", str(output)]
    words += ["prepare.images_per_shard=1"]
    program = "import sys; from samray.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list((output / "data").glob("part-*.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no shard within two minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (output / "manifest.json").exists()
    assert (output / "preparing.json").exists()
    with pytest.raises(DatasetError, match="no \\(finished\\) prepared dataset"):
        PreparedDataset(output)
    while True:  # its Ray tasks end shortly after the process that started them
        finished = stamps(output)
        time.sleep(1)
        if stamps(output) == finished:
            break
    finished = {n: s for n, s in finished.items() if re.fullmatch(r"part-[\w-]+\.json", n)}
    assert 0 < len(finished) < 24, "killed too late to show anything"

    manifest = run(photos, output, "prepare.images_per_shard=1")
    after = stamps(output)
    for name in finished:
        shard = name.replace(".json", ".parquet")
        assert after[name] == finished[name], f"{name} was made again"
        assert shard in after
    assert len(manifest["shards"]) == 24
    assert not [name for name in after if name.endswith(".tmp")]
    assert not (output / "preparing.json").exists()
    assert manifest["digest"] == PreparedDataset(prepared).digest
    assert len(PreparedDataset(output).images) == 24


def test_the_digest_does_not_depend_on_the_shards(photos, prepared, tmp_path):
    undisturbed = PreparedDataset(prepared)
    for size in (1, 7):
        output = tmp_path / str(size)
        manifest = run(photos, output, f"prepare.images_per_shard={size}")
        assert len(manifest["shards"]) == -(-24 // size)
        assert manifest["digest"] == undisturbed.digest
        images = PreparedDataset(output).images
        assert list(images) == list(undisturbed.images)
        for name, record in images.items():
            assert record.instances == undisturbed.images[name].instances


def test_the_same_photos_give_the_same_files(photos, prepared, tmp_path):
    copy = tmp_path / "copy of the photos"
    shutil.copytree(photos, copy, copy_function=shutil.copyfile)  # with other modification times
    again = run(copy, tmp_path / "prepared")
    first = PreparedDataset(prepared).manifest
    assert {k: v for k, v in again.items() if k != "inputs"} == {
        k: v for k, v in first.items() if k != "inputs"
    }
    for shard in first["shards"]:
        assert sha256(tmp_path / "prepared" / shard) == sha256(prepared / shard)


def test_the_digest_sees_labels_masks_pixels_and_splits(tmp_path):
    data = tmp_path / "data"

    def digest_of(number: int, *overrides: str) -> str:
        return run(data, tmp_path / str(number), *(overrides or ALL_TRAIN))["digest"]

    for number in range(12):
        draw(data / f"{number}.png", number)
        annotate(data / f"{number}.json", f"{number}.png", [shape("a", SQUARE)])
    digests = [digest_of(0)]
    annotate(data / "3.json", "3.png", [shape("b", SQUARE)])
    digests.append(digest_of(1))
    annotate(data / "3.json", "3.png", [shape("a", [*SQUARE[:3], [5, 30]])])
    digests.append(digest_of(2))
    annotate(data / "3.json", "3.png", [shape("a", SQUARE)])
    digests.append(digest_of(3))
    assert digests[3] == digests[0]
    draw(data / "3.png", 1234)
    digests.append(digest_of(4))
    digests.append(digest_of(5, "prepare.val_fraction=0.4", "prepare.test_fraction=0"))
    assert len(set(digests)) == 5  # all differ but the fourth, which is the first again


def test_new_images_move_no_earlier_one_to_another_split(photos, prepared, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for number in range(5):
        draw(data / "more" / f"{number}.png", number)
        annotate(data / "more" / f"{number}.json", f"{number}.png", [shape("a", SQUARE)])
    splits = run(data, tmp_path / "prepared")["splits"]
    for split, names in PreparedDataset(prepared).manifest["splits"].items():
        assert set(names) == {name for name in splits[split] if name.startswith("images/")}


@pytest.mark.parametrize(
    ("group_by", "group_of"),
    [
        ("folder", lambda name: str(Path(name).parent)),
        ("clip_[0-9]+", lambda name: re.search("clip_[0-9]+", name)[0]),
        ("_([0-9]+)/", lambda name: re.search("_([0-9]+)/", name)[1]),
    ],
)
def test_a_group_stays_together(group_by, group_of, tmp_path):
    data = tmp_path / "data"
    for clip in range(12):
        for frame in range(2):
            number = 2 * clip + frame
            draw(data / f"clip_{clip}/{frame}.png", number)
            annotate(data / f"clip_{clip}/{frame}.json", f"{frame}.png", [shape("a", SQUARE)])
    fractions = ("prepare.val_fraction=0.3", "prepare.test_fraction=0.3")
    splits = run(data, tmp_path / "prepared", *fractions, group_by=group_by)["splits"]
    assert sum(map(len, splits.values())) == 24
    for split, names in splits.items():
        assert names, "choose other names, so that each split has a group"
        for name in names:
            digest = hashlib.sha256(group_of(name).encode()).hexdigest()
            assert expected_split(digest, 0.3, 0.3) == split


def test_a_group_pattern_that_misses_an_image_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match="does not match images/sample_00000"):
        run(photos, tmp_path / "prepared", group_by="clip_[0-9]+")
    with pytest.raises(ConfigError, match="neither `folder` nor a regular expression"):
        run(photos, tmp_path / "other", group_by="(")
    assert not (tmp_path / "prepared" / "manifest.json").exists()


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_split_file_decides(kind, photos, tmp_path):
    names = sorted(f"images/{path.name}" for path in photos.glob("images/*.jpg"))
    wanted = {"train": names[:10], "val": names[10:18], "test": names[18:]}
    file = tmp_path / f"splits.{kind}"
    if kind == "json":
        file.write_text(json.dumps(wanted))
    else:
        text = io.StringIO()
        rows = [(Path(name).name, split) for split, names in wanted.items() for name in names]
        csv.writer(text).writerows([("image", "split"), *rows])
        file.write_text(text.getvalue())
    assert run(photos, tmp_path / "prepared", split_file=str(file))["splits"] == wanted


def test_side_files_may_be_in_the_home_folder(mixed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.json").write_text('{"val": ["twice.png"]}')
    (tmp_path / "m.json").write_text('{"a": "apple"}')
    files = {"split_file": "~/s.json", "label_map": "~/m.json"}
    manifest = run(mixed, tmp_path / "prepared", *ALL_TRAIN, **files)
    assert manifest["splits"]["val"] == ["twice.png"]
    assert "apple" in manifest["labels"]
    assert run(mixed, tmp_path / "prepared", *ALL_TRAIN, **files) == manifest
    before = stamps(tmp_path / "prepared")
    (tmp_path / "s.json").write_text('{"test": ["twice.png"]}')
    manifest = run(mixed, tmp_path / "prepared", *ALL_TRAIN, **files)
    assert manifest["splits"]["test"] == ["twice.png"]
    assert stamps(tmp_path / "prepared") == before  # other splits, the same shards


def test_a_split_without_an_image_is_refused(mixed, tmp_path):
    (tmp_path / "s.json").write_text('{"train": ["good.png", "joined.png", "bad_shapes.png"]}')
    with pytest.raises(DatasetError, match=r"split would be empty.*--split-file"):
        run(mixed, tmp_path / "p", "prepare.val_fraction=1e-6", split_file=str(tmp_path / "s.json"))
    assert not (tmp_path / "p" / "manifest.json").exists()


def test_few_photos_and_split_folders_are_prepared_and_reported(tmp_path, run_cli):
    """One photo; five; then the folders of a Roboflow export with copies of training photos."""
    data = tmp_path / "data"
    for number, seed in enumerate((0, 1, 2, 4, 6)):  # whose hashes leave test empty
        draw(data / f"{number}.png", seed)
        shapes = [shape("a", SQUARE)] + [shape("__ignore__", SQUARE)] * (number == 4)
        annotate(data / f"{number}.json", f"{number}.png", shapes)
        if number in (0, 4):
            output = tmp_path / f"few{number}"
            status, out, err = run_cli("prepare", "--data-dir", data, "--output-dir", output)
            assert (status, err) == (0, "")
            sizes = [len(n) for n in PreparedDataset(output).manifest["splits"].values()]
            assert sizes == ([1, 0, 0] if number == 0 else [3, 1, 1])
            assert ("`samray train` needs val photos" in out) == (number == 0)
            assert ("filled in the order of the hashes" in out) == (number == 4)
            ignored = "shapes that are no single object: __ignore__ 1"
            assert (ignored in out) == (number == 4)
    with pytest.raises(DatasetError, match="the val split has no instance; prepare more images"):
        PreparedDataset(tmp_path / "few0").split("val")

    roboflow = tmp_path / "roboflow"
    for split, seeds in (("train", (0, 1, 2)), ("valid", (3, 4)), ("test", (5, 0))):
        for seed in seeds:
            blobs = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
            path = roboflow / split / f"{seed}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            quality = 60 if split == "train" else 95
            Image.fromarray(blobs).resize((64, 48), 3).save(path, quality=quality)
            annotate(path.with_suffix(".json"), path.name, [shape("a", SQUARE)])
    output = tmp_path / "folders"
    status, out, err = run_cli("prepare", "--data-dir", roboflow, "--output-dir", output)
    assert (status, err) == (0, "")
    manifest = PreparedDataset(output).manifest
    assert manifest["splits_by"] == "folders"
    assert manifest["splits"] == {
        "train": ["train/0.jpg", "train/1.jpg", "train/2.jpg"],
        "val": ["valid/3.jpg", "valid/4.jpg"],
        "test": ["test/0.jpg", "test/5.jpg"],
    }
    assert "the folders test/, train/, valid/ are the splits" in out
    (warning,) = manifest["warnings"]
    assert {"test/0.jpg", "train/0.jpg"} <= set(warning["reason"].split()) | {warning["file"]}
    assert "near-duplicate photos are in more than one split" in out
    hashed = run(roboflow, tmp_path / "hashed", "prepare.split_folders=false")
    assert hashed["splits_by"] != "folders"


def test_a_rotated_photo_is_annotated_as_it_is_shown(tmp_path):
    """LabelMe applies EXIF; the JSON's size and points are those of the upright photo."""
    data = tmp_path / "data"
    data.mkdir()
    left_half_white = np.zeros((60, 40, 3), np.uint8)  # as shown: 40 wide, 60 high
    left_half_white[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    stored = np.rot90(left_half_white)
    Image.fromarray(stored).save(data / "photo.jpg", exif=exif, quality=95)
    half = [[0, 0], [19, 0], [19, 59], [0, 59]]
    annotate(data / "photo.json", "photo.jpg", [shape("white", half)], (60, 40))
    Image.fromarray(stored).save(data / "wrong.jpg", exif=exif)
    annotate(data / "wrong.json", "wrong.jpg", [shape("white", half)], (40, 60))
    manifest = run(data, tmp_path / "prepared", *ALL_TRAIN)
    (rejected,) = manifest["rejected"]
    assert rejected["file"] == "wrong.json"
    assert "60 x 40" in rejected["reason"]
    assert "40 x 60" in rejected["reason"]
    dataset = PreparedDataset(tmp_path / "prepared")
    record = dataset.images["photo.jpg"]
    assert record.size == (60, 40)
    assert dataset.image_bytes(record) == (data / "photo.jpg").read_bytes()
    np.testing.assert_array_equal(
        record.decode(record.instances[0]), left_half_white[:, :, 0] == 255
    )


@pytest.mark.parametrize(
    ("folder", "num_images", "num_shapes", "none_rejected"),
    [
        ("nuts_labelme", 18, 165, True),
        ("zebrafish_microscopy", 54, 583, False),
        ("steel_bars", 70, 4604, True),
    ],
)
def test_real_annotations(folder, num_images, num_shapes, none_rejected, tmp_path):
    data = REAL / folder
    if not data.is_dir():
        pytest.skip(f"{data} is not here")
    manifest = run(data, tmp_path / "prepared")
    assert manifest["num_images"] == num_images
    assert manifest["num_shapes"] == accounted(manifest) == num_shapes
    assert manifest["unlabelled"] == []
    assert sum(map(len, manifest["splits"].values())) == num_images
    if none_rejected:
        assert manifest["rejected"] == []
        assert manifest["num_instances"] == num_shapes
    dataset = PreparedDataset(tmp_path / "prepared")
    assert sum(len(r.instances) for r in dataset.images.values()) == manifest["num_instances"]
    for record in list(dataset.images.values())[:: max(1, num_images // 5)]:
        assert dataset.image_bytes(record) == (data / record.name).read_bytes()
        for instance in record.instances:
            mask = record.decode(instance)
            assert mask.shape == record.size
            assert mask.sum() == instance.area > 0


def as_base64(path):
    return base64.b64encode(path.read_bytes()).decode()


def test_contents_of_labelme_files_other_than_polygons(tmp_path):
    """Embedded images, shapes without area, LabelMe's own labels, wrong case, a wrong group."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a.png", "B.PNG", "gone.png", "grouped.png"):
        noise = np.random.default_rng(len(name)).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / name)
    square = [[5, 5], [20, 5], [20, 20], [5, 20]]
    far = [[60, 40], [75, 40], [75, 55], [60, 55]]
    others = [
        shape("cat", square),
        shape("cat", square),  # a duplicate
        {**shape("edge", square[:2]), "shape_type": "line"},
        {**shape("eye", square[:1]), "shape_type": "point"},
        {**shape("cat", [[30, 10], [40, 20], [30, 30], [20, 20]]), "shape_type": "rotation"},
        {**shape("cat", [[42, 12], [50, 12], [50, 30], [42, 30]]), "shape_type": "rectangle"},
        shape("__ignore__", far),
        shape("_background_", square),
    ]
    annotate(data / "a.json", "a.json", others, (60, 80))  # imagePath names the JSON itself
    annotate(data / "case.json", "b.png", [shape("cat", square)], (60, 80))
    annotate(data / "inside.json", "gone.png", [shape("__Ignore__", square)], (60, 80))
    document = json.loads((data / "inside.json").read_text())
    document["imageData"] = as_base64(data / "gone.png")
    document["imagePath"] = "elsewhere\\gone.png"
    (data / "inside.json").write_text(json.dumps(document))
    (data / "gone.png").unlink()
    row = [
        {**shape("bar", [[x, 5], [x + 4, 5], [x + 4, 40]]), "group_id": 1} for x in range(0, 60, 8)
    ]
    annotate(data / "grouped.json", "grouped.png", row, (60, 80))
    manifest = run(data, tmp_path / "prepared", *ALL_TRAIN)
    assert accounted(manifest) == manifest["num_shapes"]
    assert manifest["not_instances"] == {"line": 1, "point": 1, "__ignore__": 1}
    assert manifest["filtered"] == {"_background_": 1}
    assert manifest["labels"] == {"bar": 1, "cat": 4, "__Ignore__": 1}
    assert "label __Ignore__ is a class" in manifest["notes"][-1]
    (rejected,) = manifest["rejected"]
    assert (rejected["file"], rejected["field"]) == ("a.json", "shapes[1]")
    (warning,) = manifest["warnings"]
    assert "joins 8 of 8 shapes" in warning["reason"]
    dataset = PreparedDataset(tmp_path / "prepared")
    assert set(dataset.images) == {"a.png", "B.PNG", "inside.json", "grouped.png"}
    region = filled([shape("__ignore__", far)], (60, 80))
    np.testing.assert_array_equal(dataset.images["a.png"].decode_ignored(), region)
    assert dataset.images["B.PNG"].decode_ignored() is None
    instances = {name: record.instances for name, record in dataset.images.items()}
    # A dataset of an earlier samray has no such column, and counts the shape as filtered.
    shard = tmp_path / "prepared" / manifest["shards"][0]
    pq.write_table(pq.read_table(shard).drop_columns("ignored"), shard)
    dataset = PreparedDataset(tmp_path / "prepared")
    assert {name: record.instances for name, record in dataset.images.items()} == instances
    assert not any(record.ignored for record in dataset.images.values())
    earlier = manifest | {"filtered": {"__ignore__": 1}}
    (tmp_path / "prepared" / "manifest.json").write_text(json.dumps(earlier))
    with pytest.raises(ConfigError, match="by another samray; choose another folder"):
        run(data, tmp_path / "prepared", *ALL_TRAIN)
    record = dataset.images["inside.json"]
    assert dataset.image_bytes(record).startswith(b"\x89PNG")
    alone = run(data, tmp_path / "alone", *ALL_TRAIN, "prepare.join_groups=false")
    assert alone["labels"]["bar"] == 8
    assert alone["warnings"] == []
