"""Fine-tune SAM on a Ray cluster: `fit` -> `train_loop_per_worker` -> `loop.train_loop`.

This file only wraps the loop in Ray. A run's state is in its RUN folder and not in Ray, which
silently resumes a run of the same name and returns the latest checkpoint instead of the best.
"""

import functools
import os
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from samray import cluster, elastic
from samray.config import (
    ENCODER_BLOCKS,
    Config,
    load_config,
    required,
    resolve_model,
    with_settings,
)
from samray.data.dataset import PreparedDataset
from samray.errors import CheckpointError, ConfigError, DatasetError
from samray.events import EventQueue, send
from samray.runs import (
    RunFolder,
    keep_num_epochs,
    num_epochs_of,
    open_run,
    require_same_dataset,
    require_same_run,
    resume_point,
)
from samray.sam.adapt import num_frozen_blocks
from samray.sam.checkpoint import (
    Checkpoint,
    load_checkpoint,
    refuse_ambiguous,
    save_checkpoint,
)
from samray.sam.embeddings import EmbeddingCache, embeddings_folder
from samray.sam.encode import encode_missing, full_precision
from samray.sam.model import build_model, load_weights
from samray.sam.shipped import load_shipped
from samray.sam.weights import digest_of, fetch_official, load_state_dict
from samray.storage import (
    Place,
    copy_folder,
    lock_folder,
    remove_folder,
    require_folder,
    resolve,
)
from samray.tracking import Tracker, describe_start, git_commit, require_mlflow
from samray.training.finetuning import (
    FineTuning,
    cache_entries,
    finish_instances,
    instance_labels,
)
from samray.training.loop import Report, Worker, train_loop
from samray.training.optimizer import training_dtype
from samray.training.step import PromptedSam


@dataclass(frozen=True)
class Trial:
    """What a sweep passes to one of its runs.

    Attributes:
        base: folder of the weights that all trials start from.
        report: receives every step and epoch, instead of a progress bar.
        dataset_digest: of the data that the sweep began with.
    """

    base: Place
    report: Report
    dataset_digest: str


def fit(config: Config, trial: Trial | None = None) -> dict[str, Any]:
    """Fine-tune a model and keep its best checkpoint.

    Args:
        config: its `model`, `prompts`, `loss`, `train`, `scaling` and `embeddings` sections.
        trial: for a run of a sweep. A single worker's loop then runs in the calling process
            (Ray Train's local mode), which saves starting another one.

    Returns:
        The content of RUN/run.json.

    Raises:
        SamrayError: a setting, the data, the weights or the cluster do not allow the run, or
            training failed for a reason that the user can fix.
    """
    data_dir, output_dir = required(config, "train.data_dir", "train.output_dir")
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    output = resolve(output_dir, "--output-dir")
    # Absolute, because `promote` reads the saved config in another working directory.
    settings: dict[str, Any] = {
        "train.data_dir": str(dataset.folder),
        "train.output_dir": str(output),
        "train.num_epochs": num_epochs_of(output, config),
    }
    if uri := config.train.mlflow_uri:
        require_mlflow("train.mlflow_uri", uri)
        if "://" not in uri:
            settings["train.mlflow_uri"] = str(resolve(uri, "train.mlflow_uri"))
    config = with_settings(config, settings, "train")
    if trial is not None:  # the sweep holds the lock of its folder
        return _fit(config, dataset, output, trial)
    with lock_folder(output, "--output-dir"):
        return _fit(config, dataset, output, None)


