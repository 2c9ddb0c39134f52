"""The endpoint as clients meet it: real Ray Serve, real HTTP, the weights that ship."""

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import requests
import torch
from PIL import Image
from ports import free_port
from pycocotools import mask as coco_mask
from ray import serve
from serving import TOKEN, serving, wait_until_ready

from samray.config import ServeConfig, load_config
from samray.data.dataset import PreparedDataset
from samray.data.prepare import prepare
from samray.errors import ConfigError
from samray.geometry.images import decode_image
from samray.geometry.prompts import Prompt
from samray.instances.saved import InstanceModel, instance_files, new_decoder
from samray.instances.segment import Way
from samray.prediction.predictor import Predictor
from samray.prediction.requests import MAX_POINTS, MAX_PROMPTS
from samray.prediction.segmentation import find_instances
from samray.sam.checkpoint import load_checkpoint, save_checkpoint
from samray.sam.model import encoder_digest
from samray.sam.shipped import load_shipped
from samray.sam.store import ModelStore
from samray.serving.app import build_app, serve_here
from samray.serving.gate import BODIES

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}


def checkpoint_like_shipped(folder, shift=0.0):
    """A checkpoint folder with the shipped weights, the mask decoder's moved a little if asked.

    Beside them lies an instance decoder.
    """
    shipped = load_shipped()
    sam = shipped.model()
    instances = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way(min_area=30))
    weights = {
        name: value + shift * torch.randn_like(value) if name.startswith("mask_decoder") else value
        for name, value in shipped.weights.items()
    }
    progress = {"epoch": 1, "base": shipped.progress["base"]}
    more = instance_files(instances, encoder_digest(sam))
    save_checkpoint(folder, weights, load_config(), progress, more=more)
    return load_checkpoint(folder)


def promoted(store, checkpoint):
    return store.add("drawn", checkpoint, {"previous": None, "metrics": {}, "guard": {}})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    store = ModelStore(folder / "models")
    promoted(store, checkpoint_like_shipped(folder / "first"))
    return store


@pytest.fixture(scope="module")
def url(ray_cluster, store, tmp_path_factory):
    """An endpoint with a token, two decoders and small limits."""
    token_file = tmp_path_factory.mktemp("token") / "token.txt"
    token_file.write_text(TOKEN + "\n")
    settings = ServeConfig(
        store=str(store.folder),
        token_file=str(token_file),
        cors_origins=("https://annotate.example",),
        decoder_replicas=2,
        max_body_mb=2,
        max_megapixels=3,
        max_in_flight=24,
        encode_batch=4,
        cpus_per_replica=0.2,
    )
    with serving(settings) as address:
        yield address


@pytest.fixture(scope="module")
def photo(photos):
    return sorted((photos / "images").iterdir())[0].read_bytes()


def call(url, method, path, token=TOKEN, **options):
    headers = {**options.pop("headers", {})}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return requests.request(method, url + path, headers=headers, timeout=90, **options)


def predict(url, photo=None, **request):
    if photo is not None:
        request["image"] = {"base64": base64.b64encode(photo).decode()}
    return call(url, "POST", "/v1/predict", json=request)


def refusal(response, status, code):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"code", "message", "field", "request_id", "retryable"}
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def read_answer(connection):
    """The head and the JSON of a refusal, as they came."""
    connection.settimeout(60)
    answer = b""
    while not answer.endswith(b"}}"):
        part = connection.recv(4096)
        assert part, answer
        answer += part
    return answer


def point(x=100, y=100, **more):
    return {"point_coords": [[x, y]], "point_labels": [1], **more}


def test_answers_are_those_of_the_predictor(url, photo):
    prompts = [
        point(90, 80, id="a"),
        {"box": [20, 30, 150, 160], "id": "b"},
        {"point_coords": [[90, 80], [10, 10]], "point_labels": [1, 0], "id": "c"},
        {"point_coords": [[90, 80]], "box": [20, 30, 150, 160], "id": "d"},
    ]
    answer = predict(url, photo, prompts=prompts, mask_format="rle").json()
    predictor = Predictor(load_shipped().model())
    image = decode_image(photo)
    predictor.set_image(image)
    assert (answer["height"], answer["width"]) == image.shape[:2]
    assert [result["id"] for result in answer["results"]] == ["a", "b", "c", "d"]
    for prompt, result in zip(prompts, answer["results"], strict=True):
        points = np.array(prompt.get("point_coords", []), np.float32)
        labels = np.array(prompt.get("point_labels", [1] * len(points)), np.int64)
        expected = predictor.predict(
            Prompt(
                points if len(points) else None,
                labels if len(points) else None,
                np.array(prompt["box"], np.float32) if "box" in prompt else None,
            )
        )
        assert len(result["masks"]) == len(expected.masks)
        best = coco_mask.decode(result["masks"][0]["rle"]).astype(bool)
        assert np.mean(best == expected.best) > 0.999
        assert result["masks"][0]["score"] == pytest.approx(
            expected.iou_predictions.max(), abs=0.01
        )
        assert result["masks"][0]["area"] == np.count_nonzero(best)


