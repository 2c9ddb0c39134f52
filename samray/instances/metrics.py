"""How well all objects of an image are found, as the field measures it.

Mean segmentation accuracy: mean over IoU 0.5, 0.55 ... 0.95 of TP / (TP + FP + FN), of an image,
then over images (Caicedo et al. 2019, the Data Science Bowl of 2018).

Letters: N found objects, M true ones.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from samray.geometry.masks import mask_ious

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # of IoU
MAX_TABLE = 100 * 100  # IoUs of an image, above which AP is computed in parts
MAX_DETECTIONS = 65535  # COCO's 100 an image are fewer than there are cells in a picture


@dataclass(frozen=True)
class ImageObjects:
    """Found and true objects of one image.

    Attributes:
        size: (H, W).
        found, true: compressed COCO counts of the masks.
        found_labels, true_labels: of each.
        scores: of each found object; the higher the surer.
    """

    size: tuple[int, int]
    found: tuple[bytes, ...]
    found_labels: tuple[str, ...]
    scores: tuple[float, ...]
    true: tuple[bytes, ...]
    true_labels: tuple[str, ...]

    def ious(self) -> np.ndarray:
        """N x M float64."""
        return mask_ious(self.found, self.true, self.size)

    def of_label(self, label: str) -> "ImageObjects":
        """Return the objects of one label."""
        return self.only(
            [place for place, own in enumerate(self.found_labels) if own == label],
            [place for place, own in enumerate(self.true_labels) if own == label],
        )

    def only(self, found: Sequence[int], true: Sequence[int]) -> "ImageObjects":
        """Return the found and the true objects at some places."""
        return ImageObjects(
            self.size,
            tuple(self.found[place] for place in found),
            tuple(self.found_labels[place] for place in found),
            tuple(self.scores[place] for place in found),
            tuple(self.true[place] for place in true),
            tuple(self.true_labels[place] for place in true),
        )


@dataclass(frozen=True)
class _Matches:
    """What is kept of an image's table of IoUs, which may have millions of cells.

    Attributes:
        num_found, num_true: numbers of objects.
        pairs: (found, true, IoU) matched at IoU 0.5.
    """

    num_found: int
    num_true: int
    pairs: tuple[tuple[int, int, float], ...]

    @classmethod
    def of(cls, table: np.ndarray) -> "_Matches":
        """Match the objects of a table, N x M."""
        matched = match(table, THRESHOLDS[0])
        pairs = tuple((found, true, float(table[found, true])) for found, true in matched)
        return cls(table.shape[0], table.shape[1], pairs)


def match(ious: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Return the most pairs (found, true) whose IoU reaches a threshold; each object once.

    Among the ways to pair as many objects, that of the largest sum of IoU. Masks that do not
    overlap have only one way from 0.5 on, so thousands of objects take no longer than a look.
    """
    rows, columns = np.nonzero(ious >= threshold)
    alone = (np.bincount(rows)[rows] == 1) & (np.bincount(columns)[columns] == 1)
    pairs = list(zip(rows[alone].tolist(), columns[alone].tolist(), strict=True))
    if not alone.all():
        rows, columns = np.unique(rows[~alone]), np.unique(columns[~alone])
        some = ious[np.ix_(rows, columns)]
        worth = np.where(some >= threshold, 1 + some / (2 * min(some.shape)), 0)
        for r, c in zip(*linear_sum_assignment(-worth), strict=True):
            if worth[r, c]:
                pairs.append((int(rows[r]), int(columns[c])))
    return sorted(pairs)


def segmentation_accuracy(ious: np.ndarray) -> list[float]:
    """Return TP / (TP + FP + FN) of an image at each of THRESHOLDS; 1 if there is nothing at all.

    Args:
        ious: N x M.
    """
    num_found, num_true = ious.shape
    if num_found + num_true == 0:
        return [1.0] * len(THRESHOLDS)
    hits = [len(match(ious, threshold)) for threshold in THRESHOLDS]
    return [hit / (num_found + num_true - hit) for hit in hits]


def outside_region(rles: Sequence[bytes], region: bytes | None, size: tuple[int, int]) -> list[int]:
    """Return the places of the masks of which at most half lies in an ignored region.

    The others are no found objects: whether they are true or false, nobody knows (as COCO's
    evaluation does with crowds).

    Args:
        rles: compressed COCO counts of N masks.
        region: of the region, in which no true object lies; None: there is none.
        size: (H, W).
    """
    if region is None or not rles:
        return list(range(len(rles)))
    masks = [{"counts": counts, "size": list(size)} for counts in rles]
    # To a crowd, the IoU of pycocotools is the share of the mask's own area.
    shares = coco_mask.iou(masks, [{"counts": region, "size": list(size)}], [1])
    return [place for place, share in enumerate(shares[:, 0].tolist()) if share <= 0.5]


def merging(image: ImageObjects) -> set[int]:
    """Return the found objects that are several true ones in one: more than half of each's area."""
    found, true = (
        [{"counts": counts, "size": list(image.size)} for counts in masks]
        for masks in (image.found, image.true)
    )
    if not found or len(true) < 2:
        return set()
    # To a crowd, the IoU of pycocotools is the share of the mask's own area.
    shares = coco_mask.iou(true, found, [1] * len(found))
    return set(np.flatnonzero((shares > 0.5).sum(axis=0) > 1).tolist())


def image_accuracy(image: ImageObjects) -> float:
    """Return the mean segmentation accuracy of an image."""
    return float(np.mean(segmentation_accuracy(image.ious())))


