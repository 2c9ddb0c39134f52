"""Score a model on one image as a user would see it: fixed prompts, original resolution."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from samray.data.dataset import ImageRecord, PreparedDataset
from samray.evaluation.metrics import Score, iou_and_dice
from samray.geometry.frames import masks_to_original
from samray.geometry.images import decode_image
from samray.geometry.prompts import STRATEGIES, Prompt, correction_point, draw_prompt
from samray.sam.decode import best_masks, decode_prompts, group_prompts
from samray.sam.embeddings import EmbeddingCache, encode_image

# The prompt matrix: what every model is scored on, whatever it was trained with.
CLICKS, NUM_CLICKS = "clicks", 3  # one random point, then two corrections
MATRIX = (*STRATEGIES, CLICKS)

# What is decoded, and upscaled, at once; bounds memory on large images with many instances.
MAX_PROMPTS = 64
MAX_PIXELS = 16_000_000


def evaluation_prompt(
    record: ImageRecord, number: int, mask: np.ndarray, strategy: str, seed: int
) -> Prompt:
    """Return the point or box by which an instance is scored first, the same for every model.

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
    scores = []
    for strategy in strategies:
        prompts = [
            evaluation_prompt(record, number, mask, strategy, seed)
            for number, mask in enumerate(gt_masks)
        ]
        if strategy == CLICKS:
            clicked = click_through(sam, image_embedding, gt_masks, prompts, NUM_CLICKS)
            predictions = iter([answers[-1] for answers in clicked])
        else:
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
    sam: Any,
    image_embedding: torch.Tensor,
    gt_masks: Sequence[np.ndarray],
    first: Sequence[Prompt],
    num_clicks: int,
) -> Iterator[list[tuple[np.ndarray, float]]]:
    """Answer first prompts, then click on each answer's error, as a person would.

    Each answer's logits are fed back with the next click, which `correction_point` chooses.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        gt_masks: H x W bool, an object each.
        first: one point or a box for each object, all of one layout.
        num_clicks: prompts in all; the first counts as one.

    Yields:
        For each object num_clicks times (H x W bool, predicted IoU); a right answer is repeated.
    """
    img_size = sam.image_encoder.img_size
    for chunk in _chunks(len(first), gt_masks[0].shape if first else (1, 1)):
        prompts = [first[number] for number in chunk]
        answers: list[list[tuple[np.ndarray, float]]] = [[] for _ in chunk]
        wrong, logits = list(range(len(prompts))), None
        for click in range(num_clicks):
            sizes = [gt_masks[0].shape]
            ((group, _),) = group_prompts(
                [prompts[row] for row in wrong], [0] * len(wrong), sizes, img_size
            )
            group = group.to(image_embedding.device)
            if logits is not None:
                group = group.with_answer(logits)
            low_res, predicted = decode_prompts(sam, image_embedding[None], group, group.ambiguous)
            logits = best_masks(low_res, predicted)
            masks = (masks_to_original(logits, sizes[0], img_size)[:, 0] > 0).cpu().numpy()
            still_wrong = []
            for place, row in enumerate(wrong):
                answers[row].append((masks[place], float(predicted[place].amax())))
                if click + 1 == num_clicks:
                    continue
                correction = correction_point(masks[place], gt_masks[chunk[row]])
                if correction is not None:
                    prompts[row] = prompts[row].with_point(*correction)
                    still_wrong.append(place)
            wrong, logits = [wrong[place] for place in still_wrong], logits[still_wrong]
            if not wrong:
                break
        for given in answers:
            yield given + given[-1:] * (num_clicks - len(given))


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
    for chunk in _chunks(len(prompts), original_size):
        ((group, _),) = group_prompts(
            [prompts[number] for number in chunk], [0] * len(chunk), [original_size], img_size
        )
        group = group.to(image_embedding.device)
        low_res, predicted = decode_prompts(sam, image_embedding[None], group, group.ambiguous)
        answers = masks_to_original(best_masks(low_res, predicted), original_size, img_size)
        masks = (answers[:, 0] > 0).cpu().numpy()
        yield from zip(masks, predicted.amax(dim=1).tolist(), strict=True)


def _chunks(number: int, original_size: tuple[int, ...]) -> list[range]:
    """Cut 0 .. number - 1 into ranges of prompts that are decoded at once."""
    size = max(1, min(MAX_PROMPTS, MAX_PIXELS // (original_size[0] * original_size[1])))
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def embedding_of(
    sam: Any, dataset: PreparedDataset, cache: EmbeddingCache | None, record: ImageRecord
) -> torch.Tensor:
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