def _fit(
    config: Config, dataset: PreparedDataset, output: Place, trial: Trial | None
) -> dict[str, Any]:
    resumed = open_run(output, config.train.resume)
    if trial is not None and trial.dataset_digest != dataset.digest:
        raise DatasetError(
            f"{dataset.folder}: was prepared again while the sweep ran, which began with dataset "
            f"{trial.dataset_digest[:12]}; prepare into another folder, and start a new sweep"
        )
    _require_enough_images(config, dataset)
    base = None
    if trial is None and not (resumed and resumed.has_base):
        base, config = base_checkpoint(config)
    else:  # RUN/base or the sweep holds the weights; their origin may be gone
        config = resolve_model(config, weights_given=config.model.checkpoint != "none")
    if resumed is not None:
        require_same_run(resumed, config, dataset.digest)
        keep_num_epochs(resumed, config)
        where = "within the epoch after" if resumed.state.get("within") else "after"
        finished = len(resumed.state["epochs"])
        print(f"resuming {where} epoch {finished} of {config.train.num_epochs}")
    num_frozen = num_frozen_blocks(ENCODER_BLOCKS[config.model.type], config.model)
    cluster.start()
    resources = cluster.plan_resources(config.scaling)
    if not resources.use_gpu:
        training_dtype(config.train.precision, "cpu")
    if config.model.type != "tiny" and config.model.adapt != "none" and not resources.use_gpu:
        print(
            "note: each step computes the last blocks of the image encoder, which takes seconds an "
            "image without a GPU; --freeze-image-encoder trains the other parts alone",
            flush=True,
        )
    cluster.require_visible(dataset.folder / "manifest.json", "--data-dir")
    cluster.require_shared(output, "--output-dir")
    run = resumed or RunFolder.create(output, config, dataset.digest)
    with run.running():
        if not run.has_base:
            if base is not None:
                save_checkpoint(run.base, base.weights, config, base.progress)
            elif trial is not None:
                copy_folder(trial.base, run.base, link=True)
        cache_dir = _fill_cache(config, run, dataset, num_frozen) if num_frozen else None
        _train(config, run, dataset, cache_dir, resources, trial.report if trial else None)
        run = RunFolder(output)  # the workers have written to it
        run.update(status="finished")
    return run.state


def train_loop_per_worker(arguments: dict[str, Any]) -> None:
    """Run the plain torch loop in one of Ray Train's workers."""
    if dist.is_initialized():
        worker = Worker(dist.get_rank(), dist.get_world_size(), ray.train.torch.get_device())
    else:  # in a trial's process, where Ray Tune makes calls to Ray Train fail
        worker = Worker(0, 1, torch.device("cuda" if arguments["use_gpu"] else "cpu"))
    torch.set_num_threads(min(arguments["threads"], os.cpu_count() or 1))
    run, dataset = RunFolder(arguments["run"]), PreparedDataset(arguments["dataset"])
    require_same_dataset(run, dataset.digest)  # at a restart, it may have been prepared again
    config = arguments["config"]
    cache: EmbeddingCache | None = None
    step = run.step
    if worker.rank == 0:
        facts = worker.device, worker.world_size, arguments["git_commit"]
        start = describe_start(config, len(run.state["epochs"]), step, *facts)
        run.update(starts=[*run.state.get("starts", []), start])
        if dist.is_initialized():
            arguments["report"]({"event": "start", "num_workers": worker.world_size})
    with Tracker(run.path, config, step, arguments["report"]) as tracker:

        def open_source(module: PromptedSam) -> FineTuning:
            nonlocal cache
            if arguments["cache_dir"] is not None:
                cache = EmbeddingCache(
                    arguments["cache_dir"],
                    module.sam,
                    module.num_frozen,
                    full_precision=arguments["full_precision"],
                )
            source = FineTuning(config, dataset, cache, module)
            tracker.pictures = source.pictures
            return source

        labels = instance_labels(config, dataset)
        train_loop(
            config, run, open_source, worker, tracker.report, labels=labels, wanted=elastic.wanted
        )
    if worker.rank == 0 and config.train.instances:

        def announce() -> None:
            if dist.is_initialized():
                text = "the epochs are done; now the instance decoder learns alone, without a bar"
                arguments["report"]({"event": "finishing", "text": text})

        if dist.is_initialized():  # the other workers of this node have ended
            threads = arguments["threads"] * ray.train.get_context().get_local_world_size()
            torch.set_num_threads(min(threads, os.cpu_count() or 1))
        finish_instances(config, RunFolder(run.path), dataset, cache, worker.device, announce)


def finish_run(
    folder: Place, dataset_folder: Place, device: torch.device, threads: int, full_precision: bool
) -> None:
    """Finish the instance decoder of a run that was stopped before it could do so itself.

    Args:
        full_precision: of the run's cache.
    """
    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    run, dataset = RunFolder(folder), PreparedDataset(dataset_folder)
    require_same_dataset(run, dataset.digest)
    config = load_config(run.path / "config.yaml")
    config = resolve_model(config, weights_given=config.model.checkpoint != "none")
    cache = None
    if num_frozen := num_frozen_blocks(ENCODER_BLOCKS[config.model.type], config.model):
        cache = EmbeddingCache(
            embeddings_folder(config, dataset),
            load_checkpoint(run.base).model().to(device),
            num_frozen,
            full_precision=full_precision,
        )
    finish_instances(config, run, dataset, cache, device)


