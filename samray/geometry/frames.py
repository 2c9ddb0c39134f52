"""Original frame to model frame and back: the only implementation of SAM's geometry.

The longest side is scaled to `img_size`, the rest is padded at the bottom and on the right,
pixels are normalised by SAM's mean and standard deviation. Resampling is
`segment_anything.utils.transforms.ResizeLongestSide` itself, as in `SamPredictor`.
"""

import functools

import numpy as np
import torch
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F

# Part of the key of cached embeddings: change it with anything here that changes pixels.
TRANSFORM_VERSION = "sam-resize-longest-side-1"
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


def input_size_of(original_size: tuple[int, int], img_size: int) -> tuple[int, int]:
    """(H, W) of an image after resizing, before padding."""
    height, width = ResizeLongestSide.get_preprocess_shape(*original_size, img_size)
    return int(height), int(width)


def image_to_input(image: np.ndarray, img_size: int) -> torch.Tensor:
    """Return the model's input.

    Args:
        image: H x W x 3 uint8 RGB.

    Returns:
        3 x img_size x img_size float32.
    """
    return normalize(resize(image, img_size), img_size)


def resize(image: np.ndarray, img_size: int) -> torch.Tensor:
    """Return an image, H x W x 3 uint8 RGB, with its longest side scaled to `img_size`."""
    resized = ResizeLongestSide(img_size).apply_image(image)
    return torch.from_numpy(np.ascontiguousarray(resized))


def normalize(resized: torch.Tensor, img_size: int) -> torch.Tensor:
    """Return the model's input from what `resize` returns, on the same device."""
    pixels = resized.permute(2, 0, 1).float()
    mean, std = _mean_and_std(pixels.device)
    height, width = resized.shape[:2]
    return F.pad((pixels - mean) / std, (0, img_size - width, 0, img_size - height))


@functools.cache  # copying them to a GPU would wait for all that it computes
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """SAM's mean and standard deviation of pixels, 3 x 1 x 1 each."""
    mean, std = torch.tensor([PIXEL_MEAN, PIXEL_STD], device=device).view(2, 3, 1, 1)
    return mean, std


def points_to_input(
    coords: np.ndarray, original_size: tuple[int, int], img_size: int
) -> np.ndarray:
    """Return ... x 2 points, (x, y) pixels, in the model's frame; float32."""
    moved = ResizeLongestSide(img_size).apply_coords(coords, original_size)
    return np.asarray(moved, dtype=np.float32)


def box_to_input(box: np.ndarray, original_size: tuple[int, int], img_size: int) -> np.ndarray:
    """Return a box of 4, XYXY, in the model's frame; float32."""
    return points_to_input(box.reshape(2, 2), original_size, img_size).reshape(4)


def masks_to_original(
    low_res_masks: torch.Tensor, original_size: tuple[int, int], img_size: int
) -> torch.Tensor:
    """Return mask logits in the original frame, as `Sam.postprocess_masks` does.

    Args:
        low_res_masks: P x C x h x w logits.

    Returns:
        P x C x H x W logits; above 0 is foreground.
    """
    height, width = input_size_of(original_size, img_size)
    masks = F.interpolate(
        low_res_masks, (img_size, img_size), mode="bilinear", align_corners=False
    )[..., :height, :width]
    return F.interpolate(masks, original_size, mode="bilinear", align_corners=False)
