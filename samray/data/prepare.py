"""LabelMe pairs or COCO files to a prepared dataset, rasterised in parallel by Ray Data.

`prepare` reads top-down: list the files, keep the shards of an earlier call whose files have not
changed, let Ray Data turn each chunk of the others into one Parquet shard (`write_shard`), add up
the outcomes, assign splits, publish the manifest last.
"""

import hashlib
import json
import posixpath
import re
import sys
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
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
from samray.data.annotation import IGNORE, MAX_JSON_BYTES
from samray.data.coco import CocoImage, is_coco, may_be_coco, read_coco
from samray.data.dataset import FORMAT, SCHEMA, dataset_digest
from samray.data.discovery import RawFiles, find_files, fold
from samray.data.intake import Entry, Rules, is_current, read_entry
from samray.data.outcome import Outcome, PreparedImage, Rejection
from samray.data.splits import SplitRule
from samray.errors import AnnotationError, ConfigError, DatasetError, StorageError
from samray.storage import (
    Place,
    file_sizes,
    is_used,
    lock_folder,
    make_folder,
    plain_errors,
    read_bytes,
    read_head,
    read_json,
    require_folder,
    resolve,
    resolve_local,
    whole_file,
    write_json,
)

ROW_GROUP_BYTES = 8 * 2**20  # read at random in training, so small
S3_THREADS = 4  # of one task
IN_PROGRESS = "preparing.json"


@dataclass(frozen=True)
class Chunk:
    """The work of one task: the entries of one shard.

    Attributes:
        part: name of the shard without extension.
        entries: in order.
    """

    part: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Shard:
    """A complete shard, as the JSON beside it describes it.

    Attributes:
        part: its name without extension.
        num_bytes: size of the Parquet file.
        outcomes: one for each entry, in order.
    """

    part: str
    num_bytes: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class PrepareJob:
    """What every task of one call needs to know.

    Attributes:
        settings_digest: sha256 of the settings that decide the shards.
        inputs_digest: sha256 of these, the files, and the settings that decide the splits.
    """

    files: RawFiles
    output: Place
    rules: Rules
    settings_digest: str
    inputs_digest: str

    @property
    def settings(self) -> PrepareConfig:
        """The `prepare` section."""
        return self.rules.settings


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
    _require_outside_datasets(output)
    label_map = _read_label_map(settings)
    rule = SplitRule(settings)
    link_root = settings.link_root and resolve_local(settings.link_root, "prepare.link_root")
    if link_root:
        require_folder(link_root, "prepare.link_root")
    own = ((settings.split_file, "--split-file"), (settings.label_map, "--label-map"))
    others = [resolve(file, option) for file, option in own if file]
    files = find_files(root, link_root or None, others)
    coco, problems = _take_coco(files)
    if not files.annotations and not coco and not problems:
        raise _no_annotation(files)
    entries = [Entry(name, "labelme", files.stamps[name]) for name in files.annotations]
    entries += [Entry.of_coco(image) for image in coco]
    job = _prepare_job(files, entries, output, settings, label_map)
    # A second call at once would remove the shards that this one is writing.
    with lock_folder(output, "--output-dir"):
        return _prepare(entries, problems, rule, job, config)


def _prepare(
    entries: list[Entry],
    problems: list[Rejection],
    rule: SplitRule,
    job: PrepareJob,
    config: Config,
) -> dict[str, Any]:
    """`prepare` in a folder that is this process's."""
    settings, output, files = job.settings, job.output, job.files
    with plain_errors(f"--output-dir: {output}"):
        finished = _claim_output(job)
    same_inputs = finished is not None and finished["inputs"] == job.inputs_digest
    if finished is not None and same_inputs and _is_whole(finished, output):
        _require_clean(finished["rejected"], settings)
        print(f"{output} is already prepared from the same inputs; nothing to do")
        return finished
    cluster.start()
    cluster.require_visible(files.root / next(iter(files.stamps)), "--data-dir")
    cluster.require_shared(output, "--output-dir")
    cluster.wait_for_room(1, 1, 0)
    generation = finished["generation"] + 1 if finished else 1
    outcomes, shards = _run(entries, job, generation)
    manifest = _manifest(outcomes, problems, shards, generation, rule, job)
    save_config(config, output / "config.yaml")
    write_json(output / "manifest.json", manifest)
    _remove_leftovers(output, set(shards))
    return manifest


