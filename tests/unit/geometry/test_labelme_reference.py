"""Masks compared with those of the labelme library, of `pip install -e .[reference]`.

Both floor the points. On what follows they differ by design: labelme draws with Pillow, whose
outline leaves out some of the pixels that the line between two points touches. So a pixel may
differ only if it is one of our outline's or one of the eight around it; all others, inside and
outside, must agree. A rectangle's sides run along the pixels: there not one may differ.
"""

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samray.data.labelme import read_annotation
from samray.errors import AnnotationError
from samray.geometry.masks import rasterize_instance
from samray.geometry.shapes import Shape

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")  # labelme imports Qt; no screen is needed
labelme_shape = pytest.importorskip(
    "labelme.utils.shape", reason="labelme is not installed", exc_type=ImportError
)

SIZE = (70, 80)
REAL = Path(__file__).parents[3] / "shared" / "datasets"
some = settings(deadline=None, max_examples=300, print_blob=True)

# Inside the image in eighths of pixels. Left of it and above in whole ones: Pillow rounds
# negative numbers towards zero and would show what lies half a pixel outside.
COORDINATES = st.integers(0, 110 * 8).map(lambda n: n / 8) | st.integers(-40, -1).map(float)
POINTS = st.tuples(COORDINATES, COORDINATES)


def our_mask(kind: str, points: Any, size: tuple[int, int] = SIZE) -> np.ndarray:
    frame = np.zeros(size, dtype=bool)
    try:
        mask = rasterize_instance([Shape(0, "cat", kind, np.array(points, float), None)], size)
    except AnnotationError:
        return frame  # no pixel of it lies in the image
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    frame[y : y + h, x : x + w] = mask.pixels
    return frame


def near_outline(points: Any, size: tuple[int, int] = SIZE) -> np.ndarray:
    """The pixels of the outline of the floored points, and their eight neighbours."""
    corners = np.floor(points).astype(np.int32)
    low = np.minimum(corners.min(axis=0), 0) - 2
    width, height = np.maximum(corners.max(axis=0), size[::-1]) - low + 3
    canvas = np.zeros((height, width), np.uint8)
    cv2.polylines(canvas, [corners - low], True, 1)
    near = cv2.dilate(canvas, np.ones((3, 3), np.uint8))
    return near[-low[1] :, -low[0] :][: size[0], : size[1]].astype(bool)


def assert_agree_but_at_the_outline(
    kind: str, points: Any, outline: Any, size: tuple[int, int] = SIZE
) -> None:
    theirs = labelme_shape.shape_to_mask(size, [list(p) for p in points], kind)
    ours = our_mask(kind, points, size)
    wrong = (ours != theirs) & ~near_outline(outline, size)
    assert not wrong.any(), np.argwhere(wrong)[:5]


@some
@given(st.lists(POINTS, min_size=3, max_size=10))
def test_polygons_agree_but_at_the_outline(points: Any) -> None:
    assert_agree_but_at_the_outline("polygon", points, points)


@some
@given(st.lists(POINTS, min_size=2, max_size=2))
def test_rectangles_agree_to_the_pixel(points: Any) -> None:
    theirs = labelme_shape.shape_to_mask(SIZE, [list(p) for p in points], "rectangle")
    np.testing.assert_array_equal(our_mask("rectangle", points), theirs)


@some
@given(POINTS, st.floats(0.5, 30), st.floats(0.05, 1), st.floats(0, 7))
def test_oriented_rectangles_agree_but_at_the_outline(
    centre: Any, length: float, ratio: float, angle: float
) -> None:
    u = length * np.array([np.cos(angle), np.sin(angle)])
    v = ratio * np.array([-u[1], u[0]])
    corners = np.array(centre) + np.array([-u - v, u - v, u + v, v - u])
    corners = np.where(corners < 0, np.floor(corners), corners)
    assert_agree_but_at_the_outline("oriented_rectangle", corners.tolist(), corners)


@some
@given(
    st.tuples(*[st.integers(15 * 8, 55 * 8).map(lambda n: n / 8)] * 2),
    st.floats(0, 15),
    st.floats(0, 7),
)
@example((40.0, 30.0), 0.0, 0.0)
def test_circles_agree_but_at_the_rim(centre: Any, radius: float, angle: float) -> None:
    rim = [centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)]
    angles = np.linspace(0, 2 * np.pi, 200)
    outline = np.array(centre) + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert_agree_but_at_the_outline("circle", [list(centre), rim], outline)


@pytest.mark.parametrize("folder", ["nuts_labelme", "zebrafish_microscopy"])
def test_real_outlines_agree_but_at_the_outline(folder: str) -> None:
    files = sorted((REAL / folder / "annotations").glob("*.json"))[:4]
    if not files:
        pytest.skip(f"{REAL / folder} is not here")
    union = common = 0
    for file in files:
        annotation = read_annotation(file.read_bytes())
        size = annotation.size
        assert size is not None
        for shape in annotation.shapes:
            assert_agree_but_at_the_outline(shape.kind, shape.points.tolist(), shape.points, size)
            theirs = labelme_shape.shape_to_mask(size, shape.points.tolist(), shape.kind)
            ours = our_mask(shape.kind, shape.points, size)
            union += (ours | theirs).sum()
            common += (ours & theirs).sum()
    assert common / union > 0.98
