"""Objects of a picture that is larger than the model's frame can show: window by window.

Windows overlap, and each is segmented alone. At the seams:

- an object that several windows show whole is that window's in which it lies deepest, because a
  decoder sees least near a border;
- two parts that agree where both windows look are one object, however many windows it crosses;
- an object that deeper ones of other windows mostly cover is left out; a nucleus covers little of
  its cell, so both are kept.

Only masks are kept of a window, so memory grows with the objects and not with the pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from samray.geometry.masks import CroppedMask
from samray.geometry.tiles import Window, tile_windows
from samray.instances.segment import FoundObject

MIN_AGREEMENT = 0.5  # IoU of two parts of one object in the region that both windows show
JITTER = 8  # pixels by which the masks of two windows may differ
MAX_COVERED = 0.5  # share of an object's pixels that objects of other windows may have, too


@dataclass(frozen=True)
class _Part:
    """What windows show of an object, in the picture's frame.

    Attributes:
        windows: numbers of the windows, more than one where parts were put together.
        depth: the largest of the parts, see `_depths`.
    """

    found: FoundObject
    windows: frozenset[int]
    depth: float


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
    sides = np.array([(w.x, w.y, w.x + w.width, w.y + w.height) for w in windows]).T
    parts: list[_Part] = []
    spare: list[_Part] = []
    for number, window in enumerate(windows):
        for found in find(window):
            x, y = found.mask.origin
            mask = CroppedMask(found.mask.pixels, (x + window.x, y + window.y))
            depths = _depths(mask, sides, size)
            part = _Part(replace(found, mask=mask), frozenset([number]), float(depths[number]))
            # The first of equals; what all windows cut off is put together from its parts.
            if depths.max() == 0 or depths.argmax() == number:
                parts.append(part)
            elif 0 < depths.max() - depths[number] <= JITTER:
                spare.append(part)
    objects = _deepest(_joined(_with_uncovered(parts, spare), windows))
    return sorted(objects, key=lambda one: -one.score)


def _depths(mask: CroppedMask, sides: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How many pixels lie between a mask and the nearest border of each window.

    0 of a mask that reaches to the border or beyond. A border of a window that is one of the
    picture does not count: without any other, the depth is infinite.

    Args:
        sides: 4 x windows: left, top, right and bottom of each.

    Returns:
        One float64 a window.
    """
    x1, y1, x2, y2 = _box(mask)
    left, top, right, bottom = sides
    distances = np.stack([x1 - left, y1 - top, right - x2, bottom - y2])
    inner = np.stack([left > 0, top > 0, right < size[1], bottom < size[0]])
    depths: np.ndarray = np.where(inner, distances, np.inf).min(axis=0)
    return np.where(distances.min(axis=0) < 0, 0, depths)


def _with_uncovered(parts: Sequence[_Part], spare: Sequence[_Part]) -> list[_Part]:
    """Return the parts, and those to spare that are no object of another window.

    The masks of two windows differ by a few pixels, so that each may take the other for the
    deeper one, and leave the object to it.
    """
    kept = list(parts)
    boxes = np.array([_box(part.found.mask) for part in [*kept, *spare]]).reshape(-1, 4)
    for part in sorted(spare, key=lambda part: -part.depth):
        mask = part.found.mask
        near = np.flatnonzero(_overlapping(_box(mask), boxes[: len(kept)]))
        area = np.count_nonzero(mask.pixels)
        shares = (_shared(mask, kept[place].found.mask) / area for place in near)
        if not any(share > MAX_COVERED for share in shares):
            boxes[len(kept)] = _box(mask)
            kept.append(part)
    return kept


def _joined(parts: Sequence[_Part], windows: Sequence[Window]) -> list[_Part]:
    """Put the parts of each object together."""
    group = list(range(len(parts)))

    def root(place: int) -> int:
        while group[place] != place:
            place = group[place]
        return place

    for place, other in _crossing(parts):
        if _agree(parts[place], parts[other], windows):
            group[root(other)] = root(place)
    groups: dict[int, list[_Part]] = {}
    for place, part in enumerate(parts):
        groups.setdefault(root(place), []).append(part)
    return [
        _Part(
            _union([part.found for part in some]),
            frozenset().union(*(part.windows for part in some)),
            max(part.depth for part in some),
        )
        for some in groups.values()
    ]


def _deepest(parts: Sequence[_Part]) -> list[FoundObject]:
    """Leave out the objects of which deeper ones of other windows have most of the pixels.

    A small object inside a large one, as a nucleus is in its cell, has few of them: both are kept.
    """
    shared: dict[int, list[tuple[int, int]]] = {}
    for place, other in _crossing(parts):
        if both := _shared(parts[place].found.mask, parts[other].found.mask):
            shared.setdefault(place, []).append((other, both))
            shared.setdefault(other, []).append((place, both))
    areas = [int(np.count_nonzero(part.found.mask.pixels)) for part in parts]
    kept: set[int] = set()
    for place in sorted(range(len(parts)), key=lambda place: (-parts[place].depth, -areas[place])):
        covered = sum(both for other, both in shared.get(place, ()) if other in kept)
        if covered <= MAX_COVERED * areas[place]:
            kept.add(place)
    return [part.found for place, part in enumerate(parts) if place in kept]


def _crossing(parts: Sequence[_Part]) -> Iterator[tuple[int, int]]:
    """Yield the pairs, first place below second, whose boxes overlap and that share no window."""
    boxes = np.array([_box(part.found.mask) for part in parts]).reshape(-1, 4)
    for place, part in enumerate(parts):
        near = _overlapping(boxes[place], boxes[place + 1 :])
        for other in (place + 1 + np.flatnonzero(near)).tolist():
            if not part.windows & parts[other].windows:
                yield place, other


def _overlapping(box: Sequence[int], boxes: np.ndarray) -> np.ndarray:
    """Which of N x 4 boxes, XYXY, overlap a box: N bool."""
    x1, y1, x2, y2 = box
    found: np.ndarray = (
        (boxes[:, 0] < x2) & (boxes[:, 2] > x1) & (boxes[:, 1] < y2) & (boxes[:, 3] > y1)
    )
    return found


def _agree(one: _Part, other: _Part, windows: Sequence[Window]) -> bool:
    """Whether two parts of a window each are much the same in the region that both show."""
    (a,), (b,) = ([windows[number] for number in part.windows] for part in (one, other))
    x1, y1 = max(a.x, b.x), max(a.y, b.y)
    x2, y2 = min(a.x + a.width, b.x + b.width), min(a.y + a.height, b.y + b.height)
    if x1 >= x2 or y1 >= y2:
        return False
    first, second = (_cut(part.found.mask, (x1, y1, x2, y2)) for part in (one, other))
    both = _shared(first, second)
    areas = np.count_nonzero(first.pixels) + np.count_nonzero(second.pixels)
    return bool(both >= MIN_AGREEMENT * (areas - both) and both > 0)


def _shared(one: CroppedMask, other: CroppedMask) -> int:
    """Number of pixels of both masks."""
    ax1, ay1, ax2, ay2 = _box(one)
    bx1, by1, bx2, by2 = _box(other)
    box = (max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2))
    if box[0] >= box[2] or box[1] >= box[3]:
        return 0
    return int(np.count_nonzero(_cut(one, box).pixels & _cut(other, box).pixels))


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
