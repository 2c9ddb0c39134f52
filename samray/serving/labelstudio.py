"""Label Studio's ML backend protocol: labelling config, regions, predictions, and its images.

Label Studio sends a task, the XML of its labelling interface and, after a click with a smart tool,
the regions drawn so far. The answer is the mask in the form of the interface's output tag. Source:
https://labelstud.io/guide/ml_create and Label Studio's `label_studio/ml/api_connector.py`.
Coordinates are percentages (0..100) of the image as shown.
"""

import base64
import binascii
import contextlib
import http.client
import math
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from xml.etree import ElementTree

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.geometry.masks import decode_rle
from samray.prediction.requests import (
    MAX_POINTS,
    ApiError,
    PredictRequest,
    PromptRequest,
    mistakes_error,
)

PREFIX = "/compat/labelstudio"
KEY_VARIABLE = "LABEL_STUDIO_API_KEY"
MAX_CONFIG = 1_000_000  # characters of a labelling config
MAX_ADDRESS = 8000  # characters
MAX_REDIRECTS = 3
CHUNK = 2**16  # bytes

# Output tags in order of preference: a brush holds the exact mask, a polygon its outline.
OUTPUTS = {
    "BrushLabels": "brushlabels",
    "Brush": "brush",
    "PolygonLabels": "polygonlabels",
    "Polygon": "polygon",
}
KEYPOINTS = ("keypointlabels", "keypoint")
RECTANGLES = ("rectanglelabels", "rectangle")


class _Sent(BaseModel):
    """Part of a request; unknown fields are ignored, because they differ between versions."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Region(_Sent):
    """A region drawn with a smart tool."""

    type: str
    value: dict[str, Any] = {}
    to_name: str | None = None
    is_positive: bool | None = None
    image_rotation: float | None = 0


class Context(_Sent):
    """The regions of one click or drag, earlier ones of the same object included."""

    result: list[Region] | None = None


class Params(_Sent):
    """The parameters; only the context is used."""

    context: Context | None = None


class Task(_Sent):
    """One task; `data` holds the image's URL under the name that the config defines."""

    data: dict[str, Any] = {}


class PredictionRequest(_Sent):
    """`POST /predict`."""

    tasks: list[Task] = Field(min_length=1)
    label_config: str = Field(max_length=MAX_CONFIG)
    params: Params | None = None

    def regions(self) -> list[Region]:
        """Return the regions drawn; none when Label Studio asks for predictions of a whole task."""
        context = self.params.context if self.params is not None else None
        return (context.result or []) if context is not None else []


@dataclass(frozen=True)
class Output:
    """The tag of the labelling interface that an answer is for.

    Attributes:
        from_name: name of the output tag.
        to_name: name of the Image tag.
        data_key: the entry of a task's data that holds the image's URL.
        kind: brushlabels, brush, polygonlabels or polygon.
        labels: the tag's labels; empty if it has none, or if each task brings its own.
    """

    from_name: str
    to_name: str
    data_key: str
    kind: str
    labels: tuple[str, ...]


def read_output(label_config: str, to_name: str | None = None) -> Output:
    """Find the output tag for masks in the XML of a labelling interface.

    Args:
        to_name: the Image tag that was drawn on; None: the first one with an output tag.

    Raises:
        ApiError: invalid_request, field `label_config`; it is not plain XML, or has no such tag.
    """
    # Entities can only be declared in a DOCTYPE; without one there is nothing to expand.
    if "<!DOCTYPE" in label_config or "<!ENTITY" in label_config:
        raise _refusal("label_config", "must not hold a DOCTYPE or an ENTITY; take it out")
    try:
        root = ElementTree.fromstring(label_config)
    except (ElementTree.ParseError, ValueError) as exc:
        raise _refusal("label_config", f"is not XML ({' '.join(str(exc).split())})") from exc
    tags = list(root.iter())
    images = {
        tag.get("name"): tag.get("value", "") for tag in tags if tag.tag == "Image"
    }  # name -> "$image"
    for wanted, kind in OUTPUTS.items():
        for tag in tags:
            name, image = tag.get("name"), tag.get("toName")
            if tag.tag != wanted or not name or image not in images:
                continue
            if to_name not in (None, image):
                continue
            value = images[image]
            if not value.startswith("$") or len(value) < 2:
                raise _refusal(
                    "label_config", f'the Image {image!r} needs value="$name", not {value!r}'
                )
            labels = [label.get("alias") or label.get("value") for label in tag.iter("Label")]
            assert image is not None
            return Output(name, image, value[1:], kind, tuple(label for label in labels if label))
    where = f" for the Image {to_name!r}" if to_name is not None else " for an Image"
    raise _refusal("label_config", f"needs a {', '.join(list(OUTPUTS)[:3])} or Polygon tag{where}")


