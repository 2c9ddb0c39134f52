"""Found against true objects: whose they are, and how they are drawn."""

import numpy as np
import pytest
from sam_parts import blob_record

from samray.evaluation.objects import FALSE, HIT, MISSED, compare_objects, draw_objects, num_errors
from samray.geometry.masks import CroppedMask, encode_rle
from samray.instances.metrics import ImageObjects, score_instances
from samray.instances.saved import InstanceModel, new_decoder
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
