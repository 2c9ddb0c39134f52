"""`samray inspect --report`: what a prepared dataset holds, what is wrong with it, what to do.

`report` reads top-down: measure every instance once, add up the facts (report.json), draw the few
instances that are shown, and write one self-contained page (report.html).
"""

import sys
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from samray import __version__
from samray.charts import histogram_svg, jpeg_uri, render_page
from samray.config import MIN_TILE, Config, required
from samray.data.dataset import SPLITS, ImageRecord, PreparedDataset
from samray.errors import AnnotationError, DatasetError
from samray.geometry.drawing import cut_out, encode_picture, shrink
from samray.geometry.duplicates import fingerprint, near_duplicates
from samray.geometry.frames import points_to_input
from samray.geometry.images import decode_image
from samray.geometry.masks import CroppedMask, decode_crop, nearest_overlaps, outline_of
from samray.inspection.problems import find_notes, find_problems
from samray.sam.model import TINY_SIZE
from samray.storage import (
    Place,
    lock_folder,
    require_folder,
    resolve,
    write_bytes,
    write_json,
)

MODEL_SIDES = {"vit": 1024, "tiny": TINY_SIZE}  # the longest side of what a model sees, pixels
SMALL = 16  # shorter box sides, at the model's resolution, are one cell of its embedding or less
SMALL_SHARE = 0.05  # share of small instances from which tiles are worth their cost
SAMPLES, SAMPLE_SIDE = 6, 104  # crops a label, pixels
ODD, ODD_SIDE = 4, 250  # pictures a kind, pixels
LABELS_SHOWN, GROUPS_SHOWN, ITEMS_SHOWN = 30, 12, 50  # report.json has all

# One row per instance. `border` is its length along the image's border in pixels, `short_*` the
# shorter side of its box at the model's resolution, `partner` the instance of the same image that
# it overlaps most.
INSTANCE = np.dtype(
    [
        ("image", "i4"), ("number", "i4"), ("label", "i4"), ("area", "i8"), ("box", "f4", (4,)),
        ("vertices", "i4"), ("elongation", "f4"), ("border", "i8"), ("overlap", "f4"),
        ("partner", "i4"), ("short_vit", "f4"), ("short_tiny", "f4"),
    ]
)  # fmt: skip

# (key, title, what to check)
ODDEST = (
    ("smallest", "Smallest", "Drawn by mistake? Delete it. Real? See resolution and tiles."),
    ("largest", "Largest share of the image",
     "Background outlined instead of the object? Segment Anything drops masks above 90 %."),
    ("elongated", "Most elongated", "A line drawn as a polygon, or a sliver left by a cut?"),
    ("border", "Most cut off by the image's border",
     "Fine if the object continues outside; else the outline ran over the edge."),
    ("vertices", "Most corners", "A ragged outline of a brush or of another model?"),
    ("overlapping", "Most overlapping",
     "One object outlined twice? Delete one. An object on another one is fine."),
)  # fmt: skip


def report(config: Config) -> dict[str, Any]:
    """Write report.html and report.json on a prepared dataset.

    If nearly the same image is in different splits, splits.json beside them is a split file for
    `samray prepare` that corrects it, unless it would leave a split empty. One of an earlier report
    stays: the dataset may have been prepared with it.

    Args:
        config: its `inspect` section.

    Returns:
        The content of report.json.

    Raises:
        SamrayError: a folder or the dataset cannot be used.
        DatasetError: under `strict`, once everything is written: there is a problem.
    """
    settings = config.inspect
    data_dir, output_dir = required(config, "inspect.data_dir", "inspect.output_dir")
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    output = resolve(output_dir, "--output-dir")
    with lock_folder(output, "--output-dir"):  # the files of a report belong together
        facts = _write(dataset, output)
    if settings.strict and facts["num_problems"]:
        kinds = [kind for kind in facts["problems"] if kind["level"] != "note"]
        listed = "; ".join(f"{len(kind['items'])} x {kind['title']}" for kind in kinds)
        raise DatasetError(
            f"{facts['num_problems']} problems, and --strict allows none: {listed}; "
            f"{output / 'report.html'} lists them with what to do"
        )
    return facts


