"""Nearly 400 hostile requests: none is an error of the endpoint's own, none takes long."""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image
from serving import TOKEN, serving

from samray.config import ServeConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 20  # the longest any of them may take
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
JSON = {**HEADERS, "Content-Type": "application/json"}

FIELDS = (
    ("prompts",), ("prompts", 0), ("prompts", 0, "point_coords"),
    ("prompts", 0, "point_coords", 0), ("prompts", 0, "point_coords", 0, 1),
    ("prompts", 0, "point_labels"), ("prompts", 0, "box"), ("prompts", 0, "mask_token"),
    ("prompts", 0, "id"), ("image_id",), ("image",), ("model",), ("label",), ("mask_format",),
    ("multimask_output",), ("min_area",), ("polygon_tolerance",), ("image_name",),
    ("__class__",),
)  # fmt: skip
VALUES = (
    None, "", "x" * 100_000, -1, 1e300, 10**400, [], [[]] * 1000, {}, {"$ref": "#"},
    "../../etc/passwd", "\u0000\u202e",
)  # fmt: skip


@pytest.fixture(scope="module")
def url(ray_cluster, tmp_path_factory):
    token_file = tmp_path_factory.mktemp("token") / "token.txt"
    token_file.write_text(TOKEN)
    settings = ServeConfig(
        token_file=str(token_file), max_body_mb=4, max_megapixels=5, cpus_per_replica=0.2
    )
    with serving(settings) as address:
        yield address


@pytest.fixture(scope="module")
def image_id(url, photos):
    raw = min((photos / "images").iterdir()).read_bytes()
    answer = requests.post(f"{url}/v1/images", data=raw, headers=HEADERS, timeout=90)
    return answer.json()["image_id"]


def valid(image_id):
    prompt = {"point_coords": [[100, 80]], "point_labels": [1]}
    return {"image_id": image_id, "prompts": [prompt]}


def changed(body, path, value):
    """A copy of the body with another value at a path."""
    body = json.loads(json.dumps(body))
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return body


def segment_bodies(image_id):
    """Bodies of POST /v1/segment."""
    good = {"image_id": image_id}
    for name, *rest in (*FIELDS, ("min_score",)):
        for value in () if rest else VALUES:
            yield json.dumps({**good, name: value})


def bodies(image_id):
    """Bodies of POST /v1/predict."""
    good = valid(image_id)
    for path in FIELDS:
        for value in VALUES:
            yield json.dumps(changed(good, path, value))
    many = {"point_coords": [[1, 1]] * 5000}
    yield json.dumps({**good, "prompts": [many]})
    yield json.dumps({**good, "prompts": good["prompts"] * 5000})
    yield json.dumps({f"key {n}": n for n in range(50_000)})
    yield json.dumps({**good, "prompts": good["prompts"] * 256, "multimask_output": True})
    yield "[" * 100_000
    yield '{"prompts": ' * 20_000
    yield '{"a": NaN, "prompts": [Infinity]}'
    yield '{"image_id": "x", "image_id": "y", "prompts": []}'
    yield b"\xff\xfe\x00{"
    yield b"\xef\xbb\xbf" + json.dumps(good).encode() + b" trailing"
    yield json.dumps({**good, "image": {"base64": "A" * 3_000_000}})
    yield json.dumps({"image": {"base64": "%%%"}, "prompts": good["prompts"]})
    yield json.dumps({"image": {"base64": "data:image/png;base64,AAAA"}, "prompts": []})
    yield b""


