"""Label Studio's words to ours and back: its config, its percents, its brush."""

import contextlib
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from samray.prediction.answers import describe_mask
from samray.prediction.requests import MAX_POINTS, ApiError, PromptRequest
from samray.serving.labelstudio import (
    Output,
    Region,
    build_prediction,
    choose_label,
    encode_brush,
    no_prediction,
    own_label,
    prompt_of_regions,
    read_output,
    read_prediction_request,
    request_for,
)

CONFIG = """
<View>
  <Image name="picture" value="$photo" zoom="true"/>
  <KeyPointLabels name="click" toName="picture" smart="true">
    <Label value="Nut"/><Label value="Leaf"/>
  </KeyPointLabels>
  <RectangleLabels name="drag" toName="picture" smart="true"><Label value="Leaf"/></RectangleLabels>
  <PolygonLabels name="outline" toName="picture"><Label value="Nut"/></PolygonLabels>
  <BrushLabels name="mask" toName="picture"><Label value="Nut"/><Label value="Leaf"/></BrushLabels>
</View>
"""
BRUSH = Output("mask", "picture", "photo", "brushlabels", ("Nut", "Leaf"))
SIZE = (100, 200)  # H, W


def keypoint(x, y, label="Nut", **more):
    """A region as Label Studio sends it after a click with the magic wand on."""
    return Region.model_validate(
        {
            "original_width": 200,
            "original_height": 100,
            "image_rotation": 0,
            "value": {"x": x, "y": y, "width": 0.32, "keypointlabels": [label]},
            "id": "fBWv1t0S2L",
            "from_name": "click",
            "to_name": "picture",
            "type": "keypointlabels",
            "origin": "manual",
            **more,
        }
    )


def rectangle(x, y, width, height, **value):
    return Region(
        type="rectanglelabels",
        to_name="picture",
        value={"x": x, "y": y, "width": width, "height": height, "rotation": 0, **value},
    )


def refused(field):
    return pytest.raises(ApiError, match=field.replace("[", r"\[").replace(".", r"\."))