def test_an_image_is_uploaded_once_and_found_again(url, photo):
    raw = photo + b"upload"
    by_form = call(url, "POST", "/v1/images", files={"image": ("x.jpg", raw)}).json()
    assert by_form["cache"] == "miss"
    by_body = call(url, "POST", "/v1/images", data=raw).json()
    assert by_body["cache"] == "hit"
    assert by_body["image_id"] == by_form["image_id"]
    answer = predict(url, image_id=by_form["image_id"], prompts=[point()]).json()
    assert answer["cache"] == "hit"
    assert set(answer["timing_ms"]) == {"queue", "encode", "decode", "total"}
    multipart = call(
        url,
        "POST",
        "/v1/predict",
        files={"image": ("x.jpg", raw), "request": (None, json.dumps({"prompts": [point()]}))},
    )
    assert multipart.json()["image_id"] == by_form["image_id"]
    token = answer["results"][0]["masks"][0]["mask_token"]
    path = f"/v1/images/{by_form['image_id']}"
    assert call(url, "DELETE", path).status_code == 204
    refusal(call(url, "DELETE", path), 404, "unknown_image")
    refusal(predict(url, image_id=by_form["image_id"], prompts=[point()]), 404, "unknown_image")
    again = predict(url, raw, prompts=[point(mask_token=token)])
    refusal(again, 404, "unknown_mask_token")


def test_images_come_as_tools_send_them(url, photo):
    """Base64 in lines; a request that is a file of the form."""
    lines = base64.encodebytes(photo).decode()
    by_lines = call(
        url, "POST", "/v1/predict", json={"image": {"base64": lines}, "prompts": [point()]}
    )
    request = json.dumps({"prompts": [point()]})
    by_files = call(
        url, "POST", "/v1/predict", files={"image": photo, "request": ("r.json", request)}
    )
    assert by_lines.json()["image_id"] == by_files.json()["image_id"]


@pytest.mark.parametrize(
    ("parts", "code", "message"),
    [
        ([("image", ("a.jpg", b"x")), ("image", ("b.jpg", b"x"))], "bad_request", "one file"),
        ([("image", ("a.jpg", b"x")), ("more", ("b.jpg", b"x"))], "bad_request", "one file"),
        ([("image", (None, "a.jpg")), ("request", (None, "{}"))], "invalid_request", "a file"),
        ([("request", (None, "{}"))] * 2, "bad_request", "one field"),
    ],
)
def test_a_form_that_holds_something_else_is_told_so(url, parts, code, message):
    answer = call(url, "POST", "/v1/predict", files=parts)
    status = {"bad_request": 400, "invalid_request": 422}[code]
    assert message in refusal(answer, status, code)["message"]


def test_sixteen_first_clicks_cost_one_encoding(url, photo):
    image_id = call(url, "POST", "/v1/images", data=photo + b"sixteen").json()["image_id"]
    call(url, "DELETE", f"/v1/images/{image_id}")
    encoded = photo + b"sixteen"
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda n: predict(url, encoded, prompts=[point(50 + n, 60)]).json(), range(16))
        )
    assert all("results" in answer for answer in answers)
    waits = {round(a["timing_ms"]["encode"], 2) for a in answers if a["cache"] == "miss"}
    assert waits  # all that missed waited for the one that encoded
    assert predict(url, encoded, prompts=[point()]).json()["cache"] == "hit"


