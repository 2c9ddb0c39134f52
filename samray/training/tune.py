"""A sweep: trials that fine-tune one base with different settings, run by Ray Tune.

    SWEEP/sweep.json             searched settings, every trial, the best one, its test scores
    SWEEP/report.html            the same as a page
    SWEEP/base/                  the weights that every trial starts from
    SWEEP/trials/<trial id>/     a RUN each, of `samray.training.train.fit`
    SWEEP/tune/                  Ray Tune's own state and TensorBoard's files

All trials share one cache of embeddings. Their results are read from the RUN folders; of Tune's
state only the chosen settings and the decisions to stop are used.
"""

import functools
import hashlib
import json
import logging
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import PlacementGroupID, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter, Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group
from tqdm import tqdm

from samray import __version__, cluster
from samray.config import (
    ENCODER_BLOCKS,
    Config,
    required,
    resolve_model,
    save_config,
    with_settings,
)
from samray.data.dataset import SPLITS, ImageRecord, PreparedDataset
from samray.errors import ConfigError, SweepError
from samray.evaluation.evaluate import score_models
from samray.evaluation.scoring import MATRIX
from samray.evaluation.summary import summary
from samray.runs import RunFolder, best_epoch
from samray.sam.adapt import num_frozen_blocks
from samray.sam.checkpoint import find_checkpoint, save_checkpoint
from samray.sam.embeddings import embeddings_folder
from samray.sam.encode import EncodingReport, encode_missing, full_precision
from samray.storage import (
    Place,
    is_used,
    lock_folder,
    read_json,
    remove_folder,
    require_folder,
    resolve,
    resolve_local,
    write_bytes,
    write_json,
)
from samray.tracking import require_mlflow
from samray.training.finetuning import cache_entries
from samray.training.search_space import (
    SEARCHED,
    cached_configs,
    count_trials,
    default_point,
    grid_points,
    search_space,
    with_default_space,
)
from samray.training.sweep_report import importance, write_report
from samray.training.train import Trial, base_checkpoint, finish_run, fit

SWEEP_FORMAT = 1
METRICS = ("val_iou", "val_dice", *(f"val_iou_{row}" for row in MATRIX), "val_msa")


def sweep(config: Config) -> dict[str, Any]:
    """Search the best settings, and score base and best trial on the test split.

    The same call resumes an unfinished sweep; finished trials are not repeated.

    Args:
        config: its `tune` section; the other sections are the defaults of each trial.

    Returns:
        The content of SWEEP/sweep.json.

    Raises:
        SamrayError: a setting, the data, the weights or the cluster do not allow the sweep, or
            no trial finished an epoch.
    """
    data_dir, output_dir = required(config, "tune.data_dir", "tune.output_dir")
    if config.scaling.min_workers < config.scaling.max_workers:
        raise ConfigError(
            f"scaling.num_workers: {config.scaling.num_workers}, but the trials of a sweep share "
            "the cluster and have one number of workers each; give one number"
        )
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    # All splits, so that a missing one is reported before the search and not after it.
    records = [record for split in SPLITS for record in dataset.split(split)]
    output = resolve_local(output_dir, "--output-dir")
    shared = {
        "train.data_dir": str(dataset.folder),
        "train.output_dir": None,
        "train.resume": False,
        "train.mlflow_uri": None,  # tune.mlflow_uri logs the trials
        "tune.data_dir": str(dataset.folder),
        "tune.output_dir": str(output),
    }
    if uri := config.tune.mlflow_uri:
        require_mlflow("tune.mlflow_uri", uri)
        if "://" not in uri:
            shared["tune.mlflow_uri"] = str(resolve(uri, "tune.mlflow_uri"))
    config = with_default_space(with_settings(config, shared, "sweep"))
    with lock_folder(output, "--output-dir"):
        return _sweep(config, dataset, records, output)


