"""Splits by hash, group or file: an image is in one split, and new images move no other."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samray.config import PrepareConfig
from samray.data.outcome import PreparedImage
from samray.data.splits import SplitRule, split_of_hash
from samray.errors import ConfigError, DatasetError
from samray.geometry.duplicates import pack


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def images(*names: str, num_instances: int = 1) -> list[PreparedImage]:
    return [PreparedImage(name, sha(name), num_instances, instances_digest="") for name in names]


def many(count: int) -> list[PreparedImage]:
    return images(*(f"{number:04d}.jpg" for number in range(count)))


def rule(**settings: Any) -> SplitRule:
    return SplitRule(PrepareConfig(**settings))


def from_file(folder: Path, content: Any, suffix: str = ".json", **settings: Any) -> SplitRule:
    path = folder / f"splits{suffix}"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return rule(split_file=str(path), **settings)


def where(splits: dict[str, list[str]]) -> dict[str, str]:
    return {name: split for split, names in splits.items() for name in names}


@pytest.mark.parametrize(
    ("start", "split"),
    [
        ("00000000", "val"),
        ("1fffffff", "val"),  # u is just below 1/8
        ("20000000", "test"),  # 1/8 itself
        ("3fffffff", "test"),
        ("5fffffff", "test"),
        ("60000000", "train"),  # 3/8 itself
        ("ffffffff", "train"),
    ],
)
def test_formula_is_exact_at_its_bounds(start: str, split: str) -> None:
    for rest in ("0" * 56, "f" * 56):  # only the first eight digits count
        assert split_of_hash(start + rest, 1 / 8, 1 / 4) == split


def test_formula_by_hand_on_known_hashes() -> None:
    """sha256("abc") is ba7816bf..., u = 0.7284; of "" e3b0c442..., u = 0.8894."""
    assert split_of_hash(sha("abc"), 0.2, 0.2) == "train"
    assert split_of_hash(sha("abc"), 0.2, 0.53) == "test"
    assert split_of_hash(sha("abc"), 0.73, 0.2) == "val"
    assert split_of_hash(sha(""), 0.73, 0.159) == "train"
    assert split_of_hash(sha(""), 0.73, 0.16) == "test"


def test_shares_come_out_as_asked_over_many_images() -> None:
    splits = rule(val_fraction=0.1, test_fraction=0.3).assign(many(3000)).members
    shares = {split: len(names) / 3000 for split, names in splits.items()}
    assert shares == pytest.approx({"train": 0.6, "val": 0.1, "test": 0.3}, abs=0.03)


def test_adding_images_moves_none_and_order_does_not_matter() -> None:
    few, more = many(40), many(200)
    before = where(rule().assign(few).members)
    after = where(rule().assign(more[::-1]).members)
    assert {name: after[name] for name in before} == before
    assert len(after) == 200


def test_same_photo_under_two_names_is_in_one_split() -> None:
    copies = [replace(image, name=f"copy/{image.name}") for image in many(60)]
    splits = rule().assign(many(60) + copies)
    found = where(splits.members)
    assert all(found[f"copy/{image.name}"] == found[image.name] for image in many(60))
    assert splits.warnings == []


def test_members_are_sorted_and_every_image_is_in_one_split() -> None:
    splits = rule().assign(many(60)[::-1]).members
    assert all(names == sorted(names) for names in splits.values())
    found = [name for names in splits.values() for name in names]
    assert sorted(found) == [image.name for image in many(60)]


def test_group_by_folder_keeps_folders_together() -> None:
    grouped = images(*(f"patient {p}/{n}.jpg" for p in range(40) for n in range(5)))
    splits = rule(group_by="folder").assign(grouped).members
    found = where(splits)
    for p in range(40):
        assert len({found[f"patient {p}/{n}.jpg"] for n in range(5)}) == 1
        assert found[f"patient {p}/0.jpg"] == split_of_hash(sha(f"patient {p}"), 0.2, 0.2)


@pytest.mark.parametrize(
    ("pattern", "group"), [(r"(patient\d+)_", "patient{}"), (r"patient\d+", "patient{}")]
)
def test_group_by_regex_keeps_groups_together_by_its_group_or_all_of_it(
    pattern: str, group: str
) -> None:
    grouped = images(*(f"{n}/patient{p}_{n}.jpg" for p in range(40) for n in range(5)))
    found = where(rule(group_by=pattern).assign(grouped).members)
    for p in range(40):
        expected = split_of_hash(sha(group.format(p)), 0.2, 0.2)
        assert {found[f"{n}/patient{p}_{n}.jpg"] for n in range(5)} == {expected}


@pytest.mark.parametrize("pattern", [r"patient(\d+)", r"(patient)?\d"])
def test_regex_that_finds_no_group_is_an_error_and_no_group_of_the_rest(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"--group-by: .* does not match other_1\.jpg"):
        rule(group_by=pattern).assign(images("patient1.jpg", "other_1.jpg"))


def test_pattern_that_is_no_regex_is_refused_before_any_work() -> None:
    with pytest.raises(ConfigError, match=r"--group-by: .* neither `folder` nor a regular"):
        rule(group_by="(patient")


SPLITS = {"train": ["x/a.jpg", "b.jpg"], "val": ["c.jpg"], "test": ["d.jpg"]}
CSV = "image,split\nx/a.jpg,train\nb.jpg , train\n\nc.jpg,val\nd.jpg,test\n"


@pytest.mark.parametrize(
    ("content", "suffix"),
    [(SPLITS, ".json"), (CSV, ".csv"), (CSV.partition("\n")[2], ".txt"), ("\ufeff" + CSV, ".csv")],
    ids=["json", "csv", "csv-without-header", "csv-from-a-spreadsheet"],
)
def test_split_file_wins_over_hash_and_group_by_path_or_file_name(
    tmp_path: Path, content: Any, suffix: str
) -> None:
    given = from_file(tmp_path, content, suffix, group_by="folder")
    names = images("x/a.jpg", "x/b.jpg", "x/c.jpg", "y/z/d.jpg")
    assert given.assign(names).members == {
        "train": ["x/a.jpg", "x/b.jpg"],
        "val": ["x/c.jpg"],
        "test": ["y/z/d.jpg"],
    }
    given.require_known(names, [])


def test_image_that_is_not_in_the_split_file_is_split_by_its_hash(tmp_path: Path) -> None:
    found = where(from_file(tmp_path, SPLITS).assign(many(30)).members)
    for image in many(30):
        assert found[image.name] == split_of_hash(image.image_digest, 0.2, 0.2)


def test_images_that_the_split_file_leaves_out_are_noted(tmp_path: Path) -> None:
    listed = many(6)
    names = [image.name for image in listed]
    given = from_file(tmp_path, {"train": names[:2], "val": names[2:3], "test": names[3:4]})
    notes = given.assign(listed).notes
    assert f"2 images are not in --split-file (the first: {names[4]}): they are split" in notes[0]
    whole = from_file(tmp_path, {"train": names[:4], "val": names[4:5], "test": names[5:]})
    assert whole.assign(listed).notes == []


def test_image_that_the_split_file_leaves_out_is_with_the_others_of_its_group(
    tmp_path: Path,
) -> None:
    """Its group's hash tore the group."""
    clips = in_folders(*(f"clip {number}" for number in range(30)))
    named = {"train": "clip 0/0.jpg", "val": "clip 1/0.jpg", "test": "clip 2/0.jpg"}
    file = {split: [name] for split, name in named.items()}
    file["train"].append("clip 3/0.jpg")
    file["test"].append("clip 3/1.jpg")
    splits = from_file(tmp_path, file, group_by="folder").assign(clips)
    found = where(splits.members)
    for split, name in named.items():
        assert {found[f"{name.removesuffix('0.jpg')}{n}.jpg"] for n in range(3)} == {split}
    for number in range(3, 30):
        assert found[f"clip {number}/2.jpg"] == split_of_hash(sha(f"clip {number}"), 0.2, 0.2)
    followed, torn, others = splits.notes
    assert followed.startswith("6 images are not in --split-file (the first: clip 0/1.jpg), but")
    assert "several splits (1 groups, the first: clip 3)" in torn
    assert others.startswith("79 images are not in --split-file (the first: clip 3/2.jpg)")


