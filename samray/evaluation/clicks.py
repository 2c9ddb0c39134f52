"""Clicks that an object needs until its mask is good enough, as interactive segmentation counts.

The first click is the object's centre, each further one the centre of the largest error, and an
object that never reaches the wanted IoU counts as MAX_CLICKS (NoC@85 and NoC@90: Sofiiuk et al.,
"Reviving Iterative Training with Mask Guidance for Interactive Segmentation", 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from samray.data.dataset import ImageRecord
from samray.evaluation.metrics import bootstrap_interval, iou_and_dice, verdict
from samray.evaluation.scoring import click_through
from samray.geometry.prompts import draw_prompt
from samray.sam.decode import prompt_chunks

MAX_CLICKS = 20
TARGETS = (85, 90)  # IoU in percent


@dataclass(frozen=True)
class ClickCount:
    """Clicks that one object took.

    Attributes:
        image, source, instance: as in `Score`.
        ious: after each click, up to the first that reaches the highest of TARGETS. Of an object
            that its tile cuts, the part in the tile counts alone: no click can reach the rest.
    """

    image: str
    source: str
    instance: int
    ious: tuple[float, ...]

    def clicks_to(self, target: int) -> int | None:
        """Return the number of clicks to an IoU of `target` percent; None if it is not reached."""
        reached = (n for n, iou in enumerate(self.ious, start=1) if iou >= target / 100)
        return next(reached, None)


def choose_objects(
    records: Sequence[ImageRecord], number: int, seed: int
) -> dict[str, tuple[int, ...]]:
    """Draw objects to click on: image -> places of its chosen instances, in order.

    Args:
        number: of objects; with fewer objects in the records, all are chosen.
    """
    ends = np.cumsum([record.num_instances for record in records], dtype=int)
    order = np.random.default_rng(seed).permutation(ends[-1] if len(ends) else 0)[:number]
    chosen: dict[str, tuple[int, ...]] = {}
    for index in np.sort(order).tolist():  # of all objects, in the order of the records
        image = int(np.searchsorted(ends, index, side="right"))
        first = int(ends[image - 1]) if image else 0
        name = records[image].name
        chosen[name] = (*chosen.get(name, ()), index - first)
    return chosen


def count_clicks(
    sam: Any, image_embedding: torch.Tensor, record: ImageRecord, places: Sequence[int]
) -> list[ClickCount]:
    """Click on some objects of an image, up to MAX_CLICKS times each.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        places: of the instances in the record.
    """
    rng = np.random.default_rng(0)  # the centre is not drawn
    enough = max(TARGETS) / 100
    counts = []
    for chunk in prompt_chunks(len(places), record.size):  # all masks may not fit the memory
        some = [places[number] for number in chunk]
        gt_masks = [record.decode(record.instances[place]) for place in some]
        first = [draw_prompt("center", mask, 1, rng) for mask in gt_masks]
        clicked = click_through(sam, image_embedding, gt_masks, first, MAX_CLICKS, enough)
        for place, gt_mask, answers in zip(some, gt_masks, clicked, strict=True):
            ious: list[float] = []
            for mask, _ in answers:
                ious.append(iou_and_dice(mask, gt_mask)[0])
                if ious[-1] >= enough:
                    break
            counts.append(ClickCount(record.name, record.source, place, tuple(ious)))
    return counts


def clicks_summary(counts: Sequence[ClickCount]) -> dict[str, Any]:
    """Return for each of TARGETS the mean number of clicks and the share that failed.

    Returns:
        By target, as text: `mean`, a failed object counted as MAX_CLICKS; `ci95`, its bootstrap
        interval over images; `failed`, the share of objects that need more than MAX_CLICKS. And
        `num_objects`.
    """
    sources = [count.source for count in counts]
    found: dict[str, Any] = {"num_objects": len(counts)}
    for target in TARGETS:
        clicks = _clicks(counts, target)
        found[str(target)] = {
            "mean": float(np.mean(clicks)),
            "ci95": bootstrap_interval(sources, clicks),
            "failed": sum(count.clicks_to(target) is None for count in counts) / len(counts),
        }
    return found


def clicks_change(base: Sequence[ClickCount], tuned: Sequence[ClickCount]) -> dict[str, Any]:
    """Return the paired change of the clicks on the same objects, by target; fewer is better."""
    sources = [count.source for count in base]
    found = {}
    for target in TARGETS:
        before, after = _clicks(base, target), _clicks(tuned, target)
        change = [a - b for b, a in zip(before, after, strict=True)]
        low, high = bootstrap_interval(sources, change)
        found[str(target)] = {
            "mean": float(np.mean(change)),
            "ci95": (low, high),
            "verdict": verdict((-high, -low), sources),
        }
    return found


def _clicks(counts: Sequence[ClickCount], target: int) -> list[float]:
    return [float(count.clicks_to(target) or MAX_CLICKS) for count in counts]
