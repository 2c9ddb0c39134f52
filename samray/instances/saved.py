"""The instance decoder in a checkpoint: beside `weights.pth`, which stays a plain SAM.

instances.pth     the decoder's state dict
instances.json    labels, way and thresholds, the image encoder that it belongs to

The decoder that ships with samray reads the embeddings of `tiny` as it ships.
"""

import functools
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from samray.data.annotation import UNNAMED
from samray.errors import CheckpointError, DatasetError
from samray.instances.decoder import InstanceDecoder
from samray.instances.segment import Way
from samray.sam.checkpoint import Checkpoint
from samray.sam.model import encoder_digest
from samray.sam.shipped import load_shipped
from samray.sam.weights import digest_of
from samray.storage import Place, local_copy, read_json, write_bytes, write_json

FORMAT = 1
WEIGHTS, DESCRIPTION = "instances.pth", "instances.json"
SHIPPED = Path(__file__).parents[1] / "tiny_weights" / "tiny_instances.safetensors"


@dataclass(frozen=True)
class InstanceModel:
    """What finds all objects of an image, beside the SAM whose embedding it reads.

    Attributes:
        decoder: on the CPU until it is moved.
        labels: of its classes.
        way: how its maps become objects.
    """

    decoder: InstanceDecoder
    labels: tuple[str, ...]
    way: Way


def new_decoder(sam: Any, num_classes: int, seed: int) -> InstanceDecoder:
    """Return a decoder for a model: pre-trained on drawn scenes as far as its shapes fit.

    The part that reads the embedding of another encoder than `tiny`'s, and the classes, start at
    random.

    Args:
        seed: of the random weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = sam.prompt_encoder.embed_dim
        decoder = InstanceDecoder(width, sam.image_encoder.img_size, num_classes)
    state = decoder.state_dict()
    for name, value in safetensors.torch.load_file(SHIPPED).items():
        if state[name].shape == value.shape:
            state[name].copy_(value.float())
    return decoder.eval()


def instance_files(model: InstanceModel, digest: str) -> dict[str, bytes]:
    """Return the content of the two files, by name, for `save_checkpoint`.

    Args:
        digest: of the image encoder.
    """
    weights = {name: value.detach().cpu() for name, value in model.decoder.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    description = {
        "format": FORMAT,
        "encoder_digest": digest,
        "labels": list(model.labels),
        "way": asdict(model.way),
    }
    return {WEIGHTS: buffer.getvalue(), DESCRIPTION: json.dumps(description, indent=1).encode()}


def write_finished(folder: Place, model: InstanceModel, accuracies: dict[str, float]) -> None:
    """Replace a checkpoint's instance decoder by the finished one.

    Args:
        accuracies: what each kind of way reached on the val split.
    """
    description = read_json(folder / DESCRIPTION)
    files = instance_files(model, description["encoder_digest"])
    described = json.loads(files[DESCRIPTION])
    finished = {"val_msa": accuracies, "finished": digest_of(model.decoder.state_dict())}
    # The digest first: if this is interrupted, the weights do not match it and are finished again.
    write_json(folder / DESCRIPTION, described | finished)
    write_bytes(folder / WEIGHTS, files[WEIGHTS])


def is_finished(folder: Place, model: InstanceModel) -> bool:
    """Whether `write_finished` wrote a checkpoint's instance decoder."""
    finished = read_json(folder / DESCRIPTION).get("finished")
    return bool(finished == digest_of(model.decoder.state_dict()))


def instances_of(checkpoint: Checkpoint, sam: Any) -> InstanceModel | None:
    """Return the instance decoder of a model, to find objects with; None if there is none.

    A checkpoint without one whose image encoder is still that of `tiny` as it ships, such as the
    base of a run, has the shipped one, which knows no labels.

    Args:
        sam: the checkpoint's model.

    Raises:
        CheckpointError: it is damaged, or belongs to another image encoder.
    """
    model = load_instances(checkpoint, sam)
    if model is not None or checkpoint.model_type != "tiny":
        return model
    if encoder_digest(sam) != _shipped_encoder():
        return None
    return InstanceModel(new_decoder(sam, 1, seed=0), (UNNAMED,), Way())


@functools.cache
def _shipped_encoder() -> str:
    return digest_of(load_shipped().weights, prefix="image_encoder.")


def load_instances(checkpoint: Checkpoint, sam: Any) -> InstanceModel | None:
    """Return the instance decoder that a checkpoint holds; None if it holds none.

    Args:
        sam: the checkpoint's model.

    Raises:
        CheckpointError: it is damaged, or belongs to another image encoder.
    """
    folder = checkpoint.path
    if folder.is_file() or not (folder / DESCRIPTION).exists():
        return None
    advice = "copy the whole checkpoint folder again, or train again"
    try:
        description = read_json(folder / DESCRIPTION)
    except DatasetError as exc:
        raise CheckpointError(f"{exc}; {advice}") from exc
    try:
        if description["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / DESCRIPTION}: has format {description['format']}, this samray reads "
                f"{FORMAT}; train again"
            )
        labels, way = tuple(description["labels"]), Way(**description["way"])
        digest = str(description["encoder_digest"])
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels {labels!r:.60} must be texts, one or more")
    except (KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{folder / DESCRIPTION}: {exc!r} is wrong; {advice}") from exc
    own = encoder_digest(sam)
    if digest != own:
        raise CheckpointError(
            f"{folder / DESCRIPTION}: belongs to the image encoder {digest[:12]}, but that of "
            f"weights.pth is {own[:12]}; {advice}, or delete {DESCRIPTION} to use the grid"
        )
    width = sam.prompt_encoder.embed_dim
    decoder = InstanceDecoder(width, sam.image_encoder.img_size, len(labels))
    path = folder / WEIGHTS
    try:
        decoder.load_state_dict(torch.load(local_copy(path), "cpu", weights_only=True))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{path}: does not exist; {advice}") from exc
    except Exception as exc:  # torch raises almost anything on damaged files
        raise CheckpointError(f"{path}: cannot be read ({type(exc).__name__}); {advice}") from exc
    return InstanceModel(decoder.eval(), labels, way)