def base_checkpoint(config: Config) -> tuple[Checkpoint, Config]:
    """Return the weights to start from, and the config with the defaults that depend on them.

    Raises:
        SamrayError: they cannot be read or downloaded, or belong to another model type.
    """
    model_type, source = config.model.type, config.model.checkpoint
    given = None
    name = f"random weights, seed {config.train.seed}"
    if source == "none":
        refuse_ambiguous(source, "random weights")
    else:
        name, given = _read_weights(model_type, source)
    sam = build_model(model_type, config.train.seed)
    if given is not None:
        load_weights(sam, given, model_type, name)
    config = resolve_model(config, weights_given=given is not None)
    weights = sam.state_dict()
    base = {"source": name, "digest": digest_of(weights)}
    return Checkpoint(Path(name), model_type, weights, {"base": base}), config


def _read_weights(model_type: str, source: str | None) -> tuple[str, dict[str, Tensor]]:
    """Name and weights of `model.checkpoint`; unset, the shipped or the official ones."""
    if source is None and model_type == "tiny":
        return "tiny, shipped with samray", load_shipped().weights
    if source is None:
        path = fetch_official(model_type)
        return str(path), load_state_dict(path)
    place = resolve(source, "--checkpoint")
    if source in ENCODER_BLOCKS and not place.exists():
        raise CheckpointError(
            f"--checkpoint {source}: no such file; the published weights of a model are used "
            f"without it: --model-type {source}"
        )
    if not place.is_dir():
        return str(place), load_state_dict(place)
    checkpoint = load_checkpoint(place)
    if checkpoint.model_type != model_type:
        raise CheckpointError(
            f"{place}: is a {checkpoint.model_type} checkpoint, but the model type is "
            f"{model_type}; pass --model-type {checkpoint.model_type}"
        )
    return str(place), checkpoint.weights


def _require_enough_images(config: Config, dataset: PreparedDataset) -> None:
    num_images, num_workers = len(dataset.split("train")), config.scaling.max_workers
    dataset.split("val")  # must not be empty
    if num_workers > num_images:
        raise ConfigError(
            f"--num-workers {num_workers} are more than the {num_images} images of "
            "the train split; some would have nothing to do; lower it"
        )
    if num_workers > config.train.batch_size:
        print(
            f"note: {num_workers} workers share batches of "
            f"{config.train.batch_size} images; raise --batch-size to keep all of them busy"
        )


def _fill_cache(config: Config, run: RunFolder, dataset: PreparedDataset, num_frozen: int) -> Place:
    """Encode what the cache lacks of the train and val images; return its folder."""
    cache_dir = embeddings_folder(config, dataset)
    encoding = encode_missing(
        dataset,
        cache_entries(config, dataset),
        run.base,
        cache_dir,
        config,
        num_frozen,
    )
    run.update(embeddings=encoding.as_dict())
    return cache_dir


def _train(
    config: Config,
    run: RunFolder,
    dataset: PreparedDataset,
    cache_dir: Place | None,
    resources: cluster.Resources,
    report: Report | None,
) -> None:
    """Start the workers, pass on what they report, and translate their failures."""
    arguments: dict[str, Any] = {
        "config": config,
        "run": run.path,
        "dataset": dataset.folder,
        "cache_dir": cache_dir,
        "full_precision": full_precision(config),  # of the cache
        "threads": resources.cpus_per_worker,
        "use_gpu": resources.use_gpu,
        "git_commit": git_commit(),
    }
    if report is not None and resources.num_workers == 1:
        arguments["report"] = report
        _trainer(config, run, resources, arguments, in_process=True).fit()
        return
    cluster.wait_for_room(
        resources.num_workers,
        resources.cpus_per_worker,
        config.scaling.gpus_per_worker if resources.use_gpu else 0,
    )
    # Beside the driver: what is on another node may go with it.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = EventQueue.options(  # type: ignore[attr-defined]
        num_cpus=0, scheduling_strategy=here
    ).remote()
    arguments["report"] = functools.partial(send, queue)
    trainer = _trainer(config, run, resources, arguments, in_process=False)
    done = threading.Event()
    show = (
        functools.partial(_forward, report)
        if report
        else functools.partial(_show_progress, config, run)
    )
    viewer = threading.Thread(target=show, args=(queue, done), daemon=True)
    viewer.start()
    try:
        trainer.fit()
    except KeyboardInterrupt:
        print("interrupted: stopping the workers", file=sys.stderr, flush=True)  # takes seconds
        trainer.abort()
        raise KeyboardInterrupt("the same command with --resume continues") from None
    finally:
        done.set()
        viewer.join()
        remove_folder(_ray_folder(run))


