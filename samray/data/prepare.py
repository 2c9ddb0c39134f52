"""LabelMe pairs or COCO files to a prepared dataset, rasterised in parallel by Ray Data.

`prepare` reads down the page: list the files, keep the shards of an earlier call whose files are
all as they were, let Ray Data turn each chunk of the others into one Parquet shard
(`write_shard`), add up what came of it, assign splits, publish the manifest last.
"""

import hashlib
import json
import sys
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from ray import cloudpickle
from tqdm import tqdm

from samray import __version__, cluster
from samray.config import Config, PrepareConfig, required, save_config
from samray.data.annotation import MAX_JSON_BYTES
from samray.data.coco import LISTS, CocoImage, looks_like_coco, read_coco
from samray.data.dataset import FORMAT, SCHEMA, dataset_digest
from samray.data.discovery import RawFiles, find_files
from samray.data.intake import Entry, Rules, is_current, read_entry, rejection
from samray.data.splits import SplitRule
from samray.errors import AnnotationError, ConfigError, DatasetError
from samray.storage import (
    Place,
    file_sizes,
    is_used,
    make_folder,
    plain_errors,
    read_bytes,
    read_head,
    read_json,
    require_folder,
    resolve,
    whole_file,
    write_json,
)

ROW_GROUP_BYTES = 8 * 2**20  # read at random in training, so small
S3_THREADS = 4  # of one task
IN_PROGRESS = "preparing.json"


@dataclass(frozen=True)
class Chunk:
    """The work of one task: entries that become one shard.

    Attributes:
        part: name of the shard without extension.
        entries: in order.
    """

    part: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Job:
    """What every task of one call needs to know.

    Attributes:
        settings: sha256 of the settings that decide the shards.
        inputs: sha256 of these, the files, and the settings that decide the splits.
    """

    files: RawFiles
    output: Place
    rules: Rules
    settings: str
    inputs: str


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
    entries = [Entry(name, "labelme", files.stamps[name]) for name in files.annotations]
    entries += [Entry.of_coco(image) for image in coco]
    job = _job(files, entries, output, settings, label_map)
    with plain_errors(f"--output-dir: {output}"):
        finished = _claim_output(job)
    generation = finished["generation"] + 1 if finished else 1
    if finished is not None and finished["inputs"] == job.inputs and _is_whole(finished, output):
        _require_clean(finished["rejected"], settings)
        print(f"{output} is already prepared from the same inputs; nothing to do")
        return finished
    cluster.start()
    cluster.require_visible(root / (files.annotations or files.images)[0], "--data-dir")
    cluster.require_shared(output, "--output-dir")
    outcomes = _run(entries, job, settings, generation)
    manifest = _manifest(outcomes, files, problems, settings, job)
    manifest["generation"] = generation
    dropped = set(manifest["dropped_annotations"])
    kept = [o for o in outcomes if o["image"] and o["annotation"] not in dropped]
    annotated = [outcome["image"] for outcome in kept if outcome["annotation"]]
    rule.require_known(annotated, [o["claims"] for o in outcomes if o["claims"]])
    splits, warnings = rule.assign(annotated)
    tiles = {image["name"]: image["tiles"] or [image["name"]] for image in annotated}
    manifest["splits"] = {
        split: [tile for name in names for tile in tiles[name]] for split, names in splits.items()
    }
    manifest["warnings"] += warnings
    manifest["digest"] = dataset_digest([o["image"] for o in kept], manifest["splits"])
    save_config(config, output / "config.yaml")
    write_json(output / "manifest.json", manifest)
    _remove_leftovers(output, {outcome["part"] for outcome in outcomes})
    return manifest


def write_shard(chunk: Chunk, job: Job) -> None:
    """Read, check and rasterise the entries of a chunk into one shard and its list of outcomes."""
    outcomes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    data = job.output / "data"
    with whole_file(data / f"{chunk.part}.parquet") as temporary:
        with pq.ParquetWriter(temporary, SCHEMA, compression={"image": "none"}) as writer:
            for outcome, new in _read_in_order(chunk.entries, job):
                outcomes.append(outcome)
                rows += new
                if sum(len(r["image"]) for r in rows) >= ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        size = temporary.stat().st_size
    story = {"settings": job.settings, "num_bytes": size, "outcomes": outcomes}
    write_json(data / f"{chunk.part}.json", story)  # last: it says that the shard is whole


