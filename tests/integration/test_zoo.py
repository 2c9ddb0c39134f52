"""One folder with every unusual kind of file, prepared once.

Each case states the expected outcome; docs/data.md documents the same. The images are generated, so
that no photographs are needed.
"""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samray.config import load_config
from samray.data.annotation import MAX_JSON_BYTES
from samray.data.dataset import PreparedDataset
from samray.data.prepare import prepare
from samray.geometry.images import decode_image

HEIGHT, WIDTH = 48, 64
SQUARE = [[4, 6], [20, 6], [20, 30], [4, 30]]
FAR = [[50, 40], [60, 40], [60, 46]]
OUTSIDE = [[900, 900], [910, 900], [910, 910]]


@dataclass
class Expected:
    """The expected outcome of one case.

    Attributes:
        instances: of its image in the prepared dataset; None if the image is not in it.
        rejected: (field, part of the reason) of each rejection.
        size: (H, W) of the image.
        joined_away: shapes in groups beyond the first of each.
        others: shapes that are no instances: lines, points, ignored labels.
    """

    instances: int | None = 1
    rejected: list[tuple[str, str]] = field(default_factory=list)
    size: tuple[int, int] = (HEIGHT, WIDTH)
    joined_away: int = 0
    others: int = 0
    image: str = ""


def noise(seed: int = 0, channels: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), np.uint8)
    return pixels[:, :, 0] if channels == 1 else pixels


def shape(points: Any = SQUARE, **changes: Any) -> dict[str, Any]:
    return {"label": "cat", "points": points, "shape_type": "polygon", "group_id": None} | changes