def png(width, height, data=b"", color=2, depth=8):
    """A PNG of any header."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def files():
    """Files that are no picture, or a dangerous one."""
    photo = io.BytesIO()
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(photo, "JPEG")
    whole = photo.getvalue()
    yield from (whole[: len(whole) // 2], whole[:20], whole + b"<?php ?>" * 1000)
    yield from (b"", b"GIF89a" + bytes(100), b"PK\x03\x04" + bytes(1000), b"%PDF-1.7", b"MZ")
    yield b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
    yield b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'
    yield png(100_000, 100_000)
    yield png(2**31 - 1, 2**31 - 1)
    yield png(0, 0)
    yield png(2000, 2000, zlib.compress(bytes(2000 * 6001), 9))
    yield png(2000, 2000, zlib.compress(bytes(100), 9))
    yield png(4, 4, b"not zlib")
    yield png(1, 30_000, zlib.compress(bytes(30_000 * 4)))
    yield png(20, 20, zlib.compress(bytes(2000)), color=7)
    for mode, kind in (
        ("F", "TIFF"),
        ("I;16", "TIFF"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("CMYK", "JPEG"),
    ):
        made = io.BytesIO()
        Image.new(mode, (40, 30)).save(made, kind)
        yield made.getvalue()
        yield made.getvalue()[:-30]
    pages = io.BytesIO()
    Image.new("L", (10, 10)).save(
        pages, "TIFF", save_all=True, append_images=[Image.new("L", (10, 10))] * 50
    )
    yield pages.getvalue()
    yield b"II*\x00\x08\x00\x00\x00\xff\xff" + bytes(500)
    yield os.urandom(50_000)


def raw_requests():
    """Requests that no HTTP client would send."""
    good = b"Host: 127.0.0.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n"
    post = b"POST /v1/predict HTTP/1.1\r\n" + good + b"Content-Type: application/json\r\n"
    for method in (b"TRACE", b"CONNECT", b"PUT", b"PATCH", b"OPTIONS", b"FOO", b"get"):
        yield method + b" /v1/predict HTTP/1.1\r\n" + good + b"\r\n"
    for path in (
        b"/../../etc/passwd", b"/v1/%2e%2e/%2e%2e/etc/passwd", b"//evil.example/v1/models",
        b"/v1/models/", b"/v1/models;x=1", b"/v1/images/sha256:../../x", b"/v1/images/%00",
        b"http://evil.example/v1/models", b"*", b"/v1/models?model=" + b"x" * 20_000,
        b"/" + b"a" * 200_000, b"/v1/readyz?model=%ff%fe", b"/metrics/..", b"/.env",
    ):  # fmt: skip
        yield b"GET " + path + b" HTTP/1.1\r\n" + good + b"\r\n"
    for lines in (
        b"Content-Length: -1\r\n\r\n", b"Content-Length: 99999999999999\r\n\r\n",
        b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}", b"Content-Length: two\r\n\r\n",
        b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
        b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        b"X-A: " + b"b" * 300_000 + b"\r\n\r\n", b"X-A: b\r\n" * 5000 + b"\r\n",
        b"X-Request-Id: " + b"r" * 30_000 + b"\r\nContent-Length: 2\r\n\r\n{}",
        b"Origin: null\r\nContent-Length: 2\r\n\r\n{}", b"X\x00Y: 1\r\n\r\n", b" folded\r\n\r\n",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n\r\n",
    ):  # fmt: skip
        yield post + lines
    yield b"GET /v1/models HTTP/0.9\r\n\r\n"
    yield b"GET /v1/models\r\n\r\n"
    yield b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)  # TLS
    yield b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"
    yield b"\r\n\r\n\r\n"


def forms():
    """Headers and bodies of multipart forms, and of Label Studio's requests."""
    start = b'--b\r\nContent-Disposition: form-data; name="image"; filename="'
    for body in (
        b"", b"--b--", start + b'../../x.png"\r\n\r\n\r\n--b--', b"--b\r\n" * 2000,
        start + b"a" * 100_000 + b'"\r\n\r\nx\r\n--b--', start + b'x"\r\n\r\nno end',
    ):  # fmt: skip
        yield "/v1/predict", "multipart/form-data; boundary=b", body
        yield "/v1/images", "multipart/form-data; boundary=b", body
    yield "/v1/images", "multipart/form-data", b"--b--"
    yield "/v1/predict", "application/x-www-form-urlencoded", b"prompts=1"
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbb">]><View>&b;</View>'
    for config in (bomb, "<View>" * 5000, "<View/>", "", "\x00", "x" * 900_000):
        for address in ("http://169.254.169.254/", "file:///etc/passwd", "data:image/png,x", 5):
            sent = {"tasks": [{"data": {"image": address}}], "label_config": config}
            sent["params"] = {"context": {"result": [{"type": "keypoint", "value": {"x": 1}}]}}
            yield "/compat/labelstudio/predict", "application/json", json.dumps(sent).encode()


def spoken(address, request):
    """Send bytes; return the status of the answer, or None if the connection was closed."""
    with socket.create_connection((address.hostname, address.port), timeout=SECONDS) as connection:
        with contextlib.suppress(OSError):  # it may close before it has read all
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            answer = connection.recv(2**16)
            return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/") else None
    return None


def memory(name):
    """Bytes of the largest process of that name."""
    sizes = [0]
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if name.encode() in (folder / "cmdline").read_bytes():
                pages = int((folder / "statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return max(sizes)


def test_hostile_requests(url, image_id):
    parts = [f"ServeReplica:samray:{name}" for name in ("Ingress", "Decoder", "Encoder")]
    before = {part: memory(part) for part in parts}
    sent = [("/v1/predict", "application/json", body) for body in bodies(image_id)]
    sent += [("/v1/segment", "application/json", body) for body in segment_bodies(image_id)]
    sent += [("/v1/images", "application/octet-stream", file) for file in files()]
    sent += [
        ("/v1/predict", "application/json", json.dumps(
            {**valid(None), "image_id": None, "image": {"base64": base64.b64encode(f).decode()}}
        )) for f in files()
    ]  # fmt: skip
    sent += list(forms())
    bad = []
    statuses: dict[int | None, int] = {}
    session = requests.Session()
    for path, kind, body in sent:
        started = time.monotonic()
        headers = {**HEADERS, "Content-Type": kind}
        answer = session.post(url + path, data=body, headers=headers, timeout=90)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        told = answer.status_code < 400 or set(answer.json()) == {"error"}
        if answer.status_code >= 500 or not told or time.monotonic() - started > SECONDS:
            bad.append((path, body[:200], answer.status_code, answer.text[:200]))
    for request in raw_requests():
        started = time.monotonic()
        status = spoken(urlsplit(url), request)
        statuses[status] = statuses.get(status, 0) + 1
        if (status or 0) >= 500 or time.monotonic() - started > SECONDS:
            bad.append((request[:200], status))
    assert sum(statuses.values()) > 380
    assert not bad, bad
    # It answers as before, and holds no more than the caches may.
    answer = requests.post(f"{url}/v1/predict", json=valid(image_id), headers=HEADERS, timeout=90)
    assert answer.status_code == 200
    grown = {part: (memory(part) - before[part]) / 2**20 for part in parts}
    assert all(megabytes < 700 for megabytes in grown.values()), grown
    print(f"{sum(statuses.values())} requests: {statuses}; grown by MiB: {grown}")