def test_image_that_the_split_file_names_needs_no_group(tmp_path: Path) -> None:
    file = {"train": ["a.jpg", "clip1_1.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    listed = images("a.jpg", "b.jpg", "c.jpg", "clip1_1.jpg", "clip1_2.jpg")
    members = from_file(tmp_path, file, group_by=r"clip\d").assign(listed).members
    assert members["train"] == ["a.jpg", "clip1_1.jpg", "clip1_2.jpg"]


def test_whole_path_wins_over_file_name(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"train": ["a.jpg"], "val": ["x/a.jpg"]}, test_fraction=0)
    members = given.assign(images("x/a.jpg", "y/a.jpg")).members
    assert members == {"train": ["y/a.jpg"], "val": ["x/a.jpg"], "test": []}


@pytest.mark.parametrize("is_rejected", [False, True])
def test_path_of_an_image_means_no_other_of_its_name(is_rejected: bool, tmp_path: Path) -> None:
    """Frames of every clip with that name went to the test split, where hashes were to decide."""
    others = images(*(f"clip {number}/w.jpg" for number in range(30)))
    own = images("w.jpg")
    given = from_file(tmp_path, {"test": ["w.jpg"]})
    given.require_known(others if is_rejected else others + own, ["w.jpg"])
    splits = given.assign(others if is_rejected else others + own)
    found = where(splits.members)
    for image in others:
        assert found[image.name] == split_of_hash(image.image_digest, 0.2, 0.2)
    assert "30 images are not in --split-file" in splits.notes[0]
    assert found.get("w.jpg") == (None if is_rejected else "test")


def test_file_name_of_several_images_is_refused(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"train": ["x/w.jpg", "a.jpg"], "test": ["w.jpg"]})
    with pytest.raises(ConfigError) as caught:
        given.assign(images("a.jpg", "x/w.jpg", "y/w.jpg", "z/w.jpg"))
    assert "w.jpg may be any of 2 images (y/w.jpg, z/w.jpg); write paths" in str(caught.value)
    assert str(caught.value).startswith("--split-file ")