def write_shard(chunk: Chunk, job: PrepareJob) -> None:
    """Read, check and rasterise the entries of a chunk into one shard and its list of outcomes."""
    outcomes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    data = job.output / "data"
    with whole_file(data / f"{chunk.part}.parquet") as temporary:
        with pq.ParquetWriter(temporary, SCHEMA, compression={"image": "none"}) as writer:
            for outcome, new in _read_in_order(chunk.entries, job):
                outcomes.append(asdict(outcome))
                rows += new
                if sum(len(r["image"]) for r in rows) >= ROW_GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
        size = temporary.stat().st_size
    content = {"settings": job.settings_digest, "num_bytes": size, "outcomes": outcomes}
    write_json(data / f"{chunk.part}.json", content)  # last: it marks the shard as complete


def _read_in_order(
    entries: tuple[Entry, ...], job: PrepareJob
) -> Iterator[tuple[Outcome, list[dict[str, Any]]]]:
    """Read entries one by one from disk; from S3, which has a latency, a few at once."""
    threads = 1 if isinstance(job.files.root, Path) else S3_THREADS
    waiting: deque[Future[tuple[Outcome, list[dict[str, Any]]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for entry in entries:
            waiting.append(
                pool.submit(read_entry, entry, job.files, job.rules, job.output / "overlays")
            )
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _take_coco(files: RawFiles) -> tuple[list[CocoImage], list[Rejection]]:
    """Move COCO files out of the list of LabelMe's; return their images, and what is unusable."""
    images: list[CocoImage] = []
    problems: list[Rejection] = []
    for name in list(files.annotations):
        # A JSON with the stem of an image is LabelMe's; in S3 each look costs a request.
        if fold(PurePosixPath(name).stem) in files.by_stem:
            continue
        try:
            if not may_be_coco(read_head(files.root / name)):
                continue
            raw = read_bytes(files.root / name, MAX_JSON_BYTES)
            if not is_coco(raw):
                continue  # some other JSON: read as a LabelMe file
            found, faults = read_coco(raw, name)
        except StorageError:
            raise
        except OSError:
            continue  # its task says why it cannot be read
        except AnnotationError as problem:
            files.annotations.remove(name)
            problems.append(Rejection.of(name, problem, 0))
            continue
        files.annotations.remove(name)
        files.coco.append(name)
        images += found
        problems += [Rejection(name, *fault) for fault in faults]
    return images, problems


def _run(
    entries: list[Entry], job: PrepareJob, generation: int
) -> tuple[list[Outcome], dict[str, int]]:
    """Make every shard that is missing.

    Args:
        generation: how many times this dataset will have been published.

    Returns:
        outcomes: of the entries, in their order, then of the images without annotation.
        shards: bytes of each shard, by its part, in the order of the outcomes.

    Raises:
        ConfigError: the dataset published in the output folder has no file in common with these.
    """
    make_folder(job.output / "data", "--output-dir")
    earlier = _earlier_shards(job)
    done = _run_entries("part", entries, earlier, job, generation)
    claimed = {outcome.claims for outcome, _ in done}
    rest = [
        Entry(image, "image", job.files.stamps[image])
        for image in job.files.images
        if image not in claimed
    ]
    done += _run_entries("unlabelled", rest, earlier, job, generation)
    shards = {shard.part: shard.num_bytes for _, shard in done}
    return [outcome for outcome, _ in done], shards


def _earlier_shards(job: PrepareJob) -> list[Shard]:
    """Each complete shard of an earlier call with these settings."""
    shards = []
    sizes = file_sizes(job.output / "data")
    for name in sizes:
        if name.endswith(".json") and not name.startswith("."):
            content = read_json(job.output / "data" / name)
            part = name.removesuffix(".json")
            whole = (job.settings_digest, sizes.get(f"{part}.parquet"))
            if whole == (content["settings"], content["num_bytes"]):
                shards.append(_shard(part, content))
    return shards


def _shard(part: str, content: dict[str, Any]) -> Shard:
    outcomes = tuple(Outcome.from_json(outcome) for outcome in content["outcomes"])
    return Shard(part, content["num_bytes"], outcomes)


def _run_entries(
    prefix: str, entries: list[Entry], earlier: list[Shard], job: PrepareJob, generation: int
) -> list[tuple[Outcome, Shard]]:
    """Make the missing shards of entries; return the outcome and the shard of each entry."""
    wanted = {entry.name: entry for entry in entries}
    done: dict[str, tuple[Outcome, Shard]] = {}
    mine = [shard for shard in earlier if shard.part.startswith(f"{prefix}-")]
    for shard in mine:
        if all(
            outcome.entry in wanted
            and outcome.entry not in done
            and is_current(outcome, wanted[outcome.entry], job.files)
            for outcome in shard.outcomes
        ):
            done.update((outcome.entry, (outcome, shard)) for outcome in shard.outcomes)
    if generation > 1 and prefix == "part" and mine and not done:
        known = {outcome.entry for shard in mine for outcome in shard.outcomes}
        if not known & set(wanted):
            raise ConfigError(
                f"--output-dir: {job.output} holds a dataset prepared from other files; choose "
                "another folder or delete this one"
            )
    missing = [entry for entry in entries if entry.name not in done]
    if done and missing:
        print(f"{prefix}: {len(done)} files are prepared already, {len(missing)} are not")
    size = job.settings.images_per_shard
    chunks = [
        _chunk(f"{prefix}-{generation}", tuple(missing[start : start + size]))
        for start in range(0, len(missing), size)
    ]
    for chunk in _run_chunks(chunks, job, "prepare" if prefix == "part" else prefix):
        shard = _shard(chunk.part, read_json(job.output / "data" / f"{chunk.part}.json"))
        done.update((outcome.entry, (outcome, shard)) for outcome in shard.outcomes)
    return [done[entry.name] for entry in entries]


def _chunk(prefix: str, entries: tuple[Entry, ...]) -> Chunk:
    """Name a shard, so that it replaces neither a published one nor one with other entries."""
    names = _digest(entry.name for entry in entries)
    return Chunk(f"{prefix}-{names[:12]}", entries)


def _run_chunks(chunks: list[Chunk], job: PrepareJob, title: str) -> list[Chunk]:
    if not chunks:
        return chunks
    cluster.quiet_ray_data()
    shared = ray.put(job)
    work_of = [ray.put(chunk) for chunk in chunks]  # each task fetches only its own

    def work(row: dict[str, Any]) -> dict[str, Any]:
        chunk = ray.get(work_of[row["id"]])
        try:
            with plain_errors("S3"):
                write_shard(chunk, _job_of(shared))
        except Exception as exc:  # Ray Data would retry it endlessly
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
def _job_of(shared: ray.ObjectRef) -> PrepareJob:
    """Fetch the job once in each Ray process: it lists all files, so fetching it is slow."""
    job: PrepareJob = ray.get(shared)
    return job


def _is_whole(manifest: dict[str, Any], output: Place) -> bool:
    """Whether every shard of a published dataset is there, with as many bytes as were written."""
    sizes = {f"data/{name}": size for name, size in file_sizes(output / "data").items()}
    return all(sizes.get(name) == size for name, size in manifest["shard_bytes"].items())


def _remove_leftovers(output: Place, parts: set[str]) -> None:
    """Remove what the manifest does not list, and what a killed call has left."""
    for name in file_sizes(output / "data"):
        if name.partition(".")[0] not in parts:
            (output / "data" / name).unlink(missing_ok=True)
    (output / IN_PROGRESS).unlink(missing_ok=True)


def _manifest(
    outcomes: list[Outcome],
    problems: list[Rejection],
    shards: dict[str, int],
    generation: int,
    rule: SplitRule,
    job: PrepareJob,
) -> dict[str, Any]:
    """Add up the outcomes, and assign the splits.

    Raises:
        ConfigError: the split file names images that are not in the dataset.
        DatasetError: nothing usable, an empty split, or anything bad under `strict`.
    """
    dropped = _dropped(outcomes)
    kept = [outcome for outcome in outcomes if outcome.annotation not in dropped]
    images = [outcome.image for outcome in kept if outcome.image]
    annotated = [outcome.image for outcome in kept if outcome.image and outcome.annotation]
    rejected = _rejected(outcomes, dropped, problems, job.files)
    _require_clean(rejected, job.settings)
    _require_instances(kept, rejected, job.files)
    rule.require_known(annotated, [outcome.claims for outcome in outcomes if outcome.claims])
    assigned = rule.assign(annotated)
    rows = {image.name: image.tiles or [image.name] for image in annotated}
    splits = {
        split: [row for name in names for row in rows[name]]
        for split, names in assigned.members.items()
    }
    warnings = [warning for outcome in kept for warning in outcome.warnings] + assigned.warnings
    return {
        "format": FORMAT,
        "samray_version": __version__,
        "inputs": job.inputs_digest,
        "settings": job.settings_digest,
        "num_images": len(images),
        "num_instances": sum(image.num_instances for image in images),
        "num_shapes": sum(outcome.num_shapes for outcome in outcomes)
        + sum(problem.num_shapes for problem in problems),
        "labels": dict(sorted(_total(outcome.labels for outcome in kept).items())),
        "joined": sum(outcome.joined for outcome in kept),
        "filtered": dict(sorted(_total(outcome.filtered for outcome in kept).items())),
        "not_instances": dict(sorted(_total(outcome.not_instances for outcome in kept).items())),
        "splits": splits,
        "splits_by": assigned.by,
        "notes": assigned.notes + _notes(kept, job.files),
        "tiles": _tile_counts(images, job.settings),
        "stretched": {image.name: list(image.stretch) for image in images if image.stretch},
        "unlabelled": [o.image.name for o in kept if o.image and o.annotation is None],
        "empty": [image.name for image in annotated if not image.num_instances],
        "background": _background(outcomes, dropped),
        "rejected": rejected,
        "warnings": [asdict(warning) for warning in warnings],
        "dropped_annotations": sorted(dropped),
        "shard_bytes": {f"data/{part}.parquet": size for part, size in shards.items()},
        "shards": [f"data/{part}.parquet" for part in shards],
        "generation": generation,
        "digest": dataset_digest(images, splits),
    }


def _background(outcomes: list[Outcome], dropped: Container[str | None]) -> list[str]:
    """The images of which the annotation says that no object is there.

    Not those of which a shape or a second file was rejected, or that have lines, points or crowds:
    they may show objects.
    """
    doubtful = {o.claims for o in outcomes if o.rejected or o.annotation in dropped}
    return [
        outcome.image.name
        for outcome in outcomes
        if outcome.image
        and outcome.annotation
        and outcome.annotation not in dropped
        and not (outcome.image.num_instances or outcome.rejected or outcome.not_instances)
        and outcome.image.name not in doubtful
    ]


def _notes(kept: list[Outcome], files: RawFiles) -> list[str]:
    """Sentences for the user about what is left out as a whole, or may be meant otherwise."""
    notes = []
    for label in _total(outcome.labels for outcome in kept):
        if label != IGNORE and label.lower().strip("_ ") in ("ignore", "ignored"):
            notes.append(
                f"label {label} is a class of objects; if it marks regions to leave out, give a "
                f"prepare.label_map that renames it to {IGNORE}"
            )
    if crowds := _total(outcome.not_instances for outcome in kept)["crowd"]:
        notes.append(_of_crowds(crowds))
    if files.unread:
        kinds = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in files.unread}))
        notes.append(
            f"{len(files.unread)} images are of formats that are not read ({kinds}); convert them "
            "to PNG or JPEG"
        )
    return notes


