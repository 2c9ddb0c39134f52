"""Image embeddings, and a content-addressed cache of them that all runs share.

A key is a digest of the image's bytes, the image encoder's weights, the transform and the
precision. Each key has a `.npy` file: tensors in Parquet are written 80 and read 130 times slower.

    CACHE/<encoder digest>/<first two of key>/<key>.npy      C x h x w float16

Where the last blocks of the encoder learn, the activations of the blocks before them are kept
instead (`samray.sam.adapt`), under a digest of these blocks' weights.
"""

import copy
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samray.config import Config
from samray.data.dataset import PreparedDataset
from samray.geometry.frames import TRANSFORM_VERSION, image_to_input
from samray.geometry.views import VIEWS_VERSION
from samray.sam.adapt import num_blocks, prefix, prefix_digest
from samray.storage import Place, free_bytes, list_objects, read_bytes, resolve, whole_file

PRECISION = "float16"


class EmbeddingCache:
    """Embeddings of one image encoder, or activations of its first blocks.

    Args:
        folder: shared by all encoders; each gets a folder of its own inside.
        sam: the model whose image encoder made, or will make, the embeddings.
        num_frozen: number of the encoder's first blocks; None: all, and the cache has embeddings.
        reserve_gb: disk space that `has_room` leaves free, in GB.
    """

    def __init__(
        self, folder: Place, sam: Any, num_frozen: int | None = None, reserve_gb: float = 0.0
    ) -> None:
        self.img_size: int = sam.image_encoder.img_size
        there = num_blocks(sam.image_encoder)
        self.num_frozen = there if num_frozen is None else num_frozen
        self.encoder_digest = prefix_digest(sam, self.num_frozen)
        self.folder = folder / self.encoder_digest[:16]
        self.reserve_gb = reserve_gb

    def path(self, image_digest: str, view: int = 0) -> Place:
        """Return the file of an image's embedding, present or not.

        Args:
            view: number of a view of the image, see `samray.geometry.views.cached_view`.
        """
        content = [image_digest, self.encoder_digest, self.img_size, TRANSFORM_VERSION, PRECISION]
        if view:
            content += [VIEWS_VERSION, view]
        key = hashlib.sha256("\0".join(map(str, content)).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.npy"

    def load(self, image_digest: str, view: int = 0) -> np.ndarray | None:
        """Return an image's entry, memory-mapped if on a local disk; None if it is missing.

        Args:
            view: see `path`.

        Returns:
            C x h x w float16; activations have the shape of `samray.sam.adapt.prefix`'s.
        """
        path = self.path(image_digest, view)
        try:
            if isinstance(path, Path):
                mapped: np.ndarray = np.load(path, mmap_mode="r")
                return mapped
            embedding: np.ndarray = np.load(io.BytesIO(read_bytes(path)))
        except FileNotFoundError:
            return None
        return embedding

    def lacking(self, entries: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return those of the entries, (image digest, view), that are missing."""
        if isinstance(self.folder, Path):
            return [entry for entry in entries if not self.path(*entry).exists()]
        # One listing instead of one request per image.
        there = {name.rpartition("/")[2] for name, _, _ in list_objects(self.folder)}
        return [entry for entry in entries if self.path(*entry).name not in there]

    def has_room(self) -> bool:
        """Whether the disk has more free space than is reserved."""
        return free_bytes(self.folder) > self.reserve_gb * 1e9

    def save(self, image_digest: str, embedding: np.ndarray, view: int = 0) -> None:
        """Write an embedding atomically."""
        path = self.path(image_digest, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, embedding.astype(np.float16))


def encode_image(sam: Any, image: np.ndarray) -> torch.Tensor:
    """Return the embedding of one image, on the model's device.

    Args:
        image: H x W x 3 uint8 RGB.

    Returns:
        C x h x w float32.
    """
    return encode_images(sam, [image])[0]


@torch.inference_mode()
def encode_images(
    sam: Any, images: Sequence[np.ndarray], num_frozen: int | None = None
) -> torch.Tensor:
    """Return the embeddings of B images of any sizes, encoded together.

    Args:
        images: H x W x 3 uint8 RGB, each.
        num_frozen: return the activations of so many first blocks instead.

    Returns:
        B x C x h x w float32, on the model's device; see `samray.sam.adapt.prefix`.
    """
    encoder = sam.image_encoder
    inputs = [image_to_input(image, encoder.img_size) for image in images]
    batch = torch.stack(inputs).to(sam.device)
    return prefix(encoder, batch, num_blocks(encoder) if num_frozen is None else num_frozen)


def entry_shape(sam: Any, num_frozen: int) -> tuple[int, ...]:
    """Shape of an image's entry in the cache."""
    encoder = sam.image_encoder
    frame = torch.empty(1, 3, encoder.img_size, encoder.img_size, device="meta")
    return tuple(prefix(copy.deepcopy(encoder).to("meta"), frame, num_frozen).shape[1:])


def entry_bytes(sam: Any, num_frozen: int) -> int:
    """Bytes of an image's `.npy` file in the cache: float16 values and NumPy's header."""
    return math.prod(entry_shape(sam, num_frozen)) * 2 + 128


def embeddings_folder(config: Config, dataset: PreparedDataset) -> Place:
    """Return the cache's folder: the configured one, else inside the prepared dataset."""
    if config.embeddings.cache_dir is not None:
        return resolve(config.embeddings.cache_dir, "embeddings.cache_dir")
    return dataset.folder / "embeddings"
