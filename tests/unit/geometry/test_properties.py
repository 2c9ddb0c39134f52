"""Parser and rasteriser against inputs of hypothesis: no crash, no wrong pixel.

A failure prints the smallest example found and a line that reproduces it (`@reproduce_failure`).
"""

import io
import json
import math
from typing import Any

import cv2
import numpy as np
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from samray.data.coco import coco_annotation, read_coco
from samray.data.labelme import (
    AREAL_SHAPES,
    labelme_document,
    labelme_shape,
    mask_to_shapes,
    read_annotation,
    read_shapes,
)
from samray.errors import AnnotationError
from samray.geometry.masks import (
    CroppedMask,
    decode_crop,
    decode_rle,
    encode_rle,
    rasterize_instance,
    require_inside,
)
from samray.geometry.polygons import fill_by_counting
from samray.geometry.shapes import Shape

Size = tuple[int, int]

# No deadline, because a shared machine may be slow. The whole file takes about ten seconds.
few = settings(
    deadline=None, max_examples=150, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
many = settings(few, max_examples=400)

# Any JSON value, also NaN, infinities, halves of surrogate pairs and numbers past 64 bits.
TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
SCALARS |= st.sampled_from([1e308, -1e308, 10**400, "\ud800", "", " ", "\n", "\0"])
KEYS = st.sampled_from(["label", "points", "shape_type", "group_id", "mask"]) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEYS, v, max_size=4), max_leaves=8
)


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def good_document() -> dict[str, Any]:
    """One shape of every kind, each usable in 20 x 30 pixels."""
    corners = [[2, 3], [9, 3], [9.5, 12], [2, 12]]
    shapes = [
        labelme_shape("polygon", "polygon", np.array(corners), group_id=1),
        labelme_shape("two corners", "rectangle", np.array(corners[::2])),
        labelme_shape("four corners", "rectangle", np.array(corners)),
        labelme_shape("turned", "oriented_rectangle", np.array(corners)),
        labelme_shape("round", "circle", np.array(corners[:2])),
        labelme_shape("png", "mask", np.array([[1, 1], [2, 3]]), png=png_of(np.ones((3, 2), bool))),
        {"label": "edge", "shape_type": "line", "points": corners[:2]},
    ]
    return labelme_document("a.jpg", (20, 30), shapes)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be replaced: every key and index at any depth."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, child in inside:
        found.append((*path, key))
        if isinstance(child, dict | list):
            found += places(child, (*path, key))
    return found


def read_and_rasterise(raw: bytes) -> None:
    """What `prepare` does with a LabelMe file; every shape must be accounted for."""
    try:
        annotation = read_annotation(raw)
    except AnnotationError as problem:
        assert_one_line(problem)
        return
    told = len(annotation.shapes) + len(annotation.problems) + len(annotation.not_instances)
    assert told == annotation.num_shapes
    for problem in annotation.problems:
        assert_one_line(problem)
    for shape in annotation.shapes:
        shape.label.encode()  # Parquet holds UTF-8
        rasterise_or_refuse([shape], (20, 30))


def rasterise_or_refuse(shapes: list[Shape], size: Size) -> None:
    try:
        for shape in shapes:
            require_inside(shape, size)
        mask = rasterize_instance(shapes, size)
    except AnnotationError as problem:
        assert_one_line(problem)
        return
    frame = frame_of(mask, size)  # raises if it does not fit
    x1, y1, x2, y2 = (int(v) for v in mask.box)
    assert frame[y1:y2, x1:x2].sum() == frame.sum() > 0
    assert frame[y1].any()
    assert frame[y2 - 1].any()
    assert frame[:, x1].any()
    assert frame[:, x2 - 1].any()
    np.testing.assert_array_equal(decode_rle(encode_rle(mask, size), size), frame)


def assert_one_line(problem: AnnotationError) -> None:
    assert problem.field
    assert len(str(problem).splitlines()) == 1
    assert len(str(problem)) < 400
    str(problem).encode()


def frame_of(mask: CroppedMask, size: Size) -> np.ndarray:
    frame = np.zeros(size, dtype=bool)
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    assert x >= 0
    assert y >= 0
    frame[y : y + h, x : x + w] = mask.pixels
    return frame


# ---- the parser ----------------------------------------------------------------------------


@many
@given(st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: b'{"shapes": [' + b))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    read_and_rasterise(raw)


