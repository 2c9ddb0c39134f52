"""One entry to its outcome: regions labelled `__ignore__`, and what reaches out of the image."""

import base64
import hashlib
import io
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from samray.config import PrepareConfig
from samray.data.coco import read_coco
from samray.data.discovery import find_files
from samray.data.intake import Entry, Rules, read_entry
from samray.geometry.masks import decode_rle

SIZE = (40, 150)


def rectangle(label, x1, y1, x2, y2):
    points = [[x1, y1], [x2, y2]]
    return {"label": label, "points": points, "shape_type": "rectangle", "group_id": None}


def read(folder, shapes, label_map=None, **settings):
    """Outcome and rows of one image of SIZE with these shapes."""
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    document = {"shapes": shapes, "imagePath": "a.png", "imageHeight": 40, "imageWidth": 150}
    (folder / "a.json").write_text(json.dumps(document))
    files = find_files(folder)
    rules = Rules(PrepareConfig(**settings), label_map or {}, frozenset())
    return read_entry(Entry("a.json", "labelme", files.stamps["a.json"]), files, rules, folder)


def test_shapes_of_a_file_without_a_usable_size_are_counted_as_lost(tmp_path):
    """The manifest said that nothing was lost."""
    read(tmp_path, [])
    document = json.loads((tmp_path / "a.json").read_text()) | {"imageHeight": "tall"}
    document["shapes"] = [rectangle("nut", 1, 1, 5, 5), rectangle("nut", 11, 1, 15, 5)]
    (tmp_path / "a.json").write_text(json.dumps(document))
    rules = Rules(PrepareConfig(), {}, frozenset())
    entry = Entry("a.json", "labelme", "stamp")
    outcome, rows = read_entry(entry, find_files(tmp_path), rules, tmp_path)
    assert (outcome.num_shapes, rows) == (2, [])
    assert [(problem.field, problem.num_shapes) for problem in outcome.rejected] == [
        ("imageHeight", 2)
    ]


def region_of(row):
    return decode_rle(row["ignored"], (row["height"], row["width"]))


def test_regions_are_joined_and_have_no_pixel_of_an_instance(tmp_path):
    shapes = [
        rectangle("nut", 10, 10, 19, 19),
        rectangle("__ignore__", 0, 0, 29, 29),
        rectangle("__ignore__", 50, 0, 54, 4),
        rectangle("__ignore__", 500, 0, 504, 4),  # outside
    ]
    outcome, (row,) = read(tmp_path / "a", shapes)
    expected = np.zeros(SIZE, bool)
    expected[:30, :30] = expected[:5, 50:55] = True
    expected[10:20, 10:20] = False
    np.testing.assert_array_equal(region_of(row), expected)
    assert [instance["label"] for instance in row["instances"]] == ["nut"]
    assert outcome.labels == {"nut": 1}
    assert outcome.not_instances == {"__ignore__": 2}
    assert [(problem.field, problem.num_shapes) for problem in outcome.rejected] == [
        ("shapes[3].points", 1)
    ]
    assert not outcome.filtered


def test_only_a_region_changes_the_digest_and_a_label_map_makes_or_drops_one(tmp_path):
    nut = rectangle("nut", 10, 10, 19, 19)
    unsure = [nut, rectangle("unsure", 50, 0, 54, 4)]
    marked = [nut, rectangle("__ignore__", 50, 0, 54, 4)]
    (alone, without), (one, with_region), (other, mapped), (none, dropped) = (
        read(tmp_path / "a", [nut]),
        read(tmp_path / "a", marked),
        read(tmp_path / "a", unsure, {"unsure": "__ignore__"}),
        read(tmp_path / "a", marked, {"__ignore__": None}),
    )
    assert without[0]["ignored"] is dropped[0]["ignored"] is None
    assert with_region[0]["ignored"] == mapped[0]["ignored"] is not None
    digests = [found.image.instances_digest for found in (alone, one, other, none)]
    assert digests[0] == digests[3] != digests[1] == digests[2]
    assert none.filtered == {"__ignore__": 1}
    content = [["nut", without[0]["instances"][0]["rle"].hex()]]  # as it always was
    assert digests[0] == hashlib.sha256(json.dumps(content).encode()).hexdigest()


def test_labels_that_are_chosen_leave_the_regions_alone(tmp_path):
    shapes = [rectangle("nut", 10, 10, 19, 19), rectangle("__ignore__", 50, 0, 54, 4)]
    outcome, (row,) = read(tmp_path / "a", shapes, labels=["nut"])
    assert region_of(row).sum() == 25
    assert outcome.not_instances == {"__ignore__": 1}


