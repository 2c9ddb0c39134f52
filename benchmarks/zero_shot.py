"""Zero-shot IoU of a model on datasets it was not trained on, against classical methods.

    python benchmarks/zero_shot.py PREPARED [PREPARED ...] [--checkpoint RUN] [--num-instances 120]

Mean IoU at original resolution over instances drawn at random from all splits; all methods get the
same instances and prompts. The random point is the first of the three and five clicks; each further
click is the innermost pixel of the largest error. `ceiling` is the true mask, averaged down to the
decoder's cells and upscaled: the upper bound for masks of that resolution.
"""

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from samray.data.dataset import SPLITS, PreparedDataset
from samray.evaluation.metrics import iou_and_dice
from samray.evaluation.scoring import click_through
from samray.geometry.frames import masks_to_original
from samray.geometry.images import decode_image
from samray.geometry.masks import crop_mask
from samray.geometry.prompts import Prompt, draw_prompt
from samray.sam.checkpoint import load_checkpoint
from samray.sam.embeddings import encode_image
from samray.sam.model import low_res_size
from samray.sam.shipped import load_shipped
from samray.training.batches import mask_to_target

MODEL = ("center point", "random point", "3 clicks", "5 clicks", "box")
WITHOUT = ("ellipse in the box", "GrabCut in the box", "flood fill from the point")
FLOOD_TOLERANCE = 20  # grey levels per channel, from the clicked pixel's colour
GRABCUT_ITERATIONS = 5


def main() -> None:
    """Print a table for each dataset; write JSON with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prepared", nargs="+", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: the shipped tiny")
    parser.add_argument("--num-instances", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint) if arguments.checkpoint else load_shipped()
    sam = checkpoint.model()
    report = {}
    for folder in arguments.prepared:
        figures = score_dataset(sam, PreparedDataset(folder), arguments)
        report[folder.name] = figures
        print(f"\n{folder.name}: {figures['instances']} instances, mean IoU")
        for name, value in figures["iou"].items():
            print(f"  {name:<26} {value:.3f}")
        print("  predicted against true IoU (1 random point):")
        for row in figures["calibration"]:
            print(
                f"    predicted {row['from']:.1f}-{row['to']:.1f}: {row['count']:4d} masks, "
                f"predicted {row['predicted']:.3f}, true {row['true']:.3f}"
            )
        print(f"  mean |predicted - true| {figures['calibration_error']:.3f}")
        print(f"  encode {figures['encode_seconds']:.3f} s per image")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


def score_dataset(sam, dataset: PreparedDataset, arguments: argparse.Namespace) -> dict:
    """Score every method on the same instances."""
    rng = np.random.default_rng(arguments.seed)
    everything = [
        (record, number)
        for split in SPLITS
        for record in dataset.split(split)
        for number in range(len(record.instances))
    ]
    amount = min(arguments.num_instances, len(everything))
    chosen = rng.choice(len(everything), size=amount, replace=False)
    by_image: dict[str, list] = {}
    for record, number in (everything[i] for i in chosen):
        by_image.setdefault(record.digest, []).append((record, number))
    ious: dict[str, list[float]] = {name: [] for name in (*MODEL, "ceiling", *WITHOUT)}
    calibration, encoding = [], []
    with tqdm(total=amount, unit="instance", disable=None) as bar:
        for instances in by_image.values():
            image = decode_image(dataset.image_bytes(instances[0][0]))
            started = time.perf_counter()
            embedding = encode_image(sam, image)
            encoding.append(time.perf_counter() - started)
            for record, number in instances:
                gt_mask = record.decode(record.instances[number])
                masks, predicted = _answers(sam, embedding, gt_mask, rng)
                masks |= _without_model(image, gt_mask, masks.pop("prompt"))
                masks["ceiling"] = _ceiling(sam, gt_mask)
                for name, mask in masks.items():
                    ious[name].append(iou_and_dice(mask, gt_mask)[0])
                calibration.append((predicted, ious["random point"][-1]))
                bar.update()
    return {
        "instances": amount,
        "iou": {name: float(np.mean(values)) for name, values in ious.items()},
        "calibration": _binned(np.array(calibration)),
        "calibration_error": float(np.abs(np.subtract(*np.array(calibration).T)).mean()),
        "encode_seconds": float(np.median(encoding)),
    }


def _answers(sam, embedding: torch.Tensor, gt_mask: np.ndarray, rng) -> tuple[dict, float]:
    center, point, box = (
        draw_prompt(kind, gt_mask, 1, rng) for kind in ("center", "random", "bbox")
    )
    clicks = next(click_through(sam, embedding, [gt_mask], [point], 5))
    (((from_center, _),),) = click_through(sam, embedding, [gt_mask], [center], 1)
    (((from_box, _),),) = click_through(sam, embedding, [gt_mask], [box], 1)
    masks = {
        "center point": from_center,
        "random point": clicks[0][0],
        "3 clicks": clicks[2][0],
        "5 clicks": clicks[4][0],
        "box": from_box,
        "prompt": (point, box),
    }
    return masks, clicks[0][1]


def _without_model(
    image: np.ndarray, gt_mask: np.ndarray, prompts: tuple[Prompt, Prompt]
) -> dict[str, np.ndarray]:
    point, box = prompts
    x1, y1, x2, y2 = (int(value) for value in box.box)
    rows, columns = np.mgrid[: gt_mask.shape[0], : gt_mask.shape[1]] + 0.5
    across = (columns - (x1 + x2) / 2) / ((x2 - x1) / 2)
    down = (rows - (y1 + y2) / 2) / ((y2 - y1) / 2)
    return {
        "ellipse in the box": across**2 + down**2 <= 1,
        "GrabCut in the box": _grabcut(image, (x1, y1, x2, y2)),
        "flood fill from the point": _flood(image, point.point_coords[0]),
    }


def _grabcut(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """GrabCut on the box; a margin of the box's size around it provides background colours."""
    x1, y1, x2, y2 = box
    left, top = max(0, 2 * x1 - x2), max(0, 2 * y1 - y2)
    crop = np.ascontiguousarray(image[top : 2 * y2 - y1, left : 2 * x2 - x1, ::-1])
    result = np.zeros(image.shape[:2], bool)
    states = np.zeros(crop.shape[:2], np.uint8)
    cv2.setRNGSeed(0)
    try:
        cv2.grabCut(
            crop,
            states,
            (x1 - left, y1 - top, x2 - x1, y2 - y1),
            np.zeros((1, 65)),
            np.zeros((1, 65)),
            GRABCUT_ITERATIONS,
            cv2.GC_INIT_WITH_RECT,
        )
    except cv2.error:  # too few pixels for its colour models; use the box
        result[y1:y2, x1:x2] = True
        return result
    inside = (states == cv2.GC_FGD) | (states == cv2.GC_PR_FGD)
    result[top : top + crop.shape[0], left : left + crop.shape[1]] = inside
    return result