def test_a_client_that_hangs_up_costs_nobody_else_the_encoding(url, photo):
    """One who waits for the same image."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number in range(8):
            body = photo + b"hang up" + bytes([number])
            length = f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection((host, int(port)), 60) as connection:
                connection.sendall((head + length).encode() + body)
                time.sleep(0.02)
                other = pool.submit(call, url, "POST", "/v1/images", data=body)
                time.sleep(0.03)
            assert other.result().status_code == 200, other.result().text


def test_images_encoded_together_answer_as_alone(url, photos):
    """In one batch, and a file that breaks off in the middle among them."""
    files = [path.read_bytes() for path in sorted((photos / "images").iterdir())[1:9]]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        cut = pool.submit(call, url, "POST", "/v1/images", data=files[0][:9000])
        good = [pool.submit(call, url, "POST", "/v1/images", data=file) for file in files]
    refusal(cut.result(), 400, "invalid_image")
    predictor = Predictor(load_shipped().model())
    for file, task in zip(files, good, strict=True):
        request = {"image_id": task.result().json()["image_id"], "mask_format": "rle"}
        answer = predict(url, prompts=[point(60, 60)], **request).json()
        predictor.set_image(decode_image(file))
        best = predictor.predict(Prompt(np.array([[60, 60]], np.float32), np.array([1]))).best
        mask = coco_mask.decode(answer["results"][0]["masks"][0]["rle"]).astype(bool)
        union = np.count_nonzero(mask | best)
        assert np.count_nonzero(mask & best) >= 0.99 * union


def test_a_correction_builds_on_the_answer_before(url, photo):
    first = predict(url, photo, prompts=[point(90, 80)], mask_format="rle").json()
    token = first["results"][0]["masks"][0]["mask_token"]
    prompt = {"point_coords": [[90, 80], [60, 60]], "point_labels": [1, 0]}
    with_token, without = (
        predict(
            url, image_id=first["image_id"], prompts=[{**prompt, **more}], mask_format="rle"
        ).json()["results"][0]["masks"][0]
        for more in ({"mask_token": token}, {})
    )
    assert with_token["score"] != without["score"]
    other = predict(url, photo + b"other", prompts=[point(mask_token=token)])
    assert refusal(other, 404, "unknown_mask_token")["field"] == "prompts[0].mask_token"


@pytest.mark.parametrize("mask_format", ["polygon", "rle", "png", "labelme", "none"])
def test_every_format_is_the_same_mask(url, photo, mask_format):
    prompts = [{"box": [20, 30, 150, 160]}]
    rle = predict(url, photo, prompts=prompts, mask_format="rle").json()["results"][0]["masks"][0]
    expected = coco_mask.decode(rle["rle"]).astype(bool)
    answer = predict(url, photo, prompts=prompts, mask_format=mask_format).json()
    (mask,) = answer["results"][0]["masks"]
    assert mask["format"] == mask_format
    assert mask["area"] == np.count_nonzero(expected)
    x1, y1, x2, y2 = (int(v) for v in mask["bbox"])
    assert expected[y1:y2, x1:x2].sum() == expected.sum()
    if mask_format == "png":
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(mask["png"]))))
        assert np.array_equal(found, expected)
    elif mask_format == "polygon":
        assert all(set(part) == {"points", "hole"} for part in mask["polygons"])
    elif mask_format == "labelme":
        assert answer["labelme"]["shapes"] == mask["shapes"]
    else:
        assert ("rle" in mask) == (mask_format == "rle")


def segment(url, photo=None, **request):
    if photo is not None:
        request["image"] = {"base64": base64.b64encode(photo).decode()}
    return call(url, "POST", "/v1/segment", json=request)


def test_all_objects_are_those_of_samray_predict(url, photo):
    """With the labels of the checkpoint's decoder; clicks and it need one encoding."""
    image_id = call(url, "POST", "/v1/images", data=photo).json()["image_id"]
    answer = segment(url, image_id=image_id, mask_format="rle").json()
    sam = load_shipped().model().eval()
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way(min_area=30))
    image = decode_image(photo)
    expected = find_instances(sam, model, image)
    assert (answer["height"], answer["width"]) == image.shape[:2]
    assert (answer["found_by"], answer["left_out"], answer["cache"]) == ("instances", 0, "hit")
    assert answer["model"] == predict(url, image_id=image_id, prompts=[point()]).json()["model"]
    assert len(answer["objects"]) == len(expected) > 2
    scores = [one["score"] for one in answer["objects"]]
    assert scores == sorted(scores, reverse=True)
    for one, other in zip(answer["objects"], expected, strict=True):
        x1, y1, x2, y2 = other.box
        mask = coco_mask.decode(one["rle"])[y1:y2, x1:x2]
        # The embedding is kept in half precision.
        assert np.mean(mask == other.pixels) > 0.97
        assert one["label"] == "thing"
        assert one["score"] == pytest.approx(other.score, abs=0.02)
    least = scores[1]
    surer = segment(url, photo, mask_format="none", min_score=least).json()["objects"]
    assert len(surer) == 2
    assert set(surer[0]) == {"label", "score", "area", "bbox", "format"}


def test_all_objects_come_in_every_way_and_format(url, photo):
    form = {"image": ("a b.jpg", photo), "request": (None, '{"mask_format": "labelme"}')}
    labelme = call(url, "POST", "/v1/segment", files=form).json()
    assert labelme["labelme"]["imagePath"] == "a b.jpg"
    shapes = [shape for one in labelme["objects"] for shape in one["shapes"]]
    assert labelme["labelme"]["shapes"] == shapes
    assert {shape["label"] for shape in shapes} == {"thing"}
    form.pop("request")
    assert call(url, "POST", "/v1/segment", files=form).json()["found_by"] == labelme["found_by"]
    png = segment(url, photo, mask_format="png", label="leaf").json()["objects"]
    polygons = segment(url, photo).json()["objects"]
    for one, other, drawn in zip(labelme["objects"], png, polygons, strict=True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(other["png"]))))
        assert mask.sum() == one["area"] == drawn["area"]
        x1, y1, x2, y2 = one["bbox"]
        assert mask[int(y1) : int(y2), int(x1) : int(x2)].sum() == mask.sum()
        assert other["label"] == "leaf"
        assert all(mask[y, x] for part in drawn["polygons"] for x, y in part["points"])


def test_a_request_for_all_objects_is_checked(url, photo, large_photo):
    error = refusal(segment(url, photo, min_score=2), 422, "invalid_request")
    assert error["field"] == "min_score"
    assert refusal(segment(url, photo, prompts=[]), 422, "invalid_request")["field"] == "prompts"
    assert refusal(segment(url), 422, "invalid_request")["field"] == "image"
    refusal(segment(url, image_id="sha256:" + "0" * 64), 404, "unknown_image")
    refusal(segment(url, photo, model="none"), 404, "unknown_model")
    refusal(segment(url, photo[:300]), 400, "invalid_image")
    refusal(call(url, "POST", "/v1/segment", token=None, json={}), 401, "unauthorized")
    origin = {"Origin": "https://evil.example"}
    refusal(call(url, "POST", "/v1/segment", json={}, headers=origin), 403, "forbidden")
    nothing = segment(url, large_photo)  # of one colour
    assert nothing.status_code == 200
    assert nothing.json()["width"] == 1700


