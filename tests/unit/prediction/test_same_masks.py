"""Every way to masks still gives the masks that it gave when `masks.json` was written.

The file was written before the five ways were made one, `samray.sam.decode.predict_masks`.
"""

import asyncio
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from samray.config import ServeConfig
from samray.data.sample_data import write_sample_data
from samray.evaluation.scoring import click_through
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask, decode_rle, encode_rle
from samray.geometry.prompts import Prompt, draw_prompt
from samray.prediction.predictor import Predictor
from samray.prediction.requests import PredictRequest, PromptRequest
from samray.prediction.segmentation import answer_prompts, find_everything
from samray.sam.embeddings import encode_image
from samray.sam.shipped import load_shipped
from samray.serving.catalogue import Call, ModelRef
from samray.serving.replicas import Decoder

EXPECTED = Path(__file__).with_name("masks.json")
GENERATOR = {
    "points_per_side": 8,
    "pred_iou_thresh": 0.4,
    "stability_score_thresh": 0.9,
    "min_mask_region_area": 20,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The masks of each case: {case: list of H x W bool}."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order differ in their last bits
    folder = write_sample_data(tmp_path_factory.mktemp("same") / "photos", 1, 0)
    image = decode_image(next((folder / "images").iterdir()).read_bytes())
    cases = masks_of(image)
    torch.set_num_threads(threads)
    return cases


def masks_of(image):
    sam = load_shipped().model().eval()
    size = image.shape[:2]
    height, width = size
    point = Prompt(np.array([[120, 80]], np.float32), np.array([1]))
    two_points = Prompt(np.array([[120, 80], [200, 300]], np.float32), np.array([1, 0]))
    box = Prompt(box=np.array([60, 60, 160, 170], np.float32))
    both = Prompt(point.point_coords, point.point_labels, box.box)
    predictor = Predictor(sam)
    predictor.set_image(image)
    cases = {
        "point": list(predictor.predict(point).masks),
        "point, one mask": list(predictor.predict(point, multimask_output=False).masks),
        "points": list(predictor.predict(two_points).masks),
        "box": list(predictor.predict(box).masks),
        "box and point": list(predictor.predict(both, multimask_output=True).masks),
    }
    rows, columns = np.indices(size)
    discs = [(80, 90, 30), (150, 120, 45), (60, 200, 20), (300, 200, 60)]
    objects = [(rows - y) ** 2 + (columns - x) ** 2 < radius**2 for y, x, radius in discs]
    rng = np.random.default_rng(0)
    first = [draw_prompt("random", mask, 1, rng) for mask in objects]
    embedding = encode_image(sam, image)
    clicked = click_through(sam, embedding, objects, first, 4)
    cases["clicks"] = [mask for answers in clicked for mask, _ in answers]
    wide = Prompt(box=np.array([20, 20, width - 20, height - 30], np.float32))
    cases["tiles"] = [predictor.predict_in_tiles(image, prompt, 160) for prompt in (wide, point)]
    cases["automatic masks"] = [
        whole(part.pixels, part.box, size) for part in find_everything(sam, image, GENERATOR)
    ]
    requests = [PromptRequest(point_coords=[(5 + 4 * n, 40.0)]) for n in range(70)]
    requests.append(PromptRequest(box=(60, 60, 160, 170), id="box"))
    parts, _ = answer_prompts(sam, image, requests)
    cases["file of prompts"] = [whole(part.pixels, part.box, size) for part in parts if part.area]
    cases["endpoint"] = endpoint_masks(sam, image, size)
    return cases


def endpoint_masks(sam, image, size):
    """Three prompts, then a correction of the first and the last answer beside a new prompt."""
    decoder = Decoder.func_or_class(ServeConfig(), None, None)
    ref = ModelRef("tiny", "1", None, "digest", "tiny")
    embedding = encode_image(sam, image).numpy().astype(np.float16)

    def ask(prompts, earlier):
        request = PredictRequest(prompts=prompts, mask_format="rle", min_area=9)
        call = Call("sha256:0", ref, request)
        answer = asyncio.run(decoder._decode(sam, embedding, size, call, request, earlier))
        results = answer["results"]
        return [mask for result in results for mask in result["masks"]]

    asked = [
        PromptRequest(point_coords=[(120, 80)]),
        PromptRequest(box=(60, 60, 160, 170)),
        PromptRequest(point_coords=[(120, 80), (200, 300)], point_labels=[1, 0]),
    ]
    answers = ask(asked, [None] * 3)
    tokens = [mask["mask_token"] for mask in (answers[0], answers[-1])]
    logits = [decoder.logits.get((token, "sha256:0", "digest")) for token in tokens]
    corrected = [
        PromptRequest(point_coords=[(120, 80), (60, 60)], point_labels=[1, 0]),
        PromptRequest(point_coords=[(40, 40)]),
        PromptRequest(box=(60, 60, 160, 170)),
    ]
    answers += ask(corrected, [logits[0], None, logits[1]])
    return [decode_rle(mask["rle"]["counts"].encode(), size) for mask in answers]


def whole(pixels, box, size):
    frame = np.zeros(size, dtype=bool)
    frame[box[1] : box[3], box[0] : box[2]] = pixels
    return frame


def digest_of_masks(masks):
    return hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in masks)).hexdigest()


EXPECTED_MASKS = json.loads(EXPECTED.read_text())


@pytest.mark.parametrize("case", EXPECTED_MASKS["cases"])
def test_the_masks_are_those_of_before(found, case):
    expected, size = EXPECTED_MASKS["cases"][case], tuple(EXPECTED_MASKS["size"])
    masks = found[case]
    assert len(masks) == len(expected["rle"])
    if digest_of_masks(masks) == expected["sha256"]:
        return
    # Another processor's kernels sum in another order, which may move a pixel of the outline.
    for mask, counts in zip(masks, expected["rle"], strict=True):
        differing = np.count_nonzero(mask != decode_rle(counts.encode(), size))
        assert differing <= 0.002 * mask.sum() + 2, case


def test_every_case_is_compared(found):
    assert found.keys() == EXPECTED_MASKS["cases"].keys()


def write_expected(path, image):
    """How `masks.json` was written."""
    size = image.shape[:2]
    cases = {
        case: {
            "sha256": digest_of_masks(masks),
            "rle": [encode_rle(CroppedMask(mask, (0, 0)), size).decode() for mask in masks],
        }
        for case, masks in masks_of(image).items()
    }
    path.write_text(json.dumps({"size": list(size), "cases": cases}, indent=1) + "\n")
