"""The training loop: plain torch, with or without torch.distributed, and no Ray.

Reads down the page: `train_loop` -> `train_epoch` -> `train_step` -> `PromptedSam.forward`,
`validate`. Every worker runs the same lines; what differs is its rank.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recompute

from samray.batches import Batch, BatchLoader, epoch_steps
from samray.checkpoint import RunFolder, load_checkpoint, save_checkpoint
from samray.config import Config, TrainConfig
from samray.dataset import ImageRecord, PreparedDataset
from samray.embeddings import EmbeddingCache, encode_image
from samray.errors import TrainingError
from samray.images import decode_image
from samray.losses import sam_loss
from samray.model import PromptGroup, decode_prompts, freeze, low_res_size
from samray.prompts import STRATEGIES
from samray.scoring import score_image

LOSSES = ("loss", "loss_focal", "loss_dice", "loss_iou")

# Called on rank 0 with {"event": "step" | "epoch", ...}.
Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Worker:
    """Who this process is among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Add up over all workers."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


class PromptedSam(nn.Module):
    """One worker's part of a step in one forward, so that DDP sees all of it.

    Args:
        sam: the model, already frozen where it shall be.
        loss_weights: of focal, Dice and IoU loss.
        max_prompts: prompts whose activations are kept; a batch of more is decoded in pieces that
            are recomputed in the backward pass.
    """

    def __init__(
        self, sam: Any, loss_weights: tuple[float, float, float], max_prompts: int
    ) -> None:
        super().__init__()
        self.sam = sam
        self.loss_weights = loss_weights
        self.max_prompts = max_prompts

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        """Return the sums of the losses over the batch's instances; zeros for no batch."""
        # Mixed prompts use other parameters in every step, and a worker may have nothing to do.
        # Touching all of them keeps DDP's reduction complete.
        zero = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0
        sums = dict.fromkeys(LOSSES, zero)
        if batch is None:
            return sums
        embeddings = batch.image_embeddings
        if embeddings is None:
            embeddings = self.sam.image_encoder(batch.images)
        pieces = [
            (chunk, piece)
            for group, target in zip(batch.groups, batch.targets, strict=True)
            for chunk, piece in zip(
                group.chunks(self.max_prompts), target.split(self.max_prompts), strict=True
            )
        ]
        too_many = sum(len(chunk) for chunk, _ in pieces) > self.max_prompts
        for chunk, target in pieces:
            valid = batch.valid[chunk.image_index]
            if too_many:
                losses = recompute(
                    self._group_loss, embeddings, chunk, target, valid, use_reentrant=False
                )
            else:
                losses = self._group_loss(embeddings, chunk, target, valid)
            sums = {name: sums[name] + losses[name] for name in LOSSES}
        return sums

    def _group_loss(
        self, embeddings: Tensor, group: PromptGroup, target: Tensor, valid: Tensor
    ) -> dict[str, Tensor]:
        masks, ious = decode_prompts(self.sam, embeddings, group, group.ambiguous)
        return sam_loss(masks, ious, target, valid, self.loss_weights)