def prompt_of_regions(
    regions: list[Region], size: tuple[int, int], to_name: str
) -> PromptRequest | None:
    """Turn drawn regions into one prompt; None if they contain no foreground point and no box.

    All points and the last rectangle are used. Label Studio allows points on the image's border and
    slightly beyond it; they are moved inside.

    Args:
        size: (H, W) of the image as shown.
        to_name: the Image tag; regions of other tags are ignored.

    Raises:
        ApiError: invalid_request, naming the region's field.
    """
    height, width = size
    points: list[tuple[float, float]] = []
    labels: list[Any] = []
    box: tuple[float, float, float, float] | None = None
    for number, region in enumerate(regions):
        field = f"params.context.result[{number}]"
        if region.to_name not in (None, to_name) or region.type not in KEYPOINTS + RECTANGLES:
            continue
        if region.image_rotation:
            raise _refusal(f"{field}.image_rotation", "turn the picture upright, then draw")
        x = _percent(region, "x", field) * width / 100
        y = _percent(region, "y", field) * height / 100
        if region.type in KEYPOINTS:
            points.append((_inside(x, width), _inside(y, height)))
            labels.append(0 if region.is_positive is False else 1)
        else:
            wide = _percent(region, "width", field) * width / 100
            high = _percent(region, "height", field) * height / 100
            angle = math.radians(_percent(region, "rotation", field, 0.0))
            box = _upright(x, y, wide, high, angle, size)
            if not (box[0] < box[2] and box[1] < box[3]):
                raise _refusal(f"{field}.value", "the rectangle holds nothing of the picture")
    if len(points) > MAX_POINTS:
        message = f"has {len(points)} points; at most {MAX_POINTS} can be answered"
        raise _refusal("params.context.result", message)
    if box is None and 1 not in labels:
        return None
    return PromptRequest(point_coords=points, point_labels=labels or None, box=box)


def choose_label(regions: list[Region], output: Output) -> str | None:
    """Return the drawn region's label if the output tag has it; else that tag's first label."""
    drawn = [
        label
        for region in regions
        if isinstance(labels := region.value.get(region.type, region.value.get("labels")), list)
        for label in labels
        if isinstance(label, str)
    ]
    for label in drawn:
        if not output.labels or label in output.labels:
            return label
    return output.labels[0] if output.labels else None


def request_for(prompt: PromptRequest, output: Output) -> PredictRequest:
    """Return the request whose answer `build_prediction` can convert."""
    mask_format: Any = "rle" if output.kind.startswith("brush") else "polygon"
    return PredictRequest(prompts=[prompt], mask_format=mask_format)


def build_prediction(
    mask: dict[str, Any], size: tuple[int, int], output: Output, label: str | None, version: str
) -> dict[str, Any]:
    """Return a prediction in Label Studio's format.

    Args:
        mask: a `MaskAnswer` in the format of `request_for`.
        size: (H, W).
    """
    height, width = size
    values: list[dict[str, Any]] = []
    if mask["format"] == "rle":
        pixels = decode_rle(mask["rle"]["counts"].encode(), size)
        if pixels.any():
            values.append({"format": "rle", "rle": encode_brush(pixels)})
    else:
        scale = np.array([100 / width, 100 / height])
        for part in mask["polygons"]:
            # Outlines run through pixel centres. Label Studio's polygons have no holes.
            if not part["hole"] and len(part["points"]) >= 3:
                points = (np.array(part["points"]) + 0.5) * scale
                values.append({"points": points.round(4).tolist(), "closed": True})
    labels = {output.kind: [label]} if output.kind.endswith("labels") and label else {}
    regions = [
        {
            "id": secrets.token_hex(5),
            "type": output.kind,
            "from_name": output.from_name,
            "to_name": output.to_name,
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": mask["score"],
            "value": {**value, **labels},
        }
        for value in values
    ]
    return {"result": regions, "score": mask["score"], "model_version": version}