@pytest.mark.parametrize(
    ("sent", "asked", "name"),
    [("a ü.jpg", None, "a ü.jpg"), ("a.jpg", "b.jpg", "b.jpg"), ("../a.jpg", None, None)],
)
def test_returned_labelme_names_the_image(url, photo, sent, asked, name):
    """As it was called in the form, or as the request says; paths are left out."""
    request = {"prompts": [point()], "mask_format": "labelme"}
    request |= {"image_name": asked} if asked else {}
    answer = call(
        url,
        "POST",
        "/v1/predict",
        files={"image": (sent, photo), "request": (None, json.dumps(request))},
    ).json()
    assert answer["labelme"]["imagePath"] == (name or f"{answer['image_id'][7:23]}.png")


def test_returned_labelme_prepares_to_the_same_masks(url, photos, tmp_path):
    data = tmp_path / "answers"
    data.mkdir()
    masks = {}
    for path in sorted((photos / "images").iterdir())[:6]:
        name = f"{path.stem}.jpg"
        Image.open(path).convert("RGB").save(data / name, quality=95)
        raw = (data / name).read_bytes()
        request = {"prompts": [point(80, 90), {"box": [10, 10, 200, 180]}], "label": "thing"}
        named = {"image_name": name, "mask_format": "labelme", **request}
        document = predict(url, raw, **named).json()["labelme"]
        (data / f"{path.stem}.json").write_text(json.dumps(document))
        results = predict(url, raw, mask_format="rle", **request).json()["results"]
        masks[name] = [coco_mask.decode(r["masks"][0]["rle"]).astype(bool) for r in results]
    folders = {"prepare.data_dir": str(data), "prepare.output_dir": str(tmp_path / "prepared")}
    all_to_train = {"prepare.val_fraction": 0, "prepare.test_fraction": 0}
    prepare(load_config(options={**folders, **all_to_train}))
    dataset = PreparedDataset(tmp_path / "prepared")
    compared = 0
    for name, expected in masks.items():
        record = dataset.images[name]
        found = [record.decode(instance) for instance in record.instances]
        for mask in expected:
            if mask.any():
                ious = [np.sum(mask & f) / np.sum(mask | f) for f in found]
                assert max(ious) >= 0.98
                compared += 1
    assert compared >= 6


@pytest.mark.parametrize(
    ("request_body", "field"),
    [
        ({"prompts": []}, "prompts"),
        ({}, "prompts"),
        ({"prompts": [{}]}, "prompts[0]"),
        ({"prompts": [point(5000, 1)]}, "prompts[0].point_coords[0]"),
        ({"prompts": [point(-1, 1)]}, "prompts[0].point_coords[0]"),
        ({"prompts": [{"box": [10, 10, 5, 20]}]}, "prompts[0]"),
        ({"prompts": [{"box": [10, 10, 5000, 20]}]}, "prompts[0].box"),
        ({"prompts": [{"point_coords": [[1, 1]], "point_labels": [1, 0]}]}, "prompts[0]"),
        ({"prompts": [{"point_coords": [[1, 1]], "point_labels": [2]}]}, "prompts[0].point_l"),
        ({"prompts": [{"point_coords": [["a", 1]]}]}, "prompts[0].point_coords"),
        ({"prompts": [{"point_coords": [[1, 1]] * (MAX_POINTS + 1)}]}, "prompts[0].point_coords"),
        ({"prompts": [point()] * (MAX_PROMPTS + 1)}, "prompts"),
        ({"prompts": [point()], "mask_format": "jpeg"}, "mask_format"),
        ({"prompts": [point("1", 2)]}, "prompts[0].point_coords"),
        ({"prompts": [point()], "multimask_output": "yes"}, "multimask_output"),
        ({"prompts": [point()], "image_name": "../a.jpg"}, "image_name"),
        ({"prompts": [point()], "polygon_tolerance": -1}, "polygon_tolerance"),
        ({"prompts": [point()], "image_url": "http://example.org/x.jpg"}, "image_url"),
        ({"prompts": [point()], "image_id": "/etc/passwd"}, "image_id"),
        ({"prompts": [point()], "image_id": "sha256:" + "0" * 64}, "image"),
    ],
)
def test_a_bad_request_is_told_its_field(url, photo, request_body, field):
    error = refusal(predict(url, photo, **request_body), 422, "invalid_request")
    assert error["field"].startswith(field)
    assert field in error["message"] or field == "image"


def test_all_mistakes_at_once(url, photo):
    body = {"prompts": [point(5000, 1), {"box": [1, 1, 9000, 2]}, point(10, -4)]}
    message = refusal(predict(url, photo, **body), 422, "invalid_request")["message"]
    for field in ("prompts[0].point_coords[0]", "prompts[1].box", "prompts[2].point_coords[0]"):
        assert field in message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(url, photo, text):
    image = base64.b64encode(photo).decode()
    body = f'{{"image": {{"base64": "{image}"}}, "prompts": [{{"point_coords": [[{text}, 1]]}}]}}'
    response = call(url, "POST", "/v1/predict", data=body, headers=JSON)
    assert response.status_code in (400, 422)
    assert response.json()["error"]["code"] in ("bad_request", "invalid_request")


