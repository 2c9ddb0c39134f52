"""One file of a raw dataset to rows of a shard, and to the story of what became of it.

`read_entry` reads down the page: find the image, read and check both, rasterise the shapes, cut
a large picture into tiles. Bad input ends in the story, never in an exception.
"""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from samray.data.annotation import MAX_JSON_BYTES, Annotation
from samray.data.coco import CocoImage, coco_annotation, is_coco
from samray.data.discovery import RawFiles, find_by_stem, find_image, find_listed_image
from samray.data.labelme import IGNORED_LABELS, embedded_image, read_annotation
from samray.errors import AnnotationError, StorageError
from samray.geometry.drawing import draw_masks, encode_picture, shrink
from samray.geometry.images import decode_and_stretch, read_image_file
from samray.geometry.masks import CroppedMask, encode_rle, rasterize_instance, require_inside
from samray.geometry.shapes import Shape
from samray.geometry.tiles import Window, place_in_tiles, tile_windows
from samray.storage import Place, make_folder, read_bytes, write_bytes


@dataclass(frozen=True)
class Entry:
    """What one outcome speaks of.

    Attributes:
        name: a JSON's path from the root, `file.json#image_id` in a COCO file, or an image's path.
        kind: labelme, coco, or image (one that no annotation speaks of).
        stamp: a text that changes when its content does.
        coco: of a COCO file, its part.
    """

    name: str
    kind: Literal["labelme", "coco", "image"]
    stamp: str
    coco: CocoImage | None = None

    @classmethod
    def of_coco(cls, image: CocoImage) -> "Entry":
        """Wrap one image's part of a COCO file."""
        content = json.dumps(asdict(image), sort_keys=True, default=str)
        return cls(image.name, "coco", hashlib.sha256(content.encode()).hexdigest(), image)


@dataclass(frozen=True)
class Rules:
    """The settings that decide what becomes of an entry; as in `PrepareConfig`.

    Attributes:
        label_map: old label -> new, or None to drop it.
        overlays: names of the entries to draw.
    """

    label_map: dict[str, str | None]
    labels: tuple[str, ...] | None
    max_megapixels: float
    join_groups: bool
    tile: int | None
    overlap: int
    overlays: frozenset[str]


def is_current(outcome: dict[str, Any], entry: Entry, files: RawFiles) -> bool:
    """Whether reading an entry again would end in the same outcome: neither it nor its image has
    changed, nor has any file come or gone that makes it mean another image."""
    name, problem = _image_of(entry, outcome["image_path"], files)
    now = (entry.stamp, name, problem and problem.reason, name and files.stamps.get(name))
    if now != tuple(outcome[key] for key in ("stamp", "found", "not_found", "image_stamp")):
        return False
    # A JSON that carries its own image claims itself.
    return outcome["claims"] in (entry.name, name or _claim_by_stem(entry, files))


def _image_of(
    entry: Entry, image_path: str | None, files: RawFiles
) -> tuple[str | None, AnnotationError | None]:
    """Return the image that an entry speaks of, or why there is none.

    Args:
        image_path: what the annotation says; None if it cannot be read.
    """
    if entry.kind == "image":
        return entry.name, None
    try:
        if entry.coco is not None:
            return find_listed_image(entry.coco.source, entry.coco.file_name, files), None
        if image_path is not None:
            return find_image(entry.name, image_path, files), None
    except AnnotationError as problem:
        return None, problem
    return _claim_by_stem(entry, files), None


def _claim_by_stem(entry: Entry, files: RawFiles) -> str | None:
    """The image of a JSON that cannot be used: annotated badly is not unlabelled."""
    if entry.kind != "labelme":
        return None
    path = PurePosixPath(entry.name)
    try:
        return find_by_stem(path.parent, path.stem, files)
    except AnnotationError:
        return None


