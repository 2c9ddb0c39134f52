"""Fill the embedding cache with a pool of Ray actors; each image is encoded once."""

import functools
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from samray import cluster
from samray.config import Config
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.errors import ConfigError
from samray.geometry.images import decode_image
from samray.geometry.views import cached_view
from samray.sam.checkpoint import load_checkpoint
from samray.sam.embeddings import (
    EmbeddingCache,
    compile_encoder,
    encode_many,
    entry_bytes,
)
from samray.storage import Place, free_bytes

GPU_CHUNK = 64  # images of one call to an actor that has a GPU


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
        self,
        dataset: Place,
        checkpoint: Place,
        cache: Place,
        num_frozen: int | None,
        full_precision: bool,
        compiled: bool,
    ) -> None:
        self.dataset = PreparedDataset(dataset)
        self.sam = load_checkpoint(checkpoint).model()
        self.cache = EmbeddingCache(cache, self.sam, num_frozen, full_precision=full_precision)
        self.sam.to(cluster.actor_device())
        if compiled:
            compile_encoder(self.sam.image_encoder)

    def encode(self, views: Sequence[tuple[str, int]]) -> None:
        """Encode views of images, by name, into the cache."""
        named = [(self.dataset.images[name], view) for name, view in views]
        # A retried task may find some there.
        missing = [entry for entry in named if self.cache.load(entry[0].digest, entry[1]) is None]
        images = (functools.partial(self._shown, *entry) for entry in missing)
        encoded = encode_many(self.sam, images, self.cache.num_frozen, self.cache.full_precision)
        for (record, view), entry in zip(missing, encoded, strict=True):
            self.cache.save(record.digest, entry, view)

    def _shown(self, record: ImageRecord, view: int) -> np.ndarray:
        image = decode_image(self.dataset.image_bytes(record))
        return cached_view(record.digest, view).show(image)


def full_precision(config: Config) -> bool:
    """Whether images are encoded in float32: on a CPU, or if `embeddings.precision` asks for it."""
    wanted = config.embeddings.precision == "float32"
    return wanted or not cluster.gpus_per_actor(config.scaling.device)


def encode_missing(
    dataset: PreparedDataset,
    views: Iterable[tuple[ImageRecord, int]],
    checkpoint: Place,
    cache_dir: Place,
    config: Config,
    num_frozen: int | None = None,
) -> EncodingReport:
    """Encode every image that the cache lacks, each exactly once.

    Args:
        views: images, each with the number of a view (`samray.geometry.views.cached_view`); two
            images with the same content are encoded once.
        checkpoint: a checkpoint folder; only its image encoder is used.
        config: its `embeddings` and `scaling.device`.
        num_frozen: of the cache, see `EmbeddingCache`.

    Raises:
        ConfigError: the missing embeddings do not fit the disk, or their folder cannot be written.
        ClusterError: the cluster has no free CPU or GPU for a long time.
    """
    sam = load_checkpoint(checkpoint).model()
    reserve_gb, device = config.embeddings.reserve_gb, config.scaling.device
    full = full_precision(config)
    cache = EmbeddingCache(cache_dir, sam, num_frozen, full_precision=full)
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
    cluster.require_shared(cache_dir, "embeddings.cache_dir")
    settings = cache_dir, cache.num_frozen, full, config.embeddings.compile
    pool = cluster.start_pool(
        ImageEncoder, device, len(missing), dataset.folder, checkpoint, *settings
    )
    started = time.perf_counter()
    _encode_first(pool, missing[0], len(missing), statement)
    size = GPU_CHUNK if cluster.gpus_per_actor(device) else 1
    chunks = [missing[start : start + size] for start in range(1, len(missing), size)]
    with tqdm(
        total=len(missing), initial=1, desc="encode", unit="img", file=sys.stderr, disable=None
    ) as bar:
        for index, _ in pool.map(_encode, chunks):
            bar.update(len(chunks[index]))
    pool.stop()
    return EncodingReport(len(missing), found, round(time.perf_counter() - started, 2))


def _encode(actor: Any, views: Sequence[tuple[str, int]]) -> Any:
    return actor.encode.remote(views)


def _encode_first(
    pool: cluster.Pool, entry: tuple[str, int], num_images: int, statement: str
) -> None:
    """Encode one image alone, and print from its time how long the rest will take."""
    started = time.perf_counter()
    list(pool.map(_encode, [[entry]]))
    seconds = time.perf_counter() - started
    minutes = seconds * (num_images - 1) / pool.limit / 60
    print(
        f"embeddings: {statement}; {seconds:.2f} s an image, up to {pool.limit} at a time: "
        f"about {minutes:.1f} min",
        flush=True,
    )
