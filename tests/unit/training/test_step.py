"""Correction clicks: on the error, and with the right label."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sam_parts import small_sam

from samray.sam.decode import PromptGroup, decode_prompts
from samray.sam.losses import sam_loss
from samray.training.step import Batch, PromptedSam, draw_correction_plan, error_click

WEIGHTS = (20.0, 1.0, 1.0)
VALID = torch.ones(1, 1, 16, 16)


def square(x1, y1, x2, y2, value=1.0):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., y1:y2, x1:x2] = value
    return mask


def click(answer, target, draw, valid=VALID):
    logits = answer * 20 - 10
    points, labels = error_click(logits, target, valid, torch.tensor([draw]), img_size=64)
    x, y = (points[0, 0] + 0.5).tolist()
    return int(x // 4), int(y // 4), int(labels[0, 0])


def test_a_false_negative_gets_a_foreground_and_a_false_positive_a_background_click():
    target = square(2, 2, 8, 8)
    assert click(square(2, 2, 8, 7), target, 0.0) == (2, 7, 1)  # misses the last row
    assert click(square(2, 2, 8, 9), target, 0.999) == (7, 8, 0)  # has one row too many


def test_draws_reach_every_wrong_cell_and_no_other():
    target, answer = square(2, 2, 8, 8), square(4, 4, 10, 10)
    found = {click(answer, target, draw) for draw in np.linspace(0, 0.9999, 400).tolist()}
    wrong = {
        (x, y, int(target[0, 0, y, x]))
        for y in range(16)
        for x in range(16)
        if target[0, 0, y, x] != answer[0, 0, y, x]
    }
    assert found == wrong


def test_a_correct_mask_gets_a_click_on_the_object():
    x, y, label = click(square(2, 2, 8, 8), square(2, 2, 8, 8), 0.5)
    assert label == 1
    assert 2 <= x < 8
    assert 2 <= y < 8


def test_an_object_thinner_than_a_cell_is_clicked_where_it_is():
    thin = square(0, 5, 16, 6, value=0.2)
    assert click(torch.zeros_like(thin), thin, 0.3)[1:] == (5, 1)


def test_padding_is_never_clicked():
    valid = VALID.clone()
    valid[..., 12:, :] = 0
    for draw in (0.0, 0.5, 0.999):
        _, y, _ = click(torch.ones(1, 1, 16, 16), square(2, 2, 8, 8), draw, valid)
        assert y < 12


def batch_of(corrections):
    generator = torch.Generator().manual_seed(0)
    points = torch.tensor([[[20.0, 24.0]], [[40.0, 30.0]]])
    boxes = torch.tensor([[10.0, 12.0, 40.0, 44.0]])
    return Batch(
        None,
        torch.randn(2, 32, 4, 4, generator=generator),
        [
            PromptGroup(torch.tensor([0, 1]), points, torch.ones(2, 1, dtype=torch.int64)),
            PromptGroup(torch.tensor([1]), boxes=boxes),
        ],
        [torch.cat([square(3, 3, 9, 9), square(7, 5, 12, 10)]), square(2, 3, 10, 11)],
        VALID.repeat(2, 1, 1, 1),
        corrections,
        [torch.rand(n, len(corrections), generator=generator) for n in (2, 1)],
    )


def test_each_pass_feeds_back_the_answer_and_adds_the_click():
    """Compared with a loop over the decoder, written out for one prompt."""
    sam, batch = small_sam(), batch_of((True, False, True))
    batch = replace(
        batch,
        groups=batch.groups[1:],
        targets=batch.targets[1:],
        click_draws=batch.click_draws[1:],
    )
    ours = PromptedSam(sam, WEIGHTS, 64)(batch)
    target, valid = batch.targets[0], batch.valid[1:]
    group, points, labels, total, passes = batch.groups[0], [], [], 0.0, 4
    for number in range(passes):
        masks, ious = decode_prompts(sam, batch.encoded, group, False)
        total += float(sam_loss(masks, ious, target, valid, WEIGHTS)["loss"].detach())
        if number == passes - 1:
            break
        if batch.corrections[number]:
            draw = batch.click_draws[0][:, number]
            point, label = error_click(masks.detach(), target, valid, draw, 64)
            points.append(point)
            labels.append(label)
        group = PromptGroup(
            group.image_index,
            torch.cat(points, dim=1) if points else None,
            torch.cat(labels, dim=1) if labels else None,
            group.boxes,
            masks.detach(),
        )
    assert float(ours["loss"].detach()) == pytest.approx(total / passes, rel=1e-5)


def test_gradients_computed_at_once_are_those_of_the_loss():
    """Beside autograd over the stock decoder, prompt by prompt; the embeddings' gradient, too.

    The caller scales the loss, and the instance weights, as the loop does.
    """
    batch, sam = batch_of(()), small_sam()
    embeddings = batch.encoded.requires_grad_()
    module = PromptedSam(sam, WEIGHTS, 64)
    inputs = [embeddings, *sam.prompt_encoder.parameters(), *sam.mask_decoder.parameters()]
    ours = module(batch, loss_scale=1024.0)["loss"]
    found = torch.autograd.grad(ours * 512, inputs)
    total = 0.0
    for group, targets in zip(batch.groups, batch.targets, strict=True):
        for row, image in enumerate(group.image_index.tolist()):
            alone = group.part(range(row, row + 1))
            points = None if alone.boxes is not None else (alone.point_coords, alone.point_labels)
            sparse, dense = sam.prompt_encoder(points, alone.boxes, None)
            pe, given = sam.prompt_encoder.get_dense_pe(), embeddings[image : image + 1]
            masks, ious = sam.mask_decoder(given, pe, sparse, dense, alone.ambiguous)
            total += sam_loss(masks, ious, targets[row : row + 1], VALID, WEIGHTS)["loss"]
    expected = torch.autograd.grad(total * 512, inputs, allow_unused=True)
    assert float(ours.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected if g is not None)
    for one, two in zip(found, expected, strict=True):
        assert float((one if two is None else one - two).abs().max()) <= 1e-5 * scale


def test_without_gradients_the_losses_are_the_same():
    module, batch = PromptedSam(small_sam(), WEIGHTS, 64), batch_of((True,))
    with torch.no_grad():
        found = module(batch)
    for name, loss in module(batch).items():
        assert float(found[name]) == pytest.approx(float(loss.detach()), rel=1e-5), name


def test_chunks_change_nothing_in_an_interactive_step():
    results = []
    for max_prompts in (64, 1):
        module = PromptedSam(small_sam(), WEIGHTS, max_prompts)
        losses = module(batch_of((True, True)))
        losses["loss"].backward()
        grads = [p.grad.clone() for p in module.sam.mask_decoder.parameters() if p.grad is not None]
        results.append((float(losses["loss"].detach()), grads))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    scale = max(float(g.abs().max()) for g in results[0][1])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert float((one - two).abs().max()) <= 1e-4 * scale


def test_the_plan_has_at_most_the_clicks_asked_for_and_passes_without_one():
    plans = [draw_correction_plan(8, np.random.default_rng(seed)) for seed in range(300)]
    assert {len(plan) for plan in plans} == set(range(9))
    share = np.mean([click for plan in plans for click in plan])
    assert 0.7 < share < 0.9
    assert draw_correction_plan(0, np.random.default_rng(0)) == ()
