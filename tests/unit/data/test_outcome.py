"""Outcomes: datasets prepared earlier stay current only if their JSON reads back as it was."""

import json
from dataclasses import asdict

from samray.data.outcome import FileWarning, Outcome, PreparedImage, Rejection

FULL = Outcome(
    entry="a/1.json",
    stamp="120 1700000000",
    image_path="../1.tif",
    found="a/1.tif",
    not_found=None,
    image_stamp="4000 1700000001",
    annotation="a/1.json",
    claims="a/1.tif",
    image=PreparedImage(
        name="a/1.tif",
        image_digest="ab" * 32,
        num_instances=3,
        instances_digest="cd" * 32,
        tiles=["a/1.tif@0,0.png"],
        num_cut=1,
        stretch=(12.0, 4095.5),
        fingerprint="f4E=",
    ),
    num_shapes=6,
    labels={"nut": 2, "bolt": 1},
    filtered={"dust": 1},
    joined=1,
    not_instances={"line": 1},
    rejected=[Rejection("a/1.json", "shapes[5].points", "covers no pixel", 1)],
    warnings=[FileWarning("a/1.json", "group_id", "joins 5 of 6 shapes")],
)
# As the first release with `dataset.FORMAT` 3 wrote it; the order counts, too.
KEYS = [
    "entry", "stamp", "image_path", "found", "not_found", "image_stamp", "annotation", "claims",
    "image", "num_shapes", "labels", "filtered", "joined", "not_instances", "rejected", "warnings",
]  # fmt: skip
IMAGE_KEYS = [
    "name", "image_digest", "num_instances", "instances_digest", "tiles", "num_cut", "stretch",
    "fingerprint",
]  # fmt: skip


def test_a_stored_outcome_reads_back_equal():
    rejected = Outcome("2.json", "7 8", not_found="no image", annotation="2.json")
    plain = Outcome("3.png", "9 10", image=PreparedImage("3.png", "ef" * 32, 0, "01" * 32))
    for outcome in (FULL, rejected, plain):
        again = Outcome.from_json(json.loads(json.dumps(asdict(outcome))))
        assert again == outcome
        assert json.dumps(asdict(again)) == json.dumps(asdict(outcome))


def test_the_keys_of_the_stored_json_are_those_of_format_3():
    stored = asdict(FULL)
    assert list(stored) == KEYS
    assert list(stored["image"]) == IMAGE_KEYS
    assert [list(item) for item in stored["rejected"]] == [
        ["file", "field", "reason", "num_shapes"]
    ]
    assert [list(item) for item in stored["warnings"]] == [["file", "field", "reason"]]
