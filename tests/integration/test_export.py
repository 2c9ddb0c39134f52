"""A prepared dataset as LabelMe and COCO files, and back."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from samray.config import load_config
from samray.data.dataset import SPLITS, PreparedDataset
from samray.data.export import export
from samray.data.prepare import prepare


def exported(prepared, output, form):
    words = [f"export.data_dir={prepared}", f"export.output_dir={output}", f"export.format={form}"]
    return export(load_config(None, words))


def prepared_again(folder, output):
    """Manifest of exported files, with the splits that they had."""
    words = [f"prepare.data_dir={folder}", f"prepare.output_dir={output}", "prepare.strict=true"]
    return prepare(load_config(None, [*words, f"prepare.split_file={folder / 'splits.csv'}"]))


def splits_of(dataset):
    """The splits of its exported files; members are sorted, tiles by their picture."""
    splits = dataset.manifest["splits"]
    return {split: sorted(f"images/{name}" for name in names) for split, names in splits.items()}


def test_labelme_files_prepare_to_the_same_masks(prepared, tmp_path):
    folder = exported(prepared, tmp_path / "out", "labelme")
    manifest = prepared_again(folder, tmp_path / "again")
    assert manifest["rejected"] == manifest["warnings"] == []
    before, after = PreparedDataset(prepared), PreparedDataset(tmp_path / "again")
    assert manifest["splits"] == splits_of(before)
    assert len(before.images) == len(after.images)
    for name, record in before.images.items():
        other = after.images[f"images/{name}"]
        assert after.image_bytes(other) == before.image_bytes(record)
        assert other.size == record.size
        assert sorted((i.label, i.rle) for i in other.instances) == sorted(
            (i.label, i.rle) for i in record.instances
        )


def test_coco_files_are_what_pycocotools_reads(prepared, tmp_path):
    folder = exported(prepared, tmp_path / "out", "coco")
    dataset = PreparedDataset(prepared)
    for split in SPLITS:
        read = COCO(str(folder / "annotations" / f"instances_{split}.json"))
        names = dataset.manifest["splits"][split]
        assert len(read.getImgIds()) == len(names)
        for image in read.loadImgs(read.getImgIds()):
            record = dataset.images[image["file_name"]]
            with Image.open(folder / "images" / image["file_name"]) as picture:
                assert (picture.height, picture.width) == record.size
            annotations = read.loadAnns(read.getAnnIds(imgIds=[image["id"]]))
            assert len(annotations) == len(record.instances)
            for annotation, instance in zip(annotations, record.instances, strict=True):
                mask = record.decode(instance)
                np.testing.assert_array_equal(read.annToMask(annotation), mask)
                assert read.cats[annotation["category_id"]]["name"] == instance.label
                assert annotation["area"] == mask.sum()
                box = coco_mask.toBbox(annotation["segmentation"])
                assert annotation["bbox"] == box.tolist()


def test_coco_files_prepare_to_the_same_masks(prepared, tmp_path):
    folder = exported(prepared, tmp_path / "out", "coco")
    manifest = prepared_again(folder, tmp_path / "again")
    assert manifest["rejected"] == manifest["warnings"] == manifest["unlabelled"] == []
    before, after = PreparedDataset(prepared), PreparedDataset(tmp_path / "again")
    assert manifest["splits"] == splits_of(before)
    assert before.manifest["labels"] == manifest["labels"]
    for name, record in before.images.items():
        other = after.images[f"images/{name}"]
        assert [(i.label, i.rle) for i in other.instances] == [
            (i.label, i.rle) for i in record.instances
        ]


def test_coco_and_labelme_files_side_by_side(ray_cluster, tmp_path):
    """Every annotation is accounted for, in whichever file it is."""
    for name in ("a.png", "sub/b.png", "c.png"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    square = [5, 5, 20, 5, 20, 20, 5, 20]
    entry = {"category_id": 1, "segmentation": [square]}
    content = {
        "images": [
            {"id": n, "file_name": name, "height": 40, "width": 60}
            for n, name in enumerate(("a.png", "b.png", "gone.png"))
        ],
        "categories": [{"id": 1, "name": "box"}],
        "annotations": [
            entry | {"image_id": 0},
            entry | {"image_id": 1, "iscrowd": 1},
            entry | {"image_id": 1},
            entry | {"image_id": 2},
            entry | {"image_id": 99},
        ],
    }
    (tmp_path / "data" / "coco.json").write_text(json.dumps(content))
    shape = {"label": "tri", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
    labelme = {"shapes": [shape], "imagePath": "c.png", "imageHeight": 40, "imageWidth": 60}
    (tmp_path / "data" / "c.json").write_text(json.dumps(labelme))
    words = [f"prepare.data_dir={tmp_path / 'data'}", f"prepare.output_dir={tmp_path / 'out'}"]
    words += ["prepare.val_fraction=0", "prepare.test_fraction=0"]
    manifest = prepare(load_config(None, words))
    assert manifest["labels"] == {"box": 2, "tri": 1}
    assert manifest["not_instances"] == {"crowd": 1}
    assert {(r["file"], r["num_shapes"]) for r in manifest["rejected"]} == {
        ("coco.json#2", 1),
        ("coco.json", 1),
    }
    assert manifest["num_shapes"] == 6
    assert set(PreparedDataset(tmp_path / "out").images) == {"a.png", "sub/b.png", "c.png"}


def test_holes_and_parts_round_trip_to_the_pixel(ray_cluster, tmp_path):
    """What polygons cannot represent exactly becomes a LabelMe mask shape."""
    data = tmp_path / "data"
    data.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(
        data / "a.png"
    )
    square, other = [[2, 2], [12, 2], [12, 12], [2, 12]], [[30, 20], [50, 22], [33, 38]]
    cut = [*square, [2, 2], [5, 5], [5, 9], [9, 9], [9, 5], [5, 5]]  # a hole, by a cut
    shapes = [
        {"label": "two", "points": points, "group_id": 4, "shape_type": "polygon"}
        for points in (square, other)
    ]
    shapes.append({"label": "ring", "points": cut, "group_id": None, "shape_type": "polygon"})
    corners = [[0, 0], [20, 20]]  # around the ring, so that the region has a hole
    shapes.append({"label": "__ignore__", "points": corners, "shape_type": "rectangle"})
    document = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 60}
    (data / "a.json").write_text(json.dumps(document))
    fractions = ["prepare.val_fraction=0", "prepare.test_fraction=0"]
    for source, target in (("data", "one"), ("out", "two"), ("coco", "three")):
        words = [f"prepare.data_dir={tmp_path / source}", f"prepare.output_dir={tmp_path / target}"]
        prepare(load_config(None, [*words, *fractions]))
        if target == "one":
            exported(tmp_path / "one", tmp_path / "out", "labelme")
            exported(tmp_path / "one", tmp_path / "coco", "coco")
    one, *others = (PreparedDataset(tmp_path / name) for name in ("one", "two", "three"))
    record = one.images["a.png"]
    assert record.decode_ignored().sum() == 21 * 21 - 11 * 11
    for other in others:
        again = other.images["images/a.png"]
        assert [i.rle for i in record.instances] == [i.rle for i in again.instances]
        assert again.ignored == record.ignored
        assert other.manifest["not_instances"] == {"__ignore__": 1}
    read = COCO(str(tmp_path / "coco" / "annotations" / "instances_train.json"))
    (region,) = read.loadAnns(read.getAnnIds(iscrowd=1))
    assert read.cats[region["category_id"]]["name"] == "__ignore__"


def test_a_used_folder_is_refused(prepared, tmp_path, run_cli):
    (tmp_path / "file").write_text("mine")
    words = ["export", "--data-dir", prepared, "--output-dir", tmp_path, "--format", "coco"]
    status, _, err = run_cli(*words)
    assert status == 2
    assert "not empty" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("form", ["labelme", "coco"])
def test_the_command_line_writes_both(form, prepared, tmp_path, run_cli):
    words = ["export", "--data-dir", prepared, "--output-dir", tmp_path / "out", "--format", form]
    status, out, err = run_cli(*words)
    assert status == 0, err
    assert f"{form} files" in out
    assert out.endswith(f"--split-file {tmp_path / 'out' / 'splits.csv'}\n")
    assert list((tmp_path / "out" / "annotations").rglob("*.json"))


def test_tiles_of_a_picture_stay_in_one_split(ray_cluster, photos, tmp_path):
    words = [f"prepare.data_dir={photos}", f"prepare.output_dir={tmp_path / 'tiles'}"]
    prepare(load_config(None, [*words, "prepare.tile=128"]))
    folder = exported(tmp_path / "tiles", tmp_path / "out", "coco")
    manifest = prepared_again(folder, tmp_path / "again")
    before = PreparedDataset(tmp_path / "tiles")
    assert any("@" in name for name in before.images)
    assert manifest["splits"] == splits_of(before)
