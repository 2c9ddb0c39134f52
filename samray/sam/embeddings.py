"""Image embeddings, and a content-addressed cache of them that all runs share.

A key is a digest of the image's bytes, the image encoder's weights, the transform and the
precision. Each key has a `.npy` file: tensors in Parquet are written 80 and read 130 times slower.

    CACHE/<encoder digest>/<first two of key>/<key>.npy      C x h x w float16

Where the last blocks of the encoder learn, the activations of the blocks before them are kept
instead (`samray.sam.adapt`), under a digest of these blocks' weights.
"""

import collections
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from samray.config import Config
from samray.data.dataset import PreparedDataset
from samray.errors import ConfigError
from samray.geometry.frames import TRANSFORM_VERSION, normalize, resize
from samray.geometry.views import VIEWS_VERSION
from samray.sam.adapt import blocks, num_blocks, prefix, prefix_digest
from samray.storage import Place, free_bytes, list_objects, read_bytes, resolve, whole_file

Item = TypeVar("Item")

PRECISION = "float16"
# Of the GPU's free memory, for each image that is encoded together with others: more than a ViT-H
# needs.
IMAGE_BYTES = 2**30
MAX_IMAGES = 16
THREADS = 8  # that decode and resize images while a GPU encodes others


class EmbeddingCache:
    """Embeddings of one image encoder, or activations of its first blocks.

    Args:
        folder: shared by all encoders; each gets a folder of its own inside.
        sam: the model whose image encoder made, or will make, the embeddings.
        num_frozen: number of the encoder's first blocks; None: all, and the cache has embeddings.
        reserve_gb: disk space that `has_room` leaves free, in GB.
        full_precision: of the embeddings, see `encode_images`; others are kept apart from them.
    """

    def __init__(
        self,
        folder: Place,
        sam: Any,
        num_frozen: int | None = None,
        reserve_gb: float = 0.0,
        full_precision: bool = True,
    ) -> None:
        self.img_size: int = sam.image_encoder.img_size
        there = num_blocks(sam.image_encoder)
        self.num_frozen = there if num_frozen is None else num_frozen
        self.encoder_digest = prefix_digest(sam, self.num_frozen)
        self.folder = folder / self.encoder_digest[:16]
        self.reserve_gb, self.full_precision = reserve_gb, full_precision

    def path(self, image_digest: str, view: int = 0) -> Place:
        """Return the file of an image's embedding, present or not.

        Args:
            view: number of a view of the image, see `samray.geometry.views.cached_view`.
        """
        content = [image_digest, self.encoder_digest, self.img_size, TRANSFORM_VERSION, PRECISION]
        if view:
            content += [VIEWS_VERSION, view]
        if not self.full_precision:
            content.append("computed in float16")
        key = hashlib.sha256("\0".join(map(str, content)).encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.npy"

    def load(self, image_digest: str, view: int = 0) -> np.ndarray | None:
        """Return an image's entry, memory-mapped if on a local disk; None if it is missing.

        A file that cannot be read, as after a power failure, is deleted and counts as missing.

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
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (EOFError, ValueError) as exc:
            print(f"samray: {path}: is damaged ({exc}); deleted", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # a cache of someone else
                path.unlink(missing_ok=True)
            return None
        return embedding

    def lacking(self, entries: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return those of the entries, (image digest, view), that are missing or cut off.

        All files of an encoder have one size.
        """
        asked, sizes = list(entries), {}
        if isinstance(self.folder, Path):
            for entry in asked:
                with contextlib.suppress(OSError):
                    sizes[entry] = self.path(*entry).stat().st_size
        else:  # one listing instead of one request per image
            there = {name.rpartition("/")[2]: size for name, size, _ in list_objects(self.folder)}
            sizes = {entry: there.get(self.path(*entry).name, 0) for entry in asked}
        whole = max(sizes.values(), default=0)
        return [entry for entry in asked if not sizes.get(entry) or sizes[entry] < whole]

    def has_room(self) -> bool:
        """Whether the disk has more free space than is reserved."""
        return free_bytes(self.folder) > self.reserve_gb * 1e9

    def save(self, image_digest: str, embedding: np.ndarray, view: int = 0) -> None:
        """Write an embedding atomically."""
        path = self.path(image_digest, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, embedding.astype(np.float16))


def encode_image(sam: Any, image: np.ndarray, full_precision: bool = False) -> Tensor:
    """Return the embedding of one image, on the model's device.

    Args:
        image: H x W x 3 uint8 RGB.
        full_precision: see `encode_images`.

    Returns:
        C x h x w float32.
    """
    return encode_images(sam, [image], full_precision=full_precision)[0]


def encode_images(
    sam: Any,
    images: Sequence[np.ndarray],
    num_frozen: int | None = None,
    full_precision: bool = False,
) -> Tensor:
    """Return the embeddings of B images of any sizes, encoded together.

    Args:
        images: H x W x 3 uint8 RGB, each.
        num_frozen: return the activations of so many first blocks instead.
        full_precision: compute in float32 on a GPU, too, instead of float16. Images whose values
            float16 cannot hold are computed in float32 anyway.

    Returns:
        B x C x h x w float32, on the model's device; see `samray.sam.adapt.prefix`.
    """
    side = sam.image_encoder.img_size
    frames = [resize(image, side) for image in images]
    half = sam.device.type != "cpu" and not full_precision
    entries = _encode(sam, frames, num_frozen, half)
    if half and not entries.isfinite().all():
        entries = _encode(sam, frames, num_frozen, half=False)
    return entries


def encode_many(
    sam: Any,
    images: Iterable[Callable[[], np.ndarray]],
    num_frozen: int | None = None,
    full_precision: bool = False,
) -> Iterator[np.ndarray]:
    """Yield the embedding of each image, in order.

    On a GPU images are encoded together, as many as its free memory allows, while threads decode
    and resize the next ones. On a CPU, which has no time left beside, one after the other.

    Args:
        images: functions that return H x W x 3 uint8 RGB.
        num_frozen, full_precision: as in `encode_images`.

    Yields:
        C x h x w float16, as the cache holds it.
    """
    if sam.device.type == "cpu":
        for load in images:
            yield encode_images(sam, [load()], num_frozen, full_precision)[0].half().numpy()
        return
    side, size = sam.image_encoder.img_size, _images_at_once(sam.device)
    frames = ahead((functools.partial(_frame, load, side) for load in images), 2 * size)
    running: _Copy | None = None
    while batch := list(itertools.islice(frames, size)):
        number = len(batch)
        if is_compiled(sam.image_encoder):  # for so many images; compiling for others takes a while
            batch += batch[-1:] * (size - number)
        entries = _encode(sam, batch, num_frozen, half=not full_precision)[:number]
        started = _Copy(entries.half(), batch)
        if running is not None:  # what waits for it overlaps with the batch just started
            yield from _finished(sam, running, num_frozen)
        running = started
    if running is not None:
        yield from _finished(sam, running, num_frozen)


class _Copy:
    """A copy of a batch's entries to the host, which waits for no work that is queued later.

    Args:
        entries: B x ... float16, on a GPU.
        frames: what they were computed from.
    """

    def __init__(self, entries: Tensor, frames: Sequence[Tensor]) -> None:
        self.frames = frames[: len(entries)]
        self._entries = torch.empty(entries.shape, dtype=entries.dtype, pin_memory=True)
        self._finite = torch.empty((), dtype=torch.bool, pin_memory=True)
        self._entries.copy_(entries, non_blocking=True)
        self._finite.copy_(entries.isfinite().all(), non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def wait(self) -> np.ndarray | None:
        """Return the entries; None if some are not finite."""
        self._done.synchronize()
        return self._entries.numpy() if self._finite else None


def _finished(sam: Any, copy: _Copy, num_frozen: int | None) -> Iterator[np.ndarray]:
    """Yield a batch's entries; in float32 one by one where float16 could not hold the values."""
    entries = copy.wait()
    if entries is not None:
        yield from entries
        return
    for frame in copy.frames:
        yield _encode(sam, [frame], num_frozen, half=False)[0].half().cpu().numpy()


def compile_encoder(encoder: Any) -> None:
    """Let torch compile an image encoder's blocks when they are first used on a GPU, in place."""
    for block in blocks(encoder):
        block.compile(dynamic=False)


def is_compiled(encoder: Any) -> bool:
    """Whether `compile_encoder` was called."""
    return blocks(encoder)[0]._compiled_call_impl is not None


def ahead(calls: Iterable[Callable[[], Item]], number: int) -> Iterator[Item]:
    """Yield what functions return, in order; threads call the next `number` of them meanwhile."""
    waiting: collections.deque[Future[Item]] = collections.deque()
    left = iter(calls)
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            waiting.extend(threads.submit(call) for call in itertools.islice(left, number))
            while waiting:
                item = waiting.popleft().result()
                waiting.extend(threads.submit(call) for call in itertools.islice(left, 1))
                yield item
        finally:  # after an error, or if nobody wants the rest
            threads.shutdown(cancel_futures=True)


def _frame(load: Callable[[], np.ndarray], side: int) -> Tensor:
    return resize(load(), side).pin_memory()  # in a thread, beside the GPU's work


def _images_at_once(device: torch.device) -> int:
    """How many images to encode together on a GPU; half of its free memory stays free."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(MAX_IMAGES, max(1, free // 2 // IMAGE_BYTES))


@torch.inference_mode()
def _encode(sam: Any, resized: Sequence[Tensor], num_frozen: int | None, half: bool) -> Tensor:
    """Encode what `resize` returns; other arguments and result as in `encode_images`.

    Args:
        half: compute in float16. Its masks are nearer to those of float32 than bfloat16's.
    """
    device, encoder = sam.device, sam.image_encoder
    if device.type != "cpu":
        # A byte a value, and copying from pageable memory would wait for the GPU. A frame that is
        # pinned already stays as it is.
        resized = [frame.pin_memory().to(device, non_blocking=True) for frame in resized]
    pixels = torch.stack([normalize(frame, encoder.img_size) for frame in resized])
    if num_frozen is None:
        num_frozen = num_blocks(encoder)
    if device.type == "cpu":  # where 16 bits would be slower, unless the caller's autocast asks
        return prefix(encoder, pixels, num_frozen).float()
    try:
        with torch.autocast(device.type, torch.float16, enabled=half):
            return prefix(encoder, pixels, num_frozen).float()
    except RuntimeError as exc:
        # Importing the class of the exception would take two seconds in each process.
        if not type(exc).__module__.startswith("torch._dynamo"):
            raise
        raise ConfigError(
            f"embeddings.compile: torch cannot compile the image encoder here ({exc}); it needs a "
            "C compiler on each node; set embeddings.compile=false"
        ) from exc


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
