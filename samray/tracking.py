"""What a run tells while it trains: curves and pictures for TensorBoard, curves for MLflow.

    RUN/tensorboard/events.out.tfevents.*    one file for each start of the run
    RUN/mlflow.json                          the run's id there, if train.mlflow_uri is set

All curves are over optimiser steps, those of epochs too, so that one step tells where a resumed run
continues them.
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from samray import __version__
from samray.config import Config
from samray.errors import ConfigError, without_secrets
from samray.storage import Place, read_json, write_bytes, write_json

PACKAGES = ("torch", "torchvision", "ray", "segment-anything", "numpy")
EXPERIMENT = "samray"  # in MLflow, of runs that belong to no sweep
TRACKED_SECTIONS = ("model", "prompts", "loss", "train", "scaling")


class Tracker:
    """Receives a run's events, as `samray.training.loop.Report` does, and passes them on.

    Files are opened at the first event. Only rank 0 gets events, so it is the only one to write.

    Args:
        run: the RUN folder.
        config: of the run; its `train.mlflow_uri` is used.
        step: optimiser steps of the checkpoint that the run continues from; 0 for a new run.
        pass_on: receives each event after it was written.

    Attributes:
        pictures: gives name -> H x W x 3 uint8 pictures of the model as it is; called every epoch.
    """

    def __init__(
        self,
        run: Place,
        config: Config,
        step: int,
        pass_on: Callable[[dict[str, Any]], None],
    ) -> None:
        self.run, self.config, self.pass_on = run, config, pass_on
        # TensorBoard drops what an earlier start has written from this step on.
        self.first_step = step + 1 if step else 0
        self.pictures: Callable[[], dict[str, np.ndarray]] = dict
        self._writers: list[_TensorBoard | _MLflow] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)  # Ctrl-C
        status = "FINISHED" if kind is None else "KILLED" if stopped else "FAILED"
        for writer in self._writers or []:
            writer.close(status)

    def report(self, event: dict[str, Any]) -> None:
        """Write an event's figures, and after an epoch the pictures, then pass it on."""
        if self._writers is None:
            self._writers = [_TensorBoard(self.run / "tensorboard", self.first_step)]
            if self.config.train.mlflow_uri is not None:
                self._writers.append(_MLflow(self.run, self.config, self._tell))
        step, figures = _figures(event)
        pictures = self.pictures() if event["event"] in ("base", "epoch") else {}
        for writer in self._writers:
            writer.write(step, figures, pictures)
        if event["event"] != "within":
            self.pass_on(event)

    def _tell(self, text: str) -> None:
        """Pass on a line for the user: what a worker prints, nobody sees."""
        self.pass_on({"event": "warning", "text": text})


