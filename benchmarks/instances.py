"""All objects of the test split: our ways beside SAM's grid of points, Otsu, and a small U-Net.

    python benchmarks/ablation.py --data PREPARED --recipe new= --runs RUNS
    python benchmarks/instances.py --data PREPARED --runs RUNS/NAME-new-* [--ways chosen otsu ...]
        [--images N] [--unet-minutes M] [--output FILE.jsonl]

Ways: `chosen`, what the run chose on its val split; `watershed` and `prompts`, with its thresholds;
`grid-base` and `grid-tuned`, SAM's mask generator with the defaults of `samray predict`; `otsu`,
Otsu's threshold of the smoothed gray image and a watershed on distances; `unet`, three classes
(background, inside, boundary) and a watershed, trained on the same images for M minutes of
processor time, with the run's seed. The free choices of the last two, which side of the threshold
the objects are on and how far apart their centres, are made on the val split. One JSON line each:
the measures of `score_instances`, and seconds an image.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed
from torch import Tensor, nn

from samray.config import PredictConfig, load_config
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.geometry.frames import image_to_input, input_size_of
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask, encode_rle
from samray.geometry.views import draw_view
from samray.instances.choice import evenly
from samray.instances.metrics import (
    ImageObjects,
    outside_region,
    score_instances,
    segmentation_accuracy,
)
from samray.instances.saved import load_instances
from samray.instances.segment import find_objects, maps_of
from samray.prediction.segmentation import find_everything, generator_settings
from samray.runs import RunFolder
from samray.sam.checkpoint import load_checkpoint
from samray.sam.embeddings import encode_image

Found = list[tuple[CroppedMask, float, str]]  # mask, score, label
Finder = Callable[[np.ndarray], Found]

WAYS = ("chosen", "watershed", "prompts", "grid-base", "grid-tuned", "otsu", "unet")
MIN_PIXELS = 16  # of a part that Otsu's threshold leaves
SIDE = 512  # of the U-Net's frame, in pixels; twice that of `tiny`, as the instance decoder's
CHOICES = [(s, gap) for s in ("bright", "dark", "inner") for gap in (3, 5, 10, 20, 40, 80)]


def main() -> None:
    """Score every way of every run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--images", type=int, help="of the test split, evenly; default: all")
    parser.add_argument("--unet-minutes", type=float, default=5)
    parser.add_argument("--output", default="/dev/stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = PreparedDataset(Path(arguments.data))
    records = dataset.split("test")
    if arguments.images:
        records = [records[place] for place in evenly(len(records), arguments.images)]
    for run in arguments.runs:
        for way in arguments.ways:
            find = finder(way, RunFolder(run), dataset, arguments.unet_minutes)
            started = time.perf_counter()
            found = [objects(dataset, record, find) for record in records]
            seconds = (time.perf_counter() - started) / len(records)
            line = {
                **{"data": Path(arguments.data).name, "run": run.name, "way": way},
                **{"images": len(records), "seconds": round(seconds, 3)},
                **score_instances(found),
            }
            with open(arguments.output, "a") as file:
                print(json.dumps(line), file=file, flush=True)
            figures = ", ".join(f"{k} {line[k]:.3f}" for k in ("msa", "sa50", "count_error"))
            print(run.name, way, figures, f"{seconds:.2f} s", file=sys.stderr, flush=True)


def finder(way: str, run: RunFolder, dataset: PreparedDataset, minutes: float) -> Finder:
    """Return what finds the objects of an image in one of WAYS."""
    if way == "otsu":
        return chosen_on_val(otsu, dataset)
    if way == "unet":
        seed = load_config(run.path / "config.yaml").train.seed
        return chosen_on_val(unet(dataset, minutes, seed), dataset)
    checkpoint = load_checkpoint(run.base if way == "grid-base" else run.path)
    sam = checkpoint.model()
    if way.startswith("grid"):
        return lambda image: grid(sam, image)
    model = load_instances(checkpoint, sam)
    assert model is not None
    used = model.way
    if way == "watershed":
        used = replace(used, kind="watershed")
    elif way == "prompts" and used.kind == "watershed":
        used = replace(used, kind="both")

    def find(image: np.ndarray) -> Found:
        embedding = encode_image(sam, image)
        found = find_objects(sam, maps_of(model.decoder, image, embedding), embedding, used)
        return [(one.mask, one.score, model.labels[one.class_index]) for one in found]

    return find


def objects(dataset: PreparedDataset, record: ImageRecord, find: Finder) -> ImageObjects:
    """Return found and true objects of an image, but those found in its ignored region.

    Tiles have such a region where they cut an object off.
    """
    found = find(decode_image(dataset.image_bytes(record)))
    rles = [encode_rle(mask, record.size) for mask, _, _ in found]
    judged = outside_region(rles, record.ignored, record.size)
    return ImageObjects(
        size=record.size,
        found=tuple(rles[place] for place in judged),
        found_labels=tuple(found[place][2] for place in judged),
        scores=tuple(found[place][1] for place in judged),
        true=tuple(instance.rle for instance in record.instances),
        true_labels=tuple(instance.label for instance in record.instances),
    )


def chosen_on_val(
    way: Callable[[np.ndarray, str, int], np.ndarray], dataset: PreparedDataset
) -> Finder:
    """Return a way from (image, side of the threshold, gap between centres) to a label map, with
    the choice of highest mean segmentation accuracy on the val split."""

    def find(image: np.ndarray, choice: tuple[str, int]) -> Found:
        numbers = way(image, *choice)
        boxes = ndimage.find_objects(numbers)
        return [
            (CroppedMask(numbers[box] == number, (box[1].start, box[0].start)), 1.0, "")
            for number, box in enumerate(boxes, start=1)
            if box is not None
        ]

    records = dataset.split("val")
    records = [records[place] for place in evenly(len(records), 8)]

    def accuracy(choice: tuple[str, int]) -> float:
        found = [objects(dataset, record, lambda image: find(image, choice)) for record in records]
        return float(np.mean([segmentation_accuracy(image.ious()) for image in found]))

    best = max(CHOICES, key=accuracy)
    return lambda image: find(image, best)


def otsu(image: np.ndarray, side: str, gap: int) -> np.ndarray:
    """Return H x W int: objects by Otsu's threshold and a watershed on distances.

    Args:
        side: of the threshold: `bright`, `dark`, or `inner`, the one less seen at the border.
    """
    gray = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 1)
    inside = gray > threshold_otsu(gray)
    border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    if side == "dark" or (side == "inner" and border.mean() > 0.5):
        inside = ~inside
    parts = ndimage.label(inside)[0]
    inside &= (np.bincount(parts.ravel()) >= MIN_PIXELS)[parts]
    return split(ndimage.distance_transform_edt(inside), inside, gap)


