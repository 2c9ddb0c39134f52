"""The real labelme, 6 and 7: it opens what samray writes, and `samray labelme` clicks in it.

`make labelme` installs each into an environment of its own and names their Pythons in
$SAMRAY_LABELME; a labelme beside samray is tried, too.
"""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
from PIL import Image
from pycocotools import mask as coco_mask
from serving import TOKEN, serving

from samray.config import ServeConfig, load_config
from samray.data.export import export
from samray.data.labelme import labelme_document, mask_to_shapes

TESTS = Path(__file__).parents[1]
PYTHONS = [path for path in os.environ.get("SAMRAY_LABELME", "").split(os.pathsep) if path]
if importlib.util.find_spec("labelme") is not None:
    PYTHONS.append(sys.executable)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHONS, reason="no labelme here; make labelme"),
]
with_each = pytest.mark.parametrize("python", PYTHONS)


@pytest.fixture(scope="module")
def url(ray_cluster, tmp_path_factory):
    """`tiny` behind a token."""
    file = tmp_path_factory.mktemp("secrets") / "token"
    file.write_text(TOKEN)
    with serving(ServeConfig(token_file=str(file), cpus_per_replica=0.2)) as address:
        yield address


@pytest.fixture(scope="module")
def photo(photos):
    return sorted((photos / "images").iterdir())[0]


def ask(url, photo, mask_format, **prompt):
    """API v1's own answer."""
    body = {
        "image": {"base64": base64.b64encode(photo.read_bytes()).decode()},
        "prompts": [prompt],
        "mask_format": mask_format,
    }
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return requests.post(f"{url}/v1/predict", json=body, headers=headers, timeout=60).json()


