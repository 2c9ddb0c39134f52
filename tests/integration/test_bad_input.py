"""Mistakes of users on the command line: one line that says what to do, never a traceback, and no
work is started. Bad items among good ones are listed, and the good ones are prepared.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.runs import RunFolder
from samray.sam.model import build_model
from samray.storage import LOCK, lock_folder

ALL_TRAIN = ("prepare.val_fraction=0", "prepare.test_fraction=0")
SECRET = b"the owner's secret, which no dataset may hold"


def refused(result: tuple[int, str, str], *words: str) -> str:
    """Assert that a stage reported a mistake of the user correctly; return its line."""
    status, out, err = result
    assert "Traceback" not in err
    assert status == 2, (out, err)
    lines = err.splitlines()
    assert len(lines) == 1, f"not one line: {err}"
    assert lines[0].startswith("samray ")
    assert ": error: " in lines[0]
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.fixture
def few(photos: Path, tmp_path: Path) -> Path:
    """Four good pairs in a folder that a test may change."""
    for number in range(4):
        for name in (f"images/sample_{number:05d}.jpg", f"annotations/sample_{number:05d}.json"):
            (tmp_path / "few" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(photos / name, tmp_path / "few" / name)
    return tmp_path / "few"


def change(data: Path, **entries: object) -> None:
    """Set top-level entries of the second pair's JSON."""
    path = data / "annotations" / "sample_00001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_shape(data: Path, **entries: object) -> None:
    """Set entries of its first shape."""
    path = data / "annotations" / "sample_00001.json"
    shapes = json.loads(path.read_text())["shapes"]
    shapes[0] |= {"group_id": None} | entries
    change(data, shapes=shapes)


def cut(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


# ---- prepare: bad items among good ones ----------------------------------------------------


def not_json(data: Path) -> None:
    (data / "annotations/sample_00001.json").write_text("{'single': quotes}")


def another_kind_of_json(data: Path) -> None:
    (data / "annotations/sample_00001.json").write_text('{"images": [], "categories": []}')


def not_text(data: Path) -> None:
    (data / "annotations/sample_00001.json").write_bytes(b"\xff\xfe\x00garbage")


def truncated_jpeg(data: Path) -> None:
    cut(data / "images/sample_00001.jpg")


def empty_image(data: Path) -> None:
    (data / "images/sample_00001.jpg").write_bytes(b"")


def text_named_jpg(data: Path) -> None:
    (data / "images/sample_00001.jpg").write_text("<html>404</html>")


def two_points(data: Path) -> None:
    change_shape(data, points=[[10, 10], [50, 50]])


def nan_point(data: Path) -> None:
    change_shape(data, points=[[10, 10], [50, float("nan")], [50, 50]])


def outside(data: Path) -> None:
    change_shape(data, points=[[9000, 10], [9050, 10], [9050, 50]])


def no_label(data: Path) -> None:
    change_shape(data, label=" ")


def lone_surrogate(data: Path) -> None:
    change_shape(data, label="\ud800")


def an_ellipse(data: Path) -> None:
    change_shape(data, shape_type="ellipse", points=[[10, 10], [50, 50]])


def out_of_the_folder(data: Path) -> None:
    change(data, imagePath="../../etc/passwd")


def absolute_path(data: Path) -> None:
    change(data, imagePath="/etc/passwd")


def json_without_image(data: Path) -> None:
    (data / "images/sample_00001.jpg").unlink()


def other_size(data: Path) -> None:
    change(data, imageHeight=11, imageWidth=22)


def no_size(data: Path) -> None:
    change(data, imageHeight=-1)


def second_json(data: Path) -> None:
    text = (data / "annotations/sample_00001.json").read_text()
    (data / "annotations/sample_00001_copy.json").write_text(text)


def unlabelled_but_broken(data: Path) -> None:
    (data / "images/alone.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")


def too_many_megapixels(data: Path) -> None:
    claim_size(data, 12_000)


def pixel_bomb(data: Path) -> None:
    claim_size(data, 20_000)


def claim_size(data: Path, pixels: int) -> None:
    """Make a PNG of a few bytes whose header declares a large square."""
    side = pixels.to_bytes(4, "big")
    png = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + side + side + b"\x08\x02\0\0\0", b"IDAT" + zlib.compress(bytes(99))):
        crc = zlib.crc32(chunk).to_bytes(4, "big")
        png += (len(chunk) - 4).to_bytes(4, "big") + chunk + crc
    (data / "images/sample_00001.jpg").write_bytes(png)


