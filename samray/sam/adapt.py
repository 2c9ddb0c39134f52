"""Which part of the image encoder learns: its last blocks, in full or through LoRA adapters.

The blocks before them are the frozen prefix. Its activations do not change during a run, so they
are computed once an image and cached; each step runs the suffix only.

    image -> prefix -> activations (cached) -> suffix: trained blocks and neck -> embedding

A block is a transformer block of a ViT, or a stage of `tiny`. If all blocks learn, so do the layers
before them, and there is no prefix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from samray.config import ModelConfig
from samray.sam.tiny import TinyImageEncoder
from samray.sam.weights import digest_of


class LoraQV(nn.Module):
    """A low-rank update of the queries and values in a ViT's `qkv` weight (Hu et al., LoRA, 2021).

    As a parametrization it changes the weight and not the layer's input, so the merged layer
    computes the same as the adapted one.

    Args:
        weight: of `qkv`, 3W x W: queries, keys and values.
        rank: of the update.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        width = weight.shape[1]
        self.down = nn.Parameter((torch.randn(2, rank, width) / rank).to(weight))
        self.up = nn.Parameter(torch.zeros(2, width, rank).to(weight))  # the update starts at zero

    def forward(self, weight: Tensor) -> Tensor:
        """3W x W -> 3W x W."""
        query, value = self.up @ self.down
        return weight + torch.cat([query, torch.zeros_like(query), value])


def blocks(encoder: Any) -> nn.ModuleList:
    """Return the blocks of an image encoder."""
    found: nn.ModuleList = (
        encoder.stages if isinstance(encoder, TinyImageEncoder) else encoder.blocks
    )
    return found


def num_blocks(encoder: Any) -> int:
    """Return the number of blocks of an image encoder."""
    return len(blocks(encoder))


def num_frozen_blocks(there: int, config: ModelConfig) -> int:
    """Return the number of blocks before the first that learns; all of them if none does.

    Args:
        there: number of the encoder's blocks.
        config: resolved.
    """
    wanted = config.adapt_blocks
    if config.adapt == "none" or wanted == 0:
        return there
    if wanted == "all":
        return 0
    assert wanted is not None
    return there - wanted


def set_trainable(sam: Any, config: ModelConfig, seed: int = 0) -> None:
    """Enable the gradients of what learns and disable all others, in place; add LoRA adapters.

    Args:
        config: resolved.
        seed: of the adapters' first values.
    """
    encoder = sam.image_encoder
    frozen = num_frozen_blocks(num_blocks(encoder), config)
    encoder.requires_grad_(False)
    if config.adapt == "lora" and frozen < num_blocks(encoder):
        layers = [block.attn.qkv for block in encoder.blocks[frozen:]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters = [LoraQV(qkv.weight, config.lora_rank) for qkv in layers]
        for qkv, adapter in zip(layers, adapters, strict=True):
            parametrize.register_parametrization(qkv, "weight", adapter)
            qkv.parametrizations.weight.original.requires_grad_(False)
    elif frozen == 0:
        encoder.requires_grad_(True)
    elif frozen < num_blocks(encoder):
        for module in _suffix_modules(encoder, frozen):
            module.requires_grad_(True)
    sam.prompt_encoder.requires_grad_(not config.freeze_prompt_encoder)
    sam.mask_decoder.requires_grad_(not config.freeze_mask_decoder)


def prefix(encoder: Any, images: Tensor, num_frozen: int) -> Tensor:
    """Return the activations of the frozen blocks, or the embeddings if all blocks are frozen.

    Args:
        images: B x 3 x S x S, normalised.
        num_frozen: at least 1.

    Returns:
        B x N of `tiny`, B x h x w x C of a ViT, or B x C x h x w embeddings.
    """
    if num_frozen == num_blocks(encoder):
        embedding: Tensor = encoder(images)
        return embedding
    if isinstance(encoder, TinyImageEncoder):
        return torch.cat([level.flatten(1) for level in encoder.levels(images, num_frozen)], dim=1)
    x = _embed_patches(encoder, images)
    for block in encoder.blocks[:num_frozen]:
        x = block(x)
    return x


def suffix(encoder: Any, activations: Tensor, num_frozen: int, recompute: bool = False) -> Tensor:
    """Return the embeddings of `prefix`'s activations, or of images if no block is frozen.

    Args:
        recompute: compute each block again in the backward pass, instead of keeping what it needs.

    Returns:
        B x C x h x w.
    """
    if num_frozen == num_blocks(encoder):
        return activations
    if isinstance(encoder, TinyImageEncoder):
        levels = []
        for channels, side in encoder.level_shapes()[:num_frozen]:
            level, activations = activations.tensor_split([channels * side * side], dim=1)
            levels.append(level.unflatten(1, (channels, side, side)))
        x = levels[-1] if levels else encoder.stem(activations)
        for stage in encoder.stages[num_frozen:]:
            x = _pass(stage, x, recompute)
            levels.append(x)
        embedding: Tensor = encoder.merge(levels)
        return embedding
    x = activations if num_frozen else _embed_patches(encoder, activations)
    for block in encoder.blocks[num_frozen:]:
        x = _pass(block, x, recompute)
    embedding = encoder.neck(x.permute(0, 3, 1, 2))
    return embedding


def prefix_digest(sam: Any, num_frozen: int) -> str:
    """sha256 of the weights that determine `prefix`'s activations."""
    encoder = sam.image_encoder
    state = sam.state_dict()
    if num_frozen == num_blocks(encoder):
        return digest_of(state, prefix="image_encoder.")
    names: tuple[str, ...] = ("patch_embed.", "pos_embed")
    if isinstance(encoder, TinyImageEncoder):
        names = ("stem.",)
    listed = "stages" if isinstance(encoder, TinyImageEncoder) else "blocks"
    names += tuple(f"{listed}.{number}." for number in range(num_frozen))
    own = tuple(f"image_encoder.{name}" for name in names)
    return digest_of({name: value for name, value in state.items() if name.startswith(own)})


def merged_weights(sam: Any) -> dict[str, Tensor]:
    """Return the state dict of a plain SAM, LoRA adapters merged."""
    weights: dict[str, Tensor] = {}
    for name, value in sam.state_dict().items():
        if ".parametrizations.weight.original" in name:
            plain = name.replace(".parametrizations.weight.original", ".weight")
            weights[plain] = sam.get_submodule(plain.removesuffix(".weight")).weight
        elif ".parametrizations." not in name:
            weights[name] = value
    return weights


def trained_state(sam: Any) -> dict[str, Tensor]:
    """Return the parameters that learn, by name, adapters not merged."""
    return {name: value for name, value in sam.named_parameters() if value.requires_grad}


def _embed_patches(encoder: Any, images: Tensor) -> Tensor:
    """The tokens before the first block of a ViT, B x h x w x C."""
    x: Tensor = encoder.patch_embed(images)
    return x if encoder.pos_embed is None else x + encoder.pos_embed


def _pass(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return y


def _suffix_modules(encoder: Any, num_frozen: int) -> list[nn.Module]:
    if isinstance(encoder, TinyImageEncoder):
        mergers = (getattr(encoder, f"from_stride_{stride}") for stride in (4, 8, 16, 32))
        return [*encoder.stages[num_frozen:], *mergers, encoder.neck]
    return [*encoder.blocks[num_frozen:], encoder.neck]
