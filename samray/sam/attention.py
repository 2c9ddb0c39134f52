"""Attention with the stock modules' weights, and the same numbers up to rounding, in less time.

The ViT's: `segment_anything` writes the whole matrix of weights to memory several times, 800 MB
each for one image in a global block of ViT-B, and the system clears every page of it. Without
gradients, on a CPU, a block goes through an image in strips that stay in the processor's cache;
elsewhere torch's fused attention sees the relative positions as channels of queries and keys.

The mask decoder's, between few tokens and the many cells of an image: the stock module projects all
cells. (x W) q equals x (W q), so here the few tokens are projected twice and the cells not at all.

Letters: P prompts, T tokens of each, N cells of the image, C channels.
"""

import functools

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, get_rel_pos
from segment_anything.modeling.transformer import Attention as CrossAttention
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

SCORES_BYTES = 16 * 2**20  # of one head's scores on a CPU: more and fewer took longer
STRIP_ROWS = 8  # of an image in a global block: 512 tokens of a ViT at 1024 pixels


class FusedBlock(Block):  # type: ignore[misc]
    """Stock transformer block; in strips of the image where no gradient is needed on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same shape."""
        stock = x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if stock or torch.is_grad_enabled() or not self.attn.use_rel_pos:
            passed: Tensor = super().forward(x)
            return passed
        keep_freed_memory()
        x = x.clone()
        for image in x:
            if self.window_size:
                for strip in image.split(self.window_size):
                    _attend_in_windows(self, strip)
            else:
                _attend_to_all(self, image)
            for strip in image.split(STRIP_ROWS):
                strip += self.mlp(self.norm2(strip))
        return x


