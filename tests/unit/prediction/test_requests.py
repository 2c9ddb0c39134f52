"""Requests that would take the process long are refused by their size, before they are parsed."""

import base64
import json
import time

import pytest

from samray.prediction.requests import (
    MAX_JSON_BYTES,
    MAX_KEYS,
    ApiError,
    PredictRequest,
    PromptRequest,
    read_request,
    require_json,
)

PROMPT = {"point_coords": [[1, 2]]}


def test_a_large_image_is_read_though_the_rest_must_be_small():
    content = base64.b64encode(bytes(3 * 2**20)).decode()
    document = {"prompts": [PROMPT], "image": {"base64": content}, "label": "nut"}
    asked = read_request(json.dumps(document), PredictRequest)
    assert asked.image.base64 == content
    assert (asked.label, len(asked.prompts)) == ("nut", 1)


def test_a_large_image_that_is_not_base64_is_told_so():
    document = {"prompts": [PROMPT], "image": {"base64": "*" * 2 * 2**20}}
    with pytest.raises(ApiError, match="not base64"):
        read_request(json.dumps(document), PredictRequest)


@pytest.mark.parametrize(
    "document",
    [
        {f"key{n}": n for n in range(200_000)},
        {"prompts": [PROMPT] * 100_000},
        {"prompts": [PROMPT], "image": {"base64": "AAAA"}, "label": "x" * 2 * 2**20},
        {"image": {"base64": "A" * 3 * 2**20}, **{f"key{n}": n for n in range(200_000)}},
    ],
)
def test_much_json_without_a_picture_is_refused_at_once(document):
    content = json.dumps(document).encode()
    assert len(content) > MAX_JSON_BYTES
    started = time.perf_counter()
    with pytest.raises(ApiError) as caught:
        read_request(content, PredictRequest)
    assert caught.value.code == "too_large"
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("place", ["request", "prompt", "image"])
def test_many_unknown_keys_are_one_mistake(place):
    surplus = {f"key{n}": n for n in range(MAX_KEYS + 1)}
    document = {"prompts": [dict(PROMPT)], "image": {"base64": "AAAA"}}
    target = {"request": document, "prompt": document["prompts"][0], "image": document["image"]}
    target[place].update(surplus)
    with pytest.raises(ApiError) as caught:
        read_request(json.dumps(document), PredictRequest)
    assert caught.value.code == "invalid_request"
    assert len(caught.value.message) < 500


def test_not_json_is_told_so():
    for content in (b"", b"[1", b"\xff", b"[" * 500_000):
        with pytest.raises(ApiError) as caught:
            read_request(content, PredictRequest)
        assert caught.value.code in ("bad_request", "invalid_request")


def test_json_must_be_declared_as_json():
    require_json("application/json")
    for content_type in ("text/plain", "", "application/x-www-form-urlencoded"):
        with pytest.raises(ApiError) as caught:
            require_json(content_type)
        assert caught.value.status == 415


@pytest.mark.parametrize(
    ("prompt", "multimask", "masks"),
    [
        (PROMPT, None, 3),
        (PROMPT, False, 1),
        ({**PROMPT, "mask_token": "t"}, None, 1),
        ({"box": (0, 0, 5, 5)}, None, 1),
        ({"box": (0, 0, 5, 5)}, True, 3),
        ({**PROMPT, "box": (0, 0, 5, 5)}, None, 1),
    ],
)
def test_masks_of_a_prompt_are_counted_as_the_decoder_makes_them(prompt, multimask, masks):
    document = {"prompts": [json.loads(json.dumps(prompt))], "multimask_output": multimask}
    asked = read_request(json.dumps(document), PredictRequest)
    assert asked.masks_of(PromptRequest.model_validate_json(json.dumps(prompt))) == masks


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"point_labels": [0, 0]}, "needs a foreground point (1 in point_labels) or a box"),
        ({"point_labels": [0, 1]}, None),
        ({"point_labels": [0, 0], "box": [0, 0, 5, 5]}, None),
        ({"point_labels": [0, 0], "mask_token": "t"}, None),
        ({"point_labels": [0]}, "it needs a label for each point"),
    ],
)
def test_background_points_alone_say_of_no_object_where_it_is(prompt, message):
    """The answer was an empty mask, and the command refused the same."""
    prompt = {"point_coords": [[1, 2], [3, 4]], **prompt}
    content = json.dumps({"prompts": [PROMPT, prompt]})
    if message is None:
        assert len(read_request(content, PredictRequest).prompts) == 2
        return
    with pytest.raises(ApiError) as caught:
        read_request(content, PredictRequest)
    assert (caught.value.status, caught.value.field) == (422, "prompts[1]")
    assert caught.value.message.endswith(message)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_id", "sha256:1", "image_id: should be an image_id as POST /v1/images answers"),
        (
            "image_name",
            "a/b.jpg",
            "image_name: should be a file name without / or \\, and without ",
        ),
        ("image_name", "a\nb.jpg", "without control characters"),
    ],
)
def test_no_message_shows_an_expression(field, value, message):
    with pytest.raises(ApiError) as caught:
        read_request(json.dumps({"prompts": [PROMPT], field: value}), PredictRequest)
    assert (caught.value.status, caught.value.field) == (422, field)
    assert message in caught.value.message
    assert "^" not in caught.value.message
