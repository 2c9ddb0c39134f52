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
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from samray.geometry.frames import (
    box_to_input,
    masks_to_original,
    points_to_input,
)
from samray.geometry.prompts import Prompt
from samray.sam.attention import image_to_tokens, keep_freed_memory, tokens_to_image

# Prompts decoded at once, which bounds memory: 64 take 1.6 GiB in a ViT's decoder. Fewer on large
# images, so that the masks of a chunk at the image's resolution stay within MAX_PIXELS.
MAX_PROMPTS = 64
MAX_PIXELS = 16_000_000
CPU_CELLS_BYTES = 8 * 2**20  # of the image's cells, for the prompts decoded at once on a CPU


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
    size = prompts_at_once(sam, max_prompts)
    image = ImageTokens.of(sam, image_embedding[None])
    for group, places in _groups_of_image(prompts, mask_inputs, original_size, img_size):
        multimask = group.ambiguous if multimask_output is None else multimask_output
        for rows in prompt_chunks(len(places), original_size, size):
            chunk = group.part(rows).to(image_embedding.device)
            low_res, predicted = decode_prompts(sam, image, chunk, multimask)
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

    def part(self, rows: range | Tensor) -> "PromptGroup":
        """Return some of the prompts."""
        chosen = slice(rows.start, rows.stop) if isinstance(rows, range) else rows

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen]

        return PromptGroup(
            self.image_index[chosen],
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
    sam: Sam, images: "Tensor | ImageTokens", prompts: PromptGroup, multimask_output: bool
) -> tuple[Tensor, Tensor]:
    """Return masks for prompts of several images in one call.

    The results equal `SamPredictor.predict_torch`. The stock `MaskDecoder.predict_masks` repeats
    one image's embedding for all prompts; here each prompt has its own image, what is equal for all
    prompts of an image is computed once, and without gradients few prompts are decoded at once.

    Args:
        images: embeddings, B x C x h x w, or what `ImageTokens.of` makes of them.
        prompts: P prompts whose image_index is below B.
        multimask_output: three masks per prompt, else that of the single-mask token.

    Returns:
        low_res_masks: P x 3 or 1 x 4h x 4w logits.
        iou_predictions: P x 3 or 1.
    """
    if isinstance(images, Tensor):
        images = ImageTokens.of(sam, images)
    if torch.is_grad_enabled():
        return _decode(sam, images, prompts, multimask_output)
    size = prompts_at_once(sam, max(1, len(prompts)))
    answers = [_decode(sam, images, chunk, multimask_output) for chunk in prompts.chunks(size)]
    if len(answers) == 1:
        return answers[0]
    masks, ious = zip(*answers, strict=True)
    return torch.cat(masks), torch.cat(ious)


def prompts_at_once(sam: Any, most: int = MAX_PROMPTS) -> int:
    """Return how many prompts to decode together, at most `most`.

    On a CPU those whose cells stay in the processor's cache from one layer to the next: 2 of a ViT,
    64 of `tiny`. More take more memory, and were not faster.
    """
    if sam.device.type != "cpu":
        return most
    keep_freed_memory()
    height, width = sam.prompt_encoder.image_embedding_size
    cells_bytes: int = 4 * height * width * sam.prompt_encoder.embed_dim
    return min(most, max(1, CPU_CELLS_BYTES // cells_bytes))


@dataclass
class ImageTokens:
    """The image's side of the mask decoder, equal for all prompts: N cells of C channels.

    Attributes:
        embeddings: B x N x C.
        cells: B x N x C, the embeddings of prompts without a mask input.
        keys: B x N x C, `cells` with their positions.
        positions: N x C.
    """

    embeddings: Tensor
    cells: Tensor
    keys: Tensor
    positions: Tensor

    @classmethod
    def of(cls, sam: Any, image_embeddings: Tensor) -> "ImageTokens":
        """Compute them from embeddings, B x C x h x w."""
        encoder = sam.prompt_encoder
        embeddings = image_embeddings.flatten(2).transpose(1, 2).contiguous()
        positions = encoder.get_dense_pe()[0].flatten(1).t().contiguous()
        cells = embeddings + encoder.no_mask_embed.weight
        return cls(embeddings, cells, cells + positions, positions)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a gradient can come through."""
        return self.embeddings, self.cells, self.keys

    def detached(self) -> "ImageTokens":
        """Return leaves of their own, which need a gradient where these do."""
        embeddings, cells, keys = (
            tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.tensors()
        )
        return ImageTokens(embeddings, cells, keys, self.positions)

    def of_prompts(self, image_index: Tensor, dense: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return cells and keys of each prompt, P x N x C.

        Args:
            dense: embedded mask inputs, P x C x h x w, or None.
        """
        if dense is not None:
            cells = self._gather(self.embeddings, image_index) + dense.flatten(2).transpose(1, 2)
            return cells, cells + self.positions
        return self._gather(self.cells, image_index), self._gather(self.keys, image_index)

    def _gather(self, tokens: Tensor, image_index: Tensor) -> Tensor:
        if len(tokens) == 1:
            return tokens.expand(len(image_index), -1, -1)  # no copy
        return tokens.index_select(0, image_index)


def _decode(
    sam: Any, images: ImageTokens, prompts: PromptGroup, multimask_output: bool
) -> tuple[Tensor, Tensor]:
    """Decode all prompts together; arguments and results as in `decode_prompts`."""
    encoder, decoder = sam.prompt_encoder, sam.mask_decoder
    points = None
    if prompts.point_coords is not None:
        assert prompts.point_labels is not None
        points = (prompts.point_coords, prompts.point_labels)
    sparse, dense = encoder(points=points, boxes=prompts.boxes, masks=prompts.mask_inputs)
    output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output_tokens.expand(len(prompts), -1, -1), sparse], dim=1)
    cells, keys = images.of_prompts(
        prompts.image_index, None if prompts.mask_inputs is None else dense
    )
    tokens, cells = _transform(decoder.transformer, tokens, cells, keys, images.positions)
    kept = range(1, decoder.num_mask_tokens) if multimask_output else range(1)
    hyper_in = torch.stack(
        [decoder.output_hypernetworks_mlps[i](tokens[:, 1 + i, :]) for i in kept], dim=1
    )
    low_res_masks = _masks_of(decoder, cells, hyper_in, encoder.image_embedding_size)
    iou_predictions = decoder.iou_prediction_head(tokens[:, 0, :])
    return low_res_masks, iou_predictions[:, kept.start : kept.stop]


