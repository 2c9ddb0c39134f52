"""LabelMe JSON to validated shapes; the only module that knows LabelMe's keys.

A file that cannot be read at all raises one AnnotationError. A bad shape inside a good file
becomes an entry of `Annotation.problems`, and its neighbours go through.
"""

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samray.errors import AnnotationError

MAX_JSON_BYTES = 256 * 2**20
MAX_COORDINATE = 1e6  # pixels; farther than this from any image there is, and safe as an int

# Least number of points of each shape type that covers an area.
AREAL_SHAPES = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}
OTHER_SHAPES = ("line", "linestrip", "point", "points")


@dataclass(frozen=True)
class Shape:
    """One areal LabelMe shape.

    Attributes:
        index: its place in the file's `shapes`.
        label: without white space around it.
        kind: polygon, rectangle, circle or mask.
        points: N x 2 float64, (x, y) pixels of the image as shown.
        group_id: shapes of one label and one group are one instance; None stands alone.
        png: for a mask, the PNG file that fills the box between its two points.
    """

    index: int
    label: str
    kind: str
    points: np.ndarray
    group_id: int | str | None
    png: bytes | None = None


@dataclass
class Annotation:
    """What one LabelMe file says.

    Attributes:
        image_path: where the file says its image is, with forward slashes; "" if it does not.
        size: (H, W) that the annotator saw, or None.
        num_shapes: shapes in the file, good or bad.
        shapes: the good ones.
        problems: one error for each shape that cannot be used.
        warnings: (field, what was mended).
    """

    image_path: str
    size: tuple[int, int] | None
    num_shapes: int
    shapes: list[Shape] = field(default_factory=list)
    problems: list[AnnotationError] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def read_annotation(raw: bytes) -> Annotation:
    """Parse and check one LabelMe JSON file.

    Raises:
        AnnotationError: the file as a whole is no LabelMe annotation.
    """
    document = _read_json(raw)
    shapes = document.get("shapes")
    if not isinstance(shapes, list):
        raise AnnotationError(
            "shapes", "a LabelMe file has a list here; this is another kind of JSON, move it away"
        )
    image_path = document.get("imagePath")
    annotation = Annotation(
        image_path=image_path.replace("\\", "/") if isinstance(image_path, str) else "",
        size=_read_size(document),
        num_shapes=len(shapes),
    )
    for index, entry in enumerate(shapes):
        try:
            shape = _read_shape(index, entry)
        except AnnotationError as problem:
            annotation.problems.append(problem)
            continue
        if shape.label != entry["label"]:
            annotation.warnings.append(
                (f"shapes[{index}].label", f"white space around {entry['label']!r} was removed")
            )
        annotation.shapes.append(shape)
    return annotation


