"""Shapes to masks, and masks to COCO RLE, boxes and outlines.

Boundary rule: points are floored to pixels and every pixel that the outline touches belongs to
the mask. labelme's `shape_to_mask` differs at most at the outline and beside it (tested). A shape
has the same pixels whether it lies inside the image or extends beyond it.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from samray.errors import AnnotationError
from samray.geometry.polygons import fill_polygon
from samray.geometry.shapes import Shape


@dataclass(frozen=True)
class CroppedMask:
    """A mask without the empty area around it, so that small objects in large frames are cheap.

    Attributes:
        pixels: h x w bool, the crop.
        origin: (x, y) of its top left pixel in the frame.
    """

    pixels: np.ndarray
    origin: tuple[int, int]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """XYXY; the mask spans pixel columns x1..x2-1 and rows y1..y2-1."""
        rows = np.flatnonzero(self.pixels.any(axis=1))
        columns = np.flatnonzero(self.pixels.any(axis=0))
        x, y = self.origin
        return (
            float(x + columns[0]),
            float(y + rows[0]),
            float(x + columns[-1] + 1),
            float(y + rows[-1] + 1),
        )


def require_inside(shape: Shape, size: tuple[int, int]) -> None:
    """Refuse a shape that lies outside the image of (H, W) pixels.

    Raises:
        AnnotationError: its box and the image do not overlap.
    """
    outline = np.floor(_outline(shape))
    if (outline.max(axis=0) < 0).any() or (outline.min(axis=0) >= (size[1], size[0])).any():
        raise AnnotationError(
            f"shapes[{shape.index}].points",
            f"({shape.label!r:.60}) lies outside the image of {size[1]} x {size[0]} pixels",
        )


def overhang(shape: Shape, size: tuple[int, int]) -> float:
    """Return by how many pixels a shape reaches out of an image of (H, W) pixels; 0 if not at all.

    Raises:
        AnnotationError: the shape's PNG is damaged.
    """
    outline = _outline(shape) if shape.drawn is None else shape.drawn
    beyond = outline.max(axis=0) - size[::-1]
    return max(0.0, float(-outline.min()), float(beyond.max()))


def rasterize_instance(shapes: list[Shape], size: tuple[int, int]) -> CroppedMask:
    """Return the union of the shapes of one instance, cut off at the image's border.

    Args:
        shapes: one or more shapes.
        size: (H, W) of the image.

    Raises:
        AnnotationError: no pixel of the instance lies inside the image, or a part cannot be filled.
    """
    height, width = size
    outlines = [_outline(shape) for shape in shapes]
    low = np.floor(np.min([points.min(axis=0) for points in outlines], axis=0)).astype(int)
    high = np.floor(np.max([points.max(axis=0) for points in outlines], axis=0)).astype(int)
    x1, y1 = np.maximum(low, 0)
    x2, y2 = np.minimum(high + 1, (width, height))
    where = f"shapes[{shapes[0].index}].points"
    if x1 >= x2 or y1 >= y2:
        raise AnnotationError(
            where, f"({shapes[0].label!r:.60}) lies outside the image of {width} x {height} pixels"
        )
    canvas = np.zeros((y2 - y1, x2 - x1), dtype=np.uint8)
    for shape, points in zip(shapes, outlines, strict=True):
        if shape.kind == "mask":
            _paste_png(canvas, shape, origin=(x1, y1))
        elif shape.kind == "rle":
            assert shape.rle is not None
            canvas |= decode_crop(shape.rle, size, (x1, y1, x2, y2)).pixels
        else:
            try:
                fill_polygon(canvas, np.floor(points).astype(np.int64) - np.array([x1, y1]))
            except AnnotationError as problem:
                field = f"shapes[{shape.index}].{problem.field}"
                raise AnnotationError(field, problem.reason) from problem
    mask = CroppedMask(canvas.astype(bool), (int(x1), int(y1)))
    if not mask.pixels.any():
        raise AnnotationError(where, f"({shapes[0].label!r:.60}) covers no pixel of the image")
    return mask


def encode_rle(mask: CroppedMask, size: tuple[int, int]) -> bytes:
    """Return the compressed COCO RLE counts of the mask in its whole frame of (H, W) pixels.

    Equal to `pycocotools.mask.encode` of the whole frame, but reads the crop only, so a small
    object in a large frame is cheap.
    """
    height, width = size
    # COCO runs are column by column: concatenate the crop's columns with an empty pixel after each.
    h, w = mask.pixels.shape
    columns = np.zeros((w, h + 1), dtype=bool)
    columns[:, :-1] = mask.pixels.T
    flat = columns.ravel()
    # Alternately the first pixel of a run and the one after its last.
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    if flat[0]:
        edges = np.insert(edges, 0, 0)
    column, row = np.divmod(edges, h + 1)
    x, y = mask.origin
    edges = (column + x) * height + row + y
    # A run that reaches the bottom continues at the top of the next column: drop both edges.
    apart = edges[1:] != edges[:-1]
    kept = np.ones(len(edges), dtype=bool)
    kept[1:] = apart
    kept[:-1] &= apart
    edges = edges[kept]
    counts = np.diff(np.concatenate(([0], edges, [height * width])))
    if counts[-1] == 0:
        counts = counts[:-1]
    rle = coco.frPyObjects({"counts": counts.tolist(), "size": [height, width]}, height, width)
    return bytes(rle["counts"])


def decode_rle(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of compressed COCO counts in its frame: H x W bool.

    Raises:
        AnnotationError: field `counts`; they are not runs that fill the frame.
    """
    return decode_crop(counts, size, (0, 0, size[1], size[0])).pixels


