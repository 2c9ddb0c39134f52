"""All objects for the endpoint: as `samray predict` finds them, in pieces and within bounds."""

import io
import json
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from samray.config import PredictConfig
from samray.geometry.masks import CroppedMask
from samray.instances.saved import InstanceModel, new_decoder
from samray.instances.segment import KINDS, Way
from samray.prediction import search as searching
from samray.prediction.requests import ApiError, SegmentRequest
from samray.prediction.search import Bounds, Found, by_grid, by_instances, describe, search
from samray.prediction.segmentation import (
    find_everything,
    find_instances,
    generator_settings,
    segmented_object,
)
from samray.sam.embeddings import encode_image
from samray.sam.shipped import load_shipped

SIZE = (150, 200)
BOUNDS = Bounds(megapixels=500, answer_bytes=2**20, until=float("inf"), prompts=4)


@pytest.fixture(scope="module")
def sam():
    return load_shipped().model().eval()


@pytest.fixture(scope="module")
def image():
    picture = np.full((*SIZE, 3), (180, 170, 150), np.uint8)
    for center, radius, color in (((50, 60), 30, 40), ((145, 50), 28, 90), ((120, 115), 27, 20)):
        cv2.circle(picture, center, radius, (color, 60, 90), -1)
    return picture


@pytest.fixture(scope="module")
def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def embedding(sam, image):
    return encode_image(sam, image)


def run(pieces):
    """The result of a generator, and how often it let others work."""
    turns = 0
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value, turns
        turns += 1


def content_of(found, bounds=BOUNDS, size=SIZE, **request):
    text, _ = run(describe(found, size, SegmentRequest(**request), bounds))
    return json.loads(b"{" + text + b"}")


def drawn(number, size=(2000, 3000)):
    """That many discs, the surest first."""
    disc = cv2.circle(np.zeros((21, 21), np.uint8), (10, 10), 10, 1, -1).astype(bool)
    places = np.random.default_rng(0).integers(0, (size[1] - 21, size[0] - 21), (number, 2))
    return Found(
        [
            segmented_object(
                CroppedMask(disc, (int(x), int(y))), 1 - n / number, None, label="cell"
            )
            for n, (x, y) in enumerate(places)
        ],
        "instances",
    )


def test_the_grid_in_pieces_finds_what_predict_finds(sam, image, embedding, monkeypatch):
    settings = generator_settings(PredictConfig(points_per_side=8), "tiny")
    monkeypatch.setattr(searching, "generator_settings", lambda *_: settings)
    found, turns = run(by_grid(sam, "tiny", embedding, SIZE, BOUNDS))
    expected = find_everything(sam, image, settings)
    assert turns == 64 / BOUNDS.prompts
    assert len(found.objects) == len(expected) > 2
    ranked = sorted(expected, key=lambda one: -one.score)
    for one, other in zip(found.objects, ranked, strict=True):
        assert one.score == pytest.approx(other.score, abs=0.01)
        assert np.subtract(one.box, other.box).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_instances_in_pieces_are_those_of_predict(sam, image, png, embedding, kind):
    model = InstanceModel(new_decoder(sam, 2, seed=0), ("leaf", "stone"), Way(kind, min_area=30))
    found, _ = run(by_instances(sam, model, png, embedding, BOUNDS))
    expected = find_instances(sam, model, image)
    assert len(expected) > 2
    assert found.left_out == 0
    for one, other in zip(found.objects, expected, strict=True):
        assert (one.counts, one.box, one.label) == (other.counts, other.box, other.label)
        assert one.score == pytest.approx(other.score, abs=1e-5)


def test_the_decoder_is_asked_for_as_many_objects_as_the_bounds_allow(sam, png, embedding):
    way = Way("box", min_area=30)
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), way)
    every, turns = run(by_instances(sam, model, png, embedding, BOUNDS))
    two = replace(BOUNDS, megapixels=2 * SIZE[0] * SIZE[1] / 1e6)
    some, fewer = run(by_instances(sam, model, png, embedding, two))
    assert (len(some.objects), fewer) == (2, 4)
    assert some.left_out + 2 >= len(every.objects) > 2
    late, _ = run(by_instances(sam, model, png, embedding, replace(BOUNDS, until=0)))
    assert late.objects == []
    assert late.left_out == some.left_out + 2
    assert turns >= 2


def test_a_large_picture_is_asked_about_small_and_answered_in_its_own_pixels(
    sam, png, embedding, monkeypatch
):
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way("box", min_area=30))
    whole, _ = run(by_instances(sam, model, png, embedding, BOUNDS))
    monkeypatch.setattr(searching, "MAX_SEARCH_SIDE", 100)
    small, _ = run(by_instances(sam, model, png, embedding, BOUNDS))
    first = whole.objects[0]
    assert any(
        abs(one.area / first.area - 1) < 0.15 and np.abs(np.subtract(one.box, first.box)).max() <= 4
        for one in small.objects
    )


def test_a_grid_that_costs_too_much_is_refused_before_any_work(sam, embedding):
    with pytest.raises(
        ApiError, match=r"no instance decoder.* 12885 megapixels.* limit is 500"
    ) as no:
        next(by_grid(sam, "tiny", embedding, (4000, 4000), BOUNDS))
    assert (no.value.code, no.value.status) == ("too_large", 413)


def test_a_file_that_ends_early_is_no_image(sam, png, embedding):
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way())
    request = SegmentRequest()
    pieces = search(sam, model, "tiny", png[:200], embedding, SIZE, request, BOUNDS)
    with pytest.raises(ApiError) as refused:
        list(pieces)
    assert refused.value.code == "invalid_image"


@pytest.mark.parametrize("mask_format", ["polygon", "rle", "labelme", "none"])
def test_many_objects_are_bounded_by_bytes(mask_format):
    size, found = (2000, 3000), drawn(1000)
    whole = content_of(found, replace(BOUNDS, answer_bytes=2**25), size, mask_format=mask_format)
    assert (len(whole["objects"]), whole["left_out"]) == (1000, 0)
    part = content_of(found, replace(BOUNDS, answer_bytes=90_000), size, mask_format=mask_format)
    count = len(part["objects"])
    assert 30 < count < 1000
    assert part["left_out"] == 1000 - count
    assert part["objects"] == whole["objects"][:count]
    assert len(json.dumps(part)) < 91_000


def test_pictures_as_large_as_the_image_are_bounded_by_its_pixels():
    content = content_of(drawn(50), replace(BOUNDS, megapixels=60), (2000, 3000), mask_format="png")
    assert (len(content["objects"]), content["left_out"]) == (10, 40)


def test_time_ends_the_describing():
    content = content_of(drawn(50), replace(BOUNDS, until=time.monotonic() - 1))
    assert (content["objects"], content["left_out"]) == ([], 50)


def test_unsure_objects_are_not_wanted_and_labels_may_be_given(sam):
    found = drawn(10, SIZE)
    content = content_of(found, min_score=0.55, mask_format="rle")
    assert [one["score"] for one in content["objects"]] == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])
    assert content["left_out"] == 0
    for one, expected in zip(content["objects"], found.objects, strict=False):
        mask = coco_mask.decode(one["rle"])
        assert mask.sum() == one["area"] == expected.area
        assert one["bbox"] == list(expected.box)
        assert one["label"] == "cell"
    own = content_of(found, label="nucleus", mask_format="labelme", image_name="a.png")
    assert {shape["label"] for shape in own["labelme"]["shapes"]} == {"nucleus"}
    assert own["labelme"]["imagePath"] == "a.png"
    assert [s for one in own["objects"] for s in one["shapes"]] == own["labelme"]["shapes"]
