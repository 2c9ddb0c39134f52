"""`samray predict` for many images: every object in them, or the objects of a prompts file.

`predict_images` reads top-down: list the images, plan the work, let Ray Data pass the images to
actors that load the model once (`ImageSegmenter`), and sum up the outcomes.

    OUT/<folders as in the input>/<stem>.json              LabelMe; also records the settings
                                  <stem>_labels.png        label map, 16 bits
                                  <stem>.csv               one row per object
                                  <stem>.predictions.json  with prompts: the endpoint's results
    OUT/predictions.json                                   summary and rejected images
    OUT/coco.json                                          all objects, with predict.coco
"""

import contextlib
import hashlib
import json
import os
import posixpath
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import ray
import torch
from ray import cloudpickle
from tqdm import tqdm

from samray import __version__, cluster
from samray.config import Config, PredictConfig, required
from samray.data.annotation import each_once
from samray.data.discovery import RawFiles, find_files, unread_reason
from samray.data.labelme import labelme_document, shapes_digest
from samray.errors import AnnotationError, ConfigError, DatasetError, StorageError
from samray.geometry.drawing import encode_picture
from samray.geometry.images import decode_image, read_image_file
from samray.instances.saved import instances_of
from samray.prediction.collection import mask_entries, write_coco
from samray.prediction.requests import ApiError, PromptRequest, mistakes_error, read_prompts
from samray.prediction.segmentation import (
    COLUMNS,
    answer_prompts,
    find_everything,
    find_instances,
    generator_settings,
    label_map,
    labelme_shapes,
    object_table,
    require_countable,
)
from samray.sam.checkpoint import Checkpoint, load_checkpoint
from samray.sam.shipped import load_shipped
from samray.sam.weights import digest_of
from samray.storage import (
    MAX_NAME,
    Place,
    csv_bytes,
    lock_folder,
    make_folder,
    plain_errors,
    read_bytes,
    read_head,
    read_json,
    relative_path,
    resolve,
    write_bytes,
    write_json,
)

FORMAT = 3  # of the outputs; raise it when the same settings write different files
SUMMARY, COCO = "predictions.json", "coco.json"
SUFFIXES = {"labelme": ".json", "labels": "_labels.png", "table": ".csv"}
ANSWERS = ".predictions.json"
MAX_BLOCKS = 2000  # of Ray Data; with fewer images each is a block of its own, for the progress bar
MAX_PROMPTS_BYTES = 2**30
PLAIN = PredictConfig()


@dataclass(frozen=True)
class BatchJob:
    """What every actor needs.

    Attributes:
        root: folder that the images' names are relative to.
        checkpoint: folder or file; None is `tiny` as it ships.
        model: name, version and checkpoint_digest.
        generator: arguments of SAM's mask generator; of a model that has an instance decoder,
            which one it is and how its maps become objects; with prompts, empty.
        label: of all shapes; None: those that the model has learnt.
        tile: side of the windows to look at larger images through; None: at the whole image.
    """

    root: Place
    output: Place
    checkpoint: Place | None
    model: dict[str, str]
    generator: dict[str, Any]
    label: str | None
    tile: int | None


@dataclass(frozen=True)
class BatchPlan:
    """The images to segment, and those left out.

    Attributes:
        work: {name, stamp, prompts} of each image; prompts are a JSON list, or None.
        skipped: images without an entry in the prompts file.
        rejected: {file, field, reason} of each image or entry that cannot be used.
    """

    work: list[dict[str, Any]]
    skipped: int
    rejected: list[dict[str, str]]


def predict_images(config: Config) -> dict[str, Any]:
    """Segment every image of a folder, or one image, and write the objects found in each.

    Args:
        config: its `predict` section, and the device of `scaling`.

    Returns:
        The summary, as written to OUTPUT_DIR/predictions.json: `images` done, `objects` in them,
        `found` (images done by an earlier call), `corrected` (those whose LabelMe file was changed
        since), `skipped`, `rejected`, `model`, `settings`.

    Raises:
        ConfigError: a setting, a folder or the prompts file cannot be used.
        CheckpointError: the checkpoint cannot be used.
        DatasetError: no image could be segmented.
    """
    settings = config.predict
    image_path, output_dir = required(config, "predict.image_path", "predict.output_dir")
    output = resolve(output_dir, "--output-dir")
    files = _find_images(resolve(image_path, "--image-path"), output)
    _require_batch(settings)
    plan = _plan(files, _read_prompts(settings), isinstance(output, Path))
    # The files of an image belong together; of two calls at once, each could write some of them.
    with lock_folder(output, "--output-dir"):
        _require_own(output, settings.coco)
        # A coco.json of an earlier call would describe other objects from now on.
        coco = settings.coco or ((output / COCO).exists() and (output / SUMMARY).exists())
        summary = _predict(plan, _job(files.root, output, settings), config, coco)
    if not summary["images"]:
        raise DatasetError(f"{image_path}: {_nothing_done(summary)}")
    return summary