def labelme_document(
    image_path: str, size: tuple[int, int], shapes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a LabelMe file's content, for `json.dump`.

    Args:
        image_path: as seen from the JSON file's folder.
        size: (H, W) of the image as shown.
        shapes: dicts of `labelme_shape`.
    """
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def labelme_shape(
    label: str, kind: str, points: np.ndarray, group_id: int | None = None, png: bytes | None = None
) -> dict[str, Any]:
    """Return one LabelMe shape; points are N x 2, (x, y) pixels."""
    shape: dict[str, Any] = {
        "label": label,
        "points": np.asarray(points, dtype=float).tolist(),
        "group_id": group_id,
        "shape_type": kind,
        "flags": {},
    }
    if png is not None:
        shape["mask"] = base64.b64encode(png).decode()
    return shape


def _read_json(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_JSON_BYTES:
        raise AnnotationError(
            "file", f"is {len(raw) / 2**20:.0f} MiB; at most {MAX_JSON_BYTES // 2**20} are read"
        )
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as exc:
        raise AnnotationError("file", f"is not UTF-8 text (byte {exc.start})") from exc
    except json.JSONDecodeError as exc:
        raise AnnotationError(
            "file", f"is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
        ) from exc
    except (RecursionError, ValueError) as exc:
        raise AnnotationError(
            "file", "is JSON nested too deeply, or with a number of too many digits"
        ) from exc
    if not isinstance(document, dict):
        raise AnnotationError(
            "file", f"must hold a JSON object, not a {type(document).__name__}: no LabelMe file"
        )
    return document


def _read_size(document: dict[str, Any]) -> tuple[int, int] | None:
    height, width = document.get("imageHeight"), document.get("imageWidth")
    if height is None or width is None:
        return None  # files from before LabelMe 3 have no size
    for name, value in (("imageHeight", height), ("imageWidth", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise AnnotationError(name, f"must be a whole number of pixels, not {value!r:.60}")
    return height, width


def _read_shape(index: int, entry: Any) -> Shape:
    where = f"shapes[{index}]"
    if not isinstance(entry, dict):
        raise AnnotationError(where, f"must be an object, not {entry!r:.60}")
    label = entry.get("label")
    if not isinstance(label, str) or not label.strip():
        raise AnnotationError(
            f"{where}.label", f"must be a text that is not empty, not {label!r:.60}"
        )
    try:
        label.encode()
    except UnicodeEncodeError as exc:  # half of a surrogate pair, which no file can hold
        raise AnnotationError(f"{where}.label", f"is not Unicode text: {label!r:.60}") from exc
    label = label.strip()
    kind = entry.get("shape_type") or "polygon"  # files from before LabelMe 3.16 have polygons only
    if kind in OTHER_SHAPES:
        raise AnnotationError(
            f"{where}.shape_type", f"('{label}') is a {kind}, which covers no area; draw a polygon"
        )
    if not isinstance(kind, str) or kind not in AREAL_SHAPES:
        raise AnnotationError(
            f"{where}.shape_type",
            f"('{label}') is {kind!r:.60}; samray reads {', '.join(AREAL_SHAPES)}",
        )
    points = _read_points(f"{where}.points", label, kind, entry.get("points"))
    group_id = entry.get("group_id")
    if group_id is not None and (isinstance(group_id, bool) or not isinstance(group_id, int | str)):
        raise AnnotationError(
            f"{where}.group_id", f"must be a number or null, not {group_id!r:.60}"
        )
    png = _read_png(f"{where}.mask", entry.get("mask")) if kind == "mask" else None
    return Shape(index, label, kind, points, group_id, png)


def _read_points(where: str, label: str, kind: str, points: Any) -> np.ndarray:
    least = AREAL_SHAPES[kind]
    if not isinstance(points, list) or len(points) < least:
        count = f"{len(points)} points" if isinstance(points, list) else f"{points!r:.60}"
        raise AnnotationError(
            where, f"('{label}') is a {kind} of {count}; it needs at least {least}"
        )
    for number, point in enumerate(points):
        pair = isinstance(point, list) and len(point) == 2
        if not pair or not all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in point
        ):
            raise AnnotationError(
                f"{where}[{number}]", f"must be [x, y] in pixels, not {point!r:.60}"
            )
        if not all(abs(v) <= MAX_COORDINATE for v in point):  # NaN is not, either
            raise AnnotationError(
                f"{where}[{number}]",
                f"must be finite and within {MAX_COORDINATE:.0f} pixels, not {point!r:.60}",
            )
    return np.array(points, dtype=np.float64)


def _read_png(where: str, text: Any) -> bytes:
    try:
        text = "".join(text.split())  # some encoders wrap their lines
        png = base64.b64decode(text, validate=True)
    except (AttributeError, ValueError, binascii.Error) as exc:
        raise AnnotationError(where, "must be a PNG in base64") from exc
    if not png.startswith(b"\x89PNG"):
        raise AnnotationError(where, "must be a PNG in base64; its first bytes are not PNG's")
    return png
