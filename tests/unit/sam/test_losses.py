"""The loss on masks small enough to count by hand, and its gradients."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from samray.sam.losses import dice_loss, focal_loss, low_res_iou, sam_loss

SURE = 50.0  # a logit whose sigmoid is 1 in float32
WEIGHTS = (20.0, 1.0, 1.0)


def cells(text: str) -> Tensor:
    """1 x 1 x h x w: `#` is 1, `.` is 0, a digit n is n / 10."""
    value = {"#": 1.0, ".": 0.0} | {str(n): n / 10 for n in range(10)}
    return torch.tensor([[[[value[c] for c in row] for row in text.split()]]])


TARGET = cells("##.. ##.. .... ....")  # 4 cells
FULL = torch.ones(1, 1, 4, 4)


def logits_of(mask: Tensor) -> Tensor:
    return (2 * mask - 1) * SURE


def instances(num: int, masks: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random (logits, iou_predictions, targets, valid) in frames padded at the bottom."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num, masks, 4, 4, generator=generator)
    iou_predictions = torch.rand(num, masks, generator=generator)
    valid = FULL.repeat(num, 1, 1, 1)
    valid[:, :, 3] = 0
    targets = torch.rand(num, 1, 4, 4, generator=generator) * valid
    return logits, iou_predictions, targets, valid


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        ("##.. ##.. .... ....", 0.0),  # 1 - (2 * 4 + 1) / (4 + 4 + 1)
        (".##. .##. .... ....", 1 - 5 / 9),  # overlap 2 of 4 and 4
        ("#... .... .... ....", 1 - 3 / 6),  # overlap 1 of 1 and 4
        ("..## ..## .... ....", 1 - 1 / 9),
        (".... .... .... ....", 1 - 1 / 5),
        ("#### #### #### ####", 1 - 9 / 21),
    ],
)
def test_dice_of_a_4_x_4_mask_by_hand(predicted: str, expected: float) -> None:
    loss = dice_loss(logits_of(cells(predicted)), TARGET, FULL)
    assert loss.shape == (1, 1)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_focal_equals_torchvisions_on_a_full_frame_for_each_of_the_masks() -> None:
    logits, _, targets, _ = instances(2, 3)
    loss = focal_loss(logits, targets, torch.ones(2, 1, 4, 4))
    assert loss.shape == (2, 3)
    for p in range(2):
        for c in range(3):
            expected = sigmoid_focal_loss(logits[p, c], targets[p, 0], 0.25, 2.0, "mean")
            assert loss[p, c].item() == pytest.approx(expected.item(), rel=1e-5)


def test_focal_of_undecided_cells_by_hand_has_alpha_on_the_foreground() -> None:
    """At logit 0: log 2 times 0.5 squared, times 0.25 on foreground, 0.75 on background."""
    loss = focal_loss(torch.zeros(1, 1, 4, 4), TARGET, FULL).item()
    assert loss == pytest.approx(math.log(2) * 0.25 * (4 * 0.25 + 12 * 0.75) / 16, rel=1e-5)


@pytest.mark.parametrize("in_padding", [SURE, -SURE, 3.0])
def test_padding_changes_nothing(in_padding: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    targets = torch.rand(2, 1, 4, 4, generator=generator)
    iou_predictions = torch.rand(2, 3, generator=generator)
    bare = sam_loss(logits, iou_predictions, targets, torch.ones(2, 1, 4, 4), WEIGHTS)

    def pad(content: Tensor, value: float) -> Tensor:
        return torch.nn.functional.pad(content, (0, 3, 0, 4), value=value)

    padded = pad(logits, in_padding).requires_grad_()
    valid = pad(torch.ones(2, 1, 4, 4), 0.0)
    parts = sam_loss(padded, iou_predictions, pad(targets, 0.0), valid, WEIGHTS)
    for name, value in bare.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
    parts["loss"].backward()
    assert not padded.grad[:, :, 4:].any()
    assert not padded.grad[:, :, :, 4:].any()


@pytest.mark.parametrize(
    ("predicted", "target", "expected"),
    [
        ("##.. ##.. .... ....", "##.. ##.. .... ....", 1.0),
        (".##. .##. .... ....", "##.. ##.. .... ....", 2 / 6),
        (".... .... .... ....", "##.. ##.. .... ....", 0.0),
        ("#... .... .... ....", "5... .... .... ....", 0.5),  # half a cell's area of one cell
        ("##.. .... .... ....", "#52. .... .... ....", 1.5 / 2.2),  # min 1 + 0.5; max 1 + 1 + 0.2
        ("#### .... .... ....", "3333 .... .... ....", 1.2 / 4),
    ],
)
def test_iou_by_hand_counts_fractions_as_areas(
    predicted: str, target: str, expected: float
) -> None:
    iou = low_res_iou(logits_of(cells(predicted)), cells(target), FULL)
    assert iou.item() == pytest.approx(expected, abs=1e-6)


def test_iou_cuts_logits_at_zero_and_not_at_a_half() -> None:
    logits = torch.full((1, 1, 4, 4), 0.2)
    assert low_res_iou(logits, FULL, FULL).item() == 1
    assert low_res_iou(-logits, FULL, FULL).item() == 0


def test_iou_takes_no_mask_in_the_padding_into_account() -> None:
    valid = cells("#### #### .... ....")
    assert low_res_iou(FULL * SURE, cells("#### #### .... ...."), valid).item() == 1


def three_masks() -> tuple[Tensor, Tensor]:
    """Logits of which the second is the best, and predictions of their IoU."""
    wrong, right, half = (
        cells(f"{rows} .... ....") for rows in ("..## ..##", "##.. ##..", "#... #...")
    )
    logits = (2 * torch.cat([wrong, right, half], dim=1) - 1) * 2.0
    return logits.requires_grad_(), torch.tensor([[0.5, 0.5, 0.5]], requires_grad=True)


def test_gradient_of_the_mask_loss_flows_only_through_the_best_of_three() -> None:
    logits, iou_predictions = three_masks()
    sam_loss(logits, iou_predictions, TARGET, FULL, WEIGHTS)["loss"].backward()
    moved = logits.grad.abs().sum(dim=(2, 3))[0]
    assert moved[1] > 0
    assert moved[0] == moved[2] == 0


def test_iou_head_is_trained_on_all_three_masks() -> None:
    logits, iou_predictions = three_masks()
    parts = sam_loss(logits, iou_predictions, TARGET, FULL, WEIGHTS)
    # True IoUs are 0, 1 and 1/2: ((0.5 - 0)^2 + (0.5 - 1)^2 + 0) / 3.
    assert parts["loss_iou"].item() == pytest.approx(0.5 / 3)
    parts["loss"].backward()
    assert iou_predictions.grad[0].tolist() == pytest.approx([1 / 3, -1 / 3, 0])


def test_best_mask_is_chosen_for_each_instance_by_itself() -> None:
    logits, iou_predictions = three_masks()
    flipped = torch.cat([logits, logits.flip(1)]).detach().requires_grad_()
    targets = torch.cat([TARGET, cells("..## ..## .... ....")])
    parts = sam_loss(
        flipped, iou_predictions.repeat(2, 1), targets, FULL.repeat(2, 1, 1, 1), WEIGHTS
    )
    parts["loss"].backward()
    moved = flipped.grad.abs().sum(dim=(2, 3)) > 0
    assert moved.tolist() == [[False, True, False], [False, False, True]]


def test_parts_are_those_of_the_best_mask_and_loss_is_their_weighted_sum() -> None:
    logits, iou_predictions = three_masks()
    parts = sam_loss(logits, iou_predictions, TARGET, FULL, (20.0, 3.0, 0.5))
    focal, dice = focal_loss(logits, TARGET, FULL), dice_loss(logits, TARGET, FULL)
    assert parts["loss_focal"].item() == pytest.approx(focal[0, 1].item())
    assert parts["loss_dice"].item() == pytest.approx(dice[0, 1].item())
    expected = 20 * focal[0, 1] + 3 * dice[0, 1] + 0.5 * parts["loss_iou"]
    assert parts["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("logit", [-SURE, 0.0, SURE])
def test_empty_target_gives_finite_losses_and_gradients(logit: float) -> None:
    logits = torch.full((1, 3, 4, 4), logit, requires_grad=True)
    iou_predictions = torch.rand(1, 3, requires_grad=True)
    parts = sam_loss(logits, iou_predictions, torch.zeros(1, 1, 4, 4), FULL, WEIGHTS)
    assert all(torch.isfinite(value) for value in parts.values())
    parts["loss"].backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(iou_predictions.grad).all()
    assert not low_res_iou(logits, torch.zeros(1, 1, 4, 4), FULL).any()


@pytest.mark.parametrize("masks", [1, 3])
def test_sums_are_additive_over_chunks_and_workers(masks: int) -> None:
    everything = instances(5, masks)
    whole = sam_loss(*everything, WEIGHTS)
    pieces = [
        sam_loss(*(tensor[cut] for tensor in everything), WEIGHTS)
        for cut in (slice(0, 2), slice(2, 3), slice(3, 5))
    ]
    for name, value in whole.items():
        assert value.item() == pytest.approx(sum(p[name].item() for p in pieces), rel=1e-5), name