def _predict(plan: BatchPlan, job: BatchJob, config: Config, coco: bool) -> dict[str, Any]:
    """Segment the images; return the summary, as written, and write all objects as COCO, too."""
    outcomes = []
    if plan.work:
        cluster.start()
        device = config.scaling.device
        cluster.require_visible(job.root / plan.work[0]["name"], "--image-path")
        cluster.require_shared(job.output, "--output-dir")
        cluster.wait_for_room(1, 1, cluster.gpus_per_actor(device))
        outcomes = _run(plan.work, job, device)
    make_folder(job.output, "--output-dir")
    done = [outcome for outcome in outcomes if outcome["reason"] is None]
    failed = [outcome for outcome in outcomes if outcome["reason"] is not None]
    rejected = plan.rejected + [
        {key: outcome[key] for key in ("file", "field", "reason")} for outcome in failed
    ]
    summary = {
        "images": len(done),
        "objects": sum(outcome["objects"] for outcome in done),
        "found": sum(outcome["found"] for outcome in done),
        "corrected": sorted(outcome["file"] for outcome in done if outcome["corrected"]),
        "skipped": plan.skipped,
        "rejected": sorted(rejected, key=lambda problem: problem["file"]),
        "model": job.model,
        "settings": {"label": job.label, "prompts": config.predict.prompts, **job.generator},
    }
    # First, as it says whose a coco.json is: a call that is killed in between can be given again.
    write_json(job.output / SUMMARY, summary)
    # Where no image could be done, an earlier one still describes the files that are there.
    if coco and (done or not (job.output / COCO).exists()):
        named = [(outcome["file"], _labelme_file(job.output, outcome["file"])) for outcome in done]
        write_coco(job.output / COCO, sorted(named))
    return summary


def _suffixes(prompts: str | None) -> dict[str, str]:
    """Of the files of an image."""
    return SUFFIXES if prompts is None else {**SUFFIXES, "answers": ANSWERS}


def _labelme_file(output: Place, name: str) -> Place:
    """Where the LabelMe file of an image is written."""
    return _beside(output / PurePosixPath(name).with_suffix("").as_posix(), SUFFIXES["labelme"])


def _run(work: list[dict[str, Any]], job: BatchJob, device: str) -> list[dict[str, Any]]:
    """Have actors segment the images; return the outcome of each."""
    cluster.quiet_ray_data()
    # Blocks come from the driver: the actors leave no CPU for tasks.
    images = ray.data.from_items(work, override_num_blocks=min(len(work), MAX_BLOCKS))
    dataset = images.map_batches(
        ImageSegmenter,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=1,
        num_gpus=cluster.gpus_per_actor(device),
        compute=ray.data.ActorPoolStrategy(size=cluster.pool_size(device, len(work))),
    )
    outcomes = []
    with tqdm(total=len(work), desc="predict", unit="img", file=sys.stderr, disable=None) as bar:
        for row in dataset.iter_rows():
            if row["error"]:
                raise cloudpickle.loads(row["error"])
            outcomes.append(json.loads(row["outcome"]))
            bar.update()
    return outcomes


