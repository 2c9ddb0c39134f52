"""`samray predict` for many images: what is listed and planned, before Ray or a model is needed."""

import json
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from samray import stages
from samray.config import Config, PredictConfig
from samray.errors import AnnotationError, ConfigError
from samray.prediction import batch
from samray.storage import write_bytes


@pytest.fixture
def photos(tmp_path):
    """`photos(*names) -> folder` with such files, all empty."""
    folder = tmp_path / "photos"

    def make(*names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"")
        return folder

    return make


def plan(folder, output, entries=None):
    return batch._plan(batch._find_images(folder, output), entries, on_disk=True)


def names(found):
    return [item["name"] for item in found.work]


def problems(found):
    return [(item["file"], item["field"], item["reason"]) for item in found.rejected]


@pytest.mark.parametrize("output", ["out", "photos/out"])
def test_images_of_formats_that_are_not_read_are_rejected(output, photos, tmp_path):
    folder = photos("a.jpg", "b.HEIC", "sub/c.gif", "out/d.gif")
    found = plan(folder, tmp_path / output)
    assert names(found) == ["a.jpg"]
    listed = (
        ["b.HEIC", "sub/c.gif"] if output == "photos/out" else ["b.HEIC", "out/d.gif", "sub/c.gif"]
    )
    assert [(file, field) for file, field, _ in problems(found)] == [
        (file, "format") for file in listed
    ]
    assert "does not read .heic; convert it to PNG or JPEG" in problems(found)[0][2]


def test_an_entry_for_an_image_of_such_a_format_is_rejected_once_with_the_reason(photos, tmp_path):
    folder = photos("a.jpg", "b.heic")
    found = plan(folder, tmp_path / "out", {"./b.heic": [], "c.heic": []})
    assert [(file, field) for file, field, _ in problems(found)] == [
        ("b.heic", "format"),
        ("c.heic", "name"),
    ]
    assert found.skipped == 1


def test_a_folder_of_such_images_alone_says_so(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"no image in it or below.*2 .*a\.heic .*convert it to"):
        plan(photos("a.heic", "b.heic"), tmp_path / "out")


SUMMARY = json.dumps({"model": {}, "rejected": [], "found": 0})


def test_results_of_earlier_calls_inside_the_images_folder_are_no_images(photos, tmp_path, capsys):
    folder = photos("a.jpg", "v1/a_labels.png", "v1/sub/b_labels.png", "theirs/c.jpg", "v2/d.jpg")
    photos("other/predictions.json", "other/e.jpg")  # an empty file
    (folder / "v1/predictions.json").write_text(SUMMARY)
    (folder / "theirs/predictions.json").write_text('{"mine": 1}')
    assert names(plan(folder, folder / "v2")) == ["a.jpg", "other/e.jpg", "theirs/c.jpg"]
    assert (
        "note: 2 images are left out: results of earlier calls, in v1\n" in capsys.readouterr().out
    )
    assert names(plan(folder / "v1", tmp_path / "out")) == ["a_labels.png", "sub/b_labels.png"]


def job(tmp_path):
    return batch.BatchJob(tmp_path, tmp_path / "out", None, {}, {}, None, None)


def test_images_corrected_by_hand_are_counted_and_named(tmp_path, monkeypatch, capsys):
    done = {"reason": None, "objects": 2, "found": True}
    outcomes = [{"file": f"{n}.jpg", **done, "corrected": n > 0} for n in range(12)]
    monkeypatch.setattr(batch, "_run", lambda *_: outcomes)
    monkeypatch.setattr(batch, "cluster", Mock())
    work = [{"name": "0.jpg"}]
    summary = batch._predict(batch.BatchPlan(work, 0, []), job(tmp_path), Config(), False)
    assert len(summary["corrected"]) == 11
    monkeypatch.setattr(batch, "predict_images", lambda _: summary)
    stages.run_predict(Config())
    printed = capsys.readouterr().out
    assert "11 corrected by hand; the other outputs show what was found: 1.jpg, 10.jpg" in printed


