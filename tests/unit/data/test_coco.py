"""COCO instance JSON: masks equal pycocotools', and nothing unchecked reaches it."""

import json
import pickle
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from samray.data.coco import CocoImage, coco_annotation, is_coco, may_be_coco, read_coco
from samray.data.intake import Entry
from samray.errors import AnnotationError
from samray.geometry.masks import rasterize_instance

SIZE = (40, 60)
SQUARE = [5, 5, 20, 5, 20, 20, 5, 20]


def document(*annotations: dict[str, Any], **keys: Any) -> bytes:
    content = {
        "info": {},
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": " dog "}],
        "annotations": [{"image_id": 7, "category_id": 3} | entry for entry in annotations],
    }
    return json.dumps(content | keys).encode()


def only_image(raw: bytes) -> CocoImage:
    (image,), problems = read_coco(raw, "instances.json")
    assert problems == []
    return image


def masks_of(raw: bytes) -> list[np.ndarray]:
    frames = []
    for shape in coco_annotation(only_image(raw)).shapes:
        cropped = rasterize_instance([shape], SIZE)
        (x, y), (h, w) = cropped.origin, cropped.pixels.shape
        frame = np.zeros(SIZE, bool)
        frame[y : y + h, x : x + w] = cropped.pixels
        frames.append(frame)
    return frames


def test_polygons_of_several_parts_are_filled_as_pycocotools_does() -> None:
    parts = [SQUARE, [30.5, 10.2, 55.7, 12.9, 40.1, 38.4]]
    (mask,) = masks_of(document({"segmentation": parts}))
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, *SIZE)))
    assert np.array_equal(mask, expected.astype(bool))


@pytest.mark.parametrize("compressed", [True, False])
def test_rle_is_taken_as_it_is(compressed: bool) -> None:
    for seed in range(30):
        mask = np.random.default_rng(seed).random(SIZE) < 0.02 * (seed + 1)
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        segmentation: dict[str, Any] = {"size": list(SIZE), "counts": rle["counts"].decode()}
        if not compressed:
            flat = mask.ravel(order="F").astype(int)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [2]])))
            segmentation["counts"] = np.diff(np.concatenate([[0], edges])).tolist()
        (found,) = masks_of(document({"segmentation": segmentation}))
        assert np.array_equal(found, mask)


def test_labels_are_the_categories_names_and_crowds_are_counted() -> None:
    crowd = {"segmentation": {"size": list(SIZE), "counts": [2400]}, "iscrowd": 1}
    raw = document({"segmentation": [SQUARE], "category_id": 4}, crowd)
    annotation = coco_annotation(only_image(raw))
    assert [shape.label for shape in annotation.shapes] == ["dog"]
    assert annotation.not_instances == [("annotations[1].iscrowd", "crowd")]
    assert annotation.num_shapes == 2


@pytest.mark.parametrize("iscrowd", [0, 1])
def test_a_category_of_ignored_regions_is_read_crowd_or_not(iscrowd: int) -> None:
    entry = {"segmentation": [SQUARE], "category_id": 5, "iscrowd": iscrowd}
    raw = document(entry, categories=[{"id": 5, "name": "__ignore__"}])
    annotation = coco_annotation(only_image(raw))
    assert [shape.label for shape in annotation.shapes] == ["__ignore__"]
    assert annotation.not_instances == []


@pytest.mark.parametrize(
    ("entry", "field", "said"),
    [
        ({}, ".segmentation", "a box alone"),
        ({"segmentation": []}, ".segmentation", "a box alone"),
        ({"segmentation": [[1, 2, 3, 4]]}, ".segmentation[0]", "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, ".segmentation[0]", "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, "6"]]}, ".segmentation[0]", "three points"),
        ({"segmentation": [[1, 2, 3, 4, 5, 1e308]]}, ".segmentation[0]", "in pixels"),
        ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, ".segmentation[0]", "in pixels"),
        ({"segmentation": [[100, 100, 120, 100, 110, 120]]}, ".segmentation", "no pixel"),
        ({"segmentation": [SQUARE], "category_id": 9}, ".category_id", "9 is not the id"),
        ({"segmentation": [SQUARE], "category_id": [3]}, ".category_id", "whole number"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, ".segmentation.size", "[40, 60]"),
        ({"segmentation": {"size": 40, "counts": [2400]}}, ".segmentation.size", "[40, 60]"),
        ({"segmentation": {"size": [40], "counts": [2400]}}, ".segmentation.size", "[40, 60]"),
    ],
    ids=str,
)
def test_a_bad_annotation_is_one_problem_and_the_others_are_used(
    entry: dict[str, Any], field: str, said: str
) -> None:
    good, other = {"segmentation": [SQUARE]}, {"segmentation": [SQUARE[:6]]}
    annotation = coco_annotation(only_image(document(good, entry, other)))
    assert len(annotation.shapes) == 2
    (problem,) = annotation.problems
    assert problem.field == f"annotations[1]{field}"
    assert said in problem.reason