def test_what_is_no_image(url, photo):
    gif = io.BytesIO()
    Image.new("RGB", (9, 9)).save(gif, format="GIF")
    refusal(predict(url, gif.getvalue(), prompts=[point()]), 415, "unsupported_format")
    refusal(predict(url, b"hello", prompts=[point()]), 415, "unsupported_format")
    refusal(predict(url, photo[:300], prompts=[point()]), 400, "invalid_image")
    refusal(call(url, "POST", "/v1/images", data=b""), 415, "unsupported_format")
    cut = call(url, "POST", "/v1/predict", data=b"{", headers=JSON)
    refusal(cut, 400, "bad_request")
    unnamed = call(url, "POST", "/v1/predict", data=b"{}", headers={"Content-Type": "text/plain"})
    refusal(unnamed, 415, "unsupported_format")
    refusal(call(url, "POST", "/v1/images", files={"picture": ("x", b"x")}), 400, "bad_request")
    refusal(call(url, "POST", "/v1/images", files={"request": "{}"}), 422, "invalid_request")
    not_base64 = call(
        url, "POST", "/v1/predict", json={"image": {"base64": "ä"}, "prompts": [point()]}
    )
    refusal(not_base64, 422, "invalid_request")


@pytest.mark.parametrize(
    ("side", "message"), [(2000, "2000 x 2000 pixels; the limit is 3 megapixels"), (20_000, "has")]
)
def test_pixels_are_counted_before_decoding(url, side, message):
    bomb = io.BytesIO()
    Image.new("1", (side, side)).save(bomb, format="PNG")
    error = refusal(call(url, "POST", "/v1/images", data=bomb.getvalue()), 413, "too_large")
    assert error["message"].startswith(message)


def test_bodies_are_counted_as_they_come(url):
    declared = call(url, "POST", "/v1/images", data=b"x" * (3 * 2**20))
    refusal(declared, 413, "too_large")
    chunks = (b"x" * 2**18 for _ in range(12))  # no Content-Length
    refusal(call(url, "POST", "/v1/images", data=chunks), 413, "too_large")


def test_what_arrives_at_once_is_counted_over_all_requests(url, photo):
    """Bodies that are never finished fill no memory: past the bound they are refused."""
    host, port = url.removeprefix("http://").split(":")
    head = f"POST /v1/images HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    unfinished = f"{head}Content-Length: {2 * 2**20}\r\n\r\n".encode() + bytes(2 * 2**20 - 1)
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(BODIES + 4):
            connections.append(socket.create_connection((host, int(port)), 60))
            stack.enter_context(connections[-1])
            with contextlib.suppress(ConnectionError):  # refused while it still sends
                connections[-1].sendall(unfinished)
        answered, deadline = [], time.monotonic() + 60
        while len(answered) < 4:
            answered, _, _ = select.select(connections, [], [], 1)
            assert time.monotonic() < deadline
        assert len(answered) < 8
        answer = read_answer(answered[0])
        assert b" 429 " in answer.splitlines()[0]
        assert b'"code":"too_busy"' in answer
        assert call(url, "GET", "/v1/healthz").status_code == 200
    deadline = time.monotonic() + 60
    while call(url, "POST", "/v1/images", data=photo).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_who_may_ask(url):
    for path in ("/v1/models", "/openapi.json", "/v1/images/x", "/nowhere"):
        for token in (None, "wrong", TOKEN[:-1], TOKEN + "x"):
            response = call(url, "GET", path, token=token)
            refusal(response, 401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"
    lower = {"Authorization": f"bearer {TOKEN}"}
    assert call(url, "GET", "/v1/models", token=None, headers=lower).status_code == 200
    for path in ("/", "/v1/healthz", "/v1/readyz"):
        assert call(url, "GET", path, token=None).status_code == 200


def test_other_origins(url):
    for origin, allowed in (("https://annotate.example", True), ("https://evil.example", False)):
        preflight = call(url, "OPTIONS", "/v1/predict", token=None, headers={"Origin": origin})
        assert (preflight.headers.get("access-control-allow-origin") == origin) == allowed
        answer = call(url, "GET", "/v1/models", headers={"Origin": origin})
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed


def test_paths_and_methods_that_are_not(url):
    refusal(call(url, "GET", "/v1/nothing"), 404, "not_found")
    refusal(call(url, "GET", "/v1/predict"), 405, "method_not_allowed")
    refusal(predict(url, b"x", prompts=[point()], model="none"), 404, "unknown_model")


def test_the_document_describes_the_api(url):
    document = call(url, "GET", "/openapi.json").json()
    assert {
        "/v1/predict",
        "/v1/segment",
        "/v1/images",
        "/v1/models",
        "/v1/healthz",
        "/v1/readyz",
    } <= set(document["paths"])
    schemas = document["components"]["schemas"]
    assert {"PredictRequest", "PromptRequest", "SegmentRequest", "SegmentAnswer"} <= set(schemas)
    names = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(document)))
    assert names <= set(schemas)


