"""Which way from maps to objects is better, and with which thresholds: searched on the val split.

One setting after the other, each at the value that gives the highest mean segmentation accuracy; a
grid over all of them would take hundreds of times as long for little more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from samray.geometry.masks import CroppedMask, encode_rle, mask_ious
from samray.instances.metrics import outside_region, segmentation_accuracy
from samray.instances.segment import (
    KINDS,
    FoundObject,
    ImageMaps,
    Way,
    ask,
    find_objects,
    flood,
    objects_of_answers,
)

# Evenly from the val split; more would add minutes and decide the same.
MAX_IMAGES, MAX_OBJECTS = 24, 3000
# Below, a decoder that has not learned yet finds dozens of false objects for each true one, and to
# prompt for all of them would take many minutes.
MIN_ACCURACY = 0.02
# For a setting to change. Several small gains add up: with 0.01, test images of nuclei lost 0.025
# and 0.04 at IoU 0.5, and no other set gained (docs/measurements.md).
MIN_GAIN = 0.003
FLOODING: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("boundary", (0.3, 0.4, 0.5, 0.6, 0.7)),
    ("foreground", (0.3, 0.4, 0.5, 0.6, 0.7)),
    ("center", (0.3, 0.5, 0.7, 1.1)),
    ("min_area", (4.0, 16.0, 64.0)),
    ("boundary", (0.3, 0.4, 0.5, 0.6, 0.7)),
)
ASKING: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("min_score", (0.0, 0.2, 0.4, 0.6)),
    ("max_iou", (0.3, 0.5, 0.7)),
)


@dataclass(frozen=True)
class Example:
    """One annotated image with the decoder's maps.

    Attributes:
        maps: of the image.
        embedding: C x h x w float32.
        truth: compressed COCO counts of the objects.
        size: (H, W) of the image.
        ignored: of the region in which not every object is annotated; None: there is none.
    """

    maps: ImageMaps
    embedding: Tensor
    truth: tuple[bytes, ...]
    size: tuple[int, int]
    ignored: bytes | None = None


def choose_way(sam: Any, examples: Sequence[Example]) -> tuple[Way, dict[str, float]]:
    """Return the best way on some images, and the mean segmentation accuracy of each kind tried.

    Args:
        sam: the model that made the embeddings.
        examples: at least one.
    """
    seen: dict[Way, float] = {}
    answers: dict[Way, list[list[tuple[CroppedMask, float]]]] = {}

    def asked_once(way: Way) -> list[list[FoundObject]]:
        """Objects by prompts; ASKING's settings choose among answers, and need no new ones."""
        same = replace(way, max_iou=1.0, min_score=0.0)
        if same not in answers:
            answers[same] = [
                ask(sam, e.maps, e.embedding, flood(e.maps, way), way.kind) for e in examples
            ]
        return [
            objects_of_answers(given, example.maps, way)
            for given, example in zip(answers[same], examples, strict=True)
        ]

    def score(way: Way) -> float:
        if way not in seen:
            found = None if way.kind == "watershed" else asked_once(way)
            seen[way] = mean_accuracy(sam, examples, way, found)
        return seen[way]

    if score(Way()) < MIN_ACCURACY:
        return Way(), {"watershed": score(Way())}
    best = _descend(Way(), FLOODING, score)
    kinds: dict[str, float] = {kind: score(replace(best, kind=kind)) for kind in KINDS}
    asked = max((replace(best, kind=kind) for kind in KINDS if kind != "watershed"), key=score)
    asked = _descend(asked, ASKING, score)
    kinds[asked.kind] = score(asked)
    return max((best, asked), key=score), kinds


def some_images(numbers: Sequence[int]) -> list[int]:
    """Return places of images to choose on, by their numbers of objects: evenly, at least one."""
    most = min(len(numbers), MAX_IMAGES)
    while most > 1 and sum(numbers[place] for place in evenly(len(numbers), most)) > MAX_OBJECTS:
        most -= 1
    return evenly(len(numbers), most)


def evenly(count: int, most: int) -> list[int]:
    """Return at most so many places of 0 .. count - 1, evenly spread."""
    if count <= most:
        return list(range(count))
    return [number * count // most for number in range(most)]


def mean_accuracy(
    sam: Any,
    examples: Sequence[Example],
    way: Way,
    objects: Sequence[list[FoundObject]] | None = None,
) -> float:
    """Mean segmentation accuracy of a way over images; see `outside_region`.

    Args:
        objects: that the way finds in each; None: they are searched for.
    """
    total = 0.0
    for number, example in enumerate(examples):
        if objects is not None:
            found = objects[number]
        else:
            found = find_objects(sam, example.maps, example.embedding, way)
        rles = [encode_rle(one.mask, example.size) for one in found]
        judged = outside_region(rles, example.ignored, example.size)
        rles = [rles[place] for place in judged]
        values = segmentation_accuracy(mask_ious(rles, example.truth, example.size))
        total += sum(values) / len(values)
    return total / len(examples)


def _descend(
    way: Way, plan: tuple[tuple[str, tuple[float, ...]], ...], score: Callable[[Way], float]
) -> Way:
    """Change one setting after the other to its best value, where that is worth MIN_GAIN."""
    for name, values in plan:
        changes: list[dict[str, Any]] = [{name: value} for value in values]
        best = max((replace(way, **change) for change in changes), key=score)
        if score(best) > score(way) + MIN_GAIN:
            way = best
    return way
