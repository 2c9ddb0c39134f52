"""LabelMe JSON to validated shapes; the only module that knows LabelMe's keys.

A file that cannot be read raises one AnnotationError. A bad shape in a readable file becomes an
entry of `Annotation.problems`, and the other shapes are used.
"""

import base64
import binascii
import hashlib
import io
import json
from typing import Any

import cv2
import numpy as np
from PIL import Image

from samray.data.annotation import MAX_COORDINATE, Annotation, read_json_object, whole_number
from samray.errors import AnnotationError
from samray.geometry.shapes import Shape

# Number of points of each shape type that covers an area; a polygon may have more.
AREAL_SHAPES = {
    "polygon": (3,),
    "rectangle": (2, 4),  # four in X-AnyLabeling's files
    "oriented_rectangle": (4,),
    "quadrilateral": (4,),  # of X-AnyLabeling: four free points
    "circle": (2,),
    "mask": (2,),
}
OTHER_NAMES = {"rotation": "oriented_rectangle"}  # X-AnyLabeling's name for the same
OTHER_SHAPES = ("line", "linestrip", "point", "points")


def read_annotation(raw: bytes) -> Annotation:
    """Parse and check one LabelMe JSON file.

    Raises:
        AnnotationError: the file as a whole is not a LabelMe annotation.
    """
    document = read_json_object(raw)
    shapes = document.get("shapes")
    if not isinstance(shapes, list):
        raise AnnotationError(
            "shapes", "a LabelMe file has a list here; this is another kind of JSON, move it away"
        )
    image_path = document.get("imagePath")
    image_data = document.get("imageData")
    annotation = Annotation(
        image_path=image_path.replace("\\", "/") if isinstance(image_path, str) else "",
        size=_read_size(document, len(shapes)),
        num_shapes=len(shapes),
        image_data=image_data if isinstance(image_data, str) and image_data else None,
    )
    seen: dict[tuple[Any, ...], int] = {}
    for index, entry in enumerate(shapes):
        kind = entry.get("shape_type") if isinstance(entry, dict) else None
        if isinstance(kind, str) and kind in OTHER_SHAPES:
            annotation.not_instances.append((f"shapes[{index}].shape_type", kind))
            continue
        try:
            shape = _read_shape(index, entry)
        except AnnotationError as problem:
            annotation.problems.append(problem)
            continue
        if shape.label != entry["label"]:
            annotation.warnings.append(
                (f"shapes[{index}].label", f"white space around {entry['label']!r:.60} was removed")
            )
        content = (shape.label, shape.kind, shape.points.tobytes(), shape.png, shape.group_id)
        first = seen.setdefault(content, index)
        if first != index:
            reason = f"({shape.label!r:.60}) is a duplicate of shapes[{first}]; remove one"
            annotation.problems.append(AnnotationError(f"shapes[{index}]", reason))
            continue
        annotation.shapes.append(shape)
    return annotation


def read_shapes(entries: list[dict[str, Any]]) -> list[Shape]:
    """Read dicts of `labelme_shape` back.

    Raises:
        AnnotationError: one of them is no usable shape.
    """
    return [_read_shape(index, entry) for index, entry in enumerate(entries)]


def embedded_image(image_data: str) -> bytes:
    """Return the bytes of the image that a LabelMe file embeds.

    Raises:
        AnnotationError: field `imageData`; it is not base64.
    """
    try:
        return base64.b64decode("".join(image_data.split()), validate=True)
    except (ValueError, binascii.Error) as exc:
        raise AnnotationError("imageData", "must be an image file in base64, or null") from exc


