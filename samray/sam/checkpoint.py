"""Self-contained checkpoints, and the RUN folder that keeps the best and the latest.

    RUN/run.json                    which checkpoints are best and latest, metrics of each epoch
    RUN/config.yaml                 the resolved config
    RUN/base/                       the weights that the run started from
    RUN/checkpoints/epoch_0003/     weights.pth, config.yaml, progress.json, optimizer.pth
    RUN/best, RUN/latest            links to the two that run.json names, for convenience

A SWEEP is read as its best trial's RUN, and a model's folder in a store as its current version.

A checkpoint exists once run.json names it; one that a killed run did not register is ignored.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samray.config import Config, load_config, save_config
from samray.errors import CheckpointError, ConfigError, SamrayError
from samray.sam.model import build_model, load_weights
from samray.sam.weights import load_state_dict, model_type_of
from samray.storage import (
    CURRENT,
    Place,
    is_used,
    local_copy,
    read_bytes,
    read_json,
    remove_folder,
    whole_folder,
    write_json,
)

RUN_FORMAT = 1
MAX_LOSS = 0.005  # of val IoU on one row of the prompt matrix, for an epoch to be the best
LINKS = ("best", "latest")  # in a RUN: links to the checkpoints that run.json names


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
    with whole_folder(folder) as temporary:
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
        CheckpointError: the folder has none.
    """
    path = folder / "optimizer.pth"
    advice = f"start a new run from its weights: --checkpoint {folder} with another --output-dir"
    try:
        state: dict[str, Any] = torch.load(local_copy(path), map_location="cpu", weights_only=True)
        return state["trained"], state["optimizer"]
    except FileNotFoundError as exc:
        message = f"{path}: does not exist, so this run cannot be resumed; {advice}"
        raise CheckpointError(message) from exc
    except KeyError as exc:
        message = f"{path}: was written by an earlier version of samray; {advice}"
        raise CheckpointError(message) from exc


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


def find_run(path: Place) -> Place:
    """Return the RUN of a path: itself, a SWEEP's best trial, or the RUN that contains it.

    Raises:
        CheckpointError: there is none, or the sweep has no best trial yet.
    """
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


def stands_alone(path: Place) -> bool:
    """Whether a path is a weights file, a checkpoint or a stored model, of no RUN or SWEEP."""
    folder = path.parent if path.is_file() else path
    if (folder / "sweep.json").is_file():
        return False
    if any((f / "run.json").is_file() for f in (folder, folder.parent, folder.parent.parent)):
        return False
    return path.is_file() or any((path / name).is_file() for name in ("config.yaml", CURRENT))


def find_tuned(path: Place) -> tuple["RunFolder", Checkpoint]:
    """Return the RUN of a path, and the checkpoint to compare with its base.

    That is the checkpoint which the path names, e.g. RUN/latest; or the best of a RUN or SWEEP.

    Raises:
        CheckpointError: there is no RUN or no checkpoint.
    """
    if path.is_file():
        path = path.parent
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


