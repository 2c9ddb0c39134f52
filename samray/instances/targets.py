"""What the instance decoder learns to predict, from the masks of an image's objects.

Where objects overlap, the smaller one lies on top, as in label maps.

Letters: N objects, g x g cells of the decoder's grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import find_objects

from samray.geometry.frames import input_size_of
from samray.geometry.masks import CroppedMask

BACKGROUND, UNKNOWN = 0, -1  # of `MapTargets.numbers`; an UNKNOWN cell counts in no loss


@dataclass(frozen=True)
class MapTargets:
    """Maps of one image on the decoder's grid.

    Attributes:
        numbers: g x g int32; 0 background, i the i-th object, -1 padding or not annotated.
        center: g x g float32, distance to the object's innermost cell; 0 there, 1 farthest away.
        boundary: g x g float32, distance to the object's outline; 1 at the innermost cell, towards
            0 at the outline. Both are 0 on the background.
        classes: g x g int64, the object's class; 0 on the background.
    """

    numbers: np.ndarray
    center: np.ndarray
    boundary: np.ndarray
    classes: np.ndarray


def map_targets(whole: np.ndarray, classes: Sequence[int], side: int) -> MapTargets:
    """Return the targets of an image.

    Args:
        whole: H x W int32 of `number_objects`, flipped and turned as the image is.
        classes: the class of each object.
        side: g, of the decoder's grid; the longer side of the image spans it.
    """
    numbers = np.full((side, side), UNKNOWN, np.int32)
    height, width = input_size_of((whole.shape[0], whole.shape[1]), side)
    numbers[:height, :width] = _on_grid(whole, (height, width))
    return map_targets_of(numbers, classes)


def map_targets_of(numbers: np.ndarray, classes: Sequence[int]) -> MapTargets:
    """Return the targets of objects that are numbered on the decoder's grid.

    Args:
        numbers: g x g int32, see `MapTargets`.
        classes: the class of each object.
    """
    center, boundary = np.zeros((2, *numbers.shape), np.float32)
    labels = np.zeros(numbers.shape, np.int64)
    for number, box in _boxes(numbers):
        inside = numbers[box] == number
        depth, distance = object_distances(inside)
        boundary[box][inside] = depth[inside]
        center[box][inside] = distance[inside]
        labels[box][inside] = classes[number - 1]
    return MapTargets(numbers, center, boundary, labels)


def number_objects(
    masks: Iterable[CroppedMask], size: tuple[int, int], ignored: np.ndarray | None = None
) -> np.ndarray:
    """Return H x W int32: 0 background, i the i-th object; smaller objects on top of larger ones.

    Args:
        masks: of the objects; work and memory of each grow with its crop, not with the image.
        size: (H, W) of the image.
        ignored: H x W bool, where not every object is annotated: UNKNOWN instead of background.
    """
    numbers = np.zeros(size, np.int32)
    areas = np.full(size, np.iinfo(np.int64).max)  # of the object on top
    for number, mask in enumerate(masks, start=1):
        area = np.count_nonzero(mask.pixels)
        (x, y), (h, w) = mask.origin, mask.pixels.shape
        place = slice(y, y + h), slice(x, x + w)
        on_top = mask.pixels & (area < areas[place])
        numbers[place][on_top], areas[place][on_top] = number, area
    if ignored is not None:
        numbers[ignored & (numbers == BACKGROUND)] = UNKNOWN
    return numbers


def object_distances(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the normalised distances of an object's cells to its outline and to its centre.

    The centre is the cell farthest from the outline, which lies inside any form; a centroid does
    not. The frame's border counts as outline.

    Args:
        inside: h x w bool, at least one True.

    Returns:
        depth: h x w float32; 1 at the centre, towards 0 at the outline, 0 outside.
        distance: h x w float32; 0 at the centre, 1 at the cell of the object farthest from it.
    """
    padded = np.pad(inside.astype(np.uint8), 1)
    found = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # Squares are whole numbers; OpenCV's roots depend in the last digit on the array's place in
    # memory, so that of several deepest cells another one could be the centre in the same run.
    depth = np.sqrt(np.rint(found.astype(np.float64) ** 2)).astype(np.float32)
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    rows, columns = np.ogrid[: inside.shape[0], : inside.shape[1]]
    distance = np.hypot(rows - row, columns - column).astype(np.float32) * inside
    return depth / depth.max(), distance / max(1.0, float(distance.max()))


def _on_grid(numbers: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sample H x W numbers at the centres of h x w cells."""
    rows, columns = (
        ((np.arange(cells) + 0.5) * (pixels / cells)).astype(int)
        for cells, pixels in zip(size, numbers.shape, strict=True)
    )
    return numbers[np.ix_(rows, columns)]


def _boxes(numbers: np.ndarray) -> list[tuple[int, tuple[slice, slice]]]:
    """(number, its rows and columns) of each object that has a cell."""
    found = find_objects(np.maximum(numbers, 0))
    return [(place, box) for place, box in enumerate(found, start=1) if box is not None]