def _attend_in_windows(block: FusedBlock, strip: Tensor) -> None:
    """Add the attention in one row of windows to its cells, up to window x W x C, in place."""
    attention, side, heads = block.attn, block.window_size, block.attn.num_heads
    height, width, _ = strip.shape
    number = -(-width // side)
    # Cells outside the image are zeros to the stock block, which projects them, too.
    projected = attention.qkv.bias.repeat(side, number * side, 1)
    projected[:height, :width] = attention.qkv(block.norm1(strip))
    split = projected.view(side, number, side, 3, heads, -1).permute(3, 1, 4, 0, 2, 5)
    query, key, value = split.flatten(1, 2).contiguous()  # windows and heads x side x side x C'
    positions = _positions(attention, side, side)
    seen = _seen(query, key.flatten(1, 2), value.flatten(1, 2), *positions, attention.scale)
    seen = seen.view(number, heads, side, side, -1).permute(2, 0, 3, 1, 4)
    strip += attention.proj(seen.reshape(side, number * side, -1)[:height, :width])


def _attend_to_all(block: FusedBlock, image: Tensor) -> None:
    """Add the attention of all cells to all cells, H x W x C, in place."""
    attention, heads = block.attn, block.attn.num_heads
    height, width, channels = image.shape
    projected = image.new_empty(3, heads, height, width, channels // heads)
    strips = range(0, height, STRIP_ROWS)
    for start in strips:
        rows = slice(start, start + STRIP_ROWS)
        split = attention.qkv(block.norm1(image[rows])).unflatten(2, (3, heads, -1))
        projected[:, :, rows] = split.permute(2, 3, 0, 1, 4)
    query, key, value = projected
    of_rows, of_columns = _positions(attention, height, width)
    size = max(1, SCORES_BYTES // (image.element_size() * height * width**2))
    for head in range(heads):
        keys, values = key[head].flatten(0, 1)[None], value[head].flatten(0, 1)[None]
        for start in range(0, height, size):
            some, relative = query[head, start : start + size], of_rows[start : start + size]
            # What is seen takes the place of the queries, which nobody needs again.
            some[:] = _seen(
                some[None], keys, values, relative, of_columns, attention.scale
            ).view_as(some)
    for start in strips:
        rows = slice(start, start + STRIP_ROWS)
        image[rows] += attention.proj(query[:, rows].permute(1, 2, 0, 3).flatten(2))


def _positions(attention: Attention, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Relative positions, H x H x C' of query rows and key rows, and W x W x C' of columns."""
    return _relative(height, attention.rel_pos_h), _relative(width, attention.rel_pos_w)


def _relative(size: int, table: Tensor) -> Tensor:
    """Return `get_rel_pos(size, size, table)`, size x size x C'.

    The stock function indexes by a tensor on the host, and copying it waits for the GPU.
    """
    if len(table) != 2 * size - 1:
        interpolated: Tensor = get_rel_pos(size, size, table)
        return interpolated
    at = torch.arange(size, device=table.device)
    return table[at[:, None] - at + size - 1]


def _seen(
    query: Tensor, key: Tensor, value: Tensor, of_rows: Tensor, of_columns: Tensor, scale: float
) -> Tensor:
    """Attend from R rows of cells to all of H rows.

    Args:
        query: G x R x W x C'.
        key, value: G x HW x C'.
        of_rows: relative positions, R x H x C'.
        of_columns: the same, W x W x C'.

    Returns:
        G x RW x C'.
    """
    scores = _bias(query, of_rows, of_columns)
    scores.baddbmm_(query.flatten(1, 2), key.transpose(1, 2), alpha=scale)
    return scores.softmax(dim=-1) @ value


def _bias(query: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """The relative positions' part of the scores, G x RW x HW; arguments as in `_seen`."""
    on_row = query @ of_rows.transpose(1, 2)  # G x R x W x H
    on_column = (query.transpose(1, 2) @ of_columns.transpose(1, 2)).transpose(1, 2)
    # In this order of the axes in memory: the sum alone would take that of its parts.
    bias = on_row.new_empty(*on_row.shape, on_column.shape[-1])
    torch.add(on_row[..., :, None], on_column[..., None, :], out=bias)
    return bias.flatten(3).flatten(1, 2)


class FusedAttention(Attention):  # type: ignore[misc]
    """Stock attention with relative positions, by torch's fused kernels.

    As their bias, the relative positions would be a matrix of all pairs of cells for each head. A
    score is q k + r[row of the key] + s[column of the key], though, which is one product of longer
    vectors: of [q, r, s] with [k, the row as one-hot vector, the column as one-hot vector]. So
    there is no matrix in memory, and a gradient needs none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """B x H x W x C -> the same shape."""
        if not self.use_rel_pos:
            stock: Tensor = super().forward(x)
            return stock
        height, width = x.shape[1:3]
        # 3 x B x heads x H x W x C'
        split = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query, key, value = split
        # The kernel scales the whole product.
        of_rows, of_columns = (
            (of / self.scale).to(query.dtype) for of in _positions(self, height, width)
        )
        on_row = torch.einsum("bnhwc,hkc->bnhwk", query, of_rows)
        on_column = torch.einsum("bnhwc,wkc->bnhwk", query, of_columns)
        eye = functools.partial(torch.eye, dtype=query.dtype, device=query.device)
        places = [
            eye(height)[:, None].expand(height, width, height),
            eye(width)[None].expand(height, width, width),
        ]
        channels = key.shape[-1]
        zeros = -(channels + height + width) % 8  # fused kernels need multiples of 8
        place = pad(torch.cat(places, dim=-1), (0, zeros)).expand(*key.shape[:-1], -1)
        query = pad(torch.cat([query, on_row, on_column], dim=-1), (0, zeros))
        key = torch.cat([key, place], dim=-1)
        value = pad(value, (0, query.shape[-1] - channels))  # some need equal lengths
        query, key, value = (tensor.flatten(2, 3) for tensor in (query, key, value))
        seen = scaled_dot_product_attention(query, key, value, scale=self.scale)[..., :channels]
        projected: Tensor = self.proj(
            seen.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4).flatten(3)
        )
        return projected


def fuse_attention(encoder: ImageEncoderViT) -> None:
    """Let an image encoder use `FusedBlock` and `FusedAttention`, in place; weights stay."""
    for block in encoder.blocks:
        block.__class__, block.attn.__class__ = FusedBlock, FusedAttention


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc reuse tensors' memory instead of giving it back to the system after each layer.

    Its limits are 128 kB until a larger block is freed, then as large as this one, up to 32 MiB
    (M_MMAP_THRESHOLD in `man mallopt`). With its first limits a ViT's decoder waits a quarter of
    its time for the system to clear pages.
    """
    torch.empty(2**25 - 2**14, dtype=torch.uint8)


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
