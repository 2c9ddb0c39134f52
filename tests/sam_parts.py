"""Real SAM classes made small, and weights in which every tensor matters."""

import numpy as np
import torch
from segment_anything.modeling import ImageEncoderViT

from samray.data.dataset import ImageRecord, Instance
from samray.geometry.masks import CroppedMask, encode_rle
from samray.sam.model import build_tiny


def small_sam(seed=0):
    """A `tiny` of 64 pixels: 4 x 4 embedding cells, 16 x 16 masks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return add_noise(build_tiny(img_size=64, embed_dim=32).eval(), seed)


def small_vit(seed=0):
    """SAM's ViT of 64 pixels with three blocks, two of them windowed, and `small_sam`'s decoder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_tiny(img_size=64, embed_dim=32)
        sam.image_encoder = ImageEncoderViT(
            img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4, out_chans=32,
            use_rel_pos=True, window_size=2, global_attn_indexes=(1,),
        )  # fmt: skip
        return add_noise(sam.eval(), seed)


def add_noise(sam, seed=0):
    """Move tensors that start at zero, such as relative positions, so that errors in them show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sam.parameters():
            if not parameter.any():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return sam


def blob_record(name, size, num_instances, seed=0):
    """An image record with `num_instances` rectangles and discs as masks."""
    rng = np.random.default_rng(seed)
    instances = []
    rows, columns = np.mgrid[: size[0], : size[1]]
    for _ in range(num_instances):
        y, x = rng.integers(5, size[0] - 5), rng.integers(5, size[1] - 5)
        mask = (rows - y) ** 2 + (columns - x) ** 2 <= rng.integers(3, 12) ** 2
        cropped = CroppedMask(mask, (0, 0))
        instances.append(Instance("blob", cropped.box, int(mask.sum()), encode_rle(cropped, size)))
    return ImageRecord(name, name, f"{seed:064x}", size, tuple(instances), 0, 0)
