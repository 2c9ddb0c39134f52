"""`samray predict` for one object of one image: which files it may replace."""

import json

import cv2
import numpy as np
import pytest

from samray.config import Config, PredictConfig
from samray.errors import ConfigError, StorageError
from samray.prediction.predictor import Predictor, predict


@pytest.fixture
def ask(tmp_path):
    """`ask(name, label) -> outputs` of a call for an image; all go into one folder."""

    def run(name, label="nut", **scaling):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), np.full((40, 60, 3), 90, np.uint8))
        settings = {"image_path": str(path), "output_dir": str(tmp_path / "out"), "label": label}
        asked = PredictConfig(points=((30, 20),), **settings)
        return predict(Config(predict=asked, scaling=scaling))

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


def test_names_too_long_for_the_outputs_are_refused_before_any_is_written(ask, tmp_path):
    fits, long = f"cam1/{'n' * 229}.png", f"cam1/{'n' * 230}.png"
    assert all(path.is_file() for path in ask(fits).values())
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match=r"too long to write a file with _overlay\.png after it"):
        ask(long)
    assert sorted((tmp_path / "out").iterdir()) == before


def test_what_cannot_be_written_is_said_in_a_sentence(ask, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("samray.storage.os.access", lambda *_: False)  # the superuser may do all
        patch.setattr(Predictor, "set_image", None)  # it is known before the image is encoded
        with pytest.raises(ConfigError, match=r"--output-dir: .*out cannot be written"):
            ask("cam1/0001.jpg")

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("samray.prediction.predictor.write_bytes", fails)
    with pytest.raises(ConfigError, match=r"--output-dir: .*.* written .*Input/output error"):
        ask("cam1/0001.jpg")


def test_a_refusal_of_the_server_is_passed_on(ask, monkeypatch):
    def refuse(path):
        raise StorageError("s3://bucket/a.jpg: no permission")

    monkeypatch.setattr("samray.prediction.predictor.read_image_file", refuse)
    with pytest.raises(StorageError, match="no permission"):
        ask("cam1/0001.jpg")


@pytest.mark.parametrize(("wanted", "used"), [("cpu", "cpu"), ("auto", "cuda"), ("gpu", "cuda")])
def test_the_device_is_the_one_asked_for(ask, monkeypatch, wanted, used):
    def load(path, device):
        raise LookupError(device)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(Predictor, "from_checkpoint", load)
    with pytest.raises(LookupError, match=used):
        ask("cam1/0001.jpg", device=wanted)


def test_a_gpu_that_is_not_there_is_refused(ask, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device gpu: torch sees no GPU here"):
        ask("cam1/0001.jpg", device="gpu")
