"""LabelMe files: what rejects the file, what rejects one shape, what is accepted."""

import base64
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samray.data.annotation import Annotation
from samray.data.labelme import embedded_image, labelme_document, labelme_shape, read_annotation
from samray.errors import AnnotationError

TRIANGLE = [[1, 1], [5, 1], [5, 6]]


def shape(**changes: Any) -> dict[str, Any]:
    """A good polygon with some keys changed, or taken out by `DROP`."""
    entry = {"label": "cat", "points": TRIANGLE, "shape_type": "polygon", "group_id": None}
    entry |= changes
    return {key: value for key, value in entry.items() if value is not DROP}


DROP = object()
GOOD = shape(label="neighbour")
OTHER = shape(label="neighbour", points=[[7, 1], [9, 1], [9, 6]])


def document(*shapes: Any, **keys: Any) -> bytes:
    content = {"shapes": list(shapes), "imagePath": "a.jpg", "imageHeight": 10, "imageWidth": 20}
    return json.dumps({k: v for k, v in (content | keys).items() if v is not DROP}).encode()


def read_with_neighbour(entry: Any) -> AnnotationError:
    """The only problem of a file with `entry` between two good shapes."""
    annotation = read_annotation(document(GOOD, entry, OTHER))
    assert [s.label for s in annotation.shapes] == ["neighbour", "neighbour"]
    assert [s.index for s in annotation.shapes] == [0, 2]
    assert annotation.num_shapes == 3
    (problem,) = annotation.problems
    assert problem.field.startswith("shapes[1]")
    assert "\n" not in str(problem)
    assert len(str(problem)) < 300
    return problem


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def test_good_file_gives_every_value() -> None:
    annotation = read_annotation(document(shape(group_id=3)))
    assert annotation.image_path == "a.jpg"
    assert annotation.size == (10, 20)
    assert annotation.problems == annotation.warnings == []
    (cat,) = annotation.shapes
    assert (cat.index, cat.label, cat.kind, cat.group_id, cat.png) == (0, "cat", "polygon", 3, None)
    assert cat.points.tolist() == TRIANGLE
    assert cat.points.dtype == np.float64


@pytest.mark.parametrize(
    ("raw", "field", "said"),
    [
        (b'{"shapes": [', "file", "is not JSON"),
        (b"", "file", "is not JSON"),
        (b"<annotation/>", "file", "is not JSON"),  # CVAT's export named "LabelMe"
        (b'{"shapes": "\xe9"}', "file", "is not UTF-8 text (byte 12)"),
        (b"[" * 10_000 + b"]" * 10_000, "file", "nested too deeply"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "file", "nested too deeply"),
        (b'{"shapes": [], "imageHeight": ' + b"9" * 5000 + b"}", "file", "too many digits"),
        (document(GOOD).join([b"[", b"]"]), "file", "not a list"),
        (b"null", "file", "not a NoneType"),
        (b"{}", "shapes", "another kind of JSON"),
        (b'{"shapes": {"0": 1}}', "shapes", "another kind of JSON"),
        (b'{"shapes": [1], "shapes": []}', "file", "has 'shapes' twice in one object"),
        (b'{"shapes": [{"label": "a", "label": "b"}]}', "file", "has 'label' twice"),
        (document(imageHeight=0), "imageHeight", "not 0"),
        (document(imageWidth=-3), "imageWidth", "not -3"),
        (document(imageWidth="20 px"), "imageWidth", "not '20 px'"),
        (document(imageHeight=True), "imageHeight", "not True"),
        (document(imageHeight=10.5), "imageHeight", "not 10.5"),
        (document(imageHeight=10**300), "imageHeight", "whole number of pixels, not 1000"),
    ],
)
def test_file_that_is_no_annotation_is_refused_whole_with_its_field(
    raw: bytes, field: str, said: str
) -> None:
    with pytest.raises(AnnotationError) as caught:
        read_annotation(raw)
    assert caught.value.field == field
    assert said in caught.value.reason


def test_byte_order_mark_of_windows_editors_is_accepted() -> None:
    assert len(read_annotation(b"\xef\xbb\xbf" + document(GOOD)).shapes) == 1


def test_file_without_shapes_is_a_background_image_and_no_error() -> None:
    annotation = read_annotation(document())
    assert annotation == Annotation(image_path="a.jpg", size=(10, 20), num_shapes=0)


@pytest.mark.parametrize("dropped", [["imageHeight"], ["imageHeight", "imageWidth"]])
def test_missing_size_is_allowed(dropped: list[str]) -> None:
    assert read_annotation(document(GOOD, **dict.fromkeys(dropped, DROP))).size is None
    assert read_annotation(document(GOOD, **dict.fromkeys(dropped))).size is None