def test_a_promotion_reaches_clients_and_none_fails(url, store, photo, tmp_path):
    """Asked all the time, across a promotion: each answer is the old model's or the new one's."""
    image_id = call(url, "POST", "/v1/images", data=photo).json()["image_id"]
    request = {"image_id": image_id, "prompts": [point(90, 80)], "mask_format": "rle"}
    old = predict(url, **request).json()
    answers, stop = [], time.monotonic() + 60
    with concurrent.futures.ThreadPoolExecutor(4) as pool:

        def ask(_):
            seen = []
            after = 0
            while time.monotonic() < stop and after < 10:
                seen.append(predict(url, **request))
                answer = seen[-1].json()
                after += answer.get("model", {}).get("version") != old["model"]["version"]
            return seen

        asking = [pool.submit(ask, n) for n in range(4)]
        time.sleep(2)
        version = promoted(store, checkpoint_like_shipped(tmp_path / "second", shift=0.02))
        answers = [response for task in asking for response in task.result()]
    assert {response.status_code for response in answers} == {200}
    by_version = {}
    for response in answers:
        answer = response.json()
        digest = answer["model"]["checkpoint_digest"]
        counts = answer["results"][0]["masks"][0]["rle"]["counts"]
        by_version.setdefault((answer["model"]["version"], digest), set()).add(counts)
    assert {key[0] for key in by_version} == {old["model"]["version"], version.version}
    assert all(len(masks) == 1 for masks in by_version.values())
    assert len(set.union(*by_version.values())) == 2
    assert (version.version, version.record["checkpoint_digest"]) in by_version
    # The image encoder is the same, so no version encodes the image again.
    assert {response.json()["cache"] for response in answers} == {"hit"}


def test_a_version_that_cannot_be_loaded_is_not_taken(url, store, photo, tmp_path):
    """The one before goes on answering, and another model that comes later is served."""
    before = predict(url, photo, prompts=[point()]).json()["model"]
    good = store.current("drawn")
    version = promoted(store, checkpoint_like_shipped(tmp_path / "third", shift=0.03))
    weights = store.folder / "drawn" / version.version / "weights.pth"
    weights.write_bytes(weights.read_bytes()[:100_000])
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    deadline = time.monotonic() + 60
    while not any(version.version in text for text in log_texts(logs)):  # until it was tried
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for _ in range(5):
        answer = predict(url, photo, prompts=[point()])
        assert answer.status_code == 200
        assert answer.json()["model"] == before
    assert call(url, "GET", "/v1/readyz").json()["models"] == {"drawn": "outdated"}
    assert call(url, "GET", "/v1/readyz?model=drawn").status_code == 200
    refusal(call(url, "GET", "/v1/readyz?model=other"), 404, "unknown_model")
    other = store.add("other", load_checkpoint(good.folder), good.record)
    (other.folder / "instances.pth").write_bytes(b"damaged")  # not read for points
    while predict(url, photo, prompts=[point()], model="other").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    error = refusal(segment(url, photo, model="other"), 503, "unusable_model")
    assert "points and boxes work; promote the model again" in error["message"]
    assert str(store.folder) not in error["message"]
    assert predict(url, photo, prompts=[point()], model="other").status_code == 200
    assert segment(url, photo).status_code == 200  # the other models' are fine
    store.set_current("drawn", good.version)
    shutil.rmtree(store.folder / "other")


def log_texts(logs):
    """What Ray's processes have written so far."""
    paths = [path for path in logs.rglob("*") if path.suffix in (".err", ".out", ".log")]
    return [path.read_text(errors="replace") for path in paths if path.is_file()]


def test_requests_are_counted_and_logged(url, photo):
    """Prometheus finds what happened; the log has one line of JSON a request, with its id."""
    for _ in range(2):
        answer = predict(url, photo, prompts=[point()]).json()
    assert answer["cache"] == "hit"
    refused = refusal(call(url, "GET", "/v1/nothing"), 404, "not_found")
    (node,) = ray.nodes()
    wanted = (
        'samray_requests_total{', 'samray_rejects_total{', 'code="not_found"',
        'samray_embedding_lookups_total{', 'result="hit"', 'result="miss"',
        "samray_decode_ms_bucket", "samray_encode_ms_bucket", "samray_encode_batch_size_bucket",
    )  # fmt: skip
    deadline = time.monotonic() + 90  # Ray gathers them every few seconds
    missing = wanted
    while missing:
        text = requests.get(f"http://127.0.0.1:{node['MetricsExportPort']}", timeout=60).text
        missing = [word for word in wanted if word not in text]
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    own = call(url, "GET", "/metrics")
    assert own.status_code == 200
    assert all(word in own.text for word in wanted)
    assert "ray_node" not in own.text
    refusal(call(url, "GET", "/metrics", token=None), 401, "unauthorized")
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    lines = [
        json.loads(line[line.index("{") :])
        for text in log_texts(logs)
        for line in text.splitlines()
        if answer["request_id"] in line or refused["request_id"] in line
        if '"status"' in line
    ]
    by_id = {line["request_id"]: line for line in lines}
    assert by_id[answer["request_id"]]["status"] == 200
    assert by_id[answer["request_id"]]["path"] == "/v1/predict"
    assert by_id[refused["request_id"]]["status"] == 404
    assert not any(TOKEN in json.dumps(line) for line in lines)


@pytest.mark.slow
def test_a_killed_decoder_costs_no_answer(url, photo):
    """Clicks go on while all Decoders die: they wait for the next, which encodes again."""
    image_id = call(url, "POST", "/v1/images", data=photo).json()["image_id"]
    request = {"image_id": image_id, "prompts": [point(90, 80)], "mask_format": "rle"}
    before = predict(url, **request).json()["results"][0]["masks"][0]["rle"]
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "#Decoder#" in actor["name"]
    ]
    assert len(names) == 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(predict, url, **request) for _ in range(100)]
        for name in names:
            ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)  # as kill -9
        answers = [task.result() for task in asked]
    assert {response.status_code for response in answers} == {200}
    masks = [response.json()["results"][0]["masks"][0]["rle"] for response in answers]
    assert masks == [before] * 100
    wait_for_decoders(2)


