"""All objects of one image, as a label map, a table and LabelMe shapes."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.utils.amg import (
    mask_to_rle_pytorch,
    remove_small_regions,
    rle_to_mask,
)
from torchvision.ops.boxes import nms

from samray.config import PredictConfig
from samray.data.annotation import UNNAMED
from samray.data.labelme import mask_to_shapes
from samray.errors import AnnotationError
from samray.geometry.drawing import shrink
from samray.geometry.frames import input_size_of
from samray.geometry.masks import (
    CroppedMask,
    crop_mask,
    decode_rle,
    encode_rle,
    enlarge_mask,
)
from samray.geometry.tiles import Window
from samray.instances.saved import InstanceModel
from samray.instances.segment import FoundObject, find_objects, maps_of
from samray.instances.windows import find_in_windows
from samray.prediction.answers import describe_mask, prompt_of
from samray.prediction.requests import PromptRequest
from samray.sam.decode import PromptGroup, decode_prompts, predict_masks
from samray.sam.embeddings import encode_image
from samray.storage import csv_bytes

MAX_OBJECTS = 65535  # of an image: the label map has 16 bits
# SAM keeps the logits of a batch of masks at the image's resolution: 64 points of a 100-megapixel
# image would take 77 GB. The model sees at most 1024 pixels a side, so larger images are segmented
# at this size, with fewer points at a time.
MAX_SEARCH_SIDE = 2048  # pixels
MAX_LOGITS = 2**25  # of one batch
POINTS_PER_BATCH = 64  # SAM's own
# (pred_iou_thresh, stability_score_thresh) where unset. `tiny` predicts an IoU that is too low: of
# 50 nuts on photographs, SAM's thresholds find none and these find 0.88 at IoU 0.5, with two more
# masks for each object; (0.5, 0.8) find 0.82, with four more.
THRESHOLDS = {"tiny": (0.4, 0.9)}
SAM_THRESHOLDS = (0.88, 0.95)
COLUMNS = ("id", "x1", "y1", "x2", "y2", "area", "score", "stability_score", "prompt_id", "label")


@dataclass(frozen=True)
class SegmentedObject:
    """One object; its mask is kept as run lengths inside its box, to save memory.

    Attributes:
        counts: compressed COCO RLE of the box's pixels; empty where the mask is.
        box: XYXY, in pixels; the columns x1..x2-1 and rows y1..y2-1 hold the mask tightly.
        area: in pixels.
        score: predicted IoU, or how sure the instance decoder is.
        stability_score: IoU of the masks at a higher and a lower cutoff of the logits; None of an
            object that the instance decoder found.
        prompt_id: the `id` of the prompt, if it had one.
        label: its class, if the model knows it.
    """

    counts: bytes
    box: tuple[int, int, int, int]
    area: int
    score: float
    stability_score: float | None
    prompt_id: str | None = None
    label: str | None = None

    @property
    def pixels(self) -> np.ndarray:
        """The part of the mask inside the box, h x w bool."""
        x1, y1, x2, y2 = self.box
        return decode_rle(self.counts, (y2 - y1, x2 - x1))


def generator_settings(settings: PredictConfig, model_type: str) -> dict[str, Any]:
    """Return the arguments of `SamAutomaticMaskGenerator`."""
    pred_iou, stability = THRESHOLDS.get(model_type, SAM_THRESHOLDS)
    if settings.pred_iou_thresh is not None:
        pred_iou = settings.pred_iou_thresh
    if settings.stability_score_thresh is not None:
        stability = settings.stability_score_thresh
    return {
        "points_per_side": settings.points_per_side,
        "pred_iou_thresh": pred_iou,
        "stability_score_thresh": stability,
        "min_mask_region_area": settings.min_mask_region_area,
    }


class FastPredictor(SamPredictor):  # type: ignore[misc]
    """SAM's predictor with the same results, through samray's decoder."""

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: torch.Tensor,
        point_labels: torch.Tensor,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arguments and results of the stock method."""
        index = torch.zeros(len(point_coords), dtype=torch.int64, device=point_coords.device)
        group = PromptGroup(index, point_coords, point_labels, boxes, mask_input)
        low_res, scores = decode_prompts(self.model, self.features, group, multimask_output)
        masks = self.model.postprocess_masks(low_res, self.input_size, self.original_size)
        return masks if return_logits else masks > self.model.mask_threshold, scores, low_res


