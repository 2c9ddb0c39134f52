"""ViT encoders, training steps and clicks on a GPU, samray's beside segment_anything's.

    python benchmarks/gpu.py --data PREPARED [--model-type vit_b vit_l vit_h] [--part encode ...]

Random weights, which do not change the time. JSON lines. *encode*: images a second, peak memory and
share of the rate that a large matrix product reaches in bfloat16, of the stock encoder in float32
and in bfloat16, one image at a time as `SamPredictor` does, and of samray's. *train*: seconds and
peak memory of the largest step of a fine-tune, and the peak that `train --dry-run` estimates; ViT-L
is left out. *click*: clicks a second on one embedding, through the decoder alone beside the stock
one, and to three masks of 1024 x 1024 on the host beside `SamPredictor.predict_torch`. *agree*: IoU
of the masks of `tiny`, whose weights are real, from embeddings in 16 bits with those of float32.
"""

import argparse
import functools
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor

from samray.benchmark import encoder_flops, matrix_rate, seconds_of
from samray.config import load_config, resolve_model, with_learning_rate
from samray.data.dataset import PreparedDataset
from samray.evaluation.metrics import iou_and_dice
from samray.geometry.images import decode_image
from samray.geometry.masks import decode_rle
from samray.geometry.prompts import Prompt, center_point
from samray.sam.adapt import num_blocks
from samray.sam.decode import (
    MAX_PROMPTS,
    ImageTokens,
    PromptGroup,
    decode_prompts,
    predict_masks,
)
from samray.sam.embeddings import (
    MAX_IMAGES,
    compile_encoder,
    encode_images,
    encode_many,
    entry_shape,
)
from samray.sam.model import build_model
from samray.sam.shipped import load_shipped
from samray.training.dry_run import forecast

DEVICE, PHOTOS, CLICKS = torch.device("cuda"), 64, (1, 32, 256)


