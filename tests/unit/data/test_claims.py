"""Which of several annotations of one image is used; none where it may be another's picture."""

import pytest

from samray.data.outcome import Outcome, PreparedImage
from samray.data.prepare import _dropped


def outcome(annotation: str, image: str, image_path: str, instances: int = 1) -> Outcome:
    prepared = PreparedImage(image, "digest", instances, "digest")
    return Outcome(
        annotation, "stamp", annotation=annotation, image=prepared, image_path=image_path
    )


@pytest.mark.parametrize(
    ("claims", "kept"),
    [
        ([("a.json", "images/1.png", "images/1.png"), ("b.json", "images/1.png", "1.png")], 0),
        ([("c.json#1", "d/1.png", "gone/1.png"), ("c.json#2", "d/1.png", "d/1.png")], 1),
        ([("x/c.json#1", "x/1.png", "y/1.png"), ("x/c.JSON#2", "x/1.png", "1.png")], 1),
        ([("c.json#1", "1.png", "1.png", 0), ("b.json#1", "1.png", "1.png", 2)], 1),
        ([("c.json#1", "1.png", "1.png", 1), ("b.json#1", "1.png", "1.png", 2)], 0),
        ([("c.json#1", "1.png", "1.png"), ("1.json", "1.png", "old/1.png")], 1),
        ([("c.json#1", "images/1.png", "1.png"), ("b.json#7", "images/1.png", "1.png")], 0),
    ],
)
def test_the_surest_annotation_of_an_image_is_kept(claims, kept):
    dropped = _dropped([outcome(*claim) for claim in claims])
    (other,) = {0, 1} - {kept}
    assert list(dropped) == [claims[other][0]]
    assert dropped[claims[other][0]] == (
        f"{claims[0][1]} is already annotated by {claims[kept][0]}; remove one of the two"
    )


def test_an_image_that_may_be_that_of_several_annotations_is_used_by_none():
    """`cats/1.png` and `dogs/1.png` are listed, and one picture is left."""
    paths = {"c.json#1": "cats/1.png", "c.json#2": "dogs/1.png", "c.json#3": "dogs/1.png"}
    others = outcome("c.json#4", "images/2.png", "cats/2.png")
    found = [outcome(name, "images/1.png", path) for name, path in paths.items()]
    dropped = _dropped([*found, others])
    assert set(dropped) == set(paths)
    for reason in dropped.values():
        assert "'cats/1.png', 'dogs/1.png'" in reason
        assert "correct their paths" in reason
