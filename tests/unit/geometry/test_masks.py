"""Shapes to masks by hand-counted pixels, masks to pycocotools' RLE, and back to shapes."""

import base64
import io
import json
import struct
import time
import tracemalloc
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from samray.data.labelme import labelme_document, mask_to_shapes, read_annotation
from samray.errors import AnnotationError
from samray.geometry.masks import (
    CroppedMask,
    crop_mask,
    decode_crop,
    decode_rle,
    encode_rle,
    enlarge_mask,
    rasterize_instance,
    require_inside,
)
from samray.geometry.shapes import Shape


def shape(points: Any, kind: str = "polygon", png: bytes | None = None) -> Shape:
    return Shape(0, "cat", kind, np.array(points, dtype=np.float64), None, png)


def frame_of(mask: CroppedMask, size: tuple[int, int]) -> np.ndarray:
    frame = np.zeros(size, dtype=bool)
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    frame[y : y + h, x : x + w] = mask.pixels
    return frame


def rasterize(*shapes: Shape, size: tuple[int, int]) -> np.ndarray:
    return frame_of(rasterize_instance(list(shapes), size), size)


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


# Shapes to masks.


def test_polygon_covers_every_pixel_that_its_outline_touches() -> None:
    mask = rasterize(shape([[1, 1], [4.9, 1.5], [1.2, 4.99]]), size=(6, 7))
    expected = picture("....... .####.. .###... .##.... .#..... .......")
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    "points",
    [
        [[2, 1], [5, 3]],
        [[5, 3], [2, 1]],
        [[2, 3], [5, 1]],
        [[2.7, 1.2], [5.9, 3.4]],
        [[2, 1], [5, 1], [5, 3], [2, 3]],
        [[5, 3], [2, 1], [2, 3], [5, 1]],
    ],
)
def test_rectangle_of_two_or_four_corners_in_any_order_is_the_same(points: Any) -> None:
    mask = rasterize(shape(points, "rectangle"), size=(5, 8))
    assert np.array_equal(mask, picture("........ ..####.. ..####.. ..####.. ........"))


def test_circle_is_a_centre_and_a_point_on_the_rim() -> None:
    mask = rasterize(shape([[50, 40], [50, 60]], "circle"), size=(100, 100))
    rows, columns = np.mgrid[:100, :100]
    distance = np.hypot(rows - 40, columns - 50)
    assert mask[distance <= 18.5].all()
    assert not mask[distance >= 21.5].any()
    assert mask.sum() == pytest.approx(np.pi * 20**2, rel=0.06)


def test_circle_of_no_radius_is_one_pixel() -> None:
    assert rasterize(shape([[3, 2], [3, 2]], "circle"), size=(5, 5)).sum() == 1


@pytest.mark.parametrize("one", [np.uint8(1), np.uint8(255), np.True_])
def test_mask_shape_lands_where_its_points_say(one: Any) -> None:
    """LabelMe writes ones; other tools 255 or a picture of two colours."""
    part = picture("#.# .## ...")
    png = png_of(part.astype(one.dtype) * one)
    mask = rasterize(shape([[2, 1], [4, 3]], "mask", png), size=(5, 6))
    assert np.array_equal(mask, picture("...... ..#.#. ...##. ...... ......"))


@pytest.mark.parametrize(
    ("corners", "kept"),
    [
        ([[-1, -1], [1, 1]], (slice(1, 3), slice(1, 3), slice(0, 2), slice(0, 2))),
        ([[4, 3], [6, 5]], (slice(0, 2), slice(0, 2), slice(3, 5), slice(4, 6))),
        ([[-2, 1], [0, 3]], (slice(0, 3), slice(2, 3), slice(1, 4), slice(0, 1))),
    ],
)
def test_mask_shape_over_the_border_is_cut_off_and_not_moved(corners: Any, kept: Any) -> None:
    part = np.ones((3, 3), np.uint8) * 255
    part[1, 1] = 0
    mask = rasterize(shape(corners, "mask", png_of(part)), size=(5, 6))
    expected = np.zeros((5, 6), bool)
    expected[kept[2], kept[3]] = part[kept[0], kept[1]] > 0
    assert np.array_equal(mask, expected)


