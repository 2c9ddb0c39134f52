"""Tiles cover the image; an object is in one of them, and its pixels outside are counted."""

import itertools

import numpy as np
import pytest

from samray.geometry.masks import CroppedMask
from samray.geometry.prompts import Prompt
from samray.geometry.tiles import Window, place_in_tiles, tile_windows
from samray.prediction.predictor import Predictor, _part_of, _windows_around
from samray.sam.model import build_model


@pytest.mark.parametrize("size", [(340, 2000), (100, 100), (512, 512), (513, 1), (1000, 777)])
@pytest.mark.parametrize(("tile", "overlap"), [(128, 0), (128, 32), (512, 256), (100, 50)])
def test_windows_cover_every_pixel_and_overlap_as_asked(size, tile, overlap):
    windows = tile_windows(size, tile, overlap)
    covered = np.zeros(size, int)
    for window in windows:
        part = covered[window.slices]
        assert part.shape == (window.height, window.width)
        assert part.shape == (min(tile, size[0]), min(tile, size[1]))
        part += 1
    assert covered.min() >= 1
    columns = sorted({window.x for window in windows})
    for left, right in itertools.pairwise(columns):
        assert left + tile - right >= overlap
    assert len(set(windows)) == len(windows)


def test_a_small_image_is_one_window():
    assert tile_windows((100, 200), 256, 64) == [Window(0, 0, 200, 100)]


@pytest.mark.parametrize("seed", range(20))
def test_an_object_is_where_most_of_it_is_and_nothing_of_it_is_lost(seed):
    rng = np.random.default_rng(seed)
    full = np.zeros((90, 150), dtype=bool)
    x, y, w, h = rng.integers([0, 0, 1, 1], [149, 89, 60, 50])
    full[y : y + h, x : x + w] = rng.random(full[y : y + h, x : x + w].shape) < 0.7
    full[y, x] = True
    mask = CroppedMask(full[y : y + h, x : x + w], (int(x), int(y)))
    windows = tile_windows(full.shape, 64, 16)
    number, part, outside = place_in_tiles(mask, windows)
    areas = [int(full[window.slices].sum()) for window in windows]
    assert areas[number] == max(areas)
    assert number == areas.index(max(areas))
    assert outside == full.sum() - max(areas)
    frame = np.zeros((windows[number].height, windows[number].width), dtype=bool)
    (px, py), (ph, pw) = part.origin, part.pixels.shape
    frame[py : py + ph, px : px + pw] = part.pixels
    assert np.array_equal(frame, full[windows[number].slices])


def test_a_prompt_gets_a_window_around_it():
    image = np.zeros((300, 2000, 3), np.uint8)
    point = Prompt(np.array([[1000, 20]], np.float32), np.array([1]))
    assert _windows_around(point, image, 256) == [Window(873, 0, 256, 256)]
    at_border = Prompt(np.array([[1999, 299]], np.float32), np.array([1]))
    assert _windows_around(at_border, image, 256) == [Window(1744, 44, 256, 256)]
    box = Prompt(box=np.array([100, 10, 700, 60], np.float32))
    windows = _windows_around(box, image, 256)
    assert windows[0].x <= 100 - 60
    assert windows[-1].x + 256 >= 700 + 60
    parts = [_part_of(box, window) for window in windows]
    for window, part in zip(windows, parts, strict=True):
        ends = [max(100, window.x) - window.x, 10, min(700, window.x + 256) - window.x, 60]
        assert part.box.tolist() == ends


@pytest.mark.parametrize("spread", [0, 255, 256, 257, 1500])
def test_every_point_is_in_some_window_with_image_around_it(spread):
    image = np.zeros((300, 2000, 3), np.uint8)
    coords = np.array([[200, 100], [200 + spread, 100]], np.float32)
    prompt = Prompt(coords, np.array([1, 1]))
    for x, y in coords:
        distances = [
            min(x - window.x, window.x + window.width - 1 - x)
            for window in _windows_around(prompt, image, 256)
            if window.y <= y < window.y + window.height
        ]
        assert max(distances) >= (0 if spread == 255 else 32)


def test_points_and_box_move_into_the_window():
    window = Window(100, 50, 64, 64)
    coords = np.array([[110, 60], [10, 60], [120, 70]], np.float32)
    prompt = Prompt(coords, np.array([1, 1, 0]), np.array([90, 40, 130, 70], np.float32))
    part = _part_of(prompt, window)
    assert part.point_coords.tolist() == [[10, 10], [20, 20]]
    assert part.point_labels.tolist() == [1, 0]
    assert part.box.tolist() == [0, 0, 30, 20]
    negative = Prompt(coords[2:], np.array([0]))
    assert _part_of(negative, window) is None
    assert _part_of(Prompt(box=np.array([0, 0, 9, 9], np.float32)), window) is None


def test_a_window_is_answered_as_the_cut_out_image_would_be():
    predictor = Predictor(build_model("tiny", seed=0))
    image = np.random.default_rng(0).integers(0, 256, (200, 900, 3), dtype=np.uint8)
    prompt = Prompt(np.array([[450, 100]], np.float32), np.array([1]))
    mask = predictor.predict_in_tiles(image, prompt, 200)
    (window,) = _windows_around(prompt, image, 200)
    predictor.set_image(np.ascontiguousarray(image[window.slices]))
    alone = predictor.predict(_part_of(prompt, window)).best
    assert mask.shape == image.shape[:2]
    assert np.array_equal(mask[window.slices], alone)
    mask[window.slices] = False
    assert not mask.any()