JSON_FILE = "annotations/sample_00001.json"
BAD_ITEMS: dict[Callable[[Path], None], tuple[str, str, str, bool]] = {
    # change to the folder: (file, field, part of the reason, whether the pair is lost)
    not_json: (JSON_FILE, "file", "is not JSON", True),
    another_kind_of_json: (JSON_FILE, "shapes", "another kind of JSON", True),
    not_text: (JSON_FILE, "file", "UTF-8", True),
    truncated_jpeg: (JSON_FILE, "image", "sample_00001.jpg", True),
    empty_image: (JSON_FILE, "image", "sample_00001.jpg", True),
    text_named_jpg: (JSON_FILE, "image", "no known image format", True),
    two_points: (JSON_FILE, "shapes[0].points", "2 points; it needs 3 or more", False),
    nan_point: (JSON_FILE, "shapes[0].points[1]", "finite", False),
    outside: (JSON_FILE, "shapes[0].points", "outside the image", False),
    no_label: (JSON_FILE, "shapes[0].label", "not empty", False),
    lone_surrogate: (JSON_FILE, "shapes[0].label", "ud800", False),
    an_ellipse: (JSON_FILE, "shapes[0].shape_type", "samray reads polygon", False),
    out_of_the_folder: (JSON_FILE, "imagePath", "leads out of the dataset", True),
    absolute_path: (JSON_FILE, "imagePath", "leads out of the dataset", True),
    json_without_image: (JSON_FILE, "imagePath", "points nowhere", True),
    other_size: (JSON_FILE, "imageHeight, imageWidth", "22 x 11", True),
    no_size: (JSON_FILE, "imageHeight", "whole number", True),
    second_json: ("annotations/sample_00001_copy.json", "imagePath", "already annotated", False),
    unlabelled_but_broken: ("images/alone.png", "image", "cannot be decoded", False),
    too_many_megapixels: (JSON_FILE, "image", "144 megapixels; the limit is 100", True),
    pixel_bomb: (JSON_FILE, "image", "400", True),
}


@pytest.mark.parametrize("spoil", BAD_ITEMS, ids=lambda spoil: spoil.__name__)
def test_a_bad_item_is_listed_and_the_good_ones_are_prepared(
    spoil, few, tmp_path, run_cli, ray_cluster
):
    file, field, reason, pair_lost = BAD_ITEMS[spoil]
    spoil(few)
    output = tmp_path / "prepared"
    words = ["prepare", "--data-dir", few, "--output-dir", output, *ALL_TRAIN]

    status, out, err = run_cli(*words, "--strict")
    assert status == 2, out
    assert "Traceback" not in err
    head, item = err.splitlines()
    assert "--strict" in head
    assert f"{file}: {field}: " in item
    assert reason in item
    assert not (output / "manifest.json").exists()

    status, out, err = run_cli(*words)  # the shards exist: it only publishes
    assert (status, err) == (0, "")
    assert f"rejected {file}: {field}: " in out
    manifest = json.loads((output / "manifest.json").read_text())
    (rejected,) = manifest["rejected"]
    assert (rejected["file"], rejected["field"]) == (file, field)
    assert reason in rejected["reason"]
    good = {f"images/sample_{number:05d}.jpg" for number in range(4)}
    if pair_lost:
        good -= {"images/sample_00001.jpg"}  # and it does not count as unlabelled
    assert set(manifest["splits"]["train"]) == good
    assert manifest["unlabelled"] == []
    dataset = PreparedDataset(output)
    assert set(dataset.images) == good
    assert all(record.instances for record in dataset.images.values())


def test_every_bad_item_is_on_stderr_under_strict(few, tmp_path, run_cli, ray_cluster):
    not_json(few)
    cut(few / "images/sample_00002.jpg")
    (few / "annotations/lost.json").write_text('{"shapes": [], "imagePath": "lost.jpg"}')
    unlabelled_but_broken(few)
    output = tmp_path / "prepared"
    words = ["prepare", "--data-dir", few, "--output-dir", output, *ALL_TRAIN]
    status, out, err = run_cli(*words, "--strict")
    assert (status, out) == (2, "")
    head, *items = err.splitlines()
    assert "4 bad items" in head
    assert sorted(item.split(":")[0].strip() for item in items) == [
        "annotations/lost.json",
        "annotations/sample_00001.json",
        "annotations/sample_00002.json",
        "images/alone.png",
    ]
    assert not (output / "manifest.json").exists()
    assert run_cli(*words)[0] == 0
    # --strict also applies to what an earlier call has accepted.
    status, out, err = run_cli(*words, "--strict")
    assert (status, out, len(err.splitlines())) == (2, "", 5)