def _of_crowds(number: int) -> str:
    return (
        f"{number} annotations are crowds (iscrowd 1), as CVAT writes brush masks, and are no "
        "instances; prepare.crowd_as_instances=true makes each one an instance"
    )


def _no_annotation(files: RawFiles) -> DatasetError:
    counts = f"{len(files.images)} images"
    if files.unread:
        counts += f", {len(files.unread)} of formats that are not read"
    hint = ""
    if files.skipped:
        name, problem = files.skipped[0]
        hint = f"; {len(files.skipped)} items are not read, the first: {name}: {problem}"
    return DatasetError(
        f"{files.root}: no LabelMe JSON or COCO file in it or below ({counts}); "
        f"check --data-dir{hint}"
    )


def _dropped(outcomes: list[Outcome]) -> dict[str, str]:
    """Annotations of an image that another one annotates: {annotation: reason}.

    The JSON beside the image with its stem is kept, else the one whose path is the image's, else
    the first with an instance. Where different paths led to the image, and none is its own, it may
    be the picture of none of them.
    """
    claims: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.image and outcome.annotation:
            claims[outcome.image.name].append(outcome)
    dropped = {}
    for image, rivals in claims.items():
        best = min(rivals, key=_claim_rank)
        paths = {outcome.image_path for outcome in rivals}
        unsure = len(paths) > 1 and _claim_rank(best)[:2] == (True, True)
        for outcome in rivals:
            assert outcome.annotation is not None
            if unsure:
                named = ", ".join(sorted(repr(path)[:100] for path in paths)[:3])
                dropped[outcome.annotation] = (
                    f"{image} may be any of the images that different annotations name ({named}); "
                    "correct their paths"
                )
            elif outcome is not best:
                reason = f"{image} is already annotated by {best.annotation}; remove one of the two"
                dropped[outcome.annotation] = reason
    return dropped


