"""Annotators' own tools against a real endpoint, each with what it really sends."""

import base64
import concurrent.futures
import contextlib
import hashlib
import http.server
import importlib.util
import io
import json
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import yaml
from PIL import Image
from pycocotools import mask as coco_mask
from serving import TOKEN, serving

from samray.config import ServeConfig
from samray.errors import EndpointError
from samray.geometry.images import size_from_header
from samray.serving.ingress import FETCHES
from samray.serving.labelme_client import Endpoint

KEY = "key-of-label-studio"
SECONDS = 3  # that the endpoint gives Label Studio for a picture
BRUSH = """
<View>
  <Image name="image" value="$image"/>
  <BrushLabels name="mask" toName="image"><Label value="Nut"/><Label value="Leaf"/></BrushLabels>
  <KeyPointLabels name="click" toName="image" smart="true"><Label value="Leaf"/></KeyPointLabels>
</View>
"""
POLYGON = BRUSH.replace("BrushLabels", "PolygonLabels")
MEGABYTE = 2**20


class Studio(http.server.ThreadingHTTPServer):
    """Label Studio's part in this: pictures behind a key, and all that may go wrong there."""

    daemon_threads = True

    def __init__(self, photo):
        super().__init__(("127.0.0.1", 0), StudioHandler)
        self.photo, self.elsewhere = photo, "http://127.0.0.1:9/x.jpg"
        self.asked, self.stopping = [], threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class StudioHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        path = urlsplit(self.path).path
        moves = {
            "/moved": "/data/upload/1/moved.jpg",
            "/loop": "/loop",
            "/away": self.server.elsewhere,
            "/up": f"https://127.0.0.1:{self.server.server_port}/data/upload/1/x.jpg",
        }
        if path in moves:
            self.answer(302, b"", Location=moves[path])
        elif path.startswith("/data/upload/"):
            allowed = self.headers.get("Authorization") == f"Token {KEY}"
            self.answer(200 if allowed else 401, self.server.photo if allowed else b"")
        elif path == "/login":
            self.answer(200, b"<html>log in</html>")
        elif path == "/stall":
            self.server.stopping.wait(60)
        elif path == "/drip":  # a byte now and then, so that no read ever times out
            self.start(200, {"Content-Length": "100000"})
            while not self.server.stopping.wait(0.2):
                self.wfile.write(b"x")
        elif path == "/drip-header":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not self.server.stopping.wait(0.2):
                self.wfile.write(b"x")
        elif path == "/says-large":
            self.start(200, {"Content-Length": str(10**12)})
        elif path == "/is-large":
            self.start(200, {"Connection": "close"})
            for _ in range(64):
                self.wfile.write(bytes(MEGABYTE))
        elif path == "/short":
            self.start(200, {"Content-Length": "1000"})
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        else:
            self.answer(404, b"")

    def answer(self, status, content, **headers):
        self.start(status, {"Content-Length": str(len(content)), **headers})
        self.wfile.write(content)

    def start(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *words):
        pass

    def handle(self):
        with contextlib.suppress(OSError):  # samray hangs up on what is too large or too slow
            super().handle()


@pytest.fixture(scope="module")
def photo(photos):
    return sorted((photos / "images").iterdir())[0].read_bytes()


