"""Prompts to masks: one way for scores, predictions and the endpoint.

`predict_masks` reads top-down: group the prompts on one image by layout, decode them in chunks, and
give each prompt's masks, which are enlarged to the image's resolution when they are asked for.
Training calls `decode_prompts` on batches of several images itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samray.geometry.frames import (
    box_to_input,
    masks_to_original,
    points_to_input,
)
from samray.geometry.prompts import Prompt

# Prompts decoded at once, which bounds memory: 64 take 1.6 GiB in a ViT's decoder. Fewer on large
# images, so that the masks of a chunk at the image's resolution stay within MAX_PIXELS.
MAX_PROMPTS = 64
MAX_PIXELS = 16_000_000


@dataclass(frozen=True)
class PromptMasks:
    """The masks that the decoder gives for one prompt, C of them.

    Attributes:
        low_res_masks: C x h x w float32 logits, on the model's device.
        iou_predictions: C float32, the model's own estimate.
        original_size: (H, W) of the image.
        img_size: side of the model's frame, in pixels.
    """

    low_res_masks: Tensor
    iou_predictions: Tensor
    original_size: tuple[int, int]
    img_size: int

    @property
    def best(self) -> int:
        """Which mask has the highest predicted IoU."""
        return int(self.iou_predictions.argmax())

    @property
    def predicted_iou(self) -> float:
        """The predicted IoU of the best mask."""
        return float(self.iou_predictions.amax())

    @property
    def ranking(self) -> list[int]:
        """All masks, the highest predicted IoU first."""
        ranking: list[int] = self.iou_predictions.argsort(descending=True).tolist()
        return ranking

    def logits(self, number: int) -> Tensor:
        """Return a mask's logits at the image's resolution, H x W.

        One mask at a time: three of 100 megapixels would take 1.2 GB.
        """
        chosen = self.low_res_masks[None, number : number + 1]
        return masks_to_original(chosen, self.original_size, self.img_size)[0, 0]

    def mask(self, number: int) -> np.ndarray:
        """Return a mask at the image's resolution, H x W bool."""
        mask: np.ndarray = (self.logits(number) > 0).cpu().numpy()
        return mask


@torch.inference_mode()
def predict_masks(
    sam: Any,
    image_embedding: Tensor,
    prompts: Sequence[Prompt],
    original_size: tuple[int, int],
    mask_inputs: Sequence[Tensor | None] | None = None,
    multimask_output: bool | None = None,
    max_prompts: int = MAX_PROMPTS,
) -> Iterator[tuple[int, PromptMasks]]:
    """Yield the masks of each prompt on one image, as `SamPredictor.predict_torch` gives them.

    Args:
        image_embedding: C x h x w float32, on the model's device.
        prompts: points, a box or both each, in pixels of the image; layouts may differ.
        original_size: (H, W) of the image.
        mask_inputs: for each prompt the logits of an earlier answer, 1 x h x w, or None.
        multimask_output: three masks a prompt or one; unset: three for one point alone, which may
            mean part, object or group.
        max_prompts: decoded at once.

    Yields:
        (place in `prompts`, its masks), each prompt once, layout by layout.
    """
    img_size = sam.image_encoder.img_size
    for group, places in _groups_of_image(prompts, mask_inputs, original_size, img_size):
        multimask = group.ambiguous if multimask_output is None else multimask_output
        for rows in prompt_chunks(len(places), original_size, max_prompts):
            chunk = group.part(rows).to(image_embedding.device)
            low_res, predicted = decode_prompts(sam, image_embedding[None], chunk, multimask)
            for answer, row in enumerate(rows):
                masks = PromptMasks(low_res[answer], predicted[answer], original_size, img_size)
                yield places[row], masks


