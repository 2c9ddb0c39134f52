"""`samray predict` on many images: from a folder to files that prepare reads again."""

import csv
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from samray.config import Config, PredictConfig
from samray.data.dataset import PreparedDataset
from samray.errors import ConfigError
from samray.instances.saved import InstanceModel, instance_files, new_decoder
from samray.instances.segment import Way
from samray.prediction import batch
from samray.sam.checkpoint import save_checkpoint
from samray.sam.model import encoder_digest
from samray.sam.shipped import load_shipped
from samray.stages import _nothing_found


@pytest.fixture
def folder(photos, tmp_path):
    """Six images in two folders."""
    for number, place in enumerate(("one", "one", "two", "two", "two", "two")):
        (tmp_path / "images" / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(
            photos / "images" / f"sample_{number:05d}.jpg",
            tmp_path / "images" / place / f"photo {number}.jpg",
        )
    return tmp_path / "images"


@pytest.fixture
def predict(run_cli, ray_cluster):
    """`predict(*words) -> stdout` of a call that succeeds."""

    def run(*words):
        status, out, err = run_cli("predict", *words)
        assert status == 0, err
        return out

    return run


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_of_a_folder(folder, predict, run_cli, tmp_path):
    out = tmp_path / "out"
    text = predict("--image-path", folder, "--output-dir", out, "--coco")
    summary = json.loads((out / "predictions.json").read_text())
    coco = json.loads((out / "coco.json").read_text())
    assert "6 images" in text
    assert summary["images"] == 6
    assert not summary["rejected"]
    count = 0
    for image in sorted(folder.rglob("*.jpg")):
        target = out / image.relative_to(folder).parent / image.stem
        document = json.loads((target.parent / f"{image.stem}.json").read_text())
        numbers = cv2.imread(f"{target}_labels.png", cv2.IMREAD_UNCHANGED)
        rows = read_table(f"{target}.csv")
        assert numbers.dtype == np.uint16
        assert numbers.shape == (document["imageHeight"], document["imageWidth"])
        ids = {int(row["id"]) for row in rows}
        assert ids == set(range(1, len(rows) + 1))
        assert set(np.unique(numbers)) <= ids | {0}
        assert {int(shape["description"]) for shape in document["shapes"]} == ids
        name = image.relative_to(folder).as_posix()
        (listed,) = [entry["id"] for entry in coco["images"] if entry["file_name"] == name]
        masks = [mask for mask in coco["annotations"] if mask["image_id"] == listed]
        assert [(mask["area"], f"{mask['score']:.6f}") for mask in masks] == [
            (int(row["area"]), row["score"]) for row in rows
        ]
        assert {row["label"] for row in rows} <= {"object"}
        assert (target.parent / document["imagePath"]).resolve() == image.resolve()
        count += len(rows)
    assert count == summary["objects"] == len(coco["annotations"]) > 3
    assert [category["name"] for category in coco["categories"]] == ["object"]
    # What was found is a dataset: the images copied beside it, as a user would.
    shutil.copytree(folder, tmp_path / "round" / "images")
    shutil.copytree(out, tmp_path / "round" / "out")
    (tmp_path / "round/out/predictions.json").unlink()
    (tmp_path / "round/out/coco.json").unlink()
    images = sorted(f"images/{image.relative_to(folder)}" for image in folder.rglob("*.jpg"))
    splits = {"train": images[:4], "val": images[4:5], "test": images[5:]}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    words = ["--data-dir", tmp_path / "round", "--output-dir", tmp_path / "prepared"]
    status, _, err = run_cli("prepare", *words, "--split-file", tmp_path / "splits.json")
    assert status == 0, err
    records = PreparedDataset(tmp_path / "prepared").images
    assert sum(len(record.instances) for record in records.values()) == count


@pytest.mark.slow
def test_a_second_call_does_only_what_is_left(folder, predict, tmp_path):
    for number in (3, 4, 5):
        (folder / f"two/photo {number}.jpg").unlink()
    out = tmp_path / "out"
    grid = ("predict.points_per_side=6", "predict.pred_iou_thresh=0.3")
    words = ("--image-path", folder, "--output-dir", out, *grid)
    predict(*words, "--coco")
    kept, gone = out / "one/photo 0.json", out / "two/photo 2.csv"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert "2 were done before" in predict(*words)
    assert gone.is_file()
    assert kept.stat().st_mtime_ns == before
    assert "done before" not in predict(*words, "--label", "cell")
    assert json.loads(kept.read_text())["shapes"][0]["label"] == "cell"
    categories = json.loads((out / "coco.json").read_text())["categories"]
    assert [category["name"] for category in categories] == ["cell"]  # it follows the others


@pytest.mark.slow
def test_bad_images_are_listed_and_the_others_go_through(folder, predict, tmp_path):
    (folder / "one/photo 1.jpg").write_bytes(b"text")
    shutil.copy(folder / "one/photo 0.jpg", folder / "one/photo 0.jpeg")
    (folder / "theirs.png").write_bytes(cv2.imencode(".png", np.zeros((40, 40, 3), np.uint8))[1])
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs.json").write_text("{}")
    text = predict("--image-path", folder, "--output-dir", out)
    summary = json.loads((out / "predictions.json").read_text())
    assert summary["images"] == 5
    problems = {item["file"]: (item["field"], item["reason"]) for item in summary["rejected"]}
    assert set(problems) == {"one/photo 1.jpg", "one/photo 0.jpg", "theirs.png"}
    assert "format" in problems["one/photo 1.jpg"][1]
    assert "photo 0.jpeg" in problems["one/photo 0.jpg"][1]
    assert "not written by this command" in problems["theirs.png"][1]
    assert (out / "theirs.json").read_text() == "{}"
    for name in problems:
        assert f"rejected {name}" in text


def test_prompts_from_a_file(folder, predict, tmp_path):
    prompts = tmp_path / "prompts.json"
    box = {"id": "a", "box": [20, 20, 120, 120]}
    asked = {
        "one/photo 0.jpg": [box, {"point_coords": [[60, 60], [2, 2]], "point_labels": [1, 0]}],
        "one/photo 1.jpg": [{"box": [90, 90, 20, 20]}, {"point_coords": [[1, 2]], "colour": 1}],
        "two/photo 2.jpg": [{"box": [20, 20, 99999, 120]}],
        "../secret.jpg": [box],
        "nowhere.jpg": [box],
        "\ud800.jpg": [box],  # no text that can be printed
    }
    prompts.write_text(json.dumps(asked))
    out = tmp_path / "out"
    predict("--image-path", folder, "--output-dir", out, "--prompts", prompts)
    answer = json.loads((out / "one/photo 0.predictions.json").read_text())
    assert next(result["id"] for result in answer["results"]) == "a"
    assert len(answer["results"]) == 2
    assert {"score", "area", "bbox", "rle"} <= answer["results"][0]["masks"][0].keys()
    rows = read_table(out / "one/photo 0.csv")
    assert len(rows) == 2
    assert rows[0]["prompt_id"] == "a"
    assert int(rows[0]["area"]) == answer["results"][0]["masks"][0]["area"]
    summary = json.loads((out / "predictions.json").read_text())
    problems = {item["file"]: f"{item['field']} {item['reason']}" for item in summary["rejected"]}
    assert set(problems) == {*asked, "\\ud800.jpg"} - {"one/photo 0.jpg", "\ud800.jpg"}
    assert "prompts[0]" in problems["one/photo 1.jpg"]
    assert "colour" in problems["one/photo 1.jpg"]
    assert "prompts[0].box" in problems["two/photo 2.jpg"]
    assert "leads out" in problems["../secret.jpg"]


@pytest.mark.parametrize(
    ("content", "named"),
    [("[]", "must hold an object"), ("{", "not JSON"), (None, "cannot be read")],
)
def test_a_file_of_prompts_that_is_none(content, named, folder, tmp_path, run_cli):
    prompts = tmp_path / "prompts.json"
    if content is not None:
        prompts.write_text(content)
    words = ["--image-path", folder, "--output-dir", tmp_path / "out", "--prompts", prompts]
    status, _, err = run_cli("predict", *words)
    assert status == 2
    assert "--prompts" in err
    assert str(prompts) in err
    assert named in err
    assert not (tmp_path / "out").exists()


def test_calls_that_cannot_work(folder, photos, finder, tmp_path, run_cli):
    (tmp_path / "nothing").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/coco.json").write_text("{}")
    out = ["--output-dir", tmp_path / "out"]
    prompts = tmp_path / "prompts.json"
    prompts.write_text("{}")
    photo = folder / "one/photo 0.jpg"
    damaged, foreign = tmp_path / "damaged", tmp_path / "foreign"
    for copy in (damaged, foreign):
        shutil.copytree(finder, copy)
    (damaged / "instances.pth").write_bytes(b"damaged")
    description = json.loads((foreign / "instances.json").read_text())
    (foreign / "instances.json").write_text(json.dumps(description | {"encoder_digest": "0" * 64}))
    for words, named in (
        (["--image-path", tmp_path / "nowhere", *out], "does not exist"),
        (["--image-path", tmp_path / "nothing", *out], "no image"),
        (["--image-path", folder, "--output-dir", folder], "choose another folder"),
        (["--image-path", folder, *out, "--prompts", prompts, "--point", 3, 3], "leave those out"),
        (["--image-path", folder, *out, "--prompts", prompts, "predict.tile=200"], "--tile"),
        (["--image-path", photo, *out, "--point", 3, 3, "--coco"], "--coco is for all objects"),
        (["--checkpoint", damaged, "--image-path", folder, *out], "instances.pth: cannot be read"),
        (["--checkpoint", foreign, "--image-path", folder, *out], "delete instances.json to use"),
        (["--image-path", folder, "--output-dir", tmp_path / "theirs", "--coco"], "did not write"),
    ):
        status, _, err = run_cli("predict", *words)
        assert status == 2, err
        assert named in err
        assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finder(tmp_path_factory, ray_cluster):
    """The shipped model with an untrained instance decoder, which finds something in anything."""
    shipped, folder = load_shipped(), tmp_path_factory.mktemp("run") / "best"
    sam = shipped.model()
    model = InstanceModel(new_decoder(sam, 2, 0), ("leaf", "stone"), Way(min_area=30))
    files = instance_files(model, encoder_digest(sam))
    save_checkpoint(folder, shipped.weights, Config(), {}, more=files)
    return folder


def segment(folder, checkpoint, one_colour=False, **settings):
    """As `outcome_of`; return the LabelMe document, the table and the outcome."""
    outcome = outcome_of(folder, checkpoint, one_colour, **settings)
    with (folder / "out/a.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    return json.loads((folder / "out/a.json").read_text()), table, outcome


def outcome_of(folder, checkpoint, one_colour=False, **settings):
    """Segment a drawn image as an actor does."""
    image = np.full((150, 200, 3), 40, np.uint8)
    if not one_colour:
        cv2.circle(image, (50, 60), 30, (220, 60, 60), -1)
        cv2.rectangle(image, (110, 30), (180, 70), (60, 200, 80), -1)
    (folder / "in").mkdir(exist_ok=True)
    cv2.imwrite(str(folder / "in/a.png"), image)
    out = folder / "out"
    predict = PredictConfig(checkpoint=checkpoint and str(checkpoint), **settings)
    job = batch._job(Path(folder / "in"), Path(out), predict)
    rows = pa.Table.from_pylist([{"name": "a.png", "stamp": "1", "prompts": None}])
    (outcome,) = batch.ImageSegmenter(job)(rows).to_pylist()
    assert not outcome["error"]
    return json.loads(outcome["outcome"])


def test_objects_have_the_labels_of_the_model_and_again_does_only_what_is_missing(tmp_path, finder):
    document, table, outcome = segment(tmp_path, finder)
    assert outcome == {
        "file": "a.png", "reason": None, "objects": len(table), "found": False, "corrected": False,
    }  # fmt: skip
    assert table
    assert {row["label"] for row in table} <= {"leaf", "stone"}
    for shape in document["shapes"]:
        assert shape["label"] == table[int(shape["description"]) - 1]["label"]
    assert segment(tmp_path, finder)[2]["found"]
    document, _, outcome = segment(tmp_path, finder, label="thing", tile=128)
    assert not outcome["found"]  # other settings
    assert {shape["label"] for shape in document["shapes"]} == {"thing"}


@pytest.mark.parametrize("by", ["shapes", "flags"])
def test_a_labelme_file_that_somebody_corrected_is_kept(by, tmp_path, finder):
    document, table, _ = segment(tmp_path, finder)
    if by == "flags":
        document["flags"] = {"checked": True}
    else:
        document["shapes"][0]["label"] = "corrected"
    (tmp_path / "out/a.json").write_text(json.dumps(document))
    outcome = segment(tmp_path, finder)[2]
    assert (outcome["found"], outcome["corrected"]) == (True, True)  # nothing to do
    (tmp_path / "out/a_labels.png").unlink()
    for settings in ({}, {"label": "thing"}):
        kept, rows, outcome = segment(tmp_path, finder, **settings)
        assert outcome["field"] == "output"
        assert re.search(r"a\.json was changed after .* move it away", outcome["reason"])
        assert (kept, rows) == (document, table)


def test_files_of_others_are_left_alone_and_those_of_a_killed_call_replaced(tmp_path, finder):
    own = segment(tmp_path, finder)
    (tmp_path / "out/a.json").unlink()  # written last
    (tmp_path / "out/a_labels.png").unlink()
    assert segment(tmp_path, finder) == own
    for name in ("a.csv", "a_labels.png"):
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out" / name).write_text("my,own,measurements")
        outcome = outcome_of(tmp_path, finder)
        assert outcome["field"] == "output"
        assert f"{name} is there and was not written by this command" in outcome["reason"]
        assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory):
    """The shipped model with another image encoder: no instance decoder fits it."""
    shipped, folder = load_shipped(), tmp_path_factory.mktemp("run") / "grid"
    weights = {name: value.clone() for name, value in shipped.weights.items()}
    weights["image_encoder.neck.0.weight"] *= 1.001
    save_checkpoint(folder, weights, Config(), {})
    return folder


@pytest.mark.parametrize("given", [None, "finder", "other_encoder"])
def test_the_grid_is_for_models_without_an_instance_decoder(given, request, tmp_path, capsys):
    """`tiny` as it ships has one; its objects have no label of their own."""
    checkpoint = given and request.getfixturevalue(given)
    few = {"points_per_side": 6, "pred_iou_thresh": 0.3}
    document, table, _ = segment(tmp_path, checkpoint, **few)
    assert table
    grid = given == "other_encoder"
    assert all((row["stability_score"] != "") == grid for row in table)
    note = "note: points_per_side, pred_iou_thresh: of the grid"
    assert (note in capsys.readouterr().out) == (not grid)
    if given is None:
        assert {shape["label"] for shape in document["shapes"]} == {"object"}


@pytest.mark.parametrize("given", [None, "other_encoder"])
def test_an_image_of_one_colour_gives_whole_outputs(given, request, tmp_path):
    checkpoint = given and request.getfixturevalue(given)
    document, table, outcome = segment(tmp_path, checkpoint, one_colour=True, points_per_side=4)
    assert outcome["reason"] is None
    assert len(table) == outcome["objects"] == len(document["samray"]["masks"])
    assert (tmp_path / "out/a_labels.png").is_file()


@pytest.mark.parametrize(
    ("objects", "prompts", "generator", "said"),
    [
        (0, None, {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}, True),
        (3, None, {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}, False),
        (0, "prompts.json", {"pred_iou_thresh": 0.88, "stability_score_thresh": 0.95}, False),
        (0, None, {"instance_decoder": "d", "way": {}, "tile": None}, False),
    ],
)
def test_where_the_grid_drops_all_masks_its_thresholds_are_named(objects, prompts, generator, said):
    summary = {"objects": objects, "settings": {"label": None, "prompts": prompts, **generator}}
    advice = _nothing_found(summary)
    assert (advice is not None) == said
    if advice:
        assert re.search(r"lower predict\.pred_iou_thresh \(0\.88\) and .* \(0\.95\)", advice)


def test_where_nothing_is_found_the_outputs_are_empty_and_done(finder, tmp_path):
    folder = tmp_path / "best"
    shutil.copytree(finder, folder)
    description = json.loads((folder / "instances.json").read_text())
    description["way"]["min_area"] = 1e9
    (folder / "instances.json").write_text(json.dumps(description))
    document, table, outcome = segment(tmp_path, folder)
    assert (document["shapes"], table, outcome["objects"]) == ([], [], 0)
    assert not cv2.imread(str(tmp_path / "out/a_labels.png"), cv2.IMREAD_UNCHANGED).any()
    assert segment(tmp_path, folder)[2]["found"]


def test_tiles_need_an_instance_decoder_and_no_prompts(tmp_path, other_encoder):
    with pytest.raises(ConfigError, match=r"^--tile: .*grid has no instance decoder.*leave it out"):
        batch._job(tmp_path, tmp_path, PredictConfig(checkpoint=str(other_encoder), tile=128))
    with pytest.raises(ConfigError, match=r"^--tile does not go with --prompts"):
        batch._require_batch(PredictConfig(tile=128, prompts="prompts.json"))