def encode_brush(mask: np.ndarray) -> list[int]:
    """Return a mask as Label Studio's brush RLE: the bytes of a bit-packed RGBA image.

    The header: the number of values (32 bits), the bits per value minus one (5 bits), and four run
    length sizes in bits minus one (4 bits each). Each run: a 1 bit, the index of its length size
    (2 bits), its length minus one, its value. Literals, which begin with 0, are not used.
    From the decoder that Label Studio uses,
    https://github.com/thi-ng/umbrella/blob/develop/packages/rle-pack/src/index.ts

    Args:
        mask: H x W bool.

    Returns:
        Bytes as numbers; all four channels are 255 inside and 0 outside.
    """
    flat = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = 4 * np.diff(np.append(starts, flat.size))  # four channels a pixel
    longest = 2**16
    pieces = -(-lengths // longest)  # a run longer than 16 bits allow is split
    values = np.repeat(np.where(flat[starts], 255, 0), pieces)
    lasts = np.cumsum(pieces) - 1
    runs = np.full(len(values), longest)
    runs[lasts] = lengths - (pieces - 1) * longest
    bits_of = np.array([3, 4, 8, 16])
    which = np.searchsorted(2**bits_of, runs)
    length_bits = bits_of[which]
    codes = (((4 + which) << length_bits | (runs - 1)) << 8) | values
    widths = 1 + 2 + length_bits + 8
    places = np.arange(26, -1, -1)  # the widest run has 27 bits
    bits = ((codes[:, None] >> places) & 1)[places < widths[:, None]]
    header = f"{4 * flat.size:032b}{7:05b}" + "".join(f"{n - 1:04b}" for n in bits_of)
    stream = np.concatenate([np.array(list(header), dtype=np.uint8), bits.astype(np.uint8)])
    packed: list[int] = np.packbits(stream).tolist()
    return packed


def _percent(region: Region, key: str, field: str, default: float | None = None) -> float:
    value = region.value.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise _refusal(f"{field}.value.{key}", "needs a number, in percent of the picture")
    return float(value)


def _inside(value: float, side: int) -> float:
    return min(max(value, 0.0), math.nextafter(side, 0))


def _upright(
    x: float, y: float, wide: float, high: float, angle: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box around a rectangle rotated about its corner (x, y), clipped to the image."""
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [x, x + wide * cos, x - high * sin, x + wide * cos - high * sin]
    ys = [y, y + wide * sin, y + high * cos, y + wide * sin + high * cos]
    height, width = size
    return (
        max(min(xs), 0.0),
        max(min(ys), 0.0),
        min(max(xs), float(width)),
        min(max(ys), float(height)),
    )


def _refusal(field: str, message: str) -> ApiError:
    return mistakes_error([(field, message)])


# Pictures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PictureSource:
    """The one server that images are fetched from.

    Attributes:
        scheme, host, port: of Label Studio; no other host is ever connected to.
        base: its URL, which relative URLs are resolved against.
        key: sent as `Authorization: Token KEY`.
        max_bytes: larger images are refused while they arrive.
        timeout: seconds for an image, redirects included.
    """

    scheme: str
    host: str
    port: int
    base: str
    key: str | None
    max_bytes: int
    timeout: float

    def fetch(self, url: str, field: str) -> bytes:
        """Return an image file. Blocks: never call it on an event loop.

        Args:
            url: as in the task; relative ones refer to Label Studio.
            field: its place in the request, for messages.

        Raises:
            ApiError: the URL is of another host, Label Studio refuses it, or it is too large.
        """
        deadline = time.monotonic() + self.timeout
        base = self.base
        for hop in range(MAX_REDIRECTS + 1):
            path, base = self._own_path(url, base, field, redirected=hop > 0)
            content = self._get(path, deadline, field)
            if isinstance(content, bytes):
                return content
            url = content
        raise _refusal(field, f"Label Studio redirects more than {MAX_REDIRECTS} times")

    def _own_path(self, url: str, base: str, field: str, redirected: bool) -> tuple[str, str]:
        """Return path and query of a URL of Label Studio, and the whole URL.

        The connection always goes to the configured host, so URL parsers that disagree (on
        backslashes, user names, white space) cannot be exploited.
        """
        if len(url) > MAX_ADDRESS:
            raise _refusal(field, f"is an address of more than {MAX_ADDRESS} characters")
        try:
            whole = urljoin(base, url)
            parts = urlsplit(whole)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as exc:
            raise _refusal(field, "is no address of a picture") from exc
        place = (parts.scheme, parts.hostname, port)
        odd = "@" in parts.netloc or re.search(r"^ |[\x00-\x1f\x7f\\]| $", url)
        if odd or place != (self.scheme, self.host, self.port):
            raise _refusal(
                field,
                f"{'is redirected to ' if redirected else ''}{url[:200]!r}, which does not lie at "
                f"{self.scheme}://{self.host}:{self.port}; pictures are fetched only from the "
                "address of samray serve's --label-studio-url",
            )
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return path, whole

    def _get(self, path: str, deadline: float, field: str) -> bytes | str:
        """Return the content, or the URL of a redirect.

        http.client follows no redirects, uses no proxy, reads no .netrc and decompresses nothing.
        """
        left = max(deadline - time.monotonic(), 0.01)
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=left)
        late = threading.Event()
        watch = threading.Timer(left, _hang_up)
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "samray"}
        if self.key is not None:
            headers["Authorization"] = f"Token {self.key}"
        try:
            connection.connect()
            # A socket's own timeout restarts with each byte received; this one does not.
            watch.args = (connection.sock, late)
            watch.daemon = True
            watch.start()
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return response.headers.get("Location", "")
            if response.status != 200:
                hint = ""
                if response.status in (401, 403, 404):
                    hint = f"; check the key (--label-studio-key-file or ${KEY_VARIABLE})"
                raise _refusal(field, f"Label Studio answered {response.status} for it{hint}")
            return self._read(response, late, field)
        except (OSError, http.client.HTTPException) as exc:
            if late.is_set() or isinstance(exc, TimeoutError):
                message = f"{field}: Label Studio took more than {self.timeout:g} seconds for it"
                raise ApiError("timed_out", message, field) from exc
            reason = " ".join(str(exc).split())[:120] or type(exc).__name__
            message = f"{field}: Label Studio does not answer ({reason})"
            raise ApiError("bad_gateway", message, field) from exc
        finally:
            watch.cancel()
            connection.close()

    def _read(self, response: http.client.HTTPResponse, late: threading.Event, field: str) -> bytes:
        length = response.length  # None without Content-Length
        if (length or 0) > self.max_bytes:
            raise self._too_large(field)
        content = bytearray()
        while length is None or len(content) < length:
            chunk = response.read1(CHUNK if length is None else min(CHUNK, length - len(content)))
            if not chunk:
                break
            content += chunk
            if len(content) > self.max_bytes:
                raise self._too_large(field)
        if late.is_set():
            raise TimeoutError
        if length is not None and len(content) < length:
            raise http.client.IncompleteRead(b"", length - len(content))
        return bytes(content)

    def _too_large(self, field: str) -> ApiError:
        message = f"{field}: the picture has more than {self.max_bytes} bytes"
        return ApiError("too_large", message, field)


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        # Unlike `close` this wakes the reader. Not SSLSocket.shutdown, which would unwrap it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def read_data_url(url: str, field: str) -> bytes:
    """Return the content of a `data:` URL.

    Raises:
        ApiError: invalid_request; it is not base64.
    """
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _refusal(field, "a data: address needs ;base64, before its content")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _refusal(field, "the content of this data: address is not base64") from exc


def read_source(settings: ServeConfig) -> PictureSource | None:
    """Return the server to fetch images from; None if the settings name no Label Studio.

    Raises:
        ConfigError: the address or the key cannot be used.
    """
    option = "--label-studio-url"
    if settings.label_studio_url is None:
        if settings.label_studio_key_file is not None:
            raise ConfigError(f"--label-studio-key-file needs {option}, where the key is sent")
        return None
    url = settings.label_studio_url.rstrip("/") + "/"
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as exc:
        raise ConfigError(f"{option}: {url} is no address ({exc})") from exc
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    if port is None or parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(f"{option}: {url} must look like https://label-studio.example:8080")
    return PictureSource(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        base=url,
        key=_read_key(settings),
        max_bytes=int(settings.max_body_mb * 2**20),
        timeout=settings.label_studio_timeout_seconds,
    )


def _read_key(settings: ServeConfig) -> str | None:
    key = os.environ.get(KEY_VARIABLE)
    if settings.label_studio_key_file is not None:
        try:
            key = Path(settings.label_studio_key_file).expanduser().read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigError(f"--label-studio-key-file: cannot be read ({exc.strerror})") from exc
    key = (key or "").strip()
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError("Label Studio's key must be one word of plain characters")
    return key or None
