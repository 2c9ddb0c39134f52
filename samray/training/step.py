"""What one optimiser step computes: prompts, and correction clicks on the answers, in one forward.

Plain torch. The batch comes from a prepared dataset (`batches.py`) or from drawn scenes
(`pretraining.py`); the step is the same.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from samray.sam.decode import PromptGroup, best_masks, decode_prompts
from samray.training.losses import sam_loss

LOSSES = ("loss", "loss_focal", "loss_dice", "loss_iou")


@dataclass
class Batch:
    """One worker's part of a step.

    Attributes:
        images: B x 3 x S x S float32, normalised; None with a frozen encoder.
        image_embeddings: B x C x h x w float32; None while the encoder learns.
        groups: prompts by layout.
        targets: per group, P x 1 x h x w float32, covered share of each low-resolution cell.
        valid: B x 1 x h x w float32, share of each cell that is image.
        corrections: what each pass after the first brings: True a click on the last answer's
            error, False nothing but that answer's logits.
        click_draws: per group, P x len(corrections) float32 in 0..1: which of the wrong cells is
            clicked. Drawn with the prompt, so that it is the same whichever worker has it.
    """

    images: Tensor | None
    image_embeddings: Tensor | None
    groups: list[PromptGroup]
    targets: list[Tensor]
    valid: Tensor
    corrections: tuple[bool, ...] = ()
    click_draws: list[Tensor] | None = None

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
            image_embeddings=move(self.image_embeddings),
            groups=[group.to(device) for group in self.groups],
            targets=[target.to(device, non_blocking=True) for target in self.targets],
            valid=self.valid.to(device, non_blocking=True),
            click_draws=None if draws is None else [draw.to(device) for draw in draws],
        )


class PromptedSam(nn.Module):
    """One worker's part of a step in one forward, so that DDP sees all of it.

    Args:
        sam: the model, already frozen where it shall be.
        loss_weights: of focal, Dice and IoU loss.
        max_prompts: prompts whose activations are kept; a batch of more is decoded in pieces that
            are recomputed in the backward pass.
    """

    def __init__(
        self, sam: Any, loss_weights: tuple[float, float, float], max_prompts: int
    ) -> None:
        super().__init__()
        self.sam = sam
        self.loss_weights = loss_weights
        self.max_prompts = max_prompts
        self.balanced_weight = 0.0  # see `samray.training.losses.sam_loss`; the loop lets it fade

    def forward(self, batch: Batch | None) -> dict[str, Tensor]:
        """Return the sums of the losses over the batch's instances; zeros for no batch."""
        # Mixed prompts use other parameters in every step, and a worker may have nothing to do.
        # Touching all of them keeps DDP's reduction complete.
        zero = torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0
        sums = dict.fromkeys(LOSSES, zero)
        if batch is None:
            return sums
        embeddings = batch.image_embeddings
        if embeddings is None:
            embeddings = self.sam.image_encoder(batch.images)
        draws = batch.click_draws or [target.new_zeros(len(target), 0) for target in batch.targets]
        size = self.max_prompts
        pieces = [
            piece
            for group, target, draw in zip(batch.groups, batch.targets, draws, strict=True)
            for piece in zip(group.chunks(size), target.split(size), draw.split(size), strict=True)
        ]
        too_many = len(batch) > size
        for chunk, target, draw in pieces:
            arguments = (
                embeddings,
                chunk,
                target,
                batch.valid[chunk.image_index],
                batch.corrections,
                draw,
            )
            if too_many:
                losses = recompute(self._passes, *arguments, use_reentrant=False)
            else:
                losses = self._passes(*arguments)
            sums = {name: sums[name] + losses[name] for name in LOSSES}
        return sums

    def _decode(
        self, embeddings: Tensor, group: PromptGroup, multimask_output: bool
    ) -> tuple[Tensor, Tensor]:
        masks, ious = decode_prompts(self.sam, embeddings, group, multimask_output)
        return masks.float(), ious.float()  # losses are float32 in any precision

    def _passes(
        self,
        embeddings: Tensor,
        group: PromptGroup,
        target: Tensor,
        valid: Tensor,
        corrections: tuple[bool, ...],
        draws: Tensor,
    ) -> dict[str, Tensor]:
        """Answer the prompts, then again after each correction; the mean of the passes' losses."""
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
            sums = {name: sums[name] + losses[name] for name in LOSSES}
        return {name: value / (1 + len(corrections)) for name, value in sums.items()}


def draw_correction_plan(num_clicks: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Return what follows the first prompt: True a click on the answer's error, False none.

    Segment Anything, appendix A, always makes 8 clicks and 2 passes without one. Here each step
    draws a number of passes up to `num_clicks`, a fifth of them without a click: the first answer
    keeps most of the weight, and a step costs half.
    """
    passes = rng.integers(num_clicks + 1)
    return tuple((rng.random(passes) >= 0.2).tolist())


def error_click(
    logits: Tensor, target: Tensor, valid: Tensor, draw: Tensor, img_size: int
) -> tuple[Tensor, Tensor]:
    """Return a click on each answer's error: foreground if it missed, background if it spilled.

    Uniform over the wrong cells (Segment Anything, appendix A); an answer without a wrong cell
    gets a foreground click on the object.

    Args:
        logits: P x 1 x h x w.
        target, valid: P x 1 x h x w shares, as in the losses.
        draw: P in 0..1, which of the wrong cells.
        img_size: side of the model's frame, in pixels.

    Returns:
        point_coords: P x 1 x 2 float32, (x, y) in the model's frame.
        point_labels: P x 1 int64, 1 foreground, 0 background.
    """
    side = target.shape[-1]
    # Of an object thinner than a cell the best covered cells count as the object.
    wanted = (target > 0.5 * target.amax(dim=(-2, -1), keepdim=True)).flatten(1)
    answered = (logits > 0).flatten(1)
    wrong = (wanted != answered) & (valid > 0.5).flatten(1)
    wrong = torch.where(wrong.any(dim=1, keepdim=True), wrong, wanted)
    place = drawn_place(wrong, draw)
    cells = torch.stack([place % side, place // side], dim=1)
    points = (cells + 0.5) * (img_size / side) - 0.5  # SAM's points count from pixel centres
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
    # A row's running count says where True number `rank` lies.
    place = (flat.cumsum(dim=1, dtype=torch.int32) <= rank[:, None]).sum(dim=1)
    return place.clamp_max(flat.shape[1] - 1)
