"""LabelMe pairs or COCO files to a prepared dataset, rasterised in parallel by Ray Data.

`prepare` reads down the page: list the files, let Ray Data turn each chunk of them into one
Parquet shard (`write_shard`), add up what came of it, assign splits, publish the manifest last.
A shard that an earlier, killed call finished is not made again.
"""

import hashlib
import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from tqdm import tqdm

from samray import __version__, cluster
from samray.annotations import (
    IGNORED_LABELS,
    MAX_JSON_BYTES,
    Annotation,
    Shape,
    embedded_image,
    read_annotation,
)
from samray.coco import CocoImage, coco_annotation, looks_like_coco, read_coco
from samray.config import Config, PrepareConfig, required, save_config
from samray.dataset import FORMAT, SCHEMA, dataset_digest
from samray.discovery import (
    RawFiles,
    find_by_stem,
    find_files,
    find_image,
    find_listed_image,
)
from samray.drawing import draw_masks, encode_picture, shrink
from samray.errors import AnnotationError, ConfigError, DatasetError
from samray.images import decode_image, read_image_file
from samray.rasterize import CroppedMask, encode_rle, rasterize_instance, require_inside
from samray.splits import SplitRule
from samray.storage import (
    make_folder,
    read_json,
    require_folder,
    resolve,
    whole_file,
    write_bytes,
    write_json,
)

ROW_GROUP_BYTES = 8 * 2**20  # read at random in training, so small
IN_PROGRESS = "preparing.json"


@dataclass(frozen=True)
class Chunk:
    """The work of one task: files that become one shard.

    Attributes:
        part: name of the shard without extension.
        files: JSON paths from the root, images of a COCO file, or paths of unlabelled images.
        labelled: not the last.
        overlays: how many of the first files to draw.
    """

    part: str
    files: tuple[str | CocoImage, ...]
    labelled: bool
    overlays: int = 0


def prepare(config: Config) -> dict[str, Any]:
    """Make a prepared dataset from a folder of images and LabelMe JSON or COCO files.

    Args:
        config: its `prepare` section.

    Returns:
        The manifest, as written to OUTPUT_DIR/manifest.json.

    Raises:
        ConfigError: a setting or folder cannot work.
        DatasetError: nothing usable, an empty split, or anything bad under `strict`.
    """
    settings = config.prepare
    data_dir, output_dir = required(config, "prepare.data_dir", "prepare.output_dir")
    root = require_folder(resolve(data_dir, "--data-dir"), "--data-dir")
    output = resolve(output_dir, "--output-dir")
    if root == output or root in output.parents:
        raise ConfigError(f"--output-dir: {output} lies inside --data-dir; choose another folder")
    label_map = _read_label_map(settings)
    rule = SplitRule(settings)
    files = find_files(root)
    coco, problems = _take_coco(files)
    if not files.annotations and not coco and not problems:
        raise DatasetError(
            f"{root}: no LabelMe JSON or COCO file in it or below ({len(files.images)} images); "
            "check --data-dir"
        )
    shards, inputs = _fingerprints(files, coco, settings, label_map)
    finished = _claim_output(output, shards, inputs)
    if finished is not None:
        _require_clean(finished["rejected"], settings)
        print(f"{output} is already prepared from the same inputs; nothing to do")
        return finished
    cluster.start()
    cluster.require_visible(root / (files.annotations or files.images)[0], "--data-dir")
    cluster.require_shared(output, "--output-dir")
    outcomes = list(_run(files, coco, output, settings, label_map))
    manifest = _manifest(outcomes, files, problems, settings, inputs)
    dropped = set(manifest["dropped_annotations"])
    kept = [o for o in outcomes if o["image"] and o["annotation"] not in dropped]
    annotated = [outcome["image"] for outcome in kept if outcome["annotation"]]
    rule.require_known(annotated, [o["claims"] for o in outcomes if o["claims"]])
    manifest["splits"], warnings = rule.assign(annotated)
    manifest["warnings"] += warnings
    manifest["digest"] = dataset_digest([o["image"] for o in kept], manifest["splits"])
    for leftover in (output / "data").glob(".*.tmp"):  # of an earlier, killed call
        leftover.unlink(missing_ok=True)
    save_config(config, output / "config.yaml")
    write_json(output / "manifest.json", manifest)
    (output / IN_PROGRESS).unlink(missing_ok=True)
    return manifest


