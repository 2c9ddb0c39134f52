"""All objects of an image for the endpoint: within bounds, and in pieces that others wait for.

Generators work for a moment between two values, which are None, and return the result. So whoever
runs them can let others work in between, or end them.
"""

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from samray.config import PredictConfig
from samray.data.annotation import UNNAMED
from samray.data.labelme import labelme_document
from samray.errors import AnnotationError
from samray.geometry.drawing import shrink
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask, enlarge_mask
from samray.instances.saved import InstanceModel
from samray.instances.segment import (
    FoundObject,
    ImageMaps,
    Way,
    asked_objects,
    find_objects,
    flood,
    maps_of,
    suppress,
)
from samray.prediction.answers import describe_object
from samray.prediction.requests import ApiError, SegmentRequest
from samray.prediction.segmentation import (
    MAX_SEARCH_SIDE,
    SegmentedObject,
    generator_settings,
    mask_generator,
    objects_of_records,
    segmented_object,
)

PIECE_SECONDS = 0.05  # of describing masks, between which others get a turn


@dataclass(frozen=True)
class Bounds:
    """What finding all objects of an image may cost.

    Attributes:
        megapixels: of the masks that a mask decoder is asked for, or that are written as PNG.
        answer_bytes: of the objects in the answer.
        until: `time.monotonic()` after which no further object is asked for or described.
        prompts: that are decoded at once.
    """

    megapixels: float
    answer_bytes: int
    until: float
    prompts: int

    def masks(self, size: tuple[int, int]) -> int:
        """How many masks of (H, W) pixels are within them."""
        return int(self.megapixels * 1e6 / (size[0] * size[1]))


@dataclass(frozen=True)
class Found:
    """The objects of an image, the surest first.

    Attributes:
        by: `instances` or `grid`.
        left_out: objects that were seen and not looked at.
    """

    objects: list[SegmentedObject]
    by: str
    left_out: int = 0


def search(
    sam: Any,
    model: InstanceModel | None,
    model_type: str,
    raw: bytes,
    embedding: torch.Tensor,
    size: tuple[int, int],
    request: SegmentRequest,
    bounds: Bounds,
) -> Iterator[bytes | None]:
    """Find the objects of an image and describe them as JSON.

    Args:
        model: None: by the grid of points.
        raw: the image's file.
        embedding: C x h x w float32, on the model's device.
        size: (H, W) of the image.

    Yields:
        At last the JSON members of a `SegmentAnswer`, from `objects` to `labelme`, without braces.

    Raises:
        ApiError: too_large if the grid costs too much; invalid_image.
    """
    if model is None:
        found = yield from by_grid(sam, model_type, embedding, size, bounds)
    else:
        found = yield from by_instances(sam, model, raw, embedding, bounds)
    yield (yield from describe(found, size, request, bounds))


def by_instances(
    sam: Any, model: InstanceModel, raw: bytes, embedding: torch.Tensor, bounds: Bounds
) -> Generator[None, None, Found]:
    """Return the objects that the instance decoder finds."""
    try:
        image = decode_image(raw)
    except AnnotationError as exc:
        raise ApiError("invalid_image", exc.reason, "image") from exc
    size, watershed = (image.shape[0], image.shape[1]), model.way.kind == "watershed"
    yield
    maps = maps_of(model.decoder, image if watershed else shrink(image, MAX_SEARCH_SIDE), embedding)
    del image
    yield
    left_out = 0
    if watershed:
        objects = find_objects(sam, maps, embedding, model.way)
    else:
        objects, left_out = yield from _ask(sam, maps, embedding, model.way, bounds)
    small = maps.original_size
    scale = (size[1] / small[1], size[0] / small[0])
    found = []
    for number, one in enumerate(objects):
        if number % bounds.prompts == 0:
            yield
        mask = one.mask if scale == (1, 1) else enlarge_mask(one.mask, small, scale)
        label = model.labels[one.class_index]
        found.append(segmented_object(mask, one.score, None, label=label))
    return Found(found, "instances", left_out)


