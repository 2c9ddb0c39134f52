"""The decoder, a prompt: samray's beside segment_anything's and its matrix products, on a CPU.

    python benchmarks/decoder.py [--model-type vit_b tiny] [--prompts 1 16 256]
                                 [--step-prompts 1 8 32 64] [--repeats N]

Random weights and embeddings, the ways alternate in one process. A JSON line for each row: median
milliseconds of processor time a prompt, their least and most, and the ratio. `answers`: one click a
prompt, all masks at 1024 x 1024, beside `SamPredictor.predict_torch`. `step`: decoder, losses and
backward pass of a training step, beside the stock modules called once for all prompts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from segment_anything import SamPredictor
from torch import Tensor

from samray.geometry.prompts import Prompt
from samray.sam.decode import PromptGroup, predict_masks
from samray.sam.losses import sam_loss
from samray.sam.model import build_model
from samray.training.step import Batch, PromptedSam

SIZE = (1024, 1024)
WEIGHTS = (20.0, 1.0, 1.0)
TOKENS, HEADS = 7, 8  # of a click: a token of IoU, four of masks, the point and its padding


def main() -> None:
    """Print the rows of each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", nargs="+", default=["vit_b", "tiny"])
    parser.add_argument("--prompts", nargs="*", type=int, default=[1, 16, 256])
    parser.add_argument("--step-prompts", nargs="*", type=int, default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=5, help="of up to 16 prompts; fewer of more")
    arguments = parser.parse_args()
    for model_type in arguments.model_type:
        sam: Any = build_model(model_type)
        floor = {
            "work": "products",
            "model": model_type,
            **timed({"ms": partial(products, sam)}, 5),
        }
        print(json.dumps(floor), flush=True)
        for work, counts, ways in (
            ("answers", arguments.prompts, answers),
            ("step", arguments.step_prompts, steps),
        ):
            for count in counts:
                repeats = max(1, min(arguments.repeats, arguments.repeats * 16 // count))
                row = timed(ways(sam, count), repeats, count)
                ratio = round(row["stock"][1] / row["samray"][1], 2)
                row = {"work": work, "model": model_type, "prompts": count, **row, "ratio": ratio}
                print(json.dumps(row), flush=True)


def timed(
    ways: dict[str, Callable[[], Any]], repeats: int, count: int = 1
) -> dict[str, tuple[float, float, float]]:
    """Return least, median and most milliseconds of processor time a prompt, ways in turn."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            started = time.process_time()
            run()
            taken[way].append((time.process_time() - started) / count * 1000)
    return {
        way: (round(min(times), 1), round(statistics.median(times), 1), round(max(times), 1))
        for way, times in taken.items()
    }


def answers(sam: Any, count: int) -> dict[str, Callable[[], Any]]:
    """Ways to answer clicks on one embedding."""
    embedding, coords = embedding_of(sam), clicks(count)
    predictor = SamPredictor(sam)
    predictor.is_image_set, predictor.features = True, embedding
    predictor.original_size, predictor.input_size = SIZE, (sam.image_encoder.img_size,) * 2
    in_frame = coords * (sam.image_encoder.img_size / SIZE[0])
    prompts = [Prompt(point.numpy(), np.array([1])) for point in coords]

    def ours() -> None:
        for _, masks in predict_masks(sam, embedding[0], prompts, SIZE):
            for number in range(3):
                masks.mask(number)

    labels = torch.ones(count, 1)
    return {"stock": lambda: predictor.predict_torch(in_frame, labels), "samray": ours}


def steps(sam: Any, count: int) -> dict[str, Callable[[], Any]]:
    """Ways to compute losses and gradients of clicks on one embedding."""
    sam.image_encoder.requires_grad_(False)
    module = PromptedSam(sam, WEIGHTS, max_prompts=64)
    coords = clicks(count) * (sam.image_encoder.img_size / SIZE[0])
    index = torch.zeros(count, dtype=torch.int64)
    group = PromptGroup(index, coords, torch.ones(count, 1, dtype=torch.int64))
    side = 4 * sam.prompt_encoder.image_embedding_size[0]
    targets = torch.rand(count, 1, side, side).round()
    batch = Batch(None, embedding_of(sam), [group], [targets], torch.ones(1, 1, side, side))

    def ours() -> None:
        module.zero_grad()
        module(batch)["loss"].backward()

    def stock() -> None:
        module.zero_grad()
        masks, ious = stock_decode(sam, batch.encoded, group)
        valid = batch.valid.expand(count, -1, -1, -1)
        sam_loss(masks, ious, targets, valid, WEIGHTS)["loss"].backward()

    return {"stock": stock, "samray": ours}


def stock_decode(sam: Any, embeddings: Tensor | None, group: PromptGroup) -> tuple[Tensor, Tensor]:
    """The stock mask decoder on all prompts."""
    sparse, dense = sam.prompt_encoder((group.point_coords, group.point_labels), None, None)
    masks, ious = sam.mask_decoder(
        embeddings, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask_output=True
    )
    return masks, ious


def products(sam: Any) -> None:
    """The large matrix products of a click's answer, and nothing else; a step has three times."""
    width = sam.prompt_encoder.embed_dim
    height, length = sam.prompt_encoder.image_embedding_size
    cells, rows = torch.ones(height * length, width), torch.ones(TOKENS * HEADS, width)
    for _ in range(5):  # attentions between tokens and image
        weights = rows @ cells.t()
        weights @ cells
    upscaled = (cells @ torch.ones(width, width)).view(-1, width // 4)
    upscaled = (upscaled @ torch.ones(width // 4, width // 2)).view(-1, width // 8)
    torch.ones(3, width // 8) @ upscaled.t()


def embedding_of(sam: Any) -> Tensor:
    """1 x C x h x w."""
    encoder = sam.prompt_encoder
    return torch.randn(1, encoder.embed_dim, *encoder.image_embedding_size)


def clicks(count: int) -> Tensor:
    """P x 1 x 2 in pixels of SIZE."""
    return torch.rand(count, 1, 2) * SIZE[0]


if __name__ == "__main__":
    main()