def split(height: np.ndarray, inside: np.ndarray, gap: int) -> np.ndarray:
    """Return a watershed from the peaks of a height, at least `gap` pixels apart."""
    parts = ndimage.label(inside)[0]
    height = ndimage.gaussian_filter(height, 1)
    peaks = peak_local_max(height, min_distance=gap, labels=parts, exclude_border=False)
    seeds = np.zeros(inside.shape, int)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    numbers: np.ndarray = watershed(-height, seeds, mask=inside)
    return numbers


def grid(sam: Any, image: np.ndarray) -> Found:
    """Return the objects of SAM's mask generator."""
    found = find_everything(sam, image, generator_settings(PredictConfig(), "tiny"))
    return [(CroppedMask(one.pixels, one.box[:2]), one.score, "") for one in found]


class UNet(nn.Module):
    """Four levels of two convolutions, 24 to 192 channels: about 1.1 million parameters."""

    def __init__(self, channels: Sequence[int] = (24, 48, 96, 192)) -> None:
        super().__init__()
        ins = (3, *channels[:-1])
        self.down = nn.ModuleList(double(i, o) for i, o in zip(ins, channels, strict=True))
        pairs = list(itertools.pairwise(channels))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, flat, 2, 2) for flat, deep in pairs)
        self.joined = nn.ModuleList(double(2 * flat, flat) for flat, _ in pairs)
        self.out = nn.Conv2d(channels[0], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return B x 3 x S x S logits."""
        kept = []
        for level, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if level else x)
            kept.append(x)
        for up, joined, side in zip(self.up, self.joined, kept[-2::-1], strict=True):
            x = joined(torch.cat([up(x), side], dim=1))
        out: Tensor = self.out(x)
        return out


def double(channels_in: int, channels: int) -> nn.Sequential:
    """Two convolutions of 3 x 3; GroupNorm, as batches of two are too small for BatchNorm."""
    layers: list[nn.Module] = []
    for number in (channels_in, channels):
        layers += [nn.Conv2d(number, channels, 3, padding=1, bias=False)]
        layers += [nn.GroupNorm(8, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def unet(
    dataset: PreparedDataset, minutes: float, seed: int
) -> Callable[[np.ndarray, str, int], np.ndarray]:
    """Train a U-Net on the train split; return it as a way, see `chosen_on_val`."""
    torch.manual_seed(seed)
    net, rng = UNet(), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    records, shares = dataset.split("train"), torch.tensor([1.0, 1.0, 2.0])
    began = time.process_time()
    while (left := 1 - (time.process_time() - began) / (60 * minutes)) > 0:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * max(0.05, left)
        drawn = [example(dataset, records[rng.integers(len(records))], rng) for _ in range(2)]
        pixels, classes = (torch.stack(part) for part in zip(*drawn, strict=True))
        loss = nn.functional.cross_entropy(net(pixels), classes, shares, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()

    @torch.inference_mode()
    def find(image: np.ndarray, _: str, gap: int) -> np.ndarray:
        size = (image.shape[0], image.shape[1])
        height, width = input_size_of(size, SIDE)
        logits = net(image_to_input(image, SIDE)[None])[0, :, :height, :width]
        inside, anywhere = (logits.softmax(0)[1].numpy(), (logits.argmax(0) > 0).numpy())
        numbers = split(inside, anywhere, gap).astype(np.int32)
        resized = cv2.resize(
            numbers.astype(np.float32), size[::-1], interpolation=cv2.INTER_NEAREST
        )
        return resized.astype(int)

    return find


def example(
    dataset: PreparedDataset, record: ImageRecord, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return an image, flipped, turned and recoloured, and the classes of its pixels."""
    view = draw_view(rng)
    image = view.show(decode_image(dataset.image_bytes(record)))
    height, width = input_size_of((image.shape[0], image.shape[1]), SIDE)
    classes = np.full((SIDE, SIDE), -1, np.int64)  # the padding counts nowhere
    classes[:height, :width] = 0
    if (ignored := record.decode_ignored()) is not None:  # and neither what nobody annotated
        region = cv2.resize(
            view.turn(ignored).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST
        )
        classes[:height, :width][region > 0] = -1
    for instance in record.instances:
        mask = view.turn(record.decode(instance)).astype(np.uint8)
        small = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        inside = cv2.erode(small, np.ones((3, 3), np.uint8), borderValue=1)
        classes[:height, :width][small > 0] = 2
        classes[:height, :width][inside > 0] = 1
    return image_to_input(image, SIDE), torch.from_numpy(classes)


if __name__ == "__main__":
    main()
