"""The decoder's maps to objects, in two ways: by a watershed, or by prompts for the mask decoder.

Both begin with seeds, the innermost cells of the objects. `flood` grows them by a watershed over
the distances to the outline. `ask` makes prompts of the flooded objects for SAM's mask decoder and
keeps the best of answers that mean the same object. Which way and which thresholds are better is
found on the val split (`samray.instances.choice`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import cv2
import numpy as np
import torch
from scipy import ndimage
from skimage.segmentation import watershed
from torch import Tensor

from samray.geometry.frames import image_to_input, input_size_of
from samray.geometry.masks import CroppedMask, crop_mask, encode_rle, enlarge_mask, mask_ious
from samray.geometry.prompts import Prompt
from samray.instances.decoder import CELL, CLASS_CELL, InstanceDecoder, Maps
from samray.sam.decode import predict_masks

Kind = Literal["watershed", "point", "box", "both"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Way:
    """How maps become objects.

    Attributes:
        kind: by a watershed alone, or by prompts that are a point, a box or both.
        foreground: lowest probability of a cell of an object.
        boundary: lowest normalised distance to the outline, of a seed's cells.
        center: highest normalised distance to the centre, of a seed's cells.
        min_area: of an object, in cells of the decoder's grid.
        max_iou: of two answers; of those that overlap more, the surer is kept. Of prompts only.
        min_score: predicted IoU of an answer. Of prompts only.
    """

    kind: Kind = "watershed"
    foreground: float = 0.5
    boundary: float = 0.5
    center: float = 0.5
    min_area: float = 4.0
    max_iou: float = 0.5
    min_score: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is none of {KINDS}")
        for name, value in asdict(self).items():
            if name != "kind" and not (type(value) in (int, float) and math.isfinite(value)):
                raise ValueError(f"{name} must be a number, not {value!r:.60}")


@dataclass(frozen=True)
class FoundObject:
    """One object of an image.

    Attributes:
        mask: in the image's frame, cropped tightly.
        class_index: its class.
        score: 0..1, mean probability of the foreground, or the mask decoder's predicted IoU.
    """

    mask: CroppedMask
    class_index: int
    score: float


@dataclass(frozen=True)
class ImageMaps:
    """Maps of one image, padding removed: h x w is its size, at most that of the decoder's frame.

    Attributes:
        foreground: h x w float32, probability.
        center, boundary: h x w float32, 0..1.
        classes: K x g' x g' float32, probability.
        scale: cells of the decoder's grid per pixel of the maps.
        original_size: (H, W) of the image.
    """

    foreground: np.ndarray
    center: np.ndarray
    boundary: np.ndarray
    classes: np.ndarray
    scale: float
    original_size: tuple[int, int]


@torch.inference_mode()
def maps_of(decoder: InstanceDecoder, image: np.ndarray, embedding: Tensor) -> ImageMaps:
    """Return the maps of an image.

    Args:
        image: H x W x 3 uint8 RGB.
        embedding: C x h x w float32, on the decoder's device.
    """
    pixels = image_to_input(image, decoder.frame).to(embedding.device)
    return image_maps(decoder(embedding[None], pixels[None]), (image.shape[0], image.shape[1]))


def image_maps(maps: Maps, original_size: tuple[int, int]) -> ImageMaps:
    """Return the maps of a single image (B = 1) at its resolution, at most that of the frame.

    Finer ones would cost a watershed of many pixels and hold nothing more.
    """
    side = maps.foreground.shape[-1]
    height, width = input_size_of(original_size, side)
    factor = min(1.0, CELL * side / max(original_size))
    size = (max(1, round(original_size[0] * factor)), max(1, round(original_size[1] * factor)))
    scale = max(height, width) / max(size)
    stacked = torch.stack([maps.foreground[0].sigmoid(), maps.center[0], maps.boundary[0]], dim=-1)
    cells = np.ascontiguousarray(stacked[:height, :width].float().cpu().numpy())
    large = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_LINEAR)
    height, width = -(-height // CLASS_CELL), -(-width // CLASS_CELL)
    classes = maps.classes[0, :, :height, :width].float().softmax(dim=0).cpu().numpy()
    return ImageMaps(large[..., 0], large[..., 1], large[..., 2], classes, scale, original_size)


def find_objects(sam: Any, maps: ImageMaps, embedding: Tensor, way: Way) -> list[FoundObject]:
    """Return the objects of an image, the surest first.

    Args:
        sam: the model that made the embedding.
        embedding: C x h x w float32, on the model's device.
    """
    numbers = flood(maps, way)
    if way.kind == "watershed":
        found = _flooded_objects(maps, numbers)
    else:
        found = asked_objects(sam, maps, embedding, numbers, way)
    return sorted(found, key=lambda one: -one.score)


def flood(maps: ImageMaps, way: Way) -> np.ndarray:
    """Return h x w int32: objects numbered 1..N by a watershed from their seeds; 0 background."""
    foreground = maps.foreground > way.foreground
    innermost = foreground & (maps.boundary > way.boundary) & (maps.center < way.center)
    seeds = ndimage.label(innermost)[0]
    numbers = watershed(-maps.boundary, seeds, mask=foreground)
    kept = np.bincount(numbers.ravel()) * maps.scale**2 >= way.min_area
    kept[0] = False
    renumbered: np.ndarray = np.where(kept, np.cumsum(kept), 0)[numbers].astype(np.int32)
    return renumbered


def _flooded_objects(maps: ImageMaps, numbers: np.ndarray) -> list[FoundObject]:
    objects = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        pixels = numbers[box] == number
        score = float(maps.foreground[box][pixels].mean())
        mask = CroppedMask(pixels, (box[1].start, box[0].start))
        objects.append(FoundObject(_enlarged(mask, maps), _class_of(mask, maps), score))
    return objects


def asked_objects(
    sam: Any, maps: ImageMaps, embedding: Tensor, numbers: np.ndarray, way: Way
) -> list[FoundObject]:
    """Return the mask decoder's answers for flooded objects, the surest first.

    Args:
        numbers: h x w int32, as `flood` returns it, or with only some of its objects.
    """
    answers = ask(sam, maps, embedding, numbers, way.kind)
    return objects_of_answers(answers, maps, way)


def ask(
    sam: Any, maps: ImageMaps, embedding: Tensor, numbers: np.ndarray, kind: Kind
) -> list[tuple[CroppedMask, float]]:
    """Return the mask decoder's answer for each flooded object: mask, not empty, and score."""
    height, width = maps.original_size
    scale = np.array([width / numbers.shape[1], height / numbers.shape[0]], np.float32)
    prompts = []
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        rows, columns = box
        depth = np.where(numbers[box] == number, maps.boundary[box], -1)
        row, column = np.unravel_index(int(depth.argmax()), depth.shape)
        point = (np.array([[columns.start + column, rows.start + row]], np.float32) + 0.5) * scale
        corners = np.array([columns.start, rows.start, columns.stop, rows.stop], np.float32)
        prompts.append(
            Prompt(
                point_coords=None if kind == "box" else point - 0.5,
                point_labels=None if kind == "box" else np.ones(1, np.int64),
                box=None if kind == "point" else corners * np.tile(scale, 2),
            )
        )
    answers = []
    for _, masks in predict_masks(sam, embedding, prompts, maps.original_size):
        mask = masks.mask(masks.best)
        if mask.any():
            answers.append((crop_mask(mask), masks.predicted_iou))
    return answers