def _write(dataset: PreparedDataset, output: Place) -> dict[str, Any]:
    """Write the report; return the content of report.json."""
    records = list(dataset.images.values())
    names = sorted({instance.label for record in records for instance in record.instances})
    instances, fingerprints = _measure(dataset, records, names)
    facts = _facts(dataset, records, names, instances, fingerprints)
    html = _page(dataset, facts)
    splits = _splits_without_leaks(dataset, facts) if facts["leaks"] else {}
    emptied = [split for split in splits if dataset.manifest["splits"][split] and not splits[split]]
    if splits and not emptied:  # `prepare` refuses an empty split
        write_json(output / "splits.json", splits)
    write_json(output / "report.json", facts)
    write_bytes(output / "report.html", html.encode())
    return facts


def _measure(
    dataset: PreparedDataset, records: list[ImageRecord], names: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a row of INSTANCE for each instance, and the images' fingerprints, N x 480."""
    label_numbers = {label: number for number, label in enumerate(names)}
    rows, fingerprints = [], []
    bar = tqdm(records, desc="inspect", unit="img", file=sys.stderr, disable=None)
    for number, record in enumerate(bar):
        try:
            fingerprints.append(fingerprint(dataset.image_bytes(record)))
        except AnnotationError as exc:
            raise DatasetError(
                f"{dataset.folder}: the image of {record.name} {exc.reason}; the shard is damaged, "
                "prepare the dataset again"
            ) from exc
        measured = _measure_image(record, label_numbers)
        measured["image"] = number
        rows.append(measured)
    return np.concatenate(rows), np.stack(fingerprints)


def _measure_image(record: ImageRecord, label_numbers: dict[str, int]) -> np.ndarray:
    rows = np.zeros(record.num_instances, dtype=INSTANCE)
    if not len(rows):
        return rows
    rows["number"] = np.arange(len(rows))
    rows["label"] = [label_numbers[instance.label] for instance in record.instances]
    rows["area"] = [instance.area for instance in record.instances]
    rows["box"] = [instance.box for instance in record.instances]
    rles = [instance.rle for instance in record.instances]
    rows["overlap"], rows["partner"] = nearest_overlaps(rles, record.size)
    for model, side in MODEL_SIDES.items():
        corners = points_to_input(rows["box"].reshape(-1, 2, 2), record.size, side)
        rows[f"short_{model}"] = (corners[:, 1] - corners[:, 0]).min(axis=1)
    for row, instance in zip(rows, record.instances, strict=True):
        mask = decode_crop(instance.rle, record.size, instance.box)
        outline = outline_of(mask.pixels)
        row["vertices"] = sum(len(corners) for corners in outline)
        _, sides, _ = cv2.minAreaRect(np.concatenate(outline))
        row["elongation"] = (max(sides) + 1) / (min(sides) + 1)  # corners are pixels' centres
        row["border"] = _pixels_on_border(mask, record.size)
    return rows


def _pixels_on_border(mask: CroppedMask, size: tuple[int, int]) -> int:
    (x, y), (h, w) = mask.origin, mask.pixels.shape
    edges = (
        (y == 0, mask.pixels[0]),
        (x == 0, mask.pixels[:, 0]),
        (y + h == size[0], mask.pixels[-1]),
        (x + w == size[1], mask.pixels[:, -1]),
    )
    return sum(int(pixels.sum()) for touches, pixels in edges if touches)


def _facts(
    dataset: PreparedDataset,
    records: list[ImageRecord],
    names: list[str],
    instances: np.ndarray,
    fingerprints: np.ndarray,
) -> dict[str, Any]:
    """The content of report.json."""
    manifest = dataset.manifest
    splits = {image: split for split, images in manifest["splits"].items() for image in images}
    duplicates = _duplicates(records, splits, fingerprints)
    leaks = [group for group in duplicates if group["in_different_splits"]]
    resolution = {
        model: _resolution(instances, records, model, side) for model, side in MODEL_SIDES.items()
    }
    labels = _labels(records, names, instances, splits)
    sources = {record.name: record.source for record in records}
    leaking = {sources[image["image"]] for group in leaks for image in group["images"]}
    problems = find_problems(manifest, leaks, leaking)
    problems += find_notes(manifest, records, instances, labels)
    annotated = [record for record in records if record.name in splits]
    num_problems = sum(len(kind["items"]) for kind in problems if kind["level"] != "note")
    sizes = Counter(record.size for record in records)
    return {
        "samray_version": __version__,
        "dataset": str(dataset.folder),
        "dataset_digest": dataset.digest,
        "num_problems": num_problems,
        "counts": {
            "images": len(records),
            "annotated images": len(annotated),
            "images with instances": sum(bool(record.instances) for record in records),
            "instances": len(instances),
            "labels": len(names),
            "images without annotation": len(manifest["unlabelled"]),
            "annotated as empty": len(manifest["empty"]),
            "shapes in the raw files": manifest["num_shapes"],
            "rejected items": len(manifest["rejected"]),
            "shapes in rejected items": sum(r["num_shapes"] for r in manifest["rejected"]),
            "warnings": len(manifest["warnings"]),
        },
        "labels": labels,
        "image_sizes": [
            {"width": width, "height": height, "images": number}
            for (height, width), number in sizes.most_common()
        ],
        "instances_per_image": _spread(np.array([record.num_instances for record in annotated])),
        "vertices": _spread(instances["vertices"]),
        "area": _spread(instances["area"]),
        "short_side": {m: _spread(instances[f"short_{m}"], whole=False) for m in MODEL_SIDES},
        "resolution": resolution,
        "splits": _splits(manifest, records, instances),
        "near_duplicates": duplicates,
        "leaks": len(leaks),
        "problems": problems,
        "oddest": _oddest(records, instances),
    }


def _labels(
    records: list[ImageRecord],
    names: list[str],
    instances: np.ndarray,
    splits: dict[str, str],
) -> list[dict[str, Any]]:
    """One dict per label, the most frequent first; `samples` go from small to large."""
    split_of = np.array([splits.get(record.name, "") for record in records])
    pixels = np.array([record.size[0] * record.size[1] for record in records])
    order = np.argsort(instances["label"], kind="stable")
    parts = np.split(
        instances[order], np.searchsorted(instances["label"][order], range(len(names)))
    )
    labels = []
    for name, part in zip(names, parts[1:], strict=True):
        members = Counter(split_of[part["image"]].tolist())
        by_area = part[np.argsort(part["area"], kind="stable")]
        chosen = np.unique(np.linspace(0, len(part) - 1, SAMPLES).round().astype(int))
        box = part["box"]
        short = np.minimum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])
        labels.append(
            {
                "label": name,
                "instances": len(part),
                "images": len(np.unique(part["image"])),
                "splits": {split: members[split] for split in SPLITS},
                "median_area": float(np.median(part["area"])),
                "median_share_of_image": float(np.median(part["area"] / pixels[part["image"]])),
                "median_short_side": float(np.median(short)),
                "small": {m: int((part[f"short_{m}"] < SMALL).sum()) for m in MODEL_SIDES},
                "samples": [_place(records, row) for row in by_area[chosen]],
            }
        )
    return sorted(labels, key=lambda label: -label["instances"])