def decode_brush(numbers):
    """Label Studio's reader, from its rle-pack: one bit after the other."""
    bits = "".join(f"{number:08b}" for number in numbers)
    place = 0

    def read(count):
        nonlocal place
        place += count
        return int(bits[place - count : place], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    out = []
    while len(out) < total:
        repeated = read(1)
        count = read(sizes[read(2)]) + 1
        out += [read(word)] * count if repeated else [read(word) for _ in range(count)]
    assert len(bits) - place < 8
    return np.array(out, dtype=np.uint8)


def test_a_brush_answers_before_a_polygon():
    assert read_output(CONFIG) == BRUSH
    polygons = CONFIG.replace("BrushLabels", "TextArea")
    assert read_output(polygons) == Output("outline", "picture", "photo", "polygonlabels", ("Nut",))


@pytest.mark.parametrize("tag", ["Brush", "Polygon"])
def test_tags_without_labels(tag):
    config = f'<View><Image name="i" value="$image"/><{tag} name="o" toName="i"/></View>'
    assert read_output(config) == Output("o", "i", "image", tag.lower(), ())


def test_the_answer_goes_to_the_image_that_was_drawn_on():
    second = '<Image name="two" value="$b"/><Polygon name="p" toName="two"/></View>'
    config = CONFIG.replace("</View>", second)
    assert read_output(config, "two").data_key == "b"
    assert read_output(config, "picture") == BRUSH
    with refused("label_config: needs a BrushLabels"):
        read_output(config, "three")


def test_a_label_answers_to_its_alias():
    config = CONFIG.replace('<Label value="Leaf"/>', '<Label value="Leaf" alias="L"/>')
    assert read_output(config).labels == ("Nut", "L")


@pytest.mark.parametrize(
    "config",
    [
        "",
        "<View>",
        "<View/>",
        '<View><Image name="i" value="$image"/></View>',
        '<View><Image name="i" valueList="$images"/><Brush name="o" toName="i"/></View>',
        "<View>\0</View>",
        "\ud800",
    ],
)
def test_a_config_that_takes_no_masks(config):
    with refused("label_config"):
        read_output(config)


@pytest.mark.parametrize(
    "start",
    [
        '<!DOCTYPE v [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>',
        '<!DOCTYPE v [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE View SYSTEM "http://127.0.0.1/x.dtd">',
    ],
)
def test_no_entity_is_ever_expanded(start):
    with refused("label_config: must not hold a DOCTYPE"):
        read_output(start + CONFIG)


def test_percents_become_pixels():
    regions = [keypoint(25, 50), keypoint(50, 10, is_positive=False), rectangle(10, 20, 40, 60)]
    prompt = prompt_of_regions(regions, SIZE, "picture")
    assert prompt.point_coords == [(50, 50), (100, 10)]
    assert prompt.point_labels == [1, 0]
    assert prompt.box == (20, 20, 100, 80)


def test_what_is_drawn_beyond_the_border_is_moved_inside():
    prompt = prompt_of_regions([keypoint(100, 100), keypoint(-3, 130)], SIZE, "picture")
    assert not prompt.require_inside(SIZE, "")
    prompt = prompt_of_regions([rectangle(-5, -5, 50, 200)], SIZE, "picture")
    assert prompt.box == (0, 0, 90, 100)


def test_a_turned_rectangle_is_boxed():
    """Turned by a right angle about its corner, in pixels: 40 wide and 20 high become 20 and 40."""
    prompt = prompt_of_regions([rectangle(50, 20, 20, 20, rotation=90)], SIZE, "picture")
    assert prompt.box == pytest.approx((80, 20, 100, 60))


@pytest.mark.parametrize(
    "regions",
    [
        [],
        [keypoint(5, 5, is_positive=False)],
        [keypoint(5, 5, to_name="other")],
        [Region(type="brushlabels", value={"rle": [1]})],
        [Region(type="labels", value={"x": 5, "y": 5, "labels": ["Nut"]})],
    ],
)
def test_nothing_that_shows_an_object_is_no_prompt(regions):
    assert prompt_of_regions(regions, SIZE, "picture") is None


@pytest.mark.parametrize(
    ("region", "field"),
    [
        (keypoint("5", 5), "params.context.result[0].value.x"),
        (keypoint(5, None), "params.context.result[0].value.y"),
        (keypoint(float("nan"), 5), "params.context.result[0].value.x"),
        (keypoint(True, 5), "params.context.result[0].value.x"),
        (keypoint(10**9, 5), "params.context.result[0].value.x"),
        (keypoint(5, 5, image_rotation=90), "params.context.result[0].image_rotation"),
        (rectangle(5, 5, 0, 5), "params.context.result[0].value"),
        (rectangle(101, 5, 5, 5), "params.context.result[0].value"),
    ],
)
def test_a_bad_region_is_told_its_field(region, field):
    with pytest.raises(ApiError) as caught:
        prompt_of_regions([region], SIZE, "picture")
    assert caught.value.field == field
    assert caught.value.status == 422


def test_too_many_points_are_refused_and_not_an_error_of_ours():
    with refused("params.context.result: has 65 points"):
        prompt_of_regions([keypoint(5, 5)] * (MAX_POINTS + 1), SIZE, "picture")


# A busy machine is no failure.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.floats(allow_nan=True) | st.integers() | st.text(max_size=3) | st.none()


@PATIENT
@given(
    values=st.lists(st.fixed_dictionaries(dict.fromkeys(("x", "y", "width", "height"), NUMBERS))),
    kind=st.sampled_from(["keypoint", "keypointlabels", "rectangle", "rectanglelabels"]),
    size=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
)
def test_any_region_becomes_a_prompt_inside_or_a_refusal(values, kind, size):
    regions = [Region(type=kind, value=value) for value in values]
    with contextlib.suppress(ApiError):
        prompt = prompt_of_regions(regions, size, "picture")
        assert prompt is None or not prompt.require_inside(size, "")


def test_the_label_is_that_of_the_click_where_the_output_has_it():
    assert choose_label([keypoint(1, 1, "Leaf")], BRUSH) == "Leaf"
    assert choose_label([keypoint(1, 1, "Stone")], BRUSH) == "Nut"
    assert choose_label([rectangle(1, 1, 1, 1, rectanglelabels=["Leaf"])], BRUSH) == "Leaf"
    unlisted = Output("o", "i", "image", "brushlabels", ())
    assert choose_label([keypoint(1, 1, "Stone")], unlisted) == "Stone"


def test_the_brush_bit_by_bit():
    """One pixel of four: 16 values, 8 bits each; runs of 4, 4 and 8 fit 3 bits."""
    header = f"{16:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    runs = "1 00 011 00000000" + "1 00 011 11111111" + "1 00 111 00000000"
    bits = (header + runs).replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    expected = [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]
    assert encode_brush(np.array([[False, True], [False, False]])) == expected


@settings(PATIENT, max_examples=60)
@given(mask=arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)))
@example(mask=np.zeros((200, 200), bool))  # 160,000 values: three runs
@example(mask=np.ones((128, 128), bool))  # exactly 2**16
@example(mask=np.tile([True] * 4 + [False] * 5 + [True] * 65, (3, 1)))
def test_label_studio_reads_the_mask_that_we_wrote(mask):
    values = decode_brush(encode_brush(mask)).reshape(*mask.shape, 4)
    assert (values == np.where(mask, 255, 0)[:, :, None]).all()


def answer(mask, output):
    prompt = PromptRequest(point_coords=[(1, 1)])
    asked = request_for(prompt, output)
    described = describe_mask(mask, asked.mask_format, "object", asked.polygon_tolerance, 1)
    masks = [({"score": 0.9, **described}, "Nut")]
    return build_prediction(masks, mask.shape, output, "tiny 1")


def ring():
    mask = np.zeros(SIZE, bool)
    mask[20:60, 40:120] = True
    mask[30:50, 60:100] = False
    mask[80:90, 150:160] = True
    mask[95, 5] = True  # too small for a polygon
    return mask


