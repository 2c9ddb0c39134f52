"""A prepared dataset: Parquet shards of image bytes and instances, and one manifest.

A process keeps some hundred bytes of each image, in columns; instances and image bytes are read
from their shard when they are asked for, so that the size of a dataset is one of the disk.

PREPARED/manifest.json              counts, splits, rejected items, digest; written last
PREPARED/data/part-00000.parquet    one row per image or tile, see SCHEMA
PREPARED/data/part-00000.json       the outcome of each file of that shard (samray.data.outcome)
"""

import bisect
import contextlib
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samray.data.outcome import PreparedImage
from samray.errors import AnnotationError, DatasetError, StorageError
from samray.geometry.masks import CroppedMask, decode_crop, decode_rle
from samray.storage import Place, local_copy, read_json

FORMAT = 3
SPLITS = ("train", "val", "test")

OPEN_FILES = 64  # shards that a process keeps open; a system allows 1,024 files by default
LATEST_ROWS, LATEST_GROUPS = 256, 4  # images, and groups of rows, whose instances are kept
LIGHT = ("name", "source", "annotation", "image_digest", "height", "width")
LABELS = "instances.list.element.label"

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

    @property
    def num_instances(self) -> int:
        """Their number, which is known without reading them."""
        return len(self.instances)

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


class _StoredRecord(ImageRecord):
    """An image of a dataset; its instances and ignored region are read when they are asked for."""

    _dataset: "PreparedDataset"
    _place: int

    def __new__(cls, *stored: Any, **values: Any) -> ImageRecord:  # type: ignore[misc]
        """`dataclasses.replace` gives values; with others than the dataset's it is not stored."""
        return ImageRecord(**values) if values else super().__new__(cls)

    def __init__(self, dataset: "PreparedDataset", place: int) -> None:
        values = {"_dataset": dataset, "_place": place, **dataset.columns.light(place)}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def instances(self) -> tuple[Instance, ...]:
        return self._dataset.heavy(self._place, self)[0]

    @property
    def ignored(self) -> bytes | None:
        return self._dataset.heavy(self._place, self)[1]

    @property
    def num_instances(self) -> int:
        return int(self._dataset.columns.counts[self._place])

    def __reduce__(self) -> tuple[type[ImageRecord], tuple[Any, ...]]:
        """Support pickling, as an image that needs no dataset."""
        return ImageRecord, tuple(getattr(self, field.name) for field in fields(ImageRecord))


class Columns:
    """What is kept of every image, sorted by name.

    Attributes:
        names, sources, digests: Arrow arrays of text; a source is null if it is the name.
        heights, widths, shards, rows: N int32.
        counts: N int32, of instances.
        label_names, labels: of all instances; an Arrow list of numbers of names for each image.
    """

    def __init__(self, table: pa.Table, label_names: list[str]) -> None:
        self.label_names = label_names
        order = pc.sort_indices(table["name"])  # stable, and in the order of Python's text
        table = table.take(order)
        names = table["name"]
        if table.num_rows > 1:  # of images that two shards hold, the later one counts
            last = pc.not_equal(names.slice(1), names.slice(0, table.num_rows - 1)).to_numpy()
            table = table.filter(pa.array(np.append(last, True)))
        self.names, self.sources, self.digests = (
            table[name].combine_chunks() for name in ("name", "source", "image_digest")
        )
        self.heights, self.widths, self.shards, self.rows = (
            table[name].to_numpy() for name in ("height", "width", "shard", "row")
        )
        self.labels = table["labels"].combine_chunks()
        self.counts = pc.list_value_length(self.labels).to_numpy()

    def place(self, name: str) -> int:
        """Return the number of an image.

        Raises:
            KeyError: there is none of this name.
        """
        place = bisect.bisect_left(range(len(self.names)), name, key=self.name)
        if place == len(self.names) or self.name(place) != name:
            raise KeyError(name)
        return place

    def places(self, names: list[str]) -> np.ndarray:
        """Return the numbers of some images, N int32, which must all be there."""
        found = pc.index_in(pa.array(names, pa.large_string()), value_set=self.names)
        assert not found.null_count, "the manifest and the shards do not belong together"
        return np.asarray(found.to_numpy())

    def name(self, place: int) -> str:
        """Return the name of an image."""
        return str(self.names[place].as_py())

    def light(self, place: int) -> dict[str, Any]:
        """Return the fields of an `ImageRecord` that are kept."""
        name = self.name(place)
        return {
            "name": name,
            "source": self.sources[place].as_py() or name,
            "digest": self.digests[place].as_py(),
            "size": (int(self.heights[place]), int(self.widths[place])),
            "shard": int(self.shards[place]),
            "row": int(self.rows[place]),
        }


