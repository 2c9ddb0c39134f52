"""One annotation or image of a raw dataset to its outcome and its rows of a shard.

`read_entry` reads top-down: find the image, read and check both, rasterise the shapes, cut a
large image into tiles. Bad input is part of the outcome, never an exception.

From rasterising on, an instance is what the shard stores of it, and its RLE is decoded where its
pixels are needed: the pixels of all instances of a large image at once may be more than fits.

The ignored region of an image is where not every object is annotated: H x W bool, or None. It never
has a pixel of an instance, so that what lies in it needs no second look.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from samray.config import PrepareConfig
from samray.data.annotation import BACKGROUND, IGNORE, MAX_JSON_BYTES, Annotation
from samray.data.coco import CocoImage, coco_annotation, is_coco
from samray.data.discovery import RawFiles
from samray.data.labelme import embedded_image, read_annotation
from samray.data.outcome import FileWarning, Outcome, PreparedImage, Rejection
from samray.data.pairing import find_by_stem, find_image, find_listed_image
from samray.errors import AnnotationError, StorageError
from samray.geometry.drawing import draw_masks, encode_picture, shrink
from samray.geometry.duplicates import fingerprint_of, pack
from samray.geometry.images import decode_and_stretch, read_image_file
from samray.geometry.masks import (
    CroppedMask,
    crop_mask,
    decode_crop,
    encode_rle,
    overhang,
    rasterize_instance,
    require_inside,
)
from samray.geometry.shapes import Shape
from samray.geometry.tiles import Window, part_in, place_in_tiles, tile_windows
from samray.storage import Place, make_folder, read_bytes, short_name, write_bytes


@dataclass(frozen=True)
class Entry:
    """What has one outcome: an annotation with its image, or an image without annotation.

    Attributes:
        name: a JSON's path from the root, `file.json#image_id` in a COCO file, or an image's path.
        kind: labelme, coco, or image.
        stamp: a text that changes when the content does.
        coco: the image's part of a COCO file.
    """

    name: str
    kind: Literal["labelme", "coco", "image"]
    stamp: str
    coco: CocoImage | None = None

    @classmethod
    def of_coco(cls, image: CocoImage) -> "Entry":
        """Wrap one image's part of a COCO file."""
        stamp = hashlib.sha256(image.content.encode()).hexdigest()
        return cls(image.name, "coco", stamp, image)


@dataclass(frozen=True)
class Rules:
    """What decides the outcome of an entry, beside its files.

    Attributes:
        settings: the `prepare` section.
        label_map: old label -> new, or None to drop it.
        overlays: names of the entries to draw.
    """

    settings: PrepareConfig
    label_map: dict[str, str | None]
    overlays: frozenset[str]


def is_current(outcome: Outcome, entry: Entry, files: RawFiles) -> bool:
    """Whether reading an entry again would give the same outcome.

    It would if neither the entry nor its image has changed, and no file was added or removed that
    makes it refer to another image.
    """
    now, _ = _begin_outcome(entry, outcome.image_path, files)
    compared = ("stamp", "found", "not_found", "image_stamp")
    if any(getattr(now, name) != getattr(outcome, name) for name in compared):
        return False
    return outcome.claims in (entry.name, now.claims)  # a JSON with an embedded image claims itself


