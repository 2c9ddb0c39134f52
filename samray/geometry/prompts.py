"""Masks to prompts: points and boxes as a person would give them.

Coordinates are (x, y) pixels of the original image. A box prompt is a box, never its corners as
points, because those lie outside the object.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from samray.config import MAX_BOX_NOISE
from samray.errors import EmptyMaskError

STRATEGIES = ("center", "random", "bbox")


@dataclass(frozen=True)
class Prompt:
    """The prompt of one instance: points, or a box.

    Attributes:
        point_coords: N x 2 float32, (x, y) pixels; None for a box.
        point_labels: N int64, 1 foreground, 0 background; None for a box.
        box: 4 float32, XYXY; None for points.
    """

    point_coords: np.ndarray | None = None
    point_labels: np.ndarray | None = None
    box: np.ndarray | None = None

    @property
    def layout(self) -> tuple[int, bool]:
        """(number of points, has a box): only prompts of one layout are decoded together.

        Padding points in a shorter prompt would change the logits.
        """
        return (0 if self.point_coords is None else len(self.point_coords), self.box is not None)

    def moved(self, x: int, y: int) -> "Prompt":
        """Move it by (x, y) pixels."""
        shift = np.array([x, y], np.float32)
        coords = None if self.point_coords is None else self.point_coords + shift
        box = None if self.box is None else self.box + np.tile(shift, 2)
        return replace(self, point_coords=coords, box=box)

    def with_point(self, point_coords: np.ndarray, label: int) -> "Prompt":
        """Add one point, 1 x 2, of label 1 foreground or 0 background."""
        labels = np.array([label], dtype=np.int64)
        if self.point_coords is not None and self.point_labels is not None:
            point_coords = np.concatenate([self.point_coords, point_coords])
            labels = np.concatenate([self.point_labels, labels])
        return replace(self, point_coords=point_coords, point_labels=labels)


def draw_prompt(
    strategy: str,
    mask: np.ndarray,
    num_points: int,
    rng: np.random.Generator,
    box_noise: float = 0.0,
    mixture: tuple[float, ...] = (1, 1, 1),
    frame: tuple[int, int, int, int] | None = None,
) -> Prompt:
    """Return the prompt that a strategy gives for one mask.

    Args:
        strategy: `center` (the innermost pixel, further points random), `random`, `bbox`,
            `mixed`, which draws one of the three, or `interactive`, which draws one of the three
            with a single point, as the start of correction clicks.
        mask: H x W bool with at least one True pixel.
        num_points: number of points, for center and random.
        rng: random generator; `center` with one point does not draw from it.
        box_noise: see `tight_box`.
        mixture: weights with which `mixed` and `interactive` draw each of STRATEGIES.
        frame: XYXY of the image, if `mask` is a crop of it, in the crop's pixels.

    Raises:
        EmptyMaskError: no pixel is True.
    """
    if strategy == "interactive":
        strategy, num_points = "mixed", 1
    if strategy == "mixed":
        shares = np.array(mixture) / sum(mixture)
        strategy = STRATEGIES[rng.choice(len(STRATEGIES), p=shares)]
    if strategy == "bbox":
        return Prompt(box=tight_box(mask, rng, box_noise, frame))
    if strategy == "center":
        points = center_point(mask)
        if num_points > 1:
            points = np.concatenate([points, random_points(mask, num_points - 1, rng)])
    elif strategy == "random":
        points = random_points(mask, num_points, rng)
    else:
        raise ValueError(
            f"unknown strategy {strategy!r}; choose from {STRATEGIES}, mixed, interactive"
        )
    return Prompt(point_coords=points, point_labels=np.ones(len(points), dtype=np.int64))


def center_point(mask: np.ndarray) -> np.ndarray:
    """Return the pixel farthest from the mask's edge.

    A centroid can fall outside a crescent or ring; this point cannot (the RITM clicker's rule,
    also used in SAM's evaluation).

    Args:
        mask: H x W bool with at least one True pixel; the frame's border counts as an edge.

    Returns:
        1 x 2 float32, (x, y).

    Raises:
        EmptyMaskError: no pixel is True.
    """
    return _innermost(mask)[0]


def correction_point(mask: np.ndarray, gt_mask: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Return where a person would click next: the innermost pixel of the deepest error.

    The RITM clicker's rule (Sofiiuk et al., 2022): of the false negative and the false positive
    region the one that is deeper, and in it the pixel farthest from its edge.

    Args:
        mask, gt_mask: H x W bool.

    Returns:
        (1 x 2 float32 (x, y), 1 if it was missed or 0 if it is too much), or None without errors.
    """
    missed, spilled = gt_mask & ~mask, mask & ~gt_mask
    errors = [(region, label) for region, label in ((missed, 1), (spilled, 0)) if region.any()]
    if not errors:
        return None
    found = [(*_innermost(region), label) for region, label in errors]
    point, _, label = max(found, key=lambda candidate: candidate[1])
    return point, label


def _innermost(mask: np.ndarray) -> tuple[np.ndarray, float]:
    """The pixel farthest from the edge, 1 x 2 float32 (x, y), and its squared distance."""
    x1, y1, x2, y2 = _bounds(mask)
    crop = np.pad(mask[y1:y2, x1:x2].astype(np.uint8), 1)
    distance = cv2.distanceTransform(crop, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # Squared distances are whole numbers, and ties are common. OpenCV's roots depend in the last
    # digit on the array's place in memory, so that the same run could pick another pixel.
    squared = np.rint(distance.astype(np.float64) ** 2)
    y, x = np.unravel_index(int(squared.argmax()), squared.shape)
    point = np.array([[x1 + x - 1, y1 + y - 1]], dtype=np.float32)
    return point, float(squared[y, x])


def random_points(mask: np.ndarray, num_points: int, rng: np.random.Generator) -> np.ndarray:
    """Return pixels drawn uniformly from the mask, distinct ones if it has enough.

    Args:
        mask: H x W bool with at least one True pixel.

    Returns:
        num_points x 2 float32, (x, y).

    Raises:
        EmptyMaskError: no pixel is True.
    """
    x1, y1, x2, y2 = _bounds(mask)
    rows, columns = np.nonzero(mask[y1:y2, x1:x2])
    chosen = rng.choice(len(rows), size=num_points, replace=num_points > len(rows))
    return np.stack([columns[chosen] + x1, rows[chosen] + y1], axis=1).astype(np.float32)


def tight_box(
    mask: np.ndarray,
    rng: np.random.Generator | None = None,
    noise: float = 0.0,
    frame: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Return the box around the mask, with noise on its corners if asked.

    Args:
        mask: H x W bool with at least one True pixel.
        noise: standard deviation of each corner's shift, as a share of the box's side; a shift is
            at most MAX_BOX_NOISE pixels (Segment Anything, appendix A). The box stays in the image
            and at least one pixel wide.
        frame: XYXY of the image; None: the mask's own frame.

    Returns:
        4 float32, XYXY.

    Raises:
        EmptyMaskError: no pixel is True.
    """
    box = np.array(_bounds(mask), dtype=np.float32)
    if rng is None or noise == 0:
        return box
    left, top, right, bottom = frame or (0, 0, mask.shape[1], mask.shape[0])
    sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
    shift = np.clip(rng.normal(0, 1, 4) * noise * sides, -MAX_BOX_NOISE, MAX_BOX_NOISE)
    x1, y1, x2, y2 = np.clip(box + shift, [left, top] * 2, [right, bottom] * 2)
    if x2 - x1 < 1 or y2 - y1 < 1:
        return box
    return np.array([x1, y1, x2, y2], dtype=np.float32)


def _bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """XYXY of the mask; x2 and y2 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        raise EmptyMaskError(f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels has none set")
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