def _trainer(
    config: Config,
    run: RunFolder,
    resources: cluster.Resources,
    arguments: dict[str, Any],
    in_process: bool,
) -> Any:
    scaling = config.scaling
    worker_resources: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.use_gpu:
        worker_resources["GPU"] = scaling.gpus_per_worker
    return elastic.ElasticTrainer(
        send=arguments["report"],
        checkpoint=functools.partial(resume_point, run.path),
        train_loop_per_worker=train_loop_per_worker,
        train_loop_config=arguments,
        torch_config=ray.train.torch.TorchConfig(timeout_s=ceil(60 * scaling.hang_minutes)),
        scaling_config=ray.train.ScalingConfig(
            # 0 is Ray's local mode
            num_workers=0 if in_process else (scaling.min_workers, scaling.max_workers),
            use_gpu=resources.use_gpu,
            resources_per_worker=worker_resources,
            elastic_resize_monitor_interval_s=elastic.LOOK_SECONDS,
        ),
        # A unique name each time: Ray silently resumes a run whose name it knows.
        run_config=ray.train.RunConfig(
            name=f"train-{uuid.uuid4().hex[:12]}",
            storage_path=str(_ray_folder(run)),
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_restarts, controller_failure_limit=elastic.START_TRIES
            ),
        ),
    )


def _ray_folder(run: RunFolder) -> Place:
    """Ray Train's own files, which nothing reads; removed when training ends."""
    return run.path / "ray"


def _forward(report: Report, queue: Any, done: threading.Event) -> None:
    """Pass the workers' events to a trial's report."""
    last = False
    while not last:
        last = done.wait(0.2)
        for event in ray.get(queue.take.remote()):
            if "text" not in event and event["event"] != "start":
                report(event)


def _show_progress(config: Config, run: RunFolder, queue: Any, done: threading.Event) -> None:
    """Show a bar on a terminal, else print a line per epoch."""
    epochs = config.train.num_epochs
    finished = len(run.state["epochs"])
    form = (
        "{desc}: {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
    )
    with tqdm(
        total=epochs,
        initial=finished,
        desc="starting workers",
        bar_format=form,
        file=sys.stderr,
        disable=None,
    ) as bar:
        last = started = False
        workers = 0
        while not last:
            last = done.wait(0.5)
            try:
                events = ray.get(queue.take.remote())
            except ray.exceptions.RayError:
                return
            if events and not started and not bar.disable:
                started = True
                bar.start_t = time.time()  # so that the time left ignores the start-up
                bar.set_description("train")
            for event in events:
                if event["event"] == "start" or "text" in event:
                    workers = _say(event, config, workers)
                    continue
                if event["event"] == "placement":
                    continue
                if event["event"] == "base":
                    if bar.disable:
                        print(f"base  val_iou {event['val_iou']:.3f}", flush=True)
                    continue
                if event["event"] == "step":
                    bar.n = event["epoch"] - 1 + event["step"] / event["steps"]
                    bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
                    continue
                line = (
                    f"epoch {event['epoch']}/{epochs}  loss {event['loss']:.3f}  "
                    f"val_iou {event['val_iou']:.3f}  {event['seconds']:.1f} s"
                )
                if bar.disable:
                    print(line, flush=True)
                else:
                    bar.set_description(f"train (val_iou {event['val_iou']:.3f})")
            if not bar.disable:
                bar.refresh()


def _say(event: dict[str, Any], config: Config, workers: int) -> int:
    """Print a line on workers that start, die or wait; return the number that run.

    Args:
        workers: that ran before; 0 at the first start.
    """
    text = event.get("text")
    if text is None:
        number, workers = workers, event["num_workers"]
        if number != workers and config.scaling.min_workers < config.scaling.max_workers:
            text = elastic.number_of(workers) + (f" instead of {number}" if number else "")
    if text is not None:
        tqdm.write(f"samray: {text}", file=sys.stderr)
    return workers