def write_shard(chunk: Chunk, files: RawFiles, output: Path, context: dict[str, Any]) -> None:
    """Read, check and rasterise the files of a chunk into one shard and its list of outcomes.

    Args:
        context: `label_map`, `labels`, `max_megapixels`, `join_groups`.
    """
    outcomes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    data = output / "data"
    with (
        whole_file(data / f"{chunk.part}.parquet") as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression={"image": "none"}) as writer,
    ):
        for number, file in enumerate(chunk.files):
            outcome, row, masks = _read_pair(file, chunk.labelled, files, context)
            outcomes.append(outcome)
            if row is None:
                continue
            if number < chunk.overlays:
                _write_overlay(output / "overlays" / row["name"], row, masks, context)
            rows.append(row)
            if sum(len(r["image"]) for r in rows) >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    write_json(data / f"{chunk.part}.json", outcomes)  # last: it says that the shard is whole


def _take_coco(files: RawFiles) -> tuple[list[CocoImage], list[dict[str, Any]]]:
    """Take COCO files out of the list of LabelMe's; return their images, and what was unusable."""
    images: list[CocoImage] = []
    problems: list[dict[str, Any]] = []
    for name in list(files.annotations):
        with (files.root / name).open("rb") as file:
            if not looks_like_coco(file.read(4096)):
                continue
        try:
            size = (files.root / name).stat().st_size
            if size > MAX_JSON_BYTES:
                raise AnnotationError("file", f"is larger than {MAX_JSON_BYTES // 2**20} MiB")
            found, faults = read_coco((files.root / name).read_bytes(), name)
        except AnnotationError as problem:
            if problem.field in ("images", "annotations", "categories"):
                continue  # some other JSON: told so as LabelMe's are
            files.annotations.remove(name)
            problems.append(_rejection(name, problem, 0))
            continue
        files.annotations.remove(name)
        images += found
        problems += [
            _rejection(name, AnnotationError(field, reason), count)
            for field, reason, count in faults
        ]
    return images, problems


def _run(
    files: RawFiles,
    coco: list[CocoImage],
    output: Path,
    settings: PrepareConfig,
    label_map: dict[str, str | None],
) -> Iterator[dict[str, Any]]:
    """Make every shard that is missing; yield what came of each file, in their order."""
    make_folder(output / "data", "--output-dir")
    context = {
        "label_map": label_map,
        "labels": settings.labels,
        "max_megapixels": settings.max_megapixels,
        "join_groups": settings.join_groups,
    }
    overlays = settings.num_samples if settings.visualize else 0
    entries: list[str | CocoImage] = [*files.annotations, *coco]
    annotated = _chunks("part", entries, True, settings.images_per_shard, overlays)
    yield from _run_chunks(annotated, files, output, context, "prepare")
    claimed = {outcome["claims"] for chunk in annotated for outcome in _outcomes_of(output, chunk)}
    rest: list[str | CocoImage] = [image for image in files.images if image not in claimed]
    unlabelled = _chunks("unlabelled", rest, False, settings.images_per_shard, 0)
    yield from _run_chunks(unlabelled, files, output, context, "unlabelled")


def _chunks(
    prefix: str, paths: list[str | CocoImage], labelled: bool, size: int, overlays: int
) -> list[Chunk]:
    return [
        Chunk(
            f"{prefix}-{start // size:05d}",
            tuple(paths[start : start + size]),
            labelled,
            max(0, min(size, overlays - start)),
        )
        for start in range(0, len(paths), size)
    ]


def _run_chunks(
    chunks: list[Chunk], files: RawFiles, output: Path, context: dict[str, Any], title: str
) -> Iterator[dict[str, Any]]:
    missing = [chunk for chunk in chunks if not (output / "data" / f"{chunk.part}.json").exists()]
    if missing:
        # Our bar counts images; Ray Data's count blocks and come with a wall of log lines.
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        shared = ray.put((files, output, context))
        work_of = [ray.put(chunk) for chunk in missing]  # a task fetches its own and no other

        def work(row: dict[str, Any]) -> dict[str, Any]:
            chunk = ray.get(work_of[row["id"]])
            write_shard(chunk, *ray.get(shared))
            return {"num_files": len(chunk.files)}

        total = sum(len(chunk.files) for chunk in missing)
        dataset = ray.data.range(len(missing), override_num_blocks=len(missing)).map(work)
        with tqdm(total=total, desc=title, unit="img", file=sys.stderr, disable=None) as bar:
            for row in dataset.iter_rows():
                bar.update(row["num_files"])
    for chunk in chunks:
        yield from _outcomes_of(output, chunk)