@many
@given(st.dictionaries(KEYS | st.sampled_from(["imagePath", "imageWidth"]), VALUES, max_size=4))
@example({"shapes": [{"label": "two\nlines", "points": [[1, 2]]}]})
@example({"shapes": [{"label": "x" * 10_000, "points": [[1, 2]]}]})
def test_any_json_is_read_or_refused(document: dict[str, Any]) -> None:
    read_and_rasterise(json.dumps(document).encode())
    read_and_rasterise(json.dumps({"shapes": [document]}).encode())
    read_and_rasterise(json.dumps(document | {"shapes": list(document.values())}).encode())


@many
@given(st.data(), VALUES)
def test_any_value_at_any_place_of_a_good_file_is_read_or_refused(data: Any, value: Any) -> None:
    document = good_document()
    *path, last = data.draw(st.sampled_from(places(document)))
    holder: Any = document
    for key in path:
        holder = holder[key]
    holder[last] = value
    read_and_rasterise(json.dumps(document).encode())


LABELS = st.text(min_size=1, max_size=9).map(str.strip).filter(bool)
NUMBERS = st.floats(-1e6, 1e6)


@st.composite
def written_shapes(draw: Any) -> dict[str, Any]:
    """Results of `labelme_shape` for usable arguments."""
    kind = draw(st.sampled_from([kind for kind in AREAL_SHAPES if kind != "mask"]))
    number = draw(st.sampled_from(AREAL_SHAPES[kind]))
    if kind == "polygon":
        number = draw(st.integers(3, 12))
    pairs = st.tuples(NUMBERS, NUMBERS)
    different = kind == "polygon"  # whose points are all the same is refused
    points = draw(st.lists(pairs, min_size=number, max_size=number, unique=different))
    group_id = draw(st.none() | st.integers())
    return labelme_shape(draw(LABELS), kind, np.array(points), group_id)


@many
@given(
    st.lists(written_shapes(), max_size=4),
    st.text(max_size=9),
    st.tuples(*[st.integers(1, 10**6)] * 2),
)
def test_what_is_written_is_read_again(
    entries: list[dict[str, Any]], image_path: str, size: Size
) -> None:
    document = labelme_document(image_path, size, entries)
    annotation = read_annotation(json.dumps(document).encode())
    assert annotation.image_path == image_path.replace("\\", "/")
    assert annotation.size == size
    assert annotation.warnings == []
    assert len(annotation.shapes) + len(annotation.problems) == len(entries)
    for problem in annotation.problems:
        assert "duplicate of" in problem.reason
    for shape in annotation.shapes:
        entry = entries[shape.index]
        assert (shape.label, shape.kind) == (entry["label"], entry["shape_type"])
        assert shape.group_id == entry["group_id"]
        assert shape.points.tolist() == entry["points"]
    assert [shape.label for shape in read_shapes(entries)] == [e["label"] for e in entries]


# ---- polygons ------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 50), st.integers(1, 60))
# Eighths of pixels: exact after a shift by whole pixels, and so is their floor.
EIGHTHS = st.integers(-30 * 8, 90 * 8).map(lambda n: n / 8) | st.integers(-5, 65).map(float)
OUTLINES = st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=3, max_size=12).map(np.array)


def polygon(points: np.ndarray) -> Shape:
    return Shape(0, "cat", "polygon", np.asarray(points, dtype=np.float64), None)


def mask_of(points: np.ndarray, size: Size) -> np.ndarray:
    """The polygon's mask in the frame, all False if it covers no pixel."""
    try:
        return frame_of(rasterize_instance([polygon(points)], size), size)
    except AnnotationError:
        return np.zeros(size, dtype=bool)


@many
@given(OUTLINES, SIZES)
@example(np.array([[6, 12], [18, -8], [15, 2], [18, 1]]), (10, 10))
def test_a_polygon_has_the_pixels_that_opencv_gives_it_on_a_canvas_without_border(
    points: np.ndarray, size: Size
) -> None:
    """Also if it extends beyond the image, where OpenCV is wrong."""
    corners = np.floor(points).astype(np.int32)
    low = np.minimum(corners.min(axis=0), 0)
    width, height = np.maximum(corners.max(axis=0) + 1, (size[1], size[0])) - low
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [corners - low], 1)
    expected = canvas[-low[1] :, -low[0] :][: size[0], : size[1]].astype(bool)
    np.testing.assert_array_equal(mask_of(points, size), expected)


