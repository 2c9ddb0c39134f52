"""The RUN folder: which checkpoints are the best and the latest, and the metrics of each epoch.

    RUN/run.json                    the state; replaced whole at every change
    RUN/config.yaml                 the resolved config
    RUN/base/                       the weights that the run started from
    RUN/checkpoints/epoch_0003/     see `samray.sam.checkpoint`
    RUN/best, RUN/latest            links to the two that run.json names, for convenience

A checkpoint exists once run.json names it; one that a killed run did not register is ignored.
Without torch, as processes that only lead the workers need it, too.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samray.config import Config, load_config, save_config, with_settings
from samray.errors import CheckpointError, ConfigError, DatasetError, SamrayError
from samray.storage import Place, is_used, read_json, remove_folder, write_json

RUN_FORMAT = 1
MAX_LOSS = 0.005  # of val IoU on one row of the prompt matrix, for an epoch to be the best
LINKS = ("best", "latest")  # in a RUN: links to the checkpoints that run.json names


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
            "num_epochs": config.train.num_epochs,
            "embeddings": None,
        }
        write_json(path / "run.json", state, sync=True)
        save_config(config, path / "config.yaml")  # last: a run without it has not begun
        return cls(path)

    @property
    def base(self) -> Place:
        """Folder of the weights that the run started from."""
        return self.path / "base"

    @property
    def has_base(self) -> bool:
        """Whether the base is whole: a kill can leave some of its files in S3; this is the last."""
        return (self.base / "weights.pth").exists()

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
        write_json(self.path / "run.json", self.state, sync=True)

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


def resume_point(run: Place) -> str:
    """Return where workers that start now go on, in words, e.g. "epoch 2, step 14"."""
    folder = RunFolder(run)
    if folder.resume_from is None:
        return "the beginning"
    return f"epoch {len(folder.state['epochs']) + 1}, step {folder.step}"


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


def num_epochs_of(output: Place, config: Config) -> int:
    """Return the number of epochs to train: where `--resume` comes without one, the RUN's own.

    Another number changes the learning rate of every step, so the default must not come in by
    itself.

    Args:
        config: as the user gave it: a setting that was filled in counts as given.
    """
    saved = output / "config.yaml"
    given = "num_epochs" in config.train.model_fields_set
    if given or not config.train.resume or not saved.is_file():
        return config.train.num_epochs
    return load_config(saved).train.num_epochs


def keep_num_epochs(run: RunFolder, config: Config) -> None:
    """Save the number of epochs that a resumed run has from now on, and print what changed."""
    before, now = load_config(run.path / "config.yaml"), config.train.num_epochs
    if before.train.num_epochs != now:
        print(f"num_epochs: {before.train.num_epochs} before, {now} now", flush=True)
        changed = with_settings(before, {"train.num_epochs": now}, "train")
        save_config(changed, run.path / "config.yaml")
    run.update(num_epochs=now)


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


def require_same_dataset(run: RunFolder, dataset_digest: str) -> None:
    """Refuse to go on with other data than the run began with.

    Raises:
        DatasetError: the dataset was prepared again meanwhile.
    """
    if run.state["dataset_digest"] != dataset_digest:
        raise DatasetError(
            f"train.data_dir: was prepared again while {run.path} trained: it held dataset "
            f"{run.state['dataset_digest'][:12]} and now holds {dataset_digest[:12]}; prepare into "
            "another folder, and start a new run"
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
