"""Figures about a model's scores, and about their change from base to tuned."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from samray.evaluation.metrics import (
    MODEL_SIZES,
    SIZES,
    Score,
    bootstrap_interval,
    interval_by,
    mean_by,
    verdict,
)
from samray.instances.metrics import ImageObjects, segmentation_accuracy

VALUES = ("iou", "dice", "boundary_iou")
NUM_BINS = 10


def summary(scores: list[Score]) -> dict[str, Any]:
    """Return the prompt matrix of a model, with 95 % intervals from resampled images.

    `iou`, `dice` and `boundary_iou` per strategy and per label (over all strategies),
    `iou_by_label` per label and strategy, `iou_by_size` and `iou_by_model_size` (`_by_size`), and
    `miou`, the mean over all scores; `calibration`, see there.
    """
    labels = sorted({score.label for score in scores})
    return {
        **{
            value: {key: mean_by(scores, key, value) for key in ("strategy", "label")}
            for value in VALUES
        },
        "iou_ci95": {key: interval_by(scores, key, "iou") for key in ("strategy", "label")},
        "iou_by_label": {
            label: mean_by([s for s in scores if s.label == label], "strategy", "iou")
            for label in labels
        },
        "iou_by_size": _by_size(scores, "size", SIZES),
        "iou_by_model_size": _by_size(scores, "model_size", MODEL_SIZES),
        "miou": float(np.mean([s.iou for s in scores])),
        "calibration": calibration(scores),
        "miou_ci95": bootstrap_interval([s.source for s in scores], [s.iou for s in scores]),
    }


def _by_size(scores: list[Score], key: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Return for each size with an object: `count` of objects, `iou`, its `ci95`, `strategy`.

    `iou` is the mean over the prompt matrix, `strategy` has that of each of its rows.
    """
    means, intervals = mean_by(scores, key, "iou"), interval_by(scores, key, "iou")
    found = {}
    for name in names:
        some = [score for score in scores if getattr(score, key) == name]
        if some:
            found[name] = {
                "count": len({(score.image, score.instance) for score in some}),
                "iou": means[name],
                "ci95": intervals[name],
                "strategy": mean_by(some, "strategy", "iou"),
            }
    return found


def calibration(scores: list[Score]) -> dict[str, Any]:
    """Return how well the predicted IoU tells the true one, over all instances and prompts.

    Returns:
        `mean_absolute_error`; `bias`, the mean of predicted minus true, above 0 if the model thinks
        too well of its masks; `bins`, NUM_BINS of equal width over the predicted IoU, which is
        limited to 0..1 for this: `low`, `high`, `count`, and the means `predicted` and `true`, null
        without a score.
    """
    predicted = np.array([score.predicted_iou for score in scores])
    true = np.array([score.iou for score in scores])
    places = np.clip(predicted * NUM_BINS, 0, NUM_BINS - 1).astype(int)
    bins = []
    for place in range(NUM_BINS):
        inside = places == place
        means = [float(v[inside].mean()) if inside.any() else None for v in (predicted, true)]
        bins.append(
            {
                "low": place / NUM_BINS,
                "high": (place + 1) / NUM_BINS,
                "count": int(inside.sum()),
                "predicted": means[0],
                "true": means[1],
            }
        )
    return {
        "mean_absolute_error": float(np.abs(predicted - true).mean()),
        "bias": float((predicted - true).mean()),
        "bins": bins,
    }


def objects_change(
    sources: Sequence[str], base: Sequence[ImageObjects], tuned: Sequence[ImageObjects]
) -> dict[str, Any]:
    """Return the change of the mean segmentation accuracy of all objects from base to tuned.

    Args:
        sources: photo of each image.
        base, tuned: of the same images, in the same order.

    Returns:
        `msa`, `ci95` and `verdict`, paired by image; see `changes`.
    """
    before, after = (
        [float(np.mean(segmentation_accuracy(image.ious()))) for image in images]
        for images in (base, tuned)
    )
    differences = [b - a for a, b in zip(before, after, strict=True)]
    interval = bootstrap_interval(sources, differences)
    return {
        "msa": float(np.mean(differences)),
        "ci95": interval,
        "verdict": verdict(interval, sources),
    }


def changes(base: list[Score], tuned: list[Score]) -> dict[str, Any]:
    """Return the change of IoU from base to tuned, per strategy, label and size.

    The scores are paired: the interval is that of the differences, which is much narrower than the
    intervals of two means suggest.

    Args:
        base, tuned: scores of the same instances and prompts, in the same order.

    Returns:
        For `strategy`, `label`, `size` and `model_size`, by name: `iou`, the mean difference;
        `ci95`, its bootstrap interval over images; `verdict`: better or worse if the interval
        excludes 0, else "no difference shown"; "too few images" below MIN_IMAGES.
    """
    paired = [
        replace(after, iou=after.iou - before.iou)
        for before, after in zip(base, tuned, strict=True)
    ]
    found = {}
    for key in ("strategy", "label", "size", "model_size"):
        means, intervals = mean_by(paired, key, "iou"), interval_by(paired, key, "iou")
        sources: dict[str, set[str]] = defaultdict(set)
        for score in paired:
            sources[getattr(score, key)].add(score.source)
        found[key] = {
            name: {
                "iou": mean,
                "ci95": intervals[name],
                "verdict": verdict(intervals[name], sources[name]),
            }
            for name, mean in means.items()
        }
    return found