def _outcomes_of(output: Path, chunk: Chunk) -> list[dict[str, Any]]:
    outcomes: list[dict[str, Any]] = read_json(output / "data" / f"{chunk.part}.json")
    return [{**outcome, "part": chunk.part} for outcome in outcomes]


def _read_pair(
    entry: str | CocoImage, labelled: bool, files: RawFiles, context: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, list[CroppedMask]]:
    """Return (outcome, row of the shard or None, masks of its instances)."""
    file = entry if isinstance(entry, str) else entry.name
    outcome: dict[str, Any] = {
        "annotation": file if labelled else None,
        "claims": None,  # the image this file speaks of, good or bad
        "image": None,
        "num_shapes": 0,
        "labels": {},
        "filtered": {},
        "not_instances": {},
        "rejected": [],
        "warnings": [],
    }
    embedded: str | None = None
    try:
        if isinstance(entry, CocoImage):
            annotation = coco_annotation(entry)
            outcome["num_shapes"] = annotation.num_shapes
            name = find_listed_image(entry.source, annotation.image_path, files)
        elif labelled:
            path = files.root / file
            if path.stat().st_size > MAX_JSON_BYTES:
                raise AnnotationError("file", f"is larger than {MAX_JSON_BYTES // 2**20} MiB")
            annotation = read_annotation(path.read_bytes())
            outcome["num_shapes"] = annotation.num_shapes
            try:
                name = find_image(file, annotation.image_path, files)
            except AnnotationError:
                if annotation.image_data is None:
                    raise
                name, embedded = file, annotation.image_data
        else:
            annotation = Annotation(image_path="", size=None, num_shapes=0)
            name = file
        outcome["claims"] = name
        try:
            raw = embedded_image(embedded) if embedded else read_image_file(files.root / name)
            height, width = decode_image(raw, context["max_megapixels"]).shape[:2]
        except AnnotationError as exc:
            if embedded:
                raise AnnotationError("imageData", exc.reason) from exc
            raise AnnotationError("image", f"{name} {exc.reason}") from exc
        if annotation.size not in (None, (height, width)):
            assert annotation.size is not None
            raise AnnotationError(
                "imageHeight, imageWidth",
                f"say {annotation.size[1]} x {annotation.size[0]} pixels, but {name} is "
                f"{width} x {height}; it was resized or rotated after it was annotated",
            )
    except (AnnotationError, OSError) as exc:
        problem = (
            exc if isinstance(exc, AnnotationError) else AnnotationError("file", str(exc.strerror))
        )
        if outcome["claims"] is None and labelled and isinstance(entry, str):
            outcome["claims"] = _stem_claim(file, files)
        outcome["rejected"].append(_rejection(file, problem, outcome["num_shapes"]))
        return outcome, None, []
    outcome["rejected"] += [_rejection(file, problem, 1) for problem in annotation.problems]
    outcome["warnings"] += [
        {"file": file, "field": field, "reason": reason} for field, reason in annotation.warnings
    ]
    outcome["not_instances"] = dict(Counter(kind for _, kind in annotation.not_instances))
    size = (height, width)
    instances, masks = _instances(file, annotation, size, context, outcome)
    digest = hashlib.sha256(raw).hexdigest()
    row = {
        "name": name,
        "annotation": outcome["annotation"],
        "image": raw,
        "image_digest": digest,
        "height": height,
        "width": width,
        "instances": instances,
    }
    content = [(i["label"], i["rle"].hex()) for i in instances]
    outcome["image"] = {
        "name": name,
        "image_digest": digest,
        "num_instances": len(instances),
        "instances_digest": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
    }
    return outcome, row, masks