def decompress_runs(counts: bytes, size: tuple[int, int]) -> np.ndarray:
    """Return the run lengths of compressed COCO counts, int64; they fill a frame of (H, W).

    Checked, because pycocotools reads and writes out of bounds if they do not. The format has 5
    bits per character, lowest first; from the fourth run on, each is stored as the difference to
    the run two before it.

    Raises:
        AnnotationError: field `counts`.
    """
    digits = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 0x20) == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    whole = len(ends) > 0 and ends[-1] == len(digits) - 1
    # Seven characters are 35 bits: more than any image needs, and their sum cannot overflow.
    if whole and lengths.max() <= 7 and ((digits >= 0) & (digits < 64)).all():
        places = np.arange(len(digits)) - np.repeat(starts, lengths)
        runs = np.add.reduceat((digits & 0x1F) << (5 * places), starts)
        runs -= ((digits[ends] & 0x10) > 0) * (np.int64(1) << (5 * lengths))
        runs[1::2] = np.cumsum(runs[1::2])
        runs[2::2] = np.cumsum(runs[2::2])
        # As floats: an integer sum of wrong runs could overflow to the right one.
        if (runs >= 0).all() and runs.sum(dtype=np.float64) == size[0] * size[1]:
            return runs
    raise AnnotationError(
        "counts", f"must be runs that add up to the image's {size[0] * size[1]} pixels"
    )


def decode_crop(counts: bytes, size: tuple[int, int], box: tuple[float, ...]) -> CroppedMask:
    """Return the part of a mask inside its XYXY box; work and memory grow with the box's columns.

    Args:
        counts: compressed COCO counts in a frame of (H, W) = `size`.

    Raises:
        AnnotationError: field `counts`; they are not runs that fill the frame.
    """
    x1, y1, x2, y2 = (int(v) for v in box)
    # Runs follow each other column by column: only those of the box's columns are written out.
    first = x1 * size[0]
    ends = np.clip(decompress_runs(counts, size).cumsum(), first, x2 * size[0])
    inside = np.arange(len(ends)) % 2 == 1  # runs alternate between outside and inside
    columns = np.repeat(inside, np.diff(ends, prepend=first)).reshape(x2 - x1, size[0])
    # By rows in memory, as the masks that it is compared with: many times as fast.
    pixels = cv2.transpose(columns[:, y1:y2].view(np.uint8)).view(bool)
    return CroppedMask(pixels, (x1, y1))


def mask_ious(rles: Sequence[bytes], others: Sequence[bytes], size: tuple[int, int]) -> np.ndarray:
    """Return the IoU of each of N masks with each of M others: N x M float64.

    Args:
        rles, others: compressed COCO counts.
        size: (H, W) of the image.
    """
    rows, columns = (
        [{"counts": counts, "size": list(size)} for counts in masks] for masks in (rles, others)
    )
    table = coco.iou(rows, columns, [0] * len(columns)) if rows and columns else ()
    return np.array(table, dtype=np.float64).reshape(len(rows), len(columns))


