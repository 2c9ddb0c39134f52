"""Tiles of a large image: their windows, and which one an object belongs to.

An object counts once: it belongs to the tile with most of its pixels, on a tie the first. With an
overlap as wide as the objects, each is whole in some tile.
"""

import math
from dataclasses import dataclass

import numpy as np

from samray.geometry.masks import CroppedMask


@dataclass(frozen=True)
class Window:
    """A part of an image, in pixels.

    Attributes:
        x, y: its top left pixel.
        width, height: its size.
    """

    x: int
    y: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns, to cut it out of an H x W array."""
        return slice(self.y, self.y + self.height), slice(self.x, self.x + self.width)


def tile_windows(size: tuple[int, int], tile: int, overlap: int) -> list[Window]:
    """Return windows that cover an image, row by row.

    Each side is `tile` pixels, or the image's if that is shorter. Neighbours share
    `overlap` pixels; the last of a row or column ends at the border and shares more.

    Args:
        size: (H, W) of the image.
        tile, overlap: pixels; at most half of `tile`.
    """
    height, width = size
    return [
        Window(x, y, min(tile, width), min(tile, height))
        for y in _starts(height, tile, overlap)
        for x in _starts(width, tile, overlap)
    ]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    step = tile - overlap
    count = math.ceil((length - tile) / step) + 1
    return [min(number * step, length - tile) for number in range(count)]


def place_in_tiles(mask: CroppedMask, windows: list[Window]) -> tuple[int, CroppedMask, int]:
    """Return the window that a mask belongs to, its part there, and its pixels outside.

    Returns:
        number: index of the window with most of the mask's pixels.
        part: in that window's frame.
        outside: pixels of the mask that are not in the window.
    """
    parts = [part_in(mask, window) for window in windows]
    areas = [int(np.count_nonzero(part.pixels)) for part in parts]
    number = int(np.argmax(areas))
    outside = int(np.count_nonzero(mask.pixels)) - areas[number]
    return number, parts[number], outside


def part_in(mask: CroppedMask, window: Window) -> CroppedMask:
    """Return what a window shows of a mask, in the window's frame; without pixels if none."""
    x, y = mask.origin[0] - window.x, mask.origin[1] - window.y
    h, w = mask.pixels.shape
    rows = slice(max(0, -y), max(0, min(h, window.height - y)))
    columns = slice(max(0, -x), max(0, min(w, window.width - x)))
    return CroppedMask(mask.pixels[rows, columns], (max(0, x), max(0, y)))
