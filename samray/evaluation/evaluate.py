"""Score a model, or compare base and tuned, on a held-out split, per kind of prompt and label."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from torch import Tensor
from tqdm import tqdm

from samray import __version__, cluster
from samray.config import Config, required, save_config, with_settings
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.errors import ConfigError, DatasetError
from samray.evaluation.clicks import (
    ClickCount,
    choose_objects,
    clicks_change,
    clicks_summary,
    count_clicks,
)
from samray.evaluation.metrics import Score
from samray.evaluation.objects import compare_objects, draw_objects, num_errors
from samray.evaluation.report import instance_rows, report_page
from samray.evaluation.scoring import embedding_of, evaluation_prompt, score_image
from samray.evaluation.summary import changes, objects_change, summary
from samray.geometry.drawing import draw_masks, draw_prompt_marks, encode_picture, shrink
from samray.geometry.images import decode_image
from samray.instances.metrics import ImageObjects, score_instances
from samray.instances.saved import InstanceModel, instances_of
from samray.runs import RunFolder
from samray.sam.checkpoint import (
    Checkpoint,
    find_tuned,
    load_checkpoint,
    refuse_ambiguous,
    stands_alone,
)
from samray.sam.decode import predict_masks
from samray.sam.embeddings import EmbeddingCache, embeddings_folder
from samray.sam.encode import full_precision
from samray.sam.model import encoder_digest
from samray.sam.shipped import load_shipped
from samray.sam.store import RECORD
from samray.sam.weights import OFFICIAL_WEIGHTS, fetch_official
from samray.storage import (
    CURRENT,
    Place,
    lock_folder,
    make_folder,
    plain_errors,
    relative_path,
    require_folder,
    resolve,
    write_bytes,
    write_csv,
    write_json,
)

OVERLAY_STRATEGY = "random"
OVERLAY_SIDE = 360  # pixels
OBJECTS_SIDE = 560  # pixels, of pictures of all objects of an image
# What is not a folder for reports: a RUN, a SWEEP, a dataset, a checkpoint, a version, a model.
_TAKEN = ("run.json", "sweep.json", "manifest.json", "weights.pth", RECORD, CURRENT)


def evaluate(config: Config) -> dict[str, Any]:
    """Score a run's base and its best checkpoint, or the one given; write JSON and HTML.

    Weights that belong to no run are scored alone, as `base`.

    Args:
        config: its `evaluate`, `scaling` and `embeddings` sections.

    Returns:
        The content of OUTPUT_DIR/evaluation.json.

    Raises:
        SamrayError: a folder, the dataset or the weights cannot be used.
    """
    settings = config.evaluate
    data_dir, checkpoint, output_dir = required(
        config, "evaluate.data_dir", "evaluate.checkpoint", "evaluate.output_dir"
    )
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    records = dataset.split(settings.split, background=True)
    other = _open_other(settings.other_data_dir)
    output = resolve(output_dir, "--output-dir")
    _require_no_other_use(output)
    judged = _find_models(checkpoint)
    with lock_folder(output, "--output-dir"):  # the files of an evaluation belong together
        return _evaluate(config, dataset, records, other, judged, output)


def _require_no_other_use(output: Place) -> None:
    """Refuse a folder whose own config.yaml or instances.json an evaluation would replace."""
    with plain_errors(f"--output-dir: {output}"):
        taken = next((name for name in _TAKEN if (output / name).exists()), None)
    if taken is not None:
        raise ConfigError(
            f"--output-dir: {output} holds {taken}, and an evaluation would replace files that "
            "belong to it; choose another folder, for example report"
        )


def _evaluate(
    config: Config,
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    other: "Other | None",
    judged: "Judged",
    output: Place,
) -> dict[str, Any]:
    settings = config.evaluate
    cluster.start()
    if judged.run is not None:
        cluster.require_visible(judged.run.path / "run.json", "--checkpoint")
    cluster.require_visible(dataset.folder / "manifest.json", "--data-dir")
    if other is not None:
        cluster.require_visible(other.dataset.folder / "manifest.json", "--other-data-dir")
    make_folder(output, "--output-dir")
    outcomes, pictures = _score_all(config, dataset, records, judged.checkpoints)
    evaluation = {
        "samray_version": __version__,
        "split": settings.split,
        **_numbers(records),
        "seed": settings.seed,
        "dataset_digest": dataset.digest,
        **judged.described(dataset.digest),
        **_figures(outcomes, records),
    }
    if other is not None:
        evaluation["other"] = _score_other(config, other, judged.checkpoints)
    # Absolute, so that the saved config means the same in another working directory.
    paths = {
        "evaluate.data_dir": str(dataset.folder),
        "evaluate.checkpoint": judged.saved_as,
        "evaluate.output_dir": str(output),
        "evaluate.other_data_dir": str(other.dataset.folder) if other else None,
    }
    save_config(with_settings(config, paths, "evaluate"), output / "config.yaml")
    write_json(output / "evaluation.json", evaluation)
    scores = {model: outcome.scores for model, outcome in outcomes.items()}
    instances = {model: [asdict(score) for score in found] for model, found in scores.items()}
    write_json(output / "instances.json", instances)
    write_csv(output / "instances.csv", instance_rows(scores))
    html = report_page(evaluation, judged.run, pictures)
    write_bytes(output / "report.html", html.encode())
    return evaluation


@dataclass(frozen=True)
class Other:
    """The second dataset, and which of its images are scored."""

    dataset: PreparedDataset
    split: str
    records: Sequence[ImageRecord]


def _open_other(folder: str | None) -> Other | None:
    """The second dataset's test split; all of its images if no test image has an object."""
    if folder is None:
        return None
    option = "--other-data-dir"
    dataset = PreparedDataset(require_folder(resolve(folder, option), option))
    for split, names in (
        ("test", dataset.manifest["splits"]["test"]),
        ("all", list(dataset.images)),
    ):
        records = dataset.with_instances(names, background=True)
        if len(records):
            return Other(dataset, split, records)
    raise DatasetError(f"{option}: {dataset.folder} has no instance; choose another dataset")


