"""Scores as a user would see them: the clicks of the prompt matrix, batched as one by one."""

import numpy as np
import pytest

from samray.data.sample_data import write_sample_data
from samray.evaluation.metrics import iou_and_dice
from samray.evaluation.scoring import click_through
from samray.geometry.images import decode_image
from samray.geometry.prompts import draw_prompt
from samray.sam.decode import predict_masks
from samray.sam.embeddings import encode_image
from samray.sam.shipped import load_shipped


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The shipped tiny, an image's embedding, and three discs as its objects."""
    folder = write_sample_data(tmp_path_factory.mktemp("scoring") / "photos", 1, 0)
    image = decode_image(next((folder / "images").iterdir()).read_bytes())
    sam = load_shipped().model()
    rows, columns = np.indices(image.shape[:2])
    discs = [(80, 90, 30), (150, 120, 45), (60, 200, 20)]
    masks = [(rows - y) ** 2 + (columns - x) ** 2 < radius**2 for y, x, radius in discs]
    return sam, encode_image(sam, image), masks


def prompts_of(masks, strategy="random"):
    return [draw_prompt(strategy, mask, 1, np.random.default_rng(0)) for mask in masks]


@pytest.mark.parametrize("strategy", ["random", "bbox"])
def test_clicks_on_many_objects_are_those_on_each(scene, strategy):
    sam, embedding, masks = scene
    prompts = prompts_of(masks, strategy)
    together = list(click_through(sam, embedding, masks, prompts, 3))
    for mask, prompt, answers in zip(masks, prompts, together, strict=True):
        (alone,) = click_through(sam, embedding, [mask], [prompt], 3)
        assert len(answers) == 3
        for (one, expected_iou), (other, other_iou) in zip(alone, answers, strict=True):
            assert iou_and_dice(one, other)[0] > 0.99
            assert expected_iou == pytest.approx(other_iou, abs=1e-3)


def test_the_first_answer_is_that_of_a_single_prompt_and_clicks_help(scene):
    sam, embedding, masks = scene
    prompts = prompts_of(masks)
    single = list(predict_masks(sam, embedding, prompts, masks[0].shape))
    clicked = list(click_through(sam, embedding, masks, prompts, 5))
    for (_, masks_of), answers in zip(single, clicked, strict=True):
        assert np.array_equal(masks_of.mask(masks_of.best), answers[0][0])
    first, last = (
        np.mean([iou_and_dice(a[n][0], m)[0] for a, m in zip(clicked, masks, strict=True)])
        for n in (0, -1)
    )
    assert last > first


def test_a_right_answer_is_not_clicked_on_again(scene):
    sam, embedding, masks = scene
    (prompt,) = prompts_of(masks[:1])
    ((_, found),) = predict_masks(sam, embedding, [prompt], masks[0].shape)
    (answers,) = click_through(sam, embedding, [found.mask(found.best)], [prompt], 3)
    assert all(given is answers[0] for given in answers)


def test_no_object_no_answer(scene):
    sam, embedding, _ = scene
    assert list(click_through(sam, embedding, [], [], 3)) == []
