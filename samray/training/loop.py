"""The training loop: plain torch, with or without torch.distributed, and no Ray.

Reads down the page: `train_loop` -> `train_epoch` -> `train_step` -> `PromptedSam.forward`. Batches
come from a `Source`. Every worker runs the same code and differs only in its rank.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from segment_anything.modeling import Sam
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from samray.config import Config, TrainConfig
from samray.errors import TrainingError
from samray.sam.adapt import merged_weights, num_frozen_blocks, set_trainable, trained_state
from samray.sam.checkpoint import RunFolder, load_checkpoint, load_optimizer, save_checkpoint
from samray.training.step import LOSSES, Batch, PromptedSam

MAX_SKIPPED = 3  # steps in a row whose gradient is not finite

# Called on rank 0 with {"event": "step" | "epoch", ...}.
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
    ) -> tuple[Batch | None, int]:
        """Return a worker's part of a step, if any, and the number of instances of the step."""

    def names(self, step: list[int]) -> list[str]:
        """Return the names of a step's items, for messages."""

    def validate(self, worker: Worker) -> dict[str, float]:
        """Score the current model; `val_iou` selects the best checkpoint."""


def train_loop(
    config: Config,
    run: RunFolder,
    open_source: Callable[[Sam], Source],
    worker: Worker,
    report: Report = lambda event: None,
    max_minutes: float | None = None,
) -> None:
    """Train from the run's latest checkpoint, or its base, to the last epoch.

    Args:
        config: resolved, so `freeze_image_encoder` and the loss weights are set.
        open_source: receives the model, on the worker's device.
        report: receives every step and epoch, on rank 0.
        max_minutes: for a single worker: stop before an epoch that would exceed them.

    Raises:
        TrainingError: the gradient is not finite in several steps in a row.
    """
    settings = config.train
    base = load_checkpoint(run.base)
    module = _prompted_sam(config, base.model().to(worker.device))
    optimizer = _optimizer(module, settings)
    epoch, step = 0, 0
    if run.latest is not None:
        trained, state = load_optimizer(run.latest)
        module.sam.load_state_dict(trained, strict=False)  # the others are the base's
        optimizer.load_state_dict(state)
        progress = load_checkpoint(run.latest).progress
        epoch, step = progress["epoch"], progress["step"]
    model = DistributedDataParallel(module) if worker.world_size > 1 else module
    source = open_source(module.sam)
    if epoch == 0 and config.model.checkpoint != "none":
        _score_base(run, source, worker, report)
    began = started = time.perf_counter()
    while epoch < settings.num_epochs:
        now = time.perf_counter()
        if max_minutes is not None and now - began + (now - started) > 60 * max_minutes:
            break
        started = now
        module.balanced_weight = _balanced_weight(config, epoch)
        losses, step = train_epoch(model, optimizer, source, settings, worker, epoch, step, report)
        epoch += 1
        metrics = {
            "epoch": epoch,
            "step": step,
            **losses,
            **source.validate(worker),
            "seconds": round(time.perf_counter() - started, 2),
        }
        if worker.rank == 0:
            origin = {"dataset_digest": source.digest, "base": base.progress.get("base")}
            _save_epoch(run, config, module.sam, optimizer, metrics, origin)
            report({"event": "epoch", **metrics})
    # A barrier: no worker exits before the last checkpoint is written.
    worker.sum(torch.zeros(1, device=worker.device))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    source: Source,
    settings: TrainConfig,
    worker: Worker,
    epoch: int,
    step: int,
    report: Report,
) -> tuple[dict[str, Any], int]:
    """Train on every item of the epoch once.

    Returns:
        Mean losses per instance over all workers, with `skipped`, the images of each step that was
        skipped, if any; and the number of steps so far.

    Raises:
        TrainingError: `MAX_SKIPPED` steps in a row gave no finite gradient.
    """
    steps = source.steps(epoch)
    total_steps = len(steps) * settings.num_epochs
    sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64)
    skipped: list[list[str]] = []  # the images of each skipped step
    in_a_row = 0
    for number, (batch, num_instances) in enumerate(
        _load_ahead(source, steps, worker, epoch), start=1
    ):
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate_at(step, total_steps, settings)
        losses = train_step(model, optimizer, batch, num_instances, worker, settings)
        step += 1
        in_a_row = in_a_row + 1 if losses is None else 0
        if losses is None:
            skipped.append(source.names(steps[number - 1]))
            if in_a_row == min(MAX_SKIPPED, len(steps)):
                raise TrainingError(_not_finite(skipped[-in_a_row:]))
            continue
        mine = len(batch) if batch else 0
        sums += torch.tensor([*(losses[name] for name in LOSSES), mine], dtype=torch.float64)
        if worker.rank == 0 and mine:
            report(
                {
                    "event": "step",
                    "epoch": epoch + 1,
                    "step": number,
                    "steps": len(steps),
                    "loss": losses["loss"] / mine,
                }
            )
    sums = worker.sum(sums.to(worker.device)).cpu()
    means: dict[str, Any] = {name: float(sums[i] / sums[-1]) for i, name in enumerate(LOSSES)}
    return means | ({"skipped": skipped} if skipped else {}), step


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch | None,
    num_instances: int,
    worker: Worker,
    settings: TrainConfig,
) -> dict[str, float] | None:
    """Make one optimiser step; every worker calls this, with or without a batch.

    DDP averages gradients over workers. Each worker's loss is therefore world size x its sum / all
    instances, which gives the mean over instances for any distribution over workers.

    Returns:
        This worker's sums of the losses; None if the gradient is not finite, and nothing changed.
    """
    with torch.autocast(
        worker.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
    ):
        sums: dict[str, Tensor] = model(batch.to(worker.device) if batch else None)
    optimizer.zero_grad(set_to_none=True)
    (sums["loss"] * (worker.world_size / num_instances)).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
    if not torch.isfinite(norm):  # the reduced gradient, so every worker sees it
        return None
    optimizer.step()
    return {name: float(value.detach()) for name, value in sums.items()}


