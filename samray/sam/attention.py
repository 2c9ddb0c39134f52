"""The ViT's attention on a CPU, faster than the stock module and without its whole matrix.

`segment_anything` writes the whole matrix of weights to memory several times: 800 MB each for one
image in a global block of ViT-B. Here some rows of queries at a time go through torch's fused
attention, with the relative position as its bias. The numbers are the same, up to rounding.
"""

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, get_rel_pos
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
