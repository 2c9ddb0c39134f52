"""Score a model on one image as a user would see it: fixed prompts, original resolution."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from samray.batches import group_prompts
from samray.dataset import ImageRecord
from samray.metrics import Score, iou_and_dice
from samray.model import best_masks, decode_prompts
from samray.prompts import STRATEGIES, Prompt, correction_point, draw_prompt
from samray.transforms import masks_to_original

# What is decoded, and upscaled, at once; bounds memory on large images with many instances.
MAX_PROMPTS = 64
MAX_PIXELS = 16_000_000


def evaluation_prompt(
    record: ImageRecord, number: int, mask: np.ndarray, strategy: str, seed: int
) -> Prompt:
    """Return the one point or box by which an instance is scored, the same for every model.

    Args:
        number: the instance's place in the image.
        mask: H x W bool.
        seed: the evaluation's, not the training's.
    """
    rng = np.random.default_rng([seed, int(record.digest[:8], 16), number])
    return draw_prompt(strategy, mask, num_points=1, rng=rng)


def score_image(
    sam: Any,
    image_embedding: torch.Tensor,
    record: ImageRecord,
    seed: int,
    strategies: tuple[str, ...] = STRATEGIES,
) -> list[Score]:
    """Return the score of every instance of an image under every strategy.

    Args:
        image_embedding: C x h x w float32, on the model's device.
    """
    gt_masks = [record.decode(instance) for instance in record.instances]
    scores = []
    for strategy in strategies:
        prompts = [
            evaluation_prompt(record, number, mask, strategy, seed)
            for number, mask in enumerate(gt_masks)
        ]
        predictions = predict_masks(sam, image_embedding, prompts, record.size)
        for number, (mask, predicted_iou) in enumerate(predictions):
            instance = record.instances[number]
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
                    predicted_iou=predicted_iou,
                )
            )
    return scores


@torch.inference_mode()
def click_through(
    sam: Any, image_embedding: torch.Tensor, gt_mask: np.ndarray, first: Prompt, num_clicks: int
) -> list[tuple[np.ndarray, float]]:
    """Answer a first prompt, then click on each answer's error, as a person would.

    Each answer's logits are fed back with the next click, which `correction_point` chooses.

    Args:
        gt_mask: H x W bool.
        first: one point or a box.
        num_clicks: prompts in all; the first counts as one.

    Returns:
        num_clicks times (H x W bool, predicted IoU); a right answer is repeated.
    """
    img_size = sam.image_encoder.img_size
    prompt, logits = first, None
    answers: list[tuple[np.ndarray, float]] = []
    for _ in range(num_clicks):
        ((group, _),) = group_prompts([prompt], [0], [gt_mask.shape], img_size)
        group = group.to(image_embedding.device)
        if logits is not None:
            group = group.with_answer(logits)
        low_res, predicted = decode_prompts(sam, image_embedding[None], group, group.ambiguous)
        logits = best_masks(low_res, predicted)
        mask = (masks_to_original(logits, gt_mask.shape, img_size)[0, 0] > 0).cpu().numpy()
        answers.append((mask, float(predicted.amax())))
        click = correction_point(mask, gt_mask)
        if click is None:
            break
        prompt = prompt.with_point(*click)
    return answers + answers[-1:] * (num_clicks - len(answers))


@torch.inference_mode()
def predict_masks(
    sam: Any, image_embedding: torch.Tensor, prompts: list[Prompt], original_size: tuple[int, int]
) -> Iterator[tuple[np.ndarray, float]]:
    """Yield one mask for each prompt, and its predicted IoU.

    With one point the model gives three masks, and the one of highest predicted IoU counts.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        prompts: of one layout, in original pixels.

    Yields:
        H x W bool and 0..1, in the order of the prompts.
    """
    img_size = sam.image_encoder.img_size
    ((group, _),) = group_prompts(prompts, [0] * len(prompts), [original_size], img_size)
    size = max(1, min(MAX_PROMPTS, MAX_PIXELS // (original_size[0] * original_size[1])))
    for chunk in group.to(image_embedding.device).chunks(size):
        low_res, predicted = decode_prompts(sam, image_embedding[None], chunk, chunk.ambiguous)
        answers = masks_to_original(best_masks(low_res, predicted), original_size, img_size)
        masks = (answers[:, 0] > 0).cpu().numpy()
        yield from zip(masks, predicted.amax(dim=1).tolist(), strict=True)
