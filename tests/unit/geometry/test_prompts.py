"""Prompts: in (x, y), on the object, from all of it, and reproducible by seed."""

import cv2
import numpy as np
import pytest

from samray.errors import EmptyMaskError
from samray.geometry.prompts import (
    MAX_BOX_NOISE,
    Prompt,
    center_point,
    draw_prompt,
    random_points,
    tight_box,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rectangle(size: tuple[int, int], x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[y1:y2, x1:x2] = True
    return mask


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.hypot(rows - y, columns - x) <= radius


RING = disc((101, 101), 50, 50, 40) & ~disc((101, 101), 50, 50, 20)
CRESCENT = disc((101, 101), 50, 50, 40) & ~disc((101, 101), 70, 50, 40)
AT_BORDER = rectangle((60, 80), 0, 20, 30, 60)  # touches the left and the bottom border
MASKS = {"ring": RING, "crescent": CRESCENT, "border": AT_BORDER}


def on(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    x, y = points.astype(int).T
    return mask[y, x]


def test_points_are_x_before_y() -> None:
    mask = rectangle((20, 90), 70, 4, 75, 9)  # (y, x) would lie outside the image
    assert center_point(mask).tolist() == [[72, 6]]
    points = random_points(mask, 25, rng())
    assert (points.min(axis=0).tolist(), points.max(axis=0).tolist()) == ([70, 4], [74, 8])
    assert tight_box(mask).tolist() == [70, 4, 75, 9]


@pytest.mark.parametrize("name", MASKS)
def test_center_lies_inside_where_the_centroid_may_not(name: str) -> None:
    mask = MASKS[name]
    assert on(mask, center_point(mask)).all()


def test_center_is_the_pixel_farthest_from_the_edge() -> None:
    x, y = center_point(RING)[0]
    assert np.hypot(x - 50, y - 50) == pytest.approx(30, abs=1)
    assert not on(RING, np.array([[50, 50]])).any()  # where its centroid is


def test_center_counts_the_border_of_the_frame_as_an_edge() -> None:
    x, y = center_point(AT_BORDER)[0]
    assert 14 <= x <= 15  # the middle of columns 0..29, not the border
    assert 34 <= y <= 45
    assert center_point(np.ones((9, 9), bool)).tolist() == [[4, 4]]


def test_center_is_the_same_pixel_wherever_the_mask_lies_in_memory() -> None:
    """OpenCV rates sometimes one, sometimes the other of its two innermost pixels as deeper."""
    mask = np.zeros((53, 84), np.uint8)
    cv2.ellipse(mask, (37, 26), (32, 22), 25, 0, 360, 1, -1)
    points = set()
    for size in rng().integers(1, 300_000, 200):
        occupied = np.empty(size, np.uint8)  # moves what is allocated next
        points.add(tuple(center_point(mask.astype(bool))[0]))
        del occupied
    assert len(points) == 1


def test_center_of_one_pixel_is_that_pixel() -> None:
    assert center_point(rectangle((9, 9), 8, 0, 9, 1)).tolist() == [[8, 0]]


def test_random_points_come_from_the_whole_mask_and_not_its_first_rows() -> None:
    points = random_points(RING, 20_000, rng())
    assert on(RING, points).all()
    x, y = points.T
    share = RING.sum() / 20_000
    assert np.abs([np.mean(x < 50) - 0.5, np.mean(y < 50) - 0.5]).max() < 0.02
    counts = np.zeros(RING.shape)
    np.add.at(counts, (y.astype(int), x.astype(int)), 1)
    # Chi squared over all pixels: mean n - 1, deviation sqrt(2 n).
    expected = 1 / share
    chi2 = ((counts[RING] - expected) ** 2 / expected).sum()
    assert abs(chi2 - (RING.sum() - 1)) < 4 * np.sqrt(2 * RING.sum())


def test_one_random_point_is_uniform_over_an_uneven_mask() -> None:
    """Drawing first a row and then a pixel in it would favour the thin part."""
    mask = rectangle((100, 100), 0, 0, 1, 50) | rectangle((100, 100), 0, 50, 9, 100)
    points = np.concatenate([random_points(mask, 1, rng(seed)) for seed in range(1000)])
    assert np.mean(points[:, 1] < 50) == pytest.approx(0.1, abs=0.03)


def test_random_points_differ_while_there_are_enough_pixels() -> None:
    mask = rectangle((9, 9), 2, 2, 5, 5)
    assert len(np.unique(random_points(mask, 9, rng()), axis=0)) == 9
    repeated = random_points(mask, 30, rng())
    assert len(repeated) == 30
    assert on(mask, repeated).all()


@pytest.mark.parametrize("name", MASKS)
def test_box_is_tight_and_ends_just_outside(name: str) -> None:
    mask = MASKS[name]
    x1, y1, x2, y2 = tight_box(mask).astype(int)
    assert mask[y1:y2, x1:x2].sum() == mask.sum()
    for edge in (mask[y1, :], mask[y2 - 1, :], mask[:, x1], mask[:, x2 - 1]):
        assert edge.any()
    assert tight_box(AT_BORDER).tolist() == [0, 20, 30, 60]


def test_box_noise_stays_within_twenty_pixels_and_inside_the_image() -> None:
    mask = rectangle((600, 800), 100, 100, 700, 590)
    boxes = np.array([tight_box(mask, rng(seed), 0.5) for seed in range(500)])
    moved = np.abs(boxes - [100, 100, 700, 590]).max(axis=0)
    assert (moved <= MAX_BOX_NOISE).all()
    assert (moved[:3] == 20).all()  # and reaches it
    assert boxes[:, 3].max() == 600
    assert boxes[:, 3].min() == 570


def test_box_noise_is_a_share_of_each_side_and_has_no_drift() -> None:
    mask = rectangle((400, 400), 100, 100, 200, 150)
    moves = np.array([tight_box(mask, rng(seed), 0.05) for seed in range(2000)])
    moves -= [100, 100, 200, 150]
    assert moves.std(axis=0) == pytest.approx([5, 2.5, 5, 2.5], rel=0.08)
    assert np.abs(moves.mean(axis=0)).max() < 0.5


@pytest.mark.parametrize("corner", [(0, 0), (39, 29)])
def test_noisy_box_of_one_pixel_in_a_corner_keeps_a_pixel(corner: tuple[int, int]) -> None:
    x, y = corner
    mask = rectangle((30, 40), x, y, x + 1, y + 1)
    for seed in range(200):
        x1, y1, x2, y2 = tight_box(mask, rng(seed), 0.5)
        assert 0 <= x1 <= x2 - 1 <= 39
        assert 0 <= y1 <= y2 - 1 <= 29


def test_box_prompt_is_a_box_and_never_its_corners_as_points() -> None:
    prompt = draw_prompt("bbox", AT_BORDER, 3, rng())
    assert prompt.point_coords is None
    assert prompt.point_labels is None
    assert prompt.box.tolist() == [0, 20, 30, 60]


@pytest.mark.parametrize("strategy", ["center", "random"])
@pytest.mark.parametrize("num_points", [1, 4])
def test_point_prompt_has_foreground_points_on_the_object(strategy: str, num_points: int) -> None:
    prompt = draw_prompt(strategy, CRESCENT, num_points, rng(), box_noise=0.1)
    assert prompt.box is None
    assert prompt.point_coords.shape == (num_points, 2)
    assert prompt.point_coords.dtype == np.float32
    assert prompt.point_labels.tolist() == [1] * num_points
    assert on(CRESCENT, prompt.point_coords).all()
    if strategy == "center":
        assert np.array_equal(prompt.point_coords[:1], center_point(CRESCENT))


def test_mixed_draws_all_three_about_equally_often() -> None:
    source = rng()
    drawn = [draw_prompt("mixed", RING, 1, source, 0.1) for _ in range(600)]
    center = center_point(RING)
    boxes = sum(prompt.box is not None for prompt in drawn)
    centers = sum(
        prompt.box is None and np.array_equal(prompt.point_coords, center) for prompt in drawn
    )
    assert 150 < boxes < 250
    assert 150 < centers < 250
    assert 150 < 600 - boxes - centers < 250


@pytest.mark.parametrize("strategy", ["center", "random", "bbox", "mixed"])
def test_empty_mask_is_an_error_and_no_point_at_the_origin(strategy: str) -> None:
    with pytest.raises(EmptyMaskError, match="40 x 30 pixels has none set"):
        draw_prompt(strategy, np.zeros((30, 40), bool), 1, rng())


@pytest.mark.parametrize("strategy", ["center", "random", "bbox"])
def test_a_crop_gives_the_prompt_of_its_image(strategy: str) -> None:
    mask = disc((90, 60), 20, 80, 15)  # cut by two borders of the image
    y, x = 60, 5
    frame = (-x, -y, 60 - x, 90 - y)
    whole = draw_prompt(strategy, mask, 2, rng(), 0.3)
    cropped = draw_prompt(strategy, mask[y:, x:40], 2, rng(), 0.3, frame=frame).moved(x, y)
    for expected, found in ((whole.point_coords, cropped.point_coords), (whole.box, cropped.box)):
        assert (found is None) == (expected is None)
        assert found is None or np.allclose(found, expected, atol=1e-4)


def test_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown strategy 'centre'"):
        draw_prompt("centre", RING, 1, rng())


def test_same_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    def draw(seed: int) -> list[list[float]]:
        source = rng(seed)
        drawn = [draw_prompt("mixed", RING, 2, source, 0.1) for _ in range(20)]
        return [(p.box if p.box is not None else p.point_coords).ravel().tolist() for p in drawn]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_center_with_one_point_draws_no_random_number() -> None:
    source = rng()
    draw_prompt("center", RING, 1, source)
    assert source.random() == rng().random()


def test_layout_distinguishes_prompts_that_must_not_be_decoded_together() -> None:
    def layout(strategy: str, num_points: int) -> tuple[int, bool]:
        return draw_prompt(strategy, RING, num_points, rng()).layout

    assert layout("center", 1) == layout("random", 1) == (1, False)
    assert layout("center", 3) == (3, False)
    assert layout("bbox", 3) == (0, True)
    both = Prompt(np.zeros((2, 2), np.float32), np.ones(2, np.int64), np.zeros(4, np.float32))
    assert both.layout == (2, True)