def _score_other(
    config: Config, other: Other, checkpoints: dict[str, Place | None]
) -> dict[str, Any]:
    """Return `other` of evaluation.json."""
    outcomes = score_models(config, other.dataset, other.records, checkpoints, find_objects=True)
    return {
        "data_dir": str(other.dataset.folder),
        "dataset_digest": other.dataset.digest,
        "split": other.split,
        **_numbers(other.records),
        **_figures(outcomes, other.records),
    }


def _numbers(records: Sequence[ImageRecord]) -> dict[str, int]:
    """Number of photos with an instance, not of their tiles, and of instances."""
    return {
        "num_images": len({record.source for record in records if record.num_instances}),
        "num_instances": sum(record.num_instances for record in records),
    }


@dataclass(frozen=True)
class Judged:
    """The models to score.

    Attributes:
        run: the RUN that holds both; None for weights of no run.
        checkpoints: `base`, and `tuned` of a run; None is `tiny` as it ships.
        last: the tuned model, or the only one.
        saved_as: value of `evaluate.checkpoint` that names the same from any folder.
    """

    run: RunFolder | None
    checkpoints: dict[str, Place | None]
    last: Checkpoint
    saved_as: str

    def described(self, dataset_digest: str) -> dict[str, Any]:
        """Return what evaluation.json says of the models."""
        progress = self.last.progress
        described = {
            "model_type": self.last.model_type,
            "epoch": progress.get("epoch", 0),  # RUN/base has none
            "base_source": progress.get("base", {"source": str(self.last.path)}),
        }
        if self.run is None:
            return {**described, "checkpoint": self.saved_as, "same_dataset_as_trained_on": None}
        same = dataset_digest == self.run.state["dataset_digest"]
        checkpoint = relative_path(self.last.path, self.run.path)
        return {**described, "checkpoint": checkpoint, "same_dataset_as_trained_on": same}


def _find_models(checkpoint: str) -> Judged:
    if checkpoint == "tiny" or checkpoint in OFFICIAL_WEIGHTS:
        refuse_ambiguous(checkpoint, "the published weights")
    if checkpoint == "tiny":
        return Judged(None, {"base": None}, load_shipped(), checkpoint)
    if checkpoint in OFFICIAL_WEIGHTS:
        path = fetch_official(checkpoint)
        return Judged(None, {"base": path}, load_checkpoint(path), checkpoint)
    place = resolve(checkpoint, "--checkpoint")
    if stands_alone(place):
        alone = load_checkpoint(place)
        return Judged(None, {"base": alone.path}, alone, str(place))
    run, tuned = find_tuned(place)
    return Judged(run, {"base": run.base, "tuned": tuned.path}, tuned, str(place))


@dataclass(frozen=True)
class Outcome:
    """What one model did, on an image or on all.

    Attributes:
        scores: of every instance and kind of prompt.
        clicks: of the objects on which clicks were counted.
        objects: all objects of each image, found and true; of a model with an instance decoder.
    """

    scores: list[Score]
    clicks: list[ClickCount]
    objects: list[ImageObjects] = field(default_factory=list)