def prompt_chunks(
    number: int, original_size: tuple[int, ...], max_prompts: int = MAX_PROMPTS
) -> list[range]:
    """Cut prompts 0 .. number - 1 on an image of (H, W) into ranges that are decoded at once."""
    size = max(1, min(max_prompts, MAX_PIXELS // (original_size[0] * original_size[1])))
    return [range(start, min(start + size, number)) for start in range(0, number, size)]


def _groups_of_image(
    prompts: Sequence[Prompt],
    mask_inputs: Sequence[Tensor | None] | None,
    original_size: tuple[int, int],
    img_size: int,
) -> "Iterator[tuple[PromptGroup, list[int]]]":
    """Group prompts by layout, those with an earlier answer apart: (group, places in `prompts`)."""
    earlier = [None] * len(prompts) if mask_inputs is None else list(mask_inputs)
    for corrects in (False, True):
        chosen = [place for place, logits in enumerate(earlier) if (logits is not None) == corrects]
        some = [prompts[place] for place in chosen]
        for group, rows in group_prompts(some, [0] * len(some), [original_size], img_size):
            places = [chosen[row] for row in rows]
            given = [logits for place in places if (logits := earlier[place]) is not None]
            yield group.with_answer(torch.stack(given)) if corrects else group, places


@dataclass
class PromptGroup:
    """Prompts of one layout on any images of a batch, in the model's frame.

    Attributes:
        image_index: P int64, which image of the batch each prompt belongs to.
        point_coords: P x N x 2 float32, (x, y), or None.
        point_labels: P x N int64, or None.
        boxes: P x 4 float32, XYXY, or None.
        mask_inputs: P x 1 x h x w float32, logits of an earlier prediction, or None.
    """

    image_index: Tensor
    point_coords: Tensor | None = None
    point_labels: Tensor | None = None
    boxes: Tensor | None = None
    mask_inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def ambiguous(self) -> bool:
        """Whether it may mean part, object or group, so that SAM gives three masks: one point."""
        one_point = self.point_coords is not None and self.point_coords.shape[1] == 1
        return one_point and self.boxes is None and self.mask_inputs is None

    def with_answer(self, logits: Tensor) -> "PromptGroup":
        """Add the logits of earlier masks as mask prompts: P x 1 x h x w."""
        return replace(self, mask_inputs=logits)

    def with_point(self, point_coords: Tensor, point_labels: Tensor) -> "PromptGroup":
        """Add a point to each prompt: P x 1 x 2 and P x 1."""
        if self.point_coords is not None and self.point_labels is not None:
            point_coords = torch.cat([self.point_coords, point_coords], dim=1)
            point_labels = torch.cat([self.point_labels, point_labels], dim=1)
        return replace(self, point_coords=point_coords, point_labels=point_labels)

    def part(self, rows: range) -> "PromptGroup":
        """Return some of the prompts."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows.start : rows.stop]

        return PromptGroup(
            self.image_index[rows.start : rows.stop],
            cut(self.point_coords),
            cut(self.point_labels),
            cut(self.boxes),
            cut(self.mask_inputs),
        )

    def chunks(self, size: int) -> list["PromptGroup"]:
        """Cut into groups of at most `size` prompts."""
        return [self.part(range(start, start + size)) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> "PromptGroup":
        """Copy to a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return PromptGroup(
            self.image_index.to(device),
            move(self.point_coords),
            move(self.point_labels),
            move(self.boxes),
            move(self.mask_inputs),
        )


def best_masks(low_res_masks: Tensor, iou_predictions: Tensor) -> Tensor:
    """Return each prompt's mask of highest predicted IoU, of P x C x h x w.

    Returns:
        P x 1 x h x w.
    """
    rows = torch.arange(len(low_res_masks), device=low_res_masks.device)
    return low_res_masks[rows, iou_predictions.argmax(dim=1)][:, None]


def decode_prompts(
    sam: Sam, image_embeddings: Tensor, prompts: PromptGroup, multimask_output: bool
) -> tuple[Tensor, Tensor]:
    """Return masks for prompts of several images in one call.

    The stock `MaskDecoder.predict_masks` repeats one image's embedding for all prompts. This
    function gathers each prompt's own embedding and calls the decoder's parts in the same order, so
    the results equal `SamPredictor.predict_torch`.

    Args:
        image_embeddings: B x C x h x w.
        prompts: P prompts whose image_index is below B.
        multimask_output: three masks per prompt, else that of the single-mask token.

    Returns:
        low_res_masks: P x 3 or 1 x 4h x 4w logits.
        iou_predictions: P x 3 or 1.
    """
    points = None
    if prompts.point_coords is not None:
        assert prompts.point_labels is not None
        points = (prompts.point_coords, prompts.point_labels)
    sparse, dense = sam.prompt_encoder(
        points=points, boxes=prompts.boxes, masks=prompts.mask_inputs
    )
    decoder = sam.mask_decoder
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(prompts), -1, -1), sparse], dim=1)
    src = image_embeddings[prompts.image_index] + dense  # P x C x h x w
    num_prompts, channels, height, width = src.shape
    image_pe = sam.prompt_encoder.get_dense_pe().expand(num_prompts, -1, -1, -1)
    hs, src = decoder.transformer(src, image_pe, tokens)
    src = src.transpose(1, 2).view(num_prompts, channels, height, width)
    upscaled = decoder.output_upscaling(src)  # P x C/8 x 4h x 4w
    kept = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
    hyper_in = torch.stack(
        [decoder.output_hypernetworks_mlps[i](hs[:, 1 + i, :]) for i in kept], dim=1
    )
    low_res_masks = (hyper_in @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])
    iou_predictions = decoder.iou_prediction_head(hs[:, 0, :])
    return low_res_masks, iou_predictions[:, kept.start : kept.stop]


def group_prompts(
    prompts: Sequence[Prompt],
    image_index: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    img_size: int,
) -> list[tuple[PromptGroup, list[int]]]:
    """Group prompts by layout and transform them to the model's frame.

    Prompts of different layouts are not padded to a common one: padding changes the logits.

    Args:
        prompts: in original pixels.
        image_index: the image of the batch that each belongs to.
        sizes: (H, W) of each image of the batch.

    Returns:
        (group, places of its prompts in `prompts`), one per layout.
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