def _claim_rank(outcome: Outcome) -> tuple[bool, bool, bool]:
    """Lower for the better of two annotations of one image; see `_dropped`."""
    assert outcome.image is not None
    assert outcome.annotation is not None
    image = PurePosixPath(outcome.image.name)
    annotation = PurePosixPath(re.sub(r"(?i)(\.json)#.*", r"\1", outcome.annotation))
    named = posixpath.normpath(annotation.parent / (outcome.image_path or ""))
    return (
        image.with_suffix("") != annotation.with_suffix(""),
        fold(named) != fold(str(image)),
        not outcome.image.num_instances,
    )


def _rejected(
    outcomes: list[Outcome], dropped: dict[str, str], problems: list[Rejection], files: RawFiles
) -> list[dict[str, Any]]:
    """The manifest's `rejected`: unusable files first, then in the order of the outcomes."""
    rejected = [Rejection.of(file, problem, 0) for file, problem in files.skipped] + problems
    for outcome in outcomes:
        if outcome.annotation in dropped:  # with all its shapes, usable or not
            reason = dropped[outcome.annotation]
            rejected.append(Rejection(outcome.entry, "imagePath", reason, outcome.num_shapes))
        else:
            rejected += outcome.rejected
    return [asdict(rejection) for rejection in rejected]