def write(data: Path, name: str, *shapes: Any, image: str = "", **changes: Any) -> None:
    """Write NAME.json beside its image; a change to ... drops the key."""
    document = {"version": "5.5.0", "flags": {}, "shapes": list(shapes or [shape()])}
    document |= {"imagePath": image or f"{name}.png", "imageData": None}
    document |= {"imageHeight": HEIGHT, "imageWidth": WIDTH} | changes
    document = {key: value for key, value in document.items() if value is not ...}
    (data / f"{name}.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def save(data: Path, file: str, picture: Any = None, kind: str = "PNG", **settings: Any) -> None:
    picture = Image.fromarray(noise(len(file))) if picture is None else picture
    picture.save(data / file, format=kind, **settings)


# Each case: a function that writes NAME.json and its image, and the expected outcome.
CASES: dict[str, tuple[Callable[[Path, str], None], Expected]] = {}


def case(**expected: Any) -> Callable[[Callable[[Path, str], None]], None]:
    def register(make: Callable[[Path, str], None]) -> None:
        CASES[make.__name__] = (make, Expected(**expected))

    return register


# ---- images, detected by content -----------------------------------------------------------


def image_case(file: str, picture: Any, kind: str, **settings: Any) -> None:
    def make(data: Path, name: str) -> None:
        save(data, f"{name}{file}", picture, kind, **settings)
        write(data, name, image=f"{name}{file}")

    name = f"{kind.lower()}_{picture.mode.replace(';', '_').lower()}_named{file.replace('.', '_')}"
    CASES[name] = (make, Expected(image=f"{name}{file}"))


RGB = Image.fromarray(noise())
DEEP = Image.fromarray(np.linspace(900, 3000, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype("u2"))
image_case(".jpg", RGB, "JPEG")
image_case(".JPEG", RGB, "JPEG")
image_case(".jfif", RGB, "JPEG")
image_case(".jpe", RGB, "JPEG")
image_case(".jpg", RGB.convert("L"), "JPEG")
image_case(".jpg", RGB.convert("CMYK"), "JPEG")
image_case(".png", RGB.quantize(16), "PNG")
image_case(".png", RGB.convert("RGBA"), "PNG")
image_case(".png", RGB.convert("1"), "PNG")
image_case(".png", DEEP, "PNG")
image_case(".tif", DEEP, "TIFF")
image_case(".TIFF", RGB, "TIFF")
image_case(".tif", Image.fromarray(np.asarray(DEEP) / np.float32(3000)), "TIFF")
image_case(".jpg", RGB.convert("L"), "BMP")
image_case(".webp", RGB, "WEBP")
image_case(".png", RGB, "WEBP")


@case(instances=None, rejected=[("imagePath", "does not read .heic; convert it to PNG or JPEG")])
def image_of_a_format_that_is_not_read(data: Path, name: str) -> None:
    (data / f"{name}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    write(data, name, image=f"{name}.heic")


def rotated(data: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated, shown upright
    save(data, f"{name}.jpg", None, "JPEG", exif=exif)


@case(size=(WIDTH, HEIGHT))
def exif_rotated_and_annotated_upright(data: Path, name: str) -> None:
    rotated(data, name)
    write(data, name, image=f"{name}.jpg", imageHeight=WIDTH, imageWidth=HEIGHT)


@case(instances=None, rejected=[("imageHeight, imageWidth", "resized or rotated")])
def exif_rotated_and_annotated_lying(data: Path, name: str) -> None:
    rotated(data, name)
    write(data, name, image=f"{name}.jpg")


@case(instances=None, rejected=[("imageHeight, imageWidth", "say 99 x 48 pixels")])
def size_of_another_image(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    write(data, name, imageWidth=99)


@case(instances=None, rejected=[("image", "cannot be decoded")])
def truncated_jpeg(data: Path, name: str) -> None:
    save(data, f"{name}.jpg", None, "JPEG")
    path = data / f"{name}.jpg"
    path.write_bytes(path.read_bytes()[:-900])
    write(data, name, image=f"{name}.jpg")


@case(instances=None, rejected=[("image", "has 3 pages; save each page")])
def stack_of_three_pages(data: Path, name: str) -> None:
    save(data, f"{name}.tif", None, "TIFF", save_all=True, append_images=[RGB, RGB])
    write(data, name, image=f"{name}.tif")


@case(instances=None, rejected=[("image", "larger than 100 megapixels")])
def four_hundred_megapixels_in_389_kilobytes(data: Path, name: str) -> None:
    save(data, f"{name}.png", Image.new("L", (20_000, 20_000)))
    assert (data / f"{name}.png").stat().st_size < 400_000
    write(data, name)


# ---- the JSON as a whole -------------------------------------------------------------------


@case(instances=None, rejected=[("file", "is not JSON")])
def not_json(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    (data / f"{name}.json").write_text("<annotation/>")


@case(instances=None, rejected=[("file", "nested too deeply")])
def nested_10_000_deep(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    (data / f"{name}.json").write_text("[" * 10_000 + "]" * 10_000)


@case(instances=None, rejected=[("file", f"at most {MAX_JSON_BYTES // 2**20} are read")])
def json_of_500_megabytes(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    with (data / f"{name}.json").open("wb") as file:
        file.truncate(500_000_000)  # sparse: takes no disk space


@case(instances=None, rejected=[("shapes", "another kind of JSON")])
def other_json(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    (data / f"{name}.json").write_text('{"settings": 1}')


@case(instances=0)
def no_shapes_but_flags(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    write(data, name, shapes=[], flags={"cat": True})


@case()
def version_2_without_version_type_and_size(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    old = {"label": "cat", "line_color": None, "fill_color": None, "points": SQUARE}
    absent = dict.fromkeys(("version", "flags", "imageHeight", "imageWidth"), ...)
    write(data, name, old, lineColor=[0, 255, 0, 128], **absent)


@case()
def byte_order_mark(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    write(data, name)
    path = data / f"{name}.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@case(image="straße_猫.png")
def names_that_are_not_ascii(data: Path, name: str) -> None:
    save(data, "straße_猫.png")
    write(data, name, shape(label="Käse 🧀"), image="straße_猫.png")


@case()
def image_path_of_windows(data: Path, name: str) -> None:
    save(data, f"{name}.png")
    write(data, name, image=f"..\\old folder\\{name}.png")


@case(image="Upper.PNG")
def image_path_in_letters_of_the_wrong_case(data: Path, name: str) -> None:
    save(data, "Upper.PNG")
    write(data, name, image="upper.png")


@case(image="image_path_names_the_json.json")
def image_path_names_the_json(data: Path, name: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(99)).save(buffer, format="JPEG")
    embedded = base64.b64encode(buffer.getvalue()).decode()
    write(data, name, image=f"{name}.json", imageData=embedded)


@case(instances=None, rejected=[("imagePath", "points nowhere")])
def no_image_anywhere(data: Path, name: str) -> None:
    write(data, name)


@case(instances=None, rejected=[("imagePath", "leads out of the dataset")])
def image_path_out_of_the_dataset(data: Path, name: str) -> None:
    save(data.parent, "private.png")
    write(data, name, image="../private.png")


# ---- shapes --------------------------------------------------------------------------------


def shapes_case(name: str, *shapes: Any, **expected: Any) -> None:
    def make(data: Path, name: str) -> None:
        save(data, f"{name}.png")
        write(data, name, *shapes)

    CASES[name] = (make, Expected(**expected))


def png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


BOX = [[10, 10], [12, 13]]
RING = shape(BOX, shape_type="mask", mask=png(np.array([[1, 1, 1], [1, 0, 1]] * 2, bool)))
shapes_case(
    "every_kind_with_an_area",
    shape(),
    shape(SQUARE[::2], shape_type="rectangle", label="two corners"),
    shape(SQUARE, shape_type="rectangle", label="X-AnyLabeling's four"),
    shape([[30, 5], [40, 15], [30, 25], [20, 15]], shape_type="oriented_rectangle"),
    shape([[30, 5], [40, 15], [30, 25], [20, 15]], shape_type="rotation", label="X-AnyLabeling's"),
    shape([[30, 5], [40, 15], [30, 27], [20, 15]], shape_type="quadrilateral"),
    shape([[30, 20], [30, 30]], shape_type="circle"),
    RING,
    RING | {"label": "dragged", "points": [[20.4, 30.6], [22.4, 33.6]]},
    instances=9,
)
shapes_case(
    "kinds_without_an_area",
    shape(),
    *[shape(SQUARE[:2], shape_type=kind) for kind in ("line", "linestrip", "point", "points")],
    shape(label="__ignore__"),
    others=5,
)
shapes_case(
    "polygons_of_one_and_two_points",
    shape(SQUARE[:1]),
    shape(SQUARE[:2]),
    shape(FAR),
    rejected=[("shapes[0].points", "of 1 points"), ("shapes[1].points", "of 2 points")],
)
shapes_case("a_bow_tie", shape([[4, 4], [20, 20], [20, 4], [4, 20]]))
shapes_case("reaching_over_the_border", shape([[-30, -30], [20, 6], [20, 30]]))
shapes_case(
    "beside_the_image", shape(), shape(OUTSIDE), rejected=[("shapes[1].points", "lies outside")]
)
shapes_case("a_group_of_two", shape(group_id=1), shape(FAR, group_id=1), joined_away=1)
shapes_case("the_same_twice", shape(), shape(), rejected=[("shapes[1]", "duplicate of")])
shapes_case("white_space_in_the_label", shape(label=" cat\n"))
shapes_case(
    "points_that_are_no_numbers",
    shape(),
    shape([*SQUARE, [1e308, 1]]),
    shape([*SQUARE, [float("nan"), 1]]),
    shape([*SQUARE, ["1", 1]]),
    rejected=[(f"shapes[{n}].points[4]", "must be") for n in (1, 2, 3)],
)
shapes_case(
    "an_outline_that_nobody_draws",
    shape(),
    shape(np.random.default_rng(0).integers(0, 48, (300_000, 2)).tolist()),
    rejected=[("shapes[1].points", "simplify it")],
)


@pytest.fixture(scope="module")
def zoo(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """(manifest, the prepared folder) of all cases in one folder."""
    data = tmp_path_factory.mktemp("zoo") / "data"
    data.mkdir()
    for name, (make, _) in CASES.items():
        make(data, name)
    options = {"prepare.data_dir": str(data), "prepare.output_dir": str(data.parent / "prepared")}
    return prepare(load_config(options=options)), data.parent / "prepared"


@pytest.mark.parametrize("name", CASES)
def test_case(name: str, zoo: tuple[dict, Path]) -> None:
    manifest, folder = zoo
    expected = CASES[name][1]
    rejected = [r for r in manifest["rejected"] if r["file"] == f"{name}.json"]
    assert [r["field"] for r in rejected] == [place for place, _ in expected.rejected]
    for entry, (_, said) in zip(rejected, expected.rejected, strict=True):
        assert said in entry["reason"]
        assert "\n" not in entry["reason"]
    dataset = PreparedDataset(folder)
    image = expected.image or next((n for n in dataset.images if Path(n).stem == name), "")
    if expected.instances is None:
        assert image == ""
        assert name not in {Path(unlabelled).stem for unlabelled in manifest["unlabelled"]}
        return
    record = dataset.images[image]
    assert record.size == expected.size
    assert len(record.instances) == expected.instances
    assert decode_image(dataset.image_bytes(record)).std() > 20, "neither black nor white"
    for instance in record.instances:
        mask = record.decode(instance)
        assert mask.sum() == instance.area > 0


def test_every_shape_is_accounted_for(zoo: tuple[dict, Path]) -> None:
    manifest, _ = zoo
    lists = {e["file"] for e in manifest["rejected"]}
    assert lists == {f"{name}.json" for name, (_, e) in CASES.items() if e.rejected}
    assert manifest["joined"] == sum(e.joined_away for _, e in CASES.values())
    told = manifest["num_instances"] + manifest["joined"]
    told += sum(entry["num_shapes"] for entry in manifest["rejected"])
    told += sum(manifest["filtered"].values()) + sum(manifest["not_instances"].values())
    assert told == manifest["num_shapes"]
    assert manifest["num_instances"] == sum(e.instances or 0 for _, e in CASES.values())
    others = sum(manifest["filtered"].values()) + sum(manifest["not_instances"].values())
    assert others == sum(e.others for _, e in CASES.values())


def test_the_stretch_of_deep_images_is_stored(zoo: tuple[dict, Path]) -> None:
    manifest, folder = zoo
    assert len(manifest["stretched"]) == 3  # PNG and TIFF of 16 bits, and a TIFF of floats
    dataset = PreparedDataset(folder)
    for name, ends in manifest["stretched"].items():
        pixels = np.asarray(Image.open(io.BytesIO(dataset.image_bytes(dataset.images[name]))))
        assert ends == pytest.approx(np.percentile(pixels, [0.1, 99.9]).tolist())


def test_corrections_are_warnings(zoo: tuple[dict, Path]) -> None:
    warnings = {w["file"]: w["reason"] for w in zoo[0]["warnings"] if w["field"] != "image"}
    assert "white space" in warnings["white_space_in_the_label.json"]
    assert "pixels out of the image; cut off" in warnings["reaching_over_the_border.json"]
    assert len(warnings) == 2