def _figures(outcomes: dict[str, Outcome], records: Sequence[ImageRecord]) -> dict[str, Any]:
    """The figures of each model, and of two models their change."""
    figures: dict[str, Any] = {}
    for model, outcome in outcomes.items():
        figures[model] = summary(outcome.scores)
        if outcome.clicks:
            figures[model]["clicks_to_iou"] = clicks_summary(outcome.clicks)
        if outcome.objects:
            figures[model]["instances"] = score_instances(outcome.objects)
    if len(outcomes) == 2:
        base, tuned = outcomes["base"], outcomes["tuned"]
        figures["change"] = changes(base.scores, tuned.scores)
        if base.clicks:
            figures["change"]["clicks_to_iou"] = clicks_change(base.clicks, tuned.clicks)
        if base.objects and tuned.objects:
            sources = [record.source for record in records]
            figures["change"]["instances"] = objects_change(sources, base.objects, tuned.objects)
    return figures


def _score_all(
    config: Config,
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    checkpoints: dict[str, Place | None],
) -> tuple[dict[str, Outcome], list[dict[str, Any]]]:
    """Score every image with each model, then draw the last model's worst and best instances."""
    pool = _start_evaluators(config, dataset, records, checkpoints, find_objects=True)
    clicked = choose_objects(records, config.evaluate.noc_objects, config.evaluate.seed)
    outcomes = _outcomes(pool, records, checkpoints, clicked)
    *_, last = checkpoints
    wanted = _worst_and_best(outcomes[last].scores, config.evaluate.num_overlays)
    drawn = dict(
        pool.map(lambda actor, item: actor.draw.remote(item[1].image, item[1].instance), wanted)
    )
    ious = {
        (model, score.image, score.instance): score.iou
        for model in checkpoints
        for score in outcomes[model].scores
        if score.strategy == OVERLAY_STRATEGY
    }
    pictures = [
        {
            "kind": kind,
            "image": score.image,
            "label": score.label,
            "ious": {model: ious[model, score.image, score.instance] for model in checkpoints},
            "panels": drawn[index],
        }
        for index, (kind, score) in enumerate(wanted)
    ]
    pictures += _object_pictures(pool, records, outcomes[last], config.evaluate.num_overlays)
    pool.stop()
    return outcomes, pictures


def _object_pictures(
    pool: cluster.Pool, records: Sequence[ImageRecord], outcome: Outcome, number: int
) -> list[dict[str, Any]]:
    """Draw all objects of the images with the most missed and false ones."""
    named = list(zip([record.name for record in records], outcome.objects, strict=False))
    wanted = sorted(named, key=lambda item: -num_errors(item[1]))[:number]
    drawn = dict(pool.map(lambda actor, item: actor.draw_objects.remote(*item), wanted))
    return [
        {"kind": "objects", "image": name, "errors": num_errors(objects), "panels": drawn[index]}
        for index, (name, objects) in enumerate(wanted)
    ]


def score_models(
    config: Config,
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    checkpoints: Mapping[str, Place | None],
    find_objects: bool = False,
) -> dict[str, Outcome]:
    """Return the scores of models on images over the prompt matrix, in the same order for each.

    Args:
        config: its `evaluate.seed`, `scaling.device` and `embeddings`.
        records: those without an instance count in the search for all objects alone.
        checkpoints: name -> checkpoint folder; None is `tiny` as it ships.
        find_objects: also find all objects, with the models that have an instance decoder.
    """
    pool = _start_evaluators(config, dataset, records, checkpoints, find_objects)
    outcomes = _outcomes(pool, records, checkpoints, {})
    pool.stop()
    return outcomes


def _start_evaluators(
    config: Config,
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    checkpoints: Mapping[str, Place | None],
    find_objects: bool,
) -> cluster.Pool:
    return cluster.start_pool(
        Evaluator,
        config.scaling.device,
        len(records),
        dataset.folder,
        checkpoints,
        embeddings_folder(config, dataset),
        config.embeddings.reserve_gb,
        config.evaluate.seed,
        find_objects,
        full_precision(config),
    )


def _outcomes(
    pool: cluster.Pool,
    records: Sequence[ImageRecord],
    models: Iterable[str],
    clicked: Mapping[str, tuple[int, ...]],
) -> dict[str, Outcome]:
    """Score all images; the outcomes are in the order of the records.

    Args:
        clicked: image -> places of the instances on which to count clicks.
    """
    names = [record.name for record in records]
    found: dict[int, dict[str, Outcome]] = {}
    with tqdm(total=len(names), desc="evaluate", unit="img", file=sys.stderr, disable=None) as bar:
        for index, result in pool.map(
            lambda actor, name: actor.score.remote(name, clicked.get(name, ())), names
        ):
            found[index] = result
            bar.update()
    parts = {model: [found[index][model] for index in sorted(found)] for model in models}
    return {
        model: Outcome(
            [score for part in some for score in part.scores],
            [count for part in some for count in part.clicks],
            [objects for part in some for objects in part.objects],
        )
        for model, some in parts.items()
    }


