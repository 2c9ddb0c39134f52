"""The image encoder of `tiny`: a small convolutional pyramid with the interface of SAM's ViT.

Like MobileSAM's TinyViT it replaces the ViT and keeps SAM's prompt encoder and mask decoder.
Convolutions need fewer images to train than attention, and cost less on a CPU.
"""

from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (48, 80, 136, 192)  # channels of the stages of stride 4, 8, 16 and 32
DEPTHS = (2, 2, 2, 2)  # residual blocks of each stage


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with a skip connection.

    GroupNorm, as batches are too small for BatchNorm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        nn.init.zeros_(self.norm2.weight)  # each block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class TinyImageEncoder(nn.Module):
    """Stages of stride 4, 8, 16 and 32, merged into one embedding at stride 16, as in SAM's ViT.

    Args:
        img_size: side of the square input, in pixels.
        embed_dim: channels of the embedding.
    """

    def __init__(self, img_size: int, embed_dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        channels_in = WIDTHS[0] // 2
        self.stem = _halve(3, channels_in)
        self.stages = nn.ModuleList()
        for channels, depth in zip(WIDTHS, DEPTHS, strict=True):
            blocks = [ResidualBlock(channels) for _ in range(depth)]
            self.stages.append(nn.Sequential(*_halve(channels_in, channels), *blocks))
            channels_in = channels
        # Finer stages contribute edges, the coarsest one context.
        self.from_stride_4 = nn.Conv2d(WIDTHS[0], embed_dim, 4, stride=4)
        self.from_stride_8 = nn.Conv2d(WIDTHS[1], embed_dim, 2, stride=2)
        self.from_stride_16 = nn.Conv2d(WIDTHS[2], embed_dim, 1)
        self.from_stride_32 = nn.Conv2d(WIDTHS[3], embed_dim, 1)
        self.neck = nn.Sequential(
            nn.GroupNorm(8, embed_dim),
            nn.ReLU(),
            ResidualBlock(embed_dim),
            nn.Conv2d(embed_dim, embed_dim, 3, padding=1, bias=False),
            LayerNorm2d(embed_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """B x 3 x S x S, normalised -> B x embed_dim x S/16 x S/16."""
        return self.merge(self.levels(x, len(self.stages)))

    def levels(self, x: Tensor, count: int) -> list[Tensor]:
        """Return the outputs of the first stages, at least one."""
        levels = [self.stages[0](self.stem(x))]
        for stage in self.stages[1:count]:
            levels.append(stage(levels[-1]))
        return levels

    def level_shapes(self) -> list[tuple[int, int]]:
        """Return (channels, side) of each stage's output."""
        return [(width, self.img_size // 4 >> place) for place, width in enumerate(WIDTHS)]

    def merge(self, levels: list[Tensor]) -> Tensor:
        """Return the embedding of the outputs of all stages."""
        merged = F.interpolate(self.from_stride_32(levels[3]), scale_factor=2, mode="nearest")
        merged = merged + self.from_stride_16(levels[2])
        merged = merged + self.from_stride_8(levels[1]) + self.from_stride_4(levels[0])
        embedding: Tensor = self.neck(merged)
        return embedding


def _halve(channels_in: int, channels: int) -> nn.Sequential:
    """A convolution that halves height and width."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(8, channels),
        nn.ReLU(),
    )
