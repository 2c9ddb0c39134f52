"""IoU, Dice and boundary IoU at original resolution, means, and intervals that resample images."""

import bisect
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

# Width of the band at a mask's edge, as a share of the image's diagonal; as published.
BAND_RATIO = 0.02

MIN_IMAGES = 5  # for an interval from resampled images

# COCO's sizes, by area in pixels; and the side of an object as the model sees it.
SIZES, SIZE_BOUNDS = ("small", "medium", "large"), (32**2, 96**2)
MODEL_SIZES, MODEL_SIZE_BOUNDS = ("below 8", "8 to 16", "16 to 64", "above 64"), (8, 16, 64)


@dataclass(frozen=True)
class Score:
    """Score of one instance with one prompt strategy.

    Attributes:
        image: name of the instance's record.
        source: name of the image that the record is, or is a tile of.
        instance: index in the record.
        label: class of the instance.
        strategy: a row of the prompt matrix: center, random, bbox or clicks.
        iou, dice, boundary_iou: at original resolution, 0..1.
        predicted_iou: the model's own estimate of `iou`.
        area: of the true object, in pixels of the image, with those outside its tile.
        model_side: square root of the area, in pixels of the model's input.
    """

    image: str
    source: str
    instance: int
    label: str
    strategy: str
    iou: float
    dice: float
    boundary_iou: float
    predicted_iou: float
    area: int
    model_side: float

    @property
    def size(self) -> str:
        """COCO's name for the object's size."""
        return SIZES[bisect.bisect_right(SIZE_BOUNDS, self.area)]

    @property
    def model_size(self) -> str:
        """Range of the object's side as the model sees it, in pixels."""
        return MODEL_SIZES[bisect.bisect_right(MODEL_SIZE_BOUNDS, self.model_side)]


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


def boundary_iou(mask: np.ndarray, gt_mask: np.ndarray) -> float:
    """Return the IoU of two masks within a band at their edges; 1 when both are empty.

    Unlike IoU it does not forgive a wrong outline of a large object (Cheng et al., "Boundary IoU:
    Improving Object-Centric Image Segmentation Evaluation", 2021). The band is the part of a mask
    that an erosion by BAND_RATIO of the image's diagonal removes, at least one pixel; the image's
    border counts as an edge. An object smaller than the band is all band.

    Args:
        mask, gt_mask: H x W bool; only their joint box is looked at.
    """
    rows, columns = (
        np.flatnonzero(mask.any(axis=axis) | gt_mask.any(axis=axis)) for axis in (1, 0)
    )
    if len(rows) == 0:
        return 1.0
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    width = max(1, round(BAND_RATIO * float(np.hypot(*mask.shape))))
    band, gt_band = (_edge_band(whole[box], width) for whole in (mask, gt_mask))
    return np.count_nonzero(band & gt_band) / np.count_nonzero(band | gt_band)


def _edge_band(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask at most `width` from one outside it; beyond the array all are outside."""
    # OpenCV takes what lies beyond an array for inside, hence the empty pixels around it.
    padded = np.pad(mask.astype(np.uint8), 1)
    inner = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    band: np.ndarray = mask & (inner == 0)
    return band


def mean_by(scores: Sequence[Score], key: str, value: str) -> dict[str, float]:
    """Return the mean of `value`, such as iou, over the instances of each strategy or label."""
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


def verdict(interval: tuple[float, float], sources: Iterable[str]) -> str:
    """Return a change in words, from its interval; more is better.

    Args:
        sources: images of the scores that changed. An interval from resampled images says nothing
            about one image, which is drawn every time, and little about fewer than MIN_IMAGES.
    """
    low, high = interval
    if len(set(sources)) < MIN_IMAGES:
        return "too few images"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "no difference shown"