def test_strict_lists_all_where_nothing_is_usable(few, tmp_path, run_cli, ray_cluster):
    for image in few.glob("images/*.jpg"):
        cut(image)
    words = ["prepare", "--data-dir", few, "--output-dir", tmp_path / "p"]
    refused(run_cli(*words), str(few), "no instance is usable", "4 problems", "sample_00000.jpg")
    status, _, err = run_cli(*words, "--strict")
    assert (status, len(err.splitlines())) == (2, 5)
    assert not (tmp_path / "p" / "manifest.json").exists()


@pytest.mark.parametrize("how", ["relative", "absolute", "link", "linked folder"])
def test_nothing_from_outside_the_folder_gets_into_the_dataset(
    how, few, tmp_path, run_cli, ray_cluster
):
    """The file outside is a good image, so only the path can be the reason to refuse it."""
    outside = tmp_path / "private" / "diary.png"
    outside.parent.mkdir()
    Image.fromarray(np.zeros((50, 60, 3), np.uint8)).save(outside)
    with outside.open("ab") as file:
        file.write(SECRET)
    if how == "link":
        (few / "images/diary.png").symlink_to(outside)
    elif how == "linked folder":
        (few / "private").symlink_to(outside.parent, target_is_directory=True)
    paths = {"relative": "../../private/diary.png", "absolute": str(outside)}
    paths |= {"link": "../images/diary.png", "linked folder": "../private/diary.png"}
    square = {"label": "a", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
    (few / "annotations/x.json").write_text(
        json.dumps({"shapes": [square], "imagePath": paths[how]})
    )
    output = tmp_path / "prepared"
    status, _, err = run_cli(
        "prepare", "--data-dir", few, "--output-dir", output, "--visualize", *ALL_TRAIN
    )
    assert (status, err) == (0, "")
    manifest = json.loads((output / "manifest.json").read_text())
    rejected = {problem["file"]: problem["field"] for problem in manifest["rejected"]}
    assert rejected.pop("annotations/x.json") == "imagePath"
    assert rejected == {
        "link": {"images/diary.png": "file"},
        "linked folder": {"private": "folder"},
    }.get(how, {})
    assert manifest["num_images"] == 4
    written = [path for path in output.rglob("*") if path.is_file()]
    assert any((few / "images/sample_00000.jpg").read_bytes() in p.read_bytes() for p in written)
    assert not any(SECRET in path.read_bytes() for path in written)
    assert not any("diary" in path.name for path in written)


def coco_file(path: Path, *file_names: str, **entries: object) -> None:
    """A COCO file with a square in each image of 60 x 50 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    square = {"category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]} | entries
    document = {
        "type": "instances",
        "images": [
            {"id": n, "file_name": name, "width": 60, "height": 50}
            for n, name in enumerate(file_names)
        ],
        "annotations": [square | {"id": n, "image_id": n} for n in range(len(file_names))],
        "categories": [{"id": 1, "name": "nut"}],
    }
    path.write_text(json.dumps(document))


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (50, 60), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def test_folders_without_a_usable_pair_end_with_the_reason(tmp_path, run_cli, ray_cluster):
    """JSON alone, a damaged file alone, crowds alone, links alone, other formats alone."""

    def prepared(data: Path, *words: str) -> tuple[int, str, str]:
        output = tmp_path / f"{data.name} prepared{len(words)}"
        return run_cli("prepare", "--data-dir", data, "--output-dir", output, *ALL_TRAIN, *words)

    data = tmp_path / "coco alone"
    coco_file(data / "c.json", "a.png", "b.png")
    refused(prepared(data), "no instance is usable; 2 problems", "there is no image 'a.png'")

    data = tmp_path / "damaged coco"
    coco_file(data / "c.json", "a.png")
    cut(data / "c.json")
    refused(prepared(data), "no instance is usable", "c.json: file: is not JSON")

    data = tmp_path / "no categories"
    noise(data / "a.png")
    coco_file(data / "c.json", "a.png")
    document = json.loads((data / "c.json").read_text())
    del document["categories"]
    (data / "c.json").write_text(json.dumps(document))
    message = refused(prepared(data), "c.json: categories: a COCO instance file has a list here")
    assert "LabelMe" not in message

    data = tmp_path / "labelme alone"
    data.mkdir()
    (data / "a.json").write_text('{"shapes": [], "imagePath": "a.png"}')
    refused(prepared(data), "no instance is usable", "there is no image named a.*")

    data = tmp_path / "crowds"
    noise(data / "a.png")
    coco_file(data / "c.json", "a.png", iscrowd=1)
    refused(prepared(data), "1 annotations are crowds", "prepare.crowd_as_instances=true")
    assert prepared(data, "prepare.crowd_as_instances=true")[0] == 0

    data = tmp_path / "links"
    noise(tmp_path / "store/a.png")
    coco_file(tmp_path / "store/c.json", "a.png")
    data.mkdir()
    for name in ("a.png", "c.json"):
        (data / name).symlink_to(tmp_path / "store" / name)
    refused(prepared(data), "no LabelMe JSON or COCO file", "is a link out", "prepare.link_root")
    assert prepared(data, f"prepare.link_root={tmp_path / 'store'}")[0] == 0

    data = tmp_path / "gif"
    noise(data / "a.gif")
    refused(prepared(data), "0 images, 1 of formats that are not read")
    coco_file(data / "c.json", "a.gif")
    refused(prepared(data), "a.gif is there, but samray does not read .gif; convert it to PNG")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_listed(few, tmp_path, run_cli, ray_cluster):
    (few / "annotations/sample_00001.json").chmod(0)
    coco_file(few / "c.json", "a.png")
    (few / "c.json").chmod(0)
    noise(few / "locked/a.png")
    (few / "locked").chmod(0)
    output = tmp_path / "prepared"
    words = ["prepare", "--data-dir", few, "--output-dir", output, *ALL_TRAIN]
    try:
        assert run_cli(*words)[0] == 0
    finally:
        (few / "locked").chmod(0o700)
    manifest = json.loads((output / "manifest.json").read_text())
    rejected = {(r["file"], r["field"]): r["reason"] for r in manifest["rejected"]}
    assert set(rejected) == {
        ("annotations/sample_00001.json", "file"), ("c.json", "file"), ("locked", "folder"),
    }  # fmt: skip
    assert all("cannot be read (Permission denied)" in reason for reason in rejected.values())


def test_long_and_foreign_labels_end_no_prepare(tmp_path, ray_cluster):
    """stdout in ASCII, as in cron jobs and minimal containers."""
    data = tmp_path / "data"
    for number, label in enumerate(("пчела 🐝", "x" * 5000, "two\nlines")):
        noise(data / f"{number}.png", number)
        square = {"label": label, "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}
        document = {"shapes": [square], "imagePath": f"{number}.png"}
        (data / f"{number}.json").write_text(json.dumps(document))
    program = "import sys; from samray.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["prepare", "--data-dir", data, "--output-dir", tmp_path / "p", *ALL_TRAIN]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env={
            **os.environ,
            "PYTHONIOENCODING": "ascii",
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "\\u043f" in done.stdout
    assert "two lines 1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 300


# ---- prepare: no usable input --------------------------------------------------------------


def test_a_missing_folder(tmp_path, run_cli):
    words = ["--output-dir", tmp_path / "out"]
    folder = tmp_path / "nowhere"
    refused(run_cli("prepare", "--data-dir", folder, *words), "--data-dir", str(folder), "exist")
    (tmp_path / "file").write_text("")
    refused(run_cli("prepare", "--data-dir", tmp_path / "file", *words), "is a file, not a folder")
    refused(run_cli("prepare", *words), "missing --data-dir")
    refused(run_cli("prepare"), "--data-dir", "--output-dir")
    refused(run_cli("prepare", "--data-dir", "gs://bucket/photos", *words), "neither a local path")
    assert not (tmp_path / "out").exists()


def test_an_unusable_output_folder(few, tmp_path, run_cli):
    (tmp_path / "file").write_text("")
    words = ["prepare", "--data-dir", few, "--output-dir"]
    refused(run_cli(*words, tmp_path / "file" / "out"), "--output-dir", "cannot be created")
    refused(run_cli(*words, few / "out"), "--output-dir", "inside --data-dir")
    (tmp_path / "list").mkdir()
    (tmp_path / "list/manifest.json").write_text("[]")
    refused(run_cli(*words, tmp_path / "list"), "--output-dir", "choose another folder")


def test_a_relative_path_in_a_ray_job(few, tmp_path, run_cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    line = refused(run_cli("prepare", "--data-dir", "few", "--output-dir", "out"), "--data-dir")
    assert "absolute" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pairs(few, tmp_path, run_cli):
    words = ["--output-dir", tmp_path / "out"]
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(run_cli("prepare", "--data-dir", empty, *words), str(empty), "no LabelMe JSON")
    images, annotations = few / "images", few / "annotations"
    line = refused(run_cli("prepare", "--data-dir", images, *words), "no LabelMe JSON", "4 images")
    assert "check --data-dir" in line
    assert not (tmp_path / "out").exists()
    refused(run_cli("prepare", "--data-dir", annotations, *words), "no instance", "add the image")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_name_that_is_not_unicode(few, tmp_path, run_cli):
    try:
        shutil.copy(few / "images/sample_00000.jpg", os.fsencode(few / "images") + b"/caf\xe9.jpg")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    words = ["prepare", "--data-dir", few, "--output-dir", tmp_path / "out", *ALL_TRAIN]
    status, _, err = run_cli(*words, "--strict")
    assert status == 2
    assert "caf\\udce9.jpg': file: has a name that is not UTF-8; rename it" in err
    status, out, _ = run_cli(*words)
    assert status == 0
    assert "caf\\udce9.jpg" in out, "left out and listed"


@pytest.mark.parametrize(
    ("option", "text", "words"),
    [
        ("--label-map", "[a, b]", ("must map texts to texts",)),
        ("--label-map", "{a: 1}", ("must map texts to texts",)),
        ("--label-map", "{a: ' '}", ("at least one letter",)),
        ("--label-map", "{a: [", ("cannot be read",)),
        ("--split-file", "[1]", ("must be JSON",)),
        ("--split-file", '{"training": ["a.jpg"]}', ("'training'", "train, val, test")),
        ("--split-file", '{"train": ["a.jpg"], "val": ["a.jpg"]}', ("a.jpg", "train and in val")),
    ],
)
def test_an_invalid_side_file(option, text, words, few, tmp_path, run_cli):
    file = tmp_path / "side.json"
    file.write_text(text)
    result = run_cli("prepare", "--data-dir", few, "--output-dir", tmp_path / "o", option, file)
    refused(result, option, str(file), *words)
    missing = run_cli("prepare", "--data-dir", few, "--output-dir", tmp_path / "o", option, "no.x")
    refused(missing, option, "no.x")
    assert not (tmp_path / "o").exists()


def test_a_split_file_of_another_dataset(few, tmp_path, run_cli, ray_cluster):
    (tmp_path / "s.json").write_text('{"train": ["images/sample_00099.jpg"]}')
    words = ["prepare", "--data-dir", few, "--output-dir", tmp_path / "o"]
    refused(run_cli(*words, "--split-file", tmp_path / "s.json"), "--split-file", "sample_00099")
    assert not (tmp_path / "o/manifest.json").exists()


# ---- the command line and the config -------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["prepare", "--data-dirr", "x"], "--data-dirr"),
        (["train", "--epochs", "3"], "--epochs"),
        (["train", "--num-epochs", "three"], "--num-epochs"),
        (["train", "--model-type", "vit_x"], "vit_x"),
        (["predict", "--point", "5"], "--point"),
        (["trian"], "trian"),
        ([], "STAGE"),
    ],
)
def test_an_option_that_does_not_exist(words, named, run_cli):
    status, out, err = run_cli(*words)
    assert (status, out) == (2, "")
    assert "Traceback" not in err
    assert err.startswith("usage: samray")  # as argparse does
    assert named in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("train.num_epoch=3", ("train.num_epoch", "did you mean num_epochs?")),
        ("trian.num_epochs=3", ("trian", "did you mean train?")),
        ("train.num_epochs=zero", ("train.num_epochs", "zero")),
        ("train.num_epochs=0", ("train.num_epochs", "greater than or equal to 1")),
        ("train.learning_rate=.nan", ("train.learning_rate",)),
        ("train.learning_rate=[1", ("train.learning_rate",)),
        ("nonsense", ("nonsense", "section.key=value")),
    ],
)
def test_an_invalid_setting(word, named, prepared, tmp_path, run_cli):
    words = ["train", "--data-dir", prepared, "--output-dir", tmp_path / "run"]
    refused(run_cli(*words, word), *named)
    assert not (tmp_path / "run").exists()


def test_all_mistakes_of_a_config_are_reported_at_once(prepared, tmp_path, run_cli):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"train: {{data_dir: {prepared}, output_dir: {tmp_path / 'run'}, num_epoch: 3}}\n"
        "scaling: {device: tpu}\nmodel: {type: vit_x}\n"
    )
    refused(
        run_cli("train", "--config", config),
        str(config),
        "train.num_epoch is not a setting (did you mean num_epochs?)",
        "scaling.device",
        "tpu",
        "model.type",
        "vit_x",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: [", "is not YAML"),
        ("- train", "must hold sections"),
        ("train: 5", "train"),
        (None, "cannot be read"),
    ],
)
def test_an_unreadable_config(text, named, tmp_path, run_cli):
    config = tmp_path / "run.yaml"
    if text is not None:
        config.write_text(text)
    refused(run_cli("train", "--config", config, "--batch-size", 2), str(config), named)


def test_sample_data_into_a_folder_in_use(few, run_cli):
    before = sorted(few.rglob("*"))
    refused(run_cli("sample-data", few, "--num-images", 1), str(few), "choose another folder")
    refused(run_cli("sample-data"), "OUT")
    assert sorted(few.rglob("*")) == before


# ---- train ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished_run(prepared, tmp_path_factory) -> Path:
    """The RUN folder of a training that has not finished an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = load_config(options={"train.data_dir": str(prepared)})
    RunFolder.create(folder, config, PreparedDataset(prepared).digest)
    return folder


def test_train_on_what_is_not_prepared(photos, unfinished_run, tmp_path, run_cli):
    words = ["train", "--output-dir", tmp_path / "run", "--data-dir"]
    for folder in (photos, unfinished_run):
        line = refused(run_cli(*words, folder), str(folder), "no manifest.json")
        assert "samray prepare" in line
    refused(run_cli(*words, tmp_path / "nowhere"), "--data-dir", "does not exist")
    for content in ("[]", "{}", '{"format": 99}', "not JSON"):
        (tmp_path / "manifest.json").write_text(content)
        refused(run_cli(*words, tmp_path), str(tmp_path / "manifest.json"))
    assert not (tmp_path / "run").exists()


def test_train_on_a_damaged_dataset(prepared, tmp_path, run_cli):
    copy = tmp_path / "prepared"
    shutil.copytree(prepared, copy)
    words = ["train", "--data-dir", copy, "--output-dir", tmp_path / "run"]
    shard = copy / json.loads((copy / "manifest.json").read_text())["shards"][0]
    cut(shard)
    refused(run_cli(*words), shard.name, "prepare the dataset again")
    shard.unlink()
    refused(run_cli(*words), shard.name, "prepare the dataset again")
    assert not (tmp_path / "run").exists()


def test_train_into_a_folder_in_use(prepared, unfinished_run, few, run_cli):
    before = (unfinished_run / "run.json").read_bytes()
    words = ["train", "--data-dir", prepared, "--output-dir"]
    refused(run_cli(*words, unfinished_run), "--output-dir", str(unfinished_run), "--resume")
    refused(run_cli(*words, few), "--output-dir", str(few), "not empty")
    refused(run_cli(*words, few, "--resume"), "--resume", str(few), "no run")
    assert (unfinished_run / "run.json").read_bytes() == before
    assert sorted(path.name for path in few.iterdir()) == ["annotations", "images"]


def test_resume_with_other_settings_or_data(
    prepared, unfinished_run, few, tmp_path, run_cli, ray_cluster
):
    words = ["train", "--output-dir", unfinished_run, "--resume", "--data-dir"]
    line = refused(run_cli(*words, prepared, "--lr", 0.5), "--resume", "train.learning_rate")
    assert "0.5" in line
    other = ["prepare", "--data-dir", few, "--output-dir", tmp_path / "other"]
    assert run_cli(*other, "prepare.val_fraction=0.5", "prepare.test_fraction=0")[0] == 0
    refused(run_cli(*words, tmp_path / "other"), "--resume", "dataset")


def test_more_than_there_is(prepared, tmp_path, run_cli, ray_cluster):
    words = ["train", "--data-dir", prepared, "--output-dir", tmp_path / "run"]
    refused(run_cli(*words, "--num-workers", 500), "--num-workers 500", "images of the train split")
    refused(run_cli(*words, "model.adapt_blocks=5"), "model.adapt_blocks: 5", "tiny has 4 blocks")
    refused(run_cli(*words, "model.adapt=lora"), "model.adapt", "use model.adapt=full")
    refused(
        run_cli(*words, "train.precision=float16"), "train.precision", "needs a GPU", "bfloat16"
    )
    for dry_run in ([], ["--dry-run"]):
        weights = [*words, *dry_run, "--checkpoint"]
        refused(run_cli(*weights, "vit_b"), "--checkpoint vit_b", "--model-type vit_b")
        refused(run_cli(*weights, tmp_path / "no.pth"), "no.pth", "no such file")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["cpus", "gpus"])