@pytest.mark.parametrize(
    ("content", "suffix", "said"),
    [
        ({"training": ["a.jpg"]}, ".json", "puts a.jpg in 'training'; splits are train, val, test"),
        ("a.jpg,valid\n", ".csv", "puts a.jpg in 'valid'"),
        ({"train": ["a.jpg"], "val": ["a.jpg"]}, ".json", "puts a.jpg in train and in val"),
        ("a.jpg,train\na.jpg,test\n", ".csv", "puts a.jpg in train and in test"),
        ("a.jpg\n", ".csv", "CSV lines"),
        ("{", ".json", "must be JSON"),
        (["a.jpg"], ".json", "must be JSON"),
        ({"train": "a.jpg"}, ".json", "a list of image paths"),
        ({"train": [["a.jpg"]]}, ".json", "a list of image paths"),
        ({"train": [1]}, ".json", "a list of image paths"),
        ({"train": None}, ".json", "must be JSON"),
        (f"{'a' * 200_000},train\n", ".csv", "CSV lines"),
    ],
)
def test_invalid_split_file_is_refused(
    tmp_path: Path, content: Any, suffix: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_file(tmp_path, content, suffix)
    assert str(caught.value).startswith("--split-file: ")
    assert said in str(caught.value)


def test_missing_split_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--split-file: .*gone\.json"):
        rule(split_file=str(tmp_path / "gone.json"))


def test_split_file_with_unknown_images_is_refused_before_they_leak(tmp_path: Path) -> None:
    given = from_file(tmp_path, SPLITS)
    match = r"2 of its names match no annotated image.*the first: c\.jpg"
    with pytest.raises(ConfigError, match=match):
        given.require_known(images("x/a.jpg", "y/b.jpg"), [])


def test_split_file_may_name_images_whose_annotation_was_bad(tmp_path: Path) -> None:
    from_file(tmp_path, SPLITS).require_known(images("x/a.jpg", "b.jpg"), ["x/c.jpg", "d.jpg"])


def test_empty_split_names_the_remedies(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"train": ["a.jpg", "b.jpg"]})
    with pytest.raises(DatasetError) as caught:
        given.assign(images("a.jpg", "b.jpg"))
    message = str(caught.value)
    assert (
        "the val and test split would be empty (train 2, val 0, test 0 images with an object)"
        in message
    )
    assert "--split-file" in message
    assert "--group-by" in message


