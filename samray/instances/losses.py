"""The loss of the instance decoder, of each image; padding and unknown regions do not count.

Letters: B images, g x g cells, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samray.instances.decoder import CLASS_CELL, Maps
from samray.instances.targets import BACKGROUND, UNKNOWN, MapTargets

CLASS_WEIGHT = 0.25  # so that the features that the outlines need are not given up for the classes


@dataclass
class TargetMaps:
    """`MapTargets` of B images as tensors.

    Attributes:
        foreground, known: B x g x g float32, 0 or 1.
        center, boundary: B x g x g float32.
        classes: B x g x g int64.
    """

    foreground: Tensor
    known: Tensor
    center: Tensor
    boundary: Tensor
    classes: Tensor

    @classmethod
    def of(cls, targets: list[MapTargets]) -> "TargetMaps":
        """Stack the targets of a batch."""
        numbers = torch.from_numpy(np.stack([target.numbers for target in targets]))
        return cls(
            (numbers > BACKGROUND).float(),
            (numbers != UNKNOWN).float(),
            torch.from_numpy(np.stack([target.center for target in targets])),
            torch.from_numpy(np.stack([target.boundary for target in targets])),
            torch.from_numpy(np.stack([target.classes for target in targets])),
        )

    def to(self, device: torch.device) -> "TargetMaps":
        """Copy to a device."""
        return TargetMaps(*(value.to(device) for value in vars(self).values()))


def instance_loss(maps: Maps, targets: TargetMaps) -> Tensor:
    """Return the loss of each image: B float32.

    Cross-entropy and Dice of the foreground, squared errors of the two distances on the objects,
    cross-entropy of the class on the objects.
    """
    inside = targets.foreground * targets.known
    logits = maps.foreground.float()
    entropy = F.binary_cross_entropy_with_logits(logits, targets.foreground, reduction="none")
    probability = logits.sigmoid() * targets.known
    overlap = (probability * inside).sum(dim=(1, 2))
    dice = 1 - (2 * overlap + 1) / ((probability + inside).sum(dim=(1, 2)) + 1)
    distances = (maps.center.float() - targets.center).square()
    distances = distances + (maps.boundary.float() - targets.boundary).square()
    loss = _mean(entropy, targets.known) + dice + 10 * _mean(distances, inside)
    if maps.classes.shape[1] > 1:
        cells = (slice(None), *[slice(None, None, CLASS_CELL)] * 2)
        entropy = F.cross_entropy(maps.classes.float(), targets.classes[cells], reduction="none")
        loss = loss + CLASS_WEIGHT * _mean(entropy, inside[cells])
    return loss


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the cells of each image; 0 without weight."""
    return (values * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2)).clamp_min(1)
