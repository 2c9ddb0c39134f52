"""The dataset report: figures equal hand-counted ones, and no label is executed."""

import io
import json
import re
from dataclasses import asdict, replace

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from samray.config import load_config
from samray.data.dataset import FORMAT, SCHEMA, SPLITS, ImageRecord, Instance
from samray.data.outcome import PreparedImage
from samray.data.splits import SplitRule
from samray.errors import ConfigError, DatasetError
from samray.geometry.masks import CroppedMask, encode_rle
from samray.inspection.problems import find_notes
from samray.inspection.report import INSTANCE, report

HOSTILE = "<script>alert(1)</script>"


def photo(seed, size, quality=None):
    """Soft blobs as a file: PNG, or JPEG of a quality."""
    cells = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(cells).resize(size[::-1], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if quality else "PNG", quality=quality or 0)
    return buffer.getvalue()


def rectangle(x1, y1, x2, y2, size):
    mask = np.zeros(size, dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def write_dataset(folder, images, **manifest):
    """Write what `samray prepare` would.

    Args:
        images: (name, split or None, file, (H, W), [(label, mask of H x W), ...]) each.
        manifest: entries that differ from those of a dataset without problems.
    """
    rows = []
    for name, split, file, size, instances in images:
        masks = [CroppedMask(mask, (0, 0)) for _, mask in instances]
        row = {"name": name, "source": name, "annotation": split and f"{name}.json", "image": file}
        row |= {"image_digest": str(hash(file)), "height": size[0], "width": size[1]}
        row["instances"] = [
            {
                "label": label,
                "box": mask.box,
                "area": int(mask.pixels.sum()),
                "rle": encode_rle(mask, size),
            }
            for (label, _), mask in zip(instances, masks, strict=True)
        ]
        rows.append(row)
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / "data" / "part-00000.parquet")
    content = {
        "format": FORMAT,
        "num_shapes": sum(len(image[4]) for image in images),
        "filtered": {},
        "not_instances": {},
        "splits": {s: sorted(i[0] for i in images if i[1] == s) for s in SPLITS},
        "unlabelled": [i[0] for i in images if i[1] is None],
        "empty": [i[0] for i in images if i[1] and not i[4]],
        "rejected": [],
        "warnings": [],
        "dropped_annotations": [],
        "shards": ["data/part-00000.parquet"],
        "digest": "0" * 64,
    }
    (folder / "manifest.json").write_text(json.dumps(content | manifest))
    return folder


def reported(dataset, output, *words):
    words = [f"inspect.data_dir={dataset}", f"inspect.output_dir={output}", *words]
    facts = report(load_config(None, ["inspect.report=true", *words]))
    assert facts == json.loads((output / "report.json").read_text())
    return facts, (output / "report.html").read_text()


def kinds_of(facts):
    return {kind["title"]: kind for kind in facts["problems"]}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    """Four photos of 100 x 200 pixels, five instances, one hostile label."""
    size = (100, 200)
    triangle = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(triangle, [np.array([[60, 60], [120, 60], [90, 95]])], 1)
    ell = rectangle(150, 10, 190, 20, size) | rectangle(150, 10, 160, 50, size)
    images = [
        ("a/1.png", "train", photo(1, size), size, [("nut", rectangle(10, 20, 50, 40, size))]),
        (
            "a/2.png",
            "train",
            photo(2, size),
            size,
            [
                ("nut", rectangle(0, 0, 30, 90, size)),
                ("nut", rectangle(1, 0, 30, 90, size)),
                (HOSTILE, triangle.astype(bool)),
            ],
        ),
        ("b/3.png", "val", photo(3, size), size, [("Nut ", ell)]),
        ("b/4.png", "test", photo(4, size), size, []),
        ("b/5.png", None, photo(5, size), size, []),
    ]
    folder = write_dataset(
        tmp_path_factory.mktemp("small") / "prepared",
        images,
        filtered={"dust": 7},
        not_instances={"line": 2},
        num_shapes=5 + 3,
        rejected=[
            {"file": "x.json", "field": "file", "reason": "is not JSON: line 1", "num_shapes": 0},
            {
                "file": "y.json",
                "field": "shapes[2].points",
                "reason": "('once more') is a polygon of 2; it needs at least 3",
                "num_shapes": 3,
            },
            {"file": "z.json", "field": "novel", "reason": "is new to all", "num_shapes": 0},
        ],
        warnings=[
            {
                "file": "a/2.png.json",
                "field": "shapes[0].points",
                "reason": "reach 9 pixels out of the image; cut off there",
            }
        ],
    )
    return reported(folder, tmp_path_factory.mktemp("small") / "out")


