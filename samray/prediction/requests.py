"""Requests, answers and errors of the HTTP API v1, validated field by field.

Coordinates are (x, y) in pixels of the image as shown, with its EXIF orientation applied.
"""

import base64
import binascii
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, from_json

IMAGE_ID = r"^sha256:[0-9a-f]{64}$"
IMAGE_NAME = r"^[^/\\\x00-\x1f]+$"  # a file's own name, no path
_SAID_OF = {  # what a mistake says instead of the expression
    IMAGE_ID: "should be an image_id as POST /v1/images answers",
    IMAGE_NAME: "should be a file name without / or \\, and without control characters",
}
MAX_PROMPTS, MAX_POINTS = 256, 64  # a request, and each of its prompts
MAX_JSON_BYTES = 2**20  # of a request without its image
MAX_KEYS = 50  # of an object in a request

# code -> (status, whether the same request may succeed later)
CODES = {
    "bad_request": (400, False),
    "invalid_image": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "unknown_image": (404, False),
    "unknown_model": (404, False),
    "unknown_mask_token": (404, False),
    "method_not_allowed": (405, False),
    "too_slow": (408, True),
    "too_large": (413, False),
    "unsupported_format": (415, False),
    "invalid_request": (422, False),
    "too_busy": (429, True),
    "internal": (500, True),
    "bad_gateway": (502, True),
    "not_ready": (503, True),
    "unusable_model": (503, False),
    "timed_out": (503, True),
}


class ApiError(Exception):
    """An error for the client; nothing but its code, message and field leaves the server."""

    def __init__(self, code: str, message: str, field: str | None = None) -> None:
        super().__init__(code, message, field)
        self.code, self.message, self.field = code, message, field

    @property
    def status(self) -> int:
        """The HTTP status."""
        return CODES[self.code][0]

    def body(self, request_id: str) -> dict[str, Any]:
        """Return the body of the response; every error has this form."""
        return {
            "error": {
                "code": self.code,
                "message": self.message,
                "field": self.field,
                "request_id": request_id,
                "retryable": CODES[self.code][1],
            }
        }


def _decoded(text: str) -> str:
    """Check base64 text, and remove the line breaks that many tools insert."""
    text = "".join(text.split())
    try:
        base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        hint = "; leave out what stands before the comma" if text.startswith("data:") else ""
        raise ValueError(f"is not base64{hint}") from exc
    return text


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ImageContent(_Strict):
    """An image's file, in the request."""

    base64: Annotated[str, Field(min_length=1), AfterValidator(_decoded)]
    """A whole JPEG, PNG, BMP, TIFF or WebP file."""


Content = TypeVar("Content", bound=BaseModel)
Coordinate = Annotated[float, Field(ge=-1e6, le=1e6)]


class PromptRequest(_Strict):
    """The prompt for one object: points, a box, or both; with a mask_token, a correction."""

    id: Annotated[str, StringConstraints(max_length=200)] | None = None
    """Returned with the answer."""
    point_coords: Annotated[list[tuple[Coordinate, Coordinate]], Field(max_length=MAX_POINTS)] = []
    """(x, y) in pixels of the image as shown."""
    point_labels: Annotated[list[Literal[0, 1]], Field(max_length=MAX_POINTS)] | None = None
    """1 foreground, 0 background; without it, every point is a foreground point."""
    box: tuple[Coordinate, Coordinate, Coordinate, Coordinate] | None = None
    """x1, y1, x2, y2."""
    mask_token: Annotated[str, StringConstraints(max_length=100)] | None = None
    """From an earlier answer on this image by this model, which the new points correct."""

    @model_validator(mode="after")
    def _point_at_something(self) -> "PromptRequest":
        if not self.point_coords and self.box is None:
            raise ValueError("needs point_coords or a box")
        if self.point_labels is not None and len(self.point_labels) != len(self.point_coords):
            raise ValueError(
                f"has {len(self.point_coords)} point_coords and {len(self.point_labels)} "
                "point_labels; it needs a label for each point"
            )
        # A correction may be background points alone: the mask says which object is meant.
        foreground = self.point_labels is None or 1 in self.point_labels
        if not foreground and self.box is None and self.mask_token is None:
            raise ValueError("needs a foreground point (1 in point_labels) or a box")
        if self.box is not None and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError("box must be x1, y1, x2, y2 with x1 < x2 and y1 < y2")
        return self

    def require_inside(self, size: tuple[int, int], field: str) -> list[tuple[str, str]]:
        """Return (field, message) for each coordinate outside an image of (H, W)."""
        height, width = size
        mistakes = []
        for number, (x, y) in enumerate(self.point_coords):
            if not (0 <= x < width and 0 <= y < height):
                where = f"{field}.point_coords[{number}]"
                mistakes.append((where, f"[{x:g}, {y:g}] lies outside {width} x {height} pixels"))
        if self.box is not None:
            x1, y1, x2, y2 = self.box
            if not (x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height):
                mistakes.append((f"{field}.box", f"lies outside {width} x {height} pixels"))
        return mistakes