def test_more_than_the_cluster_has_is_refused_at_once(
    what, prepared, tmp_path, run_cli, ray_cluster
):
    """Ray alone would wait endlessly."""
    words = ["train", "--data-dir", prepared, "--output-dir", tmp_path / "run"]
    if what == "cpus":
        words += ["scaling.cpus_per_worker=64", "--device", "cpu"]
        named = ["64 CPUs", "4 CPUs", "scaling.cpus_per_worker"]
    else:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if gpus >= len(PreparedDataset(prepared).split("train")):
            pytest.skip("more GPUs here than images to train on")
        words += ["--device", "gpu", "--num-workers", gpus + 1]
        named = [f"needs {gpus + 1} GPUs", f"has {gpus}", "--device cpu"]
    start = time.monotonic()
    refused(run_cli(*words), *named)
    assert time.monotonic() - start < 30
    assert not (tmp_path / "run").exists()


def test_a_process_prints_one_line_too(prepared, tmp_path, ray_cluster):
    """Also nothing from libraries that bypass sys.stderr, such as Ray's C++ code."""
    program = "import sys; from samray.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["train", "--data-dir", prepared, "--output-dir", tmp_path / "run"]
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, words), "scaling.cpus_per_worker=64"],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True,
        text=True,
        timeout=180,
    )
    refused((process.returncode, process.stdout, process.stderr), "64 CPUs")
    assert not (tmp_path / "run").exists()


