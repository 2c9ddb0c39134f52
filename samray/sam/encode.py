"""Fill the embedding cache with a pool of Ray actors; each image is encoded once."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from tqdm import tqdm

from samray import cluster
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.errors import ConfigError
from samray.geometry.images import decode_image
from samray.geometry.views import cached_view
from samray.sam.checkpoint import load_checkpoint
from samray.sam.embeddings import EmbeddingCache, encode_images, entry_bytes
from samray.storage import Place, free_bytes


@dataclass(frozen=True)
class EncodingReport:
    """Counts and duration of filling the cache.

    Attributes:
        encoded: images encoded now, each view of an image counted.
        found: images whose embedding was in the cache.
        seconds: duration of encoding.
    """

    encoded: int
    found: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON."""
        return asdict(self)


@ray.remote(max_restarts=2, max_task_retries=2)
class ImageEncoder:
    """Encodes images of a prepared dataset into the cache."""

    def __init__(
        self, dataset: Place, checkpoint: Place, cache: Place, num_frozen: int | None
    ) -> None:
        self.dataset = PreparedDataset(dataset)
        self.sam = load_checkpoint(checkpoint).model()
        self.cache = EmbeddingCache(cache, self.sam, num_frozen)
        self.sam.to(cluster.actor_device())

    def encode(self, name: str, view: int) -> str:
        """Encode one view of an image into the cache; return the image's name."""
        record = self.dataset.images[name]
        if self.cache.load(record.digest, view) is None:  # a retried task may find it there
            image = decode_image(self.dataset.image_bytes(record))
            shown = cached_view(record.digest, view).show(image)
            (entry,) = encode_images(self.sam, [shown], self.cache.num_frozen).cpu().numpy()
            self.cache.save(record.digest, entry, view)
        return name


def encode_missing(
    dataset: PreparedDataset,
    views: Sequence[tuple[ImageRecord, int]],
    checkpoint: Place,
    cache_dir: Place,
    reserve_gb: float,
    device: str,
    num_frozen: int | None = None,
) -> EncodingReport:
    """Encode every image that the cache lacks, each exactly once.

    Args:
        views: images, each with the number of a view (`samray.geometry.views.cached_view`); two
            images with the same content are encoded once.
        checkpoint: a checkpoint folder; only its image encoder is used.
        reserve_gb: disk space in GB to leave free.
        device: auto, cpu or gpu.
        num_frozen: of the cache, see `EmbeddingCache`.

    Raises:
        ConfigError: the missing embeddings do not fit the disk.
        ClusterError: the cluster has no free CPU or GPU for a long time.
    """
    sam = load_checkpoint(checkpoint).model()
    cache = EmbeddingCache(cache_dir, sam, num_frozen)
    unique = {(record.digest, view): (record.name, view) for record, view in views}
    missing = [unique[entry] for entry in cache.lacking(unique)]
    found = len(unique) - len(missing)
    if not missing:
        print(f"embeddings: 0 images to encode, {found} found in {cache.folder}", flush=True)
        return EncodingReport(0, found, 0.0)
    image_bytes = entry_bytes(sam, cache.num_frozen)
    needed, free = len(missing) * image_bytes, free_bytes(cache.folder)
    room = f"{free / 2**30:.1f} GiB free, " if math.isfinite(free) else ""
    statement = (
        f"{len(missing)} images x {image_bytes / 2**20:.2f} MiB = {needed / 2**20:.1f} MiB into "
        f"{cache.folder} ({room}{found} images found there)"
    )
    if needed + reserve_gb * 1e9 > free:
        raise ConfigError(
            f"embeddings: {statement}; they do not fit beside the {reserve_gb} GB of "
            "embeddings.reserve_gb; free some space or set embeddings.cache_dir to a larger disk"
        )
    pool = cluster.start_pool(
        ImageEncoder, device, len(missing), dataset.folder, checkpoint, cache_dir, cache.num_frozen
    )
    started = time.perf_counter()
    _encode_first(pool, missing[0], len(missing), statement)
    with tqdm(
        total=len(missing), initial=1, desc="encode", unit="img", file=sys.stderr, disable=None
    ) as bar:
        for _ in pool.map(_encode, missing[1:]):
            bar.update()
    pool.stop()
    return EncodingReport(len(missing), found, round(time.perf_counter() - started, 2))


def _encode(actor: Any, entry: tuple[str, int]) -> Any:
    return actor.encode.remote(*entry)


def _encode_first(
    pool: cluster.Pool, entry: tuple[str, int], num_images: int, statement: str
) -> None:
    """Encode one image alone, and print from its time how long the rest will take."""
    started = time.perf_counter()
    list(pool.map(_encode, [entry]))
    seconds = time.perf_counter() - started
    minutes = seconds * (num_images - 1) / pool.limit / 60
    print(
        f"embeddings: {statement}; {seconds:.2f} s an image, up to {pool.limit} at a time: "
        f"about {minutes:.1f} min",
        flush=True,
    )
