"""The training loop: plain torch, with or without torch.distributed, and no Ray.

Reads down the page: `train_loop` -> `train_epoch` -> `train_step` -> `PromptedSam.forward`. Batches
come from a `Source`. Every worker runs the same code and differs only in its rank.
"""

import contextlib
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from samray.config import Config, TrainConfig
from samray.errors import CheckpointError, TrainingError
from samray.instances.saved import InstanceModel, instance_files, load_instances, new_decoder
from samray.instances.segment import Way
from samray.runs import RunFolder
from samray.sam.adapt import (
    merged_weights,
    num_blocks,
    num_frozen_blocks,
    set_trainable,
    trained_state,
)
from samray.sam.checkpoint import Checkpoint, load_checkpoint, load_optimizer, save_checkpoint
from samray.sam.weights import digest_of
from samray.training.optimizer import Optimizer
from samray.training.step import LOSSES, Batch, PromptedSam

INSTANCES = "instances."  # before the names of the instance decoder's weights in optimizer.pth


@dataclass(frozen=True)
class EpochPart:
    """What is done of an epoch.

    Attributes:
        steps: number of its steps.
        sums: of the losses, and the number of instances; of this worker, or of all if saved.
        skipped: the images of each skipped step.
    """

    steps: int = 0
    sums: list[float] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)


MAX_SKIPPED = 3  # steps in a row whose gradient is not finite

# Called on every worker after a step, with the number of steps so far.
Save = Callable[[int, EpochPart], None]
# Called on rank 0 with {"event": "base" | "step" | "within" | "epoch", ...}.
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Worker:
    """This process's rank among the workers that train together."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all workers, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


class Source(Protocol):
    """Batches to train on: from a prepared dataset, or of scenes drawn on the fly.

    Attributes:
        digest: identifies the data; saved in each checkpoint.
    """

    digest: str

    def steps(self, epoch: int) -> list[list[int]]:
        """Return the items of each step of an epoch; depends on the epoch's number only."""

    def load(
        self, step: list[int], rank: int, world_size: int, epoch: int
    ) -> tuple[list[Batch], int]:
        """Return a worker's part of a step, and the number of prompts of the whole step.

        The part is empty, or one batch, or several whose gradients are added up.
        """

    def names(self, step: list[int]) -> list[str]:
        """Return the names of a step's items, for messages."""

    def validate(self, worker: Worker) -> dict[str, float]:
        """Score the current model; `val_iou` selects the best checkpoint."""