def main() -> None:
    """Print a line of figures for each model and part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model-type", nargs="+", default=["vit_b", "vit_l", "vit_h"])
    parser.add_argument("--part", nargs="+", default=["agree", "encode", "train", "click"])
    arguments = parser.parse_args()
    rates = {
        str(dtype).removeprefix("torch."): round(matrix_rate(DEVICE, dtype) / 1e12, 1)
        for dtype in (torch.float32, torch.bfloat16)
    }
    show({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "tflops": rates})
    dataset = PreparedDataset(arguments.data)
    if "agree" in arguments.part:
        show({"model": "tiny", "IoU of masks, 16 bits beside float32": agreement(dataset)})
    for model_type in arguments.model_type:
        if "encode" in arguments.part:
            encoders(model_type, rates["bfloat16"] * 1e12)
        if "click" in arguments.part:
            show({"model": model_type, "clicks a second": clicks(model_type)})
        if "train" in arguments.part and model_type != "vit_l":
            steps(model_type, dataset)


def show(line: dict[str, Any]) -> None:
    """Print a JSON line."""
    print(json.dumps(line), flush=True)


@torch.inference_mode()
def encoders(model_type: str, rate: float) -> None:
    """Images a second, peak memory and share of the rate of each way."""
    ours: Any = build_model(model_type).to(DEVICE)
    stock = sam_model_registry[model_type]().image_encoder.eval().to(DEVICE)
    flops, side = encoder_flops(ours), ours.image_encoder.img_size
    one = torch.randn(1, 3, side, side, device=DEVICE)
    photo = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    loads = [functools.partial(np.copy, photo)] * PHOTOS

    def stock_in_half() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            stock(one)

    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "stock float32": (1, lambda: stock(one)),
        "stock bfloat16": (1, stock_in_half),
        "samray, 1 image": (1, lambda: encode_images(ours, [photo])),
        "samray float32": (PHOTOS, lambda: list(encode_many(ours, loads, full_precision=True))),
        "samray": (PHOTOS, lambda: list(encode_many(ours, loads))),
        "samray, compiled": (PHOTOS, lambda: list(encode_many(ours, loads))),
    }
    for way, (count, work) in ways.items():
        if way == "samray, compiled":
            compile_encoder(ours.image_encoder)
        peak, seconds = measured(work)
        figures = {
            "images a second": round(count / seconds, 2),
            "share of the rate": round(count * flops / seconds / rate, 3),
            "GiB": peak,
        }
        show({"model": model_type, "way": way, "at once": min(count, MAX_IMAGES), **figures})


def steps(model_type: str, dataset: PreparedDataset) -> None:
    """Seconds and peak memory of a training step, by what learns and by precision."""
    there = num_blocks(build_model(model_type).image_encoder)
    ways = {
        "none": ["model.adapt=none"],
        "lora, last quarter": ["model.adapt=lora", f"model.adapt_blocks={there // 4}"],
        "lora, last half": ["model.adapt=lora", f"model.adapt_blocks={there // 2}"],
        "full": ["model.adapt=full", "model.adapt_blocks=all"],
    }
    for precision in ("bfloat16", "float16"):
        for way, words in ways.items():
            given = [f"model.type={model_type}", f"train.precision={precision}", *words]
            config = with_learning_rate(resolve_model(load_config(overrides=given), True))
            gc.collect()  # a model refers to itself
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            found = forecast(config, dataset, DEVICE)
            assert found.peak is not None, "more memory than the GPU has"
            show(
                {
                    "model": model_type,
                    "learns": way,
                    "precision": precision,
                    "prompts": found.num_prompts,
                    "seconds": found.seconds,
                    "GiB": round(found.peak / 2**30, 2),
                    "estimated GiB": round(found.memory.total / 2**30, 2),
                }
            )


@torch.inference_mode()
def clicks(model_type: str) -> dict[str, dict[int, float]]:
    """Clicks a second on one embedding, by the number decoded together."""
    ours: Any = build_model(model_type).to(DEVICE)
    stock = sam_model_registry[model_type]().eval().to(DEVICE)
    embedding = torch.randn(*entry_shape(ours, num_blocks(ours.image_encoder)), device=DEVICE)
    tokens = ImageTokens.of(ours, embedding[None])
    predictor = SamPredictor(stock)
    predictor.features, predictor.is_image_set = embedding[None], True
    predictor.original_size = predictor.input_size = (1024, 1024)
    rng = np.random.default_rng(0)

    def stock_decoder(at: Tensor, labels: Tensor) -> None:
        sparse, dense = stock.prompt_encoder(points=(at, labels), boxes=None, masks=None)
        positions = stock.prompt_encoder.get_dense_pe()
        stock.mask_decoder(embedding[None], positions, sparse, dense, True)

    def stock_masks(at: Tensor, labels: Tensor) -> None:
        predictor.predict_torch(at, labels)[0].cpu()

    def our_decoder(at: Tensor, labels: Tensor) -> None:
        group = PromptGroup(torch.zeros(len(at), dtype=torch.long, device=DEVICE), at, labels)
        for some in group.chunks(MAX_PROMPTS):
            decode_prompts(ours, tokens, some, True)

    def our_masks(at: Tensor, labels: Tensor) -> None:
        pairs = zip(at.cpu().numpy(), labels.cpu().numpy(), strict=True)
        prompts = [Prompt(point, label) for point, label in pairs]
        for _, answer in predict_masks(ours, embedding, prompts, (1024, 1024)):
            for number in range(3):
                answer.mask(number)

    ways = {
        "decoder, samray": our_decoder,
        "decoder, stock": stock_decoder,
        "masks, samray": our_masks,
        "masks, predict_torch": stock_masks,
    }
    found: dict[str, dict[int, float]] = {way: {} for way in ways}
    for count in CLICKS:
        points = rng.uniform(0, 1000, (count, 1, 2)).astype(np.float32)
        at = torch.from_numpy(points).to(DEVICE)
        labels = torch.ones(count, 1, dtype=torch.long, device=DEVICE)
        for way, work in ways.items():
            found[way][count] = round(
                count / seconds_of(functools.partial(work, at, labels), DEVICE), 1
            )
    return found


@torch.inference_mode()
def agreement(dataset: PreparedDataset) -> dict[str, Any]:
    """IoU of the masks of `tiny` from embeddings in 16 bits with those of float32.

    One point in the middle of each object of the test split, and the mask of highest predicted IoU.
    """
    sam = load_shipped().model().to(DEVICE)
    ious: list[float] = []
    for record in dataset.split("test"):
        image = decode_image(dataset.image_bytes(record))
        masks = [decode_rle(instance.rle, record.size) for instance in record.instances]
        prompts = [Prompt(center_point(mask), np.ones(1, np.int64)) for mask in masks]
        answers = []
        for full_precision in (True, False):
            (embedding,) = encode_images(sam, [image], full_precision=full_precision)
            found = dict(predict_masks(sam, embedding, prompts, record.size))
            answers.append([found[place].mask(found[place].best) for place in range(len(found))])
        ious += [iou_and_dice(*pair)[0] for pair in zip(*answers, strict=True)]
    return {
        "objects": len(ious),
        "mean": round(statistics.mean(ious), 4),
        "median": round(statistics.median(ious), 4),
        "least": round(min(ious), 4),
    }


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Peak GPU memory in GiB, and seconds of some work."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(work, DEVICE)
    return round(torch.cuda.max_memory_allocated() / 2**30, 2), seconds


if __name__ == "__main__":
    main()
