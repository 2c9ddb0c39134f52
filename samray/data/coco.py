"""COCO instance JSON to checked annotations; the only module that knows COCO's keys.

One file annotates many images. It is read once; each image's part is checked in the task that
prepares the image, so a bad annotation affects no other.
"""

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco

from samray.data.annotation import (
    IGNORE,
    MAX_COORDINATE,
    Annotation,
    is_int,
    read_json_object,
    whole_number,
)
from samray.errors import AnnotationError
from samray.geometry.masks import decompress_runs
from samray.geometry.polygons import MAX_OUTLINE
from samray.geometry.shapes import Shape

Id = int | str  # "17", 17 and 17.0 are one id
_FIRST_KEY = re.compile(
    rb'^(?:\xef\xbb\xbf)?\s*\{\s*"(info|licenses|images|annotations|categories)"'
)
_LABELME_KEY = re.compile(rb'"(shapes|imagePath|imageData)"\s*:')
MAX_PIXELS = 2**31  # of an image; pycocotools counts in 32 bits
# Of an annotation, what `coco_annotation` reads. Exports add keys of their own, nested at will.
_READ_KEYS = ("category_id", "iscrowd", "segmentation")
_NESTS = {dict, list}  # by type, not isinstance: JSON has no others, and every number is looked at
_MAX_LEVELS = 8  # of lists in lists; a segmentation has two


@dataclass(frozen=True)
class CocoImage:
    """The part of a COCO file about one image, unchecked.

    Attributes:
        source: the JSON's path from the dataset's root.
        image_id: COCO's id of the image.
        file_name: where the file says the image is.
        size: (H, W).
        entries: (index in the file's `annotations`, entry with the keys that are read).
        labels: category id -> name; None if several categories have the id.
    """

    source: str
    image_id: Id
    file_name: str
    size: tuple[int, int]
    entries: tuple[tuple[int, dict[str, Any]], ...]
    labels: dict[Id, str | None]

    @property
    def name(self) -> str:
        """Names this part of the file in lists and errors."""
        return f"{self.source}#{self.image_id}"

    @property
    def content(self) -> str:
        """A text that changes when anything does that decides the image's outcome.

        Of the categories, only those of its own annotations are in it: a file has up to a thousand.
        """
        used = dict.fromkeys(_id(entry.get("category_id")) for _, entry in self.entries)
        labels = [(key, self.labels[key]) for key in used if key in self.labels]
        place = [self.source, self.image_id, self.file_name, self.size]
        return json.dumps([*place, self.entries, labels])


def may_be_coco(head: bytes) -> bool:
    """Whether a JSON with this beginning must be read as a whole to know that it is not COCO's."""
    return _FIRST_KEY.match(head) is not None or not _LABELME_KEY.search(head)


def is_coco(raw: bytes) -> bool:
    """Whether a file is COCO's by its content: an object with lists of images and annotations."""
    looks_like_it = _FIRST_KEY.match(raw) is not None
    if not looks_like_it and not (b'"images"' in raw and b'"annotations"' in raw):
        return False  # without parsing it: LabelMe files embed images
    try:
        document = read_json_object(raw)
    except AnnotationError:  # damaged
        return looks_like_it
    return all(isinstance(document.get(key), list) for key in ("images", "annotations"))