def _instances(
    file: str,
    annotation: Annotation,
    size: tuple[int, int],
    context: dict[str, Any],
    outcome: dict[str, Any],
) -> tuple[list[dict[str, Any]], list[CroppedMask]]:
    """Rename, filter, join by group and rasterise the shapes of one image."""
    groups: dict[Any, list[Shape]] = defaultdict(list)
    filtered: Counter[str] = Counter()
    for shape in annotation.shapes:
        label = context["label_map"].get(shape.label, shape.label)
        unwanted = context["labels"] is not None and label not in context["labels"]
        if label is None or label in IGNORED_LABELS or unwanted:
            filtered[shape.label] += 1
            continue
        try:
            require_inside(shape, size)
        except AnnotationError as problem:  # also one part of a group, whose others stay
            outcome["rejected"].append(_rejection(file, problem, 1))
            continue
        alone = shape.group_id is None or not context["join_groups"]
        groups[(label, shape.index) if alone else (label, "group", shape.group_id)].append(shape)
    outcome["filtered"] = dict(filtered)
    _warn_of_a_group_of_nearly_all(file, groups, outcome)
    labels: Counter[str] = Counter()
    instances, masks = [], []
    for (label, *_), shapes in groups.items():
        try:
            mask = rasterize_instance(shapes, size)
        except AnnotationError as problem:
            outcome["rejected"].append(_rejection(file, problem, len(shapes)))
            continue
        for shape in shapes:
            over = max(-shape.points.min(), (shape.points.max(axis=0) - size[::-1]).max())
            if over > 1:
                outcome["warnings"].append(
                    {
                        "file": file,
                        "field": f"shapes[{shape.index}].points",
                        "reason": f"reach {over:.0f} pixels out of the image; cut off there",
                    }
                )
        labels[label] += 1
        masks.append(mask)
        instances.append(
            {
                "label": label,
                "box": list(mask.box),
                "area": int(mask.pixels.sum()),
                "rle": encode_rle(mask, size),
            }
        )
    outcome["labels"] = dict(labels)
    return instances, masks


def _warn_of_a_group_of_nearly_all(
    file: str, groups: dict[Any, list[Shape]], outcome: dict[str, Any]
) -> None:
    """Annotators group by mistake, and then a whole image becomes one instance."""
    total = sum(len(shapes) for shapes in groups.values())
    for (label, *_), shapes in groups.items():
        if len(shapes) >= 5 and len(shapes) > 0.8 * total:
            outcome["warnings"].append(
                {
                    "file": file,
                    "field": "group_id",
                    "reason": f"joins {len(shapes)} of {total} shapes ('{label}') to one instance; "
                    "if that is a slip, set prepare.join_groups=false",
                }
            )


def _rejection(file: str, problem: AnnotationError, num_shapes: int) -> dict[str, Any]:
    return {
        "file": file,
        "field": problem.field,
        "reason": problem.reason,
        "num_shapes": num_shapes,
    }


def _stem_claim(file: str, files: RawFiles) -> str | None:
    """The image of a JSON that cannot be read: annotated badly is not unlabelled."""
    try:
        path = PurePosixPath(file)
        return find_by_stem(path.parent, path.stem, files)
    except AnnotationError:
        return None


def _write_overlay(
    path: Path, row: dict[str, Any], masks: list[CroppedMask], context: dict[str, Any]
) -> None:
    image = decode_image(row["image"], context["max_megapixels"])
    frames = []
    for mask in masks:
        frame = image[:, :, 0] < 0
        (x, y), (h, w) = mask.origin, mask.pixels.shape
        frame[y : y + h, x : x + w] = mask.pixels
        frames.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = shrink(draw_masks(image, frames), 1600)
    write_bytes(path.with_name(path.name + ".overlay.jpg"), encode_picture(picture, ".jpg"))


def _dropped(outcomes: list[dict[str, Any]]) -> set[str]:
    """Annotations whose image an earlier JSON has already annotated."""
    first: dict[str, str] = {}
    dropped = set()
    for outcome in outcomes:
        if outcome["image"] and outcome["annotation"]:
            owner = first.setdefault(outcome["image"]["name"], outcome["annotation"])
            if owner != outcome["annotation"]:
                dropped.add(outcome["annotation"])
    return dropped


