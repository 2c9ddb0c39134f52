"""Self-contained checkpoints, and the one that a path names.

    RUN/checkpoints/epoch_0003/     weights.pth, config.yaml, progress.json, optimizer.pth

Of a RUN that is the best one. A SWEEP is read as its best trial's RUN, and a model's folder in a
store as its current version.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samray.config import Config, load_config, save_config
from samray.errors import CheckpointError
from samray.runs import LINKS, RunFolder
from samray.sam.model import build_model, load_weights
from samray.sam.weights import load_state_dict, model_type_of
from samray.storage import (
    CURRENT,
    Place,
    local_copy,
    read_bytes,
    read_json,
    whole_folder,
    write_json,
)

# Files that stand for their folder; any other file is weights of its own, wherever it lies.
_STAND_IN = ("weights.pth", "run.json", "sweep.json")


@dataclass(frozen=True)
class Checkpoint:
    """Weights with their model type and origin.

    Attributes:
        path: folder or file that they were read from.
        model_type: tiny, vit_b, vit_l or vit_h.
        weights: SAM's state dict.
        progress: epoch, step, metrics and digests; empty for a bare weights file.
    """

    path: Place
    model_type: str
    weights: dict[str, Tensor]
    progress: dict[str, Any]

    def model(self) -> Any:
        """Return the `Sam` with these weights, on the CPU."""
        sam = build_model(self.model_type)
        load_weights(sam, self.weights, self.model_type, self.path)
        return sam


def save_checkpoint(
    folder: Place,
    weights: dict[str, Tensor],
    config: Config,
    progress: dict[str, Any],
    training: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint folder atomically.

    `weights.pth` loads with plain `sam_model_registry[model_type](checkpoint=...)` for vit_*.

    Args:
        training: the parameters that learn, by name, and the optimiser's state, to resume from.
        more: content of further files, by name.
    """
    with whole_folder(folder, sync=True) as temporary:
        torch.save({k: v.detach().cpu() for k, v in weights.items()}, temporary / "weights.pth")
        save_config(config, temporary / "config.yaml")
        write_json(temporary / "progress.json", progress)
        if training is not None:
            state = {"trained": training[0], "optimizer": training[1]}
            torch.save(state, temporary / "optimizer.pth")
        for name, content in (more or {}).items():
            (temporary / name).write_bytes(content)


def load_optimizer(folder: Place) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_checkpoint` wrote beside the weights to resume from, on the CPU.

    Returns:
        The parameters that learn, by name, and the optimiser's state.

    Raises:
        CheckpointError: the folder has none, or it is damaged.
    """
    path = folder / "optimizer.pth"
    advice = f"start a new run from its weights: --checkpoint {folder} with another --output-dir"
    try:
        state: dict[str, Any] = torch.load(local_copy(path), map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        message = f"{path}: does not exist, so this run cannot be resumed; {advice}"
        raise CheckpointError(message) from exc
    except OSError:
        raise
    except Exception as exc:  # torch raises errors of many kinds
        message = f"{path}: is damaged, so this run cannot be resumed; {advice}"
        raise CheckpointError(message) from exc
    if not isinstance(state, dict) or not {"trained", "optimizer"} <= state.keys():
        raise CheckpointError(f"{path}: was written by an earlier version of samray; {advice}")
    return state["trained"], state["optimizer"]


def load_checkpoint(path: Place) -> Checkpoint:
    """Load a checkpoint folder, the best one of a RUN folder, or a bare ViT weights file.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    if path.is_file():
        weights = load_state_dict(path)
        model_type = model_type_of(weights)
        if model_type is None:
            raise CheckpointError(
                f"{path}: the file alone does not show its model type; "
                "pass the RUN or checkpoint folder it came from"
            )
        return Checkpoint(path, model_type, weights, {})
    folder = find_checkpoint(path)
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{folder}: has no config.yaml, so it is no checkpoint of samray; pass a RUN folder, "
            "a checkpoint folder, or a ViT weights file"
        )
    config = load_config(folder / "config.yaml")
    weights = load_state_dict(folder / "weights.pth")
    return Checkpoint(folder, config.model.type, weights, read_json(folder / "progress.json"))


def refuse_ambiguous(name: str, meaning: str) -> None:
    """Refuse `--checkpoint NAME` with a meaning of its own where a path has that name, too.

    Args:
        meaning: what the name means, for the error message.

    Raises:
        CheckpointError: there is such a path.
    """
    if Path(name).exists():
        raise CheckpointError(
            f"--checkpoint {name}: means {meaning}, and {Path(name).absolute()} is there, too; "
            f"give ./{name} for that, or call samray in another folder"
        )


def find_run(path: Place) -> Place:
    """Return the RUN of a path: itself, a SWEEP's best trial, or the RUN that contains it.

    Raises:
        CheckpointError: there is none, or the sweep has no best trial yet.
    """
    path = _folder(path)
    if path.is_file():
        raise CheckpointError(f"{path}: is a file of no run; pass a RUN folder or a SWEEP")
    if (path / "sweep.json").is_file():
        best = read_json(path / "sweep.json").get("best")
        if best is None:
            raise CheckpointError(
                f"{path}: this sweep has not ended; wait, or resume it with the same `samray tune`"
            )
        return path / str(best)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "run.json").is_file():
            return folder
    state = "holds no run.json" if path.exists() else "does not exist"
    raise CheckpointError(f"{path}: {state}; pass a RUN folder or a SWEEP, which hold the base")


def _folder(path: Place) -> Place:
    """The folder that a path means; of weights of their own, the file."""
    return path.parent if path.name in _STAND_IN and path.is_file() else path


def stands_alone(path: Place) -> bool:
    """Whether a path is a weights file, a checkpoint or a stored model, of no RUN or SWEEP."""
    folder = _folder(path)
    if folder.is_file():
        return True
    if (folder / "sweep.json").is_file():
        return False
    if any((f / "run.json").is_file() for f in (folder, folder.parent, folder.parent.parent)):
        return False
    return path.is_file() or any((path / name).is_file() for name in ("config.yaml", CURRENT))


def find_tuned(path: Place) -> tuple[RunFolder, Checkpoint]:
    """Return the RUN of a path, and the checkpoint to compare with its base.

    That is the checkpoint which the path names, e.g. RUN/latest; or the best of a RUN or SWEEP.

    Raises:
        CheckpointError: there is no RUN or no checkpoint.
    """
    path = _folder(path)
    return RunFolder(find_run(path)), load_checkpoint(path)


def find_checkpoint(path: Place) -> Place:
    """Return a checkpoint's folder: the best of a RUN or SWEEP, a stored model's current version,
    or the path itself if it is none of these.

    Raises:
        CheckpointError: the path does not exist, or there is no checkpoint yet.
    """
    if not path.exists() and path.name in LINKS and (path.parent / "run.json").is_file():
        linked = RunFolder(path.parent).state[path.name]  # S3 and some file systems have no links
        path = path.parent / linked if linked else path
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; pass a RUN folder or a weights file")
    if (path / CURRENT).is_file():
        version = read_bytes(path / CURRENT, 1000).decode("ascii", "replace").strip()
        if not re.fullmatch(r"\w[\w.-]*", version):
            raise CheckpointError(f"{path / CURRENT}: {version!r} is not the name of a version")
        return path / version
    if (path / "sweep.json").is_file():
        path = find_run(path)
    if not (path / "run.json").is_file():
        return path
    best = RunFolder(path).state["best"]
    if best is None:
        raise CheckpointError(
            f"{path}: this run has finished no epoch yet; wait, or continue it with --resume"
        )
    return path / str(best)
