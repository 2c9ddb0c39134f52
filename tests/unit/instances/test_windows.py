"""Objects at the seams of windows, where the truth is known."""

import numpy as np
import pytest
from scipy import ndimage

from samray.geometry.masks import CroppedMask
from samray.geometry.tiles import tile_windows
from samray.instances.segment import FoundObject
from samray.instances.windows import find_in_windows


def seen(numbers):
    """What a window shows of a label map: every visible part of every object."""

    def find(window):
        view = numbers[window.slices]
        return [
            FoundObject(CroppedMask(view[box] == n, (box[1].start, box[0].start)), 0, 0.5)
            for n, box in enumerate(ndimage.find_objects(view), start=1)
            if box is not None
        ]

    return find


def paint(found, size):
    """Label map of the objects, and how many cover each pixel."""
    numbers, covered = np.zeros(size, int), np.zeros(size, int)
    for number, one in enumerate(found, start=1):
        (x, y), (h, w) = one.mask.origin, one.mask.pixels.shape
        numbers[y : y + h, x : x + w][one.mask.pixels] = number
        covered[y : y + h, x : x + w] += one.mask.pixels
    return numbers, covered


def assert_same(found, numbers):
    assert len(found) == len(np.unique(numbers)) - 1
    painted, covered = paint(found, numbers.shape)
    assert covered.max() <= 1
    assert ((painted > 0) == (numbers > 0)).all()
    for number in range(1, len(found) + 1):
        assert len(np.unique(painted[numbers == number])) == 1


@pytest.mark.parametrize(("tile", "overlap"), [(64, 16), (50, 25), (100, 20)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_object_is_cut_or_doubled_at_a_seam(tile, overlap, seed):
    """Touching discs of any size, also larger than overlap and window."""
    rng = np.random.default_rng(seed)
    numbers = np.zeros((230, 310), int)
    rows, columns = np.mgrid[:230, :310]
    for number in range(1, 40):
        y, x, r = rng.integers(0, 230), rng.integers(0, 310), rng.integers(3, 30)
        numbers[(np.hypot(rows - y, columns - x) < r) & (numbers == 0)] = number
    parts = np.zeros_like(numbers)
    for number in range(1, 40):  # each connected, as an object is
        labelled, count = ndimage.label(numbers == number)
        if count:
            sizes = np.bincount(labelled.ravel())[1:]
            if sizes.max() >= 20:
                parts[labelled == 1 + sizes.argmax()] = parts.max() + 1
    assert_same(find_in_windows(parts.shape, tile, overlap, seen(parts)), parts)


def test_an_object_over_many_windows_is_one():
    numbers = np.zeros((300, 300), int)
    numbers[20:30, 5:290] = 1
    numbers[60:290, 120:260] = 2
    assert len(tile_windows((300, 300), 64, 16)) > 20
    assert_same(find_in_windows((300, 300), 64, 16, seen(numbers)), numbers)


def test_a_picture_that_fits_one_window_is_not_cut():
    numbers = np.zeros((40, 50), int)
    numbers[0:10, 0:50], numbers[20:40, 45:50] = 1, 2
    assert_same(find_in_windows((40, 50), 64, 16, seen(numbers)), numbers)
    assert find_in_windows((40, 50), 64, 16, lambda window: []) == []


def test_neighbours_that_touch_in_the_overlap_stay_apart():
    numbers = np.zeros((64, 112), int)
    numbers[10:40, 30:56], numbers[10:40, 56:80] = 1, 2  # the seam's overlap is 48..64
    assert_same(find_in_windows((64, 112), 64, 16, seen(numbers)), numbers)


def test_joined_parts_take_the_class_of_the_largest():
    def find(window):
        wide = window.x == 0
        pixels = np.ones((10, 40 if wide else 20), bool)
        return [FoundObject(CroppedMask(pixels, (24 if wide else 0, 5)), int(wide), 0.9)]

    (found,) = find_in_windows((64, 112), 64, 16, find)
    assert found.class_index == 1
    assert found.mask.pixels.shape == (10, 44)
    assert found.score == pytest.approx(0.9)


def blobs(*boxes):
    """What windows find: objects as boxes in the picture's frame, by window.x."""

    def find(window):
        return [
            FoundObject(CroppedMask(np.ones((y2 - y1, x2 - x1), bool), (x1 - window.x, y1)), 0, 0.5)
            for x, (x1, y1, x2, y2) in boxes
            if x == window.x
        ]

    return find


# Windows of the next tests: columns 0..64 and 48..112 of a picture of 64 x 112.
def test_of_two_views_of_an_object_the_deeper_is_kept():
    find = blobs((0, (52, 10, 60, 20)), (48, (50, 8, 62, 22)), (0, (30, 30, 40, 40)))
    found = find_in_windows((64, 112), 64, 16, find)
    assert {one.mask.origin for one in found} == {(52, 10), (30, 30)}  # 4 pixels deep, not 2


def test_what_a_window_sees_in_place_of_an_object_of_its_neighbour_is_left_out():
    """A strip at the border of one window over an object that the other shows whole."""
    find = blobs((0, (44, 10, 62, 20)), (48, (49, 9, 63, 21)))
    (found,) = find_in_windows((64, 112), 64, 16, find)
    assert found.mask.origin == (44, 10)


def test_of_rivals_that_no_window_shows_whole_the_deeper_is_kept():
    find = blobs((0, (40, 10, 64, 20)), (48, (50, 8, 70, 40)))
    (found,) = find_in_windows((64, 112), 64, 16, find)
    assert found.mask.origin == (50, 8)


def test_an_object_inside_another_of_the_same_window_is_kept():
    find = blobs((0, (10, 10, 40, 40)), (0, (20, 20, 30, 30)))
    assert len(find_in_windows((64, 112), 64, 16, find)) == 2


def test_a_nucleus_and_its_cell_are_kept_where_each_is_another_window_s():
    cell, nucleus = (50, 10, 63, 22), (51, 12, 55, 16)  # deeper in the second, in the first window
    find = blobs((0, cell), (0, nucleus), (48, cell), (48, nucleus))
    found = find_in_windows((64, 112), 64, 16, find)
    assert sorted(one.mask.pixels.size for one in found) == [16, 156]


def test_what_a_window_sees_for_two_objects_of_its_neighbour_is_left_out():
    find = blobs((0, (50, 10, 56, 20)), (0, (50, 20, 56, 30)), (48, (50, 10, 60, 30)))
    found = find_in_windows((64, 112), 64, 16, find)
    assert {one.mask.origin for one in found} == {(50, 10), (50, 20)}
    assert len(found) == 2


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
@pytest.mark.parametrize("left", range(50, 58))
def test_masks_that_differ_by_a_few_pixels_neither_lose_nor_double_an_object(left, shift):
    """In the middle of the overlap each window may take the other's view for the deeper one."""
    find = blobs((0, (left, 10, left + 6, 20)), (48, (left + shift, 10, left + shift + 6, 20)))
    assert len(find_in_windows((64, 112), 64, 16, find)) == 1
