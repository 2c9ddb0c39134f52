"""The forward pass of a training step: prompts, then correction clicks on the predicted masks.

Plain torch. The batch comes from a prepared dataset (`batches.py`) or from drawn scenes
(`pretraining.py`); the step is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from samray.instances.decoder import InstanceDecoder
from samray.instances.losses import TargetMaps, instance_loss
from samray.sam.adapt import num_blocks, suffix
from samray.sam.decode import (
    MAX_PROMPTS,
    ImageTokens,
    PromptGroup,
    best_masks,
    decode_prompts,
    prompts_at_once,
)
from samray.sam.losses import sam_loss

DECODER_LOSSES = ("loss", "loss_focal", "loss_dice", "loss_iou")
LOSSES = (*DECODER_LOSSES, "loss_instances")

# Prompts decoded together, with their targets, valid cells and click draws.
Piece = tuple[PromptGroup, Tensor, Tensor, Tensor]


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

    def pieces(self, images: range, size: int) -> Iterator[Piece]:
        """Yield the prompts on some images, at most `size` at once; images count from the first."""
        draws = self.click_draws or [target.new_zeros(len(target), 0) for target in self.targets]
        for group, target, draw in zip(self.groups, self.targets, draws, strict=True):
            index = group.image_index
            chosen = torch.nonzero((index >= images.start) & (index < images.stop))[:, 0]
            for rows in chosen.split(size) if len(chosen) else ():
                part = group.part(rows)
                valid = self.valid[part.image_index]
                part = replace(part, image_index=part.image_index - images.start)
                yield part, target[rows], valid, draw[rows]


class PromptedSam(nn.Module):
    """One worker's part of a step in a single forward call, as DDP requires.

    Args:
        sam: the model, with parts already frozen.
        loss_weights: of focal, Dice and IoU loss.
        max_prompts: decoded at once, at most; a CPU takes fewer (`prompts_at_once`).
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

    def forward(self, batch: Batch | None, loss_scale: float = 1.0) -> dict[str, Tensor]:
        """Return the sums of the losses over the batch's instances; zeros for no batch.

        Args:
            loss_scale: by which the caller scales the loss, as float16 requires.
        """
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
        parts = (self.sam.prompt_encoder, self.sam.mask_decoder)
        learning = [p for part in parts for p in part.parameters() if p.requires_grad]
        losses = _DecoderLosses.apply(self, batch, loss_scale, embeddings, *learning)
        return sums | {name: zero + loss for name, loss in zip(DECODER_LOSSES, losses, strict=True)}

    @property
    def at_once(self) -> int:
        """Number of prompts that are decoded together."""
        return prompts_at_once(self.sam, self.max_prompts)

    def decoder_losses(
        self, batch: Batch, embeddings: Sequence[Tensor], gradients: "_Gradients | None"
    ) -> tuple[Tensor, ...]:
        """Return the sums of the decoder's losses; add their gradients to `gradients`, if given.

        Args:
            embeddings: of the images, B x C x h x w, in parts that are decoded one after another.
        """
        sums = [embeddings[0].new_zeros((), dtype=torch.float32) for _ in DECODER_LOSSES]
        first = 0
        for given in embeddings:
            tokens = ImageTokens.of(self.sam, given)
            cut = tokens if gradients is None else tokens.detached()
            for piece in batch.pieces(range(first, first + len(given)), self.at_once):
                for losses in self.passes(cut, *piece, batch.corrections):
                    if gradients is not None:
                        gradients.add_of_loss(losses["loss"], cut)
                    sums = [
                        total + losses[name].detach()
                        for total, name in zip(sums, DECODER_LOSSES, strict=True)
                    ]
            if gradients is not None:
                gradients.add_through(tokens, cut, given)
            first += len(given)
        return tuple(sums)

    def _embed(self, batch: Batch) -> Tensor:
        given, num_frozen = batch.encoded, self.num_frozen
        if given is None:
            assert batch.images is not None
            given, num_frozen = batch.images, 0
        return suffix(self.sam.image_encoder, given, num_frozen, self.recompute_encoder)

    def passes(
        self,
        images: ImageTokens,
        group: PromptGroup,
        target: Tensor,
        valid: Tensor,
        draws: Tensor,
        corrections: tuple[bool, ...],
    ) -> Iterator[dict[str, Tensor]]:
        """Decode the prompts, then again after each correction.

        Yields:
            The losses of each pass; their sum is the mean of the passes. No pass needs the
            activations of the one before it.
        """
        multimask_output = group.ambiguous
        for click in (*corrections, None):
            masks, ious = decode_prompts(self.sam, images, group, multimask_output)
            masks, ious = masks.float(), ious.float()  # losses are float32 in any precision
            losses = sam_loss(masks, ious, target, valid, self.loss_weights, self.balanced_weight)
            yield {name: value / (len(corrections) + 1) for name, value in losses.items()}
            if click is None:
                return
            answer, multimask_output = best_masks(masks, ious).detach(), False
            group = group.with_answer(answer)
            draw, draws = draws[:, 0], draws[:, 1:]
            if click:
                img_size = self.sam.image_encoder.img_size
                point, label = error_click(answer, target, valid, draw, img_size)
                group = group.with_point(point, label)