def test_counts_and_splits_are_those_of_the_files(small_set):
    facts, _ = small_set
    assert facts["counts"] == {
        "images": 5,
        "annotated images": 4,
        "images with instances": 3,
        "instances": 5,
        "labels": 3,
        "images without annotation": 1,
        "annotated as empty": 1,
        "shapes in the raw files": 8,
        "rejected items": 3,
        "shapes in rejected items": 3,
        "warnings": 1,
    }
    rows = [tuple(row.values()) for row in facts["splits"]]
    assert rows == [("train", 2, 2, 4), ("val", 1, 1, 1), ("test", 1, 0, 0)]
    assert facts["image_sizes"] == [{"width": 200, "height": 100, "images": 5}]
    assert facts["near_duplicates"] == []
    assert facts["leaks"] == 0


def test_labels_have_their_sizes(small_set):
    facts, _ = small_set
    labels = {label["label"]: label for label in facts["labels"]}
    nut = labels["nut"]
    assert (nut["instances"], nut["images"]) == (3, 2)
    assert nut["splits"] == {"train": 3, "val": 0, "test": 0}
    assert nut["median_area"] == 29 * 90  # of 40 x 20, 30 x 90 and 29 x 90
    assert nut["median_share_of_image"] == 29 * 90 / 20_000
    assert nut["median_short_side"] == 29
    assert [place["box"] for place in nut["samples"]] == [
        [10, 20, 50, 40],
        [1, 0, 30, 90],
        [0, 0, 30, 90],
    ]
    assert labels["Nut "]["splits"] == {"train": 0, "val": 1, "test": 0}


def test_histograms_add_up_and_have_the_right_values(small_set):
    facts, _ = small_set
    per_image = facts["instances_per_image"]
    assert per_image["histogram"]["bins"] == ["0", "1", "2", "3"]
    assert per_image["histogram"]["counts"] == [1, 2, 0, 1]
    area = facts["area"]
    assert (area["min"], area["max"]) == (400 + 300, 2700)
    assert area["histogram"]["edges"] == [512, 1024, 2048, 4096]
    triangle = sum(area["histogram"]["counts"]) - 4
    assert triangle == 1
    vertices = facts["vertices"]["histogram"]  # triangle 3, rectangles 4, the L 6
    assert (facts["vertices"]["min"], facts["vertices"]["max"]) == (3, 6)
    assert vertices["counts"] == [1, 3, 0, 1]
    for spread in facts["short_side"].values():
        assert sum(spread["histogram"]["counts"]) == 5


def test_a_histogram_of_a_wide_range_starts_at_zero(tmp_path):
    """Images with 0, 1, 2, 3 and 30 instances; 0 has a bin of its own."""
    size = (64, 64)
    images = [
        (f"{n}.png", "train", photo(n, size), size, [("dot", rectangle(i, 0, i + 2, 9, size))] * n)
        for i, n in enumerate((0, 1, 2, 3, 30))
    ]
    facts, _ = reported(write_dataset(tmp_path / "p", images), tmp_path / "out")
    histogram = facts["instances_per_image"]["histogram"]
    assert histogram["edges"] == [0, 1, 2, 4, 8, 16, 32]
    assert histogram["bins"] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    assert histogram["counts"] == [1, 1, 2, 0, 0, 1]


