"""A shape as it was drawn: read from annotation files, rasterised to masks."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One shape that covers an area.

    Attributes:
        index: in the file's `shapes` (COCO: `annotations`).
        label: without white space around it.
        kind: polygon, rectangle (2 or 4 points), oriented_rectangle, quadrilateral, circle or
            mask; rle if it comes from COCO.
        points: N x 2 float64, (x, y) pixels of the image as shown.
        group_id: shapes of one label and one group are one instance; None stands alone.
        png: for a mask, the PNG file whose top left pixel is at the first of its two points.
        rle: compressed COCO counts of the whole frame; the points are its box.
        drawn: 2 x 2 float64, opposite corners of the polygons that an rle was made of, which may
            reach out of the image; None if it was made of none.
    """

    index: int
    label: str
    kind: str
    points: np.ndarray
    group_id: int | str | None
    png: bytes | None = None
    rle: bytes | None = None
    drawn: np.ndarray | None = None
