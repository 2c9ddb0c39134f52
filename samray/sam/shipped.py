"""The weights of `tiny` that come with the package: load and verify them, or export new ones.

samray/tiny_weights/tiny.safetensors    float16
samray/tiny_weights/tiny.json           sha256, architecture, and training settings
samray/tiny_weights/MODEL_CARD.md       description
"""

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from samray import __version__
from samray.config import load_config
from samray.errors import CheckpointError
from samray.runs import RunFolder
from samray.sam.checkpoint import Checkpoint, load_checkpoint
from samray.sam.model import build_model, load_weights, tiny_architecture
from samray.sam.weights import digest_of
from samray.storage import make_folder, read_json, write_bytes, write_json

SHIPPED = Path(__file__).parents[1] / "tiny_weights"
WEIGHTS, DESCRIPTION = "tiny.safetensors", "tiny.json"


def load_shipped(folder: Path = SHIPPED) -> Checkpoint:
    """Load `tiny`'s pre-trained weights, float32 on the CPU.

    Raises:
        CheckpointError: the file is missing, does not match its description, or belongs to
            another architecture.
    """
    weights_path, description_path = folder / WEIGHTS, folder / DESCRIPTION
    description = read_json(description_path)
    try:
        content = weights_path.read_bytes()
    except OSError as exc:
        raise CheckpointError(
            f"{weights_path}: cannot be read ({exc.strerror}); install samray again"
        ) from exc
    expected, found = description.get("sha256"), hashlib.sha256(content).hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{weights_path}: has sha256 {found}, but {description_path.name} says {expected}; "
            "the two do not belong together; install samray again or export both again"
        )
    architecture = description.get("architecture")
    if architecture != tiny_architecture():
        raise CheckpointError(
            f"{weights_path}: was made for {architecture} by {description_path.name}, but this "
            f"samray's tiny is {tiny_architecture()}; use the weights of this version"
        )
    weights = {name: value.float() for name, value in safetensors.torch.load(content).items()}
    sam = build_model("tiny")
    load_weights(sam, weights, "tiny", weights_path)
    progress = {"base": {"source": "tiny, shipped with samray", "digest": digest_of(weights)}}
    return Checkpoint(weights_path, "tiny", weights, progress)


def export_weights(run: RunFolder, folder: Path) -> Path:
    """Write the best checkpoint of a pre-training run in the form that the package ships.

    Returns:
        The weights file; its description is in the same folder.
    """
    best = load_checkpoint(run.path)
    make_folder(folder, "--export")
    halved = {name: value.half().contiguous() for name, value in best.weights.items()}
    content = safetensors.torch.save(halved)
    description = {
        "model_type": "tiny",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
        "architecture": tiny_architecture(),
        "parameters": sum(value.numel() for value in halved.values()),
        "made_by": _history(run, best),
    }
    write_bytes(folder / WEIGHTS, content)
    write_json(folder / DESCRIPTION, description)
    return folder / WEIGHTS


def _history(run: RunFolder, best: Checkpoint) -> dict[str, Any]:
    config = load_config(run.path / "config.yaml")
    epochs = run.state["epochs"]
    done = best.progress["epoch"]
    device = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "samray": __version__,
        "torch": torch.__version__,
        "data": run.state["dataset_digest"],
        "seed": config.train.seed,
        "scenes": done * config.pretrain.scenes_per_epoch,
        "epochs": done,
        "hours": round(sum(epoch["seconds"] for epoch in epochs[:done]) / 3600, 2),
        "device": device,
        "start": Path(best.progress["base"]["source"]).name,
        "scores": {k: round(v, 4) for k, v in best.progress.items() if k.startswith("val_iou")},
        "config": config.model_dump(
            mode="json",
            include={"model", "prompts", "loss", "train", "pretrain"},
            exclude={  # paths of the training machine
                "model": {"checkpoint"},
                "train": {"data_dir", "output_dir"},
                "pretrain": {"export_dir"},
            },
        ),
    }
