"""CVAT's serverless function: forwards clicks and boxes to a samray endpoint.

CVAT sends the whole image with each click; the endpoint receives it once and caches its embedding.
Only the standard library is used, so that nuclio's container needs nothing installed. The protocol
is that of CVAT's `cvat/apps/lambda_manager/views.py` and its interactors in `serverless/`.
"""

import base64
import binascii
import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from typing import Any

KNOWN_IMAGES = 1024
SECONDS = 25  # for all requests of a click; less than eventTimeout in function.yaml


class ClickError(Exception):
    """An error message for the annotator, and the HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def init_context(context: Any) -> None:
    """Called by nuclio once for each worker."""
    context.user_data.sizes = OrderedDict()  # image id -> (W, H)


def handler(context: Any, event: Any) -> Any:
    """Called by nuclio with each click; answers `{"mask": H rows of W numbers, 0 or 255}`."""
    try:
        body = event.body if isinstance(event.body, dict) else json.loads(event.body)
        answer, status = {"mask": segment(body, context.user_data.sizes)}, 200
    except ClickError as exc:
        answer, status = {"message": f"samray: {exc}"}, exc.status
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        answer, status = {"message": f"samray: not what CVAT sends ({exc!r})"}, 400
    return context.Response(
        body=json.dumps(answer), headers={}, content_type="application/json", status_code=status
    )


def segment(body: dict[str, Any], sizes: OrderedDict[str, tuple[int, int]]) -> list[list[int]]:
    """Ask the endpoint for the mask.

    Args:
        body: `image` (base64), `pos_points` and `neg_points` [[x, y], ...], `obj_bbox`
            [[x1, y1], [x2, y2]], empty or absent; pixels.
        sizes: of images that the endpoint was given; kept up to date.
    """
    until = time.monotonic() + SECONDS
    try:
        image = base64.b64decode(body["image"], validate=True)
    except binascii.Error as exc:
        raise ClickError(400, "the image is not base64") from exc
    image_id = f"sha256:{hashlib.sha256(image).hexdigest()}"
    known = image_id in sizes
    if not known:
        upload(image, image_id, sizes, until)
    prompt = read_prompt(body, sizes[image_id])
    try:
        rle = predict(image_id, prompt, until)
    except ClickError as exc:
        if exc.code != "unknown_image" or not known:
            raise
        upload(image, image_id, sizes, until)  # the endpoint was restarted, or its cache was full
        rle = predict(image_id, prompt, until)
    return decode_rle(rle["counts"], *rle["size"])


def upload(
    image: bytes, image_id: str, sizes: OrderedDict[str, tuple[int, int]], until: float
) -> None:
    """Upload an image, and keep its size."""
    answer = call("/v1/images", image, "application/octet-stream", until)
    sizes[image_id] = (answer["width"], answer["height"])
    while len(sizes) > KNOWN_IMAGES:
        sizes.popitem(last=False)


def predict(image_id: str, prompt: dict[str, Any], until: float) -> dict[str, Any]:
    """Return the best mask as COCO's RLE."""
    body = {"image_id": image_id, "prompts": [prompt], "mask_format": "rle"}
    answer = call("/v1/predict", json.dumps(body).encode(), "application/json", until)
    rle: dict[str, Any] = answer["results"][0]["masks"][0]["rle"]
    return rle


def read_prompt(body: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """Turn CVAT's points and box into a prompt of API v1; points on the border are moved inside."""
    width, height = size
    positive, negative = body.get("pos_points") or [], body.get("neg_points") or []
    points = [
        [min(max(x, 0), math.nextafter(width, 0)), min(max(y, 0), math.nextafter(height, 0))]
        for x, y in [*positive, *negative]
    ]
    prompt: dict[str, Any] = {}
    if points:
        labels = [1] * len(positive) + [0] * len(negative)
        prompt = {"point_coords": points, "point_labels": labels}
    corners = body.get("obj_bbox") or []
    if corners:
        (x1, y1), (x2, y2) = corners
        xs, ys = sorted((x1, x2)), sorted((y1, y2))
        prompt["box"] = [max(xs[0], 0), max(ys[0], 0), min(xs[1], width), min(ys[1], height)]
    if not positive and not corners:
        raise ClickError(422, "click inside the object, or draw a box around it")
    return prompt


def decode_rle(counts: str, height: int, width: int) -> list[list[int]]:
    """Return COCO's compressed RLE as H rows of W numbers, 0 or 255.

    A count is written in digits of 5 bits, the lowest first, as characters from "0" on; bit 5 says
    that more follow, and from the third count on the difference to the last but one is written:
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        digit = ord(character) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value = shift = 0
    columns = b"".join(bytes([255 * (i % 2)]) * length for i, length in enumerate(lengths))
    return [list(columns[row::height]) for row in range(height)]


def call(path: str, content: bytes, content_type: str, until: float) -> dict[str, Any]:
    """POST to the endpoint at $SAMRAY_URL with the token $SAMRAY_TOKEN.

    Args:
        until: when CVAT must have an answer, on the clock of `time.monotonic`.
    """
    url = os.environ.get("SAMRAY_URL", "").rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ClickError(500, "set SAMRAY_URL in function.yaml to the endpoint's address")
    headers = {"Content-Type": content_type}
    if token := os.environ.get("SAMRAY_TOKEN", ""):
        headers["Authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url + path, content, headers, method="POST")
    try:
        seconds = until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as exc:
        raise _refusal(exc, url) from exc
    except OSError as exc:
        raise ClickError(502, f"{url} does not answer; is `samray serve` running there?") from exc


def _refusal(exc: urllib.error.HTTPError, url: str) -> ClickError:
    try:
        error = json.load(exc)["error"]
        return ClickError(exc.code, error["message"], error["code"])
    except (ValueError, KeyError, TypeError):
        return ClickError(502, f"{url} is no samray endpoint (status {exc.code})")
