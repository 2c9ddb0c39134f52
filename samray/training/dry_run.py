"""`samray train --dry-run`: what a run would train, and what it needs, without starting it.

The image encoder's activations are added up with fake tensors, which have shapes and no content,
so that even ViT-H is estimated on a laptop. One step is measured where its memory is there.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samray import cluster
from samray.config import Config, required, resolve_model
from samray.data.dataset import PreparedDataset
from samray.instances.losses import instance_loss
from samray.sam.adapt import (
    blocks,
    num_blocks,
    num_frozen_blocks,
    prefix,
    set_trainable,
    suffix,
)
from samray.sam.decode import ImageTokens
from samray.sam.embeddings import EmbeddingCache, entry_bytes, entry_shape
from samray.sam.model import PARTS, build_model
from samray.storage import Place, require_folder, resolve
from samray.training.finetuning import FineTuning, cache_entries, instance_labels
from samray.training.loop import Worker, prompted_sam, train_step
from samray.training.optimizer import Optimizer
from samray.training.step import Batch, PromptedSam
from samray.training.train import base_checkpoint

SAMPLE = 2  # prompts whose decoding is measured; memory grows in proportion to their number
FREE_SHARE = 0.8  # of the memory that a measured step may take


@dataclass(frozen=True)
class Memory:
    """Estimate of a worker's peak memory, in bytes.

    Attributes:
        weights: of the whole model, float32.
        training: gradients and AdamW's two moments of what learns, and DDP's copy of the gradients.
        encoder: activations kept for the backward pass through the image encoder.
        decoder: the same for the prompts decoded at once.
        instances: the same for the instance decoder.
    """

    weights: int
    training: int
    encoder: int
    decoder: int
    instances: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.training + self.encoder + self.decoder + self.instances


@dataclass(frozen=True)
class Forecast:
    """What a run would do and need.

    Attributes:
        learning: per part of the model, parameters that learn and all parameters.
        num_images: of the train split.
        steps: optimiser steps in an epoch.
        num_epochs: of the run.
        num_prompts: of a worker in the largest step.
        cache_bytes: size of the cache of train and val images; 0 if all of the encoder learns.
        memory: see `Memory`.
        device: on which it was measured.
        seconds: duration of a worker's largest step; None where it needs more memory than is there.
        peak: memory that torch had allocated on the GPU in that step, in bytes; None on a CPU.
    """

    learning: dict[str, tuple[int, int]]
    num_images: int
    steps: int
    num_epochs: int
    num_prompts: int
    cache_bytes: int
    memory: Memory
    device: str
    seconds: float | None
    peak: int | None


def dry_run(config: Config) -> Forecast:
    """Return what `samray train` would do and need with a config; nothing is written.

    The model has random weights of the same shapes, so that none are downloaded; weights that the
    config names are read, to see that they can be.

    Raises:
        SamrayError: a setting, the data or the cluster do not allow the run.
    """
    (data_dir,) = required(config, "train.data_dir")
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    if config.model.checkpoint in (None, "none"):
        config = resolve_model(config, weights_given=config.model.checkpoint is None)
    else:
        _, config = base_checkpoint(config)  # they may be missing, or of another model
    cluster.start()
    resources = cluster.plan_resources(config.scaling)
    gpus = config.scaling.gpus_per_worker if resources.use_gpu else 0
    cluster.wait_for_room(1, resources.cpus_per_worker, gpus)
    task = _forecast.options(num_cpus=resources.cpus_per_worker, num_gpus=gpus, max_retries=0)
    device = torch.device("cuda" if resources.use_gpu else "cpu")
    found: Forecast = ray.get(
        task.remote(config, dataset.folder, device, resources.cpus_per_worker)
    )
    return found


@ray.remote
def _forecast(config: Config, folder: Place, device: torch.device, threads: int) -> Forecast:
    torch.set_num_threads(threads)
    return forecast(config, PreparedDataset(folder), device)


def forecast(config: Config, dataset: PreparedDataset, device: torch.device) -> Forecast:
    """Return the forecast of a run, measured in this process.

    Args:
        config: resolved.
    """
    sam = build_model(config.model.type)
    num_frozen = num_frozen_blocks(num_blocks(sam.image_encoder), config.model)
    with tempfile.TemporaryDirectory(prefix="samray-dry-run-") as folder:
        cache = EmbeddingCache(Path(folder), sam, num_frozen) if num_frozen else None
        module = prompted_sam(config, sam, instance_labels(config, dataset)).to(device)
        optimizer = Optimizer(module.sam, config.train, device, module.instances)
        source = FineTuning(config, dataset, cache, module)
        steps = source.steps(0)
        world = config.scaling.min_workers  # the fewest have the largest parts
        shares = [share for step in steps for share in source.loader.shares(step, world)]
        largest = max(shares, key=source.loader.num_prompts)
        if cache is not None:
            _fill_with_zeros(cache, sam, source, largest)
        batches, num_prompts = source.load(largest, 0, 1, 0)
        if config.prompts.point_selection == "interactive":  # else the seed would decide how many
            batches = [_with_all_clicks(batch, config.prompts.num_clicks) for batch in batches]
        learning = {part: _count(getattr(sam, part)) for part in PARTS}
        if module.instances is not None:
            learning["instance_decoder"] = _count(module.instances)
        kept = min(max(len(batch) for batch in batches), module.at_once)
        trained = sum(own for own, _ in learning.values())
        memory = Memory(
            weights=4 * sum(whole for _, whole in learning.values()),
            training=trained * (12 if world == 1 else 16),
            encoder=encoder_bytes(config, optimizer.dtype, len(batches[0].valid)),
            decoder=kept * _decoder_bytes(module, optimizer, batches[0]),
            instances=_instance_bytes(module, optimizer, batches[0]),
        )
        seconds, peak = None, None
        if memory.total < FREE_SHARE * _memory_of(device):
            seconds, peak = _measure(module, optimizer, batches, num_prompts, device)
    entries = {(record.digest, view) for record, view in cache_entries(config, dataset)}
    return Forecast(
        learning=learning,
        num_images=len(dataset.split("train")),
        steps=len(steps),
        num_epochs=config.train.num_epochs,
        num_prompts=num_prompts,
        cache_bytes=len(entries) * entry_bytes(sam, num_frozen) if num_frozen else 0,
        memory=memory,
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        seconds=seconds,
        peak=peak,
    )


def _with_all_clicks(batch: Batch, num_clicks: int) -> Batch:
    """A batch with as many correction clicks as a step may draw."""
    draws = [torch.full((len(group), num_clicks), 0.5) for group in batch.groups]
    return replace(batch, corrections=(True,) * num_clicks, click_draws=draws)


def encoder_bytes(config: Config, dtype: torch.dtype, num_images: int) -> int:
    """Return the bytes that the image encoder's backward pass keeps for some images.

    Args:
        config: resolved.
        dtype: of the training's precision.
    """
    with FakeTensorMode():
        sam = build_model(config.model.type)
        set_trainable(sam, config.model)
        encoder = sam.image_encoder
        num_frozen = num_frozen_blocks(num_blocks(encoder), config.model)
        given = torch.empty(num_images, 3, encoder.img_size, encoder.img_size)
        if num_frozen:
            with torch.no_grad():
                given = prefix(encoder, given, num_frozen)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            if not config.train.recompute_encoder:
                return saved_bytes(sam, lambda: suffix(encoder, given, num_frozen))
            inputs: list[tuple[nn.Module, Tensor]] = []
            for block in blocks(encoder):
                block.register_forward_pre_hook(
                    lambda module, arguments: inputs.append((module, arguments[0]))
                )
            outside = saved_bytes(sam, lambda: suffix(encoder, given, num_frozen, recompute=True))
            kept = sum(x.nbytes for _, x in inputs)
            computed_again = [saved_bytes(sam, partial(block, x)) for block, x in list(inputs)]
            return outside + kept + max(computed_again)


def saved_bytes(model: nn.Module, compute: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of a computation, besides the model's parameters."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        result = compute()
    del result  # kept up to here, so that no storage's address is used twice
    return sum(storage.nbytes() for storage in kept.values())


def _decoder_bytes(module: PromptedSam, optimizer: Optimizer, batch: Batch) -> int:
    """Bytes kept per prompt of a pass: of a correction, if there are any, else of the first."""
    device = optimizer.device
    group, target = batch.groups[0].chunks(SAMPLE)[0].to(device), batch.targets[0][:SAMPLE]
    group = replace(group, image_index=torch.zeros_like(group.image_index))
    encoder = module.sam.prompt_encoder
    shape = (1, encoder.embed_dim, *encoder.image_embedding_size)
    embedding = torch.zeros(shape, device=device, requires_grad=True)
    valid = batch.valid[:1].expand(len(group), -1, -1, -1).to(device)
    if batch.corrections:
        group = group.with_answer(torch.zeros(target.shape, device=device))
    tokens = ImageTokens.of(module.sam, embedding)
    draws = torch.zeros(len(group), 0, device=device)
    with optimizer.autocast():
        found = saved_bytes(
            module,
            lambda: list(module.passes(tokens, group, target.to(device), valid, draws, ())),
        )
    return found // len(group)


def _instance_bytes(module: PromptedSam, optimizer: Optimizer, batch: Batch) -> int:
    """Bytes that the instance decoder keeps of a batch."""
    decoder = module.instances
    if decoder is None or batch.scene is None:
        return 0
    scene = batch.scene.to(optimizer.device)
    encoder = module.sam.prompt_encoder
    shape = (len(scene.pixels), encoder.embed_dim, *encoder.image_embedding_size)
    embeddings = torch.zeros(shape, device=optimizer.device)
    with optimizer.autocast():
        return saved_bytes(
            module, lambda: instance_loss(decoder(embeddings, scene.pixels), scene.maps)
        )


def _measure(
    module: PromptedSam,
    optimizer: Optimizer,
    batches: list[Batch],
    num_prompts: int,
    device: torch.device,
) -> tuple[float, int | None]:
    """Return the seconds of a step, and the peak of the GPU's memory."""
    worker = Worker(0, 1, device)
    train_step(module, optimizer, batches, num_prompts, worker)  # the first one is slower
    started = time.perf_counter()
    train_step(module, optimizer, batches, num_prompts, worker)  # reads its losses: a wait
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def _fill_with_zeros(cache: EmbeddingCache, sam: Any, source: FineTuning, share: list[int]) -> None:
    """Write entries of the right shape for a step's images, which costs no encoding."""
    zeros = np.zeros(entry_shape(sam, cache.num_frozen), np.float16)
    loader = source.loader
    for index in share:
        cache.save(loader.records[index].digest, zeros, loader.cached_number(index, epoch=0))


def _count(part: nn.Module) -> tuple[int, int]:
    """Parameters that learn, and all."""
    parameters = list(part.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def _memory_of(device: torch.device) -> int:
    """Free bytes of the GPU, or bytes of this machine's memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