class RunFolder:
    """A run's state and checkpoints; run.json is replaced atomically at every change.

    Attributes:
        path: the RUN folder.
        state: the content of run.json.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        try:
            self.state: dict[str, Any] = read_json(path / "run.json")
        except SamrayError as exc:
            raise CheckpointError(f"{exc}; {path} is no RUN folder") from exc
        if self.state.get("format") != RUN_FORMAT:
            raise CheckpointError(f"{path}: run.json has format {self.state.get('format')!r}")

    @classmethod
    def create(cls, path: Place, config: Config, dataset_digest: str) -> "RunFolder":
        """Start a run in an unused folder."""
        path.mkdir(parents=True, exist_ok=True)
        state = {
            "format": RUN_FORMAT,
            "status": "running",
            "model_type": config.model.type,
            "dataset_digest": dataset_digest,
            "best": None,
            "latest": None,
            "within": None,
            "epochs": [],
            "embeddings": None,
        }
        write_json(path / "run.json", state)
        save_config(config, path / "config.yaml")  # last: a run without it has not begun
        return cls(path)

    @property
    def base(self) -> Place:
        """Folder of the weights that the run started from."""
        return self.path / "base"

    @property
    def latest(self) -> Place | None:
        """Folder of the last finished epoch's checkpoint."""
        return self.path / self.state["latest"] if self.state["latest"] else None

    @property
    def resume_from(self) -> Place | None:
        """Folder of the checkpoint to resume from: `latest`, or one within the next epoch."""
        within = self.state.get("within")
        return self.path / within if within else self.latest

    @property
    def step(self) -> int:
        """Optimiser steps of the checkpoint to resume from; 0 without one."""
        folder = self.resume_from
        return int(read_json(folder / "progress.json")["step"]) if folder else 0

    @property
    def epochs_without_best(self) -> int:
        """Number of epochs since the best one, or since the base where it is the best."""
        return len(self.state["epochs"]) - (best_epoch(self.state) or 0)

    def update(self, **changes: Any) -> None:
        """Change entries of run.json, in one write."""
        self.state = {**self.state, **changes}
        write_json(self.path / "run.json", self.state)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep the status `running` for a time; on an exception it is `interrupted` or `failed`."""
        self.update(status="running")
        try:
            yield
        except BaseException as exc:
            # SIGTERM makes Ray raise SystemExit.
            stopped = isinstance(exc, KeyboardInterrupt | SystemExit)
            with contextlib.suppress(Exception):  # the first error is the one to report
                # Read again, because the workers have written to it.
                RunFolder(self.path).update(status="interrupted" if stopped else "failed")
            raise

    def register(self, name: str, metrics: dict[str, Any]) -> None:
        """Make a checkpoint the latest, and the best if its val_iou is; delete the others.

        The base is the best until an epoch has a higher mean over the prompt matrix without losing
        more than `MAX_LOSS` on any of its rows.
        """
        epochs = [*self.state["epochs"], metrics]
        base = self.state.get("base_metrics") or {}
        good = [epoch for epoch in epochs if _beats(epoch, base)]
        best = max(good, key=lambda epoch: epoch["val_iou"], default=None)  # the first on a tie
        kept = self.state["best"] or "base"
        self.update(
            epochs=epochs,
            latest=f"checkpoints/{name}",
            within=None,
            best=f"checkpoints/{name}" if best is metrics else kept,
        )
        for link in LINKS:
            self._link(link)
        self._remove_others()

    def register_within(self, name: str) -> None:
        """Make a checkpoint within an epoch the one to resume from."""
        self.update(within=f"checkpoints/{name}")
        self._remove_others()

    def _remove_others(self) -> None:
        """Delete the checkpoints that are no longer needed."""
        kept = {Path(self.state[key] or "").name for key in (*LINKS, "within")}
        for folder in (self.path / "checkpoints").iterdir():
            if folder.name not in kept:
                remove_folder(folder)

    def _link(self, name: str) -> None:
        if not isinstance(self.path, Path):
            return
        temporary = self.path / f".{name}.tmp"
        with contextlib.suppress(OSError):  # not all file systems have links; run.json suffices
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(self.state[name], target_is_directory=True)
            os.replace(temporary, self.path / name)


def best_epoch(state: Mapping[str, Any]) -> int | None:
    """Number of the best epoch by run.json, from 1; None if that is the base, or before epoch 1."""
    number = str(state["best"]).rpartition("epoch_")[2]
    return int(number) if number.isdigit() else None


def _beats(metrics: dict[str, Any], base: dict[str, Any]) -> bool:
    if metrics["val_iou"] <= base.get("val_iou", -1.0):
        return False
    rows = [key for key in base if key.startswith("val_iou_")]
    return all(metrics[row] >= base[row] - MAX_LOSS for row in rows)


def open_run(output: Place, resume: bool) -> RunFolder | None:
    """Return the run to resume, or None for a new one.

    Raises:
        ConfigError: the folder is in use, and `resume` is unset or it holds no run.
    """
    used = is_used(output)
    if not resume:
        if used:
            raise ConfigError(
                f"--output-dir: {output} is not empty; add --resume to continue the run there, "
                "or choose another folder"
            )
        return None
    if not used:
        return None
    if not (output / "run.json").exists():
        raise ConfigError(f"--resume: {output} holds no run of samray; choose another --output-dir")
    run = RunFolder(output)
    if run.latest is None and not (output / "config.yaml").exists():
        return None  # killed as it began
    return run


def require_same_run(run: RunFolder, config: Config, dataset_digest: str) -> None:
    """Refuse to resume a run with other settings or data.

    Raises:
        ConfigError: naming every setting that differs.
    """
    if run.state["dataset_digest"] != dataset_digest:
        raise ConfigError(
            f"--resume: {run.path} was trained on dataset {run.state['dataset_digest'][:12]}, this "
            f"one is {dataset_digest[:12]}; resume with the same data or use another --output-dir"
        )
    before, now = (_deciding(c) for c in (load_config(run.path / "config.yaml"), config))
    changed = [
        f"{key} (was {before[key]!r}, now {now[key]!r})" for key in now if before[key] != now[key]
    ]
    if changed:
        raise ConfigError(
            f"--resume: {run.path} has other settings: {', '.join(changed)}; only epochs, "
            "workers, patience and what limits memory may change"
        )


def _deciding(config: Config) -> dict[str, Any]:
    """The settings that determine a run's result, by dotted path."""
    free = {"data_dir", "output_dir", "num_epochs", "patience", "dry_run", "resume", "mlflow_uri"}
    free |= {"checkpoint_minutes"}
    free |= {"max_prompts", "images_at_once", "recompute_encoder"}  # the same step in less memory
    sections = config.model_dump(mode="json", include={"model", "prompts", "loss", "train"})
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if key not in free
    }
