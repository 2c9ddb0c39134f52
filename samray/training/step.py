"""The forward pass of a training step: prompts, then correction clicks on the predicted masks.

Plain torch. The batch comes from a prepared dataset (`batches.py`) or from drawn scenes
(`pretraining.py`); the step is the same.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from samray.instances.decoder import InstanceDecoder
from samray.instances.losses import TargetMaps, instance_loss
from samray.sam.adapt import num_blocks, suffix
from samray.sam.decode import PromptGroup, best_masks, decode_prompts
from samray.sam.losses import sam_loss

LOSSES = ("loss", "loss_focal", "loss_dice", "loss_iou", "loss_instances")


@dataclass
class SceneTargets:
    """The images of a batch for the instance decoder.

    Attributes:
        pixels: B x 3 x F x F float32, normalised, in the decoder's frame.
        maps: what they should become.
        weight: prompts of the step / its images. A step's losses are divided by its prompts, and
            that of the instance decoder is a mean over images.
    """

    pixels: Tensor
    maps: TargetMaps
    weight: float

    def to(self, device: torch.device) -> "SceneTargets":
        """Copy to a device."""
        return SceneTargets(self.pixels.to(device), self.maps.to(device), self.weight)


@dataclass
class Batch:
    """One worker's part of a step.

    Attributes:
        images: B x 3 x S x S float32, normalised; None where `encoded` is given.
        encoded: output of the encoder's frozen blocks (`samray.sam.adapt.prefix`), float32; None if
            the whole encoder learns.
        groups: prompts by layout.
        targets: per group, P x 1 x h x w float32, covered fraction of each low-resolution cell.
        valid: B x 1 x h x w float32, fraction of each cell that is image.
        corrections: input of each pass after the first: True a click on the last prediction's
            error and its logits, False its logits only.
        click_draws: per group, P x len(corrections) float32 in 0..1: selects the wrong cell that
            is clicked. Drawn with the prompt, so that it does not depend on the worker.
        scene: what the instance decoder sees and learns; None if there is none.
    """

    images: Tensor | None
    encoded: Tensor | None
    groups: list[PromptGroup]
    targets: list[Tensor]
    valid: Tensor
    corrections: tuple[bool, ...] = ()
    click_draws: list[Tensor] | None = None
    scene: SceneTargets | None = None

    def __len__(self) -> int:
        """Number of instances."""
        return sum(len(group) for group in self.groups)

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        draws = self.click_draws
        return replace(
            self,
            images=move(self.images),
            encoded=move(self.encoded),
            groups=[group.to(device) for group in self.groups],
            targets=[target.to(device, non_blocking=True) for target in self.targets],
            valid=self.valid.to(device, non_blocking=True),
            click_draws=None if draws is None else [draw.to(device) for draw in draws],
            scene=None if self.scene is None else self.scene.to(device),
        )


class PromptedSam(nn.Module):
    """One worker's part of a step in a single forward call, as DDP requires.

    Args:
        sam: the model, with parts already frozen.
        loss_weights: of focal, Dice and IoU loss.
        max_prompts: prompts whose activations are kept; a larger batch is decoded in chunks that
            are recomputed in the backward pass.
        num_frozen: blocks of the image encoder before the first that learns; None: all blocks.
        recompute_encoder: compute the image encoder's trained blocks again in the backward pass.
        instances: the instance decoder that learns beside the model, if any.
    """

    def __init__(
        self,
        sam: Any,
        loss_weights: tuple[float, float, float],
        max_prompts: int,
        num_frozen: int | None = None,
        recompute_encoder: bool = False,
        instances: InstanceDecoder | None = None,
    ) -> None:
        super().__init__()
        self.sam, self.instances = sam, instances
        self.num_frozen = num_blocks(sam.image_encoder) if num_frozen is None else num_frozen
        self.loss_weights = loss_weights
        self.max_prompts = max_prompts
        self.recompute_encoder = recompute_encoder
        self.balanced_weight = 0.0  # see `samray.sam.losses.sam_loss`; set by the loop

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        """Return the sums of the losses over the batch's instances; zeros for no batch."""
        # Which parameters a step uses depends on its prompts, and a worker may have no batch. DDP's
        # reduction waits for all parameters, so each takes part with a gradient of zero.
        zero = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0
        sums = dict.fromkeys(LOSSES, zero)
        if batch is None:
            return sums
        embeddings = self._embed(batch)
        if self.instances is not None and batch.scene is not None:
            # Detached: the model learns the same weights as without an instance decoder.
            maps = self.instances(embeddings.detach(), batch.scene.pixels)
            loss = instance_loss(maps, batch.scene.maps).sum()
            sums["loss_instances"] = zero + batch.scene.weight * loss
        draws = batch.click_draws or [target.new_zeros(len(target), 0) for target in batch.targets]
        size = self.max_prompts
        chunks = [
            chunk
            for group, target, draw in zip(batch.groups, batch.targets, draws, strict=True)
            for chunk in zip(group.chunks(size), target.split(size), draw.split(size), strict=True)
        ]
        too_many = len(batch) > size
        for group, target, draw in chunks:
            arguments = (
                embeddings,
                group,
                target,
                batch.valid[group.image_index],
                batch.corrections,
                draw,
            )
            if too_many:
                losses = recompute(self.passes, *arguments, use_reentrant=False)
            else:
                losses = self.passes(*arguments)
            sums |= {name: sums[name] + losses[name] for name in losses}
        return sums

    def _embed(self, batch: Batch) -> Tensor:
        given, num_frozen = batch.encoded, self.num_frozen
        if given is None:
            assert batch.images is not None
            given, num_frozen = batch.images, 0
        return suffix(self.sam.image_encoder, given, num_frozen, self.recompute_encoder)

    def _decode(
        self, embeddings: Tensor, group: PromptGroup, multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        masks, ious = decode_prompts(self.sam, embeddings, group, multimask_output)
        return masks.float(), ious.float()  # losses are float32 in any precision

    def passes(
        self,
        embeddings: Tensor,
        group: PromptGroup,
        target: Tensor,
        valid: Tensor,
        corrections: tuple[bool, ...],
        draws: Tensor,
    ) -> dict[str, Tensor]:
        """Decode the prompts, then again after each correction; return the mean loss."""
        masks, ious = self._decode(embeddings, group, group.ambiguous)
        sums = sam_loss(masks, ious, target, valid, self.loss_weights, self.balanced_weight)
        for number, click in enumerate(corrections):
            answer = best_masks(masks, ious).detach()
            group = group.with_answer(answer)
            if click:
                img_size = self.sam.image_encoder.img_size
                point, label = error_click(answer, target, valid, draws[:, number], img_size)
                group = group.with_point(point, label)
            masks, ious = self._decode(embeddings, group, multimask_output=False)
            losses = sam_loss(masks, ious, target, valid, self.loss_weights, self.balanced_weight)
            sums = {name: sums[name] + losses[name] for name in sums}
        return {name: value / (1 + len(corrections)) for name, value in sums.items()}


def draw_correction_plan(num_clicks: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Return the passes after the first prompt: True with a click on the error, False without.

    Segment Anything, appendix A, always makes 8 clicks and 2 passes without one. Here each step
    draws a number of passes up to `num_clicks`, a fifth of them without a click: the first
    prediction keeps most of the weight, and a step costs half.
    """
    passes = rng.integers(num_clicks + 1)
    return tuple((rng.random(passes) >= 0.2).tolist())


def error_click(
    logits: Tensor, target: Tensor, valid: Tensor, draw: Tensor, img_size: int
) -> tuple[Tensor, Tensor]:
    """Return a click on each prediction's error: foreground on a false negative, else background.

    Uniform over the wrong cells (Segment Anything, appendix A); a prediction without a wrong cell
    gets a foreground click on the object.

    Args:
        logits: P x 1 x h x w.
        target, valid: P x 1 x h x w fractions, as in the losses.
        draw: P in 0..1, selects one of the wrong cells.
        img_size: side of the model's frame, in pixels.

    Returns:
        point_coords: P x 1 x 2 float32, (x, y) in the model's frame.
        point_labels: P x 1 int64, 1 foreground, 0 background.
    """
    side = target.shape[-1]
    # An object thinner than a cell consists of its best covered cells.
    wanted = (target > 0.5 * target.amax(dim=(-2, -1), keepdim=True)).flatten(1)
    answered = (logits > 0).flatten(1)
    wrong = (wanted != answered) & (valid > 0.5).flatten(1)
    wrong = torch.where(wrong.any(dim=1, keepdim=True), wrong, wanted)
    place = drawn_place(wrong, draw)
    cells = torch.stack([place % side, place // side], dim=1)
    points = (cells + 0.5) * (img_size / side) - 0.5  # SAM adds half a pixel to points
    labels = wanted.gather(1, place[:, None]).long()
    return points[:, None].to(torch.float32), labels


def drawn_place(flat: Tensor, draw: Tensor) -> Tensor:
    """Return one True place of each row, uniform over them.

    Args:
        flat: P x N bool.
        draw: P in 0..1; equal draws give equal places.

    Returns:
        P int64, below N.
    """
    rank = (draw * flat.sum(dim=1)).floor()
    # The cumulative sum locates the True value number `rank` of each row.
    place = (flat.cumsum(dim=1, dtype=torch.int32) <= rank[:, None]).sum(dim=1)
    return place.clamp_max(flat.shape[1] - 1)
