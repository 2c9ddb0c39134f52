"""The weights in the package: small, verified, and useful without training."""

import json
import shutil

import pytest
import torch

from samray.data.sample_data import _render
from samray.errors import CheckpointError
from samray.evaluation.metrics import iou_and_dice
from samray.geometry.prompts import Prompt, tight_box
from samray.prediction.predictor import Predictor
from samray.sam.model import build_model, tiny_architecture
from samray.sam.shipped import SHIPPED, load_shipped


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "weights")


def test_they_load_and_are_small():
    checkpoint = load_shipped()
    own = build_model("tiny").state_dict()
    assert checkpoint.weights.keys() == own.keys()
    assert all(value.dtype == torch.float32 for value in checkpoint.weights.values())
    assert (SHIPPED / "tiny.safetensors").stat().st_size <= 25e6
    description = json.loads((SHIPPED / "tiny.json").read_text())
    assert description["parameters"] == sum(value.numel() for value in own.values()) <= 12e6


def test_a_file_that_is_not_the_described_one_is_refused_with_both_named(copy):
    path = copy / "tiny.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_shipped(copy)
    expected = json.loads((copy / "tiny.json").read_text())["sha256"]
    assert "tiny.safetensors" in str(caught.value)
    assert "tiny.json" in str(caught.value)
    assert expected in str(caught.value)


def test_weights_of_another_architecture_are_refused_with_both_named(copy):
    description = json.loads((copy / "tiny.json").read_text())
    description["architecture"]["widths"][0] = 64
    (copy / "tiny.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError) as caught:
        load_shipped(copy)
    assert str(description["architecture"]) in str(caught.value)
    assert str(tiny_architecture()) in str(caught.value)


def test_a_missing_file_says_what_to_do(copy):
    (copy / "tiny.safetensors").unlink()
    with pytest.raises(CheckpointError, match="install samray again"):
        load_shipped(copy)


def test_they_segment_boxes_on_images_of_another_kind():
    predictor = Predictor.from_checkpoint()
    ious = []
    for index in range(3):
        image, label_map, labels = _render(5, index)
        predictor.set_image(image)
        for number in range(1, len(labels) + 1):
            mask = label_map == number
            answer = predictor.predict(Prompt(box=tight_box(mask))).best
            ious.append(iou_and_dice(answer, mask)[0])
    assert sum(ious) / len(ious) > 0.6