@pytest.mark.parametrize(
    ("entry", "field", "said"),
    [
        (shape(points=TRIANGLE[:2]), ".points", "('cat') is a polygon of 2 points"),
        (
            shape(points=TRIANGLE[:1] * 3),
            ".points",
            "('cat') is a polygon whose points are all the same",
        ),
        (shape(points=[]), ".points", "0 points"),
        (shape(points=[], label="two\nlines"), ".points", r"('two\nlines') is"),
        (shape(points=[], label="x" * 10_000), ".points", "xxx) is a polygon of 0 points"),
        (shape(points=DROP), ".points", "None"),
        (shape(points={"0": [1, 1]}), ".points", "needs 3 or more"),
        (shape(points=TRIANGLE[:1], shape_type="circle"), ".points", "needs 2"),
        (shape(points=[*TRIANGLE, [float("nan"), 1]]), ".points[3]", "finite"),
        (shape(points=[*TRIANGLE, [1, float("inf")]]), ".points[3]", "finite"),
        (shape(points=[[1, -float("inf")], *TRIANGLE]), ".points[0]", "finite"),
        (shape(points=[*TRIANGLE, [1e308, 1]]), ".points[3]", "within 1000000 pixels"),
        (shape(points=[*TRIANGLE, [1, -1e7]]), ".points[3]", "within 1000000 pixels"),
        (shape(points=[*TRIANGLE, [10**400, 1]]), ".points[3]", "within 1000000 pixels"),
        (shape(points=[*TRIANGLE, [True, 1]]), ".points[3]", "must be [x, y]"),
        (shape(points=[*TRIANGLE, ["1", 1]]), ".points[3]", "must be [x, y]"),
        (shape(points=[*TRIANGLE, [None, 1]]), ".points[3]", "must be [x, y]"),
        (shape(points=[*TRIANGLE, [1, 2, 3]]), ".points[3]", "must be [x, y]"),
        (shape(points=[*TRIANGLE, 7]), ".points[3]", "must be [x, y]"),
        (shape(label=DROP), ".label", "not None"),
        (shape(label=""), ".label", "not ''"),
        (shape(label=" \n"), ".label", "not empty"),
        (shape(label=5), ".label", "not 5"),
        (shape(label=["cat"]), ".label", "not ['cat']"),
        (shape(label="\ud800"), ".label", "not Unicode"),  # cannot be written as UTF-8
        (GOOD, "", "is a duplicate of shapes[0]"),
        (shape(shape_type="rectangle"), ".points", "needs 2 or 4"),
        (shape(shape_type="oriented_rectangle"), ".points", "needs 4"),
        (shape(shape_type="circle"), ".points", "needs 2"),
        (shape(shape_type="quadrilateral"), ".points", "needs 4"),
        (shape(shape_type="blob"), ".shape_type", "samray reads polygon, rectangle, "),
        (shape(shape_type=["polygon"]), ".shape_type", "samray reads"),
        (shape(shape_type={"a": 1}), ".shape_type", "samray reads"),
        (shape(group_id=1.5), ".group_id", "not 1.5"),
        (shape(group_id=False), ".group_id", "not False"),
        (shape(group_id=[1]), ".group_id", "not [1]"),
        ("polygon", "", "must be an object"),
        (None, "", "must be an object"),
        (shape(shape_type="mask", points=TRIANGLE[:2]), ".mask", "PNG in base64"),
        (shape(shape_type="mask", points=TRIANGLE[:2], mask="%%%"), ".mask", "PNG in base64"),
        (shape(shape_type="mask", points=TRIANGLE[:2], mask="é"), ".mask", "PNG in base64"),
        (shape(shape_type="mask", points=TRIANGLE[:2], mask=7), ".mask", "PNG in base64"),
        (shape(shape_type="mask", points=TRIANGLE[:2], mask="R0lGODlh"), ".mask", "first bytes"),
    ],
    ids=str,
)
def test_bad_shape_is_one_problem_and_the_others_are_used(
    entry: Any, field: str, said: str
) -> None:
    problem = read_with_neighbour(entry)
    assert problem.field == f"shapes[1]{field}"
    assert said in problem.reason


@pytest.mark.parametrize("kind", ["line", "linestrip", "point", "points"])
def test_shapes_without_an_area_are_counted_and_no_problem(kind: str) -> None:
    annotation = read_annotation(document(GOOD, shape(shape_type=kind, points=[[1, 1]])))
    assert annotation.not_instances == [("shapes[1].shape_type", kind)]
    assert annotation.problems == []
    assert len(annotation.shapes) == 1


def test_x_anylabelings_rotation_is_an_oriented_rectangle() -> None:
    corners = [[5, 1], [9, 5], [5, 9], [1, 5]]
    entry = shape(shape_type="rotation", points=corners, direction=0.78, difficult=False)
    (turned,) = read_annotation(document(entry)).shapes
    assert (turned.kind, turned.points.tolist()) == ("oriented_rectangle", corners)