def _sweep(
    config: Config, dataset: PreparedDataset, records: Sequence[ImageRecord], output: Place
) -> dict[str, Any]:
    space = search_space(config)
    num_trials = count_trials(config, space)
    require_metric(config)
    base, resolved = base_checkpoint(config)
    state = {
        "format": SWEEP_FORMAT,
        "samray_version": __version__,
        "status": "running",
        "dataset_digest": dataset.digest,
        "base": base.progress["base"],
        "num_trials": num_trials,
        "deciding": _deciding(config),
    }
    before = _require_same(output, state)
    if before is not None and before["status"] == "finished":
        write_bytes(output / "report.html", write_report(before).encode())
        return before
    plan = _start(config, dataset, output, num_trials)
    if before is None:
        write_json(output / "sweep.json", state, sync=True)
        save_config(plan.config, output / "config.yaml")
    if not (output / "base" / "weights.pth").exists():
        save_checkpoint(output / "base", base.weights, resolved, base.progress)
    state["interrupted"] = before is not None
    try:
        _search(plan, dataset, records, space, state, (before or {}).get("embeddings"))
    except (KeyboardInterrupt, SystemExit):
        write_json(output / "sweep.json", {**state, "status": "interrupted"}, sync=True)
        raise
    write_json(output / "sweep.json", state, sync=True)
    write_bytes(output / "report.html", write_report(state).encode())
    return state


def _search(
    plan: "SweepPlan",
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    space: dict[str, Any],
    state: dict[str, Any],
    embeddings: dict[str, Any] | None,
) -> None:
    """Encode the images, run the trials and score the best one; add the outcome to the state.

    Args:
        embeddings: of the part before an interruption, which has encoded the images.
    """
    started = time.perf_counter()
    encoding = _encode(plan, dataset, records)
    state["embeddings"] = embeddings or encoding.as_dict()
    write_json(plan.output / "sweep.json", state, sync=True)
    trials = _run_trials(plan, space)
    outcome = {"trials": trials, "seconds": round(time.perf_counter() - started, 1)}
    state |= outcome | _result(plan, dataset, {**state, **outcome})


@dataclass(frozen=True)
class SweepPlan:
    """What the trials have in common."""

    config: Config
    output: Place
    resources: cluster.Resources
    num_trials: int
    dataset_digest: str


def require_metric(config: Config) -> None:
    """Refuse a `tune.metric` that some trial would not report.

    Raises:
        ConfigError: it is unknown, or that of the instance decoder where one may be left out.
    """
    metric = config.tune.metric
    if metric not in METRICS:
        raise ConfigError(
            f"tune.metric: {metric!r} is reported by no trial; choose from {', '.join(METRICS)}"
        )
    switch = "train.instances"
    if metric == "val_msa" and (not config.train.instances or switch in config.tune.search_space):
        raise ConfigError(
            "tune.metric: val_msa is that of the instance decoder, and not every trial has one; "
            f"set {switch}=true and leave it out of tune.search_space, or choose another metric"
        )


def _deciding(config: Config) -> dict[str, Any]:
    """The settings that determine a sweep's result, by dotted path."""
    values = config.model_dump(mode="json", include={*SEARCHED, "tune"})
    for section, key in (
        *(("tune", k) for k in ("data_dir", "output_dir", "max_concurrent_trials", "mlflow_uri")),
        *(("tune", k) for k in ("max_failures", "num_trials")),
        *(("train", k) for k in ("data_dir", "output_dir", "resume")),
    ):
        del values[section][key]
    return {
        f"{section}.{key}": value
        for section, content in values.items()
        for key, value in content.items()
    }


def _require_same(output: Place, state: dict[str, Any]) -> dict[str, Any] | None:
    """Return the state of the sweep in the folder, or None for an unused folder.

    Raises:
        ConfigError: the folder holds something else, or a sweep with other settings or data.
    """
    if not is_used(output):
        return None
    if not (output / "sweep.json").is_file():
        raise ConfigError(f"--output-dir: {output} is not empty and holds no sweep; choose another")
    before: dict[str, Any] = read_json(output / "sweep.json")
    if before.get("format") != SWEEP_FORMAT:
        raise ConfigError(f"--output-dir: {output}: sweep.json has another format; choose another")
    was, now = (
        {
            **s["deciding"],
            **{k: s[k] for k in ("dataset_digest", "num_trials")},
            "base digest": s["base"]["digest"],
        }
        for s in (before, state)
    )
    changed = [
        f"{key} (was {was.get(key)!r}, now {value!r})"
        for key, value in now.items()
        if was.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"--output-dir: {output} holds another sweep: {', '.join(changed)}; resume with the "
            "same settings or choose another --output-dir"
        )
    return before