def _transform(
    transformer: Any, tokens: Tensor, cells: Tensor, keys: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tokens and cells after the stock `TwoWayTransformer`, layer by layer in its order.

    Args:
        tokens: P x T x C.
        cells: P x N x C; `keys` with their positions.
    """
    token_pe = tokens
    for layer in transformer.layers:
        if layer.skip_first_layer_pe:
            tokens = layer.self_attn(q=tokens, k=tokens, v=tokens)
        else:
            query = tokens + token_pe
            tokens = tokens + layer.self_attn(q=query, k=query, v=tokens)
        tokens = layer.norm1(tokens)
        attended = tokens_to_image(layer.cross_attn_token_to_image, tokens + token_pe, keys, cells)
        tokens = layer.norm2(tokens + attended)
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        attention = layer.cross_attn_image_to_token
        cells = cells + image_to_tokens(attention, keys, tokens + token_pe, tokens)
        cells = layer.norm4(cells)
        keys = cells + positions
    attention = transformer.final_attn_token_to_image
    tokens = tokens + tokens_to_image(attention, tokens + token_pe, keys, cells)
    return transformer.norm_final_attn(tokens), cells


def _masks_of(decoder: Any, cells: Tensor, hyper_in: Tensor, size: tuple[int, int]) -> Tensor:
    """Return P x M x 4h x 4w logits of the stock `output_upscaling` and of masks' vectors.

    A transposed convolution of kernel and stride 2 is a matrix product for each cell. Channels
    stay last, so that only the masks are brought into the order of the image.

    Args:
        cells: P x hw x C.
        hyper_in: P x M x C / 8.
        size: (h, w).
    """
    first, norm, _, second, _ = decoder.output_upscaling
    inplace = not torch.is_grad_enabled()
    x = linear(cells.flatten(0, 1), *_as_product(first)).unflatten(1, (4, -1))  # P hw x 4 x C / 4
    x = layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    x = linear(_gelu(x, inplace).flatten(0, 1), *_as_product(second))  # 4 P hw x 4 C / 8
    x = _gelu(x, inplace).view(len(cells), -1, hyper_in.shape[2])  # P x 16 hw x C / 8
    masks: Tensor = hyper_in @ x.transpose(1, 2)
    # Each cell has 2 x 2 parts, and each part has 2 x 2.
    masks = masks.unflatten(2, (*size, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return masks.reshape(*hyper_in.shape[:2], 4 * size[0], 4 * size[1])


def _as_product(layer: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the linear layer that makes the 2 x 2 parts of each cell."""
    assert layer.bias is not None
    return layer.weight.permute(2, 3, 1, 0).flatten(0, 2), layer.bias.repeat(4)


def _gelu(x: Tensor, inplace: bool) -> Tensor:
    found: Tensor = torch.ops.aten.gelu_(x) if inplace else gelu(x)
    return found


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