def test_split_of_background_images_only_counts_as_empty(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]})
    with pytest.raises(DatasetError, match="the test split would be empty"):
        given.assign(images("a.jpg", "b.jpg") + images("c.jpg", num_instances=0))


@pytest.mark.parametrize("val_fraction", [0.0, 0.5])
def test_fraction_of_zero_allows_an_empty_split(val_fraction: float) -> None:
    given = rule(val_fraction=val_fraction, test_fraction=0)
    splits = given.assign(many(30)).members
    assert splits["test"] == []
    assert (splits["val"] == []) == (val_fraction == 0)
    assert splits["train"]


def test_training_split_may_never_be_empty(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"val": ["a.jpg"]}, test_fraction=0)
    with pytest.raises(DatasetError, match="the train split would be empty"):
        given.assign(images("a.jpg"))


def test_same_photo_put_into_two_splits_by_file_is_warned_about(tmp_path: Path) -> None:
    given = from_file(tmp_path, {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["copy.jpg"]})
    listed = images("a.jpg", "b.jpg", "copy.jpg")
    listed[2].image_digest = listed[0].image_digest
    (warning,) = given.assign(listed).warnings
    assert warning.file == "copy.jpg"
    assert warning.reason == "is the same photo as a.jpg, but test and train have one each"


def in_folders(*folders: str, count: int = 3) -> list[PreparedImage]:
    return images(*(f"{folder}/{number}.jpg" for folder in folders for number in range(count)))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("Train", "VAL", "Test"),
        ("images/train", "images/validation", "images/test"),
        ("train/images", "valid/images", "test/images"),
        ("my set/train", "my set/val", "my set/test"),
        ("train2017", "val2017", "test2017"),
    ],
)
def test_folders_named_as_splits_are_the_splits(train: str, val: str, test: str) -> None:
    splits = rule().assign(in_folders(train, val, test))
    assert splits.by == "folders"
    expected = {"train": train, "val": val, "test": test}
    assert splits.members == {
        split: [f"{folder}/{number}.jpg" for number in range(3)]
        for split, folder in expected.items()
    }
    (note,) = splits.notes
    assert "are the splits (prepare.split_folders=false" in note
    assert splits.warnings == []


@pytest.mark.parametrize(
    "settings",
    [{"split_folders": False}, {"group_by": "folder"}, {"val_fraction": 0, "test_fraction": 0}],
    ids=str,
)
def test_folders_named_as_splits_are_overridden_by_settings(settings: dict[str, Any]) -> None:
    listed = in_folders("train", "valid", "test", count=30)
    splits = rule(**settings).assign(listed)
    assert splits.by in ("hashes", "groups", "order of hashes")
    assert len({n.split("/")[0] for n in splits.members["train"]} - {"train"}) > 0


def test_folders_named_as_splits_are_overridden_by_a_split_file(tmp_path: Path) -> None:
    listed = in_folders("train", "test", count=2)
    wanted = {
        "train": ["test/0.jpg"],
        "val": ["test/1.jpg"],
        "test": ["train/0.jpg", "train/1.jpg"],
    }
    assert from_file(tmp_path, wanted).assign(listed).members == wanted


def test_train_alone_is_a_folder_like_any_other() -> None:
    """A class of toy trains; or a test folder whose pictures are not annotated, as of contests."""
    for others in (in_folders("car", count=30), images("test/1.jpg", num_instances=0)):
        assert rule().assign(in_folders("train", count=30) + others).by == "hashes"