def test_a_brush_answer():
    prediction = answer(ring(), BRUSH)
    (region,) = prediction["result"]
    assert {key: region[key] for key in ("type", "from_name", "to_name", "image_rotation")} == {
        "type": "brushlabels",
        "from_name": "mask",
        "to_name": "picture",
        "image_rotation": 0,
    }
    assert (region["original_height"], region["original_width"]) == SIZE
    assert region["value"]["format"] == "rle"
    assert region["value"]["brushlabels"] == ["Nut"]
    alpha = decode_brush(region["value"]["rle"]).reshape(*SIZE, 4)[:, :, 3]
    assert ((alpha > 0) == ring()).all()
    assert prediction["score"] == 0.9
    assert prediction["model_version"] == "tiny 1"


def test_a_polygon_answer_is_one_region_of_the_largest_part():
    output = Output("outline", "picture", "photo", "polygonlabels", ("Nut",))
    (region,) = answer(ring(), output)["result"]
    points = region["value"]["points"]
    assert tuple(np.min(points, axis=0)) == (20.25, 20.5)
    assert tuple(np.max(points, axis=0)) == (59.75, 59.5)
    assert region["value"]["polygonlabels"] == ["Nut"]


def test_all_objects_become_a_region_each_and_empty_ones_none():
    masks = []
    for mask, score in ((ring(), 0.9), (np.zeros(SIZE, bool), 0.7), (~ring(), 0.5)):
        asked = request_for(None, BRUSH)
        described = describe_mask(mask, asked.mask_format, "leaf", asked.polygon_tolerance, 1)
        masks.append(({"score": score, **described}, own_label("leaf", BRUSH)))
    prediction = build_prediction(masks, SIZE, BRUSH, "tiny 1")
    assert [region["score"] for region in prediction["result"]] == [0.9, 0.5]
    assert prediction["score"] == pytest.approx(0.7)
    assert build_prediction(masks[1:2], SIZE, BRUSH, "tiny 1") is None


def test_a_models_label_is_used_if_the_interface_has_it():
    output = Output("mask", "picture", "photo", "brushlabels", ("Nut", "leaf"))
    assert [own_label(name, output) for name in ("leaf", "object")] == ["leaf", "Nut"]
    free = Output("mask", "picture", "photo", "brushlabels", ())
    assert own_label("leaf", free) == "leaf"


def test_only_an_answer_to_a_click_has_a_result_that_label_studio_stores():
    assert no_prediction("tiny 1", drawn=True)["result"] == []
    assert no_prediction("tiny 1", drawn=False) == {"model_version": "tiny 1"}


@pytest.mark.parametrize("kind", ["brush", "polygonlabels"])
def test_an_empty_mask_is_no_region(kind):
    assert answer(np.zeros(SIZE, bool), Output("o", "i", "image", kind, ("Nut",))) is None


def request(**parts):
    content = {"tasks": [{"data": {"photo": "https://example/a.png"}}], "label_config": CONFIG}
    return json.dumps({**content, **parts}).encode()


def test_a_request_keeps_its_pictures_whatever_their_size():
    large = "data:image/png;base64," + "A" * 9 * 2**20
    tasks = [{"data": {"photo": large, "n": 1}}, {"data": {"photo": "data:,b"}, "annotations": []}]
    asked = read_prediction_request(request(tasks=tasks))
    assert [task.data for task in asked.tasks] == [task["data"] for task in tasks]
    assert asked.label_config == CONFIG
    assert asked.regions() == []


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"{", "bad_request", "not JSON"),
        (b"[]", "invalid_request", "request: "),
        (request(tasks=[]), "invalid_request", "tasks: "),
        (request(tasks=[1, {"data": 2}]), "invalid_request", "tasks[0]: "),
        (request(tasks=[1] * 1001), "invalid_request", "tasks: has 1001 items; at most 1000"),
        (
            request(params={"context": {"result": [1] * 1001}}),
            "invalid_request",
            "params.context.result: has 1001 items; at most 1000",
        ),
        (request(tasks=[[1] * 5 * 2**20]), "too_large", "at most 8388608"),
    ],
)
def test_a_request_beyond_the_limits_is_refused(body, code, message):
    with pytest.raises(ApiError) as caught:
        read_prediction_request(body)
    assert caught.value.code == code
    assert message in caught.value.message
    assert len(caught.value.message) < 1000


def test_millions_of_wrong_items_take_no_memory():
    """2 MiB of them took 1.6 GB and 18 s."""
    body = b'{"label_config": "", "tasks": [' + b",".join([b"1"] * 2**20) + b"]}"
    tracemalloc.start()
    with pytest.raises(ApiError):
        read_prediction_request(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_what_a_config_holds_is_not_repeated_at_length():
    for config in (
        CONFIG.replace("$photo", "k" * 100_000),
        CONFIG.replace("$photo", "$" + "k" * 100_000),
        CONFIG.replace('"picture"', f'"{"p" * 100_000}"').replace("$photo", "photo"),
    ):
        with pytest.raises(ApiError) as caught:
            read_output(config)
        assert len(caught.value.message) < 500
