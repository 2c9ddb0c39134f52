"""IoU and Dice at original resolution, means, and confidence intervals that resample images."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Score:
    """Score of one instance with one prompt strategy.

    Attributes:
        image: name of the instance's record.
        source: name of the image that the record is, or is a tile of.
        instance: index in the record.
        label: class of the instance.
        strategy: a row of the prompt matrix: center, random, bbox or clicks.
        iou, dice: at original resolution, 0..1.
        predicted_iou: the model's own estimate of `iou`.
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
        area_outside: pixels of the true object outside the frame, counted as missed.
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
    scores: Sequence[Score], key: str, value: str, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the `bootstrap_interval` of each mean of `mean_by`."""
    groups: dict[str, tuple[list[str], list[float]]] = defaultdict(lambda: ([], []))
    for score in scores:
        sources, values = groups[getattr(score, key)]
        sources.append(score.source)
        values.append(getattr(score, value))
    return {
        name: bootstrap_interval(sources, values, seed)
        for name, (sources, values) in sorted(groups.items())
    }


def bootstrap_interval(
    sources: Sequence[str], values: Sequence[float], seed: int = 0, num_resamples: int = 1000
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of values.

    Images are resampled and not instances: instances of one image resemble each other, so
    resampling them would give too narrow an interval.

    Args:
        sources: image of each value.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for source, value in zip(sources, values, strict=True):
        sums[source][0] += value
        sums[source][1] += 1
    totals = np.array(list(sums.values()))  # images x (sum, count)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(totals), size=(num_resamples, len(totals)))
    resampled = totals[chosen].sum(axis=1)
    low, high = np.percentile(resampled[:, 0] / resampled[:, 1], [2.5, 97.5])
    return float(low), float(high)