# ---- checkpoints ---------------------------------------------------------------------------


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def vit_b_weights(path: Path) -> None:
    torch.save(
        {
            "image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16),
            "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 256),
            "mask_decoder.iou_token.weight": torch.zeros(1, 256),
        },
        path,
    )


def truncated_weights(path: Path) -> None:
    torch.save(build_model("tiny").state_dict(), path)
    cut(path)


def evil_torch_file(path: Path) -> None:
    torch.save({"model": _Evil(path.with_name("marker"))}, path)


def evil_old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Evil(path.with_name("marker")), protocol=2))


def other_model(path: Path) -> None:
    torch.save({"layer1.weight": torch.zeros(3)}, path)


def no_weights(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1")


def empty_file(path: Path) -> None:
    path.touch()


def missing_file(path: Path) -> None:
    assert not path.exists()


def empty_folder(path: Path) -> None:
    path.mkdir()


CHECKPOINTS = {  # what `train --model-type tiny` and `predict` say of it
    vit_b_weights: ("holds vit_b weights, but the model type is tiny", "does not fit vit_b"),
    truncated_weights: ("truncated", "truncated"),
    evil_torch_file: ("NOT run", "NOT run"),
    evil_old_pickle: ("NOT run", "NOT run"),
    other_model: ("another model", "another model"),
    no_weights: ("expected a SAM weights file", "expected a SAM weights file"),
    empty_file: ("an empty file", "an empty file"),
    missing_file: ("no such file", "does not exist"),
    empty_folder: ("no checkpoint of samray", "no checkpoint of samray"),
}


@pytest.mark.parametrize("make", CHECKPOINTS, ids=lambda make: make.__name__)
def test_a_checkpoint_that_cannot_be_used(make, prepared, photos, tmp_path, run_cli):
    path = tmp_path / "weights.pth"
    make(path)
    for_train, for_predict = CHECKPOINTS[make]
    run = ["--output-dir", tmp_path / "run"]
    words = ["train", "--data-dir", prepared, "--checkpoint", path, *run]
    refused(run_cli(*words), str(path), for_train)
    image = photos / "images/sample_00000.jpg"
    if make is not vit_b_weights:  # there predict would build a whole ViT-B
        words = ["predict", "--checkpoint", path, "--image-path", image, "--point", 50, 50, *run]
        refused(run_cli(*words), str(path), for_predict)
    assert not (tmp_path / "marker").exists(), "code from a checkpoint was run"
    assert not (tmp_path / "run").exists()


def test_the_evil_files_would_have_run(tmp_path):
    """Otherwise the two tests of them above could not fail."""
    for make in (evil_torch_file, evil_old_pickle):
        make(tmp_path / "weights.pth")
        marker = tmp_path / "marker"
        assert not marker.exists()
        if make is evil_torch_file:
            torch.load(tmp_path / "weights.pth", weights_only=False)["model"].close()
        else:
            pickle.loads((tmp_path / "weights.pth").read_bytes()).close()
        assert marker.exists()
        marker.unlink()


# ---- two processes, one folder ----------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "prepare --data-dir {photos}",
        "export --data-dir {prepared}",
        "inspect --data-dir {prepared}",
        "inspect --data-dir {prepared} --report",
        "train --data-dir {prepared} --model-type tiny",
        "evaluate --data-dir {prepared} --checkpoint tiny",
        "predict --image-path {photos}/images",
    ],
    ids=["prepare", "export", "inspect", "inspect --report", "train", "evaluate", "predict"],
)
def test_a_folder_that_another_process_writes_to(words, photos, prepared, tmp_path, run_cli):
    words = words.format(photos=photos, prepared=prepared).split()
    with lock_folder(tmp_path, "--output-dir"):
        line = refused(run_cli(*words, "--output-dir", tmp_path), "--output-dir", "is in use by")
        assert f"process {os.getpid()} on " in line
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