def train_loop(
    config: Config,
    run: RunFolder,
    open_source: Callable[[PromptedSam], Source],
    worker: Worker,
    report: Report = lambda event: None,
    max_minutes: float | None = None,
    labels: tuple[str, ...] | None = None,
    wanted: threading.Event | None = None,
) -> None:
    """Train from the run's latest checkpoint, or its base, to the last epoch.

    Args:
        config: resolved, so `freeze_image_encoder` and the loss weights are set.
        open_source: receives the model and what learns beside it, on the worker's device.
        report: receives every step, checkpoint within an epoch, and epoch, on rank 0.
        max_minutes: for a single worker: stop before an epoch that would exceed them.
        labels: of the objects that an instance decoder learns to find; None: no such decoder.
        wanted: set on rank 0 from outside to have a checkpoint within the epoch after the next
            step, unless there are none; cleared when a checkpoint was written.

    Raises:
        TrainingError: the gradient is not finite in several steps in a row, or a step needs more
            memory than the GPU has.
    """
    settings = config.train
    base = load_checkpoint(run.base)
    module = prompted_sam(config, base.model(), labels).to(worker.device)
    optimizer = Optimizer(module.sam, settings, worker.device, module.instances)
    epoch, step, part = 0, 0, EpochPart()
    if run.resume_from is not None:
        trained, state = load_optimizer(run.resume_from)
        module.sam.load_state_dict(trained, strict=False)  # the others are the base's
        latest = load_checkpoint(run.resume_from)
        if module.instances is not None:
            # Not those of instances.pth, which may have been finished since.
            own = {name: trained[name] for name in trained if name.startswith(INSTANCES)}
            own = {name.removeprefix(INSTANCES): value for name, value in own.items()}
            module.instances.load_state_dict(own or _saved_instances(latest))
        optimizer.load_state_dict(state)
        epoch, step = latest.progress["epoch"], latest.progress["step"]
        part = EpochPart(**latest.progress.get("part", {}))
    model = DistributedDataParallel(module) if worker.world_size > 1 else module
    source = open_source(module)
    if step == 0 and config.model.checkpoint != "none":
        _score_base(run, source, worker, report)
    origin = {"dataset_digest": source.digest, "base": base.progress.get("base")}
    write = functools.partial(_write, run, config, module, labels, optimizer, origin)
    clock = _Clock(settings.checkpoint_minutes, worker, wanted or threading.Event())
    began = started = time.perf_counter()
    while epoch < settings.num_epochs and not _out_of_patience(run, settings, worker):
        now = time.perf_counter()
        if max_minutes is not None and now - began + (now - started) > 60 * max_minutes:
            break
        started = now
        module.balanced_weight = _balanced_weight(config, epoch)
        save = functools.partial(_save_within, run, write, report, clock, worker, epoch)
        try:
            losses, step = train_epoch(
                model, optimizer, source, settings, worker, epoch, step, report, part, save
            )
        except torch.OutOfMemoryError as exc:
            raise TrainingError(
                f"the GPU is out of memory in epoch {epoch + 1}; set train.images_at_once or "
                "train.max_prompts lower, or train.recompute_encoder=true, and give --resume"
            ) from exc
        if labels is None:
            del losses["loss_instances"]
        epoch, part = epoch + 1, EpochPart()
        metrics = {
            "epoch": epoch,
            "step": step,
            **losses,
            **source.validate(worker),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if worker.rank == 0:
            name = f"epoch_{epoch:04d}"
            write(name, metrics)
            run.register(name, metrics)
            clock.start()
            report({"event": "epoch", **metrics})
    # A barrier: no worker exits before the last checkpoint is written.
    worker.sum(torch.zeros(1, device=worker.device))


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    source: Source,
    settings: TrainConfig,
    worker: Worker,
    epoch: int,
    step: int,
    report: Report,
    begun: EpochPart | None = None,
    save: Save = lambda step, part: None,
) -> tuple[dict[str, Any], int]:
    """Train on every item of the epoch once.

    Args:
        step: number of steps so far.
        begun: what was done of the epoch before the run was interrupted.
        save: called after each step but the last, with the number of steps so far and what is done
            of the epoch.

    Returns:
        Mean losses per instance over all workers, with `skipped`, the images of each step that was
        skipped, if any; and the number of steps so far.

    Raises:
        TrainingError: `MAX_SKIPPED` steps in a row gave no finite gradient.
    """
    steps = source.steps(epoch)
    total_steps = len(steps) * settings.num_epochs
    done = EpochPart() if begun is None else begun
    sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64)
    if done.sums and worker.rank == 0:  # they are of all workers
        sums += torch.tensor(done.sums, dtype=torch.float64)
    skipped = list(done.skipped)
    in_a_row = 0
    for number, (batches, num_prompts) in enumerate(
        _load_ahead(source, steps[done.steps :], worker, epoch), start=done.steps + 1
    ):
        learning_rate = learning_rate_at(step, total_steps, settings)
        optimizer.set_learning_rate(learning_rate)
        losses = train_step(model, optimizer, batches, num_prompts, worker)
        step += 1
        in_a_row = in_a_row + 1 if losses is None else 0
        if losses is None:
            skipped.append(source.names(steps[number - 1]))
            if in_a_row == min(MAX_SKIPPED, len(steps)):
                raise TrainingError(_not_finite(skipped[-in_a_row:]))
        mine = sum(len(batch) for batch in batches)
        if losses is not None:
            sums += torch.tensor([*(losses[name] for name in LOSSES), mine], dtype=torch.float64)
        if number < len(steps):
            save(step, EpochPart(number, sums.tolist(), skipped))
        if worker.rank == 0 and mine and losses is not None:
            report(
                {
                    "event": "step",
                    "epoch": epoch + 1,
                    "step": number,
                    "steps": len(steps),
                    "loss": losses["loss"] / mine,
                    "learning_rate": learning_rate,
                }
            )
    sums = worker.sum(sums.to(worker.device)).cpu()
    means: dict[str, Any] = {name: float(sums[i] / sums[-1]) for i, name in enumerate(LOSSES)}
    return means | ({"skipped": skipped} if skipped else {}), step


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: list[Batch],
    num_prompts: int,
    worker: Worker,
) -> dict[str, float] | None:
    """Make one optimiser step; every worker calls this, with or without batches.

    DDP averages gradients over workers. Each worker's loss is therefore world size x its sum / all
    prompts, which gives the mean over prompts for any distribution over workers and batches.

    Returns:
        This worker's sums of the losses; None if the gradient is not finite, and nothing changed.
    """
    weight = worker.world_size / num_prompts
    while True:
        optimizer.zero_grad()
        sums = dict.fromkeys(LOSSES, 0.0)
        # Workers may have different numbers of batches; each takes part in one reduction.
        with _unreduced(model):
            for batch in batches[:-1]:
                _add_gradient(model, optimizer, batch, weight, worker, sums)
        last = batches[-1] if batches else None
        _add_gradient(model, optimizer, last, weight, worker, sums)
        outcome = optimizer.step()
        if outcome != "loss scale lowered":
            return sums if outcome == "done" else None


