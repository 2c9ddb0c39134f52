"""`samray predict` for one object of one image: which files it may replace."""

import json

import cv2
import numpy as np
import pytest

from samray.config import Config, PredictConfig
from samray.errors import ConfigError
from samray.prediction.predictor import predict


@pytest.fixture
def ask(tmp_path):
    """`ask(name, label) -> outputs` of a call for an image; all go into one folder."""

    def run(name, label):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((40, 60, 3), 90, np.uint8))
        settings = {"image_path": str(path), "output_dir": str(tmp_path / "out"), "label": label}
        return predict(Config(predict=PredictConfig(points=((30, 20),), **settings)))

    return run


def test_the_next_call_for_the_same_image_replaces_its_files(ask):
    ask("cam1/0001.jpg", "first")
    outputs = ask("cam1/0001.jpg", "second")
    (shape, *_) = json.loads(outputs["labelme"].read_text())["shapes"]
    assert shape["label"] == "second"


@pytest.mark.parametrize("other", ["cam2/0001.jpg", "cam1/0001.png"])
def test_the_files_of_another_image_of_the_same_name_are_left_alone(other, ask):
    outputs = ask("cam1/0001.jpg", "first")
    before = {path: path.read_bytes() for path in outputs.values()}
    with pytest.raises(ConfigError, match=r"0001\.json is there .* for this image.*choose another"):
        ask(other, "second")
    assert {path: path.read_bytes() for path in outputs.values()} == before


def test_a_file_of_all_objects_of_the_image_is_left_alone(ask):
    path = ask("cam1/0001.jpg", "first")["labelme"]
    document = json.loads(path.read_text())
    document["samray"] |= {"digest": "0", "objects": 1}  # as `predict_images` writes it
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"0001\.json is there .* for this image"):
        ask("cam1/0001.jpg", "second")
    assert json.loads(path.read_text()) == document


def test_the_annotation_beside_the_image_is_left_alone(ask, tmp_path):
    annotation = tmp_path / "out" / "0001.json"
    annotation.parent.mkdir()
    annotation.write_text("{}")
    with pytest.raises(ConfigError, match=r"0001\.json is there .* for this image"):
        ask("out/0001.jpg", "first")
    assert annotation.read_text() == "{}"
    annotation.unlink()
    for label in ("first", "second"):
        ask("out/0001.jpg", label)
    assert '"second"' in annotation.read_text()