def labelme_7_1(points: Any, part: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What labelme 7.1's shapes_to_label draws of a mask shape; it raises on larger integer boxes.

    https://github.com/wkentaro/labelme, labelme/_utils/shape.py
    """
    mask = np.zeros(size, dtype=bool)
    point_array = np.asarray(points)
    (x1, y1), (x2, y2) = point_array.round().astype(int)
    if np.array_equal(point_array, np.trunc(point_array)):
        patch_height, patch_width = y2 - y1 + 1, x2 - x1 + 1
    else:
        patch_height, patch_width = part.shape
    height, width = size
    y_start, y_stop = max(y1, 0), min(y1 + patch_height, height)
    x_start, x_stop = max(x1, 0), min(x1 + patch_width, width)
    if y_start < y_stop and x_start < x_stop:
        mask[y_start:y_stop, x_start:x_stop] = part[
            y_start - y1 : y_stop - y1, x_start - x1 : x_stop - x1
        ]
    return mask


@pytest.mark.parametrize("shift", [(0, 0), (0.4, 0.6), (1e-9, -1e-9), (2.5, 3.5), (-1.7, 9.2)])
@pytest.mark.parametrize("moved", [(0, 0), (-2, -1), (0.3, 0.3), (-2.5, 5.5), (3.3, 7)])
def test_mask_shape_whose_points_have_moved_is_drawn_as_labelme_does(
    shift: tuple[float, float], moved: tuple[float, float]
) -> None:
    """Dragged in labelme: float noise, or a corner that no longer spans the PNG."""
    part = np.random.default_rng(0).random((5, 7)) < 0.6
    corner = np.array([3.0, 2.0]) + shift
    points = np.array([corner, corner + np.array([6, 4]) + moved])
    mask = rasterize(shape(points, "mask", png_of(part)), size=(12, 14))
    assert np.array_equal(mask, labelme_7_1(points, part, (12, 14)))


def test_mask_shape_with_a_larger_box_of_whole_numbers_lies_at_its_corner() -> None:
    """Here labelme ends with an error."""
    part = np.ones((2, 2), bool)
    mask = rasterize(shape([[1, 1], [4, 3]], "mask", png_of(part)), size=(5, 6))
    assert np.array_equal(mask, picture("...... .##... .##... ...... ......"))


@pytest.mark.parametrize("colours", [[0, 0, 0, 1, 1, 1], [255, 255, 255, 0, 0, 0]])
def test_index_of_a_palette_png_says_what_is_inside(colours: list[int]) -> None:
    part = picture("#.# .##")
    coloured = Image.fromarray(part.astype(np.uint8), mode="P")
    coloured.putpalette(colours)
    buffer = io.BytesIO()
    coloured.save(buffer, format="PNG")
    mask = rasterize(shape([[0, 0], [2, 1]], "mask", buffer.getvalue()), size=(2, 3))
    assert np.array_equal(mask, part)


def test_quadrilateral_is_filled_as_a_polygon() -> None:
    points = [[1, 1], [8, 2], [7, 9], [0, 8]]
    quadrilateral = rasterize(shape(points, "quadrilateral"), size=(12, 12))
    assert np.array_equal(quadrilateral, rasterize(shape(points), size=(12, 12)))


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[-3, -3], [1, -3], [1, 1], [-3, 1]], "##.. ##.. .... ...."),
        ([[2, 2], [90, 2], [90, 90], [2, 90]], ".... .... ..## ..##"),
        ([[-5, 1], [50, 1], [50, 2], [-5, 2]], ".... #### #### ...."),
        ([[-9, -9], [99, -9], [99, 99], [-9, 99]], "#### #### #### ####"),
        ([[-0.5, 3.5], [0.5, 3.5], [0.5, 4.5], [-0.5, 4.5]], ".... .... .... #..."),
    ],
)
def test_polygon_over_the_border_is_cut_off(points: Any, expected: str) -> None:
    assert np.array_equal(rasterize(shape(points), size=(4, 4)), picture(expected))


@pytest.mark.parametrize(
    "outside",
    [
        shape([[10, 10], [12, 10], [12, 12]]),
        shape([[-5, -5], [-1, -5], [-1, -1]]),
        shape([[4, 0], [4, 3], [6, 3]]),  # right beside the last column
        shape([[-2, -2], [-0.5, 1]], "rectangle"),
        shape([[40, 40], [42, 40]], "circle"),
        shape([[8, 8], [8, 8]], "mask", png_of(np.ones((1, 1), np.uint8))),
    ],
    ids=lambda s: s.kind,
)
def test_shape_entirely_outside_is_an_error_and_no_empty_mask(outside: Shape) -> None:
    with pytest.raises(AnnotationError, match="outside the image of 4 x 4") as caught:
        rasterize_instance([outside], (4, 4))
    assert caught.value.field == "shapes[0].points"


def test_shape_whose_box_meets_the_image_but_not_its_area_is_an_error() -> None:
    corner_cutter = shape([[-10, 3], [3, -10], [-10, -10]])
    with pytest.raises(AnnotationError, match="covers no pixel"):
        rasterize_instance([corner_cutter], (4, 4))


def test_empty_mask_shape_is_an_error() -> None:
    png = png_of(np.zeros((2, 2), np.uint8))
    with pytest.raises(AnnotationError, match="covers no pixel"):
        rasterize_instance([shape([[0, 0], [1, 1]], "mask", png)], (4, 4))


def test_group_is_the_union_and_overlap_is_no_hole() -> None:
    left = shape([[0, 0], [2, 2]], "rectangle")
    right = shape([[2, 2], [4, 3]], "rectangle")
    dot = shape([[5, 0], [5, 0]], "mask", png_of(np.ones((1, 1), np.uint8)))
    mask = rasterize(left, right, dot, size=(5, 6))
    assert np.array_equal(mask, picture("###..# ###... #####. ..###. ......"))


def test_group_with_one_part_outside_keeps_the_other() -> None:
    inside, outside = [[1, 1], [2, 2]], [[-9, -9], [-8, -8]]
    ones = png_of(np.ones((2, 2), np.uint8))
    for part in (shape(outside, "rectangle"), shape(outside, "mask", ones)):
        mask = rasterize(shape(inside, "rectangle"), part, size=(4, 4))
        assert np.array_equal(mask, picture(".... .##. .##. ...."))


@pytest.mark.parametrize("points", [[[-9, 1], [-1, 3]], [[1, 4], [3, 9]], [[4, 0], [9, 9]]])
def test_a_shape_beside_the_image_is_named_even_inside_a_group(points: Any) -> None:
    with pytest.raises(AnnotationError, match="lies outside the image of 4 x 4 pixels"):
        require_inside(shape(points, "rectangle"), (4, 4))
    touching = [[x if x < 0 else x - 1, y if y < 0 else y - 1] for x, y in points]
    touching[1] = [max(touching[1][0], 0), max(touching[1][1], 0)]
    require_inside(shape(touching, "rectangle"), (4, 4))


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99)))


@pytest.mark.parametrize(
    ("png", "corners"),
    [
        (b"\x89PNG", [[0, 0], [2, 2]]),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), [[0, 0], [2, 2]]),
        (png_of(np.ones((9, 9), np.uint8))[:-20], [[0, 0], [8, 8]]),
        (bomb(20_000, 20_000), [[0, 0], [19_999, 19_999]]),
        (bomb(60_000, 3_000), [[0, 0], [59_999, 2_999]]),
    ],
    ids=["bare", "zeros", "cut", "bomb", "flat-bomb"],
)
def test_bad_mask_png_is_a_problem_of_its_shape_and_no_crash(png: bytes, corners: Any) -> None:
    with pytest.raises(AnnotationError) as caught:
        rasterize_instance([shape(corners, "mask", png)], (10, 10))
    assert caught.value.field == "shapes[0].mask"


@pytest.mark.parametrize(
    ("huge", "share"),
    [
        (shape([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]]), 1),
        (shape([[-1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]]), 0.51),
        (shape([[-1e6, -1e6], [1e6, 1e6]], "rectangle"), 1),
        (shape([[0, 0], [1e6, 1e6]], "circle"), 1),
    ],
    ids=["square", "triangle", "rectangle", "circle"],
)
def test_huge_coordinates_are_clipped(huge: Shape, share: float) -> None:
    start = time.perf_counter()
    mask = rasterize(huge, size=(50, 50))
    assert time.perf_counter() - start < 1
    assert mask.mean() == share


@pytest.mark.parametrize(
    ("points", "expected"),
    [  # OpenCV alone sets pixels of the last column from row 1 on, and of the first down to row 6
        ([[6, 12], [18, -8], [15, 2], [18, 1]], {(7, 9), (8, 8), (8, 9), (9, 8), (9, 9)}),
        ([[-4, -8], [8, -10], [-5, 7], [3, -5]], {(0, 0), (1, 0)}),
    ],
)
def test_a_polygon_past_the_border_leaves_no_stripe_along_it(points: Any, expected: Any) -> None:
    by_opencv = np.zeros((10, 10), np.uint8)
    cv2.fillPoly(by_opencv, [np.array(points, np.int32)], 1)
    assert by_opencv.sum() > len(expected) + 4, "OpenCV has mended it; let it do the work"
    assert set(zip(*np.nonzero(rasterize(shape(points), size=(10, 10))), strict=True)) == expected


def test_a_self_crossing_polygon_of_a_million_points_takes_bounded_time_and_memory() -> None:
    """OpenCV's time grows with the square of the crossings: it would take hours."""
    tangle = np.random.default_rng(0).uniform(0, 4, (1_000_000, 2))
    tracemalloc.start()
    start = time.perf_counter()
    mask = rasterize(shape(tangle), size=(300, 300))
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask[:4, :4].all()
    assert mask.sum() == 16
    assert seconds < 30
    assert peak < 400e6


def test_an_outline_longer_than_the_limit_is_refused_and_not_filled() -> None:
    tangle = np.random.default_rng(0).uniform(0, 2000, (50_000, 2))
    start = time.perf_counter()
    with pytest.raises(AnnotationError, match="simplify it") as caught:
        rasterize(shape(tangle), size=(2000, 2000))
    assert caught.value.field == "shapes[0].points"
    assert time.perf_counter() - start < 10


def test_a_fine_outline_of_many_points_is_filled_as_opencv_does() -> None:
    angles = np.linspace(0, 2 * np.pi, 20_000)
    points = 500 + 450 * np.stack([np.cos(angles), np.sin(3 * angles)], axis=1)
    expected = np.zeros((1000, 1000), np.uint8)
    cv2.fillPoly(expected, [points.astype(np.int32)], 1)
    assert np.array_equal(rasterize(shape(points), size=(1000, 1000)), expected.astype(bool))


def test_small_object_in_a_large_frame_takes_memory_of_its_own_size_only() -> None:
    mask = rasterize_instance([shape([[9000, 7000], [9010, 7000], [9010, 7005]])], (8000, 10_000))
    assert mask.pixels.shape == (6, 11)
    assert mask.origin == (9000, 7000)


@pytest.mark.parametrize(
    ("rows", "origin", "box"),
    [
        ("#", (0, 0), (0, 0, 1, 1)),
        (".... .##. .#.. ....", (10, 20), (11, 21, 13, 23)),
        ("#.. ..#", (5, 0), (5, 0, 8, 2)),
    ],
)
def test_box_is_tight_and_ends_just_outside(rows: str, origin: Any, box: Any) -> None:
    assert CroppedMask(picture(rows), origin).box == box


# Masks to COCO RLE and back.


def frames() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(150):
        size = tuple(rng.integers(1, 30, size=2))
        masks.append(rng.random(size) < rng.choice([0.02, 0.3, 0.7, 0.98]))
    for size in ((1, 1), (1, 9), (9, 1), (7, 5)):
        masks.append(np.ones(size, bool))
        for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
            one = np.zeros(size, bool)
            one[corner] = True
            masks.append(one)
    border = np.ones((8, 6), bool)
    border[1:-1, 1:-1] = False
    columns = np.zeros((8, 6), bool)
    columns[:, 1:4] = True  # runs that continue from the bottom to the next column's top
    snake = np.zeros((4, 4), bool)
    snake[2:, 1] = snake[:2, 2] = True
    return [m for m in [*masks, border, columns, snake, ~columns] if m.any()]


def crop(frame: np.ndarray, rng: np.random.Generator) -> CroppedMask:
    """A crop around the mask, tight or with some empty margin."""
    x1, y1, x2, y2 = (int(v) for v in CroppedMask(frame, (0, 0)).box)
    x1, y1 = int(rng.integers(0, x1 + 1)), int(rng.integers(0, y1 + 1))
    y2 = int(rng.integers(y2, frame.shape[0] + 1))
    return CroppedMask(frame[y1:y2, x1:x2], (x1, y1))


def test_rle_of_a_crop_equals_pycocotools_of_the_whole_frame() -> None:
    rng = np.random.default_rng(1)
    assert len(frames()) > 150
    for frame in frames():
        expected = coco.encode(np.asfortranarray(frame.astype(np.uint8)))["counts"]
        assert encode_rle(crop(frame, rng), frame.shape) == expected, frame.astype(int)


def test_rle_decodes_to_the_same_mask() -> None:
    for frame in frames():
        back = decode_rle(encode_rle(CroppedMask(frame, (0, 0)), frame.shape), frame.shape)
        assert back.dtype == bool
        assert np.array_equal(back, frame)


def test_a_crop_is_decoded_as_the_whole_frame_is() -> None:
    for frame in frames():
        if not frame.any():
            continue
        box = CroppedMask(frame, (0, 0)).box
        x1, y1, x2, y2 = map(int, box)
        found = decode_crop(encode_rle(CroppedMask(frame, (0, 0)), frame.shape), frame.shape, box)
        assert found.origin == (x1, y1)
        assert found.pixels.dtype == bool
        assert np.array_equal(found.pixels, frame[y1:y2, x1:x2])
    with pytest.raises(AnnotationError, match="add up"):
        decode_crop(b"53", (4, 5), (0, 0, 1, 1))


def test_a_small_rle_in_a_large_frame_is_cheap() -> None:
    """Each object of 40 x 40 pixels took 114 ms in 48 megapixels, which were written out for it."""
    size = (6000, 8000)
    small = CroppedMask(np.ones((40, 40), bool), (4000, 3000))
    corners = np.array([[4000.0, 3000.0], [4039.0, 3039.0]])
    found = Shape(0, "cat", "rle", corners, None, rle=encode_rle(small, size))
    tracemalloc.start()
    try:
        mask = rasterize_instance([found], size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (mask.origin, mask.pixels.shape, mask.pixels.all()) == (small.origin, (40, 40), True)
    assert peak < 4e6


@pytest.mark.parametrize(
    "counts", [b"", b"o", b"ooooooooo0", b"1", b"53", b"#", b"\xff", b"oooo0", b"d0a0" * 9]
)
def test_runs_that_do_not_fill_the_frame_are_refused(counts: bytes) -> None:
    """pycocotools would read and write out of bounds."""
    with pytest.raises(AnnotationError, match="add up to the image's 20 pixels"):
        decode_rle(counts, (4, 5))


# Masks to LabelMe shapes, which rasterise to the masks.


def read_back(shapes: list[dict[str, object]], size: tuple[int, int]) -> np.ndarray:
    """Through the text of a LabelMe file."""
    raw = json.dumps(labelme_document("a.jpg", size, shapes)).encode()
    annotation = read_annotation(raw)
    assert not annotation.problems
    return rasterize(*annotation.shapes, size=size)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def blob(seed: int) -> np.ndarray:
    """A smooth random outline around the middle of 120 x 140 pixels."""
    rng = np.random.default_rng(seed)
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    radius = 35 + sum(rng.normal(0, 5) * np.cos(k * angles + rng.uniform(0, 6)) for k in (2, 3, 5))
    points = np.stack([70 + radius * np.cos(angles), 60 + radius * np.sin(angles)], axis=1)
    canvas = np.zeros((120, 140), np.uint8)
    cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    return canvas.astype(bool)


@pytest.mark.parametrize("seed", range(8))
def test_blob_survives_the_conversion_to_a_polygon(seed: int) -> None:
    mask = blob(seed)
    shapes = mask_to_shapes(mask, "cat")
    assert [s["shape_type"] for s in shapes] == ["polygon"]
    assert shapes[0]["label"] == "cat"
    assert shapes[0]["group_id"] is None
    assert len(shapes[0]["points"]) < 120  # a person can still edit it
    assert iou(read_back(shapes, mask.shape), mask) >= 0.97


@pytest.mark.parametrize(
    "rows",
    [
        "#### ####",
        "#... .... ...#",
        "#. .#",
        "..#.. .###. ##### .###. ..#..",
        "#..#. #..#. #..##",
        "..... ..#.. ..... .##..",
    ],
)
def test_small_masks_round_trip_exactly_and_parts_share_a_group(rows: str) -> None:
    mask = picture(rows)
    shapes = mask_to_shapes(mask, "cat")
    parts = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)[0] - 1
    assert len(shapes) == parts
    groups = {s["group_id"] for s in shapes}
    assert len(groups) == 1
    assert (groups == {None}) == (parts == 1)
    assert np.array_equal(read_back(shapes, mask.shape), mask)


@pytest.mark.parametrize("rows", ["#", "##", "####", "..# .#. #..", "# #", "#... ...."])
def test_a_pixel_and_a_line_are_polygons_of_three_different_points(rows: str) -> None:
    """`prepare` refuses points that are all the same, which a double click leaves."""
    mask = picture(rows)
    (only,) = mask_to_shapes(mask, "cat")
    assert len({tuple(point) for point in only["points"]}) == 3  # type: ignore[attr-defined]
    assert np.array_equal(read_back([only], mask.shape), mask)


@pytest.mark.parametrize("rows", ["#### #..# ####", ".#. #.# .#.", "##### #.#.# ##### ..... ....#"])
def test_hole_makes_a_mask_shape_that_round_trips_exactly(rows: str) -> None:
    mask = np.pad(picture(rows), ((2, 1), (3, 4)))
    (only,) = mask_to_shapes(mask, "cat")
    assert only["shape_type"] == "mask"
    assert base64.b64decode(str(only["mask"])).startswith(b"\x89PNG")
    assert np.array_equal(read_back([only], mask.shape), mask)


def test_ragged_masks_round_trip_nearly() -> None:
    rng = np.random.default_rng(3)
    for _ in range(30):
        smooth = cv2.GaussianBlur(rng.random((60, 80)), (0, 0), 3)
        mask = smooth > np.quantile(smooth, 0.7)
        assert iou(read_back(mask_to_shapes(mask, "cat"), mask.shape), mask) >= 0.97


def test_empty_mask_has_no_shapes() -> None:
    assert mask_to_shapes(np.zeros((5, 5), bool), "cat") == []


@pytest.mark.parametrize("scale", [1.0, 1.05, 1.2, 1.37, 1.5, 2.0, 7.3])
def test_a_single_pixel_is_enlarged_to_some(scale: float) -> None:
    """Smoothing alone would leave none of it at scales between 1 and 2."""
    for place in range(12):
        pixel = CroppedMask(np.ones((1, 1), bool), (place, 11 - place))
        large = enlarge_mask(pixel, (12, 12), (scale, scale))
        x, y = large.origin
        assert large.pixels.any()
        assert abs(x / scale - place) <= 1
        assert abs(y / scale - (11 - place)) <= 1


def test_a_cropped_mask_does_not_keep_the_whole_one() -> None:
    """Hundreds of small objects of a large picture are kept at once."""
    mask = np.zeros((4000, 4000), bool)
    mask[10:13, 20:24] = True
    cropped = crop_mask(mask)
    assert cropped.origin == (20, 10)
    assert cropped.pixels.shape == (3, 4)
    assert cropped.pixels.all()
    assert not np.shares_memory(cropped.pixels, mask)
