"""The data order and what one training step sees; plain torch, no Ray.

The order of an epoch follows from (seed, epoch) alone. Every worker knows the whole plan, so
nothing is dropped, repeated or negotiated, and the number of workers changes no result.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samray.config import PromptConfig
from samray.dataset import ImageRecord, PreparedDataset
from samray.embeddings import EmbeddingCache
from samray.errors import DatasetError
from samray.images import decode_image
from samray.model import PromptGroup
from samray.prompts import Prompt, draw_prompt
from samray.transforms import (
    box_to_input,
    image_to_input,
    mask_to_target,
    points_to_input,
    valid_region,
)


def epoch_steps(num_images: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the images of each step of an epoch: every index once, the last step may be short."""
    order = np.random.default_rng([seed, epoch]).permutation(num_images).tolist()
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def share_of(step: list[int], rank: int, world_size: int) -> list[int]:
    """Return one worker's images of a step; may be none."""
    return step[rank::world_size]


@dataclass
class Batch:
    """One worker's part of a step.

    Attributes:
        images: B x 3 x S x S float32, normalised; None with a frozen encoder.
        image_embeddings: B x C x h x w float32; None while the encoder learns.
        groups: prompts by layout.
        targets: per group, P x 1 x h x w float32, covered share of each low-resolution cell.
        valid: B x 1 x h x w float32, share of each cell that is image.
    """

    images: Tensor | None
    image_embeddings: Tensor | None
    groups: list[PromptGroup]
    targets: list[Tensor]
    valid: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return Batch(
            move(self.images),
            move(self.image_embeddings),
            [group.to(device) for group in self.groups],
            [target.to(device, non_blocking=True) for target in self.targets],
            self.valid.to(device, non_blocking=True),
        )


class BatchLoader:
    """Makes batches of a prepared dataset.

    Args:
        cache: embeddings to read, or None to give images.
        img_size, low_res_size: sides of the model's input and masks.
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
        """Return a worker's part of a step, prompts drawn afresh; None if it has no image.

        An instance's prompt follows from (seed, epoch, image, instance), whoever draws it.
        """
        mine = share_of(step, rank, world_size)
        if not mine:
            return None
        prompts: list[Prompt] = []
        image_index: list[int] = []
        targets: list[np.ndarray] = []
        for place, index in enumerate(mine):
            record = self.records[index]
            rng = np.random.default_rng([self.seed, epoch, index])
            for instance in record.instances:
                mask = record.decode(instance)
                prompt = draw_prompt(
                    self.prompts.point_selection,
                    mask,
                    self.prompts.num_points,
                    rng,
                    self.prompts.box_noise,
                )
                prompts.append(prompt)
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
        )

    def _image(self, record: ImageRecord) -> Tensor:
        image = decode_image(self.dataset.image_bytes(record))
        return image_to_input(image, self.img_size)

    def _embedding(self, record: ImageRecord) -> Tensor:
        assert self.cache is not None
        embedding = self.cache.load(record.digest)
        if embedding is None:
            raise DatasetError(
                f"{self.cache.path(record.digest)}: the embedding of {record.name} has gone; "
                "something deletes from the cache while it is used"
            )
        return torch.from_numpy(np.array(embedding, dtype=np.float32))


def group_prompts(
    prompts: list[Prompt],
    image_index: list[int],
    sizes: list[tuple[int, int]],
    img_size: int,
) -> list[tuple[PromptGroup, list[int]]]:
    """Sort prompts by layout and move them to the model's frame.

    Prompts of different kinds are never filled up to one another: the filling moves the logits.

    Args:
        prompts: in original pixels.
        image_index: which image of the batch each belongs to.
        sizes: (H, W) of each image of the batch.

    Returns:
        (group, places of its prompts in `prompts`), one a layout.
    """
    by_layout: dict[tuple[int, bool], list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_layout.setdefault(prompt.layout, []).append(place)
    groups = []
    for _, places in sorted(by_layout.items()):
        coords, labels, boxes = [], [], []
        for place in places:
            prompt, size = prompts[place], sizes[image_index[place]]
            if prompt.point_coords is not None and prompt.point_labels is not None:
                coords.append(points_to_input(prompt.point_coords, size, img_size))
                labels.append(prompt.point_labels)
            if prompt.box is not None:
                boxes.append(box_to_input(prompt.box, size, img_size))
        group = PromptGroup(
            torch.tensor([image_index[place] for place in places]),
            torch.from_numpy(np.stack(coords)) if coords else None,
            torch.from_numpy(np.stack(labels)) if labels else None,
            torch.from_numpy(np.stack(boxes)) if boxes else None,
        )
        groups.append((group, places))
    return groups
