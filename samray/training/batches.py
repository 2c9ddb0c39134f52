"""The data order, and the batches of a prepared dataset; plain torch, no Ray.

The order of an epoch depends on (seed, epoch) only. Every worker computes the same order, so no
image is dropped or repeated, and the number of workers does not change the result.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from samray.config import PromptConfig
from samray.data.dataset import ImageRecord
from samray.errors import DatasetError
from samray.geometry.frames import image_to_input, input_size_of
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask
from samray.geometry.prompts import Prompt, draw_prompt
from samray.geometry.views import AS_IT_IS, View, cached_view, draw_view
from samray.instances.decoder import CELL, frame_of
from samray.instances.losses import TargetMaps
from samray.instances.targets import map_targets, number_objects
from samray.sam.decode import group_prompts
from samray.sam.embeddings import EmbeddingCache
from samray.training.step import Batch, SceneTargets, draw_correction_plan


def epoch_steps(num_images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the images of each step of an epoch: every index once, the last step may be short."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def share_work(work: Sequence[int], world_size: int) -> list[list[int]]:
    """Return which of some images are each worker's, ascending; may be empty.

    All workers wait for the slowest, so each gets about the same work: the images with most are
    given out first, each to the worker with the least so far (Graham, 1969). As memory grows with
    the images, none has more than an equal share, rounded up.

    Args:
        work: of each image, such as its number of prompts.
    """
    room = math.ceil(len(work) / world_size)
    shares: list[list[int]] = [[] for _ in range(world_size)]
    free = [(0, 0, worker) for worker in range(world_size)]  # a heap: work, images, worker
    for place in sorted(range(len(work)), key=lambda place: -work[place]):
        total, count, worker = heapq.heappop(free)
        shares[worker].append(place)
        if count + 1 < room:
            heapq.heappush(free, (total + work[place], count + 1, worker))
    return [sorted(share) for share in shares]


class ImageFiles(Protocol):
    """Where the bytes of images are: a `PreparedDataset`."""

    def image_bytes(self, record: ImageRecord) -> bytes:
        """Return the file of an image."""


class BatchLoader:
    """Makes batches of a prepared dataset.

    Args:
        dataset: the files of the images.
        cache: embeddings or activations to read, or None for batches of images.
        img_size, low_res_size: sides of the model's input and of its masks.
        augment: flip, turn and recolour the images; without a cache.
        max_objects: instances of an image in one step; None: all.
        images_at_once: images of a batch; None: all of a worker's part of a step.
        labels: of the instance decoder's classes; None: there is no such decoder.
        cached_views: of each image in the cache; an epoch takes one of them, in turn.
    """

    def __init__(
        self,
        dataset: ImageFiles,
        records: Sequence[ImageRecord],
        prompts: PromptConfig,
        seed: int,
        cache: EmbeddingCache | None,
        img_size: int,
        low_res_size: int,
        augment: bool = False,
        max_objects: int | None = None,
        images_at_once: int | None = None,
        labels: tuple[str, ...] | None = None,
        cached_views: int = 1,
    ) -> None:
        self.dataset, self.records = dataset, records
        self.augment = augment and cache is None
        self.max_objects, self.images_at_once = max_objects, images_at_once
        self.labels, self.cached_views = labels, cached_views
        self.prompts, self.seed, self.cache = prompts, seed, cache
        self.img_size, self.low_res_size = img_size, low_res_size

    def shares(self, step: list[int], world_size: int) -> list[list[int]]:
        """Return each worker's images of a step; may be empty."""
        work = [self._count(index) for index in step]
        return [[step[place] for place in share] for share in share_work(work, world_size)]

    def load(self, step: list[int], rank: int, world_size: int, epoch: int) -> list[Batch]:
        """Return a worker's part of a step with newly drawn prompts; empty if it has no image.

        An instance's prompt depends on (seed, epoch, image, instance) and not on the worker.
        """
        mine = self.shares(step, world_size)[rank]
        plan: tuple[bool, ...] = ()
        if self.prompts.point_selection == "interactive":
            rng = np.random.default_rng([self.seed, epoch, step[0], 1])  # the same for all workers
            plan = draw_correction_plan(self.prompts.num_clicks, rng)
        size = self.images_at_once or max(1, len(mine))
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        weight = self.num_prompts(step) / len(step)
        return [self._batch(part, plan, epoch, weight) for part in parts]

    def _batch(self, part: list[int], plan: tuple[bool, ...], epoch: int, weight: float) -> Batch:
        prompts: list[Prompt] = []
        draws: list[np.ndarray] = []
        image_index: list[int] = []
        targets: list[np.ndarray] = []
        views: list[View] = []
        for place, index in enumerate(part):
            record = self.records[index]
            rng = np.random.default_rng([self.seed, epoch, index])
            if self.cache is not None:
                views.append(cached_view(record.digest, self.cached_number(index, epoch)))
            else:
                views.append(draw_view(rng) if self.augment else AS_IT_IS)
            size = views[-1].size(record.size)
            for number in self.chosen(index, epoch):
                crop = record.decode_crop(record.instances[number])
                mask = views[-1].turn_crop(crop, record.size)
                target = mask_to_target(mask, size, self.img_size, self.low_res_size)
                for _ in range(self.prompts.per_object):
                    prompts.append(self._draw_prompt(mask, size, rng))
                    draws.append(rng.random(len(plan), dtype=np.float32))
                    image_index.append(place)
                    targets.append(target)
        records = [self.records[index] for index in part]
        sizes = [view.size(record.size) for view, record in zip(views, records, strict=True)]
        grouped = group_prompts(prompts, image_index, sizes, self.img_size)
        valid = [valid_region(size, self.img_size, self.low_res_size) for size in sizes]
        shown = []
        if self.cache is None or self.labels is not None:
            shown = [
                view.show(decode_image(self.dataset.image_bytes(record)))
                for record, view in zip(records, views, strict=True)
            ]
        return Batch(
            images=self._inputs(shown, self.img_size) if self.cache is None else None,
            encoded=None if self.cache is None else self._encoded(part, epoch),
            groups=[group for group, _ in grouped],
            targets=[
                torch.from_numpy(np.stack([targets[place] for place in places]))[:, None]
                for _, places in grouped
            ],
            valid=torch.from_numpy(np.stack(valid))[:, None],
            corrections=plan,
            click_draws=[
                torch.from_numpy(np.stack([draws[place] for place in places]))
                for _, places in grouped
            ],
            scene=None if self.labels is None else self.scene(records, views, shown, weight),
        )

    def scene(
        self,
        records: list[ImageRecord],
        views: list[View],
        shown: list[np.ndarray],
        weight: float,
    ) -> SceneTargets:
        """Return the instance decoder's part of a batch: all objects of the images.

        Args:
            views: of the images.
            shown: the images as their views show them, H x W x 3 uint8 RGB.
            weight: see `SceneTargets`.
        """
        assert self.labels is not None
        frame = frame_of(self.img_size)
        maps = []
        for record, view in zip(records, views, strict=True):
            masks = (record.decode_crop(instance) for instance in record.instances)
            whole = number_objects(masks, record.size, record.decode_ignored())
            classes = [self.labels.index(instance.label) for instance in record.instances]
            maps.append(map_targets(view.turn(whole), classes, frame // CELL))
        return SceneTargets(self._inputs(shown, frame), TargetMaps.of(maps), weight)

    def num_prompts(self, step: list[int]) -> int:
        """Return the number of prompts of a step, over all workers."""
        return self.prompts.per_object * sum(self._count(index) for index in step)

    def _count(self, index: int) -> int:
        """Return the number of instances of an image to train on in an epoch."""
        count = self.records[index].num_instances
        return count if self.max_objects is None else min(count, self.max_objects)

    def chosen(self, index: int, epoch: int) -> list[int]:
        """Return the instances of an image to train on in an epoch, in turn over the epochs."""
        count = self.records[index].num_instances
        if self.max_objects is None or count <= self.max_objects:
            return list(range(count))
        order = np.random.default_rng([self.seed, index]).permutation(count)
        first = epoch * self.max_objects
        return [int(order[(first + number) % count]) for number in range(self.max_objects)]

    def _draw_prompt(
        self, mask: CroppedMask, size: tuple[int, int], rng: np.random.Generator
    ) -> Prompt:
        settings, mixture = self.prompts, self.prompts.mixture
        x, y = mask.origin
        drawn = draw_prompt(
            settings.point_selection,
            mask.pixels,
            settings.num_points,
            rng,
            settings.box_noise,
            (mixture.center, mixture.random, mixture.bbox),
            frame=(-x, -y, size[1] - x, size[0] - y),
        )
        return drawn.moved(x, y)

    def cached_number(self, index: int, epoch: int) -> int:
        """Return which of an image's views in the cache an epoch takes."""
        first = int(np.random.default_rng([self.seed, index]).integers(self.cached_views))
        return (first + epoch) % self.cached_views

    def _encoded(self, part: list[int], epoch: int) -> Tensor:
        assert self.cache is not None
        return torch.stack(
            [
                cached_entry(self.cache, self.records[index], self.cached_number(index, epoch))
                for index in part
            ]
        )

    @staticmethod
    def _inputs(images: list[np.ndarray], side: int) -> Tensor:
        return torch.stack([image_to_input(image, side) for image in images])


def cached_entry(cache: EmbeddingCache, record: ImageRecord, view: int = 0) -> Tensor:
    """Return an image's entry of a cache, float32.

    Args:
        view: number of the view, see `samray.geometry.views.cached_view`.

    Raises:
        DatasetError: it is damaged or no longer there.
    """
    entry = cache.load(record.digest, view)
    if entry is None:
        raise DatasetError(
            f"{cache.path(record.digest, view)}: the embedding of {record.name} is missing; it was "
            "damaged, or another process deletes from the cache while it is in use; run the same "
            "command again, `samray train` with --resume, which encodes the image again"
        )
    return torch.from_numpy(np.array(entry, dtype=np.float32))


def mask_to_target(
    mask: CroppedMask, original_size: tuple[int, int], img_size: int, low_res_size: int
) -> np.ndarray:
    """Return the fraction of each low-resolution cell that the mask covers.

    Fractions keep objects that are thinner than a cell, which a binary target could lose. Work
    grows with the mask's crop and not with the image.

    Args:
        original_size: (H, W) of the mask's frame.

    Returns:
        low_res_size x low_res_size float32 in 0..1; 0 in the padding.
    """
    (x, y), (height, width) = mask.origin, mask.pixels.shape
    cell_height, cell_width = _cell_sides(original_size, img_size, low_res_size)
    rows = _shares(np.arange(y, y + height + 1) / cell_height, low_res_size)
    columns = _shares(np.arange(x, x + width + 1) / cell_width, low_res_size)
    target: np.ndarray = rows @ mask.pixels.astype(np.float32) @ columns.T
    return target


def valid_region(original_size: tuple[int, int], img_size: int, low_res_size: int) -> np.ndarray:
    """Return the fraction of each low-resolution cell that is image and not padding.

    Returns:
        low_res_size x low_res_size float32 in 0..1.
    """
    cell_height, cell_width = _cell_sides(original_size, img_size, low_res_size)
    rows = _shares(np.array([0, original_size[0] / cell_height]), low_res_size)
    columns = _shares(np.array([0, original_size[1] / cell_width]), low_res_size)
    valid: np.ndarray = rows @ columns.T
    return valid


def _cell_sides(
    original_size: tuple[int, int], img_size: int, low_res_size: int
) -> tuple[float, float]:
    """Height and width of a low-resolution cell in pixels of the original image."""
    resized = input_size_of(original_size, img_size)
    height, width = (
        img_size / low_res_size * side / shown
        for side, shown in zip(original_size, resized, strict=True)
    )
    return height, width


def _shares(edges: np.ndarray, num_cells: int) -> np.ndarray:
    """Which share of each cell's side lies between each edge and the next, in units of cells.

    Returns:
        num_cells x (number of edges - 1) float32.
    """
    covered = np.clip(edges[None] - np.arange(num_cells)[:, None], 0, 1)
    return np.diff(covered, axis=1).astype(np.float32)