def run_in_labelme(python, script, words, folder):
    """Run a script in labelme's environment, without a screen unless QT_QPA_PLATFORM names one."""
    environment = {"HOME": str(folder), "PYTHONPATH": str(TESTS.parent)}
    return subprocess.run(
        [str(word) for word in (python, TESTS / script, *words)],
        env={"QT_QPA_PLATFORM": "offscreen", **os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ring():
    """A mask with a hole and a second part: one shape of type `mask`."""
    mask = np.zeros((60, 80), bool)
    mask[10:40, 10:50] = True
    mask[20:30, 20:40] = False
    mask[50:55, 60:70] = True
    return mask


@pytest.fixture(scope="module")
def written(url, photo, photos, prepared, run_cli, tmp_path_factory):
    """Annotation files of every part of samray that writes them."""
    folder = tmp_path_factory.mktemp("written")
    files = [sorted(photos.rglob("*.json"))[0]]
    shutil.copy(photo, folder / photo.name)
    document = ask(url, photo, "labelme", point_coords=[[200, 150]])["labelme"]
    (folder / "answer.json").write_text(json.dumps({**document, "imagePath": photo.name}))
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(folder / "ring.png")
    document = labelme_document("ring.png", (60, 80), mask_to_shapes(ring(), "ring"))
    (folder / "ring.json").write_text(json.dumps(document))
    export(load_config(None, [f"export.data_dir={prepared}", f"export.output_dir={folder / 'ex'}"]))
    one = ["--image-path", photo, "--point", 200, 150, "--output-dir", folder / "one"]
    (folder / "many").mkdir()
    shutil.copy(photo, folder / "many" / "photo.jpg")
    few = ("predict.points_per_side=6", "predict.pred_iou_thresh=0.3")
    many = ["--image-path", folder / "many", "--output-dir", folder / "all", *few]
    for words in (one, many):
        status, _, stderr = run_cli("predict", *words)
        assert status == 0, stderr
    files += [folder / "answer.json", folder / "ring.json"]
    files += [*sorted((folder / "ex").rglob("*.json"))[:1], *(folder / "one").glob("*.json")]
    files += [folder / "all" / "photo.json"]
    assert len(files) == 6
    return files


@with_each
def test_labelme_opens_and_draws_what_samray_writes(python, written, tmp_path):
    done = run_in_labelme(python, "open_in_labelme.py", written, tmp_path)
    assert done.returncode == 0, done.stderr
    kinds = set()
    for file, opened in zip(written, json.loads(done.stdout.splitlines()[-1]), strict=True):
        shapes = json.loads(file.read_text())["shapes"]
        assert shapes, file
        keys = ("label", "shape_type", "group_id")
        expected = [{key: shape.get(key) for key in keys} for shape in shapes]
        assert [{key: shape[key] for key in keys} for shape in opened["shapes"]] == expected
        assert opened["changed"] > 0, file
        kinds |= {shape["shape_type"] for shape in shapes}
        if file.name == "ring.json":
            (shape,) = opened["shapes"]
            assert shape["mask"] == [[45, 60], np.count_nonzero(ring())]
    assert {"polygon", "mask"} <= kinds


def in_labelme(python, address, photo, folder, mode, *clicks, token=TOKEN):
    """Click in labelme, started by `samray labelme`; return (status, result, stderr)."""
    (folder / "token").write_text(token)
    words = [address, folder / "token", photo, folder / "out", mode, *clicks]
    done = run_in_labelme(python, "click_in_labelme.py", words, folder)
    result = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return done.returncode, result, done.stderr


def iou(shapes, mask):
    drawn = np.zeros(mask.shape, np.uint8)
    for shape in shapes:
        cv2.fillPoly(drawn, [np.round(shape["points"]).astype(np.int32)], 1)
    return np.count_nonzero(drawn & mask) / np.count_nonzero(drawn | mask)


@with_each
@pytest.mark.parametrize(
    ("mode", "clicks"),
    [
        ("ai_points_to_shape", ["0.40,0.45"]),
        ("ai_points_to_shape", ["0.40,0.45", "0.45,0.45"]),
        ("ai_box_to_shape", ["0.2,0.2", "0.7,0.7"]),
    ],
)
def test_clicks_in_labelme_become_polygons(python, url, photo, tmp_path, mode, clicks):
    status, result, stderr = in_labelme(python, url, photo, tmp_path, mode, *clicks)
    assert status == 0, stderr
    assert (result["model"], result["title"]) == ("samray:latest", "samray")
    assert result.get("setting", "samray") == "samray"  # in labelme 7
    assert "samray" not in (tmp_path / ".labelmerc").read_text()
    assert result["warnings"] == []
    shapes = result["shapes"]
    assert {shape["shape_type"] for shape in shapes} == {"polygon"}
    width, height = result["size"]
    places = [[float(part) for part in click.split(",")] for click in clicks]
    points = [[x * width, y * height] for x, y in places]
    prompt = {"point_coords": points, "point_labels": [1] * len(points)}
    if mode == "ai_box_to_shape":
        prompt = {"box": [*points[0], *points[1]]}
    best = ask(url, photo, "rle", **prompt)["results"][0]["masks"][0]
    mask = coco_mask.decode(best["rle"]).astype(bool)
    if len(shapes) == 1:  # labelme 6 keeps the largest part, labelme 7 all that are large enough
        _, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
        mask = parts == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    # It simplifies outlines and rounds clicks to its screen.
    assert iou(shapes, mask) > 0.85


@with_each
def test_a_start_that_cannot_work_says_so_in_one_line(python, url, photo, tmp_path):
    for address, token, message in (
        ("http://127.0.0.1:9", TOKEN, "is `samray serve` running there?"),
        (url, "wrong", "wants another token; give --token-file"),
        ("nonsense", TOKEN, "is no address"),
    ):
        status, _, stderr = in_labelme(python, address, photo, tmp_path, "polygon", token=token)
        assert status == 2
        assert message in stderr.splitlines()[-1]
        assert "Traceback" not in stderr


@with_each
def test_osam_gets_masks_and_never_an_error(python, url, photo, tmp_path):
    """An image is uploaded once, again if the endpoint forgot it; failures are told, not raised."""
    png = tmp_path / "photo.png"  # what the client uploads
    image = Image.open(photo).convert("RGB")
    image.save(png)
    spot = [0.45 * image.width, 0.45 * image.height]
    done = run_in_labelme(python, "ask_osam.py", [url, TOKEN, png, *spot], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    prompt = {"point_coords": [spot, [0, 0]], "point_labels": [1, 0]}
    best = ask(url, png, "rle", **prompt)["results"][0]["masks"][0]
    pixels = np.flatnonzero(coco_mask.decode(best["rle"]))
    for ((found, score),) in result["clicks"]:
        assert np.array_equal(found, pixels)
        assert score == pytest.approx(best["score"], abs=1e-4)
    assert result["uploads"] == [1, 2]
    assert result["box"]
    assert result["background"] == []
    assert result["told"] == []
    assert result["failed"] == [[], []]
    (told,) = result["told after"]  # once, and not with each move of the mouse
    assert "does not answer" in told
