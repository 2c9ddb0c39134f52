"""Views turn an image and its masks alike."""

import numpy as np
import pytest

from samray.geometry.masks import crop_mask
from samray.geometry.views import View, draw_view


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flipped", [False, True])
def test_a_view_turns_image_and_masks_together(turns, flipped):
    image = np.zeros((30, 50, 3), np.uint8)
    mask = np.zeros((30, 50), bool)
    mask[3:9, 5:25] = True
    image[mask] = 200
    view = View(turns, flipped)
    turned = view.turn(mask)
    assert turned.shape == view.size((30, 50)) == ((50, 30) if turns % 2 else (30, 50))
    np.testing.assert_array_equal(view.turn(image)[:, :, 0] > 0, turned)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("flipped", [False, True])
def test_a_turned_crop_is_a_crop_of_the_turned_mask(turns, flipped):
    mask = np.zeros((6, 9), bool)
    mask[1:3, 2:7] = [[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]
    view = View(turns, flipped)
    whole, turned = crop_mask(view.turn(mask)), view.turn_crop(crop_mask(mask), (6, 9))
    assert turned.origin == whole.origin
    assert np.array_equal(turned.pixels, whole.pixels)


def test_views_are_all_drawn_and_only_recolour_within_bounds():
    views = [draw_view(np.random.default_rng(seed)) for seed in range(200)]
    assert len({(view.quarter_turns, view.flipped) for view in views}) == 8
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert View().recolour(image) is image
    brighter = View(brightness=20.0).recolour(image)
    np.testing.assert_array_equal(brighter, np.minimum(image.astype(int) + 20, 255))
    flat = View(contrast=0.8).recolour(image)
    assert flat.std() < image.std()
    assert abs(float(flat.mean()) - float(image.mean())) < 1
