"""Fine-tuning on a prepared dataset: its batches and scores. Plain torch, no Ray."""

import copy
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from samray.config import Config
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.evaluation.scoring import MATRIX, evaluation_prompt, score_image
from samray.geometry.drawing import draw_masks, shrink
from samray.geometry.images import decode_image
from samray.geometry.views import AS_IT_IS
from samray.instances.choice import Example, choose_way, mean_accuracy, some_images
from samray.instances.decoder import InstanceDecoder
from samray.instances.losses import instance_loss
from samray.instances.saved import InstanceModel, is_finished, load_instances, write_finished
from samray.instances.segment import Way, maps_of
from samray.runs import RunFolder
from samray.sam.adapt import suffix
from samray.sam.checkpoint import load_checkpoint
from samray.sam.decode import predict_masks
from samray.sam.embeddings import EmbeddingCache, encode_image
from samray.sam.model import low_res_size
from samray.training.batches import BatchLoader, cached_entry, epoch_steps, share_work
from samray.training.loop import Worker
from samray.training.optimizer import INSTANCE_LEARNING_RATE, adamw
from samray.training.step import Batch, PromptedSam

NUM_PICTURES, MAX_DRAWN = 2, 12  # val images drawn every epoch, and objects of each
PICTURE_SIDE = 320  # pixels
# Of the instance decoder alone, after the training: epochs for each of the training's.
FINISH_SHARE, FINISH_BATCH = 0.5, 2
FINISH_STEPS = 1000  # at most, on large datasets: one worker does them, and the others have ended
KEPT_BYTES = 2**30  # of embeddings kept meanwhile: 256 images of a ViT, 4,096 of `tiny`


class FineTuning:
    """Trains on the train split and validates on the val split; a `samray.training.loop.Source`.

    Args:
        cache: embeddings, or activations of the encoder's frozen blocks, of all train and val
            images; None if the whole encoder learns.
        module: the model in training, and the instance decoder that learns beside it, if any.
    """

    def __init__(
        self,
        config: Config,
        dataset: PreparedDataset,
        cache: EmbeddingCache | None,
        module: PromptedSam,
    ) -> None:
        self.dataset, self.cache = dataset, cache
        self.sam, self.instances = module.sam, module.instances
        sam: Any = module.sam
        self.digest = dataset.digest
        self.batch_size, self.seed = config.train.batch_size, config.train.seed
        self.max_objects = config.train.max_objects
        self.loader = train_loader(config, dataset, cache, sam)
        self.val = dataset.split("val")
        counts = [record.num_instances for record in self.val]
        self.val_work = [min(count, self.max_objects or count) for count in counts]

    def steps(self, epoch: int) -> list[list[int]]:
        """Return the images of each step."""
        return epoch_steps(len(self.loader.records), self.batch_size, self.seed, epoch)

    def load(
        self, step: list[int], rank: int, world_size: int, epoch: int
    ) -> tuple[list[Batch], int]:
        """Return a worker's part of a step, and the number of prompts of the whole step."""
        num_prompts = self.loader.num_prompts(step)
        return self.loader.load(step, rank, world_size, epoch), num_prompts

    def names(self, step: list[int]) -> list[str]:
        """Return the names of a step's images."""
        return [self.loader.records[index].name for index in step]

    def validate(self, worker: Worker) -> dict[str, float]:
        """Score the val split; the workers share its images.

        Returns:
            `val_iou` and `val_dice`, the means over the prompt matrix, and the IoU of each of its
            rows as `val_iou_center`, `val_iou_random`, `val_iou_bbox` and `val_iou_clicks`. With an
            instance decoder `val_msa`, the mean segmentation accuracy of its watershed.
        """
        sums = torch.zeros(len(MATRIX) + 1, 3, dtype=torch.float64)  # IoU, Dice, count
        for place in share_work(self.val_work, worker.world_size)[worker.rank]:
            record = self.val[place]
            embedding = self._embedding(record)
            for score in score_image(self.sam, embedding, record, 0, self.max_objects):
                row = MATRIX.index(score.strategy)
                sums[row] += torch.tensor([score.iou, score.dice, 1.0], dtype=torch.float64)
            if self.instances is not None:
                example = _example(self.dataset, self.instances, embedding, record)
                accuracy = mean_accuracy(self.sam, [example], Way())
                sums[-1] += torch.tensor([accuracy, 0.0, 1.0], dtype=torch.float64)
        sums = worker.sum(sums.to(worker.device)).cpu()
        means = sums[:-1, :2] / sums[:-1, 2:]
        scores = {
            "val_iou": float(means[:, 0].mean()),
            "val_dice": float(means[:, 1].mean()),
            **{f"val_iou_{name}": float(means[i, 0]) for i, name in enumerate(MATRIX)},
        }
        if self.instances is not None:
            scores["val_msa"] = float(sums[-1, 0] / sums[-1, 2])
        return scores

    @torch.inference_mode()
    def pictures(self) -> dict[str, np.ndarray]:
        """Draw the first val images: their objects, and the masks of a click in each one's centre.

        Returns:
            Name -> H x W x 3 uint8, truth on the left, answers on the right.
        """
        drawn = {}
        for number, record in enumerate(self.val[:NUM_PICTURES]):
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

    def _embedding(self, record: ImageRecord) -> Tensor:
        """Embed an image with the model as it is now, C x h x w."""
        return _embedding(self.dataset, self.cache, self.sam, record)