def test_missing_split_folder_leaves_the_split_empty_and_says_what_follows() -> None:
    splits = rule().assign(in_folders("train", "test"))
    assert splits.members["val"] == []
    assert splits.notes[1].startswith("val is empty, and `samray train` needs val photos")
    without_test = rule().assign(in_folders("train", "val"))
    assert "`samray evaluate` needs test photos" in without_test.notes[1]


def test_images_outside_of_the_split_folders_are_split_by_hash() -> None:
    more = many(60)
    splits = rule().assign(in_folders("train", "val") + more)
    found = where(splits.members)
    for image in more:
        assert found[image.name] == split_of_hash(image.image_digest, 0.2, 0.2)
    assert "60 images outside of them are split by hash" in splits.notes[0]


@pytest.mark.parametrize("count", [3, 4, 5, 7, 10, 19])
@pytest.mark.parametrize("salt", range(12))
def test_few_photos_fill_every_split(count: int, salt: int) -> None:
    few = images(*(f"{salt}/{number}.jpg" for number in range(count)))
    splits = rule().assign(few)
    sizes = {split: len(names) for split, names in splits.members.items()}
    assert min(sizes.values()) >= 1
    assert sum(sizes.values()) == count
    if splits.by == "order of hashes":
        share = max(1, int(count * 0.2))
        assert (sizes["val"], sizes["test"]) == (share, share)
        assert "filled in the order of the hashes" in splits.notes[0]
        ordered = sorted(few, key=lambda image: image.image_digest)
        assert splits.members["val"] == sorted(image.name for image in ordered[:share])
        assert rule().assign(few[::-1]).members == splits.members
    else:
        assert splits.notes == []
        hashed = {i.name: split_of_hash(i.image_digest, 0.2, 0.2) for i in few}
        assert where(splits.members) == hashed


def test_three_photos_fill_three_splits_of_any_shares() -> None:
    for val, test in ((0.01, 0.98), (0.45, 0.45), (0.98, 0.01), (0.3, 0.69)):
        members = rule(val_fraction=val, test_fraction=test).assign(many(3)).members
        assert [len(members[split]) for split in ("train", "val", "test")] == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_photos_are_all_trained_on(count: int) -> None:
    splits = rule().assign(many(count))
    assert len(splits.members["train"]) == count
    assert any("`samray train` needs val photos" in note for note in splits.notes)
    copies = [replace(many(1)[0], name=f"copy {number}.jpg") for number in range(5)]
    assert len(rule().assign(copies).members["train"]) == 5, "copies are one photo"


def test_few_groups_stay_together_and_too_few_are_refused() -> None:
    grouped = in_folders("a", "b", "c")
    found = where(rule(group_by="folder").assign(grouped).members)
    assert all(len({found[f"{folder}/{n}.jpg"] for n in range(3)}) == 1 for folder in "abc")
    assert {found[f"{folder}/0.jpg"] for folder in "abc"} == {"train", "val", "test"}
    with pytest.raises(DatasetError, match="other groups with --group-by"):
        rule(group_by="folder").assign(in_folders("a", count=9))


def test_near_duplicates_in_two_splits_are_warned_about(tmp_path: Path) -> None:
    cells = np.random.default_rng(0).normal(size=(3, 480))
    cells[2] = cells[0] + 0.1 * cells[1]  # nearly the first
    names = {"train": ["a.jpg"], "val": ["b.jpg"], "test": ["c.jpg"]}
    listed = images("a.jpg", "b.jpg", "c.jpg")
    for image, row in zip(listed, cells, strict=True):
        image.fingerprint = pack(row)
    splits = from_file(tmp_path, names).assign(listed)
    (warning,) = splits.warnings
    assert warning.file == "a.jpg"
    assert warning.reason == "(train) is nearly the same photo as c.jpg (test)"
    assert "1 groups of near-duplicate photos are in more than one split" in splits.notes[0]
    together = {"train": ["a.jpg", "c.jpg"], "val": ["b.jpg"]}
    settings = {"test_fraction": 0}
    assert from_file(tmp_path, together, **settings).assign(listed).warnings == []