def nearest_overlaps(rles: list[bytes], size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest IoU of each mask with another one of its image, and which one that is.

    Args:
        rles: compressed COCO counts of N masks.
        size: (H, W) of the image.

    Returns:
        ious: N float64; 0 where a mask overlaps no other.
        partners: N int64, indices in `rles`; meaningless where the IoU is 0.
    """
    ious, partners = np.zeros(len(rles)), np.zeros(len(rles), dtype=np.int64)
    for start in range(0, len(rles), 256):  # memory grows with N, not N squared
        table = mask_ious(rles[start : start + 256], rles, size)
        own = np.arange(len(table))
        table[own, start + own] = 0
        partners[start : start + 256] = table.argmax(axis=1)
        ious[start : start + 256] = table.max(axis=1)
    return ious, partners


def crop_mask(mask: np.ndarray) -> CroppedMask:
    """Crop an H x W bool mask tightly; an empty one becomes 0 x 0 pixels at (0, 0)."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    pixels = mask[y : y + height, x : x + width].copy()  # a view would keep the whole mask
    return CroppedMask(pixels, (x, y))


def enlarge_mask(
    tight: CroppedMask, size: tuple[int, int], scale: tuple[float, float]
) -> CroppedMask:
    """Enlarge a mask of a shrunk image to the image's resolution, its outline smoothed.

    Args:
        tight: not empty.
        size: (h, w) of the shrunk image.
        scale: pixels of the image per pixel of the shrunk one, in x and y.
    """
    (x, y), (h, w) = tight.origin, tight.pixels.shape
    # One pixel more on each side, so that the smoothing includes the edge.
    x1, y1, x2, y2 = max(0, x - 1), max(0, y - 1), min(size[1], x + w + 1), min(size[0], y + h + 1)
    left, top, right, bottom = (
        round(value * scale[axis % 2]) for axis, value in enumerate((x1, y1, x2, y2))
    )
    part = np.zeros((y2 - y1, x2 - x1), np.uint8)
    part[y - y1 : y - y1 + h, x - x1 : x - x1 + w][tight.pixels] = 255
    sides = (right - left, bottom - top)
    large = cv2.resize(part, sides, interpolation=cv2.INTER_LINEAR) >= 128
    if not large.any():  # a single pixel, smoothed away
        large = cv2.resize(part, sides, interpolation=cv2.INTER_NEAREST) > 0
    cropped = crop_mask(large)
    return CroppedMask(cropped.pixels, (left + cropped.origin[0], top + cropped.origin[1]))


def outline_of(pixels: np.ndarray, tolerance: float = 1.0) -> list[np.ndarray]:
    """Return the corners of a mask's outlines, including holes: N x 2 int32, (x, y), each.

    Args:
        pixels: h x w bool.
        tolerance: pixels by which the simplified outline may deviate. One pixel turns the steps
            of a slanted edge into the straight line that the annotator drew; half a pixel does not.
    """
    contours, _ = cv2.findContours(pixels.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [cv2.approxPolyDP(contour, tolerance, closed=True)[:, 0] for contour in contours]


def _outline(shape: Shape) -> np.ndarray:
    """N x 2 points of the shape's polygon; for a mask, its box."""
    points = shape.points
    if shape.kind == "mask":
        x, y, width, height = _png_box(shape)
        return np.array([[x, y], [x + width - 1, y + height - 1]])
    if shape.kind == "rectangle":  # two opposite corners in any order, or all four
        (x1, y1), (x2, y2) = points.min(axis=0), points.max(axis=0)
        return np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    if shape.kind == "circle":  # centre, and a point on the rim
        radius = float(np.hypot(*(points[1] - points[0])))
        steps = max(16, min(720, int(radius * 4)))
        angles = np.linspace(0, 2 * np.pi, steps, endpoint=False)
        rim: np.ndarray = points[0] + radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return rim
    return points


def _paste_png(canvas: np.ndarray, shape: Shape, origin: tuple[int, int]) -> None:
    """Add a mask shape's PNG to the canvas, cut off at the canvas's border."""
    x1, y1, width, height = _png_box(shape)
    with _opened_png(shape) as picture:
        # A palette's index says what is inside, not its colour: 1 may be black.
        single = picture if len(picture.getbands()) == 1 else picture.convert("L")
        pixels = np.asarray(single)[:height, :width] != 0
    left, top = x1 - origin[0], y1 - origin[1]
    h, w = canvas.shape
    inside = pixels[max(0, -top) : max(0, h - top), max(0, -left) : max(0, w - left)]
    top, left = max(0, top), max(0, left)
    canvas[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside


def _png_box(shape: Shape) -> tuple[int, int, int, int]:
    """Where a mask shape's PNG lies: x, y, width and height, as in labelme 7.1.

    A shape that was dragged has points between pixels: its PNG lies at the rounded corner. One
    with whole numbers is cut off at the second corner.
    """
    with _opened_png(shape) as picture:
        width, height = picture.size
    corners = shape.points.round().astype(int)
    (x1, y1), (x2, y2) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
    if (corners == shape.points).all():
        width, height = min(width, x2 - x1 + 1), min(height, y2 - y1 + 1)
    return x1, y1, width, height


@contextlib.contextmanager
def _opened_png(shape: Shape) -> Iterator[Image.Image]:
    """Open a mask shape's PNG; any failure inside is an AnnotationError."""
    assert shape.png is not None
    where = f"shapes[{shape.index}].mask"
    try:
        with Image.open(io.BytesIO(shape.png), formats=("PNG",)) as picture:
            if picture.width * picture.height > 170e6:
                raise AnnotationError(where, "is a PNG of more than 170 megapixels")
            yield picture
    except AnnotationError:
        raise
    # Pillow's parsers raise almost anything on damaged files, and an error of its own on bombs.
    except Exception as exc:
        raise AnnotationError(where, "is not a whole PNG") from exc