# ---- evaluate, inspect, predict ------------------------------------------------------------


def test_evaluate_without_a_run(prepared, photos, unfinished_run, tmp_path, run_cli):
    words = ["evaluate", "--data-dir", prepared, "--output-dir", tmp_path / "report"]
    refused(run_cli(*words, "--checkpoint", photos), str(photos), "run.json", "RUN folder")
    refused(run_cli(*words, "--checkpoint", tmp_path / "no"), str(tmp_path / "no"), "not exist")
    refused(run_cli(*words, "--checkpoint", unfinished_run), str(unfinished_run), "no epoch yet")
    refused(run_cli(*words), "--checkpoint")
    refused(run_cli("evaluate", "--data-dir", photos, *words[3:], "--checkpoint", unfinished_run))
    assert not (tmp_path / "report").exists()


def test_inspect_what_is_not_prepared(photos, prepared, tmp_path, run_cli):
    words = ["inspect", "--output-dir", tmp_path / "look", "--data-dir"]
    refused(run_cli(*words, photos), str(photos), "samray prepare")
    refused(run_cli(*words, tmp_path / "nowhere"), "--data-dir", "does not exist")
    refused(run_cli(*words, prepared, "--num-points", 0), "inspect.num_points")
    assert not (tmp_path / "look").exists()


