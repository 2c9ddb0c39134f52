"""The dataset report on a dataset of `samray prepare`."""

import json
import shutil

import pytest
from PIL import Image

from samray.data.dataset import SPLITS


@pytest.fixture(scope="module")
def mixed(ray_cluster, photos, tmp_path_factory):
    """`photos` with a re-compressed copy in another folder, and three bad annotations."""
    folder = tmp_path_factory.mktemp("mixed") / "photos"
    shutil.copytree(photos, folder)
    images = sorted((folder / "images").iterdir())
    annotation = next((folder / "annotations").glob(f"{images[0].stem}.json"))
    again = folder / "again"
    again.mkdir()
    Image.open(images[0]).convert("RGB").save(again / "copy.jpg", quality=60)
    document = json.loads(annotation.read_text())
    document |= {"imagePath": "copy.jpg", "imageData": None}
    (again / "copy.json").write_text(json.dumps(document))
    (again / "broken.json").write_text('{"shapes": [')
    (again / "lost.json").write_text(json.dumps(document | {"imagePath": "lost.jpg"}))
    (again / "extra.json").write_text(json.dumps(document))
    names = [f"images/{image.name}" for image in images]
    listed = {"train": names[:16], "val": names[16:20], "test": [*names[20:], "again/copy.jpg"]}
    (folder.parent / "listed.json").write_text(json.dumps(listed))
    return folder


def test_leaks_and_bad_files_are_reported_and_the_split_file_removes_the_leak(
    mixed, tmp_path, run_cli
):
    data, listed = ("--data-dir", mixed), mixed.parent / "listed.json"
    words = ["prepare", *data, "--output-dir", tmp_path / "one", "--split-file", listed]
    status, _, err = run_cli(*words)
    assert status == 0, err
    inspect = ["inspect", "--report", "--output-dir", tmp_path / "look", "--data-dir"]
    status, _, err = run_cli(*inspect, tmp_path / "one", "--strict")
    assert status == 2, err
    facts = json.loads((tmp_path / "look" / "report.json").read_text())
    first = json.loads(listed.read_text())["train"][0]
    (leak,) = [group for group in facts["near_duplicates"] if group["in_different_splits"]]
    assert [entry["image"] for entry in leak["images"]] == ["again/copy.jpg", first]
    assert leak["across_folders"]
    files = {
        kind["title"]: [item["file"] for item in kind["items"]]
        for kind in facts["problems"]
        if kind["level"] != "note"
    }
    assert files == {
        "Nearly the same image in different splits": ["again/copy.jpg"],
        "Files that cannot be read as annotations": ["again/broken.json"],
        "Annotations whose image is not found": ["again/lost.json"],
        "Two annotation files for one image": ["again/extra.json"],
    }
    assert "4 problems" in err

    words = ["prepare", *data, "--output-dir", tmp_path / "two", "--split-file"]
    status, _, err = run_cli(*words, tmp_path / "look" / "splits.json")
    assert status == 0, err
    status, out, err = run_cli(*inspect, tmp_path / "two")
    assert status == 0, err
    assert "report.html" in out
    facts = json.loads((tmp_path / "look" / "report.json").read_text())
    assert facts["leaks"] == 0
    assert not any(kind["title"].startswith("Photos where not") for kind in facts["problems"])
    assert (tmp_path / "look" / "splits.json").exists(), "the next `prepare` needs it again"
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    counts = [len(manifest["splits"][split]) for split in SPLITS]
    assert [row["images"] for row in facts["splits"]] == counts
    assert facts["counts"]["instances"] == manifest["num_instances"]
    assert {i["label"]: i["instances"] for i in facts["labels"]} == manifest["labels"]