def _flood(image: np.ndarray, point: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    filled = np.zeros((height + 2, width + 2), np.uint8)
    tolerance = (FLOOD_TOLERANCE,) * 3
    cv2.floodFill(
        image.copy(),
        filled,
        (int(point[0]), int(point[1])),
        0,
        tolerance,
        tolerance,
        cv2.FLOODFILL_FIXED_RANGE | cv2.FLOODFILL_MASK_ONLY | 4,
    )
    return filled[1:-1, 1:-1] > 0


def _ceiling(sam, gt_mask: np.ndarray) -> np.ndarray:
    img_size = sam.image_encoder.img_size
    crop, cells = crop_mask(gt_mask), low_res_size(sam)
    shares = torch.from_numpy(mask_to_target(crop, gt_mask.shape, img_size, cells))
    logits = masks_to_original(shares[None, None] - 0.5, gt_mask.shape, img_size)
    return (logits[0, 0] > 0).numpy()


def _binned(pairs: np.ndarray) -> list[dict]:
    rows = []
    for low in np.arange(0, 1, 0.2):
        inside = pairs[(pairs[:, 0] >= low) & ((pairs[:, 0] < low + 0.2) | (low > 0.7))]
        if len(inside):
            predicted, true = inside.mean(axis=0)
            rows.append(
                {
                    "from": float(low),
                    "to": float(low + 0.2),
                    "count": len(inside),
                    "predicted": float(predicted),
                    "true": float(true),
                }
            )
    return rows


if __name__ == "__main__":
    main()
