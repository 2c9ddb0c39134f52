"""Masks, outlines and prompts drawn over images."""

import io
from collections.abc import Iterable

import cv2
import numpy as np
from PIL import Image

from samray.geometry.masks import CroppedMask
from samray.geometry.prompts import Prompt

# Okabe and Ito's palette, which colour-blind people can distinguish.
COLORS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
HIGHLIGHT = (0, 200, 255)  # of a single mask: a colour that is rare in photographs
FOREGROUND, BACKGROUND, BOX = (0, 255, 0), (255, 0, 0), (0, 255, 255)


def draw_masks(
    image: np.ndarray,
    masks: Iterable[np.ndarray | CroppedMask],
    colors: list[tuple[int, int, int]] | None = None,
) -> np.ndarray:
    """Return the image with translucent, outlined masks.

    Args:
        image: H x W x 3 uint8 RGB.
        masks: H x W bool each, or crops of such, which cost less.
        colors: RGB, one per mask; by default those of COLORS in turn.
    """
    picture = image.copy()
    line = max(1, round(max(image.shape[:2]) / 400))
    for number, mask in enumerate(masks):
        color = colors[number] if colors else COLORS[number % len(COLORS)]
        crop = mask if isinstance(mask, CroppedMask) else CroppedMask(mask, (0, 0))
        (x, y), (h, w) = crop.origin, crop.pixels.shape
        part = picture[y : y + h, x : x + w]
        part[crop.pixels] = (0.55 * part[crop.pixels] + 0.45 * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(
            crop.pixels.astype(np.uint8),
            cv2.RETR_CCOMP,
            cv2.CHAIN_APPROX_SIMPLE,
            offset=crop.origin,
        )
        cv2.drawContours(picture, contours, -1, color, line, cv2.LINE_AA)
    return picture


def cut_out(image: np.ndarray, masks: list[CroppedMask], side: int) -> np.ndarray:
    """Return a crop around masks, enlarged or shrunk, with their outlines drawn.

    Args:
        image: H x W x 3 uint8 RGB.
        masks: of that image; the first is outlined in `HIGHLIGHT`, the others in COLORS in turn.
        side: pixels of the picture's longest side.
    """
    low = np.min([mask.box[:2] for mask in masks], axis=0)
    high = np.max([mask.box[2:] for mask in masks], axis=0)
    margin = max(8.0, 0.35 * float((high - low).max()))
    x1, y1 = np.maximum(low - margin, 0).astype(int)
    x2, y2 = np.minimum(high + margin, image.shape[1::-1]).astype(int)
    scale = side / max(x2 - x1, y2 - y1)
    size = (max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale)))
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    picture = np.array(cv2.resize(image[y1:y2, x1:x2], size, interpolation=smooth))
    for number, mask in reversed(list(enumerate(masks))):
        color = COLORS[(number - 1) % len(COLORS)] if number else HIGHLIGHT
        window = np.zeros((y2 - y1, x2 - x1), dtype=np.uint8)
        x, y = mask.origin[0] - x1, mask.origin[1] - y1
        window[y : y + mask.pixels.shape[0], x : x + mask.pixels.shape[1]] = mask.pixels
        window = np.asarray(cv2.resize(window, size, interpolation=cv2.INTER_NEAREST))
        contours, _ = cv2.findContours(window, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        line = 1 + side // 200
        cv2.drawContours(picture, contours, -1, (0, 0, 0), line + 2, cv2.LINE_AA)  # for contrast
        cv2.drawContours(picture, contours, -1, color, line, cv2.LINE_AA)
    return picture


def draw_prompt_marks(picture: np.ndarray, prompt: Prompt) -> np.ndarray:
    """Draw a prompt's points (green foreground, red background) or box, in place; return it."""
    size = max(picture.shape[:2])
    radius, line = max(3, size // 110), max(1, size // 300)
    if prompt.point_coords is not None and prompt.point_labels is not None:
        for (x, y), label in zip(prompt.point_coords, prompt.point_labels, strict=True):
            center = (round(float(x)), round(float(y)))
            cv2.circle(picture, center, radius + line, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(
                picture, center, radius, FOREGROUND if label else BACKGROUND, -1, cv2.LINE_AA
            )
    if prompt.box is not None:
        x1, y1, x2, y2 = (round(float(v)) for v in prompt.box)
        cv2.rectangle(picture, (x1, y1), (x2 - 1, y2 - 1), BOX, line + 1)
    return picture


def shrink(picture: np.ndarray, longest_side: int) -> np.ndarray:
    """Return the picture, scaled down if its longest side exceeds `longest_side` pixels."""
    scale = longest_side / max(picture.shape[:2])
    if scale >= 1:
        return picture
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))


def encode_picture(picture: np.ndarray, suffix: str) -> bytes:
    """Return a PNG or JPEG file's bytes.

    Args:
        picture: H x W x 3 uint8 RGB, or H x W uint8.
        suffix: `.png` or `.jpg`.
    """
    buffer = io.BytesIO()
    if suffix == ".png":
        Image.fromarray(picture).save(buffer, format="PNG")
    else:
        Image.fromarray(picture).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()
