"""What is wrong with a prepared dataset, by kind, with what to do about it.

`find_problems` sorts the manifest's rejected items and warnings into kinds; `find_notes` adds what
may be intended. A kind is {level, title, fix, items}, an item {file, field, reason}.
"""

import re
from collections import Counter, defaultdict
from typing import Any

import numpy as np

from samray.data.annotation import IGNORE
from samray.data.dataset import ImageRecord

OUTLINED_TWICE = 0.8  # IoU above which two instances are probably one object

# When annotation looks partial: fewer objects than this share of what a photo's size suggests, of
# at least so many; or a label that most photos lack, and of which the others have at least so many.
# With fewer photos nothing is usual. Of 262 photos of four completely annotated sets 8 are named.
SPARSE_SHARE, SPARSE_EXPECTED = 0.25, 8
MANY_OF_A_LABEL = 5
ENOUGH_PHOTOS = 5

# (pattern on "field: reason" without indices and label, title, what to do); the first match counts.
# Datasets prepared before hold earlier wordings, such as "once more".
KINDS = (
    ("already annotated", "Two annotation files for one image",
     "Keep one of the two JSON files and move the other away."),
    ("^(imagePath|file_name)", "Annotations whose image is not found",
     "Put the image beside its JSON under the same name, or correct imagePath (COCO: file_name)."),
    ("^imageData", "Embedded images that cannot be read",
     "Put the image file beside its JSON, or save the JSON again from LabelMe."),
    ("^imageHeight", "Images resized or rotated after they were annotated",
     "Restore the image that was annotated, or annotate the image again in LabelMe."),
    ("^image:", "Images that cannot be used",
     "Open the image and save it again as JPEG or PNG, one file per page; or get a new copy."),
    ("^(file|folder): .*link", "Links that are not followed",
     "Copy the files into the folder of the dataset."),
    ("^(file|folder|images|annotations|categories|shapes):",
     "Files that cannot be read as annotations",
     "Repair the file or move it away; `samray prepare` reads LabelMe and COCO JSON in UTF-8."),
    ("duplicate of|once more", "Duplicate shapes", "Delete one of the two in the annotation tool."),
    ("outside the image|covers no pixel", "Shapes outside the image",
     "Delete the shape, or check that the JSON belongs to this image."),
    ("out of the image; cut off", "Shapes that extend beyond the image",
     "Nothing, if it is a few pixels; else check that image and JSON belong together."),
    ("white space", "Labels with white space around them",
     "Nothing, samray removed it; rename the label if other programs read the file."),
    ("^group_id: joins", "Groups that join nearly all shapes of an image",
     "If the group is a mistake, prepare with prepare.join_groups=false."),
    ("needs", "Shapes of too few points", "Delete the shape, or draw it again."),
    (r"^[\w.]*shape_type", "Shapes of an unknown type", "Draw the shape as a polygon or a mask."),
    (r"^[\w.]*(label|category)", "Shapes without a usable label", "Give the shape a label."),
    (r"^[\w.]*(points|segmentation|counts|size)", "Shapes whose coordinates cannot be used",
     "Draw the shape again; the reason says where."),
    (r"^[\w.]*mask", "Masks that cannot be read", "Draw the mask again, or export it again."),
)  # fmt: skip
LABEL_IN_BRACKETS = r"^\('.*'\)"
OTHER_KIND = ("Other problems", "Each reason says what is wrong.")
LEAK_KIND = (
    "Nearly the same image in different splits",
    "The model is evaluated on images it was trained on, so its scores are too high. Prepare again "
    "with --group-by, or with --split-file and the splits.json beside this report, which keeps "
    "each such group together (none is written where that would leave a split empty, or where the "
    "tiles of two photos differ); or delete the copies.",
)

# (key, title, what to do)
NOTES = (
    ("outlined_twice", "Objects that are probably outlined twice",
     "Delete one of the two; with different labels, decide which one is right."),
    ("partial", "Photos where not every object may be outlined",
     "Nothing, if all are. The instance decoder takes what nobody outlined for background: outline "
     "the rest, or draw a shape labelled __ignore__ around it."),
    ("spelling", "Labels that differ in spelling only",
     "If they mean the same, prepare with --label-map FILE, a JSON {old: new}."),
    ("absent", "Labels missing from the train split",
     "Masks are learned without labels, but these objects are never trained on: annotate more of "
     "them, or choose the splits with --split-file."),
    ("empty", "Images annotated as empty",
     "Nothing, if they show no object: they are not trained on. Else annotate them."),
    ("unlabelled", "Images without annotation",
     "Annotate them, or leave them: they are in no split."),
    ("ignored", "Regions marked __ignore__",
     "Nothing, if not every object in them is outlined: they teach and count nothing about all "
     "objects of an image."),
    ("filtered", "Shapes left out by label",
     "Nothing, if --labels and --label-map are as intended."),
    ("not_instances", "Shapes that cover no area",
     "Nothing, if they are marks; objects must be outlined to be learned. Crowds are taken as "
     "objects with prepare.crowd_as_instances=true."),
)  # fmt: skip