class _DecoderLosses(torch.autograd.Function):
    """The sums of the decoder's losses, with their gradients computed in the forward pass.

    Each pass over a few prompts is differentiated before the next one, so that what it keeps stays
    in the processor's cache, and memory does not grow with prompts and clicks. DDP, which reduces
    the gradients in a backward pass, gets their sums there. Only the first loss has a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        module: PromptedSam,
        batch: Batch,
        loss_scale: float,
        embeddings: Tensor,
        *learning: Tensor,
    ) -> tuple[Tensor, ...]:
        # Prompts of several images at once need a copy of their image's cells each: too much for a
        # CPU's cache, unless the cells are few.
        together = len(embeddings) if prompts_at_once(module.sam) == MAX_PROMPTS else 1
        parts = [part.detach() for part in embeddings.split(together)]
        if not any(ctx.needs_input_grad):
            return module.decoder_losses(batch, parts, None)
        parts = [part.requires_grad_(ctx.needs_input_grad[3]) for part in parts]
        gradients = _Gradients(learning, loss_scale)
        with torch.enable_grad():
            losses = module.decoder_losses(batch, parts, gradients)
        ctx.loss_scale = loss_scale
        of_images = None
        if ctx.needs_input_grad[3]:
            of_images = torch.cat([gradients.of(part) for part in parts])
        ctx.save_for_backward(of_images, *(gradients.sums.get(p) for p in learning))
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        factor = given[0] / ctx.loss_scale
        found = (None if sums is None else sums * factor for sums in ctx.saved_tensors)
        return None, None, None, *found


class _Gradients:
    """Sums of gradients with respect to what learns, and to tensors on the way to it.

    Args:
        learning: parameters.
        loss_scale: of the loss, against underflow in float16.
    """

    def __init__(self, learning: Sequence[Tensor], loss_scale: float) -> None:
        self.learning, self.loss_scale = learning, loss_scale
        self.sums: dict[Tensor, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """Return the sum for a tensor, zeros if no gradient came."""
        return self.sums[tensor] if tensor in self.sums else torch.zeros_like(tensor)

    def add_of_loss(self, loss: Tensor, cut: ImageTokens) -> None:
        """Add a loss's gradients with respect to `learning` and the images' tokens."""
        if loss.requires_grad:
            self._add([loss], cut.tensors(), [torch.full_like(loss, self.loss_scale)])

    def add_through(self, tokens: ImageTokens, cut: ImageTokens, given: Tensor) -> None:
        """Pass the gradients of the images' tokens on to the embeddings they were made of."""
        pairs = zip(tokens.tensors(), cut.tensors(), strict=True)
        reached = [(whole, self.sums.pop(leaf)) for whole, leaf in pairs if leaf in self.sums]
        if reached:
            outputs, seeds = zip(*reached, strict=True)
            self._add(outputs, [given], seeds)

    def _add(
        self, outputs: Sequence[Tensor], others: Sequence[Tensor], seeds: Sequence[Tensor]
    ) -> None:
        inputs = [tensor for tensor in (*others, *self.learning) if tensor.requires_grad]
        # Outside of autocast, as a backward pass should be.
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
        for tensor, gradient in zip(inputs, found, strict=True):
            if gradient is None:
                continue
            if tensor in self.sums:
                self.sums[tensor] += gradient
            else:
                self.sums[tensor] = gradient.clone()  # two may share memory


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
