"""The search for the better way: on maps whose best thresholds are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sam_parts import small_sam
from scipy import ndimage
from test_instance_segment import discs, perfect_maps

from samray.geometry.masks import CroppedMask, encode_rle
from samray.instances import choice
from samray.instances.choice import Example, choose_way, evenly, mean_accuracy, some_images
from samray.instances.segment import Way, image_maps

SIZE = (64, 64)
PLACES = ((16, 16, 10), (16, 46, 9), (46, 30, 12))


def example(change=lambda maps: maps):
    masks = discs(SIZE, PLACES)
    maps = image_maps(perfect_maps(masks, [0, 0, 0], SIZE, 64), SIZE)
    truth = tuple(encode_rle(CroppedMask(mask, (0, 0)), SIZE) for mask in masks)
    return Example(change(maps), torch.zeros(32, 4, 4), truth, SIZE)


def test_what_is_good_enough_is_left_as_it_is():
    way, kinds = choose_way(small_sam(), [example()])
    assert way == Way()
    assert kinds["watershed"] > 0.9
    assert set(kinds) == {"watershed", "point", "box", "both"}


def test_thresholds_follow_a_decoder_that_is_too_sure_or_too_shy():
    def shy(maps):  # it says 0.4 at most where an object is
        return replace(maps, foreground=maps.foreground * 0.55 + 0.01)

    def sure(maps):  # a rim of the background looks like object
        near = ndimage.binary_dilation(maps.foreground > 0.5, iterations=2)
        return replace(maps, foreground=np.where(near, np.maximum(maps.foreground, 0.65), 0))

    for change, right in ((shy, lambda value: value <= 0.5), (sure, lambda value: value > 0.6)):
        examples = [example(change)]
        way, _ = choose_way(small_sam(), examples)
        assert right(way.foreground)
        assert mean_accuracy(None, examples, way) >= mean_accuracy(None, examples, Way())
        assert mean_accuracy(None, examples, way) > 0.8


def test_a_decoder_that_has_not_learned_is_not_asked_thousands_of_times(monkeypatch):
    """Noise: hundreds of false objects, and no prompt for any of them."""

    def noise(maps):
        rng = np.random.default_rng(0)
        fields = {name: rng.random(SIZE, np.float32) for name in ("boundary", "center")}
        return replace(maps, foreground=np.full(SIZE, 0.9, np.float32), **fields)

    monkeypatch.setattr(choice, "KINDS", ())
    way, kinds = choose_way(small_sam(), [example(noise)])
    assert way == Way()
    assert list(kinds) == ["watershed"]
    assert kinds["watershed"] < choice.MIN_ACCURACY


def test_the_mask_decoder_is_asked_once_for_each_kind_of_prompt(monkeypatch):
    """Scores and overlaps only choose among its answers."""
    kinds: list[str] = []

    def count(*arguments):
        kinds.append(arguments[-1])
        return asked(*arguments)

    asked = choice.ask
    monkeypatch.setattr(choice, "ask", count)
    one = example()
    way, found = choose_way(small_sam(), [one, one])
    assert sorted(kinds) == sorted(2 * ["point", "box", "both"])
    for kind in ("point", "box", "both"):  # random weights: each way's value, searched anew
        if (way.max_iou, way.min_score) == (0.5, 0.0):
            expected = mean_accuracy(small_sam(), [one], replace(way, kind=kind))
            assert found[kind] == pytest.approx(expected)


def test_images_of_thousands_of_objects_are_fewer():
    assert some_images([1] * 10) == list(range(10))
    assert len(some_images([5] * 100)) == choice.MAX_IMAGES
    assert some_images([1000] * 10) == [0, 3, 6]
    assert some_images([5000, 5000]) == [0]


def test_images_are_chosen_evenly():
    assert evenly(3, 5) == [0, 1, 2]
    assert evenly(100, 4) == [0, 25, 50, 75]


def test_what_is_found_in_an_ignored_region_is_no_error():
    """One of three objects is not annotated: false if nobody says so, nothing if it is ignored."""
    complete = example()
    seen = replace(complete, truth=complete.truth[:2])
    marked = replace(seen, ignored=complete.truth[2])
    accuracies = [mean_accuracy(None, [one], Way()) for one in (complete, seen, marked)]
    assert accuracies[1] == pytest.approx(2 / 3 * accuracies[2], abs=0.02)
    assert accuracies[2] > 0.9