class Records(Sequence[ImageRecord]):
    """Images of a dataset, each made when it is asked for, so that a million take 8 MB."""

    def __init__(self, dataset: "PreparedDataset", places: np.ndarray) -> None:
        self._dataset, self._places = dataset, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "ImageRecord | Records":
        if isinstance(index, slice):
            return Records(self._dataset, self._places[index])
        return _StoredRecord(self._dataset, int(self._places[index]))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all instances, sorted; no instance is read for it."""
        columns = self._dataset.columns
        numbers = pc.unique(pc.list_flatten(columns.labels.take(pa.array(self._places))))
        return tuple(sorted(columns.label_names[number] for number in numbers.to_pylist()))

    def __add__(self, other: "Records") -> "Records":
        return Records(self._dataset, np.concatenate([self._places, other._places]))


class Images(Mapping[str, ImageRecord]):
    """All images of a dataset by name, sorted by name."""

    def __init__(self, dataset: "PreparedDataset") -> None:
        self._dataset = dataset

    def __getitem__(self, name: str) -> ImageRecord:
        return _StoredRecord(self._dataset, self._dataset.columns.place(name))

    def __iter__(self) -> Iterator[str]:
        return map(self._dataset.columns.name, range(len(self)))

    def __len__(self) -> int:
        return len(self._dataset.columns.names)


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
        self._forget()

    def _forget(self) -> None:
        """Begin without open files."""
        self._lock = threading.Lock()  # batches are made in threads
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._rows: OrderedDict[int, tuple[tuple[Instance, ...], bytes | None]] = OrderedDict()

    @property
    def digest(self) -> str:
        """Identifies images, masks, labels and splits; equal digests train equal models."""
        return str(self.manifest["digest"])

    @property
    def images(self) -> Mapping[str, ImageRecord]:
        """Every image by name, sorted by name. Instances and image bytes stay on disk."""
        return Images(self)

    @cached_property
    def columns(self) -> Columns:
        """What is kept of every image; read from all shards once."""
        dropped = pa.array(self.manifest["dropped_annotations"], pa.string())
        tables: list[pa.Table] = []
        numbers: dict[str, int] = {}  # label -> its number
        for shard in range(len(self.manifest["shards"])):
            with self._shard_explained(shard), pq.ParquetFile(self._paths[shard]) as file:
                tables.append(_light_table(file, shard, dropped, numbers))
            if len(tables) == 256:  # small tables have a large overhead
                tables = [pa.concat_tables(tables).combine_chunks()]
        columns = Columns(pa.concat_tables(tables), list(numbers))
        del tables
        pa.default_memory_pool().release_unused()
        return columns

    @cached_property
    def _paths(self) -> "_LocalCopies":
        return _LocalCopies(self.folder, self.manifest["shards"])

    @contextlib.contextmanager
    def _shard_explained(self, shard: int) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as exc:
            raise DatasetError(
                f"{self.folder / self.manifest['shards'][shard]}: cannot be read ({exc}); prepare "
                "the dataset again"
            ) from exc

    def split(self, name: str, background: bool = False) -> Records:
        """The images of one split that have at least one instance, sorted by name.

        Args:
            background: see `with_instances`.

        Raises:
            DatasetError: there is none.
        """
        records = self.with_instances(self.manifest["splits"][name], background)
        if not len(records):
            raise DatasetError(
                f"{self.folder}: the {name} split has no instance; prepare more images, or choose "
                "its members with --split-file"
            )
        return records

    def with_instances(self, names: list[str], background: bool = False) -> Records:
        """Of some images, those that have an instance.

        Args:
            background: also those annotated as empty, if any image has an instance. Larger ones
                than the dataset's tiles are left out, as they would be seen at another scale.
        """
        columns = self.columns
        places = columns.places(names)
        wanted = columns.counts[places] > 0
        if background and wanted.any():
            # Datasets prepared by earlier versions do not say which they are.
            empty = columns.places(list(self.manifest.get("background", ())))
            if tiles := self.manifest.get("tiles"):
                sides = np.maximum(columns.heights[empty], columns.widths[empty])
                empty = empty[sides <= tiles["size"]]
            wanted |= np.isin(places, empty)
        return Records(self, places[wanted])

    def image_bytes(self, record: ImageRecord) -> bytes:
        """The image file as it came."""
        with self._lock, self._shard_explained(record.shard):
            file, group, row = self._find(record)
            column = file.read_row_group(group, columns=["image"], use_threads=False).column(0)
            return bytes(column[row].as_py())

    def heavy(self, place: int, record: ImageRecord) -> tuple[tuple[Instance, ...], bytes | None]:
        """Return the instances and the ignored region of the image at a place of the columns."""
        with self._lock, self._shard_explained(record.shard):
            if place not in self._rows:
                file, group, row = self._find(record)
                if (record.shard, group) not in self._groups:
                    wanted = {"instances", "ignored"} & set(file.schema_arrow.names)
                    table = file.read_row_group(group, columns=sorted(wanted), use_threads=False)
                    _keep(self._groups, (record.shard, group), table, LATEST_GROUPS)
                (entry,) = self._groups[record.shard, group].slice(row, 1).to_pylist()
                _keep(self._rows, place, _heavy(entry), LATEST_ROWS)
            self._rows.move_to_end(place)
            return self._rows[place]

    def _find(self, record: ImageRecord) -> tuple[pq.ParquetFile, int, int]:
        """Return an image's shard, opened, its group of rows, and the row in it."""
        if record.shard not in self._files:
            opened = pq.ParquetFile(self._paths[record.shard], memory_map=True)
            closed = _keep(self._files, record.shard, opened, OPEN_FILES)
            if closed is not None:
                closed.close()
        self._files.move_to_end(record.shard)
        file, row = self._files[record.shard], record.row
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return file, group, row
            row -= rows
        raise DatasetError(f"{self.folder}: row {record.row} of {record.name} is missing")

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _LocalCopies:
    """Paths of the shards on this machine; each is asked for once, which in S3 is a request."""

    def __init__(self, folder: Place, shards: list[str]) -> None:
        self._folder, self._shards = folder, shards
        self._known: dict[int, Any] = {}

    def __getitem__(self, shard: int) -> Any:
        if shard not in self._known:
            self._known[shard] = local_copy(self._folder / self._shards[shard])
        return self._known[shard]


