"""Build a SAM, put weights in, freeze parts, and decode prompts of many images at once."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

from samray.config import ModelConfig
from samray.errors import CheckpointError
from samray.storage import Place
from samray.tiny_encoder import DEPTHS, WIDTHS, TinyImageEncoder
from samray.transforms import PIXEL_MEAN, PIXEL_STD
from samray.weights import digest_of, model_type_of

TINY_SIZE, TINY_DIM = 256, 128
PARTS = ("image_encoder", "prompt_encoder", "mask_decoder")


def build_model(model_type: str, seed: int = 0) -> Sam:
    """Return a SAM with random weights, in float32 on the CPU.

    Args:
        model_type: tiny, vit_b, vit_l or vit_h.
        seed: the same seed gives the same weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam: Sam = build_tiny() if model_type == "tiny" else sam_model_registry[model_type]()
    return sam.eval()


def tiny_architecture() -> dict[str, Any]:
    """Return what weights of `tiny` depend on, beside SAM's own code; JSON knows its types."""
    return {
        "img_size": TINY_SIZE,
        "embed_dim": TINY_DIM,
        "widths": list(WIDTHS),
        "depths": list(DEPTHS),
    }


def build_tiny(img_size: int = TINY_SIZE, embed_dim: int = TINY_DIM) -> Sam:
    """Return samray's small SAM: own image encoder, SAM's prompt encoder and decoder made small.

    Args:
        img_size: side of the square input, in pixels; a multiple of 32.
        embed_dim: width of embedding and decoder; a multiple of 16.
    """
    embedding_size = img_size // 16
    sam = Sam(
        image_encoder=TinyImageEncoder(img_size, embed_dim),
        prompt_encoder=PromptEncoder(
            embed_dim=embed_dim,
            image_embedding_size=(embedding_size, embedding_size),
            input_image_size=(img_size, img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=embed_dim, num_heads=8, mlp_dim=4 * embed_dim
            ),
            transformer_dim=embed_dim,
            iou_head_depth=3,
            iou_head_hidden_dim=embed_dim,
        ),
        pixel_mean=list(PIXEL_MEAN),
        pixel_std=list(PIXEL_STD),
    )
    _attend_to_same_place(sam.mask_decoder.transformer)
    return sam


def _attend_to_same_place(transformer: TwoWayTransformer) -> None:
    """Let the attention between prompts and image begin where it must end up: at equal places.

    Both sides carry the same positional encoding, so with one projection for queries and keys a
    point looks at its own surroundings from the first step. From independent projections the
    decoder still answered with empty masks after 250 steps.
    """
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [layer.cross_attn_token_to_image, layer.cross_attn_image_to_token]
    with torch.no_grad():
        for attention in attentions:
            attention.q_proj.weight.mul_(2)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.q_proj.bias.zero_()
            attention.k_proj.bias.zero_()


def load_weights(
    sam: Sam, state_dict: dict[str, Tensor], model_type: str, source: str | Place
) -> None:
    """Put weights into a model, in place.

    Tensors beside SAM's three parts, such as micro-sam's own `decoder`, are left aside.

    Raises:
        CheckpointError: they belong to another model type, or tensors are missing or too many.
    """
    found = model_type_of(state_dict)
    if found is not None and found != model_type:
        raise CheckpointError(
            f"{source}: holds {found} weights, but the model type is {model_type}; "
            f"pass --model-type {found} or another file"
        )
    own = sam.state_dict()
    state_dict = {k: v for k, v in state_dict.items() if k.split(".")[0] in PARTS}
    missing = sorted(own.keys() - state_dict.keys())
    surplus = sorted(state_dict.keys() - own.keys())
    wrong = [
        f"{name} is {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state_dict.keys()
        if own[name].shape != state_dict[name].shape
    ]
    if missing or surplus or wrong:
        details = [f"{len(missing)} tensors missing (first: {missing[0]})"] if missing else []
        details += [f"{len(surplus)} unknown (first: {surplus[0]})"] if surplus else []
        details += [f"{len(wrong)} of another shape (first: {min(wrong)})"] if wrong else []
        raise CheckpointError(
            f"{source}: does not fit {model_type}: {', '.join(details)}; "
            "pass weights of this model type"
        )
    sam.load_state_dict(state_dict)


def freeze(sam: Sam, config: ModelConfig) -> None:
    """Switch gradients of the three parts off or on, in place."""
    frozen = {
        "image_encoder": bool(config.freeze_image_encoder),
        "prompt_encoder": config.freeze_prompt_encoder,
        "mask_decoder": config.freeze_mask_decoder,
    }
    for part in PARTS:
        getattr(sam, part).requires_grad_(not frozen[part])


def encoder_digest(sam: Sam) -> str:
    """sha256 of the image encoder's weights: what makes its embeddings what they are."""
    return digest_of(sam.state_dict(), prefix="image_encoder.")


def low_res_size(sam: Sam) -> int:
    """Side of the decoder's masks, in cells."""
    return int(4 * sam.prompt_encoder.image_embedding_size[0])


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