def test_each_problem_is_in_its_kind_with_what_to_do(small_set):
    facts, html = small_set
    kinds = kinds_of(facts)
    files = {title: [item["file"] for item in kind["items"]] for title, kind in kinds.items()}
    assert files["Files that cannot be read as annotations"] == ["x.json"]
    assert files["Shapes of too few points"] == ["y.json"]  # whatever words the label has
    assert files["Other problems"] == ["z.json"]
    assert files["Shapes that extend beyond the image"] == ["a/2.png.json"]
    assert files["Images annotated as empty"] == ["b/4.png"]
    assert files["Images without annotation"] == ["b/5.png"]
    assert files["Objects that are probably outlined twice"] == ["a/2.png"]
    spelling = kinds["Labels that differ in spelling only"]["items"]
    assert [item["field"] for item in spelling] == ["label Nut  / nut"]
    absent = kinds["Labels missing from the train split"]["items"]
    assert [item["field"] for item in absent] == ["label Nut "]
    assert "7 shapes left out" in kinds["Shapes left out by label"]["items"][0]["reason"]
    assert "2 of type line" in kinds["Shapes that cover no area"]["items"][0]["reason"]
    assert facts["num_problems"] == 4  # three rejected, one warning; notes do not count
    levels = {kind["title"]: kind["level"] for kind in facts["problems"]}
    assert levels["Shapes that extend beyond the image"] == "warning"
    assert all(kind["fix"] in html for kind in kinds.values() if "{" not in kind["fix"])


def test_the_outliers_are_the_extreme_instances(small_set):
    facts, html = small_set
    oddest = {
        kind["kind"]: [
            (place["image"], place["instance"], place["why"]) for place in kind["instances"]
        ]
        for kind in facts["oddest"]
    }
    assert oddest["smallest"][0] == ("b/3.png", 0, "700 pixels")
    assert oddest["largest"][0] == ("a/2.png", 0, "13.5% of the image")
    assert oddest["vertices"][0] == ("b/3.png", 0, "6 corners")
    # 90 pixels on the left, 30 on top; the one beside it touches the top only
    assert [place[2] for place in oddest["border"]] == [
        "120 pixels on the border",
        "29 pixels on the border",
    ]
    assert [place[:2] for place in oddest["overlapping"]] == [("a/2.png", 0)]  # a pair once
    assert "IoU 0.97" in oddest["overlapping"][0][2]  # 29 / 30
    pictures = re.findall(r'<img src="([^"]+)" alt="nut in a/2.png"><figcaption>', html)
    assert len(set(pictures)) == 3  # instance 0 alone, 1 alone, and 0 with the one it overlaps
    assert oddest["elongated"][0][:2] in (("a/2.png", 0), ("a/2.png", 1))


def test_a_label_or_file_name_is_text_and_the_page_needs_no_network(small_set):
    _, html = small_set
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3  # table, crops, oddest
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(html) < 1_000_000


