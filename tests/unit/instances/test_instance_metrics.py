"""Measures of all objects of an image, against numbers worked by hand and pycocotools."""

import itertools
import time

import numpy as np
import pytest

from samray.geometry.masks import CroppedMask, encode_rle
from samray.instances import metrics
from samray.instances.metrics import (
    THRESHOLDS,
    ImageObjects,
    match,
    outside_region,
    score_instances,
    segmentation_accuracy,
)

SIZE = (20, 30)


def bar(x, width, y=2):
    """A rectangle of 10 rows and `width` columns from x on."""
    return encode_rle(CroppedMask(np.ones((10, width), bool), (x, y)), SIZE)


def objects(found, true, scores=None, found_labels=None, true_labels=None):
    return ImageObjects(
        SIZE,
        tuple(found),
        tuple(found_labels or ["a"] * len(found)),
        tuple(scores or [0.9] * len(found)),
        tuple(true),
        tuple(true_labels or ["a"] * len(true)),
    )


def test_accuracy_of_a_worked_case():
    """IoU 1 and 0.8 of two found; one more found is false and one true object is missed."""
    image = objects([bar(0, 10), bar(10, 8), bar(19, 1)], [bar(0, 10), bar(10, 10), bar(20, 10)])
    ious = image.ious()
    assert ious == pytest.approx(np.array([[1, 0, 0], [0, 0.8, 0], [0, 0.1, 0]]))
    # Up to 0.8: 2 TP, 1 FP, 1 FN; above: 1 TP, 2 FP, 2 FN.
    assert segmentation_accuracy(ious) == pytest.approx([2 / 4] * 7 + [1 / 5] * 3)
    scores = score_instances([image])
    assert scores["msa"] == pytest.approx(0.7 * 0.5 + 0.3 * 0.2)
    assert scores["sa50"] == 0.5
    assert scores["f1"] == pytest.approx(2 * 2 / 6)
    assert scores["pq"] == pytest.approx((1 + 0.8) / (2 + 0.5 + 0.5))
    assert scores["count_error"] == 0
    assert (scores["found"], scores["true"]) == (3, 3)


def test_images_count_the_same_and_errors_of_counts_do_not_cancel():
    one = objects([bar(0, 10)], [bar(0, 10)])
    none = objects([], [bar(0, 4), bar(5, 4), bar(10, 4)])
    extra = objects([bar(0, 4), bar(5, 4)], [])
    scores = score_instances([one, none, extra])
    assert scores["msa"] == pytest.approx(1 / 3)
    assert scores["count_error"] == pytest.approx((0 + 3 + 2) / 4)
    assert scores["empty"] == {"images": 1, "found": 2}
    assert score_instances([objects([], [])])["msa"] == 1  # nothing there, nothing found
    assert score_instances([objects([], [])])["count_error"] is None


def test_match_finds_the_most_pairs_where_masks_overlap():
    """A greedy pairing would give the first to the best and leave the second without any."""
    ious = np.array([[0.9, 0.6], [0.7, 0.1]])
    assert match(ious, 0.5) == [(0, 1), (1, 0)]
    assert match(ious, 0.8) == [(0, 0)]
    assert match(np.zeros((0, 3)), 0.5) == []


def test_matching_finds_as_many_pairs_as_trying_all_of_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ious = rng.random((4, 3)).round(2)
        best = max(
            sum(ious[row, column] >= 0.5 for column, row in enumerate(rows))
            for rows in itertools.permutations(range(4), 3)
        )
        assert len(match(ious, 0.5)) == best


def test_average_precision_by_hand():
    """Of two true objects the surest answer is wrong and the second finds one exactly.

    Precision is 1/2 up to a recall of 1/2 and 0 above: COCO's mean over recalls 0, 0.01 ... 1 is
    51/101 of 1/2, at every threshold.
    """
    image = objects([bar(20, 3), bar(0, 9)], [bar(0, 9), bar(10, 9)], scores=[0.9, 0.5])
    scores = score_instances([image])
    assert scores["ap"] == pytest.approx(51 / 101 / 2)
    assert scores["ap50"] == pytest.approx(51 / 101 / 2)