@pytest.fixture(scope="module")
def image(photos) -> Path:
    return photos / "images" / "sample_00000.jpg"


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        (["--point", 9000, 5], ("--point 9000 5", "outside the image")),
        (["--point", -1, 5], ("--point -1 5", "outside the image")),
        (["--point", "nan", 5], ("predict.points", "finite", "nan")),
        (["--point", 5, 5, "--negative-point", 5, 9000], ("5 9000", "outside the image")),
        (["--box", 90, 90, 20, 20], ("--box 90 90 20 20", "X1 < X2")),
        (["--box", 20, 20, 20, 90], ("--box 20 20 20 90", "X1 < X2")),
        (["--box", 20, 20, 9000, 90], ("--box 20 20 9000 90", "inside the image")),
    ],
)
def test_predict_with_an_invalid_prompt(prompt, named, image, unfinished_run, tmp_path, run_cli):
    words = ["predict", "--checkpoint", unfinished_run, "--image-path", image]
    refused(run_cli(*words, "--output-dir", tmp_path / "out", *prompt), *named)
    assert not (tmp_path / "out").exists()


def test_predict_without_an_image_or_a_run(photos, image, unfinished_run, few, tmp_path, run_cli):
    words = ["predict", "--output-dir", tmp_path / "out", "--point", 5, 5]
    not_image = few / "annotations/sample_00000.json"
    cut(few / "images/sample_00001.jpg")
    run = ["--checkpoint", unfinished_run]
    for path, named in (
        (not_image, "no known image format"),
        (few / "images/sample_00001.jpg", "cannot be decoded"),
        (few / "nowhere.jpg", "cannot be read"),
        (few, "cannot be read"),
    ):
        refused(run_cli(*words, *run, "--image-path", path), "--image-path", str(path), named)
    refused(run_cli(*words, *run), "--image-path")
    words += ["--image-path", image]
    refused(run_cli(*words, *run), str(unfinished_run), "no epoch yet")
    refused(run_cli(*words, "--checkpoint", photos), str(photos), "no checkpoint of samray")
    assert not (tmp_path / "out").exists()
    status, _, err = run_cli(*words)  # without a run, the shipped tiny weights are used
    assert status == 0, err
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_predict_does_not_overwrite_the_annotation_of_its_image(few, unfinished_run, run_cli):
    beside = few / "images/sample_00000.json"
    shutil.copy(few / "annotations/sample_00000.json", beside)
    before = beside.read_bytes()
    words = ["predict", "--checkpoint", unfinished_run, "--point", 5, 5]
    words += ["--image-path", few / "images/sample_00000.jpg", "--output-dir", few / "images"]
    refused(run_cli(*words), "--output-dir", "sample_00000.json", "choose another folder")
    assert beside.read_bytes() == before


def test_predict_replaces_its_own_files_and_none_that_somebody_wrote_or_corrected(
    few, tmp_path, run_cli
):
    out = tmp_path / "out"
    words = ["predict", "--image-path", few / "images/sample_00000.jpg", "--output-dir", out]
    for point in ((120, 80), (60, 60)):
        status, _, err = run_cli(*words, "--point", *point)
        assert status == 0, err
    corrected = json.loads((out / "sample_00000.json").read_text())
    corrected["shapes"][0]["label"] = "mine"
    (out / "sample_00000.json").write_text(json.dumps(corrected))
    refused(run_cli(*words, "--point", 5, 5), "--output-dir", "sample_00000.json", "corrected")
    assert json.loads((out / "sample_00000.json").read_text()) == corrected
    (out / "sample_00000.json").unlink()
    before = (out / "sample_00000_mask.png").read_bytes()
    refused(run_cli(*words, "--point", 5, 5), "--output-dir", "sample_00000_mask.png")
    assert (out / "sample_00000_mask.png").read_bytes() == before