def wait_for_decoders(number):
    """Until so many serve: one more later would take over images that another has encoded."""
    deadline = time.monotonic() + 120
    while True:
        states = serve.status().applications["samray"].deployments["Decoder"].replica_states
        if states == {"RUNNING": number}:
            time.sleep(1)  # until the Ingress has heard of it
            return
        assert time.monotonic() < deadline, states
        time.sleep(0.5)


@pytest.mark.slow
def test_a_killed_ingress_listens_again_at_once(url, photo):
    """Also with connections open, whose remains hold the port for a minute after a kill."""
    image_id = call(url, "POST", "/v1/images", data=photo).json()["image_id"]
    (name,) = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if "#Ingress#" in actor["name"]
    ]
    with requests.Session() as session:
        session.get(f"{url}/v1/healthz", timeout=60)
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)  # as kill -9
        with contextlib.suppress(requests.RequestException):  # also in the middle of an answer
            while True:  # until it is dead
                requests.get(f"{url}/v1/healthz", timeout=60)
        wait_until_ready(url, 50)
    answer = predict(url, image_id=image_id, prompts=[point()]).json()
    assert answer["cache"] == "hit", "what the others keep is not lost"


@pytest.mark.slow
def test_a_flood_is_refused_and_health_still_answers(url, photo):
    body = json.dumps(
        {
            "image": {"base64": base64.b64encode(photo).decode()},
            "prompts": [point(20 + n, 40) for n in range(64)],
            "mask_format": "polygon",
        }
    )
    everything = json.dumps({"image": json.loads(body)["image"], "mask_format": "labelme"})
    with concurrent.futures.ThreadPoolExecutor(80) as pool:
        flood = [
            pool.submit(call, url, "POST", path, data=sent, headers=JSON)
            for path, sent in (("/v1/predict", body), ("/v1/segment", everything)) * 80
        ]
        time.sleep(1)
        started = time.monotonic()
        assert call(url, "GET", "/v1/healthz", token=None).status_code == 200
        waited = time.monotonic() - started
        answers = [task.result() for task in flood]
    assert waited < 10  # on a busy machine; the benchmark states it
    for some in (answers[::2], answers[1::2]):  # each kind of request
        assert {answer.status_code for answer in some} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refusal(refused, 429, "too_busy")["retryable"] is True
    assert predict(url, photo, prompts=[point()]).status_code == 200