def test_an_embedded_image_is_kept_and_decoded_when_asked() -> None:
    text = base64.b64encode(b"picture").decode()
    annotation = read_annotation(document(GOOD, imageData=f"{text[:4]}\n{text[4:]}"))
    assert annotation.image_data is not None
    assert embedded_image(annotation.image_data) == b"picture"
    assert read_annotation(document(GOOD, imageData=None)).image_data is None
    with pytest.raises(AnnotationError, match="imageData: must be an image file in base64"):
        embedded_image("%%")


@pytest.mark.parametrize("key", ["label", "points", "group_id", "shape_type"])
def test_value_nested_almost_too_deeply_ends_in_an_annotation_error(key: str) -> None:
    fields = set()
    for depth in range(700, 1100, 5):  # around the recursion limit, at any depth of pytest's stack
        nest = b"[" * depth + b"]" * depth
        raw = document(shape(**{key: "@"})).replace(b'"@"', nest)
        try:
            (problem,) = read_annotation(raw).problems
        except AnnotationError as whole_file:
            problem = whole_file
        fields.add(problem.field.partition(".")[0])
    assert fields == {
        "shapes[0]",
        "file",
    }  # shallow nesting affects the shape, deep the file


def test_label_is_trimmed_with_a_warning_so_that_one_class_stays_one() -> None:
    annotation = read_annotation(document(shape(label=" cat\n"), OTHER | {"label": "cat"}))
    assert [s.label for s in annotation.shapes] == ["cat", "cat"]
    ((field, reason),) = annotation.warnings
    assert field == "shapes[0].label"
    assert "' cat\\n'" in reason


@pytest.mark.parametrize("kind", [DROP, None, ""])
def test_missing_shape_type_means_polygon_as_in_old_labelme(kind: Any) -> None:
    (found,) = read_annotation(document(shape(shape_type=kind))).shapes
    assert found.kind == "polygon"


@pytest.mark.parametrize("group_id", [None, 0, 7, -1, "left wing"])
def test_group_id_of_number_text_or_null_is_kept(group_id: Any) -> None:
    (found,) = read_annotation(document(shape(group_id=group_id))).shapes
    assert found.group_id == group_id


def test_whole_numbers_may_be_floats_as_tools_write_them() -> None:
    """A file from pandas was refused as a whole, or its groups fell apart."""
    raw = document(shape(group_id=1.0), imageHeight=10.0, imageWidth="20")
    annotation = read_annotation(raw)
    assert annotation.size == (10, 20)
    assert [type(side) for side in annotation.size] == [int, int]
    assert [found.group_id for found in annotation.shapes] == [1]
    joined = read_annotation(document(shape(group_id=1), OTHER | {"group_id": 1.0}))
    assert {found.group_id for found in joined.shapes} == {1}


def test_a_file_of_an_unusable_size_says_how_many_shapes_are_lost() -> None:
    with pytest.raises(AnnotationError) as caught:
        read_annotation(document(GOOD, OTHER, imageHeight=10.5))
    assert caught.value.num_shapes == 2


def test_missing_group_id_stands_alone() -> None:
    (found,) = read_annotation(document(shape(group_id=DROP))).shapes
    assert found.group_id is None


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_mask_shape_keeps_its_png_even_from_wrapped_base64(encode: Any) -> None:
    rng = np.random.default_rng(0)
    content = png(rng.integers(0, 2, (40, 40), dtype=np.uint8) * 255)
    text = encode(content).decode()
    entry = shape(shape_type="mask", points=[[0, 0], [39, 39]], mask=text)
    (found,) = read_annotation(document(entry)).shapes
    assert found.kind == "mask"
    assert found.png == content


@pytest.mark.parametrize(
    ("said", "expected"),
    [("..\\images\\a.jpg", "../images/a.jpg"), ("a/b.jpg", "a/b.jpg"), (DROP, ""), (5, "")],
)
def test_image_path_has_forward_slashes_and_is_empty_if_there_is_none(
    said: Any, expected: str
) -> None:
    assert read_annotation(document(GOOD, imagePath=said)).image_path == expected


def test_what_samray_writes_it_reads_again() -> None:
    mask = png(np.ones((3, 2), np.uint8))
    shapes = [
        labelme_shape("Straße", "polygon", np.array(TRIANGLE), group_id=2),
        labelme_shape("cat", "mask", np.array([[1, 1], [2, 3]]), png=mask),
    ]
    raw = json.dumps(labelme_document("../a.jpg", (10, 20), shapes)).encode()
    annotation = read_annotation(raw)
    assert annotation.problems == annotation.warnings == []
    assert (annotation.image_path, annotation.size) == ("../a.jpg", (10, 20))
    assert [(s.label, s.group_id, s.png) for s in annotation.shapes] == [
        ("Straße", 2, None),
        ("cat", None, mask),
    ]


def test_an_error_can_be_pickled() -> None:
    """Ray pickles it; one that cannot be unpickled would stop the pipeline."""
    error = pickle.loads(pickle.dumps(AnnotationError("shapes[2].points", "too few", 3)))
    assert (error.field, error.reason, error.num_shapes) == ("shapes[2].points", "too few", 3)
    assert str(error) == "shapes[2].points: too few"