def _read_in_order(
    entries: tuple[Entry, ...], job: Job
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Read entries one by one from disk; from S3, which takes its time, a few at once."""
    threads = 1 if isinstance(job.files.root, Path) else S3_THREADS
    waiting: deque[Future[tuple[dict[str, Any], list[dict[str, Any]]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            waiting.append(
                pool.submit(read_entry, entry, job.files, job.rules, job.output / "overlays")
            )
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _take_coco(files: RawFiles) -> tuple[list[CocoImage], list[dict[str, Any]]]:
    """Take COCO files out of the list of LabelMe's; return their images, and what was unusable."""
    images: list[CocoImage] = []
    problems: list[dict[str, Any]] = []
    for name in list(files.annotations):
        # One with an image of its own name is LabelMe's; in S3 each look costs a request.
        has_image = PurePosixPath(name).stem in files.by_stem
        if has_image or not looks_like_coco(read_head(files.root / name)):
            continue
        try:
            found, faults = read_coco(read_bytes(files.root / name, MAX_JSON_BYTES), name)
        except AnnotationError as problem:
            if problem.field in LISTS:
                continue  # some other JSON: told so as LabelMe's are
            files.annotations.remove(name)
            problems.append(rejection(name, problem, 0))
            continue
        files.annotations.remove(name)
        images += found
        problems += [
            rejection(name, AnnotationError(field, reason), count)
            for field, reason, count in faults
        ]
    return images, problems


def _run(
    entries: list[Entry], job: Job, settings: PrepareConfig, generation: int
) -> list[dict[str, Any]]:
    """Make every shard that is missing; return what came of each entry, in their order.

    Args:
        generation: how many times this dataset will have been published.

    Raises:
        ConfigError: the dataset published in the output folder has no file in common with these.
    """
    make_folder(job.output / "data", "--output-dir")
    earlier = _earlier_parts(job)
    annotated = _run_entries("part", entries, earlier, job, settings, generation)
    claimed = {outcome["claims"] for outcome in annotated}
    rest = [
        Entry(image, "image", job.files.stamps[image])
        for image in job.files.images
        if image not in claimed
    ]
    return annotated + _run_entries("unlabelled", rest, earlier, job, settings, generation)


def _earlier_parts(job: Job) -> dict[str, list[dict[str, Any]]]:
    """The outcomes of each whole shard that an earlier call with these settings has left."""
    parts = {}
    sizes = file_sizes(job.output / "data")
    for name in sizes:
        if name.endswith(".json") and not name.startswith("."):
            content = read_json(job.output / "data" / name)
            part = name.removesuffix(".json")
            whole = (job.settings, sizes.get(f"{part}.parquet"))
            if whole == (content["settings"], content["num_bytes"]):
                parts[part] = [
                    {**outcome, "part": part, "num_bytes": content["num_bytes"]}
                    for outcome in content["outcomes"]
                ]
    return parts


def _run_entries(
    prefix: str,
    entries: list[Entry],
    earlier: dict[str, list[dict[str, Any]]],
    job: Job,
    settings: PrepareConfig,
    generation: int,
) -> list[dict[str, Any]]:
    wanted = {entry.name: entry for entry in entries}
    done: dict[str, dict[str, Any]] = {}
    mine = {part: outcomes for part, outcomes in earlier.items() if part.startswith(f"{prefix}-")}
    for outcomes in mine.values():
        if all(
            outcome["entry"] in wanted
            and outcome["entry"] not in done
            and is_current(outcome, wanted[outcome["entry"]], job.files)
            for outcome in outcomes
        ):
            done.update((outcome["entry"], outcome) for outcome in outcomes)
    if generation > 1 and prefix == "part" and mine and not done:
        known = {outcome["entry"] for outcomes in mine.values() for outcome in outcomes}
        if not known & set(wanted):
            raise ConfigError(
                f"--output-dir: {job.output} holds a dataset prepared from other files; choose "
                "another folder or delete this one"
            )
    missing = [entry for entry in entries if entry.name not in done]
    if done and missing:
        print(f"{prefix}: {len(done)} files are prepared already, {len(missing)} are not")
    size = settings.images_per_shard
    chunks = [
        _chunk(f"{prefix}-{generation}", tuple(missing[start : start + size]))
        for start in range(0, len(missing), size)
    ]
    for chunk in _run_chunks(chunks, job, "prepare" if prefix == "part" else prefix):
        content = read_json(job.output / "data" / f"{chunk.part}.json")
        told = {"part": chunk.part, "num_bytes": content["num_bytes"]}
        done.update((o["entry"], o | told) for o in content["outcomes"])
    return [done[entry.name] for entry in entries]


def _chunk(prefix: str, entries: tuple[Entry, ...]) -> Chunk:
    """Name a shard, so that it replaces neither a published one nor one with other entries."""
    names = _digest(entry.name for entry in entries)
    return Chunk(f"{prefix}-{names[:12]}", entries)


def _run_chunks(chunks: list[Chunk], job: Job, title: str) -> list[Chunk]:
    if not chunks:
        return chunks
    cluster.quiet_ray_data()
    shared = ray.put(job)
    work_of = [ray.put(chunk) for chunk in chunks]  # a task fetches its own and no other

    def work(row: dict[str, Any]) -> dict[str, Any]:
        chunk = ray.get(work_of[row["id"]])
        try:
            with plain_errors("S3"):
                write_shard(chunk, _job_of(shared))
        except Exception as exc:  # Ray Data would try it again for ever
            exc.add_note(traceback.format_exc())
            return {"num_files": 0, "error": cloudpickle.dumps(exc)}
        return {"num_files": len(chunk.entries), "error": b""}

    dataset = ray.data.range(len(chunks), override_num_blocks=len(chunks)).map(work)
    total = sum(len(chunk.entries) for chunk in chunks)
    with tqdm(total=total, desc=title, unit="img", file=sys.stderr, disable=None) as bar:
        for row in dataset.iter_rows():
            if row["error"]:
                raise cloudpickle.loads(row["error"])
            bar.update(row["num_files"])
    return chunks


@lru_cache(maxsize=1)
def _job_of(shared: ray.ObjectRef) -> Job:
    """Fetch the job once in each of Ray's processes: it lists all files, and takes its time."""
    job: Job = ray.get(shared)
    return job


def _is_whole(manifest: dict[str, Any], output: Place) -> bool:
    """Whether every shard of a published dataset is there, with as many bytes as were written."""
    sizes = {f"data/{name}": size for name, size in file_sizes(output / "data").items()}
    return all(sizes.get(name) == size for name, size in manifest["shard_bytes"].items())


def _remove_leftovers(output: Place, parts: set[str]) -> None:
    """Remove what no manifest speaks of any more, and what a killed call has left."""
    for name in file_sizes(output / "data"):
        if name.partition(".")[0] not in parts:
            (output / "data" / name).unlink(missing_ok=True)
    (output / IN_PROGRESS).unlink(missing_ok=True)


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
    job: Job,
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
    rejected = [rejection(file, problem, 0) for file, problem in files.skipped] + problems
    warnings, unlabelled, empty = [], [], []
    num_images = num_instances = joined = num_tiles = num_cut = 0
    stretched = {}
    for outcome in outcomes:
        name = outcome["image"]["name"] if outcome["image"] else None
        if outcome["annotation"] in dropped:  # with all its shapes, good or bad
            reason = f"{name} is already annotated by {owners[name]}; remove one of the two"
            problem = AnnotationError("imagePath", reason)
            rejected.append(rejection(outcome["annotation"], problem, outcome["num_shapes"]))
            continue
        rejected += outcome["rejected"]
        warnings += outcome["warnings"]
        if name is None:
            continue
        num_images += 1
        num_instances += outcome["image"]["num_instances"]
        joined += outcome["joined"]
        if outcome["image"]["stretch"] is not None:
            stretched[name] = outcome["image"]["stretch"]
        num_tiles += len(outcome["image"]["tiles"] or [])
        num_cut += outcome["image"]["num_cut"]
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
        "inputs": job.inputs,
        "settings": job.settings,
        "num_images": num_images,
        "num_instances": num_instances,
        "num_shapes": sum(outcome["num_shapes"] for outcome in outcomes)
        + sum(problem["num_shapes"] for problem in problems),
        "labels": dict(sorted(labels.items())),
        "joined": joined,
        "filtered": dict(sorted(filtered.items())),
        "not_instances": dict(sorted(not_instances.items())),
        "splits": {},
        "tiles": {
            "size": job.rules.tile,
            "overlap": job.rules.overlap,
            "num_tiles": num_tiles,
            "num_instances_cut": num_cut,
        }
        if job.rules.tile is not None
        else None,
        "stretched": stretched,
        "unlabelled": unlabelled,
        "empty": empty,
        "rejected": rejected,
        "warnings": warnings,
        "dropped_annotations": sorted(dropped),
        "shard_bytes": {f"data/{o['part']}.parquet": o["num_bytes"] for o in outcomes},
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


def _claim_output(job: Job) -> dict[str, Any] | None:
    """Return the manifest of what is there; else make the folder ours, or refuse it."""
    for name in ("manifest.json", IN_PROGRESS):
        if (job.output / name).exists():
            content = read_json(job.output / name)
            if not isinstance(content, dict) or content.get("settings") != job.settings:
                raise ConfigError(
                    f"--output-dir: {job.output} holds a dataset prepared with other settings or "
                    "by another samray; choose another folder or delete this one"
                )
            return content if name == "manifest.json" else None
    if is_used(job.output):
        raise ConfigError(
            f"--output-dir: {job.output} is not empty and holds no prepared dataset; choose another"
        )
    make_folder(job.output, "--output-dir")
    write_json(job.output / IN_PROGRESS, {"settings": job.settings})
    return None


def _job(
    files: RawFiles,
    entries: list[Entry],
    output: Place,
    settings: PrepareConfig,
    label_map: dict[str, str | None],
) -> Job:
    shard_keys = {"labels", "join_groups", "images_per_shard", "max_megapixels", "visualize"}
    shard_keys |= {"num_samples", "tile", "overlap"}
    split_keys = {"group_by", "val_fraction", "test_fraction"}
    deciding = settings.model_dump(mode="json", include=shard_keys)
    shards = _digest([json.dumps([deciding, label_map, FORMAT], sort_keys=True)])
    splits = json.dumps(settings.model_dump(mode="json", include=split_keys), sort_keys=True)
    contents = [f"{entry.name}\0{entry.stamp}" for entry in entries]
    contents += [f"{name}\0{stamp}" for name, stamp in files.stamps.items()]
    if settings.split_file:
        contents.append(str(read_bytes(resolve(settings.split_file, "--split-file"))))
    overlays = entries[: settings.num_samples] if settings.visualize else []
    rules = Rules(
        label_map,
        settings.labels,
        settings.max_megapixels,
        settings.join_groups,
        settings.tile,
        settings.overlap_pixels,
        frozenset(entry.name for entry in overlays),
    )
    return Job(files, output, rules, shards, _digest([shards, splits, *contents]))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read_label_map(settings: PrepareConfig) -> dict[str, str | None]:
    if settings.label_map is None:
        return {}
    path = resolve(settings.label_map, "--label-map")
    try:
        content = yaml.safe_load(read_bytes(path))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as exc:
        reason = " ".join(str(exc).split())  # YAML's own has several lines
        raise ConfigError(f"--label-map: {path} cannot be read as JSON or YAML ({reason})") from exc
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and (v is None or isinstance(v, str)) for k, v in content.items()
    ):
        raise ConfigError(f"--label-map: {path} must map texts to texts, such as {{old: new}}")
    return content
