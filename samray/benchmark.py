"""How fast this machine is at each part of samray's work, beside what its hardware allows.

Plain torch in this process, without Ray. Weights are random, since they do not change the time, and
photos are drawn. Each figure is a median of a few seconds of work.
"""

import copy
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from segment_anything.modeling.image_encoder import Attention
from torch.utils.flop_counter import FlopCounterMode

from samray import __version__
from samray.config import Config, resolve_model, with_learning_rate
from samray.data.dataset import ImageRecord, Instance
from samray.data.sample_data import draw_scene
from samray.errors import ConfigError
from samray.geometry.images import decode_image
from samray.geometry.masks import crop_mask, encode_rle
from samray.geometry.prompts import Prompt
from samray.sam.adapt import num_blocks, num_frozen_blocks, prefix
from samray.sam.attention import FusedAttention
from samray.sam.decode import predict_masks
from samray.sam.embeddings import encode_images, entry_bytes, entry_shape
from samray.sam.model import build_model, local_device, low_res_size
from samray.storage import (
    Place,
    make_folder,
    read_bytes,
    remove_folder,
    require_folder,
    resolve,
    write_bytes,
    write_json,
)
from samray.training.batches import BatchLoader
from samray.training.loop import Worker, prompted_sam, train_step
from samray.training.optimizer import Optimizer
from samray.training.step import Batch