@many
@given(st.lists(st.tuples(*[st.integers(0, 20)] * 2), min_size=1, max_size=30).map(np.array))
def test_both_ways_of_filling_agree(points: np.ndarray) -> None:
    by_opencv, by_counting = np.zeros((21, 21), np.uint8), np.zeros((21, 21), np.uint8)
    cv2.fillPoly(by_opencv, [points.astype(np.int32)], 1)
    fill_by_counting(by_counting, points.astype(np.int64))
    np.testing.assert_array_equal(by_counting, by_opencv)


@many
@given(OUTLINES, SIZES, st.integers(0, 11))
def test_neither_direction_nor_starting_point_matter(
    points: np.ndarray, size: Size, start: int
) -> None:
    mask = mask_of(points, size)
    np.testing.assert_array_equal(mask_of(points[::-1], size), mask)
    np.testing.assert_array_equal(mask_of(np.roll(points, start, axis=0), size), mask)


@many
@given(OUTLINES, SIZES, st.integers(-40, 40), st.integers(-40, 40))
def test_a_shift_by_whole_pixels_shifts_the_mask(
    points: np.ndarray, size: Size, right: int, down: int
) -> None:
    height, width = size
    whole = mask_of(points + 100, (height + 200, width + 200))
    shifted = mask_of(points + np.array([right, down]), size)
    y, x = 100 - down, 100 - right
    np.testing.assert_array_equal(shifted, whole[y : y + height, x : x + width])


@many
@given(st.lists(st.sampled_from(["polygon", "rectangle", "circle"]), min_size=1), st.data(), SIZES)
def test_a_group_is_the_union_of_its_parts(kinds: list[str], data: Any, size: Size) -> None:
    shapes = []
    for index, kind in enumerate(kinds):
        number = AREAL_SHAPES[kind][0]
        points = data.draw(st.lists(st.tuples(EIGHTHS, EIGHTHS), min_size=number, max_size=number))
        shapes.append(Shape(index, "cat", kind, np.array(points), 1))
    expected = np.zeros(size, bool)
    for shape in shapes:
        try:
            expected |= frame_of(rasterize_instance([shape], size), size)
        except AnnotationError:
            continue
    rasterise_or_refuse(shapes, size)
    if expected.any():
        np.testing.assert_array_equal(frame_of(rasterize_instance(shapes, size), size), expected)


# ---- masks and their runs ------------------------------------------------------------------

MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@many
@given(MASKS)
def test_runs_equal_pycocotools_and_decode_to_the_mask(mask: np.ndarray) -> None:
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(decode_rle(expected["counts"], mask.shape), mask)
    counts = encode_rle(CroppedMask(mask, (0, 0)), mask.shape)
    assert counts == expected["counts"]
    if not mask.any():
        return
    x1, y1, x2, y2 = (int(v) for v in CroppedMask(mask, (0, 0)).box)
    tight = CroppedMask(mask[y1:y2, x1:x2], (x1, y1))
    assert encode_rle(tight, mask.shape) == counts
    assert coco_mask.area(expected) == mask.sum()
    x, y, w, h = coco_mask.toBbox(expected)
    assert (x, y, x + w, y + h) == tight.box


@many
@given(MASKS, st.data())
def test_any_crop_of_runs_equals_the_crop_of_the_whole_mask(mask: np.ndarray, data: Any) -> None:
    counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    height, width = mask.shape
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    crop = decode_crop(counts, mask.shape, (x1, y1, x2, y2))
    assert crop.origin == (x1, y1)
    np.testing.assert_array_equal(crop.pixels, mask[y1:y2, x1:x2])


@many
@given(st.lists(MASKS.filter(np.any), min_size=1, max_size=3))
def test_an_instance_of_runs_is_the_union_of_their_masks(masks: list[np.ndarray]) -> None:
    expected = np.zeros((12, 12), bool)
    shapes = []
    for number, mask in enumerate(masks):
        frame = np.zeros((12, 12), bool)
        frame[: mask.shape[0], : mask.shape[1]] = mask
        expected |= frame
        counts = coco_mask.encode(np.asfortranarray(frame.astype(np.uint8)))["counts"]
        x1, y1, x2, y2 = CroppedMask(frame, (0, 0)).box
        corners = np.array([[x1, y1], [x2 - 1, y2 - 1]])
        shapes.append(Shape(number, "cat", "rle", corners, None, rle=counts))
    found = rasterize_instance(shapes, (12, 12))
    np.testing.assert_array_equal(frame_of(found, (12, 12)), expected)


