"""Segmenting everything: SAM's own answers, and one story in label map, table and LabelMe JSON."""

import csv
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from segment_anything import SamAutomaticMaskGenerator

from samray.config import PredictConfig
from samray.data.labelme import labelme_document, read_annotation
from samray.errors import AnnotationError
from samray.geometry.masks import crop_mask, rasterize_instance
from samray.instances.saved import InstanceModel, new_decoder
from samray.instances.segment import Way
from samray.prediction import segmentation
from samray.prediction.requests import read_prompts
from samray.prediction.segmentation import (
    MaskGenerator,
    SegmentedObject,
    answer_prompts,
    find_everything,
    find_instances,
    generator_settings,
    label_map,
    labelme_shapes,
    object_table,
)
from samray.sam.shipped import load_shipped

SETTINGS = {
    "points_per_side": 8,
    "pred_iou_thresh": 0.3,
    "stability_score_thresh": 0.7,
    "min_mask_region_area": 0,
}


@pytest.fixture(scope="module")
def sam():
    return load_shipped().model().eval()


@pytest.fixture(scope="module")
def image():
    """Three bright things on a dark ground, H x W = 150 x 200."""
    import cv2

    picture = np.full((150, 200, 3), 40, np.uint8)
    cv2.circle(picture, (50, 60), 30, (220, 60, 60), -1)
    cv2.rectangle(picture, (110, 30), (180, 70), (60, 200, 80), -1)
    cv2.ellipse(picture, (120, 115), (40, 18), 20, 0, 360, (80, 90, 230), -1)
    return picture


def found_object(mask, score=0.5):
    tight = crop_mask(mask)
    return segmentation.segmented_object(tight, score, 0.9)


@pytest.mark.parametrize("min_area", [0, 40])
def test_the_generator_answers_as_sams_own(sam, image, min_area):
    settings = SETTINGS | {"min_mask_region_area": min_area, "output_mode": "coco_rle"}
    ours = MaskGenerator(sam, **settings).generate(image)
    reference = SamAutomaticMaskGenerator(sam, **settings).generate(image)
    assert len(ours) == len(reference) > 2
    for mine, its in zip(ours, reference, strict=True):
        assert mine["point_coords"] == its["point_coords"]
        assert mine["predicted_iou"] == pytest.approx(its["predicted_iou"], abs=1e-5)
        # A logit within rounding of zero may fall on either side of it.
        masks = [coco_mask.decode(record["segmentation"]) for record in (mine, its)]
        assert (masks[0] != masks[1]).mean() < 1e-3
        assert mine["bbox"] == pytest.approx(its["bbox"], abs=1)


def test_everything_is_found_in_drawn_things(sam, image):
    objects = find_everything(sam, image, generator_settings(PredictConfig(), "tiny"))
    for x, y, area in ((50, 60, 2821), (145, 50, 2911), (120, 115, 2261)):
        best = max(
            objects,
            key=lambda item: (
                item.box[0] <= x < item.box[2]
                and item.box[1] <= y < item.box[3]
                and min(item.area, area) / max(item.area, area)
            ),
        )
        assert best.pixels[y - best.box[1], x - best.box[0]]
        assert 0.8 < best.area / area < 1.25


def test_the_instance_decoder_gives_objects_with_labels_and_scores(sam, image):
    """Whatever it finds untrained, the table, the shapes and the label map agree about it."""
    decoder = new_decoder(sam, 2, seed=0)
    model = InstanceModel(decoder, ("leaf", "stone"), Way(min_area=30))
    objects = find_instances(sam, model, image)
    assert objects
    assert [found.score for found in objects] == sorted((o.score for o in objects), reverse=True)
    rows = list(csv.DictReader(io.StringIO(object_table(objects, None).decode())))
    numbers = label_map(objects, (150, 200))
    shapes = labelme_shapes(objects, None)
    for number, (found, row) in enumerate(zip(objects, rows, strict=True), start=1):
        assert found.label in model.labels
        assert (row["label"], row["stability_score"]) == (found.label, "")
        assert 0 <= found.score <= 1
        assert found.area == found.pixels.sum() == (numbers == number).sum()
        assert found.label in {s["label"] for s in shapes if s["description"] == str(number)}
    assert {shape["label"] for shape in labelme_shapes(objects, "thing")} == {"thing"}
    named = csv.DictReader(io.StringIO(object_table(objects, "thing").decode()))
    assert {row["label"] for row in named} == {"thing"}


def test_a_large_image_is_searched_window_by_window(sam, image):
    """Objects of all windows are in the image's frame."""
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way(min_area=30))
    large = image.repeat(3, axis=0).repeat(3, axis=1)
    objects = find_instances(sam, model, large, tile=200)
    covered = np.zeros(large.shape[:2], int)
    for found in objects:
        x1, y1, x2, y2 = found.box
        covered[y1:y2, x1:x2] += found.pixels
    assert objects
    assert covered[:, 250:].any()