@pytest.mark.parametrize("forms", [(None, None), (None, 40)], ids=["same file", "re-compressed"])
def test_a_leak_across_splits_is_found_and_corrected(forms, tmp_path):
    size = (120, 160)
    one = [("nut", rectangle(10, 10, 50, 50, size))]
    images = [
        (f"{folder}/{seed}.png", split, photo(seed, size, form), size, one)
        for folder, seed, split, form in (
            ("a", 1, "train", forms[0]),
            ("a", 2, "train", None),
            ("a", 3, "val", None),
            ("a", 4, "test", None),
            ("b", 1, "test", forms[1]),  # the photo a/1.png
            ("b", 5, None, None),
            ("c", 5, None, 60),  # in no split: no leak
            ("c", 3, "val", 60),  # in one split: no leak
        )
    ]
    _, warnings = real_warnings(images)
    dataset = write_dataset(tmp_path / "prepared", images, warnings=warnings)
    assert len(warnings) == (forms == (None, None))
    facts, html = reported(dataset, tmp_path / "out")
    groups = [
        ([i["image"] for i in group["images"]], group["in_different_splits"], group["same_file"])
        for group in facts["near_duplicates"]
    ]
    assert groups == [
        (["a/1.png", "b/1.png"], True, forms[0] == forms[1]),
        (["a/3.png", "c/3.png"], False, False),
        (["b/5.png", "c/5.png"], False, False),
    ]
    assert all(group["across_folders"] for group in facts["near_duplicates"])
    assert facts["leaks"] == facts["num_problems"] == 1  # identical files are reported once
    assert "problem: in different splits" in html
    mended = json.loads((tmp_path / "out" / "splits.json").read_text())
    assert mended == {
        "train": ["a/1.png", "a/2.png", "b/1.png"],
        "val": ["a/3.png", "c/3.png"],
        "test": ["a/4.png"],
    }
    settings = [f"prepare.split_file={tmp_path / 'out' / 'splits.json'}"]
    splits, warnings = real_warnings(images, *settings)
    assert splits == mended
    assert warnings == []


def test_a_leak_that_only_prepare_sees_stays_in_the_report(tmp_path):
    """Of photos that are nearly the same, whose tiles are not."""
    size = (120, 160)
    one = [("nut", rectangle(10, 10, 50, 50, size))]
    images = [
        (f"{seed}.png", split, photo(seed, size), size, one)
        for seed, split in ((1, "train"), (2, "val"), (3, "test"))
    ]
    reason = "(train) is nearly the same photo as 2.png (val)"
    warnings = [{"file": "1.png", "field": "image", "reason": reason}]
    dataset = write_dataset(tmp_path / "prepared", images, warnings=warnings)
    facts, html = reported(dataset, tmp_path / "out")
    assert (facts["leaks"], facts["num_problems"]) == (0, 1)
    (problem,) = [kind for kind in facts["problems"] if kind["level"] == "problem"]
    assert problem["title"] == "Nearly the same image in different splits"
    assert problem["items"][0]["file"] == "1.png"
    assert problem["title"] in html


def real_warnings(images, *words):
    """The splits of `samray prepare`, and its warnings about one image in two splits."""
    if not words:
        rule = SplitRule(load_config(None).prepare)
        rule.listed = {name: split for name, split, *_ in images if split}
    else:
        rule = SplitRule(load_config(None, list(words)).prepare)
    splits = rule.assign(
        [
            PreparedImage(name, str(hash(file)), num_instances=1, instances_digest="")
            for name, split, file, *_ in images
            if split
        ]
    )
    return splits.members, [asdict(warning) for warning in splits.warnings]