class ImageRequest(_Strict):
    """What a request says about the image, the model and the form of the masks."""

    image: ImageContent | None = None
    """The image file; alternatives: image_id, or a file named `image` in multipart."""
    image_id: Annotated[str, StringConstraints(pattern=IMAGE_ID)] | None = None
    """The id of an image that was uploaded before."""
    model: Annotated[str, StringConstraints(max_length=64)] | None = None
    """A name of `GET /v1/models`; unset: the first."""
    mask_format: Literal["polygon", "rle", "png", "labelme", "none"] = "polygon"
    """polygon: outlines; rle: COCO's compressed counts; png: 1 bit per pixel, base64; labelme:
    shapes, and a whole file of the best masks; none: only scores, areas and boxes."""
    image_name: Annotated[str, StringConstraints(pattern=IMAGE_NAME, max_length=200)] | None = None
    """LabelMe's `imagePath`; unset: the name of the file sent in multipart, else the digest."""
    polygon_tolerance: Annotated[float, Field(ge=0, le=50)] = 0.5
    """Maximum distance of a polygon from the mask's outline, in pixels."""


class PredictRequest(ImageRequest):
    """`POST /v1/predict`."""

    prompts: Annotated[list[PromptRequest], Field(min_length=1, max_length=MAX_PROMPTS)]
    """One prompt per object."""
    multimask_output: bool | None = None
    """Three masks per prompt or one; unset: three for a single point without a box."""
    label: Annotated[str, StringConstraints(min_length=1, max_length=200)] = "object"
    """Label of the LabelMe shapes."""
    min_area: Annotated[int, Field(ge=0)] = 0
    """Parts of a mask smaller than this many pixels are removed; the largest is always kept."""

    def masks_of(self, prompt: PromptRequest) -> int:
        """Return how many masks a prompt of this request gets."""
        multimask = self.multimask_output
        if multimask is None:
            one_point = len(prompt.point_coords) == 1 and prompt.box is None
            multimask = one_point and prompt.mask_token is None
        return 3 if multimask else 1


class SegmentRequest(ImageRequest):
    """`POST /v1/segment`."""

    min_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Objects with a lower score are left out."""
    label: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Label of all objects; unset: that which the model gives each, else `object`."""


class ModelAnswer(BaseModel):
    """Which model answered."""

    name: str
    version: str
    checkpoint_digest: str


class MaskAnswer(BaseModel):
    """One mask; `mask_format` decides which of the last four fields are set."""

    score: float
    area: int
    bbox: tuple[float, float, float, float]
    format: str
    mask_token: str
    polygons: list[dict[str, Any]] | None = None
    rle: dict[str, Any] | None = None
    png: str | None = None
    shapes: list[dict[str, Any]] | None = None


class PromptAnswer(BaseModel):
    """The masks of one prompt, the best first."""

    id: str | None
    masks: list[MaskAnswer]


class PredictAnswer(BaseModel):
    """`POST /v1/predict`."""

    image_id: str
    width: int
    height: int
    model: ModelAnswer
    results: list[PromptAnswer]
    labelme: dict[str, Any] | None = None
    cache: Literal["hit", "miss"]
    timing_ms: dict[str, float]
    request_id: str


class ObjectAnswer(BaseModel):
    """One object; `mask_format` decides which of the last four fields are set."""

    label: str
    score: float
    area: int
    bbox: tuple[float, float, float, float]
    format: str
    polygons: list[dict[str, Any]] | None = None
    rle: dict[str, Any] | None = None
    png: str | None = None
    shapes: list[dict[str, Any]] | None = None


class SegmentAnswer(BaseModel):
    """`POST /v1/segment`: the surest object first."""

    image_id: str
    width: int
    height: int
    model: ModelAnswer
    found_by: Literal["instances", "grid"]
    """The model's instance decoder, or SAM's grid of points, which knows no labels."""
    objects: list[ObjectAnswer]
    left_out: int
    """Objects of a lower score, for which time or room in the answer did not suffice."""
    labelme: dict[str, Any] | None = None
    cache: Literal["hit", "miss"]
    timing_ms: dict[str, float]
    request_id: str


class ImageAnswer(BaseModel):
    """`POST /v1/images`."""

    image_id: str
    width: int
    height: int
    cache: Literal["hit", "miss"]
    timing_ms: dict[str, float]
    request_id: str


class ErrorContent(BaseModel):
    """What went wrong; the message lists all mistakes, `field` names the first one's place."""

    code: str
    message: str
    field: str | None
    request_id: str
    retryable: bool


class ErrorAnswer(BaseModel):
    """The form of every error."""

    error: ErrorContent