def objects_of_answers(
    answers: Sequence[tuple[CroppedMask, float]], maps: ImageMaps, way: Way
) -> list[FoundObject]:
    """Return the objects of the mask decoder's answers, the surest first, without doubles."""
    (height, width), (rows, columns) = maps.original_size, maps.foreground.shape
    scale = np.array([width / columns, height / rows], np.float32)
    sure = [(mask, score) for mask, score in answers if score >= way.min_score]
    return [
        FoundObject(mask, _class_of(_shrunk(mask, scale), maps), min(1.0, max(0.0, score)))
        for mask, score in suppress(sure, maps.original_size, way.max_iou)
    ]


def suppress(
    answers: Sequence[tuple[CroppedMask, float]], size: tuple[int, int], max_iou: float
) -> list[tuple[CroppedMask, float]]:
    """Return the masks that overlap no surer one by more than `max_iou`, the surest first.

    Args:
        answers: (mask, score) each.
        size: (H, W) of their frame.
    """
    ranked = sorted(answers, key=lambda answer: -answer[1])
    rles = [encode_rle(mask, size) for mask, _ in ranked]
    table = mask_ious(rles, rles, size)
    kept: list[int] = []
    for place in range(len(ranked)):
        if not (table[place, kept] > max_iou).any():
            kept.append(place)
    return [ranked[place] for place in kept]


def _class_of(mask: CroppedMask, maps: ImageMaps) -> int:
    """The class of the highest mean probability over a mask in the maps' frame."""
    if len(maps.classes) == 1:
        return 0
    rows, columns = np.nonzero(mask.pixels)
    cells = (
        np.minimum(((values + start) * (maps.scale / CLASS_CELL)).astype(int), limit - 1)
        for values, start, limit in zip(
            (rows, columns), mask.origin[::-1], maps.classes.shape[1:], strict=True
        )
    )
    return int(maps.classes[(slice(None), *cells)].mean(axis=1).argmax())


def _shrunk(mask: CroppedMask, scale: np.ndarray) -> CroppedMask:
    """A mask of the image in the maps' frame."""
    if (scale == 1).all():
        return mask
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    size = (max(1, round(w / scale[0])), max(1, round(h / scale[1])))
    small = cv2.resize(mask.pixels.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    pixels = small > 0
    pixels[0, 0] |= not pixels.any()
    return CroppedMask(pixels, (int(x / scale[0]), int(y / scale[1])))


def _enlarged(mask: CroppedMask, maps: ImageMaps) -> CroppedMask:
    """A mask of the maps' frame in that of the image, its outline smoothed."""
    height, width = maps.original_size
    if maps.foreground.shape == (height, width):
        return mask
    scale = (width / maps.foreground.shape[1], height / maps.foreground.shape[0])
    return enlarge_mask(mask, maps.foreground.shape, scale)