def train_loop(
    config: Config,
    run: RunFolder,
    dataset: PreparedDataset,
    worker: Worker,
    cache: EmbeddingCache | None,
    report: Report = lambda event: None,
) -> None:
    """Train from the run's latest checkpoint, or its base, to the last epoch.

    Args:
        config: resolved: `freeze_image_encoder` and `focal_weight` are set.
        cache: embeddings of all train and val images, with a frozen encoder; else None.
        report: hears of every step and epoch, on rank 0.

    Raises:
        TrainingError: the loss is not a number any more.
    """
    settings = config.train
    checkpoint = load_checkpoint(run.latest or run.base)
    sam = checkpoint.model().to(worker.device)
    freeze(sam, config.model)
    focal_weight = config.loss.focal_weight
    assert focal_weight is not None
    module = PromptedSam(
        sam,
        (focal_weight, config.loss.dice_weight, config.loss.iou_weight),
        settings.max_prompts,
    )
    model: nn.Module = module
    if worker.world_size > 1:
        model = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW(
        [p for p in sam.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    epoch, step = 0, 0
    if run.latest is not None:
        optimizer.load_state_dict(
            torch.load(run.latest / "optimizer.pth", map_location="cpu", weights_only=True)
        )
        epoch, step = checkpoint.progress["epoch"], checkpoint.progress["step"]
    records = dataset.split("train")
    loader = BatchLoader(
        dataset,
        records,
        config.prompts,
        settings.seed,
        cache,
        sam.image_encoder.img_size,
        low_res_size(sam),
    )
    while epoch < settings.num_epochs:
        started = time.perf_counter()
        losses, step = train_epoch(model, optimizer, loader, settings, worker, epoch, step, report)
        epoch += 1
        scores = validate(sam, dataset, cache, worker)
        metrics = {
            "epoch": epoch,
            "step": step,
            **losses,
            **scores,
            "seconds": round(time.perf_counter() - started, 2),
        }
        if worker.rank == 0:
            progress = {
                **metrics,
                "dataset_digest": dataset.digest,
                "base": checkpoint.progress.get("base"),
            }
            name = f"epoch_{epoch:04d}"
            save_checkpoint(
                run.path / "checkpoints" / name,
                sam.state_dict(),
                config,
                progress,
                optimizer.state_dict(),
            )
            run.register(name, metrics)
            report({"event": "epoch", **metrics})
    worker.sum(torch.zeros(1, device=worker.device))  # nobody leaves before the last is written


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: BatchLoader,
    settings: TrainConfig,
    worker: Worker,
    epoch: int,
    step: int,
    report: Report,
) -> tuple[dict[str, float], int]:
    """Train on every image of the split once.

    Returns:
        Mean losses per instance over all workers, and the number of steps so far.
    """
    steps = epoch_steps(len(loader.records), settings.batch_size, settings.seed, epoch)
    total_steps = len(steps) * settings.num_epochs
    sums = torch.zeros(len(LOSSES) + 1, dtype=torch.float64)
    for number, batch in enumerate(_load_ahead(loader, steps, worker, epoch), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, total_steps, settings)
        num_instances = sum(len(loader.records[index].instances) for index in steps[number - 1])
        losses = train_step(model, optimizer, batch, num_instances, worker, settings)
        step += 1
        mine = sum(len(group) for group in batch.groups) if batch else 0
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
    return {name: float(sums[i] / sums[-1]) for i, name in enumerate(LOSSES)}, step


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch | None,
    num_instances: int,
    worker: Worker,
    settings: TrainConfig,
) -> dict[str, float]:
    """Make one optimiser step; every worker calls this, with or without a batch.

    DDP averages gradients over workers, so each one's loss is world size x its sum / all
    instances: the mean over instances, however they are spread.

    Returns:
        This worker's sums of the losses.
    """
    sums: dict[str, Tensor] = model(batch.to(worker.device) if batch else None)
    optimizer.zero_grad(set_to_none=True)
    (sums["loss"] * (worker.world_size / num_instances)).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip_grad_norm)
    if not torch.isfinite(norm):  # the reduced gradient, so every worker sees it
        raise TrainingError(
            "the gradient is no longer a finite number; lower train.learning_rate (--lr)"
        )
    optimizer.step()
    return {name: float(value.detach()) for name, value in sums.items()}


def learning_rate_at(step: int, total_steps: int, settings: TrainConfig) -> float:
    """Linear warm-up, then a half cosine from the peak to its final share; of the step alone."""
    warmup = min(settings.warmup_steps, total_steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total_steps - warmup)
    final = settings.final_lr_fraction
    return settings.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def validate(
    sam: Any, dataset: PreparedDataset, cache: EmbeddingCache | None, worker: Worker
) -> dict[str, float]:
    """Score the val split; the images are shared out over the workers.

    Returns:
        `val_iou` and `val_dice`, the means over center, random and bbox, and each one's own
        IoU as `val_iou_center` and so on.
    """
    sums = torch.zeros(len(STRATEGIES), 3, dtype=torch.float64)  # IoU, Dice, count
    for record in dataset.split("val")[worker.rank :: worker.world_size]:
        embedding = embedding_of(sam, dataset, cache, record)
        for score in score_image(sam, embedding, record, seed=0):
            row = STRATEGIES.index(score.strategy)
            sums[row] += torch.tensor([score.iou, score.dice, 1.0], dtype=torch.float64)
    sums = worker.sum(sums.to(worker.device)).cpu()
    means = sums[:, :2] / sums[:, 2:]
    return {
        "val_iou": float(means[:, 0].mean()),
        "val_dice": float(means[:, 1].mean()),
        **{f"val_iou_{name}": float(means[i, 0]) for i, name in enumerate(STRATEGIES)},
    }


def embedding_of(
    sam: Any, dataset: PreparedDataset, cache: EmbeddingCache | None, record: ImageRecord
) -> Tensor:
    """Return an image's embedding, C x h x w float32 on the model's device.

    With a cache it is read, or encoded and published; without, it is encoded.
    """
    if cache is not None:
        cached = cache.load(record.digest)
        if cached is not None:
            return torch.from_numpy(cached.astype("float32")).to(sam.device)
    embedding = encode_image(sam, decode_image(dataset.image_bytes(record)))
    if cache is not None:
        cache.save(record.digest, embedding.cpu().numpy())
        embedding = embedding.half().float()  # what the next reader will see
    return embedding


def _load_ahead(
    loader: BatchLoader, steps: list[list[int]], worker: Worker, epoch: int
) -> Iterator[Batch | None]:
    """Load the next batch while the current one trains."""

    def load(step: list[int]) -> Batch | None:
        return loader.load(step, worker.rank, worker.world_size, epoch)

    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(load, steps[0])
        for step in steps[1:]:
            batch, upcoming = upcoming, pool.submit(load, step)
            yield batch.result()
        yield upcoming.result()