def require_json(content_type: str) -> None:
    """Refuse a body that is not declared as JSON: forms and text come from any web page.

    Raises:
        ApiError: unsupported_format.
    """
    if content_type != "application/json":
        message = f"Content-Type must be application/json, not {content_type[:60]!r}"
        raise ApiError("unsupported_format", message)


Asked = TypeVar("Asked", bound=ImageRequest)


def read_request(content: bytes | str, model: type[Asked]) -> Asked:
    """Parse and check a request about an image; see `read_body`.

    The image's base64 is cut out before parsing. What is left may have MAX_JSON_BYTES, and no
    object of it more than MAX_KEYS keys: pydantic reports every unknown key, and five million of
    them took 78 s and 1.5 GB.

    Raises:
        ApiError: too_large, bad_request or invalid_request.
    """
    content = content.encode() if isinstance(content, str) else content
    small, text = _without_image(content)
    if len(small) > MAX_JSON_BYTES:
        message = f"the JSON beside the image has {len(small)} bytes; at most {MAX_JSON_BYTES}"
        raise ApiError("too_large", message)
    _require_few_keys(small)
    asked = read_body(model, small)
    if text is None or asked.image is None:
        return asked
    whole = read_body(ImageContent, b'{"base64":"' + text + b'"}', "image")
    return asked.model_copy(update={"image": whole})


_BASE64 = re.compile(rb'"base64"\s*:\s*"')


def _without_image(content: bytes) -> tuple[bytes, bytes | None]:
    """Cut the image's base64 out of a large body: the body with a few bytes instead, the base64."""
    match = _BASE64.search(content) if len(content) > MAX_JSON_BYTES else None
    end = content.find(b'"', match.end()) if match else -1
    if match is None or end < 0:
        return content, None
    return content[: match.end()] + b"AAAA" + content[end:], content[match.end() : end]


def _require_few_keys(content: bytes) -> None:
    try:
        document = from_json(content)
    except ValueError:
        return  # reported by the model's own parser
    if not isinstance(document, dict):
        return
    prompts = document.get("prompts")
    prompts = prompts[:MAX_PROMPTS] if isinstance(prompts, list) else []
    for place in (document, document.get("image"), *prompts):
        if isinstance(place, dict) and len(place) > MAX_KEYS:
            names = ", ".join(str(name)[:40] for name in list(place)[:5])
            message = f"an object with {len(place)} keys ({names}, ...); at most {MAX_KEYS}"
            raise ApiError("invalid_request", message)


def read_body(model: type[Content], content: bytes | str, field: str = "") -> Content:
    """Parse and check a body.

    Args:
        field: what the body is a part of, for the places in messages.

    Raises:
        ApiError: bad_request if it is not JSON, invalid_request with every mistake otherwise.
    """
    try:
        return model.model_validate_json(content)
    except ValidationError as exc:
        if exc.errors()[0]["type"] == "json_invalid":
            raise ApiError("bad_request", "the body is not JSON") from exc
        raise mistakes_error(_mistakes_of(exc, field)) from exc


def check_body(model: type[Content], document: Any) -> Content:
    """Check a body that has been parsed.

    Raises:
        ApiError: invalid_request with every mistake.
    """
    try:
        return model.model_validate(document)
    except ValidationError as exc:
        raise mistakes_error(_mistakes_of(exc)) from exc


def read_prompts(content: bytes | str) -> list[PromptRequest]:
    """Parse and check the JSON list of one image's prompts, by the rules of a request.

    Raises:
        ApiError: invalid_request with every mistake, the first one's place in `field`.
    """
    try:
        return _PROMPTS.validate_json(content)
    except ValidationError as exc:
        mistakes = [(f"prompts{where}", text) for where, text in _mistakes_of(exc)]
        raise mistakes_error(mistakes) from exc


_PROMPTS = TypeAdapter(Annotated[list[PromptRequest], Field(min_length=1)])


def mistakes_error(mistakes: list[tuple[str, str]]) -> ApiError:
    """Return one invalid_request that lists all (field, message)."""
    text = "; ".join(f"{field or 'request'}: {message}" for field, message in mistakes[:20])
    if len(mistakes) > 20:
        text += f"; and {len(mistakes) - 20} more"
    return ApiError("invalid_request", text, mistakes[0][0] or None)


def _mistakes_of(exc: ValidationError, field: str = "") -> list[tuple[str, str]]:
    """(field, message) of each."""
    start = (field,) if field else ()
    return [
        (_path((*start, *error["loc"])), _plain(error))
        for error in exc.errors(include_url=False, include_input=False)
    ]


def _path(location: tuple[int | str, ...]) -> str:
    """`prompts[0].box` for ("prompts", 0, "box")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _plain(error: ErrorDetails) -> str:
    """What an error of pydantic says, in the words of the API."""
    if error["type"] == "string_pattern_mismatch":
        return _SAID_OF[error["ctx"]["pattern"]]
    message = error["msg"].removeprefix("Value error, ")
    return message[:1].lower() + message[1:]