def _start(config: Config, dataset: PreparedDataset, output: Place, num_trials: int) -> SweepPlan:
    """Start or join the cluster and check that it can run the trials."""
    cluster.start()
    resources = cluster.plan_resources(config.scaling, num_trials)
    cluster.require_visible(dataset.folder / "manifest.json", "--data-dir")
    cluster.require_shared(output, "--output-dir")
    config = with_settings(config, {"scaling.cpus_per_worker": resources.cpus_per_worker}, "sweep")
    return SweepPlan(config, output, resources, num_trials, dataset.digest)


def _encode(
    plan: SweepPlan, dataset: PreparedDataset, records: Sequence[ImageRecord]
) -> EncodingReport:
    """Fill the cache that all trials and the final test share.

    A trial cannot do it: what would encode finds no room beside the trials.
    """
    tested = [(record, 0) for record in records]  # the test split too
    entries: dict[int, list[tuple[ImageRecord, int]]] = {}  # by the number of frozen blocks
    for config in cached_configs(plan.config):
        model = resolve_model(config, config.model.checkpoint != "none").model
        if num_frozen := num_frozen_blocks(ENCODER_BLOCKS[model.type], model):
            entries.setdefault(num_frozen, []).extend([*cache_entries(config, dataset), *tested])
    total = EncodingReport(0, 0, 0.0)
    for num_frozen, views in entries.items():
        found = encode_missing(
            dataset,
            views,
            plan.output / "base",
            embeddings_folder(plan.config, dataset),
            plan.config,
            num_frozen,
        )
        total = EncodingReport(
            total.encoded + found.encoded, total.found + found.found, total.seconds + found.seconds
        )
    return total


def _run_trials(plan: SweepPlan, space: dict[str, Any]) -> list[dict[str, Any]]:
    """Let Tune start, stop, retry and, after a kill, resume the trials; return the table."""
    settings = plan.config.tune
    _wait_for_room(plan, plan.resources.num_workers)  # before Tune writes anything
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial, config=plan.config, output=plan.output, dataset_digest=plan.dataset_digest
        ),
        _trial_resources(plan),
    )
    folder = Path(str(plan.output), "tune")
    if can_restore(folder):
        print(f"resuming the sweep in {plan.output}", flush=True)
        # A trial that failed gets one more attempt; it goes on from its RUN.
        tuner = tune.Tuner.restore(str(folder), trainable, param_space=space, resume_errored=True)
    else:
        remove_folder(folder)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=settings.metric,
                mode="max",
                num_samples=plan.num_trials // grid_points(space),
                search_alg=_searcher(plan, space),
                scheduler=_scheduler(plan.config),
                # A trial starts in the process of the previous one. Not with several workers: that
                # process may still wait for the workers of a trial that was stopped.
                reuse_actors=plan.resources.num_workers == 1,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(plan.output),
                failure_config=tune.FailureConfig(max_failures=settings.max_failures),
                callbacks=[Progress(plan.num_trials, settings.metric), *_loggers(plan)],
                verbose=0,
            ),
        )
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output prints even at verbose=0
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are in the table
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    try:
        results = tuner.fit()
        # On Ctrl-C, Tune returns without an error, and has put the handler back.
        stopped = in_main and signal.getsignal(signal.SIGINT) is handler
    finally:
        # Tune leaves a handler behind that ignores Ctrl-C.
        if in_main:
            signal.signal(signal.SIGINT, handler)
    trials = [_row(plan, result) for result in results]
    require_all(trials, plan, stopped)
    return sorted(trials, key=lambda trial: trial["trial_id"])