def _manifest(
    outcomes: list[dict[str, Any]],
    files: RawFiles,
    problems: list[dict[str, Any]],
    settings: PrepareConfig,
    inputs: str,
) -> dict[str, Any]:
    """Everything but splits and digest."""
    dropped = _dropped(outcomes)
    owners = {
        o["image"]["name"]: o["annotation"]
        for o in reversed(outcomes)
        if o["image"] and o["annotation"] not in dropped
    }
    labels: Counter[str] = Counter()
    filtered: Counter[str] = Counter()
    not_instances: Counter[str] = Counter()
    rejected = [_rejection(file, problem, 0) for file, problem in files.skipped] + problems
    warnings, unlabelled, empty = [], [], []
    num_images = num_instances = 0
    for outcome in outcomes:
        name = outcome["image"]["name"] if outcome["image"] else None
        if outcome["annotation"] in dropped:  # with all its shapes, good or bad
            reason = f"{name} is already annotated by {owners[name]}; remove one of the two"
            problem = AnnotationError("imagePath", reason)
            rejected.append(_rejection(outcome["annotation"], problem, outcome["num_shapes"]))
            continue
        rejected += outcome["rejected"]
        warnings += outcome["warnings"]
        if name is None:
            continue
        num_images += 1
        num_instances += outcome["image"]["num_instances"]
        labels.update(outcome["labels"])
        filtered.update(outcome["filtered"])
        not_instances.update(outcome["not_instances"])
        if outcome["annotation"] is None:
            unlabelled.append(name)
        elif not outcome["image"]["num_instances"]:
            empty.append(name)
    _require_clean(rejected, settings)
    if not num_instances:
        hint = ""
        if rejected:
            first = rejected[0]
            hint = f"; {len(rejected)} problems, the first: "
            hint += f"{first['file']}: {first['field']}: {first['reason']}"
        if filtered:
            hint += f"; filtered out: {dict(filtered)}"
        raise DatasetError(f"{files.root}: no instance is usable{hint}")
    return {
        "format": FORMAT,
        "samray_version": __version__,
        "inputs": inputs,
        "num_images": num_images,
        "num_instances": num_instances,
        "num_shapes": sum(outcome["num_shapes"] for outcome in outcomes)
        + sum(problem["num_shapes"] for problem in problems),
        "labels": dict(sorted(labels.items())),
        "filtered": dict(sorted(filtered.items())),
        "not_instances": dict(sorted(not_instances.items())),
        "splits": {},
        "unlabelled": unlabelled,
        "empty": empty,
        "rejected": rejected,
        "warnings": warnings,
        "dropped_annotations": sorted(dropped),
        "shards": [f"data/{part}.parquet" for part in dict.fromkeys(o["part"] for o in outcomes)],
    }


def _require_clean(rejected: list[dict[str, Any]], settings: PrepareConfig) -> None:
    """Under `strict`, raise one DatasetError that lists everything bad."""
    if settings.strict and rejected:
        lines = [f"  {r['file']}: {r['field']}: {r['reason']}" for r in rejected]
        raise DatasetError(
            f"{len(lines)} bad items, and --strict allows none; mend or remove them:\n"
            + "\n".join(lines)
        )


def _claim_output(output: Path, shards: str, inputs: str) -> dict[str, Any] | None:
    """Return the manifest if the work is done; else make the folder ours, or refuse it."""
    for name, key, wanted in (
        ("manifest.json", "inputs", inputs),
        (IN_PROGRESS, "shards", shards),
    ):
        if (output / name).exists():
            content = read_json(output / name)
            if not isinstance(content, dict) or content.get(key) != wanted:
                raise ConfigError(
                    f"--output-dir: {output} holds a dataset prepared from other files or "
                    "settings; choose another folder or delete this one"
                )
            return content if name == "manifest.json" else None
    make_folder(output, "--output-dir")
    if any(output.iterdir()):
        raise ConfigError(
            f"--output-dir: {output} is not empty and holds no prepared dataset; choose another"
        )
    write_json(output / IN_PROGRESS, {"shards": shards})
    return None


def _fingerprints(
    files: RawFiles,
    coco: list[CocoImage],
    settings: PrepareConfig,
    label_map: dict[str, str | None],
) -> tuple[str, str]:
    """sha256 of what decides the shards (files by path, size and time; settings), and of that
    together with what decides the splits: another split needs no shard made again."""
    shards = hashlib.sha256()
    for name in [*files.annotations, *dict.fromkeys(i.source for i in coco), *files.images]:
        status = (files.root / name).stat()
        shards.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    keys = {"labels", "join_groups", "images_per_shard", "max_megapixels", "visualize"}
    keys |= {"num_samples"}
    content = settings.model_dump(mode="json", include=keys)
    shards.update(json.dumps([content, label_map, FORMAT], sort_keys=True).encode())
    whole = shards.copy()
    keys = {"group_by", "val_fraction", "test_fraction"}
    content = settings.model_dump(mode="json", include=keys)
    whole.update(json.dumps(content, sort_keys=True).encode())
    if settings.split_file:
        whole.update(resolve(settings.split_file, "--split-file").read_bytes())
    return shards.hexdigest(), whole.hexdigest()


def _read_label_map(settings: PrepareConfig) -> dict[str, str | None]:
    if settings.label_map is None:
        return {}
    path = resolve(settings.label_map, "--label-map")
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())  # YAML's own has several lines
        raise ConfigError(f"--label-map: {path} cannot be read as JSON or YAML ({reason})") from exc
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and (v is None or isinstance(v, str)) for k, v in content.items()
    ):
        raise ConfigError(f"--label-map: {path} must map texts to texts, such as {{old: new}}")
    return content
