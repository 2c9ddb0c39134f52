"""SAM's training loss per instance; padding of the frame does not count.

Letters: P instances, C masks each, h x w low-resolution cells.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchvision.ops import sigmoid_focal_loss


def focal_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Mean focal loss over the valid cells (alpha 0.25, gamma 2; Lin et al., RetinaNet).

    Args:
        logits: P x C x h x w.
        targets: P x 1 x h x w, fraction of each cell that the object covers.
        valid: P x 1 x h x w, fraction of each cell that is image and not padding.

    Returns:
        P x C.
    """
    loss = sigmoid_focal_loss(logits, targets.expand_as(logits), alpha=0.25, gamma=2.0)
    mean: Tensor = (loss * valid).sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1))
    return mean


def balanced_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Cross-entropy with equal weight for object and background, however small the object.

    Shapes as in `focal_loss`.
    """
    targets = targets.expand_as(logits)
    loss = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    background = (1 - targets) * valid
    on_object = (loss * targets).sum(dim=(-2, -1)) / targets.sum(dim=(-2, -1)).clamp_min(1e-6)
    total = background.sum(dim=(-2, -1)).clamp_min(1e-6)
    on_background = (loss * background).sum(dim=(-2, -1)) / total
    return (on_object + on_background) / 2


def dice_loss(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """One minus the Dice coefficient, smoothed by one cell (Milletari et al., V-Net).

    Shapes as in `focal_loss`.
    """
    probabilities = logits.sigmoid() * valid
    overlap = (probabilities * targets).sum(dim=(-2, -1))
    total = probabilities.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1))
    return 1 - (2 * overlap + 1) / (total + 1)


def low_res_iou(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """IoU of the thresholded masks with the targets, without gradient.

    Fractions of cells count as areas, so an object smaller than a cell does not divide by zero.

    Returns:
        P x C in 0..1.
    """
    with torch.no_grad():
        predicted = (logits > 0).to(targets.dtype) * valid
        overlap = torch.minimum(predicted, targets).sum(dim=(-2, -1))
        union = torch.maximum(predicted, targets).sum(dim=(-2, -1))
        return overlap / union.clamp_min(1e-6)


def sam_loss(
    logits: Tensor,
    iou_predictions: Tensor,
    targets: Tensor,
    valid: Tensor,
    weights: tuple[float, float, float],
    balanced_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Return the loss of a group of instances, summed over the instances.

    Of several masks for one ambiguous prompt only the best one's loss counts (Segment Anything,
    appendix A); the IoU head is trained on all of them.

    Args:
        logits: P x C x h x w.
        iou_predictions: P x C.
        targets, valid: P x 1 x h x w.
        weights: of focal, Dice and IoU loss.
        balanced_weight: of the balanced cross-entropy, which helps training from random weights.

    Returns:
        `loss` (weighted), `loss_focal`, `loss_dice`, `loss_iou`: sums, which the caller divides by
        the number of instances of the step.
    """
    focal_weight, dice_weight, iou_weight = weights
    focal = focal_loss(logits, targets, valid)
    dice = dice_loss(logits, targets, valid)
    mask_loss = focal_weight * focal + dice_weight * dice
    if balanced_weight > 0:
        mask_loss = mask_loss + balanced_weight * balanced_loss(logits, targets, valid)
    best = mask_loss.argmin(dim=1, keepdim=True)  # P x 1
    loss_focal = focal.gather(1, best).sum()
    loss_dice = dice.gather(1, best).sum()
    true_iou = low_res_iou(logits, targets, valid)
    loss_iou = (iou_predictions - true_iou).square().mean(dim=1).sum()
    return {
        "loss": mask_loss.gather(1, best).sum() + iou_weight * loss_iou,
        "loss_focal": loss_focal,
        "loss_dice": loss_dice,
        "loss_iou": loss_iou,
    }
