"""Found against true objects: whose they are, and how they are drawn."""

from dataclasses import replace

import numpy as np
import pytest
from sam_parts import blob_record

from samray.evaluation.objects import (
    FALSE,
    HIT,
    MERGED,
    MISSED,
    compare_objects,
    draw_objects,
    num_errors,
)
from samray.geometry.masks import CroppedMask, crop_mask, encode_rle
from samray.instances.metrics import ImageObjects, merging, score_instances
from samray.instances.saved import InstanceModel, instances_of, new_decoder
from samray.instances.segment import Way
from samray.sam.embeddings import encode_image
from samray.sam.shipped import load_shipped

SIZE = (30, 60)


def block(x):
    return encode_rle(CroppedMask(np.ones((20, 15), bool), (x, 5)), SIZE)


def test_hits_misses_and_false_objects_are_told_apart():
    objects = ImageObjects(
        SIZE, (block(0), block(40)), ("a", "a"), (0.9, 0.8), (block(0), block(20)), ("a", "a")
    )
    truth, found = draw_objects(np.zeros((*SIZE, 3), np.uint8), objects)
    colors = np.array([HIT, MISSED, FALSE])

    def outlines(picture, *columns):
        """Which color is nearest on the outline; it is smoothed."""
        return [int(abs(colors - picture[15, x]).sum(axis=1).argmin()) for x in columns]

    assert outlines(truth, 0, 20) == [0, 1]
    assert outlines(found, 0, 40) == [0, 2]
    assert num_errors(objects) == 2
    ignored = np.zeros(SIZE, bool)
    ignored[:2] = True
    truth, found = draw_objects(np.zeros((*SIZE, 3), np.uint8), objects, ignored)
    assert (truth[:2] == 96).all()
    assert (found[:2] == 96).all()
    assert not found[26:].any()


def test_an_object_that_is_two_true_ones_is_shown_as_merged():
    both = encode_rle(CroppedMask(np.ones((20, 35), bool), (0, 5)), SIZE)
    true = (block(0), block(20), block(40))
    objects = ImageObjects(SIZE, (both, block(40)), ("a", "a"), (0.9, 0.8), true, ("a",) * 3)
    assert merging(objects) == {0}
    _, found = draw_objects(np.zeros((*SIZE, 3), np.uint8), objects)
    colors = np.array([HIT, MISSED, FALSE, MERGED])
    nearest = [int(abs(colors - found[15, x]).sum(axis=1).argmin()) for x in (0, 40)]
    assert nearest == [3, 0]


@pytest.mark.parametrize("kind", ["watershed", "both"])
def test_what_a_decoder_finds_is_measured_against_the_record(kind):
    sam, record = load_shipped().model(), blob_record("photo", (60, 80), 3)
    model = InstanceModel(new_decoder(sam, 2, 0), ("blob", "stone"), Way(kind=kind))
    image = np.full((60, 80, 3), 30, np.uint8)
    for instance in record.instances:
        image[record.decode(instance)] = (200, 120, 90)
    objects = compare_objects(sam, model, encode_image(sam, image), image, record)
    assert objects.true == tuple(instance.rle for instance in record.instances)
    assert len(objects.found) == len(objects.scores) == len(objects.found_labels)
    assert set(objects.found_labels) <= {"blob", "stone"}
    scores = score_instances([objects])
    assert (scores["true"], scores["found"]) == (3, len(objects.found))


def test_what_is_found_where_nobody_looked_is_neither_true_nor_false():
    """An object without annotation: false, unless its place is ignored."""
    sam, record = load_shipped().model(), blob_record("photo", (60, 80), 1, seed=4)
    model = InstanceModel(new_decoder(sam, 1, 0), ("blob",), Way())
    image = np.full((60, 80, 3), 30, np.uint8)
    rows, columns = np.mgrid[:60, :80]
    unknown = np.hypot(rows - 30, columns - 20) < 12
    image[unknown] = image[record.decode(record.instances[0])] = (200, 120, 90)
    marked = replace(record, ignored=encode_rle(crop_mask(unknown), (60, 80)))
    embedding = encode_image(sam, image)
    all_found, judged = (
        compare_objects(sam, model, embedding, image, one) for one in (record, marked)
    )
    assert len(all_found.found) == 2
    assert len(judged.found) == 1
    assert score_instances([judged])["sa50"] == 1
    assert score_instances([all_found])["sa50"] == 0.5


def test_labels_that_the_model_does_not_know_cost_only_where_labels_are_looked_at():
    """The shipped decoder calls everything `object`."""
    sam, record = load_shipped().model(), blob_record("photo", (60, 80), 1, seed=4)
    model = instances_of(load_shipped(), sam)
    image = np.full((60, 80, 3), 30, np.uint8)
    image[record.decode(record.instances[0])] = (200, 120, 90)
    objects = compare_objects(sam, model, encode_image(sam, image), image, record)
    scores = score_instances([objects])
    assert scores["sa50"] == scores["f1"] == 1
    assert scores["confusion"] == {"blob": {"object": 1}}
    assert scores["labels"]["blob"]["ap50"] == scores["ap50"] == 0
    assert scores["labels"]["object"]["ap"] is None
