"""Attention with the stock modules' weights, and the same numbers up to rounding, in less time.

The ViT's, on a CPU: `segment_anything` writes the whole matrix of weights to memory several times:
800 MB each for one image in a global block of ViT-B. Here some rows of queries at a time go through
torch's fused attention, with the relative position as its bias.

The mask decoder's, between few tokens and the many cells of an image: the stock module projects all
cells. (x W) q equals x (W q), so here the few tokens are projected twice and the cells not at all.

Letters: P prompts, T tokens of each, N cells of the image, C channels.
"""

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
from segment_anything.modeling.transformer import Attention as CrossAttention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Bytes of the bias at once. Of a global block of ViT-B that is 4 of 64 rows: fewer or more took
# longer, as the bias should stay in the processor's cache.
BIAS_BYTES = 50 * 2**20


class FusedAttention(Attention):  # type: ignore[misc]
    """Stock attention with relative positions; fused where no gradient is needed on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same shape."""
        # Fused kernels need a bias without gradient.
        if torch.is_grad_enabled() or x.device.type != "cpu" or not self.use_rel_pos:
            stock: Tensor = super().forward(x)
            return stock
        batch, height, width, _ = x.shape
        heads = self.num_heads
        # 3 x B x heads x HW x C / heads
        qkv = self.qkv(x).reshape(batch, height * width, 3, heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        query = query.reshape(batch, heads, height, width, -1)
        of_rows = get_rel_pos(height, height, self.rel_pos_h)  # query row, key row, C / heads
        of_columns = get_rel_pos(width, width, self.rel_pos_w)
        row_bytes = x.element_size() * batch * heads * height * width**2
        size = max(1, BIAS_BYTES // row_bytes)
        found = []
        for start in range(0, height, size):
            rows = query[:, :, start : start + size]
            on_row = torch.einsum("bnhwc,hkc->bnhwk", rows, of_rows[start : start + size])
            on_column = torch.einsum("bnhwc,wkc->bnhwk", rows, of_columns)
            bias = (on_row[..., :, None] + on_column[..., None, :]).flatten(4).flatten(2, 3)
            found.append(
                scaled_dot_product_attention(
                    rows.flatten(2, 3), key, value, attn_mask=bias, scale=self.scale
                )
            )
        together = torch.cat(found, dim=2).transpose(1, 2).reshape(batch, height, width, -1)
        projected: Tensor = self.proj(together)
        return projected


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Let an image encoder's blocks use `FusedAttention`, in place; weights and names stay."""
    for block in encoder.blocks:
        block.attn.__class__ = FusedAttention


def tokens_to_image(
    attention: CrossAttention, tokens: Tensor, keys: Tensor, cells: Tensor
) -> Tensor:
    """Return what `attention(tokens, keys, cells)` does.

    Args:
        tokens: P x T x C.
        keys: P x N x C, the cells with their positions.
        cells: P x N x C.

    Returns:
        P x T x C.
    """
    query = _heads(attention.q_proj(tokens), attention)  # P x heads x T x C'
    if _projecting_is_cheaper(attention, tokens):
        key, value = attention.k_proj(keys), attention.v_proj(cells)
        seen = scaled_dot_product_attention(query, _heads(key, attention), _heads(value, attention))
    else:
        # The bias of `k_proj` adds the same to all cells, which the softmax removes.
        query = query * query.shape[-1] ** -0.5 @ _rows_by_head(attention.k_proj, attention)
        weights = (query.flatten(1, 2) @ keys.transpose(1, 2)).softmax(dim=-1)  # P x heads T x N
        seen = (weights @ cells).view(query.shape)  # P x heads x T x C
        seen = seen @ _rows_by_head(attention.v_proj, attention).transpose(1, 2)
        seen = seen + attention.v_proj.bias.view(attention.num_heads, 1, -1)
    projected: Tensor = attention.out_proj(seen.transpose(1, 2).flatten(2))
    return projected


def image_to_tokens(
    attention: CrossAttention, keys: Tensor, tokens: Tensor, values: Tensor
) -> Tensor:
    """Return what `attention(keys, tokens, values)` does.

    Args:
        keys: P x N x C, the cells with their positions.
        tokens: P x T x C, with their positions.
        values: P x T x C, without.

    Returns:
        P x N x C.
    """
    key = _heads(attention.k_proj(tokens), attention)  # P x heads x T x C'
    value = _heads(attention.v_proj(values), attention)
    heads = attention.num_heads
    if _projecting_is_cheaper(attention, tokens):
        query = _heads(attention.q_proj(keys), attention)
        seen = scaled_dot_product_attention(query, key, value)
        projected: Tensor = attention.out_proj(seen.transpose(1, 2).flatten(2))
        return projected
    # Tokens before heads: a softmax over the second of few dimensions is vectorised over the cells.
    key = key * key.shape[-1] ** -0.5
    rows = (key @ _rows_by_head(attention.q_proj, attention)).transpose(1, 2).flatten(1, 2)
    bias = (key @ attention.q_proj.bias.view(heads, -1, 1)).transpose(1, 2).flatten(1, 2)
    scores = torch.baddbmm(bias, rows, keys.transpose(1, 2))  # P x T heads x N
    weights = scores.unflatten(1, (-1, heads)).softmax(dim=1).flatten(1, 2)
    out = attention.out_proj.weight.t().unflatten(0, (heads, -1))  # heads x C' x C
    # The weights of each head sum to one, so each token brings the head's share of the bias.
    answers = (value @ out + attention.out_proj.bias / heads).transpose(1, 2).flatten(1, 2)
    summed: Tensor = weights.transpose(1, 2) @ answers
    return summed


def _projecting_is_cheaper(attention: CrossAttention, tokens: Tensor) -> bool:
    return bool(attention.num_heads * tokens.shape[1] > attention.internal_dim)


def _heads(x: Tensor, attention: CrossAttention) -> Tensor:
    """P x T x C -> P x heads x T x C / heads."""
    split: Tensor = x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    return split


def _rows_by_head(layer: torch.nn.Linear, attention: CrossAttention) -> Tensor:
    """The weight that makes each head's channels: heads x C' x C."""
    rows: Tensor = layer.weight.unflatten(0, (attention.num_heads, -1))
    return rows
