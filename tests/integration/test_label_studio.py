"""A real Label Studio and the endpoint, connected as docs/annotation-tools.md says.

`make label-studio` installs Label Studio into an environment of its own, because its dependencies
differ from samray's, and names its program in $SAMRAY_LABEL_STUDIO.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests
from ports import free_port
from pycocotools import mask as coco_mask

PROGRAM = os.environ.get("SAMRAY_LABEL_STUDIO", "")
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "annotation-tools.md").read_text(encoding="utf-8")
MAIL, PASSWORD = "annotator@samray.example", "annotate-1234"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PATIENCE = 300  # seconds for a start on a busy machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="no Label Studio here; make label-studio"),
]


@contextlib.contextmanager
def running(command, log, until, **environment):
    """Run a program; go on once `until` is true; end it."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + PATIENCE
            while not until():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(address):
    def there():
        with contextlib.suppress(requests.RequestException):
            return requests.get(address, timeout=10).status_code == 200
        return False

    return there


class Studio:
    """Label Studio for somebody who has logged in."""

    def __init__(self, address):
        self.address = address
        self.session = requests.Session()
        page = f"{address}/user/login"
        self.session.get(page, timeout=60)
        form = {"email": MAIL, "password": PASSWORD}
        form["csrfmiddlewaretoken"] = self.session.cookies["csrftoken"]
        done = self.session.post(page, form, headers={"Referer": page}, timeout=60)
        assert done.ok, done.text
        token = self.session.cookies["csrftoken"]
        self.session.headers.update({"X-CSRFToken": token, "Referer": address})

    def ask(self, method, path, status=200, **content):
        response = self.session.request(
            method, f"{self.address}/api/{path}", timeout=120, **content
        )
        assert response.status_code == status, response.text
        return response.json()

    def create_project(self, photo, config):
        """Return the ids of a project and of its only task."""
        body = {"title": "nuts", "label_config": config}
        project = self.ask("POST", "projects/", 201, json=body)["id"]
        with photo.open("rb") as file:
            self.ask("POST", f"projects/{project}/import", 201, files={"file": file})
        (task,) = self.ask("GET", f"tasks?project={project}")["tasks"]
        return project, task["id"]

    def connect(self, project, url, status=201):
        """Fill in the form of Settings, Model."""
        body = {"project": project, "url": url, "title": "samray", "is_interactive": True}
        return self.ask("POST", "ml", status, json=body)

    def draw(self, model, task, *regions):
        """Draw with a smart tool; return what the page gets."""
        context = {"task": task, "context": {"result": list(regions)}}
        return self.ask("POST", f"ml/{model}/interactive-annotating", json=context)


@pytest.fixture(scope="module")
def photo(photos):
    return sorted((photos / "images").iterdir())[0]


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("label studio"), free_port()
    address = f"http://127.0.0.1:{port}"
    words = ["--no-browser", "--internal-host", "127.0.0.1", "--port", port]
    user = ["--username", MAIL, "--password", PASSWORD]
    # The variables are those of the page's first step.
    variables = dict(re.findall(r"(\w+)=(\w+)", re.search(r".*label-studio start", PAGE)[0]))
    assert len(variables) == 2
    variables |= {"COLLECT_ANALYTICS": "false", "SENTRY_DSN": "", "FRONTEND_SENTRY_DSN": ""}
    variables |= {"LABEL_STUDIO_BASE_DATA_DIR": str(folder / "data"), "HOME": str(folder)}
    command = [PROGRAM, "start", *words, *user]
    with running(command, folder / "log", answers(f"{address}/health"), **variables):
        yield Studio(address)


@pytest.fixture(scope="module")
def personal_token(studio):
    """As the page of the account makes it."""
    return studio.ask("POST", "token/", 201, json={})["token"]


def samray_serve(studio, port):
    code = "import sys; from samray.cli import main; sys.exit(main())"
    words = ["serve", "--port", port, "--label-studio-url", studio.address]
    return [sys.executable, "-c", code, *words]


@pytest.fixture(scope="module")
def endpoint(studio, personal_token, tmp_path_factory):
    """`samray serve` in a process of its own, with a personal access token."""
    port, log = free_port(), tmp_path_factory.mktemp("endpoint") / "log"
    environment = {"LABEL_STUDIO_API_KEY": personal_token, "PYTHONPATH": str(ROOT)}
    address = f"http://127.0.0.1:{port}"
    ready = answers(f"{address}/v1/readyz")
    with running(samray_serve(studio, port), log, ready, **environment):
        yield address
    assert personal_token not in log.read_text()


