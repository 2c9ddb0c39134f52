"""A frozen fine-tune of a ViT-B on a CPU beside the usual scripts, which encode in every step.

    python benchmarks/finetune.py [--steps N] [--ways samray script transformers]

Processor time of the parts, ways in turn in one process, on one random picture with a box for each
step: `script` is a loop around segment_anything, `transformers` Hugging Face's as its notebook
tunes SAM (vision and prompt encoder frozen, one box, one mask). From the medians: seconds
of EPOCHS epochs an image, when each epoch trains on one object of it, and on OBJECTS. Random
weights. The last line is JSON. `transformers` must be installed for its way.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from segment_anything import sam_model_registry
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from samray.config import load_config, resolve_model, with_learning_rate
from samray.sam.decode import PromptGroup
from samray.sam.embeddings import encode_image
from samray.sam.model import build_model
from samray.training.loop import Worker, prompted_sam, train_step
from samray.training.optimizer import Optimizer
from samray.training.step import Batch

EPOCHS, OBJECTS, SIDE, CELLS = 10, 8, 1024, 256
WORDS = ["model.type=vit_b", "model.adapt=none"]


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["samray", "script", "transformers"])
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {}
    for way in arguments.ways:
        parts |= {"samray": samray, "script": script, "transformers": transformers}[way]()
    taken: dict[str, list[float]] = {part: [] for part in parts}
    for _ in range(arguments.steps):
        for part, work in parts.items():
            started = time.process_time()
            work()
            taken[part].append(time.process_time() - started)
            print(part, taken[part][-1], flush=True)
    seconds = {part: statistics.median(times) for part, times in taken.items()}
    figures: dict[str, Any] = {part: round(value, 2) for part, value in seconds.items()}
    for way in arguments.ways:
        if way == "samray":
            one = seconds["encode"] + EPOCHS * seconds["step, 1 object"]
            several = seconds["encode"] + EPOCHS * seconds[f"step, {OBJECTS} objects"]
        else:
            one = EPOCHS * seconds[f"{way} step"]
            several = OBJECTS * one
        figures[f"{way}: {EPOCHS} epochs, 1 and {OBJECTS} objects"] = round(one), round(several)
    print(json.dumps(figures))


def samray() -> dict[str, Callable[[], Any]]:
    """Encode once; then steps on the embedding."""
    config = with_learning_rate(resolve_model(load_config(overrides=WORDS), weights_given=True))
    sam: Any = build_model("vit_b")
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    module = prompted_sam(config, sam)
    device = torch.device("cpu")
    optimizer, worker = Optimizer(sam, config.train, device), Worker(0, 1, device)

    def step(count: int) -> None:
        index = torch.zeros(count, dtype=torch.int64)
        group = PromptGroup(index, boxes=boxes(count))
        targets = [torch.rand(count, 1, CELLS, CELLS).round()]
        embedding = torch.randn(1, 256, 64, 64)
        batch = Batch(None, embedding, [group], targets, torch.ones(1, 1, CELLS, CELLS))
        train_step(module, optimizer, [batch], count, worker)

    return {
        "encode": lambda: encode_image(sam, picture),
        "step, 1 object": lambda: step(1),
        f"step, {OBJECTS} objects": lambda: step(OBJECTS),
    }


def script() -> dict[str, Callable[[], Any]]:
    """The usual loop around segment_anything."""
    sam = sam_model_registry["vit_b"]()
    optimizer = torch.optim.AdamW(sam.mask_decoder.parameters(), lr=1e-4)
    pixels = torch.randn(1, 3, SIDE, SIDE)

    def step() -> None:
        with torch.no_grad():
            embedding = sam.image_encoder(pixels)
            sparse, dense = sam.prompt_encoder(None, boxes(1), None)
        positions = sam.prompt_encoder.get_dense_pe()
        masks, _ = sam.mask_decoder(embedding, positions, sparse, dense, multimask_output=False)
        learn(masks, optimizer)

    return {"script step": step}


def transformers() -> dict[str, Callable[[], Any]]:
    """Hugging Face's SAM, its encoders frozen."""
    from transformers import SamConfig, SamModel

    model = SamModel(SamConfig())  # that of ViT-B
    for name, parameter in model.named_parameters():
        if name.startswith(("vision_encoder", "prompt_encoder")):
            parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(model.mask_decoder.parameters(), lr=1e-5)
    pixels = torch.randn(1, 3, SIDE, SIDE)

    def step() -> None:
        found = model(pixel_values=pixels, input_boxes=boxes(1)[None], multimask_output=False)
        learn(found.pred_masks.flatten(0, 1), optimizer)

    return {"transformers step": step}


def learn(masks: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step of cross-entropy and dice on a mask, 1 x 1 x h x w."""
    target = torch.rand_like(masks).round()
    shares = masks.sigmoid()
    dice = 1 - (2 * (shares * target).sum() + 1) / (shares.sum() + target.sum() + 1)
    optimizer.zero_grad()
    (binary_cross_entropy_with_logits(masks, target) + dice).backward()
    optimizer.step()


def boxes(count: int) -> Tensor:
    """P x 4, XYXY."""
    corners = torch.rand(count, 2) * (SIDE / 2)
    return torch.cat([corners, corners + SIDE / 4], dim=1)


if __name__ == "__main__":
    main()