def can_restore(folder: Path) -> bool:
    """Whether Tune's own state in a folder is whole.

    Tune writes a part of it before the first trial, and copies the rest there in place: after a
    power failure a file may be cut off. Without that rest it would run a single trial.
    """
    newest: dict[str, Path] = {}  # by kind; Tune, too, reads the last one by name
    for path in sorted(folder.glob("*-*-*.*")):
        if path.suffix in (".json", ".pkl"):
            newest[path.name.partition("-20")[0]] = path
    try:
        state = json.loads(newest.pop("experiment_state").read_bytes())
        for path in (folder / "tuner.pkl", *newest.values()):
            pickle.loads(path.read_bytes())
        return bool(state["trial_data"])
    except Exception:  # a pickle that is cut off raises errors of any kind
        return False


def require_all(trials: Sequence[dict[str, Any]], plan: SweepPlan, stopped: bool) -> None:
    """Refuse to go on where Tune has not run all trials.

    Args:
        trials: the rows of `sweep.json`.
        stopped: whether Ctrl-C ended Tune.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it.
        SweepError: it ended by itself.
    """
    missing = len(trials) < plan.num_trials
    if any(trial["status"] == "unfinished" for trial in trials) or (missing and stopped):
        raise KeyboardInterrupt("the same command resumes where it stopped")
    if missing:
        raise SweepError(
            f"{plan.output / 'tune'}: Ray Tune ended after {len(trials)} of {plan.num_trials} "
            "trials; remove this folder and give the same command again"
        )


def _wait_for_room(plan: SweepPlan, num_workers: int) -> None:
    workers = plan.resources
    gpus = plan.config.scaling.gpus_per_worker if workers.use_gpu else 0
    cluster.wait_for_room(num_workers, workers.cpus_per_worker, gpus)


def run_trial(chosen: dict[str, Any], config: Config, output: Place, dataset_digest: str) -> None:
    """Run one trial: `fit` with the chosen settings, reporting each epoch's scores to Tune.

    Args:
        chosen: dotted path of a setting -> value.
        config: of the sweep.
        output: the SWEEP folder.
        dataset_digest: of the data that the sweep began with.
    """
    started = time.perf_counter()
    first_step: list[float] = []
    context = tune.get_context()
    run_path = output / "trials" / context.get_trial_id()
    resume = (run_path / "run.json").is_file()

    held: dict[str, str] = {}  # what the trial's workers hold, see `Progress`

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "placement":
            held["placement"] = event["id"]
            return
        if not first_step:
            first_step.append(round(time.perf_counter() - started, 2))
        if event["event"] == "epoch":
            report_epoch(event, startup_seconds=first_step[0], **held)

    def report_epoch(epoch: dict[str, Any], **more: float | str) -> None:
        wanted = [key for key in ("epoch", "loss", "seconds", *METRICS) if key in epoch]
        tune.report({**{key: epoch[key] for key in wanted}, **more})

    if resume and (epochs := RunFolder(run_path).state["epochs"]):
        report_epoch(epochs[-1])  # the kill may have come before Tune received it
    own = {"train.output_dir": str(run_path), "train.resume": resume}
    trial = Trial(output / "base", report, dataset_digest)
    fit(with_settings(config, {**chosen, **own}, "trial"), trial)


def _trial_resources(plan: SweepPlan) -> dict[str, float]:
    """A single worker trains in Tune's process; several get their resources from Ray Train."""
    if plan.resources.num_workers > 1:
        return {"memory": 1}  # one byte: Tune requires a resource, and a CPU would be idle
    gpu = plan.config.scaling.gpus_per_worker if plan.resources.use_gpu else 0
    return {"cpu": plan.resources.cpus_per_worker, "gpu": gpu}


def _concurrent(plan: SweepPlan) -> int:
    room = plan.resources.room // plan.resources.num_workers
    return min(room, plan.num_trials, plan.config.tune.max_concurrent_trials or room)


def _searcher(plan: SweepPlan, space: dict[str, Any]) -> Searcher | BasicVariantGenerator:
    settings = plan.config.tune
    default = None
    if settings.try_default and plan.num_trials > 1:
        default = default_point(plan.config, space)
        if default is None:
            print("note: the config itself is not a trial, as the search space does not contain it")
    points = [default] if default else None
    if settings.search == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        searcher = OptunaSearch(seed=settings.seed, points_to_evaluate=points)
        return ConcurrencyLimiter(searcher, max_concurrent=_concurrent(plan))
    generator = BasicVariantGenerator(
        random_state=settings.seed,
        points_to_evaluate=points,
        max_concurrent=_concurrent(plan),  # it takes no notice of `TuneConfig`'s
    )
    # The same trials get the same ids, and so their RUNs, where Tune's state is lost.
    generator._uuid_prefix = hashlib.sha256(str(plan.output).encode()).hexdigest()[:5] + "_"
    return generator