def train_loader(
    config: Config, dataset: PreparedDataset, cache: EmbeddingCache | None, sam: Any
) -> BatchLoader:
    """Return what makes batches of the train split."""
    return BatchLoader(
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
        instance_labels(config, dataset),
        config.train.cached_views,
    )


def cache_entries(config: Config, dataset: PreparedDataset) -> Iterator[tuple[ImageRecord, int]]:
    """Yield what training reads of the cache: images, and the numbers of their views."""
    for record in dataset.split("train"):
        yield from ((record, number) for number in range(config.train.cached_views))
    yield from ((record, 0) for record in dataset.split("val"))


def instance_labels(config: Config, dataset: PreparedDataset) -> tuple[str, ...] | None:
    """Return the labels that the instance decoder learns, sorted; None if none is trained."""
    if not config.train.instances:
        return None
    return dataset.split("train").labels


def finish_instances(
    config: Config,
    run: RunFolder,
    dataset: PreparedDataset,
    cache: EmbeddingCache | None,
    device: torch.device,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Finish the best checkpoint's instance decoder, and find how its maps become objects.

    Until now the image encoder changed under it and the images were flipped and recoloured. Now it
    learns from the embeddings and images that it will see, for half as many epochs; it is kept as
    it was where that does not help on the val split. What is finished once stays as it is.
    `announce` is called before it learns, which takes minutes; not where there is nothing to do.
    """
    checkpoint = load_checkpoint(run.path)
    sam = checkpoint.model().to(device)
    model = load_instances(checkpoint, sam)
    if model is None or is_finished(checkpoint.path, model):  # None: the base is the best
        return
    announce()
    val = dataset.split("val")
    records = [val[place] for place in some_images([record.num_instances for record in val])]
    embed = _computed_once(lambda record: _embedding(dataset, cache, sam, record))

    def examples(decoder: InstanceDecoder) -> list[Example]:
        return [_example(dataset, decoder, embed(record), record) for record in records]

    before = model.decoder.to(device)
    after = copy.deepcopy(before)
    _train_decoder(after, config, dataset, train_loader(config, dataset, cache, sam), embed)
    found = {decoder: examples(decoder) for decoder in (before, after)}
    better = max(found, key=lambda decoder: mean_accuracy(sam, found[decoder], Way()))
    way, accuracies = choose_way(sam, found[better])
    write_finished(checkpoint.path, InstanceModel(better, model.labels, way), accuracies)


def _computed_once(embed: Callable[[ImageRecord], Tensor]) -> Callable[[ImageRecord], Tensor]:
    """Return a function that keeps what `embed` gives for an image, while KEPT_BYTES have room."""
    kept: dict[str, Tensor] = {}
    room = KEPT_BYTES

    def remembered(record: ImageRecord) -> Tensor:
        nonlocal room
        if record.name in kept:
            return kept[record.name]
        found = embed(record)
        if found.nbytes <= room:
            room -= found.nbytes
            kept[record.name] = found
        return found

    return remembered


def _train_decoder(
    decoder: InstanceDecoder,
    config: Config,
    dataset: PreparedDataset,
    loader: BatchLoader,
    embed: Callable[[ImageRecord], Tensor],
) -> None:
    """Train an instance decoder alone, in place, on the images as they are."""
    count, seed = len(loader.records), config.train.seed
    begin = config.train.num_epochs
    steps = [
        step
        for epoch in range(begin, begin + math.ceil(FINISH_SHARE * begin))
        for step in epoch_steps(count, FINISH_BATCH, seed, epoch)
    ][:FINISH_STEPS]
    device = next(decoder.parameters()).device
    weight_decay = config.train.weight_decay
    optimizer = adamw(decoder.parameters(), INSTANCE_LEARNING_RATE, weight_decay, device)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    decoder.train()
    for step in tqdm(steps, "finish instances", unit="step", file=sys.stderr, disable=None):
        records = [loader.records[index] for index in step]
        images = [decode_image(dataset.image_bytes(record)) for record in records]
        scene = loader.scene(records, [AS_IT_IS] * len(step), images, 1.0)
        found = torch.stack([embed(record) for record in records])
        maps = decoder(found, scene.pixels.to(found.device))
        loss = instance_loss(maps, scene.maps.to(found.device)).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(decoder.parameters(), config.train.clip_grad_norm)
        if torch.isfinite(norm):
            optimizer.step()
        falling.step()
    decoder.eval()


def _example(
    dataset: PreparedDataset, decoder: InstanceDecoder, embedding: Tensor, record: ImageRecord
) -> Example:
    """An annotated image with the decoder's maps."""
    image = decode_image(dataset.image_bytes(record))
    truth = tuple(instance.rle for instance in record.instances)
    maps = maps_of(decoder, image, embedding)
    return Example(maps, embedding, truth, record.size, record.ignored)


@torch.inference_mode()
def _embedding(
    dataset: PreparedDataset, cache: EmbeddingCache | None, sam: Any, record: ImageRecord
) -> Tensor:
    """Embed an image with a model as it is now, C x h x w."""
    if cache is None:
        return encode_image(sam, decode_image(dataset.image_bytes(record)))
    encoded = cached_entry(cache, record).to(sam.device)
    return suffix(sam.image_encoder, encoded[None], cache.num_frozen)[0]