def _light_table(
    file: pq.ParquetFile, shard: int, dropped: pa.Array, numbers: dict[str, int]
) -> pa.Table:
    """A shard's images without what is read later, and without those of dropped annotations."""
    table = file.read(columns=[*LIGHT, LABELS], use_threads=False)
    name, source = (table[column].cast(pa.large_string()) for column in ("name", "source"))
    columns = {
        "name": name,
        "source": pc.if_else(pc.equal(name, source), pa.scalar(None, pa.large_string()), source),
        "image_digest": table["image_digest"].cast(pa.large_string()),
        "height": table["height"],
        "width": table["width"],
        "labels": _numbered(table["instances"].combine_chunks(), numbers),
        "shard": pa.array(np.full(table.num_rows, shard, np.int32)),
        "row": pa.array(np.arange(table.num_rows, dtype=np.int32)),
    }
    kept = pc.invert(pc.is_in(table["annotation"], value_set=dropped))
    return pa.table(columns).filter(kept)


def _numbered(instances: pa.ListArray, numbers: dict[str, int]) -> pa.ListArray:
    """The labels of each image as numbers, of which unseen labels get the next."""
    labels = pc.struct_field(pc.list_flatten(instances), "label").dictionary_encode()
    own = [numbers.setdefault(label, len(numbers)) for label in labels.dictionary.to_pylist()]
    codes = np.array(own, np.int32)[labels.indices.to_numpy()] if own else np.empty(0, np.int32)
    lengths = pc.fill_null(pc.list_value_length(instances), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes))


def _heavy(entry: dict[str, Any]) -> tuple[tuple[Instance, ...], bytes | None]:
    instances = tuple(
        Instance(i["label"], tuple(i["box"]), i["area"], i["rle"], i["area_outside"])
        for i in entry["instances"] or ()
    )
    return instances, entry.get("ignored")


def _keep(entries: OrderedDict[Any, Any], key: Any, value: Any, limit: int) -> Any:
    """Keep a value; return the one that was used longest ago if there are too many."""
    entries[key] = value
    return entries.popitem(last=False)[1] if len(entries) > limit else None


def dataset_digest(images: list[PreparedImage], splits: dict[str, list[str]]) -> str:
    """sha256 over names, images, instances and splits, in an order that shards do not change."""
    content = [
        sorted((i.name, i.image_digest, i.instances_digest) for i in images),
        {name: sorted(members) for name, members in splits.items()},
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