def score_instances(images: Sequence[ImageObjects]) -> dict[str, Any]:
    """Return all measures over the images of a split.

    Returns:
        `msa`, mean segmentation accuracy; `sa50`, its value at IoU 0.5: means over images.
        `f1`, F1 at IoU 0.5; `pq`, panoptic quality; `count_error`, sum of the images' errors in
        the number of objects / true objects: over all objects. None of them looks at labels.
        `ap`, `ap50`: COCO's, means over the labels. `found`, `true`: numbers of objects. `empty`:
        of the images without a true object, their number `images`, and `found` in them.
        `labels`: for each label `true`, `found`, `f1`, `pq`, `ap`, `ap50`; an object of another
        label is no match. `confusion`: {true label: {found label: objects matched at IoU 0.5}}.
    """
    accuracies: list[list[float]] = []
    matches: list[_Matches] = []
    parts: list[ImageObjects] = []
    for image in images:  # one table at a time
        table = image.ious()
        accuracies.append(segmentation_accuracy(table))
        matches.append(_Matches.of(table))
        parts += _apart(image, table) if table.size > MAX_TABLE else [image]
    labels = sorted({label for image in images for label in image.true_labels + image.found_labels})
    precision = _average_precision(parts, labels)
    by_label = {}
    for label in labels:
        own = [_Matches.of(image.of_label(label).ious()) for image in images]
        by_label[label] = {**_counts(own), **precision[label]}
    return {
        "msa": float(np.mean(accuracies)),
        "sa50": float(np.mean([values[0] for values in accuracies])),
        **_counts(matches),
        "empty": {
            "images": sum(not one.num_true for one in matches),
            "found": sum(one.num_found for one in matches if not one.num_true),
        },
        "count_error": _ratio(
            sum(abs(one.num_found - one.num_true) for one in matches),
            sum(one.num_true for one in matches),
        ),
        "ap": _mean([values["ap"] for values in precision.values()]),
        "ap50": _mean([values["ap50"] for values in precision.values()]),
        "labels": by_label,
        "confusion": _confusion(images, matches),
    }


def _counts(matches: Sequence[_Matches]) -> dict[str, Any]:
    """Numbers of objects, F1 at 0.5 and panoptic quality (Kirillov et al. 2019)."""
    found = sum(one.num_found for one in matches)
    true = sum(one.num_true for one in matches)
    hits = [iou for one in matches for _, _, iou in one.pairs]
    return {
        "found": found,
        "true": true,
        "f1": _ratio(2 * len(hits), found + true),
        "pq": _ratio(2 * sum(hits), found + true),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [value for value in values if value is not None]
    return _ratio(sum(known), len(known))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _confusion(
    images: Sequence[ImageObjects], matches: Sequence[_Matches]
) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for image, one in zip(images, matches, strict=True):
        for found, true, _ in one.pairs:
            row = counts.setdefault(image.true_labels[true], {})
            row[image.found_labels[found]] = row.get(image.found_labels[found], 0) + 1
    return {true: dict(sorted(row.items())) for true, row in sorted(counts.items())}


def _apart(image: ImageObjects, table: np.ndarray) -> list[ImageObjects]:
    """Split an image's objects so that those that may match stay together.

    pycocotools compares each found object with each true one in Python: two minutes for 5,000. In
    AP an image matters by its matches alone, and those are the same in its parts.

    Args:
        table: IoUs, N x M.
    """
    count, num_found = sum(table.shape), table.shape[0]
    rows, columns = np.nonzero(table >= THRESHOLDS[0])
    links = coo_array((np.ones(len(rows)), (rows, num_found + columns)), shape=(count, count))
    number, group = connected_components(links, directed=False)
    members: list[tuple[list[int], list[int]]] = [([], []) for _ in range(number)]
    for place, own in enumerate(group.tolist()):
        is_true = place >= num_found
        members[own][is_true].append(place - num_found * is_true)
    matched = [image.only(found, true) for found, true in members if found and true]
    false = [place for found, true in members if not true for place in found]
    missed = [place for found, true in members if not found for place in true]
    return [*matched, image.only(false, []), image.only([], missed)]


def _average_precision(
    images: Sequence[ImageObjects], labels: list[str]
) -> dict[str, dict[str, float | None]]:
    """AP and AP50 of each label by pycocotools; None for a label without a true object."""
    there = {label for image in images for label in image.true_labels}
    result: dict[str, dict[str, float | None]] = {
        label: dict.fromkeys(("ap", "ap50"), 0.0 if label in there else None) for label in labels
    }
    if not there or not any(image.found for image in images):
        return result
    numbers = {label: number for number, label in enumerate(labels, start=1)}
    truth, answers = _coco_entries(images, numbers)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        reference = COCO()
        reference.dataset = {
            "info": {},
            "images": [
                {"id": place, "height": image.size[0], "width": image.size[1]}
                for place, image in enumerate(images)
            ],
            "categories": [{"id": number, "name": label} for label, number in numbers.items()],
            "annotations": truth,
        }
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(answers), "segm")
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # IoU x recall x label
    for label in there:
        own = precision[:, :, numbers[label] - 1]
        result[label] = {"ap": float(own.mean()), "ap50": float(own[0].mean())}
    return result


def _coco_entries(
    images: Sequence[ImageObjects], numbers: dict[str, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """True and found objects as COCO's annotations and results."""
    truth: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for place, image in enumerate(images):
        for counts, label in zip(image.true, image.true_labels, strict=True):
            mask = {"counts": counts, "size": list(image.size)}
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": place,
                    "category_id": numbers[label],
                    "segmentation": mask,
                    "area": float(coco_mask.area(mask)),
                    "iscrowd": 0,
                }
            )
        for counts, label, score in zip(image.found, image.found_labels, image.scores, strict=True):
            mask = {"counts": counts, "size": list(image.size)}
            answers.append(
                {
                    "image_id": place,
                    "category_id": numbers[label],
                    "segmentation": mask,
                    "score": score,
                }
            )
    return truth, answers
