"""The annotation of one image, whatever its format.

`labelme` and `coco` convert their formats to an `Annotation`.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from samray.errors import AnnotationError
from samray.geometry.shapes import Shape

MAX_JSON_BYTES = 256 * 2**20
MAX_COORDINATE = 1e6  # pixels; larger than any image, and safe as an int

# LabelMe's own labels: of a region in which not every object was outlined, and of no object at all.
IGNORE, BACKGROUND = "__ignore__", "_background_"
UNNAMED = "object"  # label of what a model found and cannot name


@dataclass
class Annotation:
    """What an annotation file says about one image.

    Attributes:
        image_path: where the file says its image is, with forward slashes; "" if it does not say.
        size: (H, W) of the image when it was annotated, or None.
        num_shapes: the image's shapes in the file, usable or not.
        image_data: the image's bytes in base64, if the file embeds them; not checked.
        shapes: the usable ones.
        not_instances: (field, kind) of each line, point or crowd: none is a single object.
        problems: one error for each shape that cannot be used.
        warnings: (field, what was corrected).
    """

    image_path: str
    size: tuple[int, int] | None
    num_shapes: int
    image_data: str | None = None
    shapes: list[Shape] = field(default_factory=list)
    not_instances: list[tuple[str, str]] = field(default_factory=list)
    problems: list[AnnotationError] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)


def read_json_object(raw: bytes) -> dict[str, Any]:
    """Parse an annotation file that must hold one JSON object, within limits.

    Raises:
        AnnotationError: field `file`.
    """
    if len(raw) > MAX_JSON_BYTES:
        raise AnnotationError(
            "file", f"is {len(raw) / 2**20:.0f} MiB; at most {MAX_JSON_BYTES // 2**20} are read"
        )
    try:
        document = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=each_once)
    except AnnotationError:
        raise
    except UnicodeDecodeError as exc:
        raise AnnotationError("file", f"is not UTF-8 text (byte {exc.start})") from exc
    except json.JSONDecodeError as exc:
        raise AnnotationError(
            "file", f"is not JSON: {exc.msg} at line {exc.lineno}, column {exc.colno}"
        ) from exc
    except (RecursionError, ValueError) as exc:
        raise AnnotationError(
            "file", "is JSON nested too deeply, or with a number of too many digits"
        ) from exc
    if not isinstance(document, dict):
        raise AnnotationError(
            "file", f"must hold a JSON object, not a {type(document).__name__}: no LabelMe file"
        )
    return document


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; refuse a key that it has twice, as Python keeps only the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise AnnotationError("file", f"has {twice!r:.60} twice in one object; join the two")
    return content


def whole_number(value: Any) -> int | None:
    """The whole number that a value of a JSON file stands for: 17, 17.0 or "17"; None if none.

    Pandas, MATLAB and VIA write whole numbers as floats or texts.
    """
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9]\d{0,17})(\.0+)?", value, re.ASCII):
        return int(value.partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value if is_int(value) else None


def is_int(value: Any) -> TypeGuard[int]:
    """Whether a value is an int; JSON's true is one to Python, but no number."""
    return isinstance(value, int) and not isinstance(value, bool)
