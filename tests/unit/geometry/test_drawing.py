"""Pictures: drawn where the mask and the prompt are, over a copy of the image."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from samray.geometry.drawing import (
    BACKGROUND,
    BOX,
    COLORS,
    FOREGROUND,
    draw_masks,
    draw_prompt_marks,
    encode_picture,
    shrink,
)
from samray.geometry.masks import crop_mask
from samray.geometry.prompts import Prompt

SIZE = (90, 120)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(SIZE, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return (before != after).any(axis=2)


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=by) > 0


def prompt(*points: tuple[float, float], labels: list[int] | None = None) -> Prompt:
    return Prompt(
        np.array(points, np.float32), np.array(labels or [1] * len(points), dtype=np.int64)
    )


def test_pixels_of_the_mask_change_and_others_do_not(image: np.ndarray) -> None:
    mask = rectangle(70, 10, 100, 30)
    difference = changed(image, draw_masks(image, [mask]))
    assert difference[mask].mean() > 0.99
    assert not difference[~grown(mask, 2)].any()  # 2 pixels for the outline


def test_inside_is_a_blend_and_still_shows_the_image(image: np.ndarray) -> None:
    picture = draw_masks(image, [rectangle(70, 10, 100, 30)], [(200, 100, 0)])
    expected = 0.55 * image[20, 85] + 0.45 * np.array([200, 100, 0])
    assert np.abs(picture[20, 85] - expected).max() <= 1
    assert np.abs(picture[10, 85] - np.array([200, 100, 0])).max() < 10  # the outline


def test_image_itself_is_not_modified(image: np.ndarray) -> None:
    before = image.copy()
    image.flags.writeable = False  # decoded images are read-only, too
    picture = draw_masks(image, [rectangle(0, 0, 50, 50)])
    assert picture.flags.writeable
    assert np.array_equal(image, before)


def test_each_mask_has_a_colour_of_its_own_and_many_cycle(image: np.ndarray) -> None:
    black = np.zeros_like(image)
    masks = [rectangle(10 * n, 0, 10 * n + 8, 20) for n in range(len(COLORS) + 1)]
    picture = draw_masks(black, masks)
    shown = [tuple(picture[10, 10 * n + 4]) for n in range(len(masks))]
    assert len(set(shown[:-1])) == len(COLORS)
    assert shown[-1] == shown[0]


def test_outline_of_a_hole_is_drawn_and_its_inside_stays(image: np.ndarray) -> None:
    mask = rectangle(20, 20, 80, 80) & ~rectangle(35, 35, 65, 65)
    picture = draw_masks(image, [mask], [(200, 100, 0)])
    assert not changed(image, picture)[40:60, 40:60].any()
    for x, y in ((50, 20), (50, 79), (50, 34), (65, 50)):  # outside and around the hole
        assert np.abs(picture[y, x] - np.array([200, 100, 0])).max() < 20


def test_crops_are_drawn_as_whole_masks_are(image: np.ndarray) -> None:
    ring = rectangle(20, 20, 80, 80) & ~rectangle(35, 35, 65, 65)
    masks = [ring, rectangle(0, 0, 5, SIZE[0]), rectangle(50, 50, SIZE[1], SIZE[0])]
    crops = [crop_mask(mask) for mask in masks]
    assert np.array_equal(draw_masks(image, crops), draw_masks(image, masks))


@pytest.mark.parametrize("masks", [[], [np.zeros(SIZE, bool)]])
def test_nothing_to_draw_draws_nothing(image: np.ndarray, masks: list[np.ndarray]) -> None:
    assert np.array_equal(draw_masks(image, masks), image)


@pytest.mark.parametrize("point", [(100, 20), (20, 70), (99.6, 20.4)])
def test_prompt_mark_lands_on_x_y(image: np.ndarray, point: tuple[float, float]) -> None:
    picture = draw_prompt_marks(image.copy(), prompt(point))
    x, y = round(point[0]), round(point[1])
    assert tuple(picture[y, x]) == FOREGROUND
    rows, columns = np.nonzero(changed(image, picture))
    assert (columns.mean(), rows.mean()) == pytest.approx((x, y), abs=0.5)
    assert np.hypot(rows - y, columns - x).max() < 8


def test_background_points_have_another_colour(image: np.ndarray) -> None:
    picture = draw_prompt_marks(image, prompt((30, 20), (90, 70), labels=[0, 1]))
    assert tuple(picture[20, 30]) == BACKGROUND
    assert tuple(picture[70, 90]) == FOREGROUND
    assert picture is image  # in place, as its docstring says


def test_box_mark_is_a_frame_on_the_masks_own_border(image: np.ndarray) -> None:
    box = Prompt(box=np.array([30, 20, 100, 60], np.float32))
    picture = draw_prompt_marks(image.copy(), box)
    for x, y in ((30, 20), (99, 59), (30, 59), (99, 20), (60, 20), (30, 40)):
        assert tuple(picture[y, x]) == BOX
    rows, columns = np.nonzero(changed(image, picture))
    assert (columns.min() + columns.max(), rows.min() + rows.max()) == (30 + 99, 20 + 59)
    assert np.array_equal(picture[24:56, 34:96], image[24:56, 34:96])
    assert not changed(image, picture)[~grown(rectangle(30, 20, 100, 60), 2)].any()


def test_marks_beyond_the_border_are_clipped(image: np.ndarray) -> None:
    outside = draw_prompt_marks(image.copy(), prompt((-500, 40), (119, 89)))
    assert tuple(outside[89, 119]) == FOREGROUND
    draw_prompt_marks(image, Prompt(box=np.array([-9, -9, 500, 500], np.float32)))


def test_png_round_trips_exactly_in_colour_and_grey(image: np.ndarray) -> None:
    for picture in (image, image[:, :, 0]):
        raw = encode_picture(picture, ".png")
        assert raw.startswith(b"\x89PNG")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), picture)


def test_jpeg_round_trips_nearly_with_red_as_red() -> None:
    picture = np.full((*SIZE, 3), (200, 60, 20), np.uint8)
    raw = encode_picture(picture, ".jpg")
    assert raw.startswith(b"\xff\xd8")
    back = np.asarray(Image.open(io.BytesIO(raw))).astype(int)
    assert np.abs(back - picture).max() < 5


@pytest.mark.parametrize(
    ("longest_side", "expected"),
    [(60, (45, 60)), (120, SIZE), (500, SIZE), (1, (1, 1))],
)
def test_shrink_keeps_the_aspect_and_never_enlarges(
    image: np.ndarray, longest_side: int, expected: tuple[int, int]
) -> None:
    assert shrink(image, longest_side).shape == (*expected, 3)
