"""All objects of an image, found against true: as figures, and drawn."""

from typing import Any

import cv2
import numpy as np
import torch

from samray.data.dataset import ImageRecord
from samray.geometry.masks import decode_rle, encode_rle
from samray.instances.metrics import THRESHOLDS, ImageObjects, match, merging, outside_region
from samray.instances.saved import InstanceModel
from samray.instances.segment import find_objects, maps_of

# Okabe and Ito's palette: true objects that were found, those that were missed; false ones, and
# among them those that are several true objects in one.
HIT, MISSED, FALSE, MERGED = (0, 158, 115), (86, 180, 233), (213, 94, 0), (240, 228, 66)


def compare_objects(
    sam: Any,
    model: InstanceModel,
    embedding: torch.Tensor,
    image: np.ndarray,
    record: ImageRecord,
) -> ImageObjects:
    """Find all objects of an image, and return them beside the true ones.

    What is found in the record's ignored region, with more than half of its area, is left out: it
    counts neither as true nor as false.

    Args:
        sam, model: on one device.
        embedding: C x h x w float32, by `sam`, on that device.
        image: H x W x 3 uint8 RGB.
    """
    found = find_objects(sam, maps_of(model.decoder, image, embedding), embedding, model.way)
    rles = [encode_rle(one.mask, record.size) for one in found]
    judged = outside_region(rles, record.ignored, record.size)
    found, rles = [found[place] for place in judged], [rles[place] for place in judged]
    return ImageObjects(
        size=record.size,
        found=tuple(rles),
        found_labels=tuple(model.labels[one.class_index] for one in found),
        scores=tuple(one.score for one in found),
        true=tuple(instance.rle for instance in record.instances),
        true_labels=tuple(instance.label for instance in record.instances),
    )


def draw_objects(
    image: np.ndarray, objects: ImageObjects, ignored: np.ndarray | None = None
) -> list[np.ndarray]:
    """Return two pictures: the true objects, found ones in HIT and the others in MISSED; and what
    was found, true ones in HIT, several in one in MERGED and the others in FALSE.

    Args:
        image: H x W x 3 uint8 RGB.
        ignored: H x W bool, the region in which not every object is annotated: shown in grey.
    """
    if ignored is not None:
        image = np.where(ignored[..., None], image // 4 + 96, image).astype(np.uint8)
    pairs = match(objects.ious(), THRESHOLDS[0])
    merged = dict.fromkeys(merging(objects), MERGED)
    panels = []
    for masks, colors, other in (
        (objects.true, {true: HIT for _, true in pairs}, MISSED),
        (objects.found, {**merged, **{found: HIT for found, _ in pairs}}, FALSE),
    ):
        picture = image.copy()
        line = max(1, round(max(image.shape[:2]) / 400))
        for place, counts in enumerate(masks):
            mask = decode_rle(counts, objects.size)
            color = colors.get(place, other)
            tint = 0.7 * picture[mask] + 0.3 * np.array(color)
            picture[mask] = tint.astype(np.uint8)
            outline = cv2.findContours(
                mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
            )[0]
            cv2.drawContours(picture, outline, -1, color, line, cv2.LINE_AA)
        panels.append(picture)
    return panels


def num_errors(objects: ImageObjects) -> int:
    """Return the number of missed and of false objects at IoU 0.5."""
    hits = len(match(objects.ious(), THRESHOLDS[0]))
    return len(objects.true) + len(objects.found) - 2 * hits