def test_a_tile_ignores_its_part_of_a_region_and_what_it_sees_of_other_tiles_objects(tmp_path):
    """Tiles from columns 0, 48 and 86 on; the first two both show columns 50 to 61 whole."""
    shapes = [
        rectangle("nut", 2, 2, 9, 9),
        rectangle("nut", 50, 20, 61, 29),  # the first tile's
        rectangle("nut", 70, 20, 79, 29),
        rectangle("__ignore__", 0, 35, 149, 39),
    ]
    _, rows = read(tmp_path / "a", shapes, tile=64, overlap=16)
    tiles = {row["tile"][0]: row for row in rows}
    assert sorted(tiles) == [0, 48]  # the last one holds no object
    expected = np.zeros((40, 64), bool)
    expected[35:] = True
    np.testing.assert_array_equal(region_of(tiles[0]), expected)
    expected[20:30, 2:14] = True
    np.testing.assert_array_equal(region_of(tiles[48]), expected)
    assert [len(tiles[x]["instances"]) for x in (0, 48)] == [2, 1]


@pytest.mark.parametrize("tile", [None, 64])
def test_an_image_without_a_region_has_none(tile, tmp_path):
    _, (row, *others) = read(tmp_path / "a", [rectangle("nut", 2, 2, 9, 9)], tile=tile)
    assert row["ignored"] is None
    assert not others


def test_the_overlay_of_a_long_name_is_written_under_a_shorter_one(tmp_path):
    """With `.overlay.jpg` and the suffix of an unfinished file it would have over 255 bytes."""
    data, overlays, stem = tmp_path / "data", tmp_path / "overlays", "é" * 120
    data.mkdir()
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(data / f"{stem}.png")
    document = {"shapes": [rectangle("nut", 10, 10, 19, 19)], "imagePath": f"{stem}.png"}
    (data / f"{stem}.json").write_text(json.dumps(document))
    files = find_files(data)
    (name,) = files.annotations
    rules = Rules(PrepareConfig(), {}, frozenset([name]))
    outcome, _ = read_entry(Entry(name, "labelme", files.stamps[name]), files, rules, overlays)
    assert outcome.image is not None
    (overlay,) = overlays.iterdir()
    assert overlay.name.startswith("é" * 80)
    assert Image.open(overlay).size == (SIZE[1], SIZE[0])


def test_memory_does_not_grow_with_the_objects_of_an_image(tmp_path):
    """The pixels of all of them were kept at once, a byte each."""
    side = 400
    Image.new("RGB", (side, side)).save(tmp_path / "a.png")
    shapes = [rectangle("nut", 0, y, side - 1, side - 1) for y in range(150)]
    shapes.append(rectangle("__ignore__", 0, 0, side - 1, side - 1))
    document = {"shapes": shapes, "imagePath": "a.png", "imageHeight": side, "imageWidth": side}
    (tmp_path / "a.json").write_text(json.dumps(document))
    files = find_files(tmp_path)
    rules = Rules(PrepareConfig(tile=300), {}, frozenset(["a.json"]))
    entry = Entry("a.json", "labelme", files.stamps["a.json"])
    tracemalloc.start()
    outcome, _ = read_entry(entry, files, rules, tmp_path / "overlays")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert outcome.labels == {"nut": 150}
    assert peak < 100 * side * side  # bytes; each object has nearly a byte for each pixel


def shape(kind, *points):
    return {"label": "nut", "points": points, "shape_type": kind}


@pytest.mark.parametrize(
    ("entry", "pixels"),
    [
        (shape("polygon", [20, 20], [590, 20], [20, 30]), 440),
        (shape("rectangle", [20, -7], [30, 30]), 7),
        (shape("circle", [5, 5], [5, 35]), 25),  # both of its points lie inside
        (shape("circle", [20, 20], [20, 39]), None),
        (shape("polygon", [0, 0], [150, 0], [150, 40]), None),  # corners of pixels
    ],
)
def test_shapes_that_reach_out_of_the_image_are_warned_about(entry, pixels, tmp_path):
    outcome, _ = read(tmp_path / "a", [entry])
    assert outcome.rejected == []
    expected = [("shapes[0].points", f"reach {pixels} pixels out of the image; cut off there")]
    found = [(warning.field, warning.reason) for warning in outcome.warnings]
    assert found == (expected if pixels else [])


def png_shape(png, x, y, **keys):
    shape = {"label": "cat", "points": [[x, y], [x + 9, y + 9]], "shape_type": "mask", **keys}
    return shape | {"mask": base64.b64encode(png).decode()}


