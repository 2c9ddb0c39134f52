"""Build a SAM and load weights."""

from typing import Any

import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

from samray.errors import CheckpointError, ConfigError
from samray.geometry.frames import PIXEL_MEAN, PIXEL_STD
from samray.sam.attention import fuse_attention
from samray.sam.tiny import DEPTHS, WIDTHS, TinyImageEncoder
from samray.sam.weights import digest_of, model_type_of
from samray.storage import Place

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
    if model_type != "tiny":
        fuse_attention(sam.image_encoder)
    return sam.eval()


def tiny_architecture() -> dict[str, Any]:
    """Return the architecture that weights of `tiny` depend on, in types of JSON."""
    return {
        "img_size": TINY_SIZE,
        "embed_dim": TINY_DIM,
        "widths": list(WIDTHS),
        "depths": list(DEPTHS),
    }


def build_tiny(img_size: int = TINY_SIZE, embed_dim: int = TINY_DIM) -> Sam:
    """Return samray's small SAM: its own image encoder, SAM's prompt encoder and decoder, smaller.

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
    """Initialise the attention between prompts and image so that a prompt attends to its location.

    Both sides carry the same positional encoding, so with equal projections of queries and keys a
    point attends to its surroundings from the first step. With independent projections the decoder
    still predicted empty masks after 250 steps.
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
    """Load weights into a model, in place.

    Tensors outside SAM's three parts, such as micro-sam's own `decoder`, are ignored.

    Raises:
        CheckpointError: they belong to another model type, or tensors are missing, unknown or of
            another shape.
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


def local_device(wanted: str) -> torch.device:
    """Return the device to compute on in this process, without Ray.

    Args:
        wanted: auto, cpu or gpu.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "gpu" and not has_gpu:
        raise ConfigError("--device gpu: torch sees no GPU here; leave it out to use the CPU")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def encoder_digest(sam: Sam) -> str:
    """sha256 of the image encoder's weights, which determine its embeddings."""
    return digest_of(sam.state_dict(), prefix="image_encoder.")


def low_res_size(sam: Sam) -> int:
    """Side of the decoder's masks, in cells."""
    return int(4 * sam.prompt_encoder.image_embedding_size[0])