def _ask(
    sam: Any, maps: ImageMaps, embedding: torch.Tensor, way: Way, bounds: Bounds
) -> Generator[None, None, tuple[list[FoundObject], int]]:
    """Ask the mask decoder for a few flooded objects at a time, the surest first.

    Returns:
        What `find_objects` gives, and how many objects were not asked for.
    """
    numbers = flood(maps, way)
    cells = np.bincount(numbers.ravel())
    sure = np.bincount(numbers.ravel(), maps.foreground.ravel()) / np.maximum(cells, 1)
    ranked = 1 + np.argsort(-sure[1:], kind="stable")
    wanted = ranked[: bounds.masks(maps.original_size)]
    found: list[FoundObject] = []
    done = 0
    no_suppression = replace(way, max_iou=1.0)  # all together below
    while done < len(wanted) and time.monotonic() < bounds.until:
        some = wanted[done : done + bounds.prompts]
        table = np.zeros(len(cells), np.int32)
        table[some] = np.arange(1, len(some) + 1)
        found += asked_objects(sam, maps, embedding, table[numbers], no_suppression)
        done += len(some)
        yield
    by_mask = {id(one.mask): one for one in found}
    answers = [(one.mask, one.score) for one in found]
    kept = suppress(answers, maps.original_size, way.max_iou)
    return [by_mask[id(mask)] for mask, _ in kept], len(ranked) - done


def by_grid(
    sam: Any, model_type: str, embedding: torch.Tensor, size: tuple[int, int], bounds: Bounds
) -> Generator[None, None, Found]:
    """Return the objects that a grid of points finds.

    Raises:
        ApiError: too_large, before any work is done.
    """
    factor = min(1.0, MAX_SEARCH_SIDE / max(size))
    small = (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))
    settings = generator_settings(PredictConfig(), model_type)
    points = settings["points_per_side"] ** 2
    if 3 * points > bounds.masks(small):
        megapixels = 3 * points * small[0] * small[1] / 1e6
        raise ApiError(
            "too_large",
            "this model has no instance decoder, and a grid of points would have to look at "
            f"{megapixels:.0f} megapixels of masks; the limit is {bounds.megapixels:g}; choose a "
            "model trained with train.instances, send a smaller image, or use samray predict",
            "model",
        )
    generator, scale = mask_generator(sam, size, small, settings, bounds.prompts)
    records = yield from generator.generate_in_pieces(embedding, small)
    objects = objects_of_records(records, small, scale)
    return Found(sorted(objects, key=lambda one: -one.score), "grid")


def describe(
    found: Found, size: tuple[int, int], request: SegmentRequest, bounds: Bounds
) -> Generator[None, None, bytes]:
    """Describe objects of (H, W) pixels, the surest first, as far as the bounds reach.

    Returns:
        JSON: see `search`.
    """
    wanted = [one for one in found.objects if one.area and one.score >= request.min_score]
    most = len(wanted)
    if request.mask_format == "png":  # each is as large as the image
        most = min(most, bounds.masks(size))
    texts: list[str] = []
    shapes: list[dict[str, Any]] = []
    used, turn = 0, time.monotonic() + PIECE_SECONDS
    for number, one in enumerate(wanted[:most], start=1):
        now = time.monotonic()
        if now > bounds.until:
            break
        if now > turn:
            yield
            turn = time.monotonic() + PIECE_SECONDS
        described = _described(one, size, request, number)
        text = json.dumps(described)
        own = described.get("shapes", [])
        used += (len(text) + 2) * (2 if own else 1)  # LabelMe shapes are in the answer twice
        if used > bounds.answer_bytes:
            break
        texts.append(text)
        shapes += own
    left_out = found.left_out + len(wanted) - len(texts)
    rest: dict[str, Any] = {"left_out": left_out, "found_by": found.by}
    if request.mask_format == "labelme":
        rest["labelme"] = labelme_document(request.image_name or "", size, shapes)
    return f'"objects": [{", ".join(texts)}], {json.dumps(rest)[1:-1]}'.encode()


def _described(
    one: SegmentedObject, size: tuple[int, int], request: SegmentRequest, number: int
) -> dict[str, Any]:
    label = request.label or one.label or UNNAMED
    mask = CroppedMask(one.pixels, one.box[:2])
    tolerance = request.polygon_tolerance
    content = describe_object(mask, size, request.mask_format, label, tolerance, number)
    return {"label": label, "score": one.score, **content}
