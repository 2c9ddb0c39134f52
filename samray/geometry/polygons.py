"""Fill a polygon, also one that extends beyond the image or crosses itself.

The rule is OpenCV's: a pixel belongs if the outline, drawn from pixel to pixel, touches it, or if
it lies inside by the even-odd rule.
"""

from collections.abc import Iterator

import cv2
import numpy as np

from samray.errors import AnnotationError

MAX_POINTS_OF_OPENCV = 1000
MAX_OUTLINE = 4_000_000  # pixels; longer than any drawn or traced outline
BLOCK = 2**19  # pixels of outline processed at a time, which bounds memory


def fill_polygon(canvas: np.ndarray, points: np.ndarray) -> None:
    """Set a polygon's pixels to one.

    OpenCV fills polygons inside the canvas. If a polygon extends beyond it, OpenCV bends edges and
    leaves stripes along the border; and its time grows with the square of the number of edges, to
    five minutes for 50,000 points. Those are filled by `fill_by_counting`, which agrees with OpenCV
    to the pixel where OpenCV is right (tested).

    Args:
        canvas: h x w uint8, changed in place.
        points: N x 2 int64, (x, y) pixels of the canvas, up to 1e7 away from it.

    Raises:
        AnnotationError: more than MAX_OUTLINE pixels of its outline lie inside the canvas.
    """
    height, width = canvas.shape
    inside = bool((points >= 0).all() and (points < (width, height)).all())
    if inside and len(points) <= MAX_POINTS_OF_OPENCV:
        cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    else:
        fill_by_counting(canvas, points)


def fill_by_counting(canvas: np.ndarray, points: np.ndarray) -> None:
    """As `fill_polygon`, in time and memory linear in the canvas and the outline.

    A pixel lies inside if an odd number of edges cross its row to the left of it.
    """
    height, width = canvas.shape
    # Both ends of each edge, the left one first (the upper one of vertical edges), so that a line
    # midway between two pixels does not depend on the direction of the outline.
    ends = np.stack([points, np.roll(points, -1, axis=0)])
    (x1, y1), (x2, y2) = ends[0].T, ends[1].T
    backward = (x1 > x2) | ((x1 == x2) & (y1 > y2))
    left, right = np.where(backward[:, None], ends[::-1], ends)
    flat = np.abs(right - left)[:, 0] >= np.abs(right - left)[:, 1]

    outline = np.zeros_like(canvas)
    _draw_lines(outline, left[flat], right[flat])
    _draw_lines(outline.T, left[~flat, ::-1], right[~flat, ::-1])

    crossings = np.zeros((height, width + 1), dtype=np.uint8)
    down = left[:, 1] <= right[:, 1]
    top, bottom = np.where(down[:, None], [left, right], [right, left])
    for edge, y in _walk(top[:, 1], bottom[:, 1] - 1, height):
        (x1, y1), (dx, dy) = top[edge].T, (bottom - top)[edge].T
        x = x1 - (y1 - y) * dx // dy  # rounded up: the first pixel to the right of the edge
        np.bitwise_xor.at(crossings, (y, np.clip(x, 0, width)), 1)
    canvas |= outline | np.bitwise_xor.accumulate(crossings, axis=1)[:, :width]


def _draw_lines(canvas: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    """Draw lines, E x 2 ends in pixels, that are longer along the first axis than the second."""
    height, width = canvas.shape
    low, high = np.minimum(start, end)[:, 0], np.maximum(start, end)[:, 0]
    for line, x in _walk(low, high, width):
        (x1, y1), (dx, dy) = start[line].T, (end - start)[line].T
        length = np.maximum(np.abs(dx), 1)
        # The nearest pixel; midway between two, the one nearer to the line's start.
        steps = (2 * np.abs(x - x1) * np.abs(dy) + length - 1) // (2 * length)
        y = y1 + np.sign(dy) * steps
        seen = (y >= 0) & (y < height)
        canvas[y[seen], x[seen]] = 1


def _walk(
    first: np.ndarray, last: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (index of the range, number in it) of E ranges first..last, clipped to 0..size-1.

    Both are N int64, in blocks of about BLOCK.

    Raises:
        AnnotationError: all ranges together are longer than MAX_OUTLINE.
    """
    first, last = np.maximum(first, 0), np.minimum(last, size - 1)
    lengths = np.maximum(last - first + 1, 0)
    total = int(lengths.sum())
    if total > MAX_OUTLINE:
        raise AnnotationError(
            "points",
            f"make an outline of {total} pixels inside the image; at most {MAX_OUTLINE} are "
            "filled; simplify it",
        )
    blocks = np.cumsum(lengths) // BLOCK
    for block in np.unique(blocks):
        edges = np.flatnonzero((blocks == block) & (lengths > 0))
        edge = np.repeat(edges, lengths[edges])
        before = np.repeat(np.cumsum(lengths[edges]) - lengths[edges], lengths[edges])
        yield edge, first[edge] + np.arange(len(edge)) - before
