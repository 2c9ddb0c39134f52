"""Masks in the format that a client asked for: polygons, RLE, PNG or LabelMe shapes."""

import base64
import io
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from samray.data.labelme import mask_to_shapes
from samray.geometry.masks import CroppedMask, crop_mask, encode_rle
from samray.geometry.prompts import Prompt
from samray.prediction.requests import PromptRequest


def prompt_of(request: PromptRequest) -> Prompt:
    """Return the prompt of a request; without labels every point is a foreground point.

    Its `mask_token` is ignored here.
    """
    coords = request.point_coords
    return Prompt(
        np.array(coords, np.float32) if coords else None,
        np.array(request.point_labels or [1] * len(coords), np.int64) if coords else None,
        np.array(request.box, np.float32) if request.box else None,
    )


def drop_small_parts(mask: np.ndarray, min_area: int) -> np.ndarray:
    """Return the mask without its parts below `min_area` pixels; the largest part is always kept.

    Args:
        mask: H x W bool.
    """
    if min_area <= 1 or not mask.any():
        return mask
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = np.flatnonzero((areas >= min_area) | (areas == areas.max())) + 1
    keep = np.zeros(count, dtype=bool)
    keep[kept] = True
    return np.asarray(keep[parts])


def describe_mask(
    mask: np.ndarray, mask_format: str, label: str, tolerance: float, group_id: int
) -> dict[str, Any]:
    """Return a mask's area and box, and the mask in one of the formats.

    Args:
        mask: H x W bool.
        mask_format: polygon, rle, png, labelme or none.
        tolerance: maximum distance of a polygon from the outline, in pixels.
        group_id: joins the parts of a mask, in LabelMe.
    """
    size = (mask.shape[0], mask.shape[1])
    return describe_object(crop_mask(mask), size, mask_format, label, tolerance, group_id)


def describe_object(
    mask: CroppedMask,
    size: tuple[int, int],
    mask_format: str,
    label: str,
    tolerance: float,
    group_id: int,
) -> dict[str, Any]:
    """Return what `describe_mask` does of a tightly cropped mask in a frame of (H, W) pixels."""
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    there = bool(mask.pixels.any())
    described: dict[str, Any] = {
        "area": int(np.count_nonzero(mask.pixels)),
        "bbox": (x, y, x + w, y + h) if there else (0, 0, 0, 0),
        "format": mask_format,
    }
    if mask_format == "polygon":
        described["polygons"] = _polygons(mask, tolerance) if there else []
    elif mask_format == "rle":
        counts = encode_rle(mask, size) if there else _no_mask(size)
        described["rle"] = {"size": list(size), "counts": counts.decode()}
    elif mask_format == "png":
        whole = np.zeros(size, dtype=bool)
        whole[y : y + h, x : x + w] = mask.pixels
        buffer = io.BytesIO()
        Image.fromarray(whole).save(buffer, format="PNG")
        described["png"] = base64.b64encode(buffer.getvalue()).decode()
    elif mask_format == "labelme":
        shapes: list[dict[str, Any]] = mask_to_shapes(mask.pixels, label, tolerance)
        for shape in shapes:
            shape["points"] = [[left + x, top + y] for left, top in shape["points"]]
            if len(shapes) > 1:
                shape["group_id"] = group_id
        described["shapes"] = shapes
    return described


def _no_mask(size: tuple[int, int]) -> bytes:
    counts: bytes = coco_mask.encode(np.zeros(size, np.uint8, order="F"))["counts"]
    return counts


def _polygons(mask: CroppedMask, tolerance: float) -> list[dict[str, Any]]:
    """Return the outlines of parts and holes, (x, y) of the border pixels' centres."""
    contours, hierarchy = cv2.findContours(
        mask.pixels.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=mask.origin
    )
    found = []
    for number, contour in enumerate(contours):
        points = cv2.approxPolyDP(contour, tolerance, closed=True)[:, 0]
        hole = bool(hierarchy[0, number, 3] >= 0)
        found.append({"points": points.tolist(), "hole": hole})
    return found
