"""The outcome of preparing one annotation or image: what was used, rejected and warned about.

`intake` makes outcomes, the JSON beside each shard stores them, and `prepare` adds them up. The
fields are the keys of that JSON, in its order: changing one takes a new `dataset.FORMAT`.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from samray.errors import AnnotationError


@dataclass(frozen=True)
class Rejection:
    """A file or shape that is not used; an item of the manifest's `rejected`.

    Attributes:
        file: path from the dataset's root; in a COCO file, `file.json#image_id`.
        field: where in the file, e.g. `shapes[2].points`.
        reason: what was expected, what came, and what to do.
        num_shapes: how many shapes are lost.
    """

    file: str
    field: str
    reason: str
    num_shapes: int

    @classmethod
    def of(cls, file: str, problem: AnnotationError, num_shapes: int) -> Self:
        """Reject a file, or `num_shapes` shapes of it, for a problem."""
        return cls(file, problem.field, problem.reason, num_shapes)


@dataclass(frozen=True)
class FileWarning:
    """Something doubtful that is used all the same; an item of the manifest's `warnings`.

    Attributes: as in `Rejection`.
    """

    file: str
    field: str
    reason: str


@dataclass
class PreparedImage:
    """The image of an outcome.

    Attributes:
        name: its path from the dataset's root, or the JSON's if the JSON embeds the image.
        image_digest: sha256 of its bytes.
        num_instances: instances in it.
        instances_digest: sha256 of their labels and masks, and of the ignored region, if any.
        tiles: names of the tiles it was cut into; None if it is one row of the shard.
        num_cut: instances of which a part lies outside their tile.
        stretch: the values that became 0 and 255, if it has 16 or 32 bits a pixel.
        fingerprint: `geometry.duplicates.pack`; empty for an image without annotation.
    """

    name: str
    image_digest: str
    num_instances: int
    instances_digest: str
    tiles: list[str] | None = None
    num_cut: int = 0
    stretch: tuple[float, float] | None = None
    fingerprint: str = ""


@dataclass
class Outcome:
    """The outcome of one entry (`intake.Entry`).

    Attributes:
        entry, stamp: name and stamp of the entry.
        image_path: where the annotation says its image is; None if it cannot be read.
        found: the image that it refers to, as a path from the dataset's root, or None.
        not_found: why there is none.
        image_stamp: stamp of `found`.
        annotation: the entry's name, or None for an image without annotation.
        claims: the image it refers to, usable or not; that image does not count as unannotated.
        image: None if the whole entry is rejected.
        num_shapes: shapes in the annotation, usable or not.
        labels: instances of each label.
        filtered: shapes left out by label.
        joined: shapes that were joined to an instance of an earlier shape.
        not_instances: shapes that are no single object, by kind: lines, points, crowds, and those
            labelled `__ignore__`.
        rejected: what is not used.
        warnings: what is doubtful.
    """

    entry: str
    stamp: str
    image_path: str | None = None
    found: str | None = None
    not_found: str | None = None
    image_stamp: str | None = None
    annotation: str | None = None
    claims: str | None = None
    image: PreparedImage | None = None
    num_shapes: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    joined: int = 0
    not_instances: dict[str, int] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)
    warnings: list[FileWarning] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read back what `dataclasses.asdict` gave and JSON stored."""
        image = content["image"]
        if image is not None:
            stretch = image["stretch"]
            image = PreparedImage(**image | {"stretch": stretch and tuple(stretch)})
        parts = {
            "image": image,
            "rejected": [Rejection(**item) for item in content["rejected"]],
            "warnings": [FileWarning(**item) for item in content["warnings"]],
        }
        return cls(**content | parts)
