"""Clicks until a mask is good enough: counted by hand, and on the shipped `tiny`."""

import numpy as np
import pytest
from sam_parts import blob_record

from samray.data.dataset import ImageRecord, Instance
from samray.data.sample_data import write_sample_data
from samray.evaluation.clicks import (
    MAX_CLICKS,
    ClickCount,
    choose_objects,
    clicks_change,
    clicks_summary,
    count_clicks,
)
from samray.evaluation.metrics import iou_and_dice
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask, encode_rle
from samray.geometry.prompts import Prompt, center_point, correction_point
from samray.sam.decode import predict_masks
from samray.sam.embeddings import encode_image
from samray.sam.shipped import load_shipped


def counts(*ious, image="a"):
    return [ClickCount(image, image, place, tuple(row)) for place, row in enumerate(ious)]


def test_clicks_are_counted_to_the_first_iou_that_reaches_the_target():
    (count,) = counts([0.5, 0.86, 0.8, 0.9])
    assert count.clicks_to(85) == 2
    assert count.clicks_to(90) == 4
    assert counts([0.3] * MAX_CLICKS)[0].clicks_to(85) is None


def test_means_failures_and_change_by_hand():
    never = [0.3] * MAX_CLICKS
    base = counts([0.5, 0.86, 0.9], never, image="a") + counts([0.88, 0.95], image="b")
    found = clicks_summary(base)
    assert found["num_objects"] == 3
    assert found["85"]["mean"] == pytest.approx((2 + 20 + 1) / 3)
    assert found["90"]["mean"] == pytest.approx((3 + 20 + 2) / 3)
    assert found["85"]["failed"] == found["90"]["failed"] == pytest.approx(1 / 3)
    low, high = found["90"]["ci95"]
    assert low == 2  # image b drawn alone
    assert high == 11.5  # image a alone

    tuned = counts([0.9], [0.9], image="a") + counts([0.92], image="b")
    change = clicks_change(base, tuned)
    assert change["90"]["mean"] == pytest.approx((1 - 3 + 1 - 20 + 1 - 2) / 3)
    assert change["90"]["verdict"] == "too few images"


def test_fewer_clicks_are_better():
    names = "abcdef"
    before = [count for name in names for count in counts([0.86, 0.9], image=name)]
    after = [count for name in names for count in counts([0.91], image=name)]
    assert clicks_change(before, after)["90"]["verdict"] == "better"
    assert clicks_change(before, after)["85"]["verdict"] == "no difference shown"
    assert clicks_change(after, before)["90"]["verdict"] == "worse"


def test_objects_are_chosen_by_seed_from_all():
    records = [blob_record(f"{n}", (60, 80), n + 1, seed=n) for n in range(6)]  # 21 objects
    chosen = choose_objects(records, 8, seed=1)
    assert sum(len(places) for places in chosen.values()) == 8
    assert chosen == choose_objects(records, 8, seed=1) != choose_objects(records, 8, seed=2)
    for record in records:
        places = chosen.get(record.name, ())
        assert list(places) == sorted(set(places))
        assert all(place < len(record.instances) for place in places)
    everything = choose_objects(records, 50, seed=0)
    assert everything == {f"{n}": tuple(range(n + 1)) for n in range(6)}
    assert choose_objects(records, 0, seed=0) == {}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The shipped tiny, an image's embedding, and a record of three discs that it does not show."""
    folder = write_sample_data(tmp_path_factory.mktemp("clicks") / "photos", 1, 0)
    image = decode_image(next((folder / "images").iterdir()).read_bytes())
    sam, size = load_shipped().model(), image.shape[:2]
    rows, columns = np.indices(size)
    instances = []
    for y, x, radius in [(80, 90, 30), (150, 120, 45), (60, 200, 20)]:
        mask = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        cropped = CroppedMask(mask, (0, 0))
        rle = encode_rle(cropped, size)
        instances.append(Instance("disc", cropped.box, int(mask.sum()), rle, area_outside=99))
    record = ImageRecord("a.jpg", "a.jpg", "0" * 64, size, tuple(instances), 0, 0)
    return sam, encode_image(sam, image), record


def test_clicks_on_a_model_are_those_of_a_plain_loop(scene):
    sam, embedding, record = scene
    for place in (0, 2):
        (count,) = count_clicks(sam, embedding, record, [place])
        assert count.instance == place
        gt_mask = record.decode(record.instances[place])
        coords, labels = center_point(gt_mask), np.array([1])
        logits, ious = None, []
        while len(ious) < MAX_CLICKS and (not ious or ious[-1] < 0.9):
            prompt = Prompt(point_coords=coords, point_labels=labels)
            ((_, found),) = predict_masks(sam, embedding, [prompt], record.size, [logits])
            logits = found.low_res_masks[found.best][None]
            ious.append(iou_and_dice(found.mask(found.best), gt_mask)[0])
            point, label = correction_point(found.mask(found.best), gt_mask)
            coords, labels = np.concatenate([coords, point]), np.append(labels, label)
        assert len(count.ious) == len(ious)
        assert count.ious == pytest.approx(ious, abs=1e-3)
        assert (count.image, count.source) == ("a.jpg", "a.jpg")