@ray.remote(max_restarts=2, max_task_retries=2)
class Evaluator:
    """Scores models on images of a prepared dataset."""

    def __init__(
        self,
        dataset: Place,
        checkpoints: dict[str, Place | None],
        cache_dir: Place,
        reserve_gb: float,
        seed: int,
        find_objects: bool,
        full_precision: bool,
    ) -> None:
        self.dataset, self.seed = PreparedDataset(dataset), seed
        self.full_precision = full_precision
        device = cluster.actor_device()
        self.sams = {m: _load(path).model().to(device) for m, path in checkpoints.items()}
        base, *_ = self.sams
        cache = EmbeddingCache(
            cache_dir, self.sams[base], reserve_gb=reserve_gb, full_precision=full_precision
        )
        self.finders = {
            model: _finder(path, self.sams[model]) if find_objects else None
            for model, path in checkpoints.items()
        }
        # Embeddings of a tuned image encoder would be read by nobody else and only fill the disk.
        self.caches = {
            model: cache if encoder_digest(sam) == cache.encoder_digest else None
            for model, sam in self.sams.items()
        }

    def score(self, name: str, clicked: tuple[int, ...]) -> dict[str, Outcome]:
        """Score every instance of an image, and count clicks on those at some places, per model."""
        record = self.dataset.images[name]
        outcomes = {}
        for model, sam in self.sams.items():
            if not record.num_instances and self.finders[model] is None:
                outcomes[model] = Outcome([], [])  # nothing to prompt for
                continue
            embedding = self._embedding(model, record)
            scores = score_image(sam, embedding, record, self.seed)
            clicks = count_clicks(sam, embedding, record, clicked) if clicked else []
            objects, finder = [], self.finders[model]
            if finder is not None:
                image = decode_image(self.dataset.image_bytes(record))
                objects = [compare_objects(sam, finder, embedding, image, record)]
            outcomes[model] = Outcome(scores, clicks, objects)
        return outcomes

    def _embedding(self, model: str, record: ImageRecord) -> Tensor:
        sam, cache = self.sams[model], self.caches[model]
        return embedding_of(sam, self.dataset, cache, record, self.full_precision)

    def draw_objects(self, name: str, objects: ImageObjects) -> list[bytes]:
        """Return JPEGs of all objects of an image: the true ones, and those that were found."""
        record = self.dataset.images[name]
        image = decode_image(self.dataset.image_bytes(record))
        panels = draw_objects(image, objects, record.decode_ignored())
        return [encode_picture(shrink(panel, OBJECTS_SIDE), ".jpg") for panel in panels]

    def draw(self, name: str, number: int) -> list[bytes]:
        """Return JPEGs of one instance: image with prompt, truth, then each model's answer."""
        record = self.dataset.images[name]
        image = decode_image(self.dataset.image_bytes(record))
        gt_mask = record.decode(record.instances[number])
        prompt = evaluation_prompt(record, number, gt_mask, OVERLAY_STRATEGY, self.seed)
        masks = [gt_mask]
        for model, sam in self.sams.items():
            embedding = self._embedding(model, record)
            ((_, found),) = predict_masks(sam, embedding, [prompt], record.size)
            masks.append(found.mask(found.best))
        panels = [draw_prompt_marks(image.copy(), prompt)]
        colors = [(0, 158, 115), (213, 94, 0), (86, 180, 233)]
        for mask, color in zip(masks, colors[: len(masks)], strict=True):
            panels.append(draw_prompt_marks(draw_masks(image, [mask], [color]), prompt))
        return [encode_picture(shrink(panel, OVERLAY_SIDE), ".jpg") for panel in panels]


def _load(path: Place | None) -> Checkpoint:
    return load_shipped() if path is None else load_checkpoint(path)


def _finder(path: Place | None, sam: Any) -> InstanceModel | None:
    """The instance decoder of a model, on its device; None if it has none."""
    model = instances_of(_load(path), sam)
    if model is not None:
        model.decoder.to(sam.device)
    return model


def _worst_and_best(scores: list[Score], number: int) -> list[tuple[str, Score]]:
    """The tuned model's worst and best instances, each at most once."""
    ranked = sorted((s for s in scores if s.strategy == OVERLAY_STRATEGY), key=lambda s: s.iou)
    number = min(number, len(ranked) // 2) if len(ranked) > 1 else len(ranked)
    if number == 0:
        return []
    return [("worst", s) for s in ranked[:number]] + [
        ("best", s) for s in ranked[: -number - 1 : -1]
    ]
