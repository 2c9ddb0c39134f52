"""Views of an image to train on: flipped, turned and recoloured."""

from dataclasses import dataclass

import numpy as np

from samray.geometry.masks import CroppedMask

VIEWS_VERSION = 1  # part of the keys of a cache; raise it when `draw_view` changes


@dataclass(frozen=True)
class View:
    """How an image is shown. Every object stays wholly visible.

    Attributes:
        quarter_turns: counter-clockwise, 0 to 3.
        flipped: left to right, before the turns.
        contrast: factor of the difference from the mean.
        brightness: added, in levels of 0..255.
    """

    quarter_turns: int = 0
    flipped: bool = False
    contrast: float = 1.0
    brightness: float = 0.0

    def turn(self, array: np.ndarray) -> np.ndarray:
        """Flip and turn an image, a mask or a label map, H x W [x 3]."""
        array = array[:, ::-1] if self.flipped else array
        return np.ascontiguousarray(np.rot90(array, self.quarter_turns))

    def turn_crop(self, mask: CroppedMask, size: tuple[int, int]) -> CroppedMask:
        """Flip and turn a mask of an image of (H, W) = `size`, given by its crop."""
        (x, y), (height, width) = mask.origin, mask.pixels.shape
        frame_height, frame_width = size
        if self.flipped:
            x = frame_width - x - width
        for _ in range(self.quarter_turns):
            x, y = y, frame_width - x - width
            height, width = width, height
            frame_height, frame_width = frame_width, frame_height
        return CroppedMask(self.turn(mask.pixels), (x, y))

    def show(self, image: np.ndarray) -> np.ndarray:
        """Return the image as shown, of H x W x 3 uint8."""
        return self.recolour(self.turn(image))

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (H, W) of a turned image."""
        return (size[1], size[0]) if self.quarter_turns % 2 else size

    def recolour(self, image: np.ndarray) -> np.ndarray:
        """Change contrast and brightness of an image, H x W x 3 uint8."""
        if self.contrast == 1 and self.brightness == 0:
            return image
        mean = float(image.mean())
        levels = np.arange(256, dtype=np.float32)
        table = (levels - mean) * self.contrast + mean + self.brightness
        recoloured: np.ndarray = np.clip(np.rint(table), 0, 255).astype(np.uint8)[image]
        return recoloured


AS_IT_IS = View()


def draw_view(rng: np.random.Generator) -> View:
    """Draw one of the eight flips and turns, and a change of contrast and brightness."""
    return View(
        quarter_turns=int(rng.integers(4)),
        flipped=bool(rng.integers(2)),
        contrast=float(rng.uniform(0.8, 1.25)),
        brightness=float(rng.uniform(-20, 20)),
    )


def cached_view(image_digest: str, number: int) -> View:
    """Return one of an image's views in a cache, the same for all runs; number 0 is AS_IT_IS."""
    if number == 0:
        return AS_IT_IS
    return draw_view(np.random.default_rng([int(image_digest[:8], 16), number]))
