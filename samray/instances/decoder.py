"""The instance decoder: maps of all objects of an image, from SAM's embedding and the pixels.

The embedding says what is there; at 16 pixels a cell it cannot say where a small object ends. A
shallow path from the pixels can. Both meet in a small pyramid, whose output has two pixels of the
decoder's frame a cell.

Letters: B images, F side of the decoder's frame in pixels, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 64, 96)  # channels at strides 4, 8 and 16 of the decoder's frame
CELL = 2  # pixels of the frame a cell of the maps
CLASS_CELL = 2  # cells of the maps a cell of the classes: what an object is needs no fine outline
CLASS_SCALE = 4.0
MAX_FRAME = 1024


@dataclass(frozen=True)
class Maps:
    """What the decoder says about each cell.

    Attributes:
        foreground: B x g x g float32 logits, above 0 is some object.
        center: B x g x g float32 in 0..1, normalised distance to the object's centre.
        boundary: B x g x g float32 in 0..1, normalised distance to the object's outline.
        classes: B x K x g/2 x g/2 float32 logits.
    """

    foreground: Tensor
    center: Tensor
    boundary: Tensor
    classes: Tensor


class Block(nn.Module):
    """A 3 x 3 convolution with a skip connection; GroupNorm, as batches are small."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class InstanceDecoder(nn.Module):
    """Embedding and pixels to maps.

    Args:
        embed_dim: channels of the embedding.
        img_size: side of the model's frame, in pixels.
        num_classes: at least 1.
    """

    def __init__(self, embed_dim: int, img_size: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.frame = frame_of(img_size)
        fine, middle, coarse = WIDTHS
        # Pixels become channels before the first convolution, and channels cells after the last:
        # all of them run at stride 4, where they cost a quarter.
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(4), nn.Conv2d(48, fine, 3, padding=1, bias=False),
            nn.GroupNorm(8, fine), nn.ReLU(), Block(fine),
        )  # fmt: skip
        self.down_8 = nn.Sequential(_halve(fine, middle), Block(middle))
        self.down_16 = nn.Sequential(_halve(middle, coarse), Block(coarse))
        self.from_embedding = nn.Conv2d(embed_dim, coarse, 1)
        self.merge_16 = nn.Sequential(Block(coarse), Block(coarse))
        self.up_8 = nn.Conv2d(coarse, middle, 1)
        self.merge_8 = Block(middle)
        self.up_4 = nn.Conv2d(middle, fine, 1)
        self.merge_4 = nn.Sequential(Block(fine), Block(fine))
        self.head = nn.Conv2d(fine, 4 * 3, 3, padding=1)
        self.classify_fine = nn.Conv2d(fine, num_classes, 1)
        self.classify_coarse = nn.Conv2d(coarse, num_classes, 1)

    def forward(self, embeddings: Tensor, pixels: Tensor) -> Maps:
        """Return the maps of B images.

        Args:
            embeddings: B x embed_dim x h x w.
            pixels: B x 3 x F x F float32, normalised as for the encoder.
        """
        # The layers keep the order of the input. A CPU's convolutions are faster with this one.
        at_4 = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        at_8 = self.down_8(at_4)
        at_16 = self.down_16(at_8)
        context = F.interpolate(
            self.from_embedding(embeddings), at_16.shape[-2:], mode="bilinear", align_corners=False
        )
        coarse = self.merge_16(at_16 + context)
        x = self.merge_8(at_8 + _double(self.up_8(coarse)))
        x = self.merge_4(at_4 + _double(self.up_4(x)))
        foreground, center, boundary = F.pixel_shuffle(self.head(x), 2).unbind(1)
        # The classes start from random weights in every run: CLASS_SCALE lets few steps suffice.
        classes = self.classify_fine(x) + _double(_double(self.classify_coarse(coarse)))
        return Maps(foreground, center.sigmoid(), boundary.sigmoid(), CLASS_SCALE * classes)


def frame_of(img_size: int) -> int:
    """Side of the decoder's frame in pixels: finer than a small model's own."""
    return max(img_size, min(2 * img_size, MAX_FRAME))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _halve(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(8, channels),
        nn.ReLU(),
    )