def _not_finite(skipped: list[list[str]]) -> str:
    images = ", ".join(dict.fromkeys(name for names in skipped for name in names))
    return (
        f"the gradient is no longer a finite number, in {len(skipped)} steps in a row, with "
        f"{images}; lower train.learning_rate (--lr), or look at these images with `samray inspect`"
    )


def learning_rate_at(step: int, total_steps: int, settings: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to the final fraction; depends on the step only."""
    warmup = min(settings.warmup_steps, total_steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    final = settings.final_lr_fraction
    return settings.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def balance_at(epoch: int, num_epochs: int) -> float:
    """Weight of the balanced loss in an epoch: falls from 1 to 0 in a fifth of the epochs."""
    return max(0.0, 1 - 5 * epoch / num_epochs)


def _prompted_sam(config: Config, sam: Sam) -> PromptedSam:
    """The module of a training step, with parts frozen as configured."""
    set_trainable(sam, config.model)
    focal_weight = config.loss.focal_weight
    assert focal_weight is not None
    weights = (focal_weight, config.loss.dice_weight, config.loss.iou_weight)
    num_frozen = num_frozen_blocks(sam.image_encoder, config.model)
    return PromptedSam(sam, weights, config.train.max_prompts, num_frozen)


def _optimizer(module: PromptedSam, settings: TrainConfig) -> torch.optim.AdamW:
    """AdamW with two groups: the image encoder, at a share of the learning rate, and the rest."""
    named = [(name, p) for name, p in module.sam.named_parameters() if p.requires_grad]
    encoder = [p for name, p in named if name.startswith("image_encoder.")]
    others = [p for name, p in named if not name.startswith("image_encoder.")]
    groups = [
        {"params": others, "share": 1.0},
        {"params": encoder, "share": settings.encoder_lr_share},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )


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


def _save_epoch(
    run: RunFolder,
    config: Config,
    sam: Sam,
    optimizer: torch.optim.Optimizer,
    metrics: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    """Write the epoch's checkpoint, then register it, which makes it count."""
    name = f"epoch_{metrics['epoch']:04d}"
    save_checkpoint(
        run.path / "checkpoints" / name,
        merged_weights(sam),
        config,
        {**metrics, **origin},
        (trained_state(sam), optimizer.state_dict()),
    )
    run.register(name, metrics)


def _load_ahead(
    source: Source, steps: list[list[int]], worker: Worker, epoch: int
) -> Iterator[tuple[Batch | None, int]]:
    """Load the next batch while the current one trains."""

    def load(step: list[int]) -> tuple[Batch | None, int]:
        return source.load(step, worker.rank, worker.world_size, epoch)

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(load, steps[0])
        for step in steps[1:]:
            batch, upcoming = upcoming, pool.submit(load, step)
            yield batch.result()
        yield upcoming.result()
