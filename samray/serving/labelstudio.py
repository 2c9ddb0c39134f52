"""Label Studio's ML backend protocol: labelling config, regions, predictions.

Label Studio sends a task, the XML of its labelling interface and, after a click with a smart tool,
the regions drawn so far. The answer is the mask in the form of the interface's output tag. Source:
https://labelstud.io/guide/ml_create and Label Studio's `label_studio/ml/api_connector.py`.
Coordinates are percentages (0..100) of the image as shown.
"""

import math
import re
import secrets
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from samray.geometry.masks import decode_rle
from samray.prediction.requests import (
    MAX_POINTS,
    ApiError,
    PredictRequest,
    PromptRequest,
    SegmentRequest,
    check_body,
    mistakes_error,
)

PREFIX = "/compat/labelstudio"
MAX_CONFIG = 1_000_000  # characters of a labelling config
MAX_NAME = 200  # characters of the entry of a task's data that holds the address
MAX_TASKS, MAX_REGIONS = 1000, 1000  # of a request
MAX_JSON_BYTES = 8 * 2**20  # of a request without its pictures; it holds a task's annotations
MAX_ANSWER_BYTES = 64 * 2**20  # of all predictions of a request
NOTHING_FOUND = "no object was found in this picture"
NO_TIME = "there was no time left for this task; ask for fewer at once"
NO_ROOM = "there was no room left in the answer for this task; ask for fewer at once"
NO_OBJECT = "click inside the object or draw a box around it; strokes are not answered"

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


def read_prediction_request(content: bytes) -> PredictionRequest:
    """Parse and check a request.

    Pictures in `data:` addresses are cut out before parsing. What is left may have MAX_JSON_BYTES,
    and its lists are counted before their items are checked: pydantic reports every wrong item, and
    a million of them took 18 s and 1.6 GB.

    Raises:
        ApiError: too_large, bad_request or invalid_request.
    """
    pictures: dict[str, str] = {}  # what stands for a picture -> its address
    mark = secrets.token_hex(8)

    def cut(match: re.Match[bytes]) -> bytes:
        name = f"data:{mark}{len(pictures)}"
        pictures[name] = match[1].decode("ascii")
        return f'"{name}"'.encode()

    small = _PICTURE.sub(cut, content)
    if len(small) > MAX_JSON_BYTES:
        message = f"the JSON beside the pictures has {len(small)} bytes; at most {MAX_JSON_BYTES}"
        raise ApiError("too_large", message)
    try:
        document = from_json(small)
    except ValueError as exc:
        raise ApiError("bad_request", "the body is not JSON") from exc
    if isinstance(document, dict):
        _require_few(document.get("tasks"), "tasks", MAX_TASKS)
        params = document.get("params")
        context = params.get("context") if isinstance(params, dict) else None
        result = context.get("result") if isinstance(context, dict) else None
        _require_few(result, "params.context.result", MAX_REGIONS)
    asked = check_body(PredictionRequest, document)
    for task in asked.tasks:
        task.data = {
            key: pictures.get(value, value) if isinstance(value, str) else value
            for key, value in task.data.items()
        }
    return asked


_PICTURE = re.compile(rb'"(data:[\x20!\x23-\x5b\x5d-\x7e]{1000,})"')


def _require_few(items: Any, field: str, most: int) -> None:
    if isinstance(items, list) and len(items) > most:
        raise _refusal(field, f"has {len(items)} items; at most {most} are answered at once")


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
            if tag.tag != wanted or not name or image is None or image not in images:
                continue
            if to_name not in (None, image):
                continue
            value = images[image]
            if not value.startswith("$") or not 1 < len(value) <= 1 + MAX_NAME:
                message = (
                    f'the Image {image[:100]!r} needs value="$name" with a name of at most '
                    f"{MAX_NAME} characters, not {value[:100]!r}"
                )
                raise _refusal("label_config", message)
            labels = [label.get("alias") or label.get("value") for label in tag.iter("Label")]
            return Output(name, image, value[1:], kind, tuple(label for label in labels if label))
    where = f" for the Image {to_name[:100]!r}" if to_name is not None else " for an Image"
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


def own_label(label: str, output: Output) -> str | None:
    """Return the label that a model gives if the output tag has it; else that tag's first one."""
    if not output.labels or label in output.labels:
        return label
    return output.labels[0]


def request_for(prompt: PromptRequest | None, output: Output) -> PredictRequest | SegmentRequest:
    """Return the request whose answer `build_prediction` can convert.

    Args:
        prompt: None: all objects.
    """
    mask_format: Any = "rle" if output.kind.startswith("brush") else "polygon"
    if prompt is None:
        return SegmentRequest(mask_format=mask_format)
    return PredictRequest(prompts=[prompt], mask_format=mask_format)


def build_prediction(
    masks: list[tuple[dict[str, Any], str | None]],
    size: tuple[int, int],
    output: Output,
    version: str,
) -> dict[str, Any] | None:
    """Return a prediction in Label Studio's format, a region each; None if all masks are empty.

    Args:
        masks: a `MaskAnswer` or `ObjectAnswer` in the format of `request_for`, and its label.
        size: (H, W).
    """
    made = [_region_of(mask, size, output, label) for mask, label in masks]
    regions = [region for region in made if region is not None]
    if not regions:
        return None
    score = sum(region["score"] for region in regions) / len(regions)
    return {"result": regions, "score": score, "model_version": version}


def _region_of(
    mask: dict[str, Any], size: tuple[int, int], output: Output, label: str | None
) -> dict[str, Any] | None:
    """Return a mask as a region; None if it is empty. A polygon is the largest part of the mask."""
    height, width = size
    value: dict[str, Any] | None = None
    if mask["format"] == "rle":
        pixels = decode_rle(mask["rle"]["counts"].encode(), size)
        if pixels.any():
            value = {"format": "rle", "rle": encode_brush(pixels)}
    else:
        # A region has one outline without holes; one mask must not become several objects.
        outer = [np.array(part["points"]) for part in mask["polygons"] if not part["hole"]]
        outer = [outline for outline in outer if len(outline) >= 3]
        if outer:
            largest = max(outer, key=lambda outline: cv2.contourArea(outline.astype(np.float32)))
            # Outlines run through pixel centres.
            points = (largest + 0.5) * [100 / width, 100 / height]
            value = {"points": points.round(4).tolist(), "closed": True}
    if value is None:
        return None
    labels = {output.kind: [label]} if output.kind.endswith("labels") and label else {}
    return {
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


def no_prediction(version: str, drawn: bool) -> dict[str, Any]:
    """Return the answer without a mask.

    Args:
        drawn: for a click or a box; otherwise for a whole task. Label Studio stores each answer
            for a whole task that has a `result`, and shows it beside the annotations.
    """
    return {"model_version": version, **({"result": [], "score": 0.0} if drawn else {})}


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
