"""IoU and Dice at original resolution, means, and confidence intervals over whole images."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """How one instance came out under one prompt strategy.

    Attributes:
        image: name of its record.
        source: name of the image that the record is, or is a tile of.
        instance: its place in the image.
        label: its class.
        strategy: center, random or bbox.
        iou, dice: at original resolution, 0..1.
        predicted_iou: what the model itself expected.
    """

    image: str
    source: str
    instance: int
    label: str
    strategy: str
    iou: float
    dice: float
    predicted_iou: float


def iou_and_dice(
    mask: np.ndarray, gt_mask: np.ndarray, area_outside: int = 0
) -> tuple[float, float]:
    """Return IoU and Dice of two H x W bool masks; both 1 when both are empty.

    Args:
        area_outside: pixels of the true object beyond the frame, which the answer lacks.
    """
    overlap = int(np.count_nonzero(mask & gt_mask))
    total = int(np.count_nonzero(mask)) + int(np.count_nonzero(gt_mask)) + area_outside
    if total == 0:
        return 1.0, 1.0
    return overlap / (total - overlap), 2 * overlap / total


def mean_by(scores: Sequence[Score], key: str, value: str) -> dict[str, float]:
    """Return the mean of `value` (iou or dice) over the instances of each strategy or label."""
    groups: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        groups[getattr(score, key)].append(getattr(score, value))
    return {name: float(np.mean(values)) for name, values in sorted(groups.items())}


def interval_by(
    scores: Sequence[Score], key: str, value: str, seed: int = 0, num_resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """Return 95 % bootstrap intervals of `mean_by`.

    Whole images are resampled: instances of one image resemble each other, so resampling
    instances would promise too narrow an interval.
    """
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for score in scores:
        total = sums[getattr(score, key)][score.source]
        total[0] += getattr(score, value)
        total[1] += 1
    rng = np.random.default_rng(seed)
    intervals = {}
    for name, by_image in sorted(sums.items()):
        totals = np.array(list(by_image.values()))  # images x (sum, count)
        chosen = rng.integers(len(totals), size=(num_resamples, len(totals)))
        resampled = totals[chosen].sum(axis=1)
        low, high = np.percentile(resampled[:, 0] / resampled[:, 1], [2.5, 97.5])
        intervals[name] = (float(low), float(high))
    return intervals