@pytest.mark.parametrize(
    "counts",
    [
        [2401], [-1, 2401], [10**30], [], ["1"], [True] * 2400, None, 7, {},
        "0" * 100, "o" * 100, "é", "PPPPPPPPPPPPPPPP0", "~", " ",
    ],
    ids=str,
)  # fmt: skip
def test_runs_that_do_not_add_up_never_reach_pycocotools(counts: Any) -> None:
    segmentation = {"size": list(SIZE), "counts": counts}
    annotation = coco_annotation(only_image(document({"segmentation": segmentation})))
    (problem,) = annotation.problems
    assert "add up to the image's 2400 pixels" in problem.reason


def test_a_polygon_past_the_border_keeps_its_slope() -> None:
    """Its points are not moved to the border, which would bend the edges inside the image."""
    triangle = [[-100.0, 0.0, 60.0, 0.0, 60.0, 40.0]]
    (mask,) = masks_of(document({"segmentation": triangle}))
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(triangle, *SIZE)))
    assert np.array_equal(mask, expected.astype(bool))
    assert mask[20, 0], "a corner moved to (0, 0) would leave this out"


def test_an_image_of_more_pixels_than_32_bits_count_is_refused() -> None:
    """pycocotools raised OverflowError, which ended the whole preparation."""
    image = {"id": 7, "file_name": "a.png", "height": 10**6, "width": 10**6}
    found, problems = read_coco(document({"segmentation": [SQUARE]}, images=[image]), "c.json")
    assert found == []
    assert problems[0][0] == "images[0].width"
    assert "more than any image" in problems[0][1]
    assert problems[1][2] == 1


def test_a_category_that_cannot_be_encoded_affects_its_annotations_only() -> None:
    """Half of a surrogate pair is valid JSON, but Parquet refuses it."""
    raw = document(
        {"segmentation": [SQUARE]},
        {"segmentation": [SQUARE], "category_id": 4},
        categories=[{"id": 3, "name": "\ud800"}, {"id": 4, "name": "dog"}],
    )
    annotation = coco_annotation(only_image(raw))
    assert [shape.label for shape in annotation.shapes] == ["dog"]
    (problem,) = annotation.problems
    assert "with a name" in problem.reason


def test_too_long_an_outline_is_refused() -> None:
    zigzag = [0, 0, 60, 40] * 400_000
    (problem,) = coco_annotation(only_image(document({"segmentation": [zigzag]}))).problems
    assert "too long" in problem.reason


def test_what_belongs_to_no_image_is_listed() -> None:
    images = [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
        {"id": 8, "file_name": "c.png", "height": 0, "width": 60},
        {"id": 9, "height": 40, "width": 60},
        "x",
    ]
    others = {"image_id": 8}, {"image_id": 8}, {"image_id": None}, {"image_id": 1.5}
    found, problems = read_coco(
        document({"segmentation": [SQUARE]}, *others, images=images), "c.json"
    )
    assert [image.name for image in found] == ["c.json#7"]
    assert [(field, count) for field, _, count in problems] == [
        ("annotations[3].image_id", 1),
        ("annotations[4].image_id", 1),
        ("images[1].height", 0),
        ("images[2].file_name", 0),
        ("images[3].id", 0),
        ("annotations[1].image_id", 2),
    ]


IMAGE = {"id": 7, "file_name": "a.png", "height": 40, "width": 60}