def read_entry(
    entry: Entry, files: RawFiles, rules: Rules, overlays: Place
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Read, check and rasterise one entry.

    Args:
        overlays: folder for the pictures of `rules.overlays`.

    Returns:
        outcome: of the entry.
        rows: of the shard (`samray.data.dataset.SCHEMA`): none, one, or one for each tile.

    Raises:
        StorageError: S3 does not answer; it is not the entry's fault.
    """
    try:
        annotation = _read_annotation(entry, files, rules)
    except AnnotationError as problem:
        outcome, _ = _begin_outcome(entry, None, files)
        outcome.num_shapes = problem.num_shapes
        outcome.rejected.append(Rejection.of(entry.name, problem, outcome.num_shapes))
        return outcome, []
    outcome, not_found = _begin_outcome(entry, annotation.image_path, files)
    outcome.num_shapes = annotation.num_shapes
    try:
        if not_found is not None and annotation.image_data is None:
            raise not_found
        raw, pixels, stretch = _read_image(outcome.found, entry, annotation, files, rules)
    except AnnotationError as problem:
        outcome.rejected.append(Rejection.of(entry.name, problem, outcome.num_shapes))
        return outcome, []
    outcome.claims = name = outcome.found or entry.name
    size = (pixels.shape[0], pixels.shape[1])
    outcome.rejected += [Rejection.of(entry.name, p, 1) for p in annotation.problems]
    outcome.warnings += [FileWarning(entry.name, *warning) for warning in annotation.warnings]
    outcome.not_instances = dict(Counter(kind for _, kind in annotation.not_instances))
    instances = _instances(annotation, size, rules, outcome)
    ignored = _ignored_region(annotation, size, instances, rules, outcome)
    if entry.name in rules.overlays:
        _write_overlay(overlays, name, pixels, (_mask_of(instance, size) for instance in instances))
    outcome.image = PreparedImage(
        name=name,
        image_digest=hashlib.sha256(raw).hexdigest(),
        num_instances=len(instances),
        instances_digest=_instances_digest(instances, ignored, size),
        stretch=stretch,
        fingerprint="" if entry.kind == "image" else pack(fingerprint_of(pixels)),
    )
    rows = _rows(outcome.image, raw, pixels, instances, ignored, rules.settings)
    return outcome, [row | {"annotation": outcome.annotation, "source": name} for row in rows]


def _begin_outcome(
    entry: Entry, image_path: str | None, files: RawFiles
) -> tuple[Outcome, AnnotationError | None]:
    """Find the image that an entry refers to.

    Args:
        image_path: what the annotation says; None if it cannot be read.

    Returns:
        outcome: with all that is known before the image is read.
        not_found: why there is no image.
    """
    name, not_found = _find_entry_image(entry, image_path, files)
    outcome = Outcome(
        entry=entry.name,
        stamp=entry.stamp,
        image_path=image_path,
        found=name,
        not_found=None if not_found is None else not_found.reason,
        image_stamp=None if name is None else files.stamps.get(name),
        annotation=None if entry.kind == "image" else entry.name,
        claims=name or _claim_by_stem(entry, files),
    )
    return outcome, not_found


def _find_entry_image(
    entry: Entry, image_path: str | None, files: RawFiles
) -> tuple[str | None, AnnotationError | None]:
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
    """The image of a JSON that cannot be used, so that it does not count as unannotated."""
    if entry.kind != "labelme":
        return None
    try:
        return find_by_stem(entry.name, PurePosixPath(entry.name).stem, files)
    except AnnotationError:
        return None


def _read_annotation(entry: Entry, files: RawFiles, rules: Rules) -> Annotation:
    """Read and check an entry's annotation; one without shapes for an image alone.

    Raises:
        AnnotationError: the file as a whole cannot be used.
        StorageError: S3 does not answer.
    """
    if entry.coco is not None:
        return coco_annotation(entry.coco, rules.settings.crowd_as_instances)
    if entry.kind == "image":
        return Annotation(image_path="", size=None, num_shapes=0)
    try:
        raw = read_bytes(files.root / entry.name, MAX_JSON_BYTES)
    except StorageError:
        raise
    except OSError as exc:
        raise AnnotationError("file", _cannot_be_read(exc)) from exc
    try:
        return read_annotation(raw)
    except AnnotationError as problem:
        if problem.field == "shapes" and is_coco(raw):
            raise AnnotationError(
                "file", "is COCO's but has an image's name; rename it, e.g. to instances.json"
            ) from problem
        raise


def _cannot_be_read(exc: OSError) -> str:
    return f"cannot be read ({exc.strerror or exc}); check its permissions"


def _read_image(
    found: str | None, entry: Entry, annotation: Annotation, files: RawFiles, rules: Rules
) -> tuple[bytes, np.ndarray, tuple[float, float] | None]:
    """Return an image's bytes, its pixels, and how they were stretched (`decode_and_stretch`).

    Args:
        found: the image's path from the root; None for the one that the annotation embeds.

    Raises:
        AnnotationError: it cannot be used, or not with this annotation.
        StorageError: S3 does not answer.
    """
    try:
        if found is not None:
            raw = read_image_file(files.root / found)
        else:
            assert annotation.image_data is not None
            raw = embedded_image(annotation.image_data)
        pixels, stretch = decode_and_stretch(raw, rules.settings.max_megapixels)
    except StorageError:
        raise
    except AnnotationError as exc:
        if found is None:
            raise AnnotationError("imageData", exc.reason) from exc
        raise AnnotationError("image", f"{found} {exc.reason}") from exc
    except OSError as exc:
        raise AnnotationError("file", _cannot_be_read(exc)) from exc
    height, width = pixels.shape[:2]
    if annotation.size not in (None, (height, width)):
        assert annotation.size is not None
        raise AnnotationError(
            "imageHeight, imageWidth",
            f"say {annotation.size[1]} x {annotation.size[0]} pixels, but {found or entry.name} is "
            f"{width} x {height}; it was resized or rotated after it was annotated",
        )
    return raw, pixels, stretch


def _instances(
    annotation: Annotation, size: tuple[int, int], rules: Rules, outcome: Outcome
) -> list[dict[str, Any]]:
    """Rename, filter, join by group and rasterise the shapes of one image."""
    groups = _groups(annotation.shapes, size, rules, outcome)
    _warn_of_a_group_of_nearly_all(groups, outcome)
    instances: list[dict[str, Any]] = []
    seen: dict[tuple[str, bytes], Shape] = {}
    for (label, *_), shapes in groups.items():
        try:
            mask = rasterize_instance(shapes, size)
        except AnnotationError:
            shapes = _usable(shapes, size, outcome)
            if not shapes:
                continue
            mask = rasterize_instance(shapes, size)
        instance = _instance(label, mask, size, 0)
        # By the mask: with other points it would be the same shape twice in an export.
        first = seen.setdefault((label, instance["rle"]), shapes[0])
        if first is not shapes[0]:
            outcome.rejected.append(_duplicate(shapes, first, outcome.entry))
            continue
        for shape in shapes:
            if (over := overhang(shape, size)) > 1:
                reason = f"reach {over:.0f} pixels out of the image; cut off there"
                outcome.warnings.append(FileWarning(outcome.entry, _field_of(shape), reason))
        instances.append(instance)
        outcome.joined += len(shapes) - 1
    outcome.labels = dict(Counter(instance["label"] for instance in instances))
    return instances


def _usable(shapes: list[Shape], size: tuple[int, int], outcome: Outcome) -> list[Shape]:
    """Those of a group's shapes that can be rasterised; each of the others is rejected."""
    usable = []
    for shape in shapes:
        try:
            rasterize_instance([shape], size)
            usable.append(shape)
        except AnnotationError as problem:
            outcome.rejected.append(Rejection.of(outcome.entry, problem, 1))
    return usable


def _duplicate(shapes: list[Shape], first: Shape, entry: str) -> Rejection:
    """Reject an instance's shapes: that of `first` has its label and its mask."""
    reason = f"({shapes[0].label!r:.60}) is a duplicate of {_place_of(first)}; remove one"
    return Rejection(entry, _place_of(shapes[0]), reason, len(shapes))


def _field_of(shape: Shape) -> str:
    """Where its file says what it covers."""
    return f"{_place_of(shape)}.{'segmentation' if shape.kind == 'rle' else 'points'}"


def _place_of(shape: Shape) -> str:
    """Where in its file it is."""
    return f"{'annotations' if shape.kind == 'rle' else 'shapes'}[{shape.index}]"


Groups = dict[tuple[Any, ...], list[Shape]]  # the key begins with the label


def _groups(shapes: list[Shape], size: tuple[int, int], rules: Rules, outcome: Outcome) -> Groups:
    """The shapes of each instance; what is filtered or outside the image goes to the outcome."""
    groups: Groups = defaultdict(list)
    filtered: Counter[str] = Counter()
    wanted = rules.settings.labels
    for shape in shapes:
        label = rules.label_map.get(shape.label, shape.label)
        if label == IGNORE:
            continue
        if label is None or label == BACKGROUND or (wanted is not None and label not in wanted):
            filtered[shape.label] += 1
            continue
        try:
            require_inside(shape, size)
        except AnnotationError as problem:  # also one part of a group; the other parts stay
            outcome.rejected.append(Rejection.of(outcome.entry, problem, 1))
            continue
        alone = shape.group_id is None or not rules.settings.join_groups
        groups[(label, shape.index) if alone else (label, "group", shape.group_id)].append(shape)
    outcome.filtered = dict(filtered)
    return groups


def _ignored_region(
    annotation: Annotation,
    size: tuple[int, int],
    instances: list[dict[str, Any]],
    rules: Rules,
    outcome: Outcome,
) -> np.ndarray | None:
    """The union of the shapes labelled `__ignore__`, without the instances."""
    shapes = [s for s in annotation.shapes if rules.label_map.get(s.label, s.label) == IGNORE]
    if not shapes:
        return None
    region, used = np.zeros(size, bool), 0
    for shape in shapes:
        try:
            require_inside(shape, size)
            _paint(region, rasterize_instance([shape], size), True)
        except AnnotationError as problem:
            outcome.rejected.append(Rejection.of(outcome.entry, problem, 1))
            continue
        used += 1
    if used:
        outcome.not_instances[IGNORE] = used
    for instance in instances:
        _paint(region, _mask_of(instance, size), False)
    return region if region.any() else None


def _paint(region: np.ndarray, mask: CroppedMask, value: bool) -> None:
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    region[y : y + h, x : x + w][mask.pixels] = value


def _warn_of_a_group_of_nearly_all(groups: Groups, outcome: Outcome) -> None:
    """Annotators group by mistake, and then a whole image becomes one instance."""
    total = sum(len(shapes) for shapes in groups.values())
    for (label, *_), shapes in groups.items():
        if len(shapes) >= 5 and len(shapes) > 0.8 * total:
            reason = (
                f"joins {len(shapes)} of {total} shapes ({label!r:.60}) to one instance; "
                "if that is a slip, set prepare.join_groups=false"
            )
            outcome.warnings.append(FileWarning(outcome.entry, "group_id", reason))


def _instances_digest(
    instances: list[dict[str, Any]], ignored: np.ndarray | None, size: tuple[int, int]
) -> str:
    content = [(instance["label"], instance["rle"].hex()) for instance in instances]
    if ignored is not None:
        content.append((IGNORE, encode_rle(crop_mask(ignored), size).hex()))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _rows(
    image: PreparedImage,
    raw: bytes,
    pixels: np.ndarray,
    instances: list[dict[str, Any]],
    ignored: np.ndarray | None,
    settings: PrepareConfig,
) -> list[dict[str, Any]]:
    """Return the image's row, or those of its tiles, which `image` then names."""
    size = (pixels.shape[0], pixels.shape[1])
    if settings.tile is None or max(size) <= settings.tile or not instances:
        row = {"name": image.name, "image": raw, "image_digest": image.image_digest, "tile": None}
        row |= {"height": size[0], "width": size[1], "ignored": _region_rle(ignored)}
        return [row | {"instances": instances}]
    windows = tile_windows(size, settings.tile, settings.overlap_pixels)
    members: dict[int, list[dict[str, Any]]] = defaultdict(list)
    owners = []  # the tile of each instance
    for instance in instances:
        number, part, outside = place_in_tiles(_mask_of(instance, size), windows)
        frame = (windows[number].height, windows[number].width)
        members[number].append(_instance(instance["label"], part, frame, outside))
        owners.append(number)
        image.num_cut += outside > 0
    rows = []
    for number in sorted(members):
        own = [i for i, owner in zip(instances, owners, strict=True) if owner == number]
        others = [i for i, owner in zip(instances, owners, strict=True) if owner != number]
        region = _ignored_in_tile(windows[number], ignored, size, own, others)
        rows.append(_tile_row(image.name, pixels, windows[number], members[number], region))
    image.tiles = [row["name"] for row in rows]
    return rows


def _ignored_in_tile(
    window: Window,
    ignored: np.ndarray | None,
    size: tuple[int, int],
    own: list[dict[str, Any]],
    others: list[dict[str, Any]],
) -> np.ndarray:
    """The image's ignored region in a tile, and what is seen there of other tiles' objects.

    These are no instances of the tile, and no background either.
    """
    shape = (window.height, window.width)
    region = np.zeros(shape, bool) if ignored is None else ignored[window.slices].copy()
    right, bottom = window.x + window.width, window.y + window.height
    for instances, value in ((others, True), (own, False)):
        for instance in instances:
            x1, y1, x2, y2 = instance["box"]
            box = (max(x1, window.x), max(y1, window.y), min(x2, right), min(y2, bottom))
            if box[0] < box[2] and box[1] < box[3]:
                seen = decode_crop(instance["rle"], size, box)
                _paint(region, part_in(seen, window), value)
    return region


def _region_rle(region: np.ndarray | None) -> bytes | None:
    if region is None or not region.any():
        return None
    return encode_rle(crop_mask(region), (region.shape[0], region.shape[1]))


def _tile_row(
    name: str,
    pixels: np.ndarray,
    window: Window,
    instances: list[dict[str, Any]],
    ignored: np.ndarray,
) -> dict[str, Any]:
    """The row of a tile: an image of its own, encoded without loss."""
    content = encode_picture(np.ascontiguousarray(pixels[window.slices]), ".png")
    return {
        "name": f"{name}@{window.x},{window.y}.png",
        "image": content,
        "image_digest": hashlib.sha256(content).hexdigest(),
        "height": window.height,
        "width": window.width,
        "tile": [window.x, window.y, window.width, window.height],
        "instances": instances,
        "ignored": _region_rle(ignored),
    }


def _instance(label: str, mask: CroppedMask, size: tuple[int, int], outside: int) -> dict[str, Any]:
    return {
        "label": label,
        "box": list(mask.box),
        "area": int(mask.pixels.sum()),
        "rle": encode_rle(mask, size),
        "area_outside": outside,
    }


def _mask_of(instance: dict[str, Any], size: tuple[int, int]) -> CroppedMask:
    return decode_crop(instance["rle"], size, instance["box"])


def _write_overlay(
    folder: Place, name: str, image: np.ndarray, masks: Iterable[CroppedMask]
) -> None:
    image_path = PurePosixPath(name)
    path = folder / image_path.parent / f"{short_name(image_path.name)}.overlay.jpg"
    make_folder(path.parent, "--output-dir")
    write_bytes(path, encode_picture(shrink(draw_masks(image, masks), 1600), ".jpg"))
