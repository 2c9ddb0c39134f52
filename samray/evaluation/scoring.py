"""Scores of a model on one image: fixed prompts, masks at the original resolution."""

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
    strategies: tuple[str, ...] = MATRIX,
) -> list[Score]:
    """Return the score of every instance of an image under every strategy.

    Args:
        image_embedding: C x h x w float32, on the model's device.
    """
    gt_masks = [record.decode(instance) for instance in record.instances]
    scale = sam.image_encoder.img_size / max(record.size)
    scores = []
    for strategy in strategies:
        prompts = [
            evaluation_prompt(record, number, mask, strategy, seed)
            for number, mask in enumerate(gt_masks)
        ]
        if strategy == CLICKS:
            clicked = click_through(sam, image_embedding, gt_masks, prompts, NUM_CLICKS)
            answers = ((number, *given[-1]) for number, given in enumerate(clicked))
        else:
            found = predict_masks(sam, image_embedding, prompts, record.size)
            answers = ((place, m.mask(m.best), m.predicted_iou) for place, m in found)
        for number, mask, predicted_iou in answers:
            instance = record.instances[number]
            area = instance.area + instance.area_outside
            iou, dice = iou_and_dice(mask, gt_masks[number], instance.area_outside)
            scores.append(
                Score(
                    image=record.name,
                    source=record.source,
                    instance=number,
                    label=instance.label,
                    strategy=strategy,
                    iou=iou,
                    dice=dice,
                    boundary_iou=boundary_iou(mask, gt_masks[number]),
                    predicted_iou=predicted_iou,
                    area=area,
                    model_side=scale * float(np.sqrt(area)),
                )
            )
    return scores


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
    sam: Any, dataset: PreparedDataset, cache: EmbeddingCache | None, record: ImageRecord
) -> torch.Tensor:
    """Return an image's embedding, C x h x w float32 on the model's device.

    With a cache it is read, or encoded and written to it if the disk has room; without, encoded.
    """
    if cache is not None:
        cached = cache.load(record.digest)
        if cached is not None:
            return torch.from_numpy(cached.astype("float32")).to(sam.device)
    embedding = encode_image(sam, decode_image(dataset.image_bytes(record)))
    if cache is not None and cache.has_room():
        cache.save(record.digest, embedding.cpu().numpy())
    return embedding.half().float()  # equal to what is read from a cache