def test_images_of_one_id_are_refused_as_nothing_says_whose_the_annotations_are() -> None:
    """Two exports pasted together: the first image got the second's annotations."""
    images = [IMAGE, {**IMAGE, "id": 8, "file_name": "b.png"}, {**IMAGE, "file_name": "c.png"}]
    raw = document(
        {"segmentation": [SQUARE]},
        {"segmentation": [SQUARE]},
        {"segmentation": [SQUARE], "image_id": 8},
        images=images,
    )
    found, problems = read_coco(raw, "c.json")
    assert [image.file_name for image in found] == ["b.png"]
    assert [(field, count) for field, _, count in problems] == [
        ("images[0].id", 2),
        ("images[2].id", 0),
    ]
    assert "7 is the id of 2 images ('a.png', 'c.png')" in problems[0][1]
    found, problems = read_coco(document({}, images=[IMAGE, IMAGE]), "c.json")
    assert (len(found), problems) == (1, []), "the same entry twice is one image"


@pytest.mark.parametrize("one", [7, 7.0, "7", "7.0"])
@pytest.mark.parametrize("other", [7, 7.0, "7"])
def test_ids_and_sizes_may_be_texts_and_floats(one: Any, other: Any) -> None:
    raw = document(
        {"segmentation": [SQUARE], "image_id": other, "category_id": one},
        images=[{"id": one, "file_name": "a.png", "height": 40.0, "width": "60"}],
        categories=[{"id": other, "name": "cat"}],
    )
    image = only_image(raw)
    assert (image.name, image.size) == ("instances.json#7", SIZE)
    assert [shape.label for shape in coco_annotation(image).shapes] == ["cat"]


@pytest.mark.parametrize("size", [["40", "60"], [40.0, 60.0], [40, "60.0"]], ids=str)
def test_the_size_of_an_rle_may_be_texts_and_floats(size: list[Any]) -> None:
    raw = document({"segmentation": {"size": size, "counts": [0, 2400]}})
    assert len(coco_annotation(only_image(raw)).shapes) == 1


def test_ids_that_are_words_are_kept_and_others_refused() -> None:
    raw = document({"segmentation": [SQUARE], "image_id": "a-07"}, images=[{**IMAGE, "id": "a-07"}])
    assert len(coco_annotation(only_image(raw)).shapes) == 1
    for value in (None, True, 1.5, "", " ", "a\nb", [7], {}, float("nan"), "x" * 300):
        found, problems = read_coco(document(images=[{**IMAGE, "id": value}]), "c.json")
        assert found == []
        assert problems == [("images[0].id", "must be a number or text", 0)]
    for value in ("007", "7"):  # leading zeros make another id
        found, problems = read_coco(document({}, images=[{**IMAGE, "id": value}]), "c.json")
        assert len(problems) == (value == "007")


def test_category_id_of_two_names_is_refused() -> None:
    categories = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "cow"}]
    raw = document(
        {"segmentation": [SQUARE]}, {"segmentation": [SQUARE], "category_id": 4},
        categories=[*categories, categories[2]],
    )  # fmt: skip
    annotation = coco_annotation(only_image(raw))
    assert [shape.label for shape in annotation.shapes] == ["cow"]
    assert "categories of two names" in annotation.problems[0].reason