class MaskGenerator(SamAutomaticMaskGenerator):  # type: ignore[misc]
    """SAM's generator with the same results, but one full-size mask in memory instead of all."""

    done: list[Any] | None = None  # batches of points, if they are done already

    def __init__(self, sam: Any, **settings: Any) -> None:
        super().__init__(sam, **settings)
        self.predictor = FastPredictor(sam)

    def generate_in_pieces(
        self, embedding: torch.Tensor, size: tuple[int, int]
    ) -> Generator[None, None, list[dict[str, Any]]]:
        """Return the records of `generate`; works on a batch of points between two values.

        Args:
            embedding: C x h x w float32 of the image, on the model's device.
            size: (H, W) of the image.
        """
        sam, (height, width) = self.predictor.model, size
        self.predictor.features = embedding[None]
        self.predictor.original_size = size
        self.predictor.input_size = input_size_of(size, sam.image_encoder.img_size)
        self.predictor.is_image_set = True
        points = self.point_grids[0] * [width, height]
        batches = []
        for start in range(0, len(points), self.points_per_batch):
            some, box = points[start : start + self.points_per_batch], [0, 0, width, height]
            with torch.inference_mode():
                batches.append(self._process_batch(some, size, box, size))
            yield
        self.done, self.predictor.set_image = batches, lambda _: None
        records: list[dict[str, Any]] = self.generate(np.empty((height, width, 0), np.uint8))
        return records

    def _process_batch(self, *arguments: Any) -> Any:
        return self.done.pop(0) if self.done else super()._process_batch(*arguments)

    @staticmethod
    def postprocess_small_regions(mask_data: Any, min_area: int, nms_thresh: float) -> Any:
        """Remove small parts and holes, then the duplicates that this creates."""
        if not mask_data["rles"]:
            return mask_data
        unchanged = []
        for number, rle in enumerate(mask_data["rles"]):
            mask, filled = remove_small_regions(rle_to_mask(rle), min_area, mode="holes")
            mask, removed = remove_small_regions(mask, min_area, mode="islands")
            unchanged.append(float(not filled and not removed))
            if filled or removed:
                mask_data["rles"][number] = mask_to_rle_pytorch(torch.as_tensor(mask)[None])[0]
                # As SAM's batched_mask_to_box: the last row and column, not the ones after them.
                x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
                mask_data["boxes"][number] = (x, y, x + width - 1, y + height - 1)
        boxes = torch.as_tensor(mask_data["boxes"]).float()
        mask_data.filter(nms(boxes, torch.tensor(unchanged), nms_thresh))
        return mask_data


def find_everything(sam: Any, image: np.ndarray, settings: dict[str, Any]) -> list[SegmentedObject]:
    """Return all objects of an image, as SAM's automatic mask generator finds them.

    An image of more than MAX_SEARCH_SIDE pixels a side is segmented at that size, and the masks
    are enlarged.

    Args:
        image: H x W x 3 uint8 RGB.
        settings: of `generator_settings`; areas are in pixels of this image.

    Raises:
        AnnotationError: field `image`; there are more than MAX_OBJECTS.
    """
    small = shrink(image, MAX_SEARCH_SIDE)
    generator, scale = mask_generator(sam, image.shape[:2], small.shape[:2], settings)
    return objects_of_records(generator.generate(small), small.shape[:2], scale)


