"""Fine-tuning on a prepared dataset: its batches and scores. Plain torch, no Ray."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from samray.config import Config
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.evaluation.scoring import MATRIX, evaluation_prompt, score_image
from samray.geometry.drawing import draw_masks, shrink
from samray.geometry.images import decode_image
from samray.sam.adapt import suffix
from samray.sam.decode import predict_masks
from samray.sam.embeddings import EmbeddingCache, encode_image
from samray.sam.model import low_res_size
from samray.training.batches import BatchLoader, epoch_steps
from samray.training.loop import Worker
from samray.training.step import Batch

NUM_PICTURES, MAX_DRAWN = 2, 12  # val images drawn every epoch, and objects of each
PICTURE_SIDE = 320  # pixels


class FineTuning:
    """Trains on the train split and validates on the val split; a `samray.training.loop.Source`.

    Args:
        cache: embeddings, or activations of the encoder's frozen blocks, of all train and val
            images; None if the whole encoder learns.
        sam: the model in training.
    """

    def __init__(
        self, config: Config, dataset: PreparedDataset, cache: EmbeddingCache | None, sam: Any
    ) -> None:
        self.dataset, self.cache, self.sam = dataset, cache, sam
        self.digest = dataset.digest
        self.batch_size, self.seed = config.train.batch_size, config.train.seed
        self.loader = BatchLoader(
            dataset,
            dataset.split("train"),
            config.prompts,
            config.train.seed,
            cache,
            sam.image_encoder.img_size,
            low_res_size(sam),
            config.train.augment,
            config.train.max_objects,
            config.train.images_at_once,
        )

    def steps(self, epoch: int) -> list[list[int]]:
        """Return the images of each step."""
        return epoch_steps(len(self.loader.records), self.batch_size, self.seed, epoch)

    def load(
        self, step: list[int], rank: int, world_size: int, epoch: int
    ) -> tuple[list[Batch], int]:
        """Return a worker's part of a step, and the number of prompts of the whole step."""
        num_prompts = self.loader.num_prompts(step, epoch)
        return self.loader.load(step, rank, world_size, epoch), num_prompts

    def names(self, step: list[int]) -> list[str]:
        """Return the names of a step's images."""
        return [self.loader.records[index].name for index in step]

    def validate(self, worker: Worker) -> dict[str, float]:
        """Score the val split; the workers share its images.

        Returns:
            `val_iou` and `val_dice`, the means over the prompt matrix, and the IoU of each of its
            rows as `val_iou_center`, `val_iou_random`, `val_iou_bbox` and `val_iou_clicks`.
        """
        sums = torch.zeros(len(MATRIX), 3, dtype=torch.float64)  # IoU, Dice, count
        for record in self.dataset.split("val")[worker.rank :: worker.world_size]:
            embedding = self._embedding(record)
            for score in score_image(self.sam, embedding, record, seed=0):
                row = MATRIX.index(score.strategy)
                sums[row] += torch.tensor([score.iou, score.dice, 1.0], dtype=torch.float64)
        sums = worker.sum(sums.to(worker.device)).cpu()
        means = sums[:, :2] / sums[:, 2:]
        return {
            "val_iou": float(means[:, 0].mean()),
            "val_dice": float(means[:, 1].mean()),
            **{f"val_iou_{name}": float(means[i, 0]) for i, name in enumerate(MATRIX)},
        }

    @torch.inference_mode()
    def pictures(self) -> dict[str, np.ndarray]:
        """Draw the first val images: their objects, and the masks of a click in each one's centre.

        Returns:
            Name -> H x W x 3 uint8, truth on the left, answers on the right.
        """
        drawn = {}
        for number, record in enumerate(self.dataset.split("val")[:NUM_PICTURES]):
            image = decode_image(self.dataset.image_bytes(record))
            gt_masks = [record.decode(instance) for instance in record.instances[:MAX_DRAWN]]
            prompts = [
                evaluation_prompt(record, place, mask, "center", 0)
                for place, mask in enumerate(gt_masks)
            ]
            found = dict(predict_masks(self.sam, self._embedding(record), prompts, record.size))
            masks = [found[place].mask(found[place].best) for place in sorted(found)]
            halves = [shrink(draw_masks(image, some), PICTURE_SIDE) for some in (gt_masks, masks)]
            drawn[f"val/{number}: truth, answer"] = np.concatenate(halves, axis=1)
        return drawn

    @torch.inference_mode()
    def _embedding(self, record: ImageRecord) -> Tensor:
        """Embed an image with the model as it is now, C x h x w."""
        if self.cache is None:
            return encode_image(self.sam, decode_image(self.dataset.image_bytes(record)))
        encoded = self.loader.encoded(record)[None].to(self.sam.device)
        return suffix(self.sam.image_encoder, encoded, self.cache.num_frozen)[0]