def _scheduler(config: Config) -> TrialScheduler:
    if config.tune.scheduler == "none":
        return FIFOScheduler()
    return AsyncHyperBandScheduler(
        time_attr="epoch",  # Tune's own count starts again when a trial is resumed
        max_t=config.train.num_epochs,
        grace_period=min(config.tune.grace_epochs, config.train.num_epochs),
        reduction_factor=config.tune.reduction_factor,
    )


def _loggers(plan: SweepPlan) -> list[tune.Callback]:
    """MLflow's callback, if configured; Tune adds TensorBoard's by itself."""
    if plan.config.tune.mlflow_uri is None:
        return []
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return [MLflowLoggerCallback(plan.config.tune.mlflow_uri, experiment_name=plan.output.name)]


class Progress(tune.Callback):  # type: ignore[misc]
    """Prints a line for each trial that ends; shows a progress bar on a terminal."""

    def __init__(self, num_trials: int, metric: str) -> None:
        self.num_trials, self.metric = num_trials, metric

    @functools.cached_property
    def bar(self) -> Any:
        """Created on first use, because Tune pickles this object into its state."""
        return tqdm(
            total=self.num_trials, desc="trials", unit="trial", file=sys.stderr, disable=None
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "bar"}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print the trial's best score, and free what the workers of a stopped trial hold."""
        if placement := trial.last_result.get("placement"):
            # Tune ends the trial's process, and Ray keeps the group until the sweep's end.
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(placement)))
        epochs = trial.last_result.get("epoch", 0)
        plural = "" if epochs == 1 else "s"
        self._print(trials, trial, f"{self.metric} {self._best(trial):.3f}, {epochs} epoch{plural}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print that the trial failed."""
        self._print(trials, trial, "failed")

    def _best(self, trial: Any) -> float:
        """A trial's best score among those reported to Tune."""
        return float(trial.metric_analysis.get(self.metric, {}).get("max", 0.0))

    def _print(self, trials: list[Any], trial: Any, outcome: str) -> None:
        ended = [other for other in trials if other.is_finished() or other is trial]
        chosen = ", ".join(f"{key.split('.')[-1]} {_short(v)}" for key, v in trial.config.items())
        best = max(self._best(other) for other in ended)
        self.bar.update(len(ended) - self.bar.n)
        place = f"trial {len(ended)}/{self.num_trials} {trial.trial_id}"
        self.bar.write(f"{place}: {outcome} ({chosen}); best so far {best:.3f}", file=sys.stdout)
        sys.stdout.flush()  # a log is read while the sweep runs


def _short(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _row(plan: SweepPlan, result: Any) -> dict[str, Any]:
    """A trial's row in sweep.json; its scores are read from its RUN."""
    metrics = result.metrics or {}
    trial_id = metrics.get("trial_id") or result.path.rpartition("/")[2]
    name = f"trials/{trial_id}"
    run_path = plan.output / name
    metric = plan.config.tune.metric
    row: dict[str, Any] = {
        "trial_id": trial_id,
        "run": name,
        "settings": result.config,
        "status": "failed" if result.error else "unfinished",
        "reason": _reason(result.error) if result.error else None,
        "epochs": 0,
        "score": None,
        "kept": None,
        "kept_score": None,
        "scores": {},
        "seconds": 0.0,
        "startup_seconds": metrics.get("startup_seconds"),
        "curve": [],
    }
    if not (run_path / "run.json").is_file():
        return row
    run = RunFolder(run_path)
    epochs = run.state["epochs"]
    if epochs:
        best = max(epochs, key=lambda epoch: epoch[metric])
        row |= {
            "epochs": len(epochs),
            "score": best[metric],
            "kept": run.state["best"],
            "kept_score": _kept_score(run, metric),
            "scores": {key: best[f"val_iou_{key}"] for key in MATRIX},
            "seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
            "curve": [epoch[metric] for epoch in epochs],
        }
    if not result.error and epochs:
        done = len(epochs) >= plan.config.train.num_epochs
        row["status"] = "finished" if done else "stopped"
        if not done and not metrics.get("done"):
            row["status"] = "unfinished"
    if run.state["status"] != row["status"]:
        run.update(status=row["status"])
    return row


def _kept_score(run: RunFolder, metric: str) -> float:
    """The metric of a run's best checkpoint, which need not be that of its highest epoch.

    An epoch that loses on a kind of prompt is no best checkpoint. Where none is, the base is kept,
    without the instance decoder.
    """
    if number := best_epoch(run.state):
        return float(run.state["epochs"][number - 1][metric])
    return 0.0 if metric == "val_msa" else float((run.state["base_metrics"] or {}).get(metric, 0.0))


def _reason(error: BaseException) -> str:
    """The cause of a failure without its traceback: the last line of Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^[\w.]*errors\.", "", lines[-1])[:500] if lines else type(error).__name__


def _result(plan: SweepPlan, dataset: PreparedDataset, state: dict[str, Any]) -> dict[str, Any]:
    """What follows from the trials: best one, importance of settings, cost, test scores.

    Raises:
        SweepError: no trial has a score.
    """
    trials = state["trials"]
    scored = [trial for trial in trials if trial["score"] is not None]
    if not scored:
        reasons = sorted({str(trial["reason"]) for trial in trials})
        raise SweepError(f"no trial of {len(trials)} came to an end: {'; '.join(reasons)}")
    best = max(scored, key=lambda trial: (trial["kept_score"], trial["score"]))
    if best["settings"].get("train.instances", plan.config.train.instances):
        _finish(plan, dataset, best["run"])
    return {
        "best": best["run"],
        "best_settings": best["settings"],
        "mattered": importance(trials),
        "cost": _cost(state, plan.config.train.num_epochs),
        "test": _test_scores(plan, dataset, best["run"]),
        "status": "finished",
    }


def _finish(plan: SweepPlan, dataset: PreparedDataset, best: str) -> None:
    """Finish the instance decoder of a trial that was stopped before it came to that.

    The scheduler stops a trial that did all its epochs, too, in the report of the last one.
    """
    workers = plan.resources
    gpus = plan.config.scaling.gpus_per_worker if workers.use_gpu else 0
    task = ray.remote(finish_run).options(
        num_cpus=workers.cpus_per_worker, num_gpus=gpus, max_retries=0
    )
    _wait_for_room(plan, 1)  # the last trial's process may still be ending
    device, threads = torch.device("cuda" if workers.use_gpu else "cpu"), workers.cpus_per_worker
    precise = full_precision(plan.config)
    ray.get(task.remote(plan.output / best, dataset.folder, device, threads, precise))


def _cost(state: dict[str, Any], num_epochs: int) -> dict[str, float]:
    """Seconds of this sweep, and an estimate for the same trials as separate, complete runs.

    The estimate sums the measured seconds of encoding and of each trial's epochs, extrapolated to
    all epochs, without the start-up of each run.
    """
    epochs = sum(trial["epochs"] for trial in state["trials"])
    full = sum(
        num_epochs * trial["seconds"] / trial["epochs"]
        for trial in state["trials"]
        if trial["epochs"]
    )
    encode = state["embeddings"]["seconds"]
    separate = full + encode * len(state["trials"])
    return {
        "seconds": state["seconds"],
        "epochs": epochs,
        "epochs_untrained": num_epochs * len(state["trials"]) - epochs,
        "separate_seconds": round(separate, 1),
        "ratio": round(state["seconds"] / max(separate, 1e-9), 3),
    }


def _test_scores(plan: SweepPlan, dataset: PreparedDataset, best: str) -> dict[str, Any]:
    """The prompt matrix of base and best trial on the test split, which no trial used."""
    checkpoints = {"base": plan.output / "base", "best": find_checkpoint(plan.output / best)}
    outcomes = score_models(plan.config, dataset, dataset.split("test"), checkpoints)
    return {name: summary(outcome.scores) for name, outcome in outcomes.items()}
