"""Scores of a model on one image: fixed prompts, masks at the original resolution."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from samray.data.dataset import ImageRecord, PreparedDataset
from samray.evaluation.metrics import Score, boundary_iou, iou_and_dice
from samray.geometry.images import decode_image
from samray.geometry.prompts import STRATEGIES, Prompt, correction_point, draw_prompt
from samray.sam.decode import predict_masks, prompt_chunks
from samray.sam.embeddings import EmbeddingCache, encode_image

# The prompt matrix: every model is scored on these prompts, whatever it was trained with.
CLICKS, NUM_CLICKS = "clicks", 3  # one random point, then two corrections
MATRIX = (*STRATEGIES, CLICKS)


def evaluation_prompt(
    record: ImageRecord, number: int, mask: np.ndarray, strategy: str, seed: int
) -> Prompt:
    """Return the first prompt for an instance, the same for every model.

    Args:
        number: the instance's place in the image.
        mask: H x W bool.
        seed: the evaluation's, not the training's.
    """
    rng = np.random.default_rng([seed, int(record.digest[:8], 16), number])
    first = "random" if strategy == CLICKS else strategy
    return draw_prompt(first, mask, num_points=1, rng=rng)


def score_image(
    sam: Any,
    image_embedding: torch.Tensor,
    record: ImageRecord,
    seed: int,
    max_objects: int | None = None,
) -> list[Score]:
    """Return the scores of the instances of an image under every row of the prompt matrix.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        max_objects: score so many of the image's instances, the same for every model; None: all.
    """
    instances = _some(record, max_objects)
    scores: dict[str, list[Score]] = {row: [] for row in MATRIX}
    for chunk in prompt_chunks(len(instances), record.size):  # all masks may not fit the memory
        _score_some(sam, image_embedding, record, seed, [instances[n] for n in chunk], scores)
    return [score for row in MATRIX for score in scores[row]]


def _score_some(
    sam: Any,
    image_embedding: torch.Tensor,
    record: ImageRecord,
    seed: int,
    instances: Sequence[int],
    scores: dict[str, list[Score]],
) -> None:
    """Add the scores of some instances of an image under every row of the prompt matrix."""
    gt_masks = [record.decode(record.instances[number]) for number in instances]
    scale = sam.image_encoder.img_size / max(record.size)

    def add(row: str, place: int, mask: np.ndarray, predicted_iou: float) -> None:
        number = instances[place]
        instance = record.instances[number]
        area = instance.area + instance.area_outside
        iou, dice = iou_and_dice(mask, gt_masks[place], instance.area_outside)
        scores[row].append(
            Score(
                image=record.name,
                source=record.source,
                instance=number,
                label=instance.label,
                strategy=row,
                iou=iou,
                dice=dice,
                boundary_iou=boundary_iou(mask, gt_masks[place]),
                predicted_iou=predicted_iou,
                area=area,
                model_side=scale * float(np.sqrt(area)),
            )
        )

    for row in ("center", "bbox", CLICKS):
        prompts = [
            evaluation_prompt(record, number, mask, row, seed)
            for number, mask in zip(instances, gt_masks, strict=True)
        ]
        if row == CLICKS:
            clicked = click_through(sam, image_embedding, gt_masks, prompts, NUM_CLICKS)
            for place, answers in enumerate(clicked):
                add("random", place, *answers[0])  # the first click is the random point
                add(CLICKS, place, *answers[-1])
        else:
            for place, masks in predict_masks(sam, image_embedding, prompts, record.size):
                add(row, place, masks.mask(masks.best), masks.predicted_iou)


def _some(record: ImageRecord, max_objects: int | None) -> list[int]:
    """Return the places of the instances to score, in order."""
    count = record.num_instances
    if max_objects is None or count <= max_objects:
        return list(range(count))
    drawn = np.random.default_rng(int(record.digest[:8], 16)).permutation(count)
    return sorted(drawn[:max_objects].tolist())


@torch.inference_mode()
def click_through(
    sam: Any,
    image_embedding: torch.Tensor,
    gt_masks: Sequence[np.ndarray],
    first: Sequence[Prompt],
    num_clicks: int,
    enough: float = 1.0,
) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Answer the first prompts, then simulate correction clicks.

    `correction_point` chooses each click from the errors of the last mask, whose logits are fed
    back with it.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        gt_masks: H x W bool, one for each object.
        first: one point or a box for each object, all of one layout.
        num_clicks: number of answers; the first prompt counts as one.
        enough: IoU from which a mask is not clicked on again.

    Yields:
        For each object num_clicks pairs (H x W bool, predicted IoU); a mask that is good enough,
        or without an error, is repeated.
    """
    original_size = gt_masks[0].shape if len(first) else (1, 1)
    for chunk in prompt_chunks(len(first), original_size):
        prompts = [first[number] for number in chunk]
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        answers: list[list[tuple[np.ndarray, float]]] = [[] for _ in chunk]
        wrong = list(range(len(prompts)))
        for click in range(num_clicks):
            asked = wrong
            wrong = []
            for place, masks in predict_masks(
                sam,
                image_embedding,
                [prompts[row] for row in asked],
                original_size,
                [logits[row] for row in asked],
            ):
                row, mask = asked[place], masks.mask(masks.best)
                answers[row].append((mask, masks.predicted_iou))
                logits[row] = masks.low_res_masks[masks.best][None]
                if click + 1 == num_clicks:
                    continue
                gt_mask = gt_masks[chunk[row]]
                if enough < 1 and iou_and_dice(mask, gt_mask)[0] >= enough:
                    continue
                correction = correction_point(mask, gt_mask)
                if correction is not None:
                    prompts[row] = prompts[row].with_point(*correction)
                    wrong.append(row)
        for given in answers:
            yield given + given[-1:] * (num_clicks - len(given))


def embedding_of(
    sam: Any,
    dataset: PreparedDataset,
    cache: EmbeddingCache | None,
    record: ImageRecord,
    full_precision: bool = False,
) -> torch.Tensor:
    """Return an image's embedding, C x h x w float32 on the model's device.

    With a cache it is read, or encoded and written to it if it has room and may be written;
    without, encoded.

    Args:
        full_precision: see `samray.sam.embeddings.encode_images`.
    """
    if cache is not None:
        cached = cache.load(record.digest)
        if cached is not None:
            return torch.from_numpy(cached.astype("float32")).to(sam.device)
    embedding = encode_image(sam, decode_image(dataset.image_bytes(record)), full_precision)
    if cache is not None and cache.has_room():
        with contextlib.suppress(OSError):  # the cache may be someone else's
            cache.save(record.digest, embedding.cpu().numpy())
    return embedding.half().float()  # equal to what is read from a cache