@many
@given(MASKS)
def test_a_mask_equals_the_shapes_made_of_it(mask: np.ndarray) -> None:
    """Exact through polygons, because none is so small that half a pixel matters."""
    shapes = read_shapes(mask_to_shapes(mask, "cat", tolerance=0))
    back = frame_of(rasterize_instance(shapes, mask.shape), mask.shape) if shapes else mask & False
    np.testing.assert_array_equal(back, mask)


ALPHABET = "".join(chr(48 + n) for n in range(64))


@many
@given(st.binary(max_size=30) | st.text(ALPHABET, max_size=30).map(str.encode), SIZES)
@example(b"o" * 40, (9, 9))
@example(b"PPPPPPPPPPPPPPPP0", (9, 9))
def test_any_counts_are_decoded_or_refused(counts: bytes, size: Size) -> None:
    try:
        mask = decode_rle(counts, size)
    except AnnotationError as problem:
        assert_one_line(problem)
        return
    expected = coco_mask.decode({"counts": counts, "size": list(size)})
    np.testing.assert_array_equal(mask, expected.astype(bool))


# ---- COCO ----------------------------------------------------------------------------------


def coco_document(**annotation: Any) -> dict[str, Any]:
    entry = {"image_id": 7, "category_id": 3, "segmentation": [[5, 5, 20, 5, 20, 20]]} | annotation
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 20, "width": 30}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [entry],
    }


def read_coco_and_rasterise(document: Any) -> None:
    try:
        images, problems = read_coco(json.dumps(document).encode(), "c.json")
    except AnnotationError as problem:
        assert_one_line(problem)
        return
    for field, reason, _ in problems:
        assert_one_line(AnnotationError(field, reason))
    for image in images:
        annotation = coco_annotation(image)
        told = len(annotation.shapes) + len(annotation.problems) + len(annotation.not_instances)
        assert told == annotation.num_shapes
        for problem in annotation.problems:
            assert_one_line(problem)
        for shape in annotation.shapes:
            shape.label.encode()
            if math.prod(image.size) <= 10_000:
                rasterise_or_refuse([shape], image.size)
    counted = sum(len(image.entries) for image in images) + sum(n for *_, n in problems)
    assert counted == len(document["annotations"])


@many
@given(st.data(), VALUES)
@example(None, 10**6)
def test_any_value_at_any_place_of_a_coco_file_is_read_or_refused(data: Any, value: Any) -> None:
    document = coco_document()
    if data is None:  # an image of 10^12 pixels, whose runs do not fit into 32 bits
        rle = {"size": [value, value], "counts": [0, value * value]}
        document = coco_document(segmentation=rle)
        document["images"][0] |= {"height": value, "width": value}
    else:
        *path, last = data.draw(st.sampled_from(places(document)))
        holder: Any = document
        for key in path:
            holder = holder[key]
        holder[last] = value
    read_coco_and_rasterise(document)


@many
@given(
    st.lists(st.integers(-3, 700), max_size=6)
    | st.lists(st.integers(), max_size=3)
    | st.text(ALPHABET, max_size=12)
    | TEXTS
    | VALUES
)
def test_any_runs_of_a_coco_file_are_read_or_refused(counts: Any) -> None:
    read_coco_and_rasterise(coco_document(segmentation={"size": [20, 30], "counts": counts}))


NEAR = st.floats(-40, 80, allow_nan=False)
RINGS = st.lists(st.tuples(NEAR, NEAR), min_size=3, max_size=9)


@many
@given(st.lists(RINGS, min_size=1, max_size=3))
def test_coco_polygons_are_filled_as_pycocotools_does(rings: list[list[Any]]) -> None:
    """Also if they extend beyond the image."""
    parts = [[float(v) for point in ring for v in point] for ring in rings]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(parts, 20, 30))).astype(bool)
    assume(expected.any())
    raw = json.dumps(coco_document(segmentation=parts)).encode()
    (image,), _ = read_coco(raw, "c.json")
    (shape,) = coco_annotation(image).shapes
    found = frame_of(rasterize_instance([shape], (20, 30)), (20, 30))
    np.testing.assert_array_equal(found, expected)
