"""IoU and Dice by counting, boundary IoU by its definition, means, intervals of images."""

import numpy as np
import pytest

from samray.evaluation.metrics import Score, boundary_iou, interval_by, iou_and_dice, mean_by


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


def score(image: str, iou: float, strategy: str = "center", label: str = "cat") -> Score:
    dice = min(1.0, 2 * iou / (1 + iou))
    return Score(image, image, 0, label, strategy, iou, dice, iou, 0.5, 900, 30.0)


@pytest.mark.parametrize(
    ("mask", "gt_mask", "iou", "dice"),
    [
        ("##.. ##..", ".##. .##.", 2 / 6, 2 * 2 / 8),
        ("##.. ##..", "##.. ##..", 1, 1),
        ("##.. ##..", "..## ..##", 0, 0),
        ("#### ####", "#... ....", 1 / 8, 2 / 9),
        (".... ....", "#... ....", 0, 0),
        ("#... ....", ".... ....", 0, 0),
        (".... ....", ".... ....", 1, 1),
    ],
)
def test_iou_and_dice_by_hand(mask: str, gt_mask: str, iou: float, dice: float) -> None:
    assert iou_and_dice(picture(mask), picture(gt_mask)) == pytest.approx((iou, dice))


def test_means_by_hand_for_each_strategy_and_label() -> None:
    scores = [
        score("a", 0.2, "center", "cat"),
        score("a", 0.4, "center", "dog"),
        score("b", 0.9, "center", "dog"),
        score("b", 0.7, "bbox", "cat"),
    ]
    assert mean_by(scores, "strategy", "iou") == pytest.approx({"bbox": 0.7, "center": 0.5})
    assert mean_by(scores, "label", "iou") == pytest.approx({"cat": 0.45, "dog": 0.65})
    assert mean_by(scores[:1], "label", "dice") == pytest.approx({"cat": 0.4 / 1.2})
    assert mean_by([], "label", "iou") == {}


def clustered(seed: int = 0, instances: int = 25) -> list[Score]:
    """12 images; scores are nearly equal within an image and differ between images."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0.2, 0.9, 12)
    return [
        score(f"image {number}", float(level + rng.normal(0, 0.01)))
        for number, level in enumerate(levels)
        for _ in range(instances)
    ]


def test_interval_resamples_images_and_not_instances() -> None:
    scores = clustered()
    low, high = interval_by(scores, "strategy", "iou")["center"]
    values = np.array([s.iou for s in scores])
    naive = 2 * 1.96 * values.std() / np.sqrt(len(values))
    expected = 2 * 1.96 * values.std() / np.sqrt(12)
    assert high - low > 3 * naive
    assert high - low == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_interval_contains_the_mean(seed: int) -> None:
    scores = clustered(seed)
    low, high = interval_by(scores, "strategy", "iou")["center"]
    assert low < mean_by(scores, "strategy", "iou")["center"] < high


def test_interval_is_of_the_mean_over_instances_if_images_have_unequal_numbers() -> None:
    scores = [score("many", 0.9)] * 99 + [score("few", 0.1)]
    low, high = interval_by(scores, "strategy", "iou")["center"]
    assert (low, high) == pytest.approx((0.1, 0.9))  # a quarter each draws one image twice
    middle = [score(f"many {n}", 0.9) for n in range(30) for _ in range(9)]
    middle += [score(f"few {n}", 0.1) for n in range(30)]
    low, high = interval_by(middle, "strategy", "iou")["center"]
    assert low < 0.82 < high  # and not 0.5, the mean over images
    assert low > 0.6


def test_interval_depends_on_the_seed_alone() -> None:
    scores = clustered()
    assert interval_by(scores, "strategy", "iou", seed=1) == interval_by(
        scores, "strategy", "iou", seed=1
    )
    assert interval_by(scores, "strategy", "iou", seed=1) != interval_by(
        scores, "strategy", "iou", seed=2
    )


def test_interval_of_each_group_and_value() -> None:
    scores = [score("a", 0.5, "center"), score("b", 0.5, "center"), score("a", 1.0, "bbox")]
    intervals = interval_by(scores, "strategy", "dice")
    assert intervals["center"] == pytest.approx((2 / 3, 2 / 3))
    assert intervals["bbox"] == (1, 1)
    assert list(intervals) == ["bbox", "center"]


def test_pixels_outside_the_frame_count_as_missed():
    mask, gt_mask = picture("##. .#."), picture("##. ##.")
    assert iou_and_dice(mask, gt_mask, area_outside=4) == (3 / 8, 6 / 11)


def plain_boundary_iou(mask, gt_mask):
    """Cheng et al., 2021, word by word: pixels of a mask at most d from one outside of it."""
    height, width = mask.shape
    distance = max(1, round(0.02 * np.sqrt(height**2 + width**2)))
    bands = []
    for whole in (mask, gt_mask):
        around = np.pad(whole, distance)  # what lies beyond the image is outside of the mask
        band = np.zeros_like(whole)
        for y, x in zip(*np.nonzero(whole), strict=True):
            band[y, x] = not around[y : y + 2 * distance + 1, x : x + 2 * distance + 1].all()
        bands.append(band)
    return (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()


def disc(size, y, x, radius):
    rows, columns = np.indices(size)
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


@pytest.mark.parametrize("order", ["C", "F"])  # decoded masks are stored column by column
@pytest.mark.parametrize(
    ("mask", "gt_mask"),
    [
        (disc((90, 120), 40, 60, 30), disc((90, 120), 42, 61, 30)),
        (disc((90, 120), 0, 0, 40), disc((90, 120), 3, 0, 40)),  # cut by the image's corner
        (disc((90, 120), 40, 60, 30), disc((90, 120), 40, 60, 12)),
        (disc((300, 400), 150, 200, 60) ^ disc((300, 400), 150, 200, 30),
         disc((300, 400), 150, 204, 60)),  # a ring
        (disc((90, 120), 20, 20, 2), disc((90, 120), 21, 20, 2)),  # all band
        (np.ones((60, 60), bool), disc((60, 60), 30, 30, 28)),
        (disc((20, 20), 5, 5, 3), disc((20, 20), 15, 15, 3)),
    ],
)  # fmt: skip
def test_boundary_iou_is_that_of_the_definition(mask, gt_mask, order):
    expected = plain_boundary_iou(mask, gt_mask)
    found = boundary_iou(np.asarray(mask, order=order), np.asarray(gt_mask, order=order))
    assert found == pytest.approx(expected)
    assert boundary_iou(gt_mask, mask) == pytest.approx(expected)


def test_boundary_iou_sees_a_wrong_outline_that_iou_forgives():
    large, larger = disc((400, 400), 200, 200, 150), disc((400, 400), 200, 200, 158)
    assert iou_and_dice(larger, large)[0] > 0.9
    assert boundary_iou(larger, large) < 0.4


def test_boundary_iou_of_empty_masks():
    empty, some = np.zeros((9, 9), bool), disc((9, 9), 4, 4, 3)
    assert boundary_iou(empty, empty) == 1
    assert boundary_iou(some, empty) == boundary_iou(empty, some) == 0
