"""COCO instance JSON to checked annotations; the only module that knows COCO's keys.

One file annotates many images. It is read once; each image's part is checked in the task that
prepares the image, so a bad annotation affects no other.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from samray.data.annotation import MAX_COORDINATE, Annotation, read_json_object
from samray.errors import AnnotationError
from samray.geometry.masks import decompress_runs
from samray.geometry.polygons import MAX_OUTLINE
from samray.geometry.shapes import Shape

LISTS = ("images", "annotations", "categories")  # a COCO file has all of them
_FIRST_KEY = re.compile(
    rb'^(?:\xef\xbb\xbf)?\s*\{\s*"(info|licenses|images|annotations|categories)"'
)
MAX_PIXELS = 2**31  # of an image; pycocotools counts in 32 bits


@dataclass(frozen=True)
class CocoImage:
    """The part of a COCO file about one image, unchecked.

    Attributes:
        source: the JSON's path from the dataset's root.
        image_id: COCO's number of the image.
        file_name: where the file says the image is.
        size: (H, W).
        entries: (index in the file's `annotations`, entry).
        labels: category id -> name.
    """

    source: str
    image_id: int
    file_name: str
    size: tuple[int, int]
    entries: tuple[tuple[int, dict[str, Any]], ...]
    labels: dict[int, str]

    @property
    def name(self) -> str:
        """Names this part of the file in lists and errors."""
        return f"{self.source}#{self.image_id}"


def looks_like_coco(head: bytes) -> bool:
    """Whether the beginning of a JSON is COCO's: LabelMe files begin with other keys."""
    return _FIRST_KEY.match(head) is not None


def is_coco(raw: bytes) -> bool:
    """Whether a whole file is COCO's, not just its beginning."""
    if not looks_like_coco(raw[:4096]):
        return False
    try:
        read_coco(raw, "")
    except AnnotationError as problem:
        return problem.field not in LISTS
    return True


def read_coco(raw: bytes, source: str) -> tuple[list[CocoImage], list[tuple[str, str, int]]]:
    """Split a COCO instance file by image.

    Returns:
        images, and (field, reason, number of annotations) of what belongs to no image.

    Raises:
        AnnotationError: the file is not a COCO instance file.
    """
    document = read_json_object(raw)
    for key in LISTS:
        if not isinstance(document.get(key), list):
            raise AnnotationError(key, "a COCO instance file has a list here")
    labels = {
        entry["id"]: entry["name"].strip()
        for entry in document["categories"]
        if isinstance(entry, dict) and _is_int(entry.get("id")) and _is_name(entry.get("name"))
    }
    problems: list[tuple[str, str, int]] = []
    by_image: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for place, entry in enumerate(document["annotations"]):
        if not isinstance(entry, dict) or not _is_int(entry.get("image_id")):
            problems.append((f"annotations[{place}].image_id", "must be a whole number", 1))
        else:
            by_image[entry["image_id"]].append((place, entry))
    images: list[CocoImage] = []
    seen: set[int] = set()
    for place, entry in enumerate(document["images"]):
        try:
            image_id, file_name, size = _read_image(f"images[{place}]", entry)
            if image_id in seen:
                raise AnnotationError(f"images[{place}].id", f"{image_id!r:.60} occurs twice")
        except AnnotationError as problem:
            problems.append((problem.field, problem.reason, 0))
            continue
        seen.add(image_id)
        entries = tuple(by_image.pop(image_id, ()))
        images.append(CocoImage(source, image_id, file_name, size, entries, labels))
    for image_id, orphans in by_image.items():
        field = f"annotations[{orphans[0][0]}].image_id"
        problems.append((field, f"{image_id!r:.60} is not the id of a usable image", len(orphans)))
    return images, problems


def coco_annotation(image: CocoImage) -> Annotation:
    """Check one image's annotations; each instance becomes a shape of kind `rle`.

    Polygons are filled by pycocotools, RLE is taken as it is; a crowd is not a single object and
    is counted in `not_instances`.
    """
    annotation = Annotation(image.file_name, image.size, len(image.entries))
    for place, entry in image.entries:
        where = f"annotations[{place}]"
        if entry.get("iscrowd") == 1:
            annotation.not_instances.append((f"{where}.iscrowd", "crowd"))
            continue
        try:
            label = _read_label(f"{where}.category_id", entry.get("category_id"), image.labels)
            rle = _read_segmentation(f"{where}.segmentation", entry.get("segmentation"), image.size)
        except AnnotationError as problem:
            annotation.problems.append(problem)
            continue
        x, y, w, h = coco.toBbox({"counts": rle, "size": list(image.size)}).tolist()
        corners = np.array([[x, y], [max(x, x + w - 1), max(y, y + h - 1)]])
        annotation.shapes.append(Shape(place, label, "rle", corners, None, rle=rle))
    return annotation


def _read_image(where: str, entry: Any) -> tuple[int, str, tuple[int, int]]:
    if not isinstance(entry, dict) or not _is_int(entry.get("id")):
        raise AnnotationError(f"{where}.id", "must be a whole number")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise AnnotationError(f"{where}.file_name", "must name the image's file")
    size = []
    for key in ("height", "width"):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1e6:
            reason = f"must be a number of pixels, not {value!r:.60}"
            raise AnnotationError(f"{where}.{key}", reason)
        size.append(value)
    if size[0] * size[1] > MAX_PIXELS:
        reason = f"{size[1]} x {size[0]} pixels are more than any image that can be read"
        raise AnnotationError(f"{where}.width", reason)
    return entry["id"], file_name.replace("\\", "/"), (size[0], size[1])


def _read_label(where: str, category_id: Any, labels: dict[int, str]) -> str:
    if not _is_int(category_id):
        raise AnnotationError(where, f"must be a whole number, not {category_id!r:.60}")
    if category_id not in labels:
        raise AnnotationError(where, f"{category_id!r:.60} is not the id of a category with a name")
    return labels[category_id]


def _read_segmentation(where: str, segmentation: Any, size: tuple[int, int]) -> bytes:
    """Return compressed RLE counts.

    Raises:
        AnnotationError: it is neither polygons nor RLE, or covers no pixel.
    """
    if isinstance(segmentation, dict):
        counts = _read_counts(where, segmentation, size)
        rle = coco.frPyObjects({"counts": counts, "size": list(size)}, *size)
    elif isinstance(segmentation, list) and segmentation:
        parts = [_read_polygon(f"{where}[{n}]", part) for n, part in enumerate(segmentation)]
        rle = coco.merge(coco.frPyObjects(parts, *size))
    else:
        raise AnnotationError(where, "must be polygons or RLE; a box alone is no mask")
    if coco.area(rle) == 0:
        raise AnnotationError(where, "covers no pixel of the image")
    return bytes(rle["counts"])


def _read_polygon(where: str, part: Any) -> list[float]:
    numbers = isinstance(part, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and abs(v) <= MAX_COORDINATE
        for v in part
    )
    if not numbers or len(part) < 6 or len(part) % 2:
        raise AnnotationError(where, "must be x, y, x, y, ... of three points or more, in pixels")
    points = np.array(part, dtype=np.float64).reshape(-1, 2)
    # pycocotools allocates memory for every pixel of the outline, inside the image or not.
    length = np.abs(np.diff(points, axis=0, append=points[:1])).sum()
    if length > MAX_OUTLINE:
        raise AnnotationError(where, f"has an outline of {length:.0f} pixels, which is too long")
    return [float(v) for v in part]


def _read_counts(where: str, segmentation: dict[str, Any], size: tuple[int, int]) -> list[int]:
    """Runs of an RLE, checked: pycocotools writes out of bounds if they do not add up."""
    if segmentation.get("size") != list(size):
        raise AnnotationError(
            f"{where}.size", f"{segmentation.get('size')!r:.60} is not the image's {list(size)}"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        try:
            return list(decompress_runs(counts.encode("ascii"), size))
        except (AnnotationError, UnicodeEncodeError):
            counts = None
    if (
        not isinstance(counts, list)
        or not all(_is_int(run) and run >= 0 for run in counts)
        or sum(counts) != size[0] * size[1]
    ):
        raise AnnotationError(
            f"{where}.counts", f"must be runs that add up to the image's {size[0] * size[1]} pixels"
        )
    return counts


def _is_name(value: Any) -> bool:
    # Half of a surrogate pair is valid JSON but cannot be encoded as UTF-8.
    text = isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return text and bool(value.strip())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