def _place(records: list[ImageRecord], row: np.void) -> dict[str, Any]:
    """Where an instance is, for the reader and for drawing it."""
    record = records[row["image"]]
    return {
        "image": record.name,
        "instance": int(row["number"]),
        "label": record.instances[row["number"]].label,
        "box": [int(v) for v in row["box"]],
    }


def _spread(values: np.ndarray, whole: bool = True) -> dict[str, Any]:
    """Smallest, median, largest, and a histogram whose counts add up to the number of values.

    Whole numbers in a narrow range have a bin each; all others have powers of two as edges.
    """
    low, high = values.min(), values.max()
    if whole and high - low <= 20:
        edges = np.arange(low, high + 2)
        bins = [f"{edge}" for edge in edges[:-1]]
    else:
        least = 1.0 if whole else 2.0**-10
        lowest, highest = (int(np.floor(np.log2(max(v, least)))) for v in (low, high))
        edges = 2.0 ** np.arange(lowest, highest + 2)
        if low < edges[0]:  # 0, which has no logarithm
            edges = np.concatenate([[0.0], edges])
        last = edges[1:] - 1 if whole else edges[1:]
        pairs = zip(edges[:-1].tolist(), last.tolist(), edges[1:].tolist(), strict=True)
        bins = [
            f"{a / 1024:g}k-{after / 1024:g}k"
            if a >= 1024
            else (f"{a:.4g}" if a == b else f"{a:.4g}-{b:.4g}")
            for a, b, after in pairs
        ]
    counts, _ = np.histogram(values, edges)
    return {
        "min": low.item(),
        "median": float(np.median(values)),
        "max": high.item(),
        "histogram": {"bins": bins, "edges": edges.tolist(), "counts": counts.tolist()},
    }