@pytest.fixture(scope="module")
def elsewhere(photo):
    server = Studio(photo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopping.set()
    server.shutdown()


@pytest.fixture(scope="module")
def studio(photo, elsewhere):
    server = Studio(photo)
    server.elsewhere = f"{elsewhere.address}/data/upload/1/x.jpg"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.stopping.set()
    server.shutdown()


@pytest.fixture(scope="module")
def url(ray_cluster, studio, tmp_path_factory):
    """`tiny` behind a token, beside a Label Studio."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "token").write_text(TOKEN)
    (folder / "key").write_text(KEY)
    settings = ServeConfig(
        token_file=str(folder / "token"),
        label_studio_url=studio.address,
        label_studio_key_file=str(folder / "key"),
        label_studio_timeout_seconds=SECONDS,
        max_body_mb=2,
        max_megapixels=3,
        cpus_per_replica=0.2,
    )
    with serving(settings, proxies=True) as address:
        yield address


def label_studio(url, path, body=None, auth=("anybody", TOKEN), method="POST"):
    """What label_studio/ml/api_connector.py sends."""
    return requests.request(
        method, f"{url}/compat/labelstudio/{path}", json=body, auth=auth, timeout=60
    )


def click(x=45.0, y=45.0, **more):
    return {
        "original_width": 10,
        "original_height": 10,
        "image_rotation": 0,
        "value": {"x": x, "y": y, "width": 0.3, "keypointlabels": ["Leaf"]},
        "is_positive": True,
        "id": "fBWv1t0S2L",
        "from_name": "click",
        "to_name": "image",
        "type": "keypointlabels",
        "origin": "manual",
        **more,
    }


def ask(url, image, *regions, config=BRUSH, **options):
    context = {"result": list(regions)} if regions else None
    body = {
        "tasks": [{"id": 7, "data": {"image": image}, "project": 1, "drafts": []}],
        "model_version": "tiny",
        "project": "1.1700000000",
        "label_config": config,
        "params": {"login": None, "password": None, "context": context},
    }
    return label_studio(url, "predict", body, **options)


def refusal(response, status, code, field="tasks[0].data.image"):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "field", "request_id", "retryable"}
    assert (error["code"], error["field"]) == (code, field)
    return error["message"]


def no_mask(response, code, field="tasks[0].data.image"):
    """The reason in a prediction without regions: Label Studio drops the body of an error."""
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["results"]
    assert prediction["result"] == []
    error = prediction["error"]
    assert set(error) == {"code", "message", "field", "request_id", "retryable"}
    assert (error["code"], error["field"]) == (code, field)
    return error["message"]


def expected_mask(url, photo, **prompt):
    """API v1's own answer."""
    body = {
        "image": {"base64": base64.b64encode(photo).decode()},
        "prompts": [prompt],
        "mask_format": "rle",
    }
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answer = requests.post(f"{url}/v1/predict", json=body, headers=headers, timeout=60).json()
    best = answer["results"][0]["masks"][0]
    return coco_mask.decode(best["rle"]).astype(bool), best["score"]


def brush_pixels(region):
    """A brush region's mask, by a reader of its own."""
    bits = np.unpackbits(np.array(region["value"]["rle"], np.uint8))
    place = 0

    def read(count):
        nonlocal place
        place += count
        return int("".join(map(str, bits[place - count : place])), 2)

    total, word, sizes = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < total:
        assert read(1) == 1
        count = read(sizes[read(2)]) + 1
        values += [read(word)] * count
    shape = region["original_height"], region["original_width"], 4
    return np.array(values).reshape(shape)[:, :, 3] > 0


def test_label_studio_connects(url):
    """In the order of Label Studio's "Add model": health, setup; then its hooks."""
    health = label_studio(url, "health", auth=None, method="GET")
    assert health.json()["status"] == "UP"
    body = {
        "project": "1.1700000000",
        "schema": "<View></View>",
        "hostname": "http://localhost:8080",
        "access_token": "x",
        "extra_params": None,
    }
    assert label_studio(url, "setup", body).json()["model_version"].startswith("tiny ")
    hook = label_studio(url, "webhook", {"action": "START_TRAINING", "project": {"id": 1}})
    assert hook.json() == {"status": "ignored"}


@pytest.mark.parametrize("path", ["setup", "predict", "webhook"])
def test_label_studio_needs_the_token_as_password(url, path):
    for auth in (None, ("anybody", "wrong"), (TOKEN, ""), ("anybody", TOKEN[:-1])):
        refusal(label_studio(url, path, {}, auth=auth), 401, "unauthorized", field=None)
    address = f"{url}/compat/labelstudio/{path}"
    for header in ("Basic", "Basic !!", f"Basic {TOKEN}", "Bearer wrong"):
        refused = requests.post(address, headers={"Authorization": header}, timeout=60)
        refusal(refused, 401, "unauthorized", field=None)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    assert requests.post(address, json={}, headers=headers, timeout=60).status_code != 401


def test_a_password_opens_nothing_but_label_studios_routes(url):
    assert requests.get(f"{url}/v1/models", auth=("anybody", TOKEN), timeout=60).status_code == 401


def test_a_click_becomes_a_brush(url, studio, photo):
    """By the address, relative or whole; the click is in percent, the size is the picture's own."""
    height, width = size_from_header(photo)
    mask, score = expected_mask(
        url, photo, point_coords=[[0.45 * width, 0.45 * height]], point_labels=[1]
    )
    for image in ("/data/upload/1/a.jpg", f"{studio.address}/data/upload/1/b.jpg"):
        (prediction,) = ask(url, image, click()).json()["results"]
        (region,) = prediction["result"]
        assert (region["type"], region["from_name"]) == ("brushlabels", "mask")
        assert region["value"]["brushlabels"] == ["Leaf"]
        assert (region["original_height"], region["original_width"]) == (height, width)
        assert (brush_pixels(region) == mask).all()
        assert prediction["score"] == pytest.approx(score, abs=1e-4)
    path, headers = studio.asked[-1]
    assert path == "/data/upload/1/b.jpg"
    assert headers["Authorization"] == f"Token {KEY}"


def test_a_rectangle_and_clicks_become_a_polygon(url, photo):
    height, width = size_from_header(photo)
    drag = {
        "type": "rectanglelabels",
        "to_name": "image",
        "from_name": "drag",
        "value": {"x": 10, "y": 10, "width": 50, "height": 40, "rotation": 0},
    }
    no = click(5, 5, is_positive=False)
    image = "data:image/jpeg;base64," + base64.b64encode(photo).decode()
    (prediction,) = ask(url, image, drag, click(), no, config=POLYGON).json()["results"]
    points = [[0.45 * width, 0.45 * height], [0.05 * width, 0.05 * height]]
    box = [0.1 * width, 0.1 * height, 0.6 * width, 0.5 * height]
    mask, score = expected_mask(url, photo, point_coords=points, point_labels=[1, 0], box=box)
    assert prediction["score"] == pytest.approx(score, abs=1e-4)
    (region,) = prediction["result"]
    assert region["type"] == "polygonlabels"
    assert region["value"]["polygonlabels"] == ["Leaf"]
    corners = np.array(region["value"]["points"]) * [width / 100, height / 100]
    columns, rows = (corners - 0.5).round().astype(int).T
    assert mask[rows, columns].all()  # the outline runs through the mask's border pixels


def test_a_picture_is_fetched_once_for_many_clicks(url, studio):
    for x in (30, 40, 50):
        assert ask(url, "/data/upload/1/once.jpg", click(x)).status_code == 200
    assert [path for path, _ in studio.asked].count("/data/upload/1/once.jpg") == 1


def test_a_picture_that_the_endpoint_forgot_is_fetched_again(url, studio, photo):
    image = "/data/upload/1/again.jpg"
    assert ask(url, image, click()).status_code == 200
    headers = {"Authorization": f"Bearer {TOKEN}"}
    sent = requests.post(f"{url}/v1/images", data=photo, headers=headers, timeout=60).json()
    gone = requests.delete(f"{url}/v1/images/{sent['image_id']}", headers=headers, timeout=60)
    assert gone.status_code == 204
    assert ask(url, image, click()).status_code == 200
    assert [path for path, _ in studio.asked].count(image) == 2


def test_a_task_without_a_click_gets_all_objects(url, photo):
    """As brush and as polygon, those of API v1, the surest first."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    body = {"image": {"base64": base64.b64encode(photo).decode()}, "mask_format": "rle"}
    own = requests.post(f"{url}/v1/segment", json=body, headers=headers, timeout=60).json()
    assert len(own["objects"]) > 2
    (whole,) = ask(url, "/data/upload/1/batch.jpg").json()["results"]
    assert set(whole) == {"result", "score", "model_version"}
    assert whole["score"] == pytest.approx(np.mean([one["score"] for one in own["objects"]]))
    for region, expected in zip(whole["result"], own["objects"], strict=True):
        assert (region["type"], region["from_name"]) == ("brushlabels", "mask")
        assert region["value"]["brushlabels"] == ["Nut"]  # `tiny` knows no labels
        assert (brush_pixels(region) == coco_mask.decode(expected["rle"])).all()
        assert region["score"] == expected["score"]
    assert len({region["id"] for region in whole["result"]}) == len(own["objects"])
    (drawn,) = ask(url, "/data/upload/1/batch.jpg", config=POLYGON).json()["results"]
    assert len(drawn["result"]) > 2
    assert {region["type"] for region in drawn["result"]} == {"polygonlabels"}


def test_a_click_that_only_excludes_has_no_answer(url):
    (nothing,) = ask(url, "/data/upload/1/a.jpg", click(is_positive=False)).json()["results"]
    assert nothing["result"] == []
    assert "click inside the object" in nothing["note"]


def test_each_task_of_a_batch_is_answered_for_itself(url):
    """A picture that is not there costs the others nothing; a wrong config is told for each."""
    images = ["/data/upload/1/a.jpg", "/none.jpg", "/data/upload/1/b.jpg"]
    many = [{"id": number, "data": {"image": image}} for number, image in enumerate(images)]
    body = {"tasks": many, "label_config": BRUSH, "params": {"context": None}}
    first, wrong, last = label_studio(url, "predict", body).json()["results"]
    assert len(first["result"]) == len(last["result"]) > 2
    assert "answered 404" in wrong["error"]["message"]
    assert wrong["error"]["field"] == "tasks[1].data.image"
    assert "result" not in wrong
    body["label_config"] = "<View/>"
    answers = label_studio(url, "predict", body).json()["results"]
    assert [answer["error"]["field"] for answer in answers] == ["label_config"] * 3


def test_redirects_within_label_studio_are_followed(url, studio):
    assert ask(url, "/moved", click()).status_code == 200
    assert "/data/upload/1/moved.jpg" in [path for path, _ in studio.asked]
    assert "more than 3 times" in no_mask(ask(url, "/loop", click()), "invalid_request")
    assert [path for path, _ in studio.asked].count("/loop") == 4


def test_no_redirect_leads_out_of_label_studio(url, elsewhere):
    for image in ("/away", "/up", f"{elsewhere.address}/data/upload/1/x.jpg"):
        message = no_mask(ask(url, image, click()), "invalid_request")
        assert "does not lie at" in message
    assert elsewhere.asked == []  # neither the picture nor the key went there


def test_a_picture_too_large_is_refused_while_it_arrives(url):
    for image in ("/says-large", "/is-large"):
        started = time.monotonic()
        no_mask(ask(url, image, click()), "too_large")
        assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize("image", ["/stall", "/drip", "/drip-header"])
def test_a_picture_too_slow_is_given_up(url, image):
    started = time.monotonic()
    message = no_mask(ask(url, image, click()), "timed_out")
    assert "3 seconds" in message
    assert time.monotonic() - started < SECONDS + 2


def test_a_stalling_label_studio_holds_up_nobody_else(url, photo):
    with concurrent.futures.ThreadPoolExecutor(FETCHES + 4) as clients:
        slow = [clients.submit(ask, url, f"/stall?{n}", click()) for n in range(FETCHES + 4)]
        time.sleep(0.7)
        started = time.monotonic()
        expected_mask(url, photo, point_coords=[[20, 20]])
        assert time.monotonic() - started < 1.5
        answers = [answer.result().json()["results"][0] for answer in slow]
    codes = sorted(answer["error"]["code"] for answer in answers)
    assert codes == ["timed_out"] * FETCHES + ["too_busy"] * 4


def test_what_label_studio_does_not_give(url):
    assert "answered 404" in no_mask(ask(url, "/none.jpg", click()), "invalid_request")
    assert "check Label Studio's key" in no_mask(ask(url, "/login", click()), "unsupported_format")
    no_mask(ask(url, "/short", click()), "bad_gateway")
    no_mask(ask(url, 5, click()), "invalid_request")
    no_mask(ask(url, "data:image/png;base64,AAAA", click()), "unsupported_format")


def test_a_body_that_label_studio_would_not_send(url):
    refusal(label_studio(url, "predict", {}), 422, "invalid_request", field="tasks")
    refusal(label_studio(url, "predict", None), 415, "unsupported_format", field=None)
    config = '<!DOCTYPE v [<!ENTITY a "b">]>' + BRUSH
    answer = ask(url, "/data/upload/1/a.jpg", click(), config=config)
    no_mask(answer, "invalid_request", field="label_config")


def test_a_stranger_is_not_taken_for_an_endpoint(studio):
    with pytest.raises(EndpointError, match="is no samray endpoint"):
        Endpoint(studio.address, None).require_samray()


def png_of(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


@pytest.fixture
def cvat(url, monkeypatch):
    """CVAT's function as nuclio runs it: with its own context, worker and environment."""
    import nuclio_sdk

    source = Path(__file__).parents[2] / "serve" / "cvat" / "main.py"
    spec = importlib.util.spec_from_file_location("cvat_function", source)
    function = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(function)
    monkeypatch.setenv("SAMRAY_URL", url)
    monkeypatch.setenv("SAMRAY_TOKEN", TOKEN)
    context = nuclio_sdk.Context()
    function.init_context(context)

    def click(image, /, **prompt):
        body = {"image": base64.b64encode(image).decode(), "pos_points": [], "neg_points": []}
        answer = function.handler(context, nuclio_sdk.Event(body={**body, **prompt}))
        return answer.status_code, json.loads(answer.body)

    return click


def test_cvat_gets_the_mask_of_the_served_decoder(cvat, url, photo):
    height, width = size_from_header(photo)
    inside, outside = [0.45 * width, 0.45 * height], [0.1 * width, 0.1 * height]
    box = [0.2 * width, 0.2 * height, 0.7 * width, 0.7 * height]
    corners = [box[2:], box[:2]]  # drawn from below
    clicks = {"point_coords": [inside, outside], "point_labels": [1, 0]}
    for sent, asked in (
        ({"pos_points": [inside]}, {"point_coords": [inside]}),
        ({"pos_points": [inside], "neg_points": [outside]}, clicks),
        ({"obj_bbox": corners}, {"box": box}),
        ({"obj_bbox": corners, "pos_points": [inside]}, {"box": box, "point_coords": [inside]}),
    ):
        status, answer = cvat(photo, **sent)
        assert status == 200, answer
        mask, _ = expected_mask(url, photo, **asked)
        assert np.array_equal(np.array(answer["mask"]), 255 * mask)


def test_cvat_clicks_on_after_the_endpoint_forgot_the_image(cvat, url, photo):
    height, width = size_from_header(photo)
    assert cvat(photo, pos_points=[[width, height]])[0] == 200  # CVAT lets people click the border
    image_id = f"sha256:{hashlib.sha256(photo).hexdigest()}"
    headers = {"Authorization": f"Bearer {TOKEN}"}
    gone = requests.delete(f"{url}/v1/images/{image_id}", headers=headers, timeout=60)
    assert gone.ok
    assert cvat(photo, pos_points=[[width, height]])[0] == 200


def test_cvat_is_told_what_is_wrong(cvat, photo, studio, monkeypatch):
    for status, said, sent in (
        (422, "click inside the object", {"neg_points": [[5, 5]]}),
        (400, "not what CVAT sends", {"pos_points": [5]}),
        (400, "not base64", {"image": "?"}),
        (415, "JPEG", {"image": base64.b64encode(b"no picture").decode(), "pos_points": [[5, 5]]}),
    ):
        answer = cvat(photo, **sent)
        assert answer[0] == status
        assert said in answer[1]["message"]
    for status, said, variable, value in (
        (401, "Bearer TOKEN", "SAMRAY_TOKEN", "wrong"),
        (502, "is no samray endpoint", "SAMRAY_URL", studio.address),
        (502, "is `samray serve` running", "SAMRAY_URL", "http://127.0.0.1:9"),
        (500, "set SAMRAY_URL", "SAMRAY_URL", ""),
    ):
        monkeypatch.setenv(variable, value)
        answer = cvat(png_of(np.full((8, 8, 3), len(said), np.uint8)), pos_points=[[5, 5]])
        assert answer[0] == status, answer
        assert said in answer[1]["message"]


def test_cvats_function_file_names_what_the_function_has():
    folder = Path(__file__).parents[2] / "serve" / "cvat"
    function = yaml.safe_load((folder / "function.yaml").read_text())
    source = (folder / "main.py").read_text()
    assert function["metadata"]["annotations"]["type"] == "interactor"
    file, name = function["spec"]["handler"].split(":")
    assert f"def {name}(" in (folder / f"{file}.py").read_text()
    for variable in function["spec"]["env"]:
        assert f'"{variable["name"]}"' in source