def test_a_shape_that_cannot_be_drawn_takes_no_other_of_its_group_with_it(tmp_path):
    """All three were lost, and one was named."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(1, 255, (10, 10), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    whole = buffer.getvalue()
    group = {"label": "cat", "group_id": 1}
    shapes = [
        png_shape(whole, 0, 0, **group),
        png_shape(whole[:80], 20, 0, **group),
        shape("polygon", [50, 0], [59, 0], [59, 9], [50, 9]) | group,
    ]
    outcome, (row,) = read(tmp_path / "a", shapes)
    assert [(p.field, p.num_shapes) for p in outcome.rejected] == [("shapes[1].mask", 1)]
    assert (outcome.labels, outcome.joined, outcome.num_shapes) == ({"cat": 1}, 1, 3)
    (instance,) = row["instances"]
    assert (instance["box"], instance["area"]) == ([0.0, 0.0, 60.0, 10.0], 200)
    cut = [png_shape(whole[:80], x, 0, **group) for x in (0, 20)]
    alone, (row,) = read(tmp_path / "a", cut)
    assert [p.field for p in alone.rejected] == ["shapes[0].mask", "shapes[1].mask"]
    assert (row["instances"], alone.joined) == ([], 0)


def read_coco_entry(folder, *segmentations, **settings):
    """Outcome of one image of SIZE with these COCO annotations."""
    read(folder, [])
    (folder / "a.json").unlink()
    image = {"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}
    entry = {"image_id": 7, "category_id": 1}
    annotations = [entry | {"segmentation": content} for content in segmentations]
    document = {"images": [image], "annotations": annotations}
    document["categories"] = [{"id": 1, "name": "nut"}]
    (image,), problems = read_coco(json.dumps(document).encode(), "coco.json")
    assert problems == []
    rules = Rules(PrepareConfig(**settings), {}, frozenset())
    return read_entry(Entry.of_coco(image), find_files(folder), rules, folder)[0]


def test_coco_polygons_that_reach_out_of_the_image_are_warned_about(tmp_path):
    """Their masks lie inside, as pycocotools cuts them off."""
    inside, outside = [20, 20, 50, 20, 50, 30], [20, 20, 590, 20, 300, 300, 20, 300]
    rle = {"size": list(SIZE), "counts": [0, SIZE[0] * SIZE[1]]}
    outcome = read_coco_entry(tmp_path / "a", [inside], [inside, outside], rle)
    assert outcome.labels == {"nut": 3}
    assert [(warning.field, warning.reason) for warning in outcome.warnings] == [
        ("annotations[1].segmentation", "reach 440 pixels out of the image; cut off there")
    ]
    filtered = read_coco_entry(tmp_path / "a", [outside], labels=["bolt"])
    assert filtered.warnings == []


def polygon(label, *points, group_id=None):
    return {"label": label, "points": points, "shape_type": "polygon", "group_id": group_id}


def test_the_same_mask_of_a_label_again_is_a_duplicate_whatever_its_points(tmp_path):
    """An export writes a mask's own outline: it would be the same shape twice."""
    again = polygon("nut", [10.2, 10], [19, 10.7], [19, 15], [19, 19], [10, 19])
    shapes = [
        rectangle("nut", 10, 10, 19, 19),
        again,
        again | {"label": "seed"},  # another label: another instance, also of an export
        again | {"label": "nuts"},
        polygon("nut", [10, 10], [19, 10], [10, 19], group_id=1),
        polygon("nut", [19, 10], [19, 19], [10, 19], group_id=1),
    ]
    outcome, (row,) = read(tmp_path, shapes, {"nuts": "nut"})
    assert [instance["label"] for instance in row["instances"]] == ["nut", "seed"]
    assert len({instance["rle"] for instance in row["instances"]}) == 1
    assert outcome.labels == {"nut": 1, "seed": 1}
    assert outcome.joined == 0
    rejected = [(problem.field, problem.num_shapes) for problem in outcome.rejected]
    assert rejected == [("shapes[1]", 1), ("shapes[3]", 1), ("shapes[4]", 2)]
    assert outcome.rejected[0].reason == "('nut') is a duplicate of shapes[0]; remove one"


def test_categories_renamed_to_one_label_are_duplicates_where_their_masks_are_the_same(tmp_path):
    read(tmp_path, [])
    (tmp_path / "a.json").unlink()
    square = {"image_id": 1, "segmentation": [[10, 10, 20, 10, 20, 20, 10, 20]]}
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 150}],
        "categories": [{"id": 1, "name": "nut"}, {"id": 2, "name": "seed"}],
        "annotations": [square | {"id": 1, "category_id": 1}, square | {"id": 2, "category_id": 2}],
    }
    ((image,), _) = read_coco(json.dumps(document).encode(), "c.json")
    for label_map, places in (({}, []), ({"seed": "nut"}, ["annotations[1]"])):
        rules = Rules(PrepareConfig(), label_map, frozenset())
        outcome, _ = read_entry(Entry.of_coco(image), find_files(tmp_path), rules, tmp_path)
        assert [problem.field for problem in outcome.rejected] == places
