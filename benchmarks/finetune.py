"""Fine-tuning a ViT-B on a CPU beside the usual scripts, which encode in every step.

    python benchmarks/finetune.py [--steps N] [--ways samray script transformers lora peft]

Processor time of the parts, ways in turn in one process, on one random picture with a box for each
step. Frozen image encoder: `samray`; `script`, a loop around segment_anything; `transformers`,
Hugging Face's SAM as its notebook tunes it (vision and prompt encoder frozen, one box, one mask).
LoRA: `lora`, samray's default, in the last blocks on cached activations; `peft`, the library's, in
all blocks of Hugging Face's SAM, with the mask decoder trained. From the medians: seconds of EPOCHS
epochs an image, when each epoch trains on one object of it, and on OBJECTS. Random weights. The
last line is JSON. `transformers` and `peft` must be installed for their ways.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from segment_anything import sam_model_registry
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from samray.config import load_config, resolve_model, with_learning_rate
from samray.sam.adapt import prefix
from samray.sam.decode import PromptGroup
from samray.sam.model import build_model
from samray.training.loop import Worker, prompted_sam, train_step
from samray.training.optimizer import Optimizer
from samray.training.step import Batch

EPOCHS, OBJECTS, SIDE, CELLS = 10, 8, 1024, 256


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS)[:3])
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], Any]] = {}
    for way in arguments.ways:
        parts |= {f"{way}, {part}": work for part, work in WAYS[way]().items()}
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
        once = seconds.get(f"{way}, encode once", 0.0)
        one = once + EPOCHS * seconds[f"{way}, step"]
        several = OBJECTS * one
        if once:
            several = once + EPOCHS * seconds[f"{way}, step of {OBJECTS} objects"]
        figures[f"{way}: {EPOCHS} epochs, 1 and {OBJECTS} objects"] = round(one), round(several)
    print(json.dumps(figures))


def samray() -> dict[str, Callable[[], Any]]:
    """Encode once; then steps on the embedding."""
    return _parts(["model.type=vit_b", "model.adapt=none"], torch.randn(1, 256, 64, 64))


def lora() -> dict[str, Callable[[], Any]]:
    """Compute the frozen blocks once; then steps through the others, with adapters."""
    return _parts(["model.type=vit_b"], torch.randn(1, 64, 64, 768))


def _parts(words: list[str], encoded: Tensor) -> dict[str, Callable[[], Any]]:
    config = with_learning_rate(resolve_model(load_config(overrides=words), weights_given=True))
    sam: Any = build_model("vit_b")
    module = prompted_sam(config, sam)
    device = torch.device("cpu")
    optimizer, worker = Optimizer(sam, config.train, device), Worker(0, 1, device)

    @torch.inference_mode()
    def encode() -> None:
        prefix(sam.image_encoder, torch.randn(1, 3, SIDE, SIDE), module.num_frozen)

    def step(count: int) -> None:
        index = torch.zeros(count, dtype=torch.int64)
        group = PromptGroup(index, boxes=boxes(count))
        targets = [torch.rand(count, 1, CELLS, CELLS).round()]
        batch = Batch(None, encoded, [group], targets, torch.ones(1, 1, CELLS, CELLS))
        train_step(module, optimizer, [batch], count, worker)

    return {
        "encode once": encode,
        "step": lambda: step(1),
        f"step of {OBJECTS} objects": lambda: step(OBJECTS),
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

    return {"step": step}


def transformers() -> dict[str, Callable[[], Any]]:
    """Hugging Face's SAM, its encoders frozen."""
    from transformers import SamConfig, SamModel

    model = SamModel(SamConfig())  # that of ViT-B
    for name, parameter in model.named_parameters():
        if name.startswith(("vision_encoder", "prompt_encoder")):
            parameter.requires_grad_(False)
    return {"step": _hugging_face_step(model)}


def peft() -> dict[str, Callable[[], Any]]:
    """Hugging Face's SAM with adapters in all blocks of its image encoder."""
    from peft import LoraConfig, get_peft_model
    from transformers import SamConfig, SamModel

    rank = load_config().model.lora_rank
    model = get_peft_model(SamModel(SamConfig()), LoraConfig(r=rank, target_modules=["qkv"]))
    model.base_model.model.mask_decoder.requires_grad_(True)
    return {"step": _hugging_face_step(model)}


def _hugging_face_step(model: torch.nn.Module) -> Callable[[], None]:
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=1e-5)
    pixels = torch.randn(1, 3, SIDE, SIDE)

    def step() -> None:
        found = model(pixel_values=pixels, input_boxes=boxes(1)[None], multimask_output=False)
        learn(found.pred_masks.flatten(0, 1), optimizer)

    return step


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


WAYS: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "samray": samray,
    "script": script,
    "transformers": transformers,
    "lora": lora,
    "peft": peft,
}


if __name__ == "__main__":
    main()
