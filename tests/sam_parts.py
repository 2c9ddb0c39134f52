"""Real SAM classes made small, and weights in which every tensor matters."""

import numpy as np
import torch

from samray.data.dataset import ImageRecord, Instance
from samray.geometry.masks import CroppedMask, encode_rle
from samray.sam.model import build_tiny


def small_sam(seed=0):
    """A `tiny` of 64 pixels: 4 x 4 embedding cells, 16 x 16 masks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return add_noise(build_tiny(img_size=64, embed_dim=32).eval(), seed)


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