SECONDS, MAX_SECONDS = 5.0, 60.0  # of work for one figure, and where a few times take longer
NUM_PHOTOS, OBJECTS = 8, 10  # drawn photos, and objects of each that are trained on
NUM_FILES, FILE_BYTES = 8, 2**23  # written and read to measure storage


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        what: was measured.
        value, unit: its median.
        note: what it is to be compared with.
    """

    what: str
    value: float
    unit: str
    note: str = ""


def benchmark(config: Config) -> dict[str, Any]:
    """Measure this machine, and write the figures to `benchmark.output`.

    Returns:
        `machine`, `model`, `figures`: a list of `Figure`s as dicts, and `forecast`: seconds and
        bytes of a run on `benchmark.num_images` images.

    Raises:
        ConfigError: --device gpu without a GPU, the storage is missing, or the output cannot be
            written.
    """
    output = resolve(config.benchmark.output, "--output")
    if output.is_dir():  # now, as the figures take minutes
        raise ConfigError(f"--output: {output} is a folder; name a file, e.g. benchmark.json in it")
    make_folder(output.parent, "--output")
    config = with_learning_rate(resolve_model(config, weights_given=True))
    device = local_device(config.scaling.device)
    found = {
        "samray": __version__,
        "machine": _machine(device),
        "model": config.model.type,
        **_measure(config, device),
    }
    write_json(output, found)
    return found


def _measure(config: Config, device: torch.device) -> dict[str, Any]:
    """Measure one part after the other, and forecast a run from them."""
    stored = storage_figures(config.benchmark.storage)  # first, as it may be refused
    sam: Any = build_model(config.model.type).to(device)
    num_frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    photos = _DrawnPhotos()
    rates = {dtype: matrix_rate(device, dtype) for dtype in _dtypes(device)}
    flops = encoder_flops(sam)
    image = decode_image(photos.image_bytes(photos.records[0]))
    encode = seconds_of(lambda: encode_images(sam, [image]), device)
    figures = [
        Figure(f"matrix product, {_name(dtype)}", rate / 1e9, "GFLOP/s")
        for dtype, rate in rates.items()
    ]
    floor = flops / max(rates.values())  # a GPU encodes in 16 bits
    figures.append(
        Figure("encoder", encode, "s an image", f"its matrix products alone: {floor:.3g} s")
    )
    embedding = encode_images(sam, [image])[0]
    for count in (1, 64):
        seconds = _click_seconds(sam, embedding, count, device)
        figures.append(Figure(f"clicks, {count} at once", 1e3 * seconds / count, "ms a click"))
    loader = _loader(config, sam, photos)
    feed = seconds_of(lambda: loader.load([0], 0, 1, epoch=0), device)
    figures.append(Figure("feed", 1 / feed, "photos a second", "one process, without the model"))
    step, per_prompt = _step_seconds(config, sam, loader, num_frozen, device)
    note = f"{1e3 * per_prompt:.3g} ms an object"
    figures.append(Figure("training step", step, "s an image", note))
    figures += stored
    number = config.benchmark.num_images
    epoch = number * max(step, feed)
    forecast = {
        "images": number,
        "objects_an_image": OBJECTS,
        "encode_seconds": number * encode if num_frozen else 0.0,
        "cache_bytes": number * entry_bytes(sam, num_frozen) if num_frozen else 0,
        "epoch_seconds": epoch,
        "epochs": config.train.num_epochs,
        "train_seconds": epoch * config.train.num_epochs,
    }
    return {"figures": [asdict(figure) for figure in figures], "forecast": forecast}


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of some work, repeated for a while; the first time warms up."""
    times: list[float] = []
    began, passed = time.perf_counter(), 0.0
    # The first time says little, so there are three at least, unless they would take minutes.
    while (passed < SECONDS or len(times) < 3) and passed < MAX_SECONDS and len(times) < 200:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        passed = time.perf_counter() - began
    return statistics.median(times[1:] or times)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of a large matrix product, 2 n^3 for a side of n."""
    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    return float(2 * side**3 / seconds_of(lambda: one @ one, device))


def encoder_flops(sam: Any) -> int:
    """Return the operations of the stock image encoder's convolutions and matrix products."""
    encoder = copy.deepcopy(sam.image_encoder).to("meta")
    for module in encoder.modules():
        if isinstance(module, FusedAttention):  # its longer vectors are no work that has to be done
            module.__class__ = Attention
    frame = torch.empty(1, 3, encoder.img_size, encoder.img_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        prefix(encoder, frame, num_blocks(encoder))
    return int(counter.get_total_flops())


def storage_figures(storage: str | None) -> list[Figure]:
    """Write, read and delete some files, and say how fast.

    Args:
        storage: a folder or s3://bucket/prefix; None: a temporary folder.
    """
    if storage is None:
        with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
            return _storage_figures(Path(folder), "temporary folder")
    place = resolve(storage, "--storage")
    if isinstance(place, Path):
        require_folder(place, "--storage")
    own = place / f"samray-benchmark-{uuid.uuid4().hex[:8]}"
    try:
        return _storage_figures(own, storage)
    finally:
        remove_folder(own)


def _storage_figures(folder: Place, name: str) -> list[Figure]:
    content = os.urandom(FILE_BYTES)
    files = [folder / f"{number}.bin" for number in range(NUM_FILES)]
    if isinstance(folder, Path):
        folder.mkdir(exist_ok=True)
    started = time.perf_counter()
    for file in files:
        write_bytes(file, content)
    written = time.perf_counter() - started
    for file in files:
        _forget(file)
    started = time.perf_counter()
    for file in files:
        read_bytes(file)
    read = time.perf_counter() - started
    small = folder / "small.bin"
    write_bytes(small, content[:100])
    latency = seconds_of(lambda: read_bytes(small), torch.device("cpu"))
    size = NUM_FILES * FILE_BYTES / 1e6
    return [
        Figure("write", size / written, "MB/s", f"{name}, one file of 8 MiB at a time"),
        Figure("read", size / read, "MB/s", name),
        Figure("read a small file", 1e3 * latency, "ms", name),
    ]


def _forget(file: Place) -> None:
    """Let the system forget a local file's content, so that it is read from the disk."""
    if isinstance(file, Path) and hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _DrawnPhotos:
    """A few drawn photos with their objects."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.records = [self._record(number) for number in range(NUM_PHOTOS)]

    def image_bytes(self, record: ImageRecord) -> bytes:
        """Return a photo as JPEG."""
        return self.files[record.digest]

    def _record(self, number: int) -> ImageRecord:
        image, shapes = draw_scene(0, number)
        jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()
        digest = f"{number:064x}"
        self.files[digest] = jpeg
        size = (image.shape[0], image.shape[1])
        instances = []
        for shape in shapes[:OBJECTS]:
            filled = np.zeros(size, np.uint8)
            cv2.fillPoly(filled, [np.rint(shape["points"]).astype(np.int32)], 1)
            mask = crop_mask(filled > 0)
            rle, area = encode_rle(mask, size), int(mask.pixels.sum())
            instances.append(Instance(shape["label"], mask.box, area, rle))
        name = f"{number}.jpg"
        return ImageRecord(name, name, digest, size, tuple(instances), 0, number)


def _loader(config: Config, sam: Any, photos: _DrawnPhotos) -> BatchLoader:
    side, seed = sam.image_encoder.img_size, config.train.seed
    return BatchLoader(
        photos,
        photos.records,
        config.prompts,
        seed,
        None,
        side,
        low_res_size(sam),
        config.train.augment,
        config.train.max_objects,
    )


def _click_seconds(sam: Any, embedding: torch.Tensor, count: int, device: torch.device) -> float:
    rng = np.random.default_rng(0)
    one = np.ones(1, np.int64)
    prompts = [Prompt(rng.uniform(0, 500, (1, 2)).astype(np.float32), one) for _ in range(count)]
    return seconds_of(lambda: list(predict_masks(sam, embedding, prompts, (500, 500))), device)


def _step_seconds(
    config: Config, sam: Any, loader: BatchLoader, num_frozen: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of a training step of one image, and a prompt; what is cached is not computed."""
    module = prompted_sam(config, sam).to(device)
    optimizer = Optimizer(module.sam, config.train, device)
    worker = Worker(0, 1, device)
    batches: list[Batch] = []
    for number in range(NUM_PHOTOS):
        (batch,) = loader.load([number], 0, 1, epoch=number)
        if num_frozen:
            batch.images, batch.encoded = None, torch.zeros(1, *entry_shape(sam, num_frozen))
        batches.append(batch)
    places = iter(range(10**9))

    def step() -> None:
        batch = batches[next(places) % NUM_PHOTOS]
        train_step(module, optimizer, [batch], len(batch), worker)

    seconds = seconds_of(step, device)
    return seconds, seconds / statistics.mean(len(batch) for batch in batches)


def _dtypes(device: torch.device) -> list[torch.dtype]:
    """The precisions worth measuring."""
    if device.type != "cuda":
        return [torch.float32]
    found = [torch.float32, torch.float16]
    return [*found, torch.bfloat16] if torch.cuda.is_bf16_supported() else found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
        "torch": torch.__version__,
    }