class ImageSegmenter:
    """An actor of Ray Data: loads the model once, then segments image after image."""

    def __init__(self, job: BatchJob) -> None:
        self.job = job
        checkpoint, device = _load(job.checkpoint), cluster.actor_device()
        sam = checkpoint.model()
        self.instances = instances_of(checkpoint, sam)
        self.sam = sam.eval().to(device)
        if self.instances is not None:
            self.instances.decoder.to(device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Segment the images of a block; return the outcome of each, as JSON."""
        return pa.Table.from_pylist([self._outcome(row) for row in rows.to_pylist()], _OUTCOMES)

    def _outcome(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            with plain_errors("S3"):
                outcome = self._segment(row)
        except AnnotationError as problem:
            outcome = {"file": row["name"], "field": problem.field, "reason": problem.reason}
        except (MemoryError, torch.OutOfMemoryError):
            reason = "needs more memory than there is; cut it, or lower predict.points_per_side"
            outcome = {"file": row["name"], "field": "image", "reason": reason}
        except Exception as exc:  # Ray Data would retry it for ever
            exc.add_note(traceback.format_exc())
            return {"outcome": "", "error": cloudpickle.dumps(exc)}
        return {"outcome": json.dumps({"reason": None, **outcome}), "error": b""}

    def _segment(self, row: dict[str, Any]) -> dict[str, Any]:
        """Segment one image, unless it has been; return the counts.

        Raises:
            AnnotationError: the image or its prompts cannot be used, or an output file exists that
                this command did not write, or wrote for another image.
        """
        job, name = self.job, row["name"]
        path = job.root / name
        digest = _digest([FORMAT, job.model["checkpoint_digest"], job.label, job.generator, row])
        target = job.output / PurePosixPath(name).with_suffix("").as_posix()
        outputs = {
            kind: _beside(target, suffix) for kind, suffix in _suffixes(row["prompts"]).items()
        }
        image_path = relative_path(path, target.parent)
        record = _record(outputs["labelme"])
        if record and record["digest"] == digest and all(p.exists() for p in outputs.values()):
            counts = {"objects": record["objects"], "found": True}
            return {"file": name, **counts, "corrected": record["corrected"]}
        if record and record["corrected"]:
            raise AnnotationError(
                "output",
                f"{outputs['labelme']} was changed after this command wrote it, and is left as it "
                "is; move it away, or choose another --output-dir",
            )
        if record and record["image"] != image_path:
            raise AnnotationError(
                "output",
                f"{outputs['labelme']} is of another image, {record['image']!s:.200}, and is left "
                "as it is; choose another --output-dir, or rename the image",
            )
        if record is None:
            _require_ours(outputs["table"], [outputs["labels"], _beside(target, ANSWERS)])
        image = decode_image(_read(path))
        size = (image.shape[0], image.shape[1])
        answer: dict[str, Any] | None = None
        if row["prompts"] is None:
            if self.instances is None:
                objects = find_everything(self.sam, image, job.generator)
            else:
                objects = find_instances(self.sam, self.instances, image, job.tile)
        else:
            prompts = read_prompts(row["prompts"])
            _require_inside(prompts, size)
            objects, results = answer_prompts(self.sam, image, prompts)
            answer = {"width": size[1], "height": size[0], "model": job.model, "results": results}
        del image
        document = labelme_document(image_path, size, labelme_shapes(objects, job.label))
        masks = mask_entries(objects, size, job.label)
        document["samray"] = {
            "digest": digest,
            "objects": len(objects),
            "shapes": shapes_digest(document),  # tells whether somebody corrects them
            "masks": masks,
        }
        try:
            if record:  # it must not vouch for the files that replace the old ones
                outputs["labelme"].unlink()
                _beside(target, ANSWERS).unlink(missing_ok=True)
            make_folder(target.parent, "--output-dir")
            write_bytes(outputs["table"], object_table(objects, job.label))  # see _require_ours
            write_bytes(outputs["labels"], encode_picture(label_map(objects, size), ".png"))
            if answer is not None:
                write_json(outputs["answers"], answer)
            write_json(outputs["labelme"], document)  # last: it marks the other files as complete
        except StorageError:
            raise
        except OSError as exc:
            raise ConfigError(f"--output-dir: {target.parent} cannot be written ({exc})") from exc
        return {"file": name, "objects": len(objects), "found": False, "corrected": False}


_OUTCOMES = pa.schema([("outcome", pa.string()), ("error", pa.binary())])


def _find_images(path: Place, output: Place) -> RawFiles:
    """List the images to segment; what this command has written is not among them."""
    with plain_errors(f"--image-path: {path}"):
        if path.is_file():
            status = path.stat()
            stamps = {path.name: f"{status.st_size} {status.st_mtime}"}
            return RawFiles(path.parent, [], [path.name], [], stamps)
        if not path.is_dir():
            raise ConfigError(f"--image-path: {path} does not exist; check the path")
    way = _relative_folder(path, output)
    if way is not None and way.split("/")[0] in (".", ".."):
        if set(way.split("/")) <= {".", ".."}:
            raise ConfigError(
                f"--output-dir: the images lie in {output}, and what is written there would be "
                "taken for images the next time; choose another folder, inside the images' or not"
            )
        way = None
    found = _without(find_files(path), [] if way is None else [way])
    earlier = _folders_of_results(found)
    files = _without(found, earlier)
    if left_out := len(found.images) - len(files.images):
        folders = ", ".join(earlier)
        print(f"note: {left_out} images are left out: results of earlier calls, in {folders}")
    if not files.images:
        hint = ""
        if files.unread:
            name = files.unread[0]
            hint = (
                f"; {len(files.unread)} of other formats, the first: {name} {unread_reason(name)}"
            )
        raise ConfigError(f"--image-path: {path} has no image in it or below; check the path{hint}")
    return files


def _folders_of_results(files: RawFiles) -> list[str]:
    """The folders below the root that this command has written to."""
    folders = []
    for name in files.annotations:
        if name.endswith(f"/{SUMMARY}"):
            with contextlib.suppress(DatasetError):  # no JSON: not of this command
                if _is_summary(read_json(files.root / name)):
                    folders.append(posixpath.dirname(name))
    return folders


def _without(files: RawFiles, folders: list[str]) -> RawFiles:
    """Leave out what lies in some folders or below."""
    starts = tuple(f"{folder}/" for folder in folders)
    annotations, images, unread = (
        [name for name in names if not name.startswith(starts)]
        for names in (files.annotations, files.images, files.unread)
    )
    skipped = [item for item in files.skipped if not item[0].startswith(starts)]
    return RawFiles(files.root, annotations, images, skipped, files.stamps, unread)


def _relative_folder(folder: Place, other: Place) -> str | None:
    """Return the path of another folder relative to a folder; None if there is none."""
    if isinstance(folder, Path) != isinstance(other, Path):
        return None
    if not isinstance(folder, Path) and folder.drive != other.drive:
        return None
    return relative_path(other, folder)


def _require_batch(settings: PredictConfig) -> None:
    """Refuse settings that apply to one object of one image."""
    if settings.points or settings.negative_points or settings.box is not None:
        raise ConfigError("--prompts takes the place of --point and --box; leave those out")
    if settings.tile is not None and settings.prompts is not None:
        raise ConfigError("--tile does not go with --prompts; leave it out")


def _read_prompts(settings: PredictConfig) -> dict[str, Any] | None:
    """Return the content of the prompts file, entries unchecked; None without such a file."""
    if settings.prompts is None:
        return None
    path = resolve(settings.prompts, "--prompts")
    try:
        raw = read_bytes(path, MAX_PROMPTS_BYTES)
        content = json.loads(raw, object_pairs_hook=each_once)
    except StorageError:
        raise
    except AnnotationError as exc:
        raise ConfigError(f"--prompts: {path} {exc.reason}") from exc
    except OSError as exc:
        raise ConfigError(f"--prompts: {path} cannot be read ({exc.strerror})") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"--prompts: {path} is not JSON ({exc})") from exc
    if not isinstance(content, dict):
        raise ConfigError(
            f'--prompts: {path} must hold an object such as {{"images/a.jpg": [prompt, ...]}}, '
            f"not a {type(content).__name__}"
        )
    return content


def _plan(files: RawFiles, entries: dict[str, Any] | None, on_disk: bool) -> BatchPlan:
    """Collect the prompts of each image, and reject what cannot work before a model is loaded.

    Args:
        on_disk: whether the outputs are files, whose names must not be long.
    """
    rejected = [_rejection(name, problem) for name, problem in files.skipped]
    rejected += [
        _rejection(name, AnnotationError("format", unread_reason(name))) for name in files.unread
    ]
    asked: dict[str, str | None] = dict.fromkeys(files.images)
    if entries is not None:
        asked = {}
        for key, content in entries.items():
            try:
                name = _image_named(key, files)
                if name in files.unusable:
                    continue  # it is rejected above, with the reason
                if name in asked:
                    raise AnnotationError("name", f"is {name} once more; join the two entries")
                asked[name] = _checked(content)
            except AnnotationError as problem:
                named = key.encode(errors="backslashreplace").decode()  # printable
                rejected.append(_rejection(named, problem))
    work: list[dict[str, Any]] = []
    owners = {SUMMARY: "the list of all results", COCO: "the list of all objects"}
    for name in sorted(asked):
        stem = PurePosixPath(name).with_suffix("").as_posix()
        longest = max(_suffixes(asked[name]).values(), key=len)
        if on_disk and len(os.fsencode(posixpath.basename(stem) + longest)) > MAX_NAME:
            reason = f"is too long to write a file with {longest} after it; rename the image"
            rejected.append(_rejection(name, AnnotationError("name", reason)))
            continue
        outputs = [stem + suffix for suffix in (*SUFFIXES.values(), ANSWERS)]
        taken = [output for output in outputs if output in owners]
        if taken:
            reason = f"would be answered in {taken[0]}, as is {owners[taken[0]]}; rename one"
            rejected.append(_rejection(name, AnnotationError("name", reason)))
            continue
        owners.update(dict.fromkeys(outputs, name))
        work.append({"name": name, "stamp": files.stamps[name], "prompts": asked[name]})
    listed = {problem["file"] for problem in rejected}
    skipped = sum(name not in asked and name not in listed for name in files.images)
    return BatchPlan(work, skipped, rejected)


def _image_named(key: str, files: RawFiles) -> str:
    """Return the image that an entry of the prompts file names, usable or not.

    Raises:
        AnnotationError: field `name`; no such image was found.
    """
    name = posixpath.normpath(key)
    if posixpath.isabs(name) or name.split("/")[0] == "..":
        reason = "leads out of --image-path and is not followed; name the image as seen from there"
        raise AnnotationError("name", reason)
    if name not in files.image_set and name not in files.unusable:
        reason = "there is no such image; names are those seen from --image-path"
        raise AnnotationError("name", reason)
    return name


def _checked(content: Any) -> str:
    """Return an image's prompts as JSON, checked.

    Raises:
        AnnotationError: naming every mistake.
    """
    text = json.dumps(content)
    try:
        prompts = read_prompts(text)
        tokens = [
            (
                f"prompts[{number}].mask_token",
                "is for the endpoint; there is no earlier answer here",
            )
            for number, prompt in enumerate(prompts)
            if prompt.mask_token is not None
        ]
        if tokens:
            raise mistakes_error(tokens)
    except ApiError as exc:
        raise _as_problem(exc) from exc
    require_countable(prompts)
    return text


def _require_inside(prompts: list[PromptRequest], size: tuple[int, int]) -> None:
    """Refuse prompts outside an image of (H, W).

    Raises:
        AnnotationError: naming every such coordinate.
    """
    mistakes = [
        mistake
        for number, prompt in enumerate(prompts)
        for mistake in prompt.require_inside(size, f"prompts[{number}]")
    ]
    if mistakes:
        raise _as_problem(mistakes_error(mistakes))


def _as_problem(exc: ApiError) -> AnnotationError:
    """Return the endpoint's error on a request as a rejection of the image."""
    field = exc.field or "prompts"
    return AnnotationError(field, exc.message.removeprefix(f"{field}: "))


def _require_own(output: Place, coco: bool) -> None:
    """Refuse an output folder whose predictions.json, or coco.json, another program wrote."""
    if coco and (output / COCO).exists() and not (output / SUMMARY).exists():
        raise ConfigError(
            f"--output-dir: {output} holds a {COCO} that samray did not write; choose another"
        )
    if (output / SUMMARY).exists() and not _is_summary(read_json(output / SUMMARY)):
        raise ConfigError(
            f"--output-dir: {output} holds a {SUMMARY} that samray did not write; choose another "
            "folder"
        )


def _is_summary(content: Any) -> bool:
    """Whether a file's content is a summary of this command."""
    return isinstance(content, dict) and {"model", "rejected", "found"} <= content.keys()


def _job(root: Place, output: Place, settings: PredictConfig) -> BatchJob:
    """Find the model, check that it loads, and record which one it is.

    Raises:
        CheckpointError: it cannot be used.
    """
    given = settings.checkpoint
    checkpoint = _load(None if given is None else resolve(given, "--checkpoint"))
    # An unusable checkpoint ends the call here, with one line.
    instances = instances_of(checkpoint, checkpoint.model())
    digest = digest_of(checkpoint.weights)
    if given is None:
        name, version = "tiny", f"shipped-{__version__}"
    else:
        name, version = PurePosixPath(given).name, f"{checkpoint.path.name}-{digest[:8]}"
    model = {"name": name, "version": version, "checkpoint_digest": digest}
    generator = generator_settings(settings, checkpoint.model_type)
    if settings.prompts is not None:
        generator = {}  # each prompt gives an object; nothing searches for more
    elif instances is not None:  # another decoder or another way gives other objects
        decoder = digest_of(instances.decoder.state_dict())
        way = asdict(instances.way)
        unused = [key for key in generator if getattr(settings, key) != getattr(PLAIN, key)]
        if unused:
            print(f"note: {', '.join(unused)}: of the grid of points, which {name} does not need")
        generator = {"instance_decoder": decoder, "way": way, "tile": settings.tile}
    elif settings.tile is not None:
        raise ConfigError(
            f"--tile: {given or 'tiny'} has no instance decoder, and the grid of points looks at "
            "whole images; leave it out, or give a RUN that has one (train.instances)"
        )
    else:
        print(f"note: {name} has no instance decoder (train.instances): a grid of points is used")
    # The folder found, not the path given: a promotion may change what that path means.
    place = None if given is None else checkpoint.path
    return BatchJob(root, output, place, model, generator, settings.label, settings.tile)


def _load(place: Place | None) -> Checkpoint:
    return load_shipped() if place is None else load_checkpoint(place)


def _read(path: Place) -> bytes:
    """Return an image file's content; if it cannot be read, only this image is rejected.

    Raises:
        AnnotationError: field `file`.
        StorageError: the server cannot be reached, so no other image can be read either.
    """
    try:
        return read_image_file(path)
    except StorageError:
        raise
    except OSError as exc:
        raise AnnotationError("file", f"cannot be read ({exc.strerror})") from exc


def _record(path: Place) -> dict[str, Any] | None:
    """Return the record that an earlier call left in its LabelMe file; None if there is none.

    Its `corrected` says whether the shapes of the file have changed since, and `image` whose they
    are, as seen from the file.

    Raises:
        AnnotationError: field `output`; the file exists and was not written by this command.
    """
    if not path.exists():
        return None
    try:
        document = read_json(path)
        record = document["samray"]
        if {"digest", "objects"} <= record.keys():
            now = shapes_digest(document)
            corrected = record.get("shapes", now) != now
            return {**record, "corrected": corrected, "image": document.get("imagePath")}
    except (DatasetError, KeyError, TypeError, AttributeError):
        pass
    raise AnnotationError(
        "output",
        f"{path} is there and was not written by this command; it is left as it is; choose another "
        "--output-dir",
    )


def _require_ours(table: Place, others: list[Place]) -> None:
    """Refuse to replace files that are not from a call of this command that was killed.

    Such a call has written the table first, and no LabelMe file.

    Raises:
        AnnotationError: field `output`.
    """
    if table.exists():
        foreign = None if read_head(table).startswith(csv_bytes([COLUMNS])) else table
    else:
        foreign = next((path for path in others if path.exists()), None)
    if foreign is not None:
        raise AnnotationError(
            "output",
            f"{foreign} is there and was not written by this command; it is left as it is; move it "
            "away, or choose another --output-dir",
        )


def _beside(target: Place, suffix: str) -> Place:
    return target.parent / f"{target.name}{suffix}"


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _rejection(file: str, problem: AnnotationError) -> dict[str, str]:
    return {"file": file, "field": problem.field, "reason": problem.reason}


def _nothing_done(summary: dict[str, Any]) -> str:
    """Return why no image was segmented, with the first reason."""
    rejected = summary["rejected"]
    if not rejected:
        return f"none of its {summary['skipped']} images has an entry in --prompts"
    first = rejected[0]
    return (
        f"no image could be segmented; {len(rejected)} rejected, the first: "
        f"{first['file']}: {first['field']}: {first['reason']}"
    )
