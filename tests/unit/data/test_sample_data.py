"""The drawn dataset: reproducible by seed, and its polygons are the visible objects."""

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from samray.data import sample_data
from samray.data.sample_data import _outlines, _render, draw_scene, write_sample_data
from samray.errors import ConfigError

SCENES = 20


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[str], list[dict[str, Any]]]]:
    """(label_map, labels, shapes) of the first scenes of seed 0."""
    return [(*_render(0, k)[1:], draw_scene(0, k)[1]) for k in range(SCENES)]


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fill(polygons: list[Any], size: tuple[int, ...]) -> np.ndarray:
    """The union of the polygons by samray's boundary rule: H x W bool."""
    canvas = np.zeros(size, dtype=np.uint8)
    for points in polygons:
        cv2.fillPoly(canvas, [np.floor(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def instances(shapes: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(label, polygons) of each object: alone, or all of one label and group_id."""
    groups: dict[Any, list[Any]] = defaultdict(list)
    for number, shape in enumerate(shapes):
        alone = shape["group_id"] is None
        key = ("alone", number) if alone else ("group", shape["group_id"])
        groups[(shape["label"], key)].append(shape["points"])
    return [(label, polygons) for (label, _), polygons in groups.items()]


def test_same_seed_and_index_draw_the_same_whatever_was_drawn_before() -> None:
    first, shapes = draw_scene(3, 5)
    draw_scene(3, 6)
    again, same_shapes = draw_scene(3, 5)
    assert np.array_equal(first, again)
    assert shapes == same_shapes
    assert first.dtype == np.uint8
    assert first.ndim == 3


def test_other_seeds_and_indices_draw_other_scenes() -> None:
    pictures = [draw_scene(seed, index)[0] for seed, index in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_shorter_run_is_a_prefix_of_a_longer_one(tmp_path: Path) -> None:
    short = files_of(write_sample_data(tmp_path / "short", 3, seed=7))
    long = files_of(write_sample_data(tmp_path / "long", 6, seed=7))
    assert len(short) == 3 * 2 + 1
    assert len(long) == 6 * 2 + 1
    assert {name: long[name] for name in short} == short


def test_many_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = files_of(write_sample_data(tmp_path / "alone", 5))
    monkeypatch.setattr(sample_data, "POOL_FROM", 2)
    monkeypatch.setattr(sample_data, "IMAGES_PER_TASK", 2)
    assert files_of(write_sample_data(tmp_path / "pool", 5)) == alone


def test_files_are_labelme_pairs(tmp_path: Path) -> None:
    folder = write_sample_data(tmp_path / "out", 2)
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        "sample_00000.jpg",
        "sample_00001.jpg",
    ]
    for json_path in sorted((folder / "annotations").iterdir()):
        document = json.loads(json_path.read_bytes())
        assert list(document) == [
            "version",
            "flags",
            "shapes",
            "imagePath",
            "imageData",
            "imageHeight",
            "imageWidth",
        ]
        assert (document["version"], document["flags"]) == ("5.5.0", {})
        assert document["imageData"] is None
        assert document["imagePath"] == f"../images/{json_path.stem}.jpg"
        image = cv2.imread(str(json_path.parent / document["imagePath"]))
        assert image is not None
        assert image.shape == (document["imageHeight"], document["imageWidth"], 3)
        for shape in document["shapes"]:
            assert list(shape) == ["label", "points", "group_id", "shape_type", "flags"]
            assert (shape["shape_type"], shape["flags"]) == ("polygon", {})


def test_jpeg_shows_the_drawn_colours(tmp_path: Path) -> None:
    folder = write_sample_data(tmp_path / "out", 1)
    stored = cv2.imread(str(folder / "images" / "sample_00000.jpg"), cv2.IMREAD_COLOR_RGB)
    assert stored is not None
    drawn, _ = draw_scene(0, 0)
    # Swapped channels would be far off, JPEG is not.
    assert np.abs(stored.astype(int) - drawn).mean() < 6


def test_points_lie_inside_the_image(scenes: Any) -> None:
    for label_map, _, shapes in scenes:
        height, width = label_map.shape
        for shape in shapes:
            points = np.array(shape["points"])
            assert len(points) >= 3
            assert (points >= 0).all()
            assert (points <= (width - 1, height - 1)).all()


def test_scenes_vary_and_have_several_objects_of_every_label(scenes: Any) -> None:
    counts = [len(labels) for _, labels, _ in scenes]
    assert min(counts) >= 3
    assert max(counts) <= 10
    assert np.mean(counts) >= 5
    labels = Counter(label for _, labels, _ in scenes for label in labels)
    assert set(labels) == {"pebble", "leaf", "ring"}
    assert min(labels.values()) >= SCENES
    shapes = [label_map.shape for label_map, _, _ in scenes]
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)
    assert max(max(shape) for shape in shapes) <= 512


def test_polygons_fill_the_visible_objects(scenes: Any) -> None:
    ious = []
    for label_map, labels, shapes in scenes:
        objects = instances(shapes)
        assert [label for label, _ in objects] == labels
        for number, (_, polygons) in enumerate(objects, start=1):
            seen, filled = label_map == number, fill(polygons, label_map.shape)
            ious.append((seen & filled).sum() / (seen | filled).sum())
    assert min(ious) >= 0.95
    assert np.mean(ious) >= 0.98


def test_objects_stand_out_from_what_is_around_them() -> None:
    steps = []
    for index in range(6):
        image, label_map, labels = _render(0, index)
        for number in range(1, len(labels) + 1):
            body = (label_map == number).astype(np.uint8)
            around = cv2.dilate(body, np.ones((9, 9), np.uint8)) - body
            inside, outside = (image[part > 0].mean(axis=0) for part in (body, around))
            steps.append(np.linalg.norm(inside - outside))
    assert np.median(steps) > 40  # of 441 from black to white


def test_holes_of_rings_survive_and_show_the_background(scenes: Any) -> None:
    """A ring's polygon leaves out nearly every pixel that its outer outline surrounds."""
    kept = []
    for label_map, labels, shapes in scenes:
        for number, (label, polygons) in enumerate(instances(shapes), start=1):
            ring = (label_map == number).astype(np.uint8)
            contours, _ = cv2.findContours(ring, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
            hole = fill([contour[:, 0] for contour in contours], ring.shape) & (ring == 0)
            if labels[number - 1] == label == "ring" and hole.sum() > 200:
                kept.append(1 - fill(polygons, ring.shape)[hole].mean())
    assert len(kept) >= 10
    assert min(kept) > 0.95


def test_keyhole_of_several_holes_fills_to_the_mask() -> None:
    mask = np.zeros((120, 160), dtype=bool)
    mask[10:110, 10:150] = True
    mask[30:50, 20:60] = mask[30:90, 80:100] = mask[60:100, 30:70] = mask[20:40, 120:140] = False
    (polygon,) = _outlines(mask)
    # The cuts lie on pixels of the object: only what TOLERANCE rounds off is lost.
    assert np.count_nonzero(fill([polygon], mask.shape) != mask) <= 4 * 4


def test_cut_to_a_hole_does_not_cross_another() -> None:
    """The middle hole lies inside a C-shaped one; the cut to it crosses the C's border."""
    holes = np.zeros((140, 140), dtype=np.uint8)
    cv2.ellipse(holes, (70, 70), (30, 30), 0, 0, 330, 1, 9)
    cv2.circle(holes, (70, 70), 10, 1, -1)
    disc = cv2.circle(np.zeros_like(holes), (70, 70), 60, 1, -1)
    (polygon,) = _outlines((disc - holes).astype(bool))
    inside_holes = cv2.erode(holes, np.ones((5, 5), np.uint8)).astype(bool)
    assert inside_holes.sum() > 500
    assert not fill([polygon], holes.shape)[inside_holes].any()


def test_some_leaves_are_concave(scenes: Any) -> None:
    """In a crescent, the middle of the visible outline's hull is not leaf."""
    solidity = []
    for label_map, labels, _ in scenes:
        for number, label in enumerate(labels, start=1):
            if label == "leaf":
                points = np.argwhere(label_map == number).astype(np.int32)
                solidity.append(len(points) / cv2.contourArea(cv2.convexHull(points)))
    assert sum(value < 0.62 for value in solidity) >= 8  # straight ones alone give five


def test_split_objects_share_a_group_and_whole_ones_have_none(scenes: Any) -> None:
    split = 0
    for _, _, shapes in scenes:
        groups = Counter((s["group_id"], s["label"]) for s in shapes if s["group_id"] is not None)
        assert all(type(group) is int for group, _ in groups)
        assert len({group for group, _ in groups}) == len(groups)  # no group of two labels
        assert all(parts >= 2 for parts in groups.values())
        split += len(groups)
    assert split >= 3


@pytest.mark.parametrize("number", [0, -4])
def test_refuses_to_draw_no_image(tmp_path: Path, number: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1, not {number}"):
        write_sample_data(tmp_path / "out", number)
    assert not (tmp_path / "out").exists()


def test_refuses_a_negative_seed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not -1"):
        write_sample_data(tmp_path / "out", 1, seed=-1)


def test_refuses_a_folder_with_other_files_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="new or empty"):
        write_sample_data(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_refuses_a_file_and_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for target in (file, file / "below"):
        with pytest.raises(ConfigError, match="choose another"):
            write_sample_data(target, 1)
    assert file.read_text() == "mine"


def test_refuses_a_folder_of_an_earlier_call_with_more_images(tmp_path: Path) -> None:
    """It said five images, and fifteen were there to be prepared."""
    before = files_of(write_sample_data(tmp_path, 3))
    with pytest.raises(ConfigError, match=r"2 images asked for; it holds 3 of .* another folder"):
        write_sample_data(tmp_path, 2)
    assert files_of(tmp_path) == before
    write_sample_data(tmp_path, 3)
    assert files_of(tmp_path) == before


def test_refuses_to_mix_seeds_or_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files_of(write_sample_data(tmp_path, 1, seed=1))
    with pytest.raises(ConfigError, match="seed 2"):
        write_sample_data(tmp_path, 1, seed=2)
    monkeypatch.setattr(sample_data, "VERSION", sample_data.VERSION + 1)
    with pytest.raises(ConfigError, match="version"):
        write_sample_data(tmp_path, 1, seed=1)
    assert files_of(tmp_path) == before


def test_continues_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files_of(write_sample_data(tmp_path / "whole", 4))
    replace, replaced = sample_data.os.replace, []

    def die_at_the_fifth(source: Path, target: Path) -> None:
        replaced.append(target)
        if len(replaced) == 5:
            raise KeyboardInterrupt
        replace(source, target)

    folder = tmp_path / "cut"
    monkeypatch.setattr(sample_data.os, "replace", die_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        write_sample_data(folder, 4)
    monkeypatch.undo()
    assert list(folder.rglob("*.tmp")), "the interruption should have left half a file"
    kept = folder / "images" / "sample_00000.jpg"
    modified = kept.stat().st_mtime_ns
    (folder / "images" / ".sample_00009.jpg.tmp").write_bytes(b"half")  # of another process
    write_sample_data(folder, 4)
    assert files_of(folder) == whole
    assert kept.stat().st_mtime_ns == modified


def test_a_gap_in_an_earlier_run_is_filled_and_a_longer_run_continues(tmp_path: Path) -> None:
    whole = files_of(write_sample_data(tmp_path / "whole", 4))
    folder = write_sample_data(tmp_path / "part", 3)
    (folder / "annotations" / "sample_00001.json").unlink()
    behind_the_gap = folder / "images" / "sample_00002.jpg"
    modified = behind_the_gap.stat().st_mtime_ns
    write_sample_data(folder, 4)
    assert files_of(folder) == whole
    assert behind_the_gap.stat().st_mtime_ns == modified


def test_empty_folder_is_accepted(tmp_path: Path) -> None:
    assert write_sample_data(str(tmp_path), 1) == tmp_path
    assert (tmp_path / ".samray-sample-data").read_text().splitlines()[-1] == "seed 0"
