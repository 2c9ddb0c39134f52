"""Prompts to masks."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from segment_anything.modeling import Sam
from torch import Tensor

from samray.geometry.frames import box_to_input, points_to_input
from samray.geometry.prompts import Prompt


@dataclass
class PromptGroup:
    """Prompts of one layout, of any images of a batch, in the model's frame.

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
        """One point alone may mean part, object or group: SAM answers it with three masks."""
        one_point = self.point_coords is not None and self.point_coords.shape[1] == 1
        return one_point and self.boxes is None and self.mask_inputs is None

    def with_answer(self, logits: Tensor) -> "PromptGroup":
        """Feed an answer back as the mask prompt: P x 1 x h x w."""
        return replace(self, mask_inputs=logits)

    def with_point(self, point_coords: Tensor, point_labels: Tensor) -> "PromptGroup":
        """Add a point to each prompt: P x 1 x 2 and P x 1."""
        if self.point_coords is not None and self.point_labels is not None:
            point_coords = torch.cat([self.point_coords, point_coords], dim=1)
            point_labels = torch.cat([self.point_labels, point_labels], dim=1)
        return replace(self, point_coords=point_coords, point_labels=point_labels)

    def chunks(self, size: int) -> list["PromptGroup"]:
        """Cut into groups of at most `size` prompts."""

        def cut(tensor: Tensor | None, start: int) -> Tensor | None:
            return None if tensor is None else tensor[start : start + size]

        return [
            PromptGroup(
                self.image_index[start : start + size],
                cut(self.point_coords, start),
                cut(self.point_labels, start),
                cut(self.boxes, start),
                cut(self.mask_inputs, start),
            )
            for start in range(0, len(self), size)
        ]

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
    """Of each prompt's masks, P x C x h x w, return the one of highest predicted IoU.

    Returns:
        P x 1 x h x w.
    """
    rows = torch.arange(len(low_res_masks), device=low_res_masks.device)
    return low_res_masks[rows, iou_predictions.argmax(dim=1)][:, None]


def decode_prompts(
    sam: Sam, image_embeddings: Tensor, prompts: PromptGroup, multimask_output: bool
) -> tuple[Tensor, Tensor]:
    """Return masks for prompts of several images in one call.

    The stock `MaskDecoder.predict_masks` repeats one image's embedding for all prompts; this
    gathers each prompt's own and drives the decoder's parts in the same order, so the numbers
    are those of `SamPredictor.predict_torch`.

    Args:
        image_embeddings: B x C x h x w.
        prompts: P prompts whose image_index is below B.
        multimask_output: three masks a prompt, else the single-mask token's.

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