def mask_generator(
    sam: Any,
    size: tuple[int, ...],
    small: tuple[int, ...],
    settings: dict[str, Any],
    points_at_once: int = POINTS_PER_BATCH,
) -> tuple[MaskGenerator, tuple[float, float]]:
    """Return the generator for an image of (H, W), and its pixels per pixel of the shrunk one."""
    scale = (size[1] / small[1], size[0] / small[0])
    min_area = settings["min_mask_region_area"] / (scale[0] * scale[1])
    generator = MaskGenerator(
        sam,
        **settings | {"min_mask_region_area": round(min_area)},
        points_per_batch=max(1, min(points_at_once, MAX_LOGITS // (3 * small[0] * small[1]))),
        output_mode="coco_rle",
    )
    return generator, scale


def objects_of_records(
    records: list[dict[str, Any]], small: tuple[int, ...], scale: tuple[float, float]
) -> list[SegmentedObject]:
    """Return the generator's masks of an image shrunk to (h, w), enlarged and each once.

    Raises:
        AnnotationError: field `image`; there are more than MAX_OBJECTS.
    """
    found: dict[tuple[Any, bytes], SegmentedObject] = {}
    for record in records:
        mask = np.ascontiguousarray(coco_mask.decode(record["segmentation"]))
        if mask.any():
            cropped = crop_mask(mask.astype(bool))
            if scale != (1, 1):
                cropped = enlarge_mask(cropped, (small[0], small[1]), scale)
            scores = float(record["predicted_iou"]), float(record["stability_score"])
            segmented = segmented_object(cropped, *scores)
            # SAM finds duplicates by their boxes, and a box of a single row or column is empty
            # to it: the same mask would be kept many times.
            found.setdefault((segmented.box, segmented.counts), segmented)
    objects = list(found.values())
    require_countable(objects)
    return objects


def find_instances(
    sam: Any, model: InstanceModel, image: np.ndarray, tile: int | None = None
) -> list[SegmentedObject]:
    """Return all objects of an image, as the instance decoder finds them, the surest first.

    Args:
        model: trained with `sam`, on its device.
        image: H x W x 3 uint8 RGB.
        tile: side of the windows to look at a larger image through, in pixels; neighbours share a
            quarter of it. None: the image as a whole.

    Raises:
        AnnotationError: field `image`; there are more than MAX_OBJECTS.
    """

    def find(window: Window) -> list[FoundObject]:
        view = np.ascontiguousarray(image[window.slices])
        embedding = encode_image(sam, view)
        return find_objects(sam, maps_of(model.decoder, view, embedding), embedding, model.way)

    size = (image.shape[0], image.shape[1])
    side = tile or max(size)
    found = find_in_windows(size, side, side // 4, find)
    require_countable(found)
    return [
        segmented_object(one.mask, one.score, None, label=model.labels[one.class_index])
        for one in found
    ]


def require_countable(objects: list[Any]) -> None:
    """Refuse more objects than a label map can hold.

    Raises:
        AnnotationError: field `image`.
    """
    if len(objects) > MAX_OBJECTS:
        raise AnnotationError(
            "image",
            f"has {len(objects)} objects; a label map of 16 bits can number {MAX_OBJECTS}; cut "
            "the image, or ask for fewer",
        )


def answer_prompts(
    sam: Any, image: np.ndarray, requests: list[PromptRequest]
) -> tuple[list[SegmentedObject], list[dict[str, Any]]]:
    """Return the best mask of each prompt, and all answers as the endpoint gives them.

    Args:
        image: H x W x 3 uint8 RGB.
        requests: prompts inside the image; their `mask_token` is ignored.

    Returns:
        One object a prompt, in their order; one with an empty mask has area 0.
        The endpoint's `results`, masks as RLE and the best first.
    """
    size = (image.shape[0], image.shape[1])
    embedding = encode_image(sam, image)
    objects: dict[int, SegmentedObject] = {}
    results: dict[int, dict[str, Any]] = {}
    for place, found in predict_masks(sam, embedding, [prompt_of(r) for r in requests], size):
        prompt_id = requests[place].id
        masks = []
        for number in found.ranking:
            logits = found.logits(number)
            mask = (logits > 0).cpu().numpy()
            score = float(found.iou_predictions[number])
            masks.append({"score": score, **describe_mask(mask, "rle", "", 0.5, 0)})
            if place not in objects:
                low, high = int((logits > 1).sum()), int((logits > -1).sum())
                stability = low / high if high else 0.0
                objects[place] = segmented_object(crop_mask(mask), score, stability, prompt_id)
        results[place] = {"id": prompt_id, "masks": masks}
    places = range(len(requests))
    return [objects[place] for place in places], [results[place] for place in places]


def label_map(objects: list[SegmentedObject], size: tuple[int, int]) -> np.ndarray:
    """Return H x W uint16: 0 for the background, i for the i-th object; smaller ones on top."""
    numbers = np.zeros(size, dtype=np.uint16)
    for place in sorted(range(len(objects)), key=lambda place: -objects[place].area):
        if objects[place].area:
            x1, y1, x2, y2 = objects[place].box
            numbers[y1:y2, x1:x2][objects[place].pixels] = place + 1
    return numbers


def labelme_shapes(objects: list[SegmentedObject], label: str | None) -> list[dict[str, Any]]:
    """Return the shapes of all objects, numbered in `description` and the parts' `group_id`.

    Args:
        label: see `label_of`.
    """
    shapes: list[dict[str, Any]] = []
    for number, found in enumerate(objects, start=1):
        if not found.area:
            continue
        own = label_of(found, label)
        parts: list[dict[str, Any]] = mask_to_shapes(found.pixels, own)
        for part in parts:
            part["points"] = [[x + found.box[0], y + found.box[1]] for x, y in part["points"]]
            part["group_id"] = number if len(parts) > 1 else None
            part["description"] = str(number)
        shapes += parts
    return shapes


def label_of(found: SegmentedObject, label: str | None) -> str:
    """Return an object's label in all outputs: the one given for all, its own, or `object`."""
    return label or found.label or UNNAMED


def full_rle(found: SegmentedObject, size: tuple[int, int]) -> bytes:
    """Return the compressed COCO counts of an object's mask in its image of (H, W) pixels."""
    return encode_rle(CroppedMask(found.pixels, found.box[:2]), size)


def object_table(objects: list[SegmentedObject], label: str | None) -> bytes:
    """Return a CSV file with one row per object; `id` is its number in the label map.

    Args:
        label: see `label_of`.
    """
    rows: list[tuple[Any, ...]] = [COLUMNS]
    for number, found in enumerate(objects, start=1):
        stability = "" if found.stability_score is None else f"{found.stability_score:.6f}"
        named = found.prompt_id or "", label_of(found, label)
        rows.append((number, *found.box, found.area, f"{found.score:.6f}", stability, *named))
    return csv_bytes(rows)


def segmented_object(
    mask: CroppedMask,
    score: float,
    stability_score: float | None,
    prompt_id: str | None = None,
    label: str | None = None,
) -> SegmentedObject:
    """Return an object from its tightly cropped mask."""
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    counts = encode_rle(CroppedMask(mask.pixels, (0, 0)), (h, w)) if mask.pixels.size else b""
    area = int(np.count_nonzero(mask.pixels))
    box = (x, y, x + w, y + h)
    return SegmentedObject(counts, box, area, score, stability_score, prompt_id, label)
