"""Pre-train the instance decoder of `tiny` on drawn scenes, with its shipped image encoder frozen.

    python benchmarks/pretrain_instances.py --output FILE.safetensors [--frames 8000] [--pool 1500]

A frame is a mosaic of n x n drawn scenes (samray/training/scenes.py), n from 1 to 4, flipped and
turned, so that objects have any size and there are up to hundreds of them. Scenes are drawn once
into a pool and used in many frames. Every 500 frames the moving average of the weights is written.
"""

import argparse
import math
import time
from pathlib import Path

import cv2
import numpy as np
import safetensors.torch
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from samray.geometry.frames import PIXEL_MEAN, PIXEL_STD
from samray.instances.decoder import CELL, InstanceDecoder
from samray.instances.losses import TargetMaps, instance_loss
from samray.instances.targets import UNKNOWN, map_targets_of
from samray.sam.shipped import load_shipped
from samray.training.scenes import draw_scenes

SCENE = 256  # side of a drawn scene, in pixels
MIN_AREA = 40  # pixels of the frame; smaller objects are remnants, and count in no loss
BATCH = 2


def main() -> None:
    """Draw the pool, train, write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=8000)
    parser.add_argument("--pool", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    pool = draw_pool(arguments.pool, arguments.seed)
    encoder = load_shipped().model().image_encoder.requires_grad_(False)
    decoder = InstanceDecoder(128, encoder.img_size, num_classes=1)
    average = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.01)
    steps, started, losses = arguments.frames // BATCH, time.perf_counter(), []
    for step in range(steps):
        rng = np.random.default_rng([arguments.seed, step])
        drawn = [mosaic(pool, rng, decoder.frame) for _ in range(BATCH)]
        frames, numbers = zip(*drawn, strict=True)
        pixels = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            small = torch.nn.functional.avg_pool2d(pixels, decoder.frame // encoder.img_size)
            embeddings = encoder(small)
        targets = TargetMaps.of([map_targets_of(grid, [0] * int(grid.max())) for grid in numbers])
        for group in optimizer.param_groups:
            decay = 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = arguments.learning_rate * min((step + 1) / 100, decay)
        loss = instance_loss(decoder(embeddings, pixels), targets).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(decoder)
        losses.append(float(loss.detach()))
        if (step + 1) % (500 // BATCH) == 0 or step + 1 == steps:
            state = {
                name: value.half().contiguous()
                for name, value in average.module.state_dict().items()
                if not name.startswith("classify_")  # each dataset has its own classes
            }
            safetensors.torch.save_file(state, arguments.output)
            seconds, recent = time.perf_counter() - started, float(np.mean(losses[-250:]))
            print((step + 1) * BATCH, round(recent, 4), round(seconds), flush=True)


def draw_pool(count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, numbers) of drawn scenes, padding cut off: H x W x 3 uint8, H x W int32."""
    pool = []
    for start in range(0, count, 8):
        generator = torch.Generator().manual_seed(10_000_000 * (seed + 50) + start)
        scenes = draw_scenes(generator, 8, SCENE)
        for image, objects, valid in zip(scenes.images, scenes.objects, scenes.valid, strict=True):
            height, width = int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())
            pool.append(
                (
                    image[:, :height, :width].permute(1, 2, 0).byte().numpy().copy(),
                    objects[:height, :width].int().numpy().copy(),
                )
            )
    return pool


def mosaic(
    pool: list[tuple[np.ndarray, np.ndarray]], rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a frame, side x side x 3 float32 normalised, and its numbers on the decoder's grid."""
    count = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.4, 0.2, 0.1]))
    cell = math.ceil(side / count)
    frame = np.zeros((count * cell, count * cell, 3), np.uint8)
    numbers = np.zeros((count * cell, count * cell), np.int32)
    for place in range(count * count):
        image, objects = pool[rng.integers(len(pool))]
        if count > 1:  # a square part, so that no gap is left
            short = min(image.shape[:2])
            y, x = (int(rng.integers(extent - short + 1)) for extent in image.shape[:2])
            image, objects = (a[y : y + short, x : x + short] for a in (image, objects))
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        image, objects = (np.rot90(a[:, ::-1] if flip else a, turns) for a in (image, objects))
        factor = cell / max(image.shape[:2])
        size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
        image = cv2.resize(np.ascontiguousarray(image), size, interpolation=method)
        objects = cv2.resize(np.ascontiguousarray(objects), size, interpolation=cv2.INTER_NEAREST)
        top, left = place // count * cell, place % count * cell
        frame[top : top + size[1], left : left + size[0]] = image
        numbers[top : top + size[1], left : left + size[0]] = np.where(
            objects > 0, objects + 100 * place, 0
        )
        if count == 1:
            numbers[size[1] :] = UNKNOWN
            numbers[:, size[0] :] = UNKNOWN
    frame, numbers = frame[:side, :side], numbers[:side, :side]
    areas = np.bincount(np.maximum(numbers, 0).ravel())
    areas[0] = MIN_AREA
    numbers[(areas < MIN_AREA)[np.maximum(numbers, 0)]] = UNKNOWN
    places = np.unique(numbers[numbers > 0], return_inverse=True)[1]
    numbers[numbers > 0] = places + 1
    normalised = (frame.astype(np.float32) - PIXEL_MEAN) / PIXEL_STD
    if count == 1:
        normalised[size[1] :] = 0
        normalised[:, size[0] :] = 0
    return normalised.astype(np.float32), numbers[CELL // 2 :: CELL, CELL // 2 :: CELL]


if __name__ == "__main__":
    main()