def test_a_single_pixel_is_one_object(sam):
    """To SAM its box is empty, and no box like another; so it lists the one mask many times."""
    pixel = np.full((1, 1, 3), 200, np.uint8)
    assert len(MaskGenerator(sam, **SETTINGS).generate(pixel)) > 1
    (found,) = find_everything(sam, pixel, SETTINGS)
    assert (found.box, found.area) == ((0, 0, 1, 1), 1)


def test_a_large_picture_is_searched_small_and_answered_in_its_own_pixels(sam, image, monkeypatch):
    monkeypatch.setattr(segmentation, "MAX_SEARCH_SIDE", 200)
    small = find_everything(sam, image, SETTINGS)
    large = find_everything(sam, image.repeat(3, axis=0).repeat(3, axis=1), SETTINGS)
    assert len(large) == len(small) > 2
    for mine, its in zip(large, small, strict=True):
        assert mine.area == pytest.approx(9 * its.area, rel=0.06)
        assert np.allclose(mine.box, 3 * np.array(its.box), atol=4)


def test_smaller_objects_lie_on_top_of_larger_ones():
    inner, outer = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    outer[2:18, 3:27] = True
    inner[5:9, 6:12] = True
    for order in ((inner, outer), (outer, inner)):
        numbers = label_map([found_object(mask) for mask in order], (20, 30))
        assert numbers.dtype == np.uint16
        assert (numbers[inner] == 1 + (order[1] is inner)).all()
        assert (numbers[outer & ~inner] == 1 + (order[1] is outer)).all()
        assert not numbers[~outer].any()


def test_label_map_table_and_shapes_tell_the_same(sam, image):
    objects = find_everything(sam, image, SETTINGS)
    rows = list(csv.DictReader(io.StringIO(object_table(objects, None).decode())))
    shapes = labelme_shapes(objects, "thing")
    document = labelme_document("image.png", (150, 200), shapes)
    parsed = read_annotation(json.dumps(document).encode())
    for number, (found, row) in enumerate(zip(objects, rows, strict=True), start=1):
        assert (int(row["id"]), int(row["area"])) == (number, found.area)
        assert tuple(int(row[key]) for key in ("x1", "y1", "x2", "y2")) == found.box
        assert float(row["score"]) == pytest.approx(found.score, abs=1e-6)
        own = [
            shape
            for shape, raw in zip(parsed.shapes, shapes, strict=True)
            if raw["description"] == str(number)
        ]
        drawn = rasterize_instance(own, (150, 200))
        mask, again = np.zeros((150, 200), bool), np.zeros((150, 200), bool)
        x1, y1, x2, y2 = found.box
        mask[y1:y2, x1:x2] = found.pixels
        (x, y), (h, w) = drawn.origin, drawn.pixels.shape
        again[y : y + h, x : x + w] = drawn.pixels
        assert (mask & again).sum() / (mask | again).sum() > 0.9


def test_parts_of_an_object_share_a_group():
    mask = np.zeros((40, 40), bool)
    mask[2:12, 2:12] = mask[20:35, 20:35] = True
    shapes = labelme_shapes([found_object(mask)], "thing")
    assert [shape["group_id"] for shape in shapes] == [1, 1]


def test_prompts_are_answered_in_their_order(sam, image):
    requests = read_prompts(
        '[{"id": "green", "box": [108, 28, 182, 72]}, {"id": "red", "point_coords": [[50, 60]]},'
        ' {"id": "blue", "point_coords": [[120, 115], [50, 60]], "point_labels": [1, 0]}]'
    )
    objects, results = answer_prompts(sam, image, requests)
    assert [found.prompt_id for found in objects] == ["green", "red", "blue"]
    assert [result["id"] for result in results] == ["green", "red", "blue"]
    assert [len(result["masks"]) for result in results] == [1, 3, 1]
    for found, (x, y) in zip(objects, ((145, 50), (50, 60), (120, 115)), strict=True):
        assert found.pixels[y - found.box[1], x - found.box[0]]
        assert 0 <= found.stability_score <= 1
    assert objects[1].score == max(mask["score"] for mask in results[1]["masks"])


def test_an_empty_mask_is_a_row_and_no_shape():
    nothing = found_object(np.zeros((10, 10), bool))
    assert (nothing.area, nothing.box) == (0, (0, 0, 0, 0))
    assert labelme_shapes([nothing], "thing") == []
    assert not label_map([nothing], (10, 10)).any()
    assert object_table([nothing], None).decode().splitlines()[1].startswith("1,0,0,0,0,0,")


def test_more_objects_than_a_label_map_can_number():
    many = [SegmentedObject(b"", (0, 0, 0, 0), 0, 0.5, 0.5)] * 65536
    segmentation.require_countable(many[:-1])
    with pytest.raises(AnnotationError, match="65535"):
        segmentation.require_countable(many)


def test_thresholds_follow_the_model_unless_they_are_given():
    tiny, vit = (generator_settings(PredictConfig(), name) for name in ("tiny", "vit_b"))
    assert (vit["pred_iou_thresh"], vit["stability_score_thresh"]) == (0.88, 0.95)
    assert tiny["pred_iou_thresh"] < vit["pred_iou_thresh"]
    given = generator_settings(PredictConfig(pred_iou_thresh=0.7), "tiny")
    assert given == tiny | {"pred_iou_thresh": 0.7}