@pytest.fixture(scope="module")
def large_photo():
    """2.9 megapixels of one colour: few bytes, much work for each mask."""
    buffer = io.BytesIO()
    Image.new("RGB", (1700, 1700), (90, 120, 60)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_request_that_asks_for_too_much_is_refused_before_any_work(url, large_photo):
    image_id = call(url, "POST", "/v1/images", data=large_photo).json()["image_id"]
    started = time.monotonic()
    answer = predict(url, image_id=image_id, prompts=[point()] * 256)
    error = refusal(answer, 413, "too_large")
    assert time.monotonic() - started < 20
    assert "768 masks" in error["message"]
    one_each = predict(
        url, image_id=image_id, prompts=[point()] * 2, multimask_output=False, mask_format="none"
    )
    assert one_each.status_code == 200


def test_clicks_are_answered_beside_an_expensive_request(url, large_photo, photos):
    """The Decoder works in pieces: whoever asks for 300 masks of 2.9 megapixels stops nobody."""
    image_id = call(url, "POST", "/v1/images", data=large_photo).json()["image_id"]
    images = [
        call(url, "POST", "/v1/images", data=path.read_bytes()).json()["image_id"]
        for path in sorted((photos / "images").iterdir())[:6]
    ]  # on both Decoders
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        expensive = pool.submit(predict, url, image_id=image_id, prompts=[point()] * 100)
        time.sleep(0.5)
        clicks = [pool.submit(predict, url, image_id=i, prompts=[point()]) for i in images]
        for click in clicks:
            assert click.result().status_code == 200
        assert not expensive.done()
        assert expensive.result().status_code == 200


def test_whoever_hangs_up_on_all_objects_holds_up_nobody(url, photo):
    """Their turns and their places are free again at once: more ask than may be in flight."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(photo)).convert("RGB").resize((1700, 1700)).save(buffer, "JPEG")
    image_id = call(url, "POST", "/v1/images", data=buffer.getvalue()).json()["image_id"]
    assert segment(url, image_id=image_id).status_code == 200  # now everything is loaded
    started = time.monotonic()
    assert segment(url, image_id=image_id).status_code == 200
    alone = time.monotonic() - started
    body = json.dumps({"image_id": image_id}).encode()
    head = f"POST /v1/segment HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    for _ in range(2):
        with contextlib.ExitStack() as stack:
            for _ in range(16):
                connection = socket.create_connection((host, int(port)), 60)
                stack.enter_context(connection)
                connection.sendall(head.encode() + body)
            time.sleep(0.3)
    started = time.monotonic()
    answer = predict(url, image_id=image_id, prompts=[point()])
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - started < 8 * alone + 1


@pytest.mark.slow
def test_the_command_listens_where_it_says_and_nowhere_else(tmp_path, photo):
    """`samray serve` as people start it: its one port, slow bodies refused, a clean end."""
    port = free_port()
    words = ["serve.timeout_seconds=3", "serve.cpus_per_replica=0.2", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *words], stdout=log, stderr=log, cwd=ROOT
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url)
        own = ray.util.get_node_ip_address()
        if not own.startswith("127."):
            with pytest.raises(requests.ConnectionError):
                requests.get(f"http://{own}:{port}/v1/healthz", timeout=60)
        with socket.create_connection(("127.0.0.1", port), 60) as slow:
            head = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
            slow.sendall(head + b"\r\nabc")
            answer = read_answer(slow)
        assert b" 408 " in answer.splitlines()[0]
        assert b'"code":"too_slow"' in answer
        answer = requests.post(f"{url}/v1/predict", json={}, timeout=60)
        refusal(answer, 422, "invalid_request")
        # What took too long holds up nobody: of those who wait for it, too, no work is done.
        image_id = requests.post(f"{url}/v1/images", data=photo, timeout=60).json()["image_id"]
        click = {"image_id": image_id, "prompts": [point()]}
        heavy = {"image_id": image_id, "prompts": [point()] * 128, "mask_format": "png"}
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            sent = [
                pool.submit(requests.post, f"{url}/v1/predict", json=heavy, timeout=90)
                for _ in range(40)
            ]
            late = [task.result() for task in sent if task.result().status_code != 200]
        assert len(late) > 10
        for answer in late:
            refusal(answer, 503, "timed_out")
        everything = {"image_id": image_id, "mask_format": "png"}
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            asked = [
                pool.submit(requests.post, f"{url}/v1/segment", json=everything, timeout=90)
                for _ in range(40)
            ]
            answers = [task.result() for task in asked]
        for answer in answers:  # by the deadline all are answered or told so
            if answer.status_code != 200:
                refusal(answer, 503, "timed_out")
        assert max(answer.elapsed.total_seconds() for answer in answers) < 30
        assert requests.post(f"{url}/v1/predict", json=click, timeout=60).status_code == 200
        few = {**heavy, "prompts": [point()] * 8}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            last = pool.submit(requests.post, f"{url}/v1/predict", json=few, timeout=90)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)  # as systemd and containers do
            assert last.result().status_code == 200
        assert process.wait(120) == 0
        text = (tmp_path / "log").read_text()
        asked = 1 + len(sent) + 1 + 1
        assert text.count('"path": "/v1/predict"') == asked  # a line each on stderr
        assert '"client": "127.0.0.1"' in text
        assert "loading the models" in text
        assert f"serving {url}/" in text
        assert "Traceback" not in text
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/v1/healthz", timeout=60)
    finally:
        process.kill()
        process.wait()


def test_strangers_are_not_served_without_a_token(monkeypatch):
    monkeypatch.delenv("SAMRAY_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="others could ask; set a token"):
        serve_here(ServeConfig(host="0.0.0.0", port=free_port()))


@pytest.mark.slow
def test_requests_made_from_the_openapi_document(url, tmp_path):
    """No status or body that the document does not promise, whatever is sent."""
    document = tmp_path / "openapi.json"
    document.write_text(call(url, "GET", "/openapi.json").text)
    # What the document cannot say, such as "a JPEG", may be refused: positive data is not judged.
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", document, "--url", url,
        "--header", f"Authorization: Bearer {TOKEN}", "--generation-deterministic",
        "--exclude-checks", "positive_data_acceptance", "--max-examples", "60", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "/nowhere"}, "does not exist"),
        ({"store": "/nowhere"}, "--store"),
        ({"store": "/nowhere", "checkpoint": "run"}, "not both"),
        ({"model": "mine"}, "--model names a model of a --store"),
        ({"token_file": "/nowhere"}, "--token-file"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(settings, message):
    with pytest.raises(Exception, match=message) as caught:
        build_app(ServeConfig(**settings))
    assert caught.value.__class__.__module__ == "samray.errors"


def test_a_short_token_or_a_missing_model(tmp_path, store):
    (tmp_path / "token").write_text("short")
    with pytest.raises(ConfigError, match="16 plain characters"):
        build_app(ServeConfig(token_file=str(tmp_path / "token")))
    with pytest.raises(ConfigError, match="no model 'fig'"):
        build_app(ServeConfig(store=str(store.folder), model="fig"))


def test_a_run_is_served_beside_its_base(url, store, tmp_path):
    from samray.serving.catalogue import read_catalogue

    run = tmp_path / "run"
    checkpoint_like_shipped(run / "checkpoints" / "epoch_0001", shift=0.01)
    checkpoint_like_shipped(run / "base")
    state = {"format": 1, "best": "checkpoints/epoch_0001", "latest": "checkpoints/epoch_0001"}
    (run / "run.json").write_text(json.dumps({**state, "epochs": []}))
    catalogue = read_catalogue(ServeConfig(checkpoint=str(run)), {})
    assert list(catalogue) == ["tuned", "base"]
    assert catalogue["tuned"].digest != catalogue["base"].digest
    shutil.rmtree(run / "base")
    assert Path(catalogue["tuned"].folder).name == "epoch_0001"