def test_more_objects_than_cocos_hundred_count():
    masks = [
        encode_rle(CroppedMask(np.ones((1, 1), bool), (x, y)), SIZE)
        for x in range(0, 30, 2)
        for y in range(0, 20, 2)
    ]
    assert len(masks) == 150
    assert score_instances([objects(masks, masks)])["ap"] == 1


def test_an_object_of_another_label_is_no_match_of_its_label():
    true = [bar(0, 10), bar(10, 10), bar(20, 10)]
    image = objects(true, true, found_labels=["a", "a", "b"], true_labels=["a", "b", "b"])
    scores = score_instances([image])
    assert (scores["msa"], scores["f1"]) == (1, 1)  # they do not look at labels
    assert scores["confusion"] == {"a": {"a": 1}, "b": {"a": 1, "b": 1}}
    assert scores["labels"]["a"] | {"ap": 0, "ap50": 0} == {
        "found": 2, "true": 1, "f1": pytest.approx(2 / 3), "pq": pytest.approx(2 / 3),
        "ap": 0, "ap50": 0,
    }  # fmt: skip
    assert scores["labels"]["b"]["f1"] == pytest.approx(2 / 3)


def test_labels_without_true_or_found_objects():
    scores = score_instances([objects([bar(0, 10)], [bar(0, 10)], found_labels=["new"])])
    assert scores["labels"]["new"]["ap"] is None  # not the model's fault: there is no truth
    assert scores["labels"]["a"]["ap"] == 0
    assert scores["ap"] == 0
    assert score_instances([objects([], [bar(0, 10)])])["ap"] == 0
    assert score_instances([objects([bar(0, 10)], [])])["ap"] is None
    assert len(THRESHOLDS) == 10


def test_masks_of_which_more_than_half_is_ignored_are_left_out():
    masks = [bar(0, 10), bar(6, 8), bar(5, 10), bar(20, 5)]  # 10, 4, 5 and 0 columns in the region
    assert outside_region(masks, bar(0, 10), SIZE) == [1, 2, 3]
    assert outside_region(masks, None, SIZE) == [0, 1, 2, 3]
    assert outside_region([], bar(0, 10), SIZE) == []


def test_average_precision_in_parts_is_that_of_the_whole(monkeypatch):
    """Some objects found twice, shifted, missed, false or of the other label, in two images."""
    rng = np.random.default_rng(1)
    images = []
    for _ in range(2):
        cells = [(x, y) for x in range(0, 30, 5) for y in range(0, 20, 5)]
        true, found = [], []
        for x, y in cells:
            label = str(rng.choice(["a", "b"]))
            mask = np.ones((4, 4), bool)
            if rng.random() < 0.8:
                true.append((encode_rle(CroppedMask(mask, (x, y)), SIZE), label))
            for _ in range(rng.integers(3)):
                w, h = rng.integers(2, 5, 2)
                other = label if rng.random() < 0.8 else "b"
                found.append((encode_rle(CroppedMask(mask[:h, :w], (x, y)), SIZE), other))
        scores = rng.permutation(len(found)) / len(found)
        masks = [[mask for mask, _ in some] for some in (found, true)]
        labels = [[label for _, label in some] for some in (found, true)]
        images.append(objects(*masks, scores.tolist(), *labels))
    whole = score_instances(images)
    monkeypatch.setattr(metrics, "MAX_TABLE", 0)
    parts = score_instances(images)
    assert 0.1 < whole["ap"] < 0.9
    for key in ("ap", "ap50"):
        assert parts[key] == pytest.approx(whole[key], abs=1e-12)
        for label in "ab":
            assert parts["labels"][label][key] == pytest.approx(whole["labels"][label][key])


def test_thousands_of_objects_are_measured_in_seconds():
    """Nothing grows with all pairs of them but the table of IoUs; in Python it took 20 s."""
    size = (500, 500)
    squares = [
        encode_rle(CroppedMask(np.ones((5, 5), bool), (x, y)), size)
        for y in range(0, 495, 7)
        for x in range(0, 495, 7)
    ][:2000]
    shifted = squares[1:] + squares[:1]
    scores = tuple(np.linspace(1, 0.1, 2000))
    image = ImageObjects(size, tuple(shifted), ("a",) * 2000, scores, tuple(squares), ("a",) * 2000)
    started = time.process_time()
    found = score_instances([image])
    assert (found["msa"], found["ap"], found["count_error"]) == (1, 1, 0)
    assert time.process_time() - started < 10