def find_problems(
    manifest: dict[str, Any], leaks: list[dict[str, Any]], leaking: set[str]
) -> list[dict[str, Any]]:
    """Return what `--strict` does not allow: leaks, rejected items, warnings, in this order.

    Args:
        leaks: groups of near-duplicates (`report.json`) whose images are in different splits.
        leaking: the photos of these groups.
    """
    kinds: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for group in leaks:
        kinds["problem", *LEAK_KIND].append(_leak(group))
    levels = (("problem", manifest["rejected"]), ("warning", manifest["warnings"]))
    for level, entry in ((level, entry) for level, entries in levels for entry in entries):
        item = {key: entry[key] for key in ("file", "field", "reason")}
        if re.match(r"(\(\w+\) )?is (nearly )?the same photo as", entry["reason"]):
            # `prepare` compares photos, the report their tiles, which can differ nevertheless.
            if entry["file"] not in leaking:
                kinds["problem", *LEAK_KIND].append(item)
            continue
        reason = re.sub(LABEL_IN_BRACKETS, "", entry["reason"])  # a label may hold any word
        text = re.sub(r"\[\d+\]", "", entry["field"]) + ": " + reason
        found = (kind[1:] for kind in KINDS if re.search(kind[0], text))
        kinds[level, *next(found, OTHER_KIND)].append(item)
    return [
        {"level": level, "title": title, "fix": fix, "items": items}
        for (level, title, fix), items in kinds.items()
    ]


def find_notes(
    manifest: dict[str, Any],
    records: list[ImageRecord],
    instances: np.ndarray,
    labels: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Return what is worth a look and may be intended: `--strict` allows it.

    Args:
        instances: rows of `report.INSTANCE`.
        labels: as in `report.json`.
    """
    absent = [label for label in labels if not label["splits"]["train"]]
    not_instances = {**manifest.get("not_instances", {})}
    regions = not_instances.pop(IGNORE, 0)
    items = {
        "outlined_twice": _outlined_twice(records, instances),
        "partial": _partly_annotated(records),
        "spelling": _spelt_alike(sorted(label["label"] for label in labels)),
        "absent": [_about_label(i["label"], f"has {i['instances']} instances") for i in absent],
        "empty": [_about_image(i, "its annotation has no usable shape") for i in manifest["empty"]],
        "unlabelled": [_about_image(i, "no JSON refers to it") for i in manifest["unlabelled"]],
        "ignored": [_about_label(IGNORE, f"marks {regions} regions")] if regions else [],
        "filtered": [
            _about_label(label, f"{number} shapes left out")
            for label, number in manifest["filtered"].items()
        ],
        "not_instances": [
            {"file": "", "field": "shape_type", "reason": f"{number} of type {kind}"}
            for kind, number in not_instances.items()
        ],
    }
    return [
        {"level": "note", "title": title, "fix": fix, "items": items[key]}
        for key, title, fix in NOTES
        if items[key]
    ]


def _leak(group: dict[str, Any]) -> dict[str, str]:
    first, *others = group["images"]
    listed = ", ".join(f"{i['image']} ({i['split'] or 'no split'})" for i in others[:10])
    more = f" and {len(others) - 10} more" if len(others) > 10 else ""
    same = "is the same file as" if group["same_file"] else "shows nearly the same as"
    reason = f"({first['split'] or 'no split'}) {same} {listed}{more}"
    return {"file": first["image"], "field": "image", "reason": reason}


def _outlined_twice(records: list[ImageRecord], instances: np.ndarray) -> list[dict[str, str]]:
    pairs = {
        (int(r["image"]), *sorted((int(r["number"]), int(r["partner"]))))
        for r in instances[instances["overlap"] >= OUTLINED_TWICE]
    }
    items = []
    for image, one, other in sorted(pairs):
        a, b = (records[image].instances[number] for number in (one, other))
        x, y = (int(v) for v in a.box[:2])
        reason = f"'{a.label}' and '{b.label}' cover nearly the same pixels, from x {x}, y {y} on"
        field = f"instances {one} and {other}"
        items.append({"file": records[image].name, "field": field, "reason": reason})
    return items


def _partly_annotated(records: list[ImageRecord]) -> list[dict[str, str]]:
    """Photos with far fewer objects than their size suggests, and labels that most photos lack.

    What a size suggests is the median over photos of objects per pixel outside ignored regions. A
    photo's tiles are taken together.
    """
    objects: dict[str, Counter[str]] = defaultdict(Counter)
    pixels: Counter[str] = Counter()
    for record in records:
        if record.num_instances:
            objects[record.source].update(instance.label for instance in record.instances)
            region = record.decode_ignored()
            pixels[record.source] += record.size[0] * record.size[1]
            pixels[record.source] -= 0 if region is None else int(np.count_nonzero(region))
    if len(objects) < ENOUGH_PHOTOS:
        return []
    usual = float(np.median([counts.total() / pixels[name] for name, counts in objects.items()]))
    items = []
    for name, counts in sorted(objects.items()):
        number, expected = counts.total(), usual * pixels[name]
        if expected >= SPARSE_EXPECTED and number < SPARSE_SHARE * expected:
            reason = f"has {number} objects; of its size {expected:.0f} are usual in this data"
            items.append(_about_image(name, reason))
    for label in sorted(set().union(*objects.values())):
        numbers = [counts[label] for counts in objects.values() if counts[label]]
        usual = float(np.median(numbers))
        if 2 * len(numbers) < len(objects) and usual >= MANY_OF_A_LABEL:
            reason = f"is on {len(numbers)} of {len(objects)} photos only, {usual:.0f} times there"
            items.append(_about_label(label, reason))
    return items


def _spelt_alike(labels: list[str]) -> list[dict[str, str]]:
    """Labels that are equal without case, white space and punctuation."""
    spellings = defaultdict(list)
    for label in labels:
        spellings[re.sub(r"[\W_]+", "", label.casefold()) or label].append(label)
    return [
        _about_label(" / ".join(same), "have nearly the same spelling")
        for same in spellings.values()
        if len(same) > 1
    ]


def _about_label(label: str, reason: str) -> dict[str, str]:
    return {"file": "", "field": f"label {label}", "reason": reason}


def _about_image(name: str, reason: str) -> dict[str, str]:
    return {"file": name, "field": "", "reason": reason}
