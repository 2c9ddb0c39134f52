"""A prepared dataset: Parquet shards of image bytes and instances, and one manifest.

PREPARED/manifest.json              counts, splits, rejected items, digest; written last
PREPARED/data/part-00000.parquet    one row per image or tile, see SCHEMA
PREPARED/data/part-00000.json       the outcome of each file of that shard (samray.data.outcome)
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from samray.data.outcome import PreparedImage
from samray.errors import AnnotationError, DatasetError, StorageError
from samray.geometry.masks import CroppedMask, decode_crop, decode_rle
from samray.storage import Place, local_copy, read_json

FORMAT = 3
SPLITS = ("train", "val", "test")

SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # the image's path in the raw dataset; of a tile, path@x,y.png
        ("source", pa.string()),  # that path, of the tile's image
        ("tile", pa.list_(pa.int32(), 4)),  # x, y, width, height in that image; null: all of it
        ("annotation", pa.string()),  # the JSON's path, null for an unlabelled image
        ("image", pa.binary()),  # the file as it came; a tile as PNG
        ("image_digest", pa.string()),  # sha256 of it
        ("height", pa.int32()),  # of the image as shown, EXIF applied
        ("width", pa.int32()),
        (
            "instances",
            pa.list_(
                pa.struct(
                    [
                        ("label", pa.string()),
                        ("box", pa.list_(pa.float32(), 4)),  # XYXY
                        ("area", pa.int64()),  # pixels
                        ("rle", pa.binary()),  # compressed COCO counts
                        ("area_outside", pa.int64()),  # pixels beyond the tile
                    ]
                )
            ),
        ),
        # Compressed COCO counts of the region in which not every object is annotated, without the
        # pixels of the instances; null: there is none. Earlier shards lack the column.
        ("ignored", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Instance:
    """One object in one image.

    Attributes:
        label: its class.
        box: XYXY, pixels.
        area: pixels.
        rle: compressed COCO counts of the mask.
        area_outside: pixels of the object beyond the tile, which are not in the mask.
    """

    label: str
    box: tuple[float, float, float, float]
    area: int
    rle: bytes
    area_outside: int = 0


@dataclass(frozen=True)
class ImageRecord:
    """One image of a prepared dataset, without its bytes.

    Attributes:
        name: its path in the raw dataset; of a tile, with @x,y.png.
        source: that path, also of a tile's image.
        digest: sha256 of the file.
        size: (H, W) as shown.
        instances: its objects; masks by `decode`.
        shard, row: where its bytes are.
        ignored: compressed COCO counts of the region in which not every object is annotated; no
            pixel of an instance is in it. None: there is no such region.
    """

    name: str
    source: str
    digest: str
    size: tuple[int, int]
    instances: tuple[Instance, ...]
    shard: int
    row: int
    ignored: bytes | None = None

    def decode(self, instance: Instance) -> np.ndarray:
        """The instance's mask: H x W bool.

        Raises:
            DatasetError: the mask in the shard is damaged.
        """
        return self._decode(instance.rle)

    def decode_crop(self, instance: Instance) -> CroppedMask:
        """The part of the instance's mask in its box; cheap for a small one in a large image.

        Raises:
            DatasetError: the mask in the shard is damaged.
        """
        with self._damage_explained():
            return decode_crop(instance.rle, self.size, instance.box)

    def decode_ignored(self) -> np.ndarray | None:
        """The region in which not every object is annotated: H x W bool; None without one.

        Raises:
            DatasetError: the mask in the shard is damaged.
        """
        return None if self.ignored is None else self._decode(self.ignored)

    def _decode(self, counts: bytes) -> np.ndarray:
        with self._damage_explained():
            return decode_rle(counts, self.size)

    @contextlib.contextmanager
    def _damage_explained(self) -> Iterator[None]:
        try:
            yield
        except AnnotationError as exc:
            raise DatasetError(
                f"{self.name}: a mask in the prepared dataset is damaged ({exc}); prepare it again"
            ) from exc


class PreparedDataset:
    """Read access to a prepared dataset.

    Args:
        folder: written by `samray.data.prepare.prepare`.

    Raises:
        DatasetError: not a prepared dataset, an unfinished one, or one of another format.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        if not (folder / "manifest.json").is_file():
            raise DatasetError(
                f"{folder}: holds no manifest.json, so it is no (finished) prepared dataset; "
                "make one with `samray prepare --data-dir DATA --output-dir PREPARED`"
            )
        content = read_json(folder / "manifest.json")
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise DatasetError(
                f"{folder}/manifest.json: has format {found!r}, this samray "
                f"reads {FORMAT}; prepare the dataset again"
            )
        self.manifest: dict[str, Any] = content
        self._files: dict[int, pq.ParquetFile] = {}

    @property
    def digest(self) -> str:
        """Identifies images, masks, labels and splits; equal digests train equal models."""
        return str(self.manifest["digest"])

    @cached_property
    def images(self) -> dict[str, ImageRecord]:
        """Every image by name, sorted by name. The image bytes stay on disk."""
        wanted = {*SCHEMA.names} - {"image", "tile"}
        dropped = set(self.manifest["dropped_annotations"])
        records = {}
        for shard, file in enumerate(self.manifest["shards"]):
            try:
                path = local_copy(self.folder / file)
                there = pq.read_schema(path).names
                table = pq.read_table(path, columns=[name for name in there if name in wanted])
            except StorageError:
                raise
            except (OSError, pa.ArrowException) as exc:
                raise DatasetError(
                    f"{self.folder / file}: cannot be read ({exc}); prepare the dataset again"
                ) from exc
            for row, entry in enumerate(table.to_pylist()):
                if entry["annotation"] in dropped:
                    continue
                records[entry["name"]] = ImageRecord(
                    name=entry["name"],
                    source=entry["source"],
                    digest=entry["image_digest"],
                    size=(entry["height"], entry["width"]),
                    instances=tuple(
                        Instance(
                            i["label"], tuple(i["box"]), i["area"], i["rle"], i["area_outside"]
                        )
                        for i in entry["instances"]
                    ),
                    shard=shard,
                    row=row,
                    ignored=entry.get("ignored"),
                )
        return dict(sorted(records.items()))

    def split(self, name: str) -> list[ImageRecord]:
        """The images of one split that have at least one instance, sorted by name.

        Raises:
            DatasetError: there is none.
        """
        records = [self.images[image] for image in self.manifest["splits"][name]]
        records = [record for record in records if record.instances]
        if not records:
            raise DatasetError(
                f"{self.folder}: the {name} split has no instance; prepare more images, or choose "
                "its members with --split-file"
            )
        return records

    def image_bytes(self, record: ImageRecord) -> bytes:
        """The image file as it came."""
        if record.shard not in self._files:
            path = local_copy(self.folder / self.manifest["shards"][record.shard])
            self._files[record.shard] = pq.ParquetFile(path, memory_map=True)
        file = self._files[record.shard]
        row = record.row
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                column = file.read_row_group(group, columns=["image"]).column(0)
                return bytes(column[row].as_py())
            row -= rows
        raise DatasetError(f"{self.folder}: row {record.row} of {record.name} is missing")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest, "_files": {}}


def dataset_digest(images: list[PreparedImage], splits: dict[str, list[str]]) -> str:
    """sha256 over names, images, instances and splits, in an order that shards do not change."""
    content = [
        sorted((i.name, i.image_digest, i.instances_digest) for i in images),
        {name: sorted(members) for name, members in splits.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
