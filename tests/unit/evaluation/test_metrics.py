"""IoU and Dice by counting, means by group, and intervals that resample images."""

import numpy as np
import pytest

from samray.evaluation.metrics import Score, interval_by, iou_and_dice, mean_by


def picture(text: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in text.split()])


def score(image: str, iou: float, strategy: str = "center", label: str = "cat") -> Score:
    return Score(image, image, 0, label, strategy, iou, min(1.0, 2 * iou / (1 + iou)), 0.5)


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
