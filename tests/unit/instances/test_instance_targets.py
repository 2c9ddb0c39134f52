"""Masks to the maps that the instance decoder learns."""

import time

import numpy as np
import pytest

from samray.geometry.masks import CroppedMask, crop_mask
from samray.instances.targets import UNKNOWN, map_targets, number_objects, object_distances


def square(size, y, x, side):
    mask = np.zeros(size, bool)
    mask[y : y + side, x : x + side] = True
    return mask


def test_the_smaller_of_two_overlapping_objects_lies_on_top():
    large, small = square((8, 8), 0, 0, 6), square((8, 8), 4, 4, 3)
    for order in ([large, small], [small, large]):
        numbers = number_objects(map(crop_mask, order), (8, 8))
        on_top = 1 if order[0] is small else 2
        assert (numbers[4:7, 4:7] == on_top).all()
        assert np.count_nonzero(numbers) == 36 + 9 - 4


def test_distances_of_a_square_by_hand():
    inside = np.ones((5, 5), bool)
    depth, distance = object_distances(inside)
    assert depth[2, 2] == 1
    assert depth[0] == pytest.approx([1 / 3] * 5)
    assert depth[1, 1:4] == pytest.approx([2 / 3] * 3)
    assert (distance[2, 2], distance[0, 0]) == (0, 1)
    assert distance[2, 0] == pytest.approx(2 / np.hypot(2, 2))


def test_the_centre_of_a_crescent_lies_inside_it():
    rows, columns = np.mgrid[:40, :40]
    disc = np.hypot(rows - 20, columns - 20) < 18
    crescent = disc & ~(np.hypot(rows - 20, columns - 28) < 18)
    depth, distance = object_distances(crescent)
    assert crescent[np.unravel_index((depth).argmax(), depth.shape)]
    assert crescent[np.where(distance + ~crescent == 0)].all()


def test_a_single_cell_is_its_own_centre():
    depth, distance = object_distances(np.ones((1, 1), bool))
    assert (depth, distance) == (1, 0)


def test_targets_on_the_grid_leave_the_padding_out():
    """An image of 20 x 40 on a grid of 10: five rows are image, the others unknown."""
    masks = [square((20, 40), 0, 0, 8), square((20, 40), 8, 20, 12)]
    targets = map_targets(number_objects(map(crop_mask, masks), (20, 40)), [1, 0], 10)
    assert (targets.numbers[5:] == UNKNOWN).all()
    assert (targets.numbers[:2, :2] == 1).all()
    assert (targets.numbers[2:5, 5:8] == 2).all()
    assert np.count_nonzero(targets.numbers[:5]) == 4 + 9
    assert (targets.classes[:2, :2] == 1).all()
    assert targets.classes.sum() == 4
    assert (targets.boundary > 0).sum() == 13
    assert targets.boundary.max() == 1
    assert targets.center.max() <= 1


def test_an_image_without_objects_is_background():
    targets = map_targets(number_objects([], (10, 10)), [], 4)
    assert not targets.numbers.any()
    assert not targets.boundary.any()


def test_an_ignored_region_is_unknown_but_for_the_objects_in_it():
    ignored = square((20, 20), 0, 0, 10)
    masks = [crop_mask(square((20, 20), 4, 4, 4))]
    targets = map_targets(number_objects(masks, (20, 20), ignored), [0], 10)
    assert (targets.numbers[2:4, 2:4] == 1).all()
    assert np.count_nonzero(targets.numbers == UNKNOWN) == 25 - 4
    assert (targets.numbers[5:] == 0).all()
    assert not targets.boundary[targets.numbers == UNKNOWN].any()


def test_five_thousand_objects_of_a_large_image_are_numbered_in_a_second():
    """Each costs its own pixels: at a whole frame each it would be minutes a training step."""
    masks = [
        CroppedMask(np.ones((20, 20), bool), (28 * (n % 71), 28 * (n // 71))) for n in range(5000)
    ]
    started = time.process_time()
    numbers = number_objects(masks, (2000, 2000))
    assert time.process_time() - started < 5
    assert np.count_nonzero(np.bincount(numbers.ravel())[1:] == 400) == 5000
