"""Figures of an evaluation by hand: sizes, and the change from base to tuned."""

import weakref

import numpy as np
import pytest
from sam_parts import blob_record, small_sam

from samray.data.dataset import ImageRecord
from samray.evaluation.metrics import Score
from samray.evaluation.scoring import MATRIX, score_image
from samray.evaluation.summary import calibration, changes, summary
from samray.sam.embeddings import encode_image


def score(image, instance, iou, area=900, side=30.0, strategy="bbox", predicted=0.5):
    return Score(
        image, image, instance, "nut", strategy, iou, iou, iou, predicted, area, side
    )  # fmt: skip


@pytest.mark.parametrize(
    ("area", "side", "size", "model_size"),
    [
        (1023, 7.9, "small", "below 8"),
        (1024, 8.0, "medium", "8 to 16"),
        (9215, 16.0, "medium", "16 to 64"),
        (9216, 64.0, "large", "above 64"),
    ],
)
def test_sizes_begin_where_coco_begins_them(area, side, size, model_size):
    found = score("a", 0, 0.5, area, side)
    assert (found.size, found.model_size) == (size, model_size)


def test_means_and_changes_by_size_by_hand():
    sizes = [(100, 4.0), (100, 4.0), (20_000, 70.0)]
    base = [
        score(image, place, iou, *sizes[place], strategy)
        for image in "abcde"
        for place, iou in enumerate((0.2, 0.4, 0.8))
        for strategy in ("bbox", "center")
    ]
    by_size = summary(base)["iou_by_size"]
    assert list(by_size) == ["small", "large"]
    assert by_size["small"]["count"] == 10
    assert by_size["small"]["iou"] == pytest.approx(0.3)
    assert by_size["large"]["ci95"] == pytest.approx((0.8, 0.8))
    assert by_size["large"]["strategy"] == pytest.approx({"bbox": 0.8, "center": 0.8})
    assert list(summary(base)["iou_by_model_size"]) == ["below 8", "above 64"]

    tuned = [
        score(s.image, s.instance, s.iou + (0.1 if s.size == "small" else -0.1), s.area,
              s.model_side, s.strategy)
        for s in base
    ]  # fmt: skip
    change = changes(base, tuned)
    assert change["size"]["small"]["iou"] == pytest.approx(0.1)
    assert change["size"]["small"]["verdict"] == "better"
    assert change["model_size"]["above 64"]["verdict"] == "worse"
    assert change["strategy"]["bbox"]["iou"] == pytest.approx(0.1 / 3)
    few = [[s for s in scores if s.image in "abcd"] for scores in (base, tuned)]
    assert changes(*few)["size"]["small"]["verdict"] == "too few images"


def test_a_score_has_the_size_that_the_model_sees():
    record, sam = blob_record("a.jpg", (60, 80), 3), small_sam()
    image = np.zeros((60, 80, 3), np.uint8)
    scores = score_image(sam, encode_image(sam, image), record, seed=0)
    assert len(scores) == 3 * len(MATRIX)
    for found in scores:
        area = record.instances[found.instance].area
        assert found.area == area
        assert found.model_side == pytest.approx(area**0.5 * 64 / 80)


def test_some_objects_are_scored_as_among_all():
    record, sam = blob_record("a.jpg", (60, 80), 5), small_sam()
    embedding = encode_image(sam, np.zeros((60, 80, 3), np.uint8))
    scores = score_image(sam, embedding, record, seed=0)
    some = score_image(sam, embedding, record, seed=0, max_objects=2)
    numbers = {found.instance for found in some}
    assert len(numbers) == 2
    assert [found.instance for found in some] == sorted(numbers) * len(MATRIX)
    among_all = [found.iou for found in scores if found.instance in numbers]
    assert [found.iou for found in some] == pytest.approx(among_all, abs=1e-6)
    assert some == score_image(sam, embedding, record, seed=0, max_objects=2)


def test_the_masks_of_many_objects_are_not_held_at_once(monkeypatch):
    """The scores are the same by two objects at a time; an image may have thousands."""
    record, sam = blob_record("a.jpg", (60, 80), 5), small_sam()
    embedding = encode_image(sam, np.zeros((60, 80, 3), np.uint8))
    together = score_image(sam, embedding, record, seed=0)
    alive: list[int] = []
    masks: list[weakref.ref] = []

    def watch(self, instance):
        mask = decode(self, instance)
        masks.append(weakref.ref(mask))
        alive.append(sum(one() is not None for one in masks))
        return mask

    decode = ImageRecord.decode
    monkeypatch.setattr(ImageRecord, "decode", watch)
    monkeypatch.setattr("samray.sam.decode.MAX_PIXELS", 2 * 60 * 80)
    apart = score_image(sam, embedding, record, seed=0)
    assert max(alive) == 2
    assert [one.instance for one in apart] == [one.instance for one in together]
    for name in ("iou", "boundary_iou", "predicted_iou"):
        pairs = [[getattr(one, name) for one in scores] for scores in (apart, together)]
        assert pairs[0] == pytest.approx(pairs[1], abs=1e-5)


def test_calibration_by_hand():
    pairs = [(0.52, 0.6), (0.58, 0.7), (0.95, 0.9), (1.02, 1.0), (-0.1, 0.0)]
    scores = [score("a", n, iou, predicted=predicted) for n, (predicted, iou) in enumerate(pairs)]
    found = calibration(scores)
    assert found["mean_absolute_error"] == pytest.approx((0.08 + 0.12 + 0.05 + 0.02 + 0.1) / 5)
    assert found["bias"] == pytest.approx((-0.08 - 0.12 + 0.05 + 0.02 - 0.1) / 5)
    counts = [one["count"] for one in found["bins"]]
    assert counts == [1, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    sixth = found["bins"][5]
    assert (sixth["low"], sixth["high"]) == (0.5, 0.6)
    assert sixth["predicted"] == pytest.approx(0.55)
    assert sixth["true"] == pytest.approx(0.65)
    assert found["bins"][1]["true"] is None
