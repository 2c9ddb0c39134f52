"""A prepared dataset to files that other tools read: LabelMe or COCO.

OUT/images/...                          the image files, unchanged
OUT/annotations/....json                LabelMe, one per image; or
OUT/annotations/instances_train.json    COCO, one per split, masks as RLE
OUT/splits.csv                          the splits, for `prepare --split-file`
"""

import io
import os
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from samray import __version__
from samray.config import Config, required
from samray.data.annotation import IGNORE
from samray.data.dataset import SPLITS, ImageRecord, PreparedDataset
from samray.data.discovery import RawFiles, fold
from samray.data.labelme import labelme_document, mask_shape, mask_to_shapes, read_shapes
from samray.data.pairing import find_listed_image
from samray.errors import AnnotationError, ConfigError, DatasetError
from samray.geometry.images import FORMATS
from samray.geometry.masks import rasterize_instance
from samray.storage import (
    Place,
    is_used,
    lock_folder,
    require_folder,
    resolve,
    whole_folder,
    write_bytes,
    write_csv,
    write_json,
)


def export(config: Config) -> Place:
    """Write a prepared dataset as LabelMe or COCO files; preparing them gives the same masks.

    Args:
        config: its `export` section.

    Returns:
        The folder.

    Raises:
        ConfigError: a setting cannot work, or the folder is in use.
        DatasetError: the dataset cannot be read.
    """
    settings = config.export
    data_dir, output_dir = required(config, "export.data_dir", "export.output_dir")
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    output = resolve(output_dir, "--output-dir")
    # Of two calls at once, the one that ends last would replace the other's finished files.
    with lock_folder(output, "--output-dir"):
        if is_used(output):
            raise ConfigError(f"--output-dir: {output} is not empty; choose another folder")
        with whole_folder(output) as folder:
            _export(dataset, folder, settings.format)
    return output


def _export(dataset: PreparedDataset, folder: Path, form: str) -> None:
    unlabelled = set(dataset.manifest["unlabelled"])
    paths = _image_paths(dataset)
    for record in tqdm(dataset.images.values(), desc="export", unit="img", disable=None):
        _write(folder, paths[record.name], dataset.image_bytes(record))
        if form == "labelme" and record.name not in unlabelled:
            _write_labelme(folder, paths[record.name], record)
    if form == "coco":
        (folder / "annotations").mkdir()
        targets = {split: f"annotations/instances_{split}.json" for split in SPLITS}
        files = RawFiles(folder, [], list(map(str, paths.values())), coco=[*targets.values()])
        for split, target in targets.items():
            records = [dataset.images[name] for name in dataset.manifest["splits"][split]]
            names = {r.name: _file_name(target, paths[r.name], files) for r in records}
            write_json(folder / target, _coco_document(dataset, records, names))
    splits = dataset.manifest["splits"]
    rows = [(str(paths[name]), split) for split in SPLITS for name in splits[split]]
    write_csv(folder / "splits.csv", [("image", "split"), *rows])


def _image_paths(dataset: PreparedDataset) -> dict[str, PurePosixPath]:
    """Where to write each image: its own path; an embedded one beside those, over none of them."""
    names = {name: _safe_path(name) for name in dataset.images}
    embedded = {name: path for name, path in names.items() if path.suffix.lower() == ".json"}
    paths = {name: "images" / path for name, path in names.items() if name not in embedded}
    taken: set[str] = set()
    for path in paths.values():
        _take(path, taken)
    for name, path in embedded.items():
        extension = _extension_of(dataset.image_bytes(dataset.images[name]))
        paths[name] = _free_path("images" / path.with_suffix(extension), taken)
        _take(paths[name], taken)
    return paths