def test_a_tile_is_recommended_that_brings_small_objects_to_16_pixels(tmp_path):
    """In 1000 x 2048 pixels, vit halves and tiny takes an eighth."""
    size = (1000, 2048)
    boxes = [(x, 20, x + 24, 52) for x in range(20, 1020, 100)]  # 24 wide: 12 to vit, 3 to tiny
    boxes += [(x, 200, x + 200, 330) for x in range(20, 1520, 300)]  # 130 high: 65 and 16.25
    instances = [("nut", rectangle(*box, size)) for box in boxes]
    dataset = write_dataset(tmp_path / "p", [("1.png", "train", photo(1, size), size, instances)])
    facts, html = reported(dataset, tmp_path / "out")
    vit, tiny = facts["resolution"]["vit"], facts["resolution"]["tiny"]
    assert (vit["side"], vit["small"], vit["share"]) == (1024, 10, 10 / 15)
    assert vit["tile"] == 24 * 1024 // 16
    assert vit["reaches"] == 16
    assert vit["overlap"] == 32  # the longer side of the small ones
    assert vit["tiles"] == 1 * 2  # 1536 covers the height; 2048 takes two
    assert (vit["still_small"], vit["longer_than_tile"]) == (0, 0)
    assert (tiny["side"], tiny["small"], tiny["tile"]) == (256, 10, 24 * 256 // 16)
    assert "--tile 1536 --overlap 32" in html
    small = facts["short_side"]["vit"]["histogram"]
    below = [n for n, edge in zip(small["counts"], small["edges"][1:], strict=True) if edge <= 16]
    assert sum(below) == 10


def test_no_tile_is_recommended_that_would_cut_what_it_enlarges(tmp_path):
    """Long thin objects: the tile is twice their length, and the page says how large they get."""
    size = (1024, 1024)
    instances = [("fibre", rectangle(10, y, 310, y + 4, size)) for y in range(10, 310, 30)]
    dataset = write_dataset(tmp_path / "p", [("1.png", "train", photo(1, size), size, instances)])
    facts, html = reported(dataset, tmp_path / "out")
    vit = facts["resolution"]["vit"]
    assert (vit["tile"], vit["overlap"]) == (600, 300)
    assert vit["reaches"] == pytest.approx(4 * 1024 / 600)
    assert vit["still_small"] == 10
    assert "still under 16" in html


@pytest.mark.parametrize(
    ("side", "short", "tile"),
    [(300, 4, 64), (300, 3, None), (64, 1, None)],  # what helps most is 64, 48 and 16 for tiny
)
def test_no_tile_is_recommended_that_prepare_refuses(side, short, tile, tmp_path):
    size = (side, side)
    boxes = [(x, 10, x + short, 10 + short) for x in range(5, 55, 10)]
    instances = [("dot", rectangle(*box, size)) for box in boxes]
    dataset = write_dataset(tmp_path / "p", [("1.png", "train", photo(1, size), size, instances)])
    facts, html = reported(dataset, tmp_path / "out")
    tiny = facts["resolution"]["tiny"]
    assert (tiny["small"], tiny["tile"]) == (5, tile)
    assert ("tiles of 64 pixels, the least" in html) == (tile is None)


def test_a_tile_of_the_least_size_is_recommended_where_it_brings_some_to_16_pixels(tmp_path):
    size = (300, 300)
    boxes = [(x, 10, x + s, 10 + s) for x, s in ((5, 2), (25, 2), (45, 6), (65, 6))]
    instances = [("dot", rectangle(*box, size)) for box in boxes]
    dataset = write_dataset(tmp_path / "p", [("1.png", "train", photo(1, size), size, instances)])
    facts, html = reported(dataset, tmp_path / "out")
    tiny = facts["resolution"]["tiny"]
    assert (tiny["tile"], tiny["small"], tiny["still_small"]) == (64, 4, 2)
    assert "there are no smaller tiles" in html


def test_large_objects_need_no_tile(tmp_path):
    size = (256, 256)
    instances = [("nut", rectangle(10, 10, 100, 100, size))]
    dataset = write_dataset(tmp_path / "p", [("1.png", "train", photo(1, size), size, instances)])
    facts, html = reported(dataset, tmp_path / "out")
    assert all(seen["tile"] is None for seen in facts["resolution"].values())
    assert "--tile" not in html
    assert "no tiles are needed" in html


def test_strict_fails_once_the_report_is_written(tmp_path, run_cli):
    size = (64, 64)
    image = ("1.png", "train", photo(1, size), size, [("nut", rectangle(5, 5, 40, 40, size))])
    bad = {
        "file": "1.json",
        "field": "shapes[0].label",
        "reason": "must be a text",
        "num_shapes": 1,
    }
    for name, entries, status in (("clean", {}, 0), ("bad", {"rejected": [bad]}, 2)):
        dataset = write_dataset(tmp_path / name, [image], **entries)
        words = ["inspect", "--data-dir", dataset, "--output-dir", tmp_path / f"{name}_out"]
        assert run_cli(*words, "--report")[0] == 0
        (tmp_path / f"{name}_out" / "report.html").unlink()
        found, _, err = run_cli(*words, "--report", "--strict")
        assert found == status, err
        assert ("1 problems" in err and "1 x Shapes without a usable label" in err) == bool(status)
        for file in ("report.html", "report.json"):
            assert (tmp_path / f"{name}_out" / file).is_file()
    with pytest.raises(ConfigError, match="--report"):
        load_config(None, ["inspect.strict=true"])


def test_without_report_inspect_draws_pictures(tmp_path, run_cli):
    size = (64, 64)
    image = ("1.png", "train", photo(1, size), size, [("nut", rectangle(5, 5, 40, 40, size))])
    words = ["inspect", "--data-dir", write_dataset(tmp_path / "p", [image])]
    status, _, err = run_cli(*words, "--output-dir", tmp_path / "out")
    assert status == 0, err
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["000_1_center.jpg", "prompts.json"]


def test_a_damaged_shard_is_named(tmp_path):
    size = (64, 64)
    image = ("1.png", "train", b"no image", size, [("nut", rectangle(5, 5, 40, 40, size))])
    dataset = write_dataset(tmp_path / "p", [image])
    with pytest.raises(DatasetError, match=r"1\.png cannot be decoded.*prepare the dataset again"):
        reported(dataset, tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


def photos_of_dots(*numbers, labels=("dot",), size=(60, 60)):
    """A record per number, with so many dots of alternating labels."""
    records = []
    for place, number in enumerate(numbers):
        dots = [
            CroppedMask(np.ones((2, 2), bool), (3 * n % 57, 3 * (n // 19))) for n in range(number)
        ]
        instances = tuple(
            Instance(labels[n % len(labels)], dot.box, 4, encode_rle(dot, size))
            for n, dot in enumerate(dots)
        )
        records.append(ImageRecord(f"{place}.png", f"{place}.png", "0", size, instances, 0, 0))
    return records


def partial_notes(records):
    manifest = {"not_instances": {}, "empty": [], "unlabelled": [], "filtered": {}}
    notes = find_notes(manifest, records, np.zeros(0, INSTANCE), [])
    found = [note for note in notes if note["title"].startswith("Photos where not every")]
    return [(i["file"] or i["field"], i["reason"]) for note in found for i in note["items"]]


def test_a_photo_with_far_fewer_objects_than_usual_is_named():
    records = photos_of_dots(20, 24, 30, 18, 4, 5, 22)
    assert partial_notes(records) == [
        ("4.png", "has 4 objects; of its size 20 are usual in this data")
    ]
    # With the rest of that photo ignored there is nothing to say; nor of few photos or objects.
    region = np.ones((60, 60), bool)
    region[:20, :40] = False
    marked = replace(records[4], ignored=encode_rle(CroppedMask(region, (0, 0)), (60, 60)))
    assert partial_notes([*records[:4], marked, *records[5:]]) == []
    assert partial_notes(records[1:5]) == []
    assert partial_notes(photos_of_dots(7, 7, 7, 7, 7, 1)) == []


def test_the_tiles_of_a_photo_are_one_photo():
    records = photos_of_dots(20, 20, 20, 20, 2, 38)
    tiles = [replace(record, source="large.png") for record in records[4:]]
    assert partial_notes(records[:4] + tiles) == []
    assert len(partial_notes(records)) == 1


def test_a_label_that_most_photos_lack_is_named():
    both = photos_of_dots(10, 12, labels=("dot", "ring"))
    others = photos_of_dots(*[10] * 5)
    others = [replace(record, source=f"other/{record.name}") for record in others]
    assert partial_notes(both + others) == [
        ("label ring", "is on 2 of 7 photos only, 6 times there")
    ]