@pytest.fixture(scope="module")
def project(studio, endpoint, photo):
    """Ids of a project with the page's interface, of its task, and of the connected model."""
    config = re.search(r"```xml\n(.*?)```", PAGE, re.S)[1]
    project, task = studio.create_project(photo, config)
    model = studio.connect(project, f"{endpoint}/compat/labelstudio")
    assert model["state"] == "CO"
    assert model["model_version"].startswith("tiny ")
    return project, task, model["id"]


def keypoint(x, y, positive=True):
    """What the page sends after a click."""
    value = {"x": x, "y": y, "width": 0.27, "labels": ["nut"], "keypointlabels": ["nut"]}
    return {
        "original_width": 1,
        "original_height": 1,
        "image_rotation": 0,
        "value": value,
        "is_positive": positive,
        "id": "fBWv1t0S2L",
        "from_name": "click",
        "to_name": "image",
        "type": "keypointlabels",
        "origin": "manual",
    }


def decoded_by_label_studio(region):
    """The mask, H x W bool, by the converter that Label Studio exports with."""
    code = (
        "import json, sys; from label_studio_sdk.converter import brush\n"
        "print(json.dumps(brush.decode_rle(json.load(sys.stdin)).tolist()))"
    )
    python = Path(PROGRAM).parent / "python"
    text = json.dumps(region["value"]["rle"])
    done = subprocess.run(
        [python, "-c", code], input=text, capture_output=True, text=True, check=True
    )
    values = np.array(json.loads(done.stdout.splitlines()[-1]))
    shape = region["original_height"], region["original_width"], 4
    return values.reshape(shape)[:, :, 3] > 0