def _total(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _shortened(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts for a message: the first labels, and of each the first letters."""
    return {f"{label:.60}": count for label, count in list(counts.items())[:20]}


def _tile_counts(images: list[PreparedImage], settings: PrepareConfig) -> dict[str, int] | None:
    if settings.tile is None:
        return None
    return {
        "size": settings.tile,
        "overlap": settings.overlap_pixels,
        "num_tiles": sum(len(image.tiles or []) for image in images),
        "num_instances_cut": sum(image.num_cut for image in images),
    }


def _require_instances(
    kept: list[Outcome], rejected: list[dict[str, Any]], files: RawFiles
) -> None:
    """Refuse a dataset without a single instance, with what may be the cause."""
    if any(outcome.labels for outcome in kept):
        return
    hint = ""
    if crowds := _total(outcome.not_instances for outcome in kept)["crowd"]:
        hint = f"; {_of_crowds(crowds)}"
    if rejected:
        first = rejected[0]
        hint += f"; {len(rejected)} problems, the first: "
        hint += f"{first['file']}: {first['field']}: {first['reason']}"
    if filtered := _total(outcome.filtered for outcome in kept):
        hint += f"; filtered out: {_shortened(filtered)}"
    raise DatasetError(f"{files.root}: no instance is usable{hint}")


def _require_clean(rejected: list[dict[str, Any]], settings: PrepareConfig) -> None:
    """Under `strict`, raise one DatasetError that lists everything bad."""
    if settings.strict and rejected:
        lines = [f"  {r['file']}: {r['field']}: {r['reason']}" for r in rejected]
        raise DatasetError(
            f"{len(lines)} bad items, and --strict allows none; fix or remove them:\n"
            + "\n".join(lines)
        )


def _require_outside_datasets(output: Place) -> None:
    """Refuse a local folder inside a prepared dataset: who deletes the one would lose the other."""
    for folder in output.parents if isinstance(output, Path) else ():
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(manifest, dict) and {"format", "samray_version"} <= manifest.keys():
            raise ConfigError(
                f"--output-dir: {output} lies inside the prepared dataset {folder}; choose a "
                "folder beside it"
            )


def _claim_output(job: PrepareJob) -> dict[str, Any] | None:
    """Return the manifest that is there; else mark the folder as this job's, or refuse it."""
    for name in ("manifest.json", IN_PROGRESS):
        if (job.output / name).exists():
            content = read_json(job.output / name)
            same = isinstance(content, dict) and content.get("settings") == job.settings_digest
            # An earlier samray left the regions out, and would have no reason to read them again.
            dropped = same and IGNORE in content.get("filtered", {})
            if not same or (dropped and job.rules.label_map.get(IGNORE, IGNORE) == IGNORE):
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
    write_json(job.output / IN_PROGRESS, {"settings": job.settings_digest})
    return None


def _prepare_job(
    files: RawFiles,
    entries: list[Entry],
    output: Place,
    settings: PrepareConfig,
    label_map: dict[str, str | None],
) -> PrepareJob:
    shard_keys = {"labels", "join_groups", "images_per_shard", "max_megapixels", "visualize"}
    shard_keys |= {"num_samples", "tile", "overlap", "crowd_as_instances"}
    split_keys = {"group_by", "split_folders", "val_fraction", "test_fraction"}
    deciding = settings.model_dump(mode="json", include=shard_keys)
    shards = _digest([json.dumps([deciding, label_map, FORMAT], sort_keys=True)])
    splits = json.dumps(settings.model_dump(mode="json", include=split_keys), sort_keys=True)
    contents = [f"{entry.name}\0{entry.stamp}" for entry in entries]
    contents += [f"{name}\0{stamp}" for name, stamp in files.stamps.items()]
    contents += [*files.unread, *(f"{name}\0{problem}" for name, problem in files.skipped)]
    if settings.split_file:
        contents.append(str(read_bytes(resolve(settings.split_file, "--split-file"))))
    overlays = entries[: settings.num_samples] if settings.visualize else []
    rules = Rules(settings, label_map, frozenset(entry.name for entry in overlays))
    return PrepareJob(files, output, rules, shards, _digest([shards, splits, *contents]))


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read_label_map(settings: PrepareConfig) -> dict[str, str | None]:
    if settings.label_map is None:
        return {}
    path = resolve(settings.label_map, "--label-map")
    try:
        raw = read_bytes(path)
        try:  # as YAML, JSON may have no tabs, and its "\ud83d\ude00" is two halves of a letter
            content = json.loads(raw.decode("utf-8-sig"))
        except ValueError:
            content = yaml.safe_load(raw)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as exc:
        reason = " ".join(str(exc).split())  # YAML's message has several lines
        raise ConfigError(f"--label-map: {path} cannot be read as JSON or YAML ({reason})") from exc
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and (v is None or (isinstance(v, str) and v.strip()))
        for k, v in content.items()
    ):
        raise ConfigError(
            f"--label-map: {path} must map texts to texts, such as {{old: new}}, or to null, which "
            "leaves a label out; a label has at least one letter"
        )
    for old, new in content.items():
        try:
            (new or "").encode()
        except UnicodeEncodeError as exc:  # half of a surrogate pair
            raise ConfigError(
                f"--label-map: {path} gives {old!r:.60} a label that is not Unicode text "
                f"({new!r:.60}); write it without \\u escapes"
            ) from exc
    return {old: new and new.strip() for old, new in content.items()}
