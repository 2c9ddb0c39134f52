"""All objects of several images in one COCO file, read by pycocotools."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from samray.data.labelme import labelme_document
from samray.geometry.masks import crop_mask
from samray.prediction.collection import mask_entries, write_coco
from samray.prediction.segmentation import label_map, labelme_shapes, segmented_object

SIZES = {"a/one.jpg": (40, 60), "b/none.jpg": (30, 30), "two.png": (64, 50)}


def objects_of(size):
    """A ring, a disc that lies in it in part, and an object without a pixel."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    distance = np.hypot(rows - 20, columns - 20)
    ring, disc = (distance < 15) & (distance > 8), np.hypot(rows - 20, columns - 32) < 6
    return [
        segmented_object(crop_mask(ring), 0.75, None, label="nut"),
        segmented_object(crop_mask(disc), 0.5, 0.9),
        segmented_object(crop_mask(np.zeros(size, bool)), 0.4, None),
    ]


@pytest.fixture
def documents(tmp_path):
    """What predict writes of each image: (name, LabelMe file)."""
    written = []
    for number, (name, size) in enumerate(SIZES.items()):
        objects = [] if "none" in name else objects_of(size)
        document = labelme_document(name, size, labelme_shapes(objects, None))
        document["samray"] = {"masks": mask_entries(objects, size, None)}
        written.append((name, tmp_path / f"{number}.json"))
        written[-1][1].write_text(json.dumps(document))
    return written


def test_labels_scores_and_exact_masks_of_all_images(documents, tmp_path):
    write_coco(tmp_path / "coco.json", documents)
    read = COCO(str(tmp_path / "coco.json"))
    assert {
        image["file_name"]: (image["height"], image["width"]) for image in read.imgs.values()
    } == SIZES
    for image in read.imgs.values():
        annotations = read.loadAnns(read.getAnnIds(imgIds=[image["id"]]))
        if "none" in image["file_name"]:
            assert annotations == []
            continue
        size = SIZES[image["file_name"]]
        expected = [found for found in objects_of(size) if found.area]
        assert [read.cats[a["category_id"]]["name"] for a in annotations] == ["nut", "object"]
        for found, annotation in zip(expected, annotations, strict=True):
            frame = np.zeros(size, bool)
            x1, y1, x2, y2 = found.box
            frame[y1:y2, x1:x2] = found.pixels
            np.testing.assert_array_equal(read.annToMask(annotation), frame)
            assert (annotation["area"], annotation["score"]) == (found.area, found.score)
            assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
        hidden = (label_map(expected, size) == 1).sum()
        assert hidden < expected[0].area  # the label map cannot show all of the ring


def test_one_label_for_all_and_no_image_at_all(tmp_path):
    assert {m["label"] for m in mask_entries(objects_of((40, 60)), (40, 60), "cell")} == {"cell"}
    write_coco(tmp_path / "coco.json", [])
    assert COCO(str(tmp_path / "coco.json")).imgs == {}


def test_a_failure_leaves_no_half_file(documents, tmp_path):
    documents[-1][1].write_text("{}")
    with pytest.raises(KeyError):
        write_coco(tmp_path / "coco.json", documents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json", "2.json"]