def _safe_path(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise DatasetError(f"{name!r}: an image's name leads out of its folder; not written")
    return path


def _extension_of(raw: bytes) -> str:
    with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
        name = picture.format or "png"
    return ".jpg" if name == "MPO" else f".{name.lower()}"  # MPO: a JPEG with more pictures in it


def _free_path(path: PurePosixPath, taken: set[str]) -> PurePosixPath:
    """The path, with a number after its stem if another image or a folder has it."""
    free, number = path, 1
    while fold(str(free)) in taken:
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


def _take(path: PurePosixPath, taken: set[str]) -> None:
    """Add a path and its folders, without case, which some file systems do not tell apart."""
    taken.update(fold(str(part)) for part in (path, *path.parents))


def _write(folder: Path, path: PurePosixPath, content: bytes) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / path, content)


def _write_labelme(folder: Path, image: PurePosixPath, record: ImageRecord) -> None:
    place = PurePosixPath("annotations", *image.parts[1:])
    path = place.with_name(place.name + ".json")
    shapes = []
    for number, instance in enumerate(record.instances, start=1):
        for shape in _exact_shapes(record.decode(instance), instance.label):
            if shape["group_id"] is not None:
                shape["group_id"] = number  # unique in the file, as parts of one instance
            shapes.append(shape)
    if (region := record.decode_ignored()) is not None:
        shapes += _exact_shapes(region, IGNORE)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    document = labelme_document(os.path.relpath(image, path.parent), record.size, shapes)
    write_json(folder / path, document)


def _exact_shapes(mask: np.ndarray, label: str) -> list[dict[str, Any]]:
    """LabelMe shapes that rasterise to exactly the mask: polygons if they do, else a PNG."""
    shapes = mask_to_shapes(mask, label, tolerance=0)
    again = rasterize_instance(read_shapes(shapes), (mask.shape[0], mask.shape[1]))
    (x, y), (h, w) = again.origin, again.pixels.shape
    same = again.pixels.sum() == mask.sum() and np.array_equal(
        mask[y : y + h, x : x + w], again.pixels
    )
    return shapes if same else [mask_shape(mask, label)]


def _file_name(annotation: str, image: PurePosixPath, files: RawFiles) -> str:
    """An image's path from images/, as COCO has it; by way of `..` if `prepare` could mistake it.

    `1.jpg` in instances_train.json could also be images/train/1.jpg, `../images/1.jpg` could not.
    """
    name = str(image.relative_to("images"))
    try:
        found = find_listed_image(annotation, name, files)
    except AnnotationError:
        found = ""
    return name if found == str(image) else f"../{image}"


def _coco_document(
    dataset: PreparedDataset, records: list[ImageRecord], file_names: dict[str, str]
) -> dict[str, Any]:
    """One split in COCO's format: ids from 1, boxes as x, y, width, height, masks as RLE."""
    labels = [*dataset.manifest["labels"]]
    labels += [IGNORE] if any(record.ignored for record in records) else []
    categories = {label: number for number, label in enumerate(labels, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, start=1):
        height, width = record.size
        image = {"id": image_id, "file_name": file_names[record.name]}
        images.append(image | {"width": width, "height": height})
        masks = [(instance.label, instance.rle, 0) for instance in record.instances]
        if record.ignored is not None:  # to other tools a crowd, which they do not train on
            masks.append((IGNORE, record.ignored, 1))
        for label, rle, crowd in masks:
            annotation = {"id": len(annotations) + 1, "image_id": image_id}
            annotation |= {"category_id": categories[label], **coco_segmentation(rle, record.size)}
            annotations.append({**annotation, "iscrowd": crowd})
    return {
        "info": {"description": f"exported by samray {__version__}"},
        "images": images,
        "categories": [{"id": number, "name": label} for label, number in categories.items()],
        "annotations": annotations,
    }


def coco_segmentation(rle: bytes, size: tuple[int, int]) -> dict[str, Any]:
    """Return COCO's description of a mask: segmentation, bbox (x, y, width, height) and area."""
    mask = {"counts": rle, "size": list(size)}
    return {
        "segmentation": {"size": list(size), "counts": rle.decode("ascii")},
        "bbox": coco_mask.toBbox(mask).tolist(),
        "area": int(coco_mask.area(mask)),
    }
