"""The objects of many images as one COCO file, put together from what was written of each image."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from samray import __version__
from samray.data.export import coco_segmentation
from samray.prediction.segmentation import SegmentedObject, full_rle, label_of
from samray.storage import Place, read_json, whole_file


def mask_entries(
    objects: list[SegmentedObject], size: tuple[int, int], label: str | None
) -> list[dict[str, Any]]:
    """Return label, score and compressed COCO counts of each object, for `write_coco`.

    Args:
        size: (H, W) of the image.
        label: of all objects; None: each object's own.
    """
    return [
        {
            "label": label_of(found, label),
            "score": round(found.score, 6),
            "rle": full_rle(found, size).decode("ascii"),
        }
        for found in objects
        if found.area
    ]


def write_coco(path: Place, documents: Iterable[tuple[str, Place]]) -> None:
    """Write one COCO file; an image's objects are in memory at a time.

    Boxes are x, y, width, height; masks are RLE; each annotation has a `score`.

    Args:
        documents: (name of the image, its LabelMe file, whose `samray.masks` are `mask_entries`).
    """
    images: list[dict[str, Any]] = []
    categories: dict[str, int] = {}
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"annotations": [')
        separator, number = "\n", 0
        for name, place in documents:
            document = read_json(place)
            size = document["imageHeight"], document["imageWidth"]
            image = {"id": len(images) + 1, "file_name": name, "width": size[1], "height": size[0]}
            images.append(image)
            for annotation in _annotations(document["samray"]["masks"], size, categories):
                number += 1
                own = {"id": number, "image_id": image["id"], **annotation}
                file.write(separator + json.dumps(own))
                separator = ",\n"
        rest = {
            "images": images,
            "categories": [{"id": id_, "name": label} for label, id_ in categories.items()],
            "info": {"description": f"predicted by samray {__version__}"},
        }
        file.write("\n], " + json.dumps(rest)[1:])


def _annotations(
    masks: list[dict[str, Any]], size: tuple[int, int], categories: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Annotations without ids; new labels are added to `categories`."""
    for mask in masks:
        yield {
            "category_id": categories.setdefault(mask["label"], len(categories) + 1),
            **coco_segmentation(mask["rle"].encode("ascii"), size),
            "iscrowd": 0,
            "score": mask["score"],
        }