def test_the_same_annotation_again_is_refused() -> None:
    mask = np.zeros(SIZE, np.uint8)
    (found,) = masks_of(document({"segmentation": [SQUARE]}))
    mask[found] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    again = {"segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()}}
    other = {"segmentation": [SQUARE], "category_id": 4}
    raw = document({"segmentation": [SQUARE]}, {"segmentation": [SQUARE]}, other, again)
    annotation = coco_annotation(only_image(raw))
    assert [shape.label for shape in annotation.shapes] == ["cat", "dog"]
    assert [problem.field for problem in annotation.problems] == [
        "annotations[1]",
        "annotations[3]",
    ]
    assert "is a duplicate of annotations[0]" in annotation.problems[0].reason


@pytest.mark.parametrize("short", [[], [3, 4], [3, 4, 5, 6]], ids=str)
def test_part_of_two_points_beside_good_ones_is_left_out_with_a_warning(short: list) -> None:
    raw = document({"segmentation": [short, SQUARE, short]})
    annotation = coco_annotation(only_image(raw))
    assert annotation.problems == []
    assert [field for field, _ in annotation.warnings] == [
        "annotations[0].segmentation[0]",
        "annotations[0].segmentation[2]",
    ]
    (found,) = masks_of(raw)
    (expected,) = masks_of(document({"segmentation": [SQUARE]}))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("iscrowd", [1, True, 1.0, "1"])
def test_crowds_are_instances_if_the_setting_says_so(iscrowd: Any) -> None:
    image = only_image(document({"segmentation": [SQUARE], "iscrowd": iscrowd}))
    assert coco_annotation(image).shapes == []
    assert len(coco_annotation(image).not_instances) == 1
    annotation = coco_annotation(image, crowd_as_instances=True)
    assert (len(annotation.shapes), annotation.not_instances) == (1, [])


def test_a_key_that_is_there_twice_is_refused() -> None:
    """The annotations of the first list were lost without a word."""
    raw = document({"segmentation": [SQUARE]})
    again = raw[:-1] + b', "annotations": []}'
    with pytest.raises(AnnotationError, match="has 'annotations' twice"):
        read_coco(again, "c.json")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
def test_a_file_without_a_list_is_no_coco(key: str) -> None:
    with pytest.raises(AnnotationError, match=key):
        read_coco(document(**{key: {}}), "c.json")


def test_coco_is_recognised_by_its_content_at_any_order_of_keys() -> None:
    content = json.loads(document({"segmentation": [SQUARE]}))
    for first in ({"type": "instances"}, {"videos": []}, {"version": "5.0"}, {"description": "x"}):
        for keys in (list(content), list(content)[::-1]):
            raw = json.dumps(first | {key: content[key] for key in keys}).encode()
            assert may_be_coco(raw[:4096])
            assert is_coco(raw)
    del content["categories"]
    assert is_coco(json.dumps(content).encode()), "and then refused as COCO, not as LabelMe"
    assert is_coco(b"\xef\xbb\xbf" + document())
    assert is_coco(document()[:-9]), "damaged"


def test_other_json_is_no_coco() -> None:
    labelme = b'{"version": "5.0", "flags": {}, "shapes": [], "imagePath": "a.png"}'
    assert not may_be_coco(labelme)
    for raw in (
        labelme,
        b"",
        b"[]",
        b'{"images": []}',
        b'{"images": {}, "annotations": []}',
        b'{"x": ["images", "annotations"]}',
        b'{"version": "images", "annotations"',
    ):
        assert not is_coco(raw)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [600, 900])
def test_deep_attributes_of_an_annotation_do_not_matter(levels: int) -> None:
    """A RecursionError ended the whole preparation."""
    attributes = {"attributes": {"a": nested(levels)}}
    image = only_image(document({"segmentation": [SQUARE]} | attributes))
    assert Entry.of_coco(image).stamp
    assert len(coco_annotation(image).shapes) == 1


@pytest.mark.parametrize("key", ["segmentation", "category_id", "iscrowd"])
def test_an_annotation_nested_too_deeply_is_one_problem(key: str) -> None:
    deep = {"segmentation": [SQUARE], key: nested(900)}
    (image,), problems = read_coco(document(deep, {"segmentation": [SQUARE]}), "c.json")
    assert problems == [
        ("annotations[0]", "has lists in lists of more than 8 levels; export it again", 1)
    ]
    assert pickle.loads(pickle.dumps(Entry.of_coco(image))) == Entry.of_coco(image)
    assert len(coco_annotation(image).shapes) == 1


def test_a_stamp_changes_with_what_decides_the_image_and_with_nothing_else() -> None:
    """Else a correction is missed; or a category added for another image prepares all again."""

    def stamp(entry: dict[str, Any], **keys: Any) -> str:
        return Entry.of_coco(only_image(document(entry, **keys))).stamp

    square = {"segmentation": [SQUARE]}
    cat, dog, two = {"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4, "name": "cow"}
    first = stamp(square)
    assert stamp(square | {"id": 9, "bbox": [1, 2, 3, 4]}, categories=[two, cat]) == first
    other_image = {"id": 7, "file_name": "a.png", "height": 41, "width": 60}
    changed = [
        stamp({"segmentation": [SQUARE[:6]]}),
        stamp(square | {"iscrowd": 1}),
        stamp(square | {"category_id": 4}),
        stamp(square, categories=[dog]),
        stamp(square, categories=[cat, dog]),
        stamp(square, categories=[two]),
        stamp(square, images=[other_image]),
        stamp(square, images=[other_image | {"file_name": "b.png", "height": 40}]),
    ]
    assert len({first, *changed}) == len(changed) + 1