def labelme_document(
    image_path: str, size: tuple[int, int], shapes: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a LabelMe file's content, for `json.dump`.

    Args:
        image_path: relative to the JSON file's folder.
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


def shapes_digest(document: dict[str, Any]) -> str:
    """Return a digest of a LabelMe file's shapes and flags, by which a later correction is seen.

    Raises:
        KeyError: it has no shapes.
    """
    content = document["shapes"]
    if flags := document.get("flags"):  # none in files that samray writes
        content = [content, flags]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def mask_to_shapes(mask: np.ndarray, label: str, tolerance: float = 0.5) -> list[dict[str, object]]:
    """Return LabelMe shapes that rasterise to the mask.

    Each part becomes a polygon; several parts share a group_id. LabelMe polygons have no holes,
    so a mask with a hole becomes one shape of type `mask`.

    Args:
        mask: H x W bool.
        label: for every shape.
        tolerance: pixels by which a polygon may deviate from the outline.
    """
    if not mask.any():
        return []
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    if (hierarchy[0, :, 3] >= 0).any():
        return [mask_shape(mask, label)]
    polygons = []
    for contour in contours:
        points = cv2.approxPolyDP(contour, tolerance, closed=True)[:, 0]
        if (
            len(points) < 3
        ):  # a pixel or a line of them: LabelMe needs three points, not all the same
            within = points[-1] + np.array([[0.25, 0], [0, 0.25]])  # of the last pixel
            points = np.concatenate([points, within])[:3]
        polygons.append(points)
    group_id = 1 if len(polygons) > 1 else None
    return [labelme_shape(label, "polygon", points, group_id) for points in polygons]


def mask_shape(mask: np.ndarray, label: str) -> dict[str, object]:
    """Return a LabelMe shape of type `mask`, a PNG and its box: exact for any mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1], rows[-1]
    buffer = io.BytesIO()
    Image.fromarray(mask[y1 : y2 + 1, x1 : x2 + 1]).save(buffer, format="PNG")
    corners = np.array([[x1, y1], [x2, y2]])
    return labelme_shape(label, "mask", corners, png=buffer.getvalue())


def _read_size(document: dict[str, Any], num_shapes: int) -> tuple[int, int] | None:
    names = ("imageHeight", "imageWidth")
    if any(document.get(name) is None for name in names):
        return None  # files from before LabelMe 3 have no size
    height, width = (_read_pixels(name, document[name], num_shapes) for name in names)
    return height, width


def _read_pixels(name: str, value: Any, num_shapes: int) -> int:
    number = whole_number(value)
    if number is None or not 1 <= number <= MAX_COORDINATE:
        reason = f"must be a whole number of pixels, not {value!r:.60}"
        raise AnnotationError(name, reason, num_shapes)
    return number


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
    except UnicodeEncodeError as exc:  # half of a surrogate pair, which UTF-8 cannot encode
        raise AnnotationError(f"{where}.label", f"is not Unicode text: {label!r:.60}") from exc
    label = label.strip()
    kind = entry.get("shape_type") or "polygon"  # files from before LabelMe 3.16 have polygons only
    if isinstance(kind, str):
        kind = OTHER_NAMES.get(kind, kind)
    if not isinstance(kind, str) or kind not in AREAL_SHAPES:
        raise AnnotationError(
            f"{where}.shape_type",
            f"({label!r:.60}) is {kind!r:.60}; samray reads {', '.join(AREAL_SHAPES)}",
        )
    points = _read_points(f"{where}.points", label, kind, entry.get("points"))
    group_id = _read_group(f"{where}.group_id", entry.get("group_id"))
    png = _read_png(f"{where}.mask", entry.get("mask")) if kind == "mask" else None
    return Shape(index, label, kind, points, group_id, png)


def _read_group(where: str, value: Any) -> int | str | None:
    if value is None or isinstance(value, str):  # a text is a name, also that of a number
        return value
    number = whole_number(value)
    if number is None:
        raise AnnotationError(where, f"must be a whole number or null, not {value!r:.60}")
    return number


def _read_points(where: str, label: str, kind: str, points: Any) -> np.ndarray:
    numbers = AREAL_SHAPES[kind]
    known = isinstance(points, list)
    if not known or not (len(points) in numbers or (kind == "polygon" and len(points) > 3)):
        count = f"{len(points)} points" if known else f"{points!r:.60}"
        wanted = "3 or more" if kind == "polygon" else " or ".join(map(str, numbers))
        raise AnnotationError(where, f"({label!r:.60}) is a {kind} of {count}; it needs {wanted}")
    for number, point in enumerate(points):
        # By type, not isinstance: JSON has no other number types, and a bool is not a number.
        pair = isinstance(point, list) and len(point) == 2
        if not pair or type(point[0]) not in (int, float) or type(point[1]) not in (int, float):
            raise AnnotationError(
                f"{where}[{number}]", f"must be [x, y] in pixels, not {point!r:.60}"
            )
        x, y = point
        if not (abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE):  # also refuses NaN
            raise AnnotationError(
                f"{where}[{number}]",
                f"must be finite and within {MAX_COORDINATE:.0f} pixels, not {point!r:.60}",
            )
    if kind == "polygon" and all(point == points[0] for point in points):
        # A double click leaves such a polygon, which would become an object of one pixel.
        raise AnnotationError(
            where,
            f"({label!r:.60}) is a polygon whose points are all the same; delete it or draw it "
            "again",
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