def _figures(event: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """The optimiser step of an event, and its figures by the names of their curves."""
    if event["event"] == "step":
        step = (event["epoch"] - 1) * event["steps"] + event["step"]
        return step, {"step/loss": event["loss"], "step/learning_rate": event["learning_rate"]}
    figures = {}
    for name, value in event.items():
        if name == "skipped":
            figures["epoch/skipped_steps"] = float(len(value))
        elif name == "step" or not isinstance(value, int | float):
            continue
        elif name.startswith("val_"):
            figures[f"val/{name.removeprefix('val_')}"] = float(value)
        else:
            figures["epoch/number" if name == "epoch" else f"epoch/{name}"] = float(value)
    return event.get("step", 0), figures


class _TensorBoard:
    """An event file in a folder; in S3, one for each epoch, as objects cannot be added to."""

    def __init__(self, folder: Place, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a quarter of a second

        self._folder, self._sent = folder, None
        if not isinstance(folder, Path):
            self._sent = tempfile.TemporaryDirectory(prefix="samray-")
        self._local = Path(self._sent.name if self._sent else str(folder))
        self._writer = SummaryWriter(str(self._local), purge_step=first_step)

    def write(self, step: int, figures: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")
        if pictures or not any(name.startswith("step/") for name in figures):
            self._publish()

    def close(self, status: str) -> None:
        self._publish()
        self._writer.close()
        if self._sent is not None:
            self._sent.cleanup()

    def _publish(self) -> None:
        self._writer.flush()
        if self._sent is not None:
            self._writer.close()  # the next figure opens another file
            for path in self._local.iterdir():
                # Read in the order of their names, which end in a counter: 9 before 10.
                stem, _, counter = path.name.rpartition(".")
                write_bytes(self._folder / f"{stem}.{int(counter):06d}", path.read_bytes())
                path.unlink()


class _MLflow:
    """A run in MLflow; figures are sent with every checkpoint, because each request takes a while.

    Args:
        tell: receives a line for the user.
    """

    def __init__(self, run: Place, config: Config, tell: Callable[[str], None]) -> None:
        self._tell = tell
        uri = config.train.mlflow_uri
        assert uri is not None
        require_mlflow("train.mlflow_uri", uri)
        from mlflow import MlflowClient

        self._waiting: list[tuple[str, float, int, int]] = []  # name, value, milliseconds, step
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self._run_id = self._continue(run, uri) or self._begin(run, uri, config)
        except Exception as exc:  # of a server or database, of any kind
            raise ConfigError(
                f"train.mlflow_uri: {uri} cannot be used ({_short(exc)}); check it, or unset it"
            ) from exc

    def _continue(self, run: Place, uri: str) -> str | None:
        """The run that an earlier start of the same RUN began there.

        None if it cannot be used: deleted there, or in a folder and damaged, as MLflow writes in
        place and a kill can leave `meta.yaml` empty. The RUN's own files have all curves. A server
        that does not answer now may know the run, so its figures wait.
        """
        from mlflow.exceptions import RestException

        if not (run / "mlflow.json").is_file():
            return None
        earlier = read_json(run / "mlflow.json")
        if earlier["tracking_uri"] != uri:
            return None
        run_id = str(earlier["run_id"])
        try:
            self._client.update_run(run_id, status="RUNNING")
        except Exception as exc:
            if uri.startswith("http") and not isinstance(exc, RestException):
                self._tell(f"MLflow does not answer now ({_short(exc)}); the figures wait")
                return run_id
            what = f"MLflow's run {run_id} cannot be continued ({_short(exc)})"
            self._tell(f"{what}; the figures from here on go to a new one")
            return None
        return run_id

    def _begin(self, run: Place, uri: str, config: Config) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else None
        if number is None:
            number = self._client.create_experiment(EXPERIMENT)
        run_id = str(self._client.create_run(number, run_name=run.name).info.run_id)
        settings = config.model_dump(mode="json", include=set(TRACKED_SECTIONS))
        params = [
            Param(f"{section}.{key}", str(value)[:500])
            for section, values in settings.items()
            for key, value in values.items()
        ]
        for start in range(0, len(params), 100):  # MLflow takes no more at once
            self._client.log_batch(run_id, params=params[start : start + 100])
        write_json(run / "mlflow.json", {"tracking_uri": uri, "run_id": run_id})
        return run_id

    def write(self, step: int, figures: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [
            (name, value, now, step) for name, value in figures.items() if math.isfinite(value)
        ]
        if not any(name.startswith("step/") for name in figures):
            self._send()

    def close(self, status: str) -> None:
        self._send()
        with contextlib.suppress(Exception):  # the run itself has ended well
            self._client.set_terminated(self._run_id, status)

    def _send(self) -> None:
        """Send what waits; if the server does not answer, training goes on and it waits longer."""
        from mlflow.entities import Metric

        try:
            while self._waiting:
                some = [Metric(*figure) for figure in self._waiting[:1000]]  # MLflow's limit
                self._client.log_batch(self._run_id, metrics=some)
                del self._waiting[:1000]
        except Exception as exc:
            self._tell(f"MLflow does not take the figures now ({_short(exc)})")


def require_mlflow(setting: str, uri: str) -> None:
    """Refuse an MLflow that is not installed; configure the one that is.

    Its store in a folder is allowed, which it asks for. A server that is away is given up after
    seconds: MLflow's own patience of minutes would stop training at each checkpoint, and more
    workers than the one that sends would take it for dead (`scaling.hang_minutes`).

    Raises:
        ConfigError: naming the setting.
    """
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(f"{setting}: mlflow is not installed; pip install mlflow, or unset it")
    if "://" not in uri or uri.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds


def _short(exc: Exception) -> str:
    return without_secrets(" ".join(str(exc).split()))[:300]


def describe_start(
    config: Config,
    epochs_done: int,
    step: int,
    device: torch.device,
    num_workers: int,
    commit: str | None,
) -> dict[str, Any]:
    """Return what a run, or a part of it after a resumption or a restart, ran with.

    Args:
        epochs_done, step: finished epochs and optimiser steps when it started.
        commit: see `git_commit`.
    """
    now = datetime.datetime.now(datetime.UTC)
    return {
        "time": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
        "epochs_done": epochs_done,
        "step": step,
        "seed": config.train.seed,
        "device": device_name(device),
        "num_workers": num_workers,
        "packages": {"samray": __version__, **_versions()},
        "git_commit": commit,
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # vendored, or on the path alone
            versions[name] = None
    return versions


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of this machine's CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Return the commit of the working directory, with `+changes` if files of it differ from it.

    None without git, or outside a repository, as in the working directory of a Ray job.
    """

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
