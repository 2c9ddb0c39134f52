"""The one way from prompts to masks: every prompt once, in bounded chunks."""

import numpy as np
import pytest
import torch
from sam_parts import small_sam

from samray.geometry.prompts import Prompt
from samray.sam.decode import MAX_PIXELS, MAX_PROMPTS, predict_masks, prompt_chunks

SIZE = (48, 64)


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.fixture(scope="module")
def embedding(sam):
    return torch.randn(32, 4, 4, generator=torch.Generator().manual_seed(0))


def point(x, y, label=1):
    return Prompt(np.array([[x, y]], np.float32), np.array([label], np.int64))


def box(x1, y1, x2, y2):
    return Prompt(box=np.array([x1, y1, x2, y2], np.float32))


@pytest.mark.parametrize(
    ("number", "size", "lengths"),
    [
        (0, (10, 10), []),
        (64, (10, 10), [64]),
        (130, (10, 10), [64, 64, 2]),
        (5, (4000, 2000), [2, 2, 1]),
        (2, (10_000, 10_000), [1, 1]),
    ],
)
def test_chunks_are_bounded_by_prompts_and_pixels(number, size, lengths):
    chunks = prompt_chunks(number, size)
    assert [len(chunk) for chunk in chunks] == lengths
    assert [n for chunk in chunks for n in chunk] == list(range(number))
    for chunk in chunks:
        assert len(chunk) <= MAX_PROMPTS
        assert len(chunk) == 1 or len(chunk) * size[0] * size[1] <= MAX_PIXELS


def test_each_prompt_is_answered_once_and_as_if_it_were_alone(sam, embedding):
    """Layouts mixed, more than one chunk of one of them, and corrections between new prompts."""
    prompts = [point(1 + n % 60, 5 + n % 40) for n in range(MAX_PROMPTS + 3)]
    prompts[10], prompts[40] = box(3, 4, 30, 28), box(8, 9, 50, 40)
    earlier = [None] * len(prompts)
    earlier[5] = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    earlier[40] = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    together = list(predict_masks(sam, embedding, prompts, SIZE, earlier))
    assert sorted(place for place, _ in together) == list(range(len(prompts)))
    for place, found in together:
        corrects = earlier[place] is not None
        ((_, alone),) = predict_masks(sam, embedding, [prompts[place]], SIZE, [earlier[place]])
        one_point = prompts[place].box is None and not corrects
        assert len(found.iou_predictions) == (3 if one_point else 1)
        torch.testing.assert_close(found.low_res_masks, alone.low_res_masks, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.iou_predictions, alone.iou_predictions, rtol=0, atol=1e-5)


def test_masks_are_ranked_by_predicted_iou_and_have_the_images_resolution(sam, embedding):
    ((_, found),) = predict_masks(sam, embedding, [point(20, 20)], SIZE)
    scores = [float(found.iou_predictions[number]) for number in found.ranking]
    assert scores == sorted(scores, reverse=True)
    assert found.ranking[0] == found.best
    assert found.predicted_iou == scores[0]
    assert found.mask(found.best).shape == SIZE
    assert np.array_equal(found.mask(1), (found.logits(1) > 0).numpy())


def test_no_prompt_no_masks(sam, embedding):
    assert list(predict_masks(sam, embedding, [], SIZE)) == []