def _add_gradient(
    model: nn.Module,
    optimizer: Optimizer,
    batch: Batch | None,
    weight: float,
    worker: Worker,
    sums: dict[str, float],
) -> None:
    """Add a batch's gradient to the parameters', and its losses to `sums`."""
    with optimizer.autocast():
        losses: dict[str, Tensor] = model(
            batch.to(worker.device) if batch else None, optimizer.scaler.get_scale()
        )
    optimizer.backward((losses["loss"] + losses["loss_instances"]) * weight)
    for name in sums:
        sums[name] += float(losses[name].detach())


def _unreduced(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Add gradients up without reducing them over the workers."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _not_finite(skipped: list[list[str]]) -> str:
    images = ", ".join(dict.fromkeys(name for names in skipped for name in names))
    return (
        f"the gradient is no longer a finite number, in {len(skipped)} steps in a row, with "
        f"{images}; lower train.learning_rate (--lr), or look at these images with `samray inspect`"
    )


def learning_rate_at(step: int, total_steps: int, settings: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to the final fraction; depends on the step only."""
    peak, final = settings.learning_rate, settings.final_lr_fraction
    assert peak is not None
    warmup = min(settings.warmup_steps, total_steps // 2)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def balance_at(epoch: int, num_epochs: int) -> float:
    """Weight of the balanced loss in an epoch: falls from 1 to 0 in a fifth of the epochs."""
    return max(0.0, 1 - 5 * epoch / num_epochs)


def prompted_sam(config: Config, sam: Sam, labels: tuple[str, ...] | None = None) -> PromptedSam:
    """Return the module of a training step, with parts frozen as configured.

    Args:
        labels: see `train_loop`.
    """
    set_trainable(sam, config.model, config.train.seed)
    focal_weight = config.loss.focal_weight
    assert focal_weight is not None
    weights = (focal_weight, config.loss.dice_weight, config.loss.iou_weight)
    num_frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    settings = config.train
    return PromptedSam(
        sam,
        weights,
        settings.max_prompts,
        num_frozen,
        settings.recompute_encoder,
        None if labels is None else new_decoder(sam, len(labels), settings.seed),
    )


def _saved_instances(latest: Checkpoint) -> dict[str, Tensor]:
    """The weights of the instance decoder beside a checkpoint, written without those to resume."""
    saved = load_instances(latest, latest.model())
    if saved is None:
        raise CheckpointError(
            f"{latest.path}: has no instance decoder, as it was written by an earlier version of "
            f"samray; start a new run from its weights: --checkpoint {latest.path} with another "
            "--output-dir"
        )
    return saved.decoder.state_dict()


def _out_of_patience(run: RunFolder, settings: TrainConfig, worker: Worker) -> bool:
    """Whether the last epochs brought no new best; the same on all workers."""
    stop = 0.0
    if settings.patience is not None and worker.rank == 0:  # it alone keeps run.json up to date
        stop = float(run.epochs_without_best >= settings.patience)
    return bool(worker.sum(torch.tensor(stop, device=worker.device)))


def _score_base(run: RunFolder, source: Source, worker: Worker, report: Report) -> None:
    """Validate the weights before the first step: the best epoch has to beat them."""
    metrics = source.validate(worker)
    if worker.rank == 0:
        run.update(base_metrics=metrics)
        report({"event": "base", **metrics})


def _balanced_weight(config: Config, epoch: int) -> float:
    weight = config.loss.balanced_weight
    assert weight is not None
    return weight * balance_at(epoch, config.train.num_epochs)


def _write(
    run: RunFolder,
    config: Config,
    module: PromptedSam,
    labels: tuple[str, ...] | None,
    optimizer: Optimizer,
    origin: dict[str, Any],
    name: str,
    progress: dict[str, Any],
) -> None:
    """Write a checkpoint; it does not count until it is registered."""
    weights, trained = merged_weights(module.sam), trained_state(module.sam)
    files = None
    if module.instances is not None and labels is not None:
        model = InstanceModel(module.instances, labels, Way())
        files = instance_files(model, digest_of(weights, prefix="image_encoder."))
        own = module.instances.state_dict()
        trained |= {INSTANCES + key: value.detach().cpu() for key, value in own.items()}
    save_checkpoint(
        run.path / "checkpoints" / name,
        weights,
        config,
        {**progress, **origin},
        (trained, optimizer.state_dict()),
        files,
    )


def _save_within(
    run: RunFolder,
    write: Callable[[str, dict[str, Any]], None],
    report: Report,
    clock: "_Clock",
    worker: Worker,
    epoch: int,
    step: int,
    part: EpochPart,
) -> None:
    """Write a checkpoint within an epoch if it is time, and make it the one to resume from."""
    if not clock.is_due():
        return
    sums = worker.sum(torch.tensor(part.sums, dtype=torch.float64, device=worker.device))
    if worker.rank == 0:
        name = f"within_{epoch + 1:04d}_{step:08d}"
        of_all = asdict(replace(part, sums=sums.tolist()))
        write(name, {"epoch": epoch, "step": step, "part": of_all})
        run.register_within(name)
        report({"event": "within", "step": step})
    clock.start()


class _Clock:
    """Says when a checkpoint is due; rank 0's clock decides for all workers."""

    def __init__(self, minutes: float | None, worker: Worker, wanted: threading.Event) -> None:
        self.minutes, self.worker, self.wanted = minutes, worker, wanted
        self.started = time.monotonic()

    def start(self) -> None:
        """Count from now, when a checkpoint was written."""
        self.started = time.monotonic()
        self.wanted.clear()

    def is_due(self) -> bool:
        """The same on all workers, which all have to ask."""
        if self.minutes is None:
            return False
        due = time.monotonic() - self.started >= 60 * self.minutes or self.wanted.is_set()
        mine = float(due and self.worker.rank == 0)
        return bool(self.worker.sum(torch.tensor(mine, device=self.worker.device)))


def _load_ahead(
    source: Source, steps: list[list[int]], worker: Worker, epoch: int
) -> Iterator[tuple[list[Batch], int]]:
    """Load the next batch while the current one trains."""

    def load(step: list[int]) -> tuple[list[Batch], int]:
        return source.load(step, worker.rank, worker.world_size, epoch)

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(load, steps[0])
        for step in steps[1:]:
            batch, upcoming = upcoming, pool.submit(load, step)
            yield batch.result()
        yield upcoming.result()