def _resolution(
    instances: np.ndarray, records: list[ImageRecord], model: str, side: int
) -> dict[str, Any]:
    """How many instances are small at a model's resolution, and the tile that would help.

    In a tile of T pixels, an object of s pixels is s * side / T to the model. So the tile that
    brings nine in ten of the small ones to SMALL is s * side / SMALL, with s their lowest decile
    of short sides; but a tile shorter than twice their median length would cut most of them, and
    `prepare` cuts none below MIN_TILE, which is named only if it brings some of them to SMALL.
    """
    small = instances[instances[f"short_{model}"] < SMALL]
    share = len(small) / len(instances)
    facts: dict[str, Any] = {"side": side, "small": len(small), "share": share, "tile": None}
    if share < SMALL_SHARE:
        return facts
    sides = np.sort(small["box"][:, 2:] - small["box"][:, :2], axis=1)
    short, length = float(np.quantile(sides[:, 0], 0.1)), float(np.median(sides[:, 1]))
    wanted = max(int(short * side / SMALL), int(np.ceil(2 * length)))
    tile = max(wanted, MIN_TILE)
    sizes = np.array([record.size for record in records])
    if tile >= sizes.max():
        return facts
    overlap = min(int(np.ceil(np.quantile(sides[:, 1], 0.9))), tile // 2)
    steps = np.ceil(np.maximum(sizes - tile, 0) / (tile - overlap)) + 1
    all_sides = instances["box"][:, 2:] - instances["box"][:, :2]
    still_small = int((all_sides.min(axis=1) * side / tile < SMALL).sum())
    if tile > wanted and still_small >= len(small):
        return facts
    return facts | {
        "tile": tile,
        "overlap": overlap,
        "short_side": short,
        "reaches": short * side / tile,
        "tiles": int(steps.prod(axis=1).sum()),
        "still_small": still_small,
        "longer_than_tile": int((all_sides.max(axis=1) > tile).sum()),
        "command": "samray prepare --data-dir DATA --output-dir PREPARED "
        f"--tile {tile} --overlap {overlap}",
    }


def _splits(
    manifest: dict[str, Any], records: list[ImageRecord], instances: np.ndarray
) -> list[dict[str, Any]]:
    per_image = np.bincount(instances["image"], minlength=len(records)).tolist()
    count = {record.name: number for record, number in zip(records, per_image, strict=True)}
    table = []
    for split in SPLITS:
        counts = [count[image] for image in manifest["splits"][split]]
        with_instances = sum(number > 0 for number in counts)
        table.append(
            {
                "split": split,
                "images": len(counts),
                "images_with_instances": with_instances,
                "instances": sum(counts),
            }
        )
    return table


def _duplicates(
    records: list[ImageRecord], splits: dict[str, str], fingerprints: np.ndarray
) -> list[dict[str, Any]]:
    """Groups of nearly the same image: those in different splits first, then across folders."""
    groups = []
    for places in near_duplicates(fingerprints, [record.digest for record in records]):
        members = [records[place] for place in places]
        folders = {str(PurePosixPath(record.name).parent) for record in members}
        found = {splits[record.name] for record in members if record.name in splits}
        groups.append(
            {
                "images": [
                    {"image": record.name, "split": splits.get(record.name)} for record in members
                ],
                "same_file": len({record.digest for record in members}) == 1,
                "across_folders": len(folders) > 1,
                "in_different_splits": len(found) > 1,
            }
        )
    return sorted(groups, key=lambda g: (not g["in_different_splits"], not g["across_folders"]))


def _splits_without_leaks(dataset: PreparedDataset, facts: dict[str, Any]) -> dict[str, list[str]]:
    """The present splits, but with each group in the split of most of its images.

    A tie goes to the first of SPLITS. It names images, not tiles: all tiles of an image stay
    together.
    """
    source = {record.name: record.source for record in dataset.images.values()}
    splits = {s: {source[name] for name in dataset.manifest["splits"][s]} for s in SPLITS}
    groups: list[set[str]] = []
    for group in facts["near_duplicates"]:
        if group["in_different_splits"]:
            members = {source[i["image"]] for i in group["images"] if i["split"] is not None}
            touching = [other for other in groups if other & members]
            groups = [other for other in groups if not other & members]
            groups.append(members.union(*touching))
    for members in groups:
        home = max(SPLITS, key=lambda split: len(members & splits[split]))
        splits = {s: images - members for s, images in splits.items()}
        splits[home] |= members
    return {split: sorted(images) for split, images in splits.items()}


def _oddest(records: list[ImageRecord], instances: np.ndarray) -> list[dict[str, Any]]:
    """The most extreme instances, one list per kind; `why` gives the measured value."""
    pixels = np.array([record.size[0] * record.size[1] for record in records])
    share = instances["area"] / pixels[instances["image"]]
    # Of two that overlap each other most, one is enough. The rows of an image are contiguous.
    first_row = np.searchsorted(instances["image"], instances["image"])
    mutual = instances["partner"][first_row + instances["partner"]] == instances["number"]
    again = mutual & (instances["partner"] < instances["number"])
    # (rank by, value to show, format of that value)
    measures = {
        "smallest": (1 / instances["area"], instances["area"], "{:,} pixels"),
        "largest": (share, share, "{:.1%} of the image"),
        "elongated": (instances["elongation"],) * 2 + ("{:.1f} times as long as wide",),
        # A large object may lie along the border; an outline that is mostly border is odd.
        "border": (
            instances["border"] / np.sqrt(instances["area"]),
            instances["border"],
            "{:,} pixels on the border",
        ),
        "vertices": (instances["vertices"],) * 2 + ("{:,} corners",),
        "overlapping": (
            np.where(again, 0, instances["overlap"]),
            instances["overlap"],
            "IoU {:.2f} with the instance outlined in orange",
        ),
    }
    kinds = []
    for key, title, hint in ODDEST:
        oddness, value, text = measures[key]
        order = np.argsort(-oddness, kind="stable")[:ODD]
        shown = [
            _place(records, instances[i])
            | {"why": text.format(value[i].item())}
            | ({"partner": int(instances["partner"][i])} if key == "overlapping" else {})
            for i in order[oddness[order] > 0]
        ]
        if shown:
            kinds.append({"kind": key, "title": title, "hint": hint, "instances": shown})
    return kinds


def _page(dataset: PreparedDataset, facts: dict[str, Any]) -> str:
    """One self-contained HTML page."""
    labels = facts["labels"][:LABELS_SHOWN]
    groups = facts["near_duplicates"][:GROUPS_SHOWN]
    samples = [place for label in labels for place in label["samples"]]
    odd = [place for kind in facts["oddest"] for place in kind["instances"]]
    photos = [entry["image"] for group in groups for entry in group["images"][:ODD]]
    charts = {
        key: histogram_svg(spread["histogram"]["bins"], spread["histogram"]["counts"], title, small)
        for key, spread, title, small in (
            ("per_image", facts["instances_per_image"], "instances in an image", 0),
            ("area", facts["area"], "area, pixels", 0),
            ("vertices", facts["vertices"], "corners of an outline", 0),
            *(
                (model, spread, "shorter box side, pixels", _num_small_bins(spread))
                for model, spread in facts["short_side"].items()
            ),
        )
    }
    return render_page(
        "dataset_report.html",
        facts=facts,
        small=SMALL,
        small_share=SMALL_SHARE,
        min_tile=MIN_TILE,
        labels=labels,
        groups=groups,
        items_shown=ITEMS_SHOWN,
        members_shown=ODD,
        charts=charts,
        crops=_pictures(dataset, samples, SAMPLE_SIDE),
        pictures=_pictures(dataset, odd, ODD_SIDE),
        photos={name: _photo(dataset, name) for name in photos},
    )


def _num_small_bins(spread: dict[str, Any]) -> int:
    """Bins below SMALL, which is a power of two and so one of the edges."""
    return sum(edge <= SMALL for edge in spread["histogram"]["edges"][1:])


def _pictures(
    dataset: PreparedDataset, places: list[dict[str, Any]], side: int
) -> dict[tuple[str, int, int | None], str]:
    """{(image, instance, its partner or None): JPEG as text}; each image is decoded once."""
    by_image = defaultdict(list)
    for place in places:
        by_image[place["image"]].append(place)
    pictures = {}
    for name, wanted in by_image.items():
        record = dataset.images[name]
        image = decode_image(dataset.image_bytes(record))
        for place in wanted:
            numbers = (place["instance"], place.get("partner"))
            shown = [record.instances[number] for number in numbers if number is not None]
            masks = [decode_crop(i.rle, record.size, i.box) for i in shown]
            piece = encode_picture(cut_out(image, masks, side), ".jpg")
            pictures[name, *numbers] = jpeg_uri(piece)
    return pictures


def _photo(dataset: PreparedDataset, name: str) -> str:
    image = decode_image(dataset.image_bytes(dataset.images[name]))
    return jpeg_uri(encode_picture(shrink(image, 160), ".jpg"))