def read_entry(
    entry: Entry, files: RawFiles, rules: Rules, overlays: Place
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read, check and rasterise one entry.

    Args:
        overlays: folder for the pictures that `rules` wants.

    Returns:
        outcome: what became of it; `claims` is the image it speaks of, good or bad.
        rows: of the shard (`samray.data.dataset.SCHEMA`): none, one, or one for each tile.

    Raises:
        StorageError: S3 does not answer; it is not the entry's fault.
    """
    outcome: dict[str, Any] = {
        "entry": entry.name,
        "stamp": entry.stamp,
        "image_path": None,
        "found": None,
        "not_found": None,
        "image_stamp": None,
        "annotation": None if entry.kind == "image" else entry.name,
        "claims": None,
        "image": None,
        "num_shapes": 0,
        "labels": {},
        "filtered": {},
        "joined": 0,
        "not_instances": {},
        "rejected": [],
        "warnings": [],
    }
    annotation = Annotation(image_path="", size=None, num_shapes=0)
    failure: AnnotationError | None = None
    try:
        if entry.coco is not None:
            annotation = coco_annotation(entry.coco)
        elif entry.kind == "labelme":
            raw = read_bytes(files.root / entry.name, MAX_JSON_BYTES)
            if is_coco(raw):
                raise AnnotationError(
                    "file", "is COCO's but has an image's name; rename it, e.g. to instances.json"
                )
            annotation = read_annotation(raw)
        outcome["image_path"] = annotation.image_path
    except StorageError:
        raise
    except AnnotationError as exc:
        failure = exc
    except OSError as exc:
        failure = AnnotationError("file", str(exc.strerror))
    outcome["num_shapes"] = annotation.num_shapes
    name, problem = _image_of(entry, outcome["image_path"], files)
    outcome |= {"found": name, "not_found": problem and problem.reason}
    outcome["claims"] = name or _claim_by_stem(entry, files)
    outcome["image_stamp"] = name and files.stamps.get(name)
    try:
        if failure is not None:
            raise failure
        raw, outcome["claims"], image, stretch = _read_image(
            name, problem, entry, annotation, files, rules
        )
    except AnnotationError as exc:
        outcome["rejected"].append(rejection(entry.name, exc, outcome["num_shapes"]))
        return outcome, []
    size = (image.shape[0], image.shape[1])
    outcome["rejected"] += [rejection(entry.name, p, 1) for p in annotation.problems]
    outcome["warnings"] += [
        {"file": entry.name, "field": field, "reason": reason}
        for field, reason in annotation.warnings
    ]
    outcome["not_instances"] = dict(Counter(kind for _, kind in annotation.not_instances))
    instances = _instances(entry.name, annotation, size, rules, outcome)
    if entry.name in rules.overlays:
        _write_overlay(overlays, outcome["claims"], image, [mask for _, mask in instances])
    rows = _rows(outcome, raw, image, instances, rules)
    outcome["image"]["stretch"] = stretch
    return outcome, rows


def _read_image(
    name: str | None,
    problem: AnnotationError | None,
    entry: Entry,
    annotation: Annotation,
    files: RawFiles,
    rules: Rules,
) -> tuple[bytes, str, np.ndarray, tuple[float, float] | None]:
    """Return the image's bytes, the name of its record, its pixels, and how they were stretched.

    Raises:
        AnnotationError: there is no such image, or it cannot be used with this annotation.
    """
    field = "image"
    try:
        if name is not None:
            raw = read_image_file(files.root / name)
        elif annotation.image_data is not None:
            name, field = entry.name, "imageData"
            raw = embedded_image(annotation.image_data)
        else:
            assert problem is not None
            raise problem
        image, stretch = decode_and_stretch(raw, rules.max_megapixels)
    except StorageError:
        raise
    except AnnotationError as exc:
        if exc is problem:
            raise
        reason = exc.reason if field == "imageData" else f"{name} {exc.reason}"
        raise AnnotationError(field, reason) from exc
    except OSError as exc:
        raise AnnotationError("file", str(exc.strerror)) from exc
    height, width = image.shape[:2]
    if annotation.size not in (None, (height, width)):
        assert annotation.size is not None
        raise AnnotationError(
            "imageHeight, imageWidth",
            f"say {annotation.size[1]} x {annotation.size[0]} pixels, but {name} is "
            f"{width} x {height}; it was resized or rotated after it was annotated",
        )
    return raw, name, image, stretch


def _instances(
    file: str,
    annotation: Annotation,
    size: tuple[int, int],
    rules: Rules,
    outcome: dict[str, Any],
) -> list[tuple[str, CroppedMask]]:
    """Rename, filter, join by group and rasterise the shapes of one image: label and mask each."""
    groups: dict[Any, list[Shape]] = defaultdict(list)
    filtered: Counter[str] = Counter()
    for shape in annotation.shapes:
        label = rules.label_map.get(shape.label, shape.label)
        unwanted = rules.labels is not None and label not in rules.labels
        if label is None or label in IGNORED_LABELS or unwanted:
            filtered[shape.label] += 1
            continue
        try:
            require_inside(shape, size)
        except AnnotationError as problem:  # also one part of a group, whose others stay
            outcome["rejected"].append(rejection(file, problem, 1))
            continue
        alone = shape.group_id is None or not rules.join_groups
        groups[(label, shape.index) if alone else (label, "group", shape.group_id)].append(shape)
    outcome["filtered"] = dict(filtered)
    _warn_of_a_group_of_nearly_all(file, groups, outcome)
    instances = []
    for (label, *_), shapes in groups.items():
        try:
            mask = rasterize_instance(shapes, size)
        except AnnotationError as problem:
            outcome["rejected"].append(rejection(file, problem, len(shapes)))
            continue
        for shape in shapes:
            over = max(-shape.points.min(), (shape.points.max(axis=0) - size[::-1]).max())
            if over > 1:
                outcome["warnings"].append(
                    {
                        "file": file,
                        "field": f"shapes[{shape.index}].points",
                        "reason": f"reach {over:.0f} pixels out of the image; cut off there",
                    }
                )
        instances.append((label, mask))
        outcome["joined"] += len(shapes) - 1
    outcome["labels"] = dict(Counter(label for label, _ in instances))
    return instances


def _warn_of_a_group_of_nearly_all(
    file: str, groups: dict[Any, list[Shape]], outcome: dict[str, Any]
) -> None:
    """Annotators group by mistake, and then a whole image becomes one instance."""
    total = sum(len(shapes) for shapes in groups.values())
    for (label, *_), shapes in groups.items():
        if len(shapes) >= 5 and len(shapes) > 0.8 * total:
            outcome["warnings"].append(
                {
                    "file": file,
                    "field": "group_id",
                    "reason": f"joins {len(shapes)} of {total} shapes ('{label}') to one instance; "
                    "if that is a slip, set prepare.join_groups=false",
                }
            )


def _rows(
    outcome: dict[str, Any],
    raw: bytes,
    image: np.ndarray,
    instances: list[tuple[str, CroppedMask]],
    rules: Rules,
) -> list[dict[str, Any]]:
    """Return the image's row, or those of its tiles; tell the outcome what the image is."""
    name, size = outcome["claims"], (image.shape[0], image.shape[1])
    digest = hashlib.sha256(raw).hexdigest()
    content = [(label, encode_rle(mask, size).hex()) for label, mask in instances]
    outcome["image"] = {
        "name": name,
        "image_digest": digest,
        "num_instances": len(instances),
        "instances_digest": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        "tiles": None,
        "num_cut": 0,
    }
    common = {"annotation": outcome["annotation"], "source": name}
    too_large = rules.tile is not None and max(size) > rules.tile
    if not too_large or not instances:
        row = {"name": name, "image": raw, "image_digest": digest, "tile": None}
        row |= {"height": size[0], "width": size[1]}
        row["instances"] = [_instance(label, mask, size, 0) for label, mask in instances]
        return [row | common]
    assert rules.tile is not None
    windows = tile_windows(size, rules.tile, rules.overlap)
    members: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for label, mask in instances:
        number, part, outside = place_in_tiles(mask, windows)
        window = windows[number]
        members[number].append(_instance(label, part, (window.height, window.width), outside))
        outcome["image"]["num_cut"] += outside > 0
    rows = [_tile_row(name, image, windows[n], members[n]) | common for n in sorted(members)]
    outcome["image"]["tiles"] = [row["name"] for row in rows]
    return rows


def _tile_row(
    name: str, image: np.ndarray, window: Window, instances: list[dict[str, Any]]
) -> dict[str, Any]:
    """A tile is an image of its own from here on, kept without loss."""
    content = encode_picture(np.ascontiguousarray(image[window.slices]), ".png")
    return {
        "name": f"{name}@{window.x},{window.y}.png",
        "image": content,
        "image_digest": hashlib.sha256(content).hexdigest(),
        "height": window.height,
        "width": window.width,
        "tile": [window.x, window.y, window.width, window.height],
        "instances": instances,
    }


def _instance(label: str, mask: CroppedMask, size: tuple[int, int], outside: int) -> dict[str, Any]:
    return {
        "label": label,
        "box": list(mask.box),
        "area": int(mask.pixels.sum()),
        "rle": encode_rle(mask, size),
        "area_outside": outside,
    }


def rejection(file: str, problem: AnnotationError, num_shapes: int) -> dict[str, Any]:
    """Return an item of the manifest's `rejected`."""
    return {
        "file": file,
        "field": problem.field,
        "reason": problem.reason,
        "num_shapes": num_shapes,
    }


def _write_overlay(folder: Place, name: str, image: np.ndarray, masks: list[CroppedMask]) -> None:
    frames = []
    for mask in masks:
        frame = image[:, :, 0] < 0
        (x, y), (h, w) = mask.origin, mask.pixels.shape
        frame[y : y + h, x : x + w] = mask.pixels
        frames.append(frame)
    path = folder / f"{name}.overlay.jpg"
    make_folder(path.parent, "--output-dir")
    write_bytes(path, encode_picture(shrink(draw_masks(image, frames), 1600), ".jpg"))