def test_a_click_becomes_one_brush_region_with_the_endpoints_own_pixels(
    studio, endpoint, project, photo
):
    _, task, model = project
    clicks = [keypoint(45, 45), keypoint(55, 45), keypoint(5, 5, positive=False)]
    answer = studio.draw(model, task, *clicks)["data"]
    (region,) = answer["result"]
    assert (region["type"], region["from_name"]) == ("brushlabels", "mask")
    assert region["value"]["brushlabels"] == ["nut"]
    with photo.open("rb") as file:
        files = {"image": file}
        height, width = region["original_height"], region["original_width"]
        points = [[0.45 * width, 0.45 * height], [0.55 * width, 0.45 * height]]
        points.append([0.05 * width, 0.05 * height])
        prompt = {"point_coords": points, "point_labels": [1, 1, 0]}
        asked = {"prompts": [prompt], "mask_format": "rle"}
        form = {"request": json.dumps(asked)}
        own = requests.post(f"{endpoint}/v1/predict", files=files, data=form, timeout=60).json()
    best = own["results"][0]["masks"][0]
    expected = coco_mask.decode(best["rle"]).astype(bool)
    assert expected.any()
    assert np.array_equal(decoded_by_label_studio(region), expected)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make chromium` installs it")
def test_the_steps_of_the_page_in_a_browser(studio, endpoint, project, photo):
    """Auto-Annotation, Auto-Detect, a label, a click, the tick, Submit: one brush region more."""
    from playwright.sync_api import sync_playwright

    number, _, _ = project
    with photo.open("rb") as file:
        studio.ask("POST", f"projects/{number}/import", 201, files={"file": file})
    task = studio.ask("GET", f"tasks?project={number}")["tasks"][-1]["id"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1366, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(f"{studio.address}/user/login")
        page.fill("input[name=email]", MAIL)
        page.fill("input[name=password]", PASSWORD)
        page.click("button[type=submit]")
        page.goto(f"{studio.address}/projects/{number}/data?task={task}")
        page.get_by_text("Auto-Annotation", exact=True).click()
        page.locator(".lsf-tool_smart").first.click()  # Auto-Detect
        page.locator(".lsf-label").nth(1).click()  # below "click"
        picture = page.locator("canvas").first.bounding_box()
        # Where none of the objects lies that Label Studio got when it opened the task.
        x, y = (picture["x"] + 0.85 * picture["width"], picture["y"] + 0.8 * picture["height"])
        with page.expect_response("**/interactive-annotating") as answer:
            page.mouse.click(x, y)
        assert len(answer.value.json()["data"]["result"]) == 1
        before = len(studio.ask("GET", f"tasks/{task}")["predictions"][0]["result"])
        page.get_by_test_id("bottombar-accept-suggestions-button").click()
        with page.expect_response("**/annotations*") as submitted:
            page.get_by_text("Submit", exact=True).click()
        assert submitted.value.ok
        browser.close()
    (annotation,) = studio.ask("GET", f"tasks/{task}")["annotations"]
    assert len(annotation["result"]) == before + 1 > 3
    assert {region["type"] for region in annotation["result"]} == {"brushlabels"}


def test_an_annotation_of_the_answer_is_kept_and_exported(studio, project):
    number, task, model = project
    box = {"x": 10, "y": 10, "width": 50, "height": 60, "rotation": 0, "rectanglelabels": ["nut"]}
    drag = {**keypoint(0, 0), "from_name": "box", "type": "rectanglelabels", "value": box}
    (region,) = studio.draw(model, task, drag)["data"]["result"]
    studio.ask("POST", f"tasks/{task}/annotations/", 201, json={"result": [region]})
    exports = studio.ask("GET", f"projects/{number}/export?exportType=JSON")
    (exported,) = [export for export in exports if export["id"] == task]
    (kept,) = exported["annotations"][0]["result"]
    assert kept["value"]["rle"] == region["value"]["rle"]
    assert exported["predictions"] == []


def test_a_task_gets_all_objects_when_it_is_opened_or_predictions_are_retrieved(
    studio, endpoint, photo
):
    """As brush regions with the endpoint's own pixels."""
    config = re.search(r"```xml\n(.*?)```", PAGE, re.S)[1]
    number, task = studio.create_project(photo, config)
    studio.connect(number, f"{endpoint}/compat/labelstudio")
    (opened,) = studio.ask("GET", f"tasks/{task}")["predictions"]
    selected = {"selectedItems": {"all": True, "excluded": []}}
    action = f"dm/actions?id=retrieve_tasks_predictions&project={number}"
    studio.ask("POST", action, json=selected)
    prediction = studio.ask("GET", f"predictions?project={number}")[-1]
    assert len(prediction["result"]) == len(opened["result"])
    with photo.open("rb") as file:
        form = {"request": json.dumps({"mask_format": "rle"})}
        files = {"image": file}
        own = requests.post(f"{endpoint}/v1/segment", files=files, data=form, timeout=60).json()
    assert len(own["objects"]) > 2
    for region, expected in zip(prediction["result"], own["objects"], strict=True):
        assert region["value"]["brushlabels"] == ["nut"]
        assert region["score"] == pytest.approx(expected["score"])
    mask = decoded_by_label_studio(prediction["result"][0])
    assert np.array_equal(mask, coco_mask.decode(own["objects"][0]["rle"]).astype(bool))


def test_the_reason_of_a_refusal_reaches_the_page_and_the_test_request(studio, endpoint, photo):
    config = '<View><Image name="i" value="$image"/><RectangleLabels name="r" toName="i">'
    config += '<Label value="nut"/></RectangleLabels></View>'
    project, task = studio.create_project(photo, config)
    model = studio.connect(project, f"{endpoint}/compat/labelstudio")["id"]
    click = {**keypoint(45, 45), "to_name": "i"}
    error = studio.draw(model, task, click)["data"]["error"]
    assert "needs a BrushLabels, Brush, PolygonLabels or Polygon" in error["message"]
    tested = studio.ask("POST", f"ml/{model}/predict/test?random=true")
    assert tested["response"][0]["error"]["field"] == error["field"] == "label_config"


def test_polygons_are_one_region_too(studio, endpoint, photo):
    config = re.search(r"```xml\n(.*?)```", PAGE, re.S)[1].replace("Brush", "Polygon")
    project, task = studio.create_project(photo, config)
    model = studio.connect(project, f"{endpoint}/compat/labelstudio")["id"]
    (region,) = studio.draw(model, task, keypoint(45, 45))["data"]["result"]
    assert region["type"] == "polygonlabels"
    studio.ask("POST", f"tasks/{task}/annotations/", 201, json={"result": [region]})


def test_a_refused_key_ends_samray_serve(studio, personal_token):
    """Label Studio's legacy tokens are disabled by default."""
    legacy = studio.ask("GET", "current-user/token")["token"]
    for key, message in (
        (personal_token[:-1] + "_", "refuses this key; create a personal access token"),
        (legacy, "refuses this key; legacy tokens are disabled by default"),
    ):
        environment = {"LABEL_STUDIO_API_KEY": key, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(word) for word in samray_serve(studio, free_port())],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert message in done.stderr
        assert key not in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_legacy_token_fetches_pictures_where_it_is_enabled(
    studio, personal_token, photo, monkeypatch
):
    from samray.config import ServeConfig
    from samray.serving.labelstudio_client import read_source

    enabled = {"api_tokens_enabled": True, "api_token_ttl_days": 100}
    enabled["legacy_api_tokens_enabled"] = True
    studio.ask("POST", "jwt/settings", json=enabled)
    _, task = studio.create_project(photo, "<View/>")
    address = studio.ask("GET", f"tasks/{task}")["data"]
    (path,) = address.values()
    for key in (studio.ask("GET", "current-user/token")["token"], personal_token):
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
        source = read_source(ServeConfig(label_studio_url=studio.address))
        source.check_key(pytest.fail)
        assert source.fetch(path, "image") == photo.read_bytes()