def read_coco(raw: bytes, source: str) -> tuple[list[CocoImage], list[tuple[str, str, int]]]:
    """Split a COCO instance file by image.

    Returns:
        images, and (field, reason, number of annotations) of what belongs to no image.

    Raises:
        AnnotationError: the file is not a COCO instance file.
    """
    document = read_json_object(raw)
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise AnnotationError(key, "a COCO instance file has a list here; export it again")
    labels = _read_categories(document["categories"])
    problems: list[tuple[str, str, int]] = []
    by_image: dict[Id, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for place, entry in enumerate(document["annotations"]):
        image_id = _id(entry.get("image_id")) if isinstance(entry, dict) else None
        if image_id is None:
            problems.append((f"annotations[{place}].image_id", "must be a number or text", 1))
            continue
        content = {key: entry[key] for key in _READ_KEYS if key in entry}
        if _is_deeper(content, _MAX_LEVELS):
            reason = f"has lists in lists of more than {_MAX_LEVELS} levels; export it again"
            problems.append((f"annotations[{place}]", reason, 1))
        else:
            by_image[image_id].append((place, content))
    listed: dict[Id, dict[tuple[str, tuple[int, int]], int]] = defaultdict(dict)
    for place, entry in enumerate(document["images"]):
        try:
            image_id, file_name, size = _read_image(f"images[{place}]", entry)
        except AnnotationError as problem:
            problems.append((problem.field, problem.reason, 0))
            continue
        listed[image_id].setdefault((file_name, size), place)
    images: list[CocoImage] = []
    for image_id, found in listed.items():
        entries = tuple(by_image.pop(image_id, ()))
        if len(found) > 1:  # two files pasted together: nothing says which annotation is whose
            problems += _shared_id(image_id, found, len(entries))
            continue
        ((file_name, size),) = found
        images.append(CocoImage(source, image_id, file_name, size, entries, labels))
    for image_id, orphans in by_image.items():
        field = f"annotations[{orphans[0][0]}].image_id"
        problems.append((field, f"{image_id!r:.60} is not the id of a usable image", len(orphans)))
    return images, problems


def coco_annotation(image: CocoImage, crowd_as_instances: bool = False) -> Annotation:
    """Check one image's annotations; each instance becomes a shape of kind `rle`.

    Polygons are filled by pycocotools, RLE is taken as it is; a crowd is not a single object and
    is counted in `not_instances`, unless `crowd_as_instances` or its category is `__ignore__`.
    """
    annotation = Annotation(image.file_name, image.size, len(image.entries))
    seen: dict[tuple[str, bytes], int] = {}
    for place, entry in image.entries:
        where = f"annotations[{place}]"
        crowd = entry.get("iscrowd") is True or whole_number(entry.get("iscrowd")) == 1
        category = _id(entry.get("category_id"))
        region = category is not None and image.labels.get(category) == IGNORE
        if crowd and not crowd_as_instances and not region:
            annotation.not_instances.append((f"{where}.iscrowd", "crowd"))
            continue
        try:
            label = _read_label(f"{where}.category_id", entry.get("category_id"), image.labels)
            rle, short, drawn = _read_segmentation(
                f"{where}.segmentation", entry.get("segmentation"), image.size
            )
            first = seen.setdefault((label, rle), place)
            if first != place:
                reason = f"({label!r:.60}) is a duplicate of annotations[{first}]; remove one"
                raise AnnotationError(where, reason)
        except AnnotationError as problem:
            annotation.problems.append(problem)
            continue
        annotation.warnings += [
            (field, "is a part of fewer than three points; left out") for field in short
        ]
        x, y, w, h = coco.toBbox({"counts": rle, "size": list(image.size)}).tolist()
        corners = np.array([[x, y], [max(x, x + w - 1), max(y, y + h - 1)]])
        annotation.shapes.append(Shape(place, label, "rle", corners, None, rle=rle, drawn=drawn))
    return annotation


def _read_categories(entries: list[Any]) -> dict[Id, str | None]:
    """{id: name} of the usable categories; None for an id that several names share."""
    labels: dict[Id, str | None] = {}
    for entry in entries:
        if isinstance(entry, dict) and _is_name(entry.get("name")):
            category_id, name = _id(entry.get("id")), entry["name"].strip()
            if category_id is not None:
                labels[category_id] = name if labels.get(category_id, name) == name else None
    return labels


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a value is nested so deeply that to write it down, or send it on, might fail."""
    found = [value]
    for _ in range(levels):
        inside = (v.values() if type(v) is dict else v for v in found)
        found = [child for part in inside for child in part if type(child) in _NESTS]
        if not found:
            return False
    return True


def _shared_id(
    image_id: Id, found: dict[tuple[str, tuple[int, int]], int], num_annotations: int
) -> list[tuple[str, str, int]]:
    """Problems of images that have one id; the first counts their annotations."""
    names = ", ".join(repr(name)[:60] for name, _ in list(found)[:3])
    reason = (
        f"{image_id!r:.60} is the id of {len(found)} images ({names}), so nothing says whose its "
        "annotations are; export the files again, one by one"
    )
    return [
        (f"images[{place}].id", reason, 0 if number else num_annotations)
        for number, place in enumerate(found.values())
    ]


def _read_image(where: str, entry: Any) -> tuple[Id, str, tuple[int, int]]:
    image_id = _id(entry.get("id")) if isinstance(entry, dict) else None
    if image_id is None:
        raise AnnotationError(f"{where}.id", "must be a number or text")
    file_name = entry.get("file_name")
    if not _is_name(file_name):
        raise AnnotationError(f"{where}.file_name", "must name the image's file")
    size = []
    for key in ("height", "width"):
        value = whole_number(entry.get(key))
        if value is None or not 1 <= value <= 1e6:
            reason = f"must be a number of pixels, not {entry.get(key)!r:.60}"
            raise AnnotationError(f"{where}.{key}", reason)
        size.append(value)
    if size[0] * size[1] > MAX_PIXELS:
        reason = f"{size[1]} x {size[0]} pixels are more than any image that can be read"
        raise AnnotationError(f"{where}.width", reason)
    return image_id, file_name.replace("\\", "/"), (size[0], size[1])


def _read_label(where: str, value: Any, labels: dict[Id, str | None]) -> str:
    category_id = _id(value)
    if category_id is None:
        raise AnnotationError(where, f"must be a whole number or text, not {value!r:.60}")
    if category_id not in labels:
        raise AnnotationError(where, f"{category_id!r:.60} is not the id of a category with a name")
    label = labels[category_id]
    if label is None:
        raise AnnotationError(where, f"{category_id!r:.60} is the id of categories of two names")
    return label


def _read_segmentation(
    where: str, segmentation: Any, size: tuple[int, int]
) -> tuple[bytes, list[str], np.ndarray | None]:
    """Return compressed RLE counts, the parts of too few points beside good ones, `Shape.drawn`.

    Raises:
        AnnotationError: it is neither polygons nor RLE, or covers no pixel.
    """
    short: list[str] = []
    drawn = None
    if isinstance(segmentation, dict):
        counts = _read_counts(where, segmentation, size)
        rle = coco.frPyObjects({"counts": counts, "size": list(size)}, *size)
    elif isinstance(segmentation, list) and segmentation:
        places = {f"{where}[{n}]": part for n, part in enumerate(segmentation)}
        short = [field for field, part in places.items() if _is_short(part)]
        if len(short) == len(places):
            short = []  # none is good: say so of the first
        parts = [_read_polygon(field, places[field]) for field in places if field not in short]
        rle = coco.merge(coco.frPyObjects(parts, *size))
        points = np.concatenate(parts).reshape(-1, 2)
        drawn = np.stack([points.min(axis=0), points.max(axis=0)])
    else:
        raise AnnotationError(where, "must be polygons or RLE; a box alone is no mask")
    if coco.area(rle) == 0:
        raise AnnotationError(where, "covers no pixel of the image")
    return bytes(rle["counts"]), short, drawn


def _is_short(part: Any) -> bool:
    """Whether a part is two points or fewer: tools leave such parts of a cut or a click."""
    return (
        isinstance(part, list)
        and len(part) in (0, 2, 4)
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in part)
    )


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
    said = segmentation.get("size")
    if not isinstance(said, list) or [whole_number(side) for side in said] != list(size):
        raise AnnotationError(f"{where}.size", f"{said!r:.60} is not the image's {list(size)}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        try:
            return list(decompress_runs(counts.encode("ascii"), size))
        except (AnnotationError, UnicodeEncodeError):
            counts = None
    if (
        not isinstance(counts, list)
        or not all(is_int(run) and run >= 0 for run in counts)
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


def _id(value: Any) -> Id | None:
    """An id in one form, so that "17", 17 and 17.0 are equal; None if the value is no id."""
    number = whole_number(value)
    if number is None and _is_name(value) and len(value) <= 200 and value.isprintable():
        return str(value)
    return number
