"""Objects of a picture that is larger than the model's frame can show: window by window.

Windows overlap, and each is segmented alone. At the seams:

- an object that another window shows whole, and this one cut off, is that window's;
- two parts that agree where both windows look are one object, however many windows it crosses.

Only masks are kept of a window, so memory grows with the objects and not with the pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samray.geometry.masks import CroppedMask
from samray.geometry.tiles import Window, tile_windows
from samray.instances.segment import FoundObject

MIN_AGREEMENT = 0.5  # IoU of two parts of one object in the region that both windows show


@dataclass(frozen=True)
class _Part:
    """What one window shows of an object, in the picture's frame."""

    found: FoundObject
    window: Window


def find_in_windows(
    size: tuple[int, int],
    tile: int,
    overlap: int,
    find: Callable[[Window], list[FoundObject]],
) -> list[FoundObject]:
    """Return the objects of a picture, the surest first; none is cut or doubled at a seam.

    Args:
        size: (H, W) of the picture.
        tile, overlap: pixels, see `tile_windows`. Objects wider than the overlap are put together
            from their parts.
        find: returns the objects of a window, in the window's frame.
    """
    windows = tile_windows(size, tile, overlap)
    parts: list[_Part] = []
    for window in windows:
        for found in find(window):
            x, y = found.mask.origin
            mask = CroppedMask(found.mask.pixels, (x + window.x, y + window.y))
            moved = _Part(replace(found, mask=mask), window)
            if not _whole_elsewhere(moved, windows, size):
                parts.append(moved)
    return sorted(_joined(parts), key=lambda one: -one.score)


def _whole_elsewhere(part: _Part, windows: Sequence[Window], size: tuple[int, int]) -> bool:
    """Whether a window cuts the object off, and another one contains what is seen of it whole."""
    if not _is_cut(part.found.mask, part.window, size):
        return False
    x1, y1, x2, y2 = _box(part.found.mask)
    return any(
        window != part.window
        and window.x <= x1
        and window.y <= y1
        and x2 <= window.x + window.width
        and y2 <= window.y + window.height
        and not _is_cut(part.found.mask, window, size)
        for window in windows
    )


def _is_cut(mask: CroppedMask, window: Window, size: tuple[int, int]) -> bool:
    """Whether a mask reaches a border of its window that is none of the picture."""
    x1, y1, x2, y2 = _box(mask)
    return (
        (x1 <= window.x and window.x > 0)
        or (y1 <= window.y and window.y > 0)
        or (x2 >= window.x + window.width and window.x + window.width < size[1])
        or (y2 >= window.y + window.height and window.y + window.height < size[0])
    )


def _joined(parts: Sequence[_Part]) -> list[FoundObject]:
    """Put the parts of each object together."""
    group = list(range(len(parts)))

    def root(place: int) -> int:
        while group[place] != place:
            place = group[place]
        return place

    boxes = np.array([_box(part.found.mask) for part in parts]).reshape(-1, 4)
    for place, part in enumerate(parts):
        x1, y1, x2, y2 = boxes[place]
        later = boxes[place + 1 :]
        near = (later[:, 0] < x2) & (later[:, 2] > x1) & (later[:, 1] < y2) & (later[:, 3] > y1)
        for other in (place + 1 + np.flatnonzero(near)).tolist():
            if parts[other].window != part.window and _agree(part, parts[other]):
                group[root(other)] = root(place)
    groups: dict[int, list[FoundObject]] = {}
    for place, part in enumerate(parts):
        groups.setdefault(root(place), []).append(part.found)
    return [_union(some) for some in groups.values()]


def _agree(one: _Part, other: _Part) -> bool:
    """Whether two parts are much the same in the region that both windows show."""
    a, b = one.window, other.window
    x1, y1 = max(a.x, b.x), max(a.y, b.y)
    x2, y2 = min(a.x + a.width, b.x + b.width), min(a.y + a.height, b.y + b.height)
    if x1 >= x2 or y1 >= y2:
        return False
    first, second = (_cut(part.found.mask, (x1, y1, x2, y2)) for part in (one, other))
    ax1, ay1, ax2, ay2 = _box(first)
    bx1, by1, bx2, by2 = _box(second)
    shared = (max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2))
    if shared[0] >= shared[2] or shared[1] >= shared[3]:
        return False
    both = np.count_nonzero(_cut(first, shared).pixels & _cut(second, shared).pixels)
    areas = np.count_nonzero(first.pixels) + np.count_nonzero(second.pixels)
    return bool(both >= MIN_AGREEMENT * (areas - both) and both > 0)


def _union(found: list[FoundObject]) -> FoundObject:
    """One object of its parts: the class and, by area, the score of what is seen most."""
    if len(found) == 1:
        return found[0]
    boxes = np.array([_box(one.mask) for one in found])
    x1, y1 = boxes[:, :2].min(axis=0)
    x2, y2 = boxes[:, 2:].max(axis=0)
    pixels = np.zeros((y2 - y1, x2 - x1), bool)
    for one, (left, top, right, bottom) in zip(found, boxes, strict=True):
        pixels[top - y1 : bottom - y1, left - x1 : right - x1] |= one.mask.pixels
    areas = [int(np.count_nonzero(one.mask.pixels)) for one in found]
    score = sum(one.score * area for one, area in zip(found, areas, strict=True)) / sum(areas)
    largest = found[int(np.argmax(areas))]
    return FoundObject(CroppedMask(pixels, (int(x1), int(y1))), largest.class_index, score)


def _box(mask: CroppedMask) -> tuple[int, int, int, int]:
    """XYXY of a tightly cropped mask."""
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    return x, y, x + w, y + h


def _cut(mask: CroppedMask, box: tuple[int, int, int, int]) -> CroppedMask:
    """The part of a mask in a box, not cropped further."""
    x, y = mask.origin
    x1, y1 = max(box[0], x), max(box[1], y)
    pixels = mask.pixels[y1 - y : max(0, box[3] - y), x1 - x : max(0, box[2] - x)]
    return CroppedMask(pixels, (x1, y1))