def test_a_call_that_is_killed_between_two_outputs_can_be_given_again(tmp_path, monkeypatch):
    def killed_after(write):
        def run(*arguments):
            write(*arguments)
            raise KeyboardInterrupt

        return run

    nothing = batch.BatchPlan([], 0, [])
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_json", killed_after(batch.write_json))
        patch.setattr(batch, "write_coco", killed_after(batch.write_coco))
        with pytest.raises(KeyboardInterrupt):
            batch._predict(nothing, job(tmp_path), Config(), coco=True)
    batch._require_own(tmp_path / "out", coco=True)
    batch._predict(nothing, job(tmp_path), Config(), coco=True)
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["coco.json", "predictions.json"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a.jpg": [], "b.jpg": [], "a.jpg": []}', "a.jpg"),
        ('{"a.jpg": [{"box": [1, 2, 3, 4], "box": [5, 6, 7, 8]}]}', "box"),
    ],
)
def test_a_key_that_is_twice_in_the_prompts_is_refused(text, key, tmp_path):
    (tmp_path / "prompts.json").write_text(text)
    settings = PredictConfig(prompts=str(tmp_path / "prompts.json"))
    with pytest.raises(ConfigError, match=rf"^--prompts: .*prompts\.json has '{key}' twice"):
        batch._read_prompts(settings)


def test_prompts_need_no_grid(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "instances_of", lambda *_: None)
    asked = PredictConfig(prompts="prompts.json", points_per_side=5)
    assert batch._job(tmp_path, tmp_path, asked).generator == {}
    assert "grid" not in capsys.readouterr().out


def test_with_prompts_only_a_missing_file_has_them_answered_again(tmp_path, monkeypatch):
    monkeypatch.setattr(batch.cluster, "actor_device", lambda: "cpu")  # it asks Ray
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), np.full((40, 60, 3), 90, np.uint8))
    row = {"name": "a.png", "stamp": "1", "prompts": '[{"box": [5, 5, 30, 30]}]'}

    def found(**settings):
        asked = PredictConfig(prompts="prompts.json", **settings)
        segmenter = batch.ImageSegmenter(batch._job(tmp_path / "in", tmp_path / "out", asked))
        return segmenter._segment(row)["found"]

    assert not found()
    assert found(points_per_side=5)  # no grid is used
    (tmp_path / "out/a.predictions.json").unlink()
    assert not found()
    assert (tmp_path / "out/a.predictions.json").is_file()


def test_the_results_of_another_image_of_the_same_name_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(batch.cluster, "actor_device", lambda: "cpu")  # it asks Ray

    def segment(folder, stamp, **settings):
        (tmp_path / folder).mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / folder / "a.png"), np.full((40, 60, 3), 90, np.uint8))
        asked = PredictConfig(prompts="prompts.json", **settings)
        job = batch._job(tmp_path / folder, tmp_path / "out", asked)
        row = {"name": "a.png", "stamp": stamp, "prompts": '[{"box": [5, 5, 30, 30]}]'}
        return batch.ImageSegmenter(job)._segment(row)

    segment("day1", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(AnnotationError, match=r"a\.json is of another image, \.\./day1/a\.png"):
        segment("day2", "2")
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert segment("day1", "1")["found"]
    assert not segment("day1", "1", label="nut")["found"]  # its own are replaced


def test_a_call_that_does_no_image_leaves_the_list_of_all_objects(tmp_path, monkeypatch):
    failed = {"file": "a.png", "field": "output", "reason": "is of another image", "found": False}
    monkeypatch.setattr(batch, "_run", lambda *_: [failed])
    monkeypatch.setattr(batch, "cluster", Mock())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/coco.json").write_text("of an earlier call")
    batch._predict(batch.BatchPlan([{"name": "a.png"}], 0, []), job(tmp_path), Config(), True)
    assert (tmp_path / "out/coco.json").read_text() == "of an earlier call"


def test_an_image_whose_outputs_would_have_too_long_names_is_rejected(photos, tmp_path):
    long, fits = "核" * 77 + ".jpg", "n" * 230 + ".jpg"
    folder = photos(f"sub/{long}", f"sub/{fits}")
    found = plan(folder, tmp_path / "out")
    assert names(found) == [f"sub/{fits}"]
    ((file, field, reason),) = problems(found)
    assert (file, field) == (f"sub/{long}", "name")
    assert reason.endswith("rename the image")
    write_bytes(tmp_path / f"{'n' * 230}_labels.png", b"")
    with pytest.raises(OSError, match="too long"):
        write_bytes(tmp_path / f"{'n' * 231}_labels.png", b"")
    prompts = {f"sub/{fits}": [{"box": [1, 1, 5, 5]}]}  # their answers have longer names
    assert problems(plan(folder, tmp_path / "out", prompts))[0][:2] == (f"sub/{fits}", "name")
