"""The data order, and the batches of a prepared dataset; plain torch, no Ray.

The order of an epoch depends on (seed, epoch) only. Every worker computes the same order, so no
image is dropped or repeated, and the number of workers does not change the result.
"""

import cv2
import numpy as np
import torch
from torch import Tensor

from samray.config import PromptConfig
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.errors import DatasetError
from samray.geometry.frames import image_to_input, input_size_of
from samray.geometry.images import decode_image
from samray.geometry.prompts import Prompt, draw_prompt
from samray.sam.decode import group_prompts
from samray.sam.embeddings import EmbeddingCache
from samray.training.step import Batch, draw_correction_plan


def epoch_steps(num_images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the images of each step of an epoch: every index once, the last step may be short."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def share_of(step: list[int], rank: int, world_size: int) -> list[int]:
    """Return one worker's images of a step; may be empty."""
    return step[rank::world_size]


class BatchLoader:
    """Makes batches of a prepared dataset.

    Args:
        cache: embeddings to read, or None for batches of images.
        img_size, low_res_size: sides of the model's input and of its masks.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        records: list[ImageRecord],
        prompts: PromptConfig,
        seed: int,
        cache: EmbeddingCache | None,
        img_size: int,
        low_res_size: int,
    ) -> None:
        self.dataset, self.records = dataset, records
        self.prompts, self.seed, self.cache = prompts, seed, cache
        self.img_size, self.low_res_size = img_size, low_res_size

    def load(self, step: list[int], rank: int, world_size: int, epoch: int) -> Batch | None:
        """Return a worker's part of a step with newly drawn prompts; None if it has no image.

        An instance's prompt depends on (seed, epoch, image, instance) and not on the worker.
        """
        mine = share_of(step, rank, world_size)
        if not mine:
            return None
        settings = self.prompts
        plan: tuple[bool, ...] = ()
        if settings.point_selection == "interactive":
            rng = np.random.default_rng([self.seed, epoch, step[0], 1])  # the same for all workers
            plan = draw_correction_plan(settings.num_clicks, rng)
        prompts: list[Prompt] = []
        draws: list[np.ndarray] = []
        image_index: list[int] = []
        targets: list[np.ndarray] = []
        for place, index in enumerate(mine):
            record = self.records[index]
            rng = np.random.default_rng([self.seed, epoch, index])
            for instance in record.instances:
                mask = record.decode(instance)
                prompt = draw_prompt(
                    settings.point_selection,
                    mask,
                    settings.num_points,
                    rng,
                    settings.box_noise,
                    (settings.mixture.center, settings.mixture.random, settings.mixture.bbox),
                )
                prompts.append(prompt)
                draws.append(rng.random(len(plan), dtype=np.float32))
                image_index.append(place)
                targets.append(mask_to_target(mask, self.img_size, self.low_res_size))
        records = [self.records[index] for index in mine]
        sizes = [record.size for record in records]
        grouped = group_prompts(prompts, image_index, sizes, self.img_size)
        valid = [valid_region(size, self.img_size, self.low_res_size) for size in sizes]
        return Batch(
            images=None if self.cache else torch.stack([self._image(r) for r in records]),
            image_embeddings=(
                torch.stack([self._embedding(r) for r in records]) if self.cache else None
            ),
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
        )

    def _image(self, record: ImageRecord) -> Tensor:
        image = decode_image(self.dataset.image_bytes(record))
        return image_to_input(image, self.img_size)

    def _embedding(self, record: ImageRecord) -> Tensor:
        assert self.cache is not None
        embedding = self.cache.load(record.digest)
        if embedding is None:
            raise DatasetError(
                f"{self.cache.path(record.digest)}: the embedding of {record.name} is missing; "
                "another process deletes from the cache while it is in use"
            )
        return torch.from_numpy(np.array(embedding, dtype=np.float32))


def mask_to_target(mask: np.ndarray, img_size: int, low_res_size: int) -> np.ndarray:
    """Return the fraction of each low-resolution cell that the mask covers.

    Fractions keep objects that are thinner than a cell, which a binary target could lose.

    Args:
        mask: H x W bool.

    Returns:
        low_res_size x low_res_size float32 in 0..1; 0 in the padding.
    """
    height, width = input_size_of((mask.shape[0], mask.shape[1]), img_size)
    resized = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return _pool(resized, img_size, low_res_size)


def valid_region(original_size: tuple[int, int], img_size: int, low_res_size: int) -> np.ndarray:
    """Return the fraction of each low-resolution cell that is image and not padding.

    Returns:
        low_res_size x low_res_size float32 in 0..1.
    """
    return _pool(
        np.ones(input_size_of(original_size, img_size), np.float32), img_size, low_res_size
    )


def _pool(content: np.ndarray, img_size: int, low_res_size: int) -> np.ndarray:
    """Pad at the bottom and right to the model's frame, then average each cell."""
    frame = np.zeros((img_size, img_size), np.float32)
    frame[: content.shape[0], : content.shape[1]] = content
    cell = img_size // low_res_size
    pooled: np.ndarray = frame.reshape(low_res_size, cell, low_res_size, cell).mean(axis=(1, 3))
    return pooled
