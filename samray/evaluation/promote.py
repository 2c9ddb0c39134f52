"""Add a tuned model to the store, unless it is worse than its base or the current version."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from samray import __version__, cluster
from samray.config import Config, PromptConfig, load_config, required
from samray.data.dataset import ImageRecord, PreparedDataset
from samray.errors import ConfigError, GuardError
from samray.evaluation.evaluate import Outcome, score_models
from samray.evaluation.metrics import MIN_IMAGES, Score, bootstrap_interval
from samray.evaluation.scoring import CLICKS, MATRIX
from samray.evaluation.summary import summary
from samray.geometry.prompts import STRATEGIES
from samray.instances.metrics import image_accuracy, score_instances
from samray.runs import RunFolder
from samray.sam.checkpoint import Checkpoint, find_tuned
from samray.sam.store import ModelStore, Version, require_name, require_store
from samray.storage import Place, require_folder, resolve

# Rows of the prompt matrix that each training strategy covers; the others are off-target.
ON_TARGET = {
    "center": {"center"},
    "random": {"random"},
    "bbox": {"bbox"},
    "mixed": {"center", "random", "bbox"},
    "interactive": {"center", "random", "bbox", "clicks"},
}


def off_target(prompts: PromptConfig) -> list[str]:
    """Return the rows of the prompt matrix that training with these settings never draws."""
    drawn = set(ON_TARGET[prompts.point_selection])
    if prompts.point_selection in ("mixed", "interactive"):
        drawn -= {name for name in STRATEGIES if not getattr(prompts.mixture, name)}
    if prompts.num_clicks == 0:
        drawn.discard(CLICKS)
    return [row for row in MATRIX if row not in drawn]


def promote(config: Config) -> Version:
    """Score base, tuned and current version on the test split; add the model if `guard` passes.

    Args:
        config: its `promote` section.

    Returns:
        The new version, which is now current.

    Raises:
        GuardError: the model is worse than the base or the current version, with prompts or at
            finding all objects, or lost too much on prompts that it was not trained with.
        SamrayError: a path, the run, the data or the store cannot be used.
    """
    settings = config.promote
    if settings.checkpoint is None:
        raise ConfigError("missing RUN_OR_SWEEP (or promote.checkpoint=...), what to promote")
    name, folder = required(config, "promote.name", "promote.store")
    require_name(name)
    run, tuned = find_tuned(resolve(settings.checkpoint, "RUN_OR_SWEEP"))
    trained = load_config(run.path / "config.yaml")
    data_dir = settings.data_dir or trained.train.data_dir
    if not data_dir:
        raise ConfigError(
            f"missing --data-dir (or promote.data_dir=...): {run.path} was trained on no dataset"
        )
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    records = dataset.split("test", background=True)
    store = require_store(resolve(folder, "--store"))
    current = store.current(name)
    outcomes = _outcomes(config, dataset, records, run, tuned, current)
    scores = {model: outcome.scores for model, outcome in outcomes.items()}
    reasons = guard(scores, off_target(trained.prompts), settings.max_forgetting)
    accuracies = {
        model: [image_accuracy(objects) for objects in outcome.objects]
        for model, outcome in outcomes.items()
        if outcome.objects
    }
    sources = [record.source for record in records]
    reasons += guard_objects(accuracies, sources, settings.max_forgetting)
    if reasons and not settings.force:
        raise GuardError(
            f"{run.path}: not promoted as {name}: {'; '.join(reasons)}; tune again, or add "
            "--force, which is recorded"
        )
    record = {
        "samray_version": __version__,
        "source": str(run.path),
        "base": tuned.progress["base"],
        "dataset_digest": dataset.digest,
        "same_dataset_as_trained_on": dataset.digest == run.state["dataset_digest"],
        "starts": run.state.get("starts", []),  # what it was trained with
        "split": "test",
        "metrics": {model: _figures(outcome) for model, outcome in outcomes.items()},
        "guard": {
            "refused": reasons,
            "forced": bool(reasons),
            "num_images": len({record.source for record in records if record.num_instances}),
        },
        "previous": current.version if current else None,
    }
    return store.add(name, tuned, record)


def _figures(outcome: Outcome) -> dict[str, Any]:
    """What the version's record says of a model."""
    found = {"instances": score_instances(outcome.objects)} if outcome.objects else {}
    return {**summary(outcome.scores), **found}


def _outcomes(
    config: Config,
    dataset: PreparedDataset,
    records: Sequence[ImageRecord],
    run: RunFolder,
    tuned: Checkpoint,
    current: Version | None,
) -> dict[str, Outcome]:
    """Score `base`, `tuned` and, where there is one, `current` on the test split."""
    cluster.start()
    cluster.require_visible(run.path / "run.json", "RUN_OR_SWEEP")
    cluster.require_visible(dataset.folder / "manifest.json", "--data-dir")
    checkpoints: dict[str, Place | None] = {"base": run.base, "tuned": tuned.path}
    if current is not None:
        cluster.require_visible(current.folder / "weights.pth", "--store")
        checkpoints["current"] = current.folder
    return score_models(config, dataset, records, checkpoints, find_objects=True)


def guard(
    scores: dict[str, list[Score]], off_target: Sequence[str], max_forgetting: float
) -> list[str]:
    """Return the reasons against promoting a tuned model; empty if there are none.

    A model is worse than the base or the current version if the 95 % interval of the mean paired
    difference over the prompt matrix, from resampled images, lies below zero. Fewer than MIN_IMAGES
    give no useful interval; then a loss of more than `max_forgetting` counts as worse. In addition,
    no off-target row may lose more than `max_forgetting` against the base.

    Args:
        scores: of `base`, `tuned` and optionally `current`, in the same order.
        off_target: rows of the prompt matrix that the model was not trained with.
        max_forgetting: in mIoU.
    """
    reasons = []
    ious = {model: np.array([s.iou for s in scores[model]]) for model in scores}
    sources = [score.source for score in scores["tuned"]]
    for other in ("base", "current"):
        if other not in scores:
            continue
        loss = _loss(ious["tuned"], ious[other], sources, max_forgetting)
        if loss is not None:
            reasons.append(f"it is worse than {_TITLES[other]}: mIoU over the prompt matrix {loss}")
    for row in off_target:
        in_row = np.array([score.strategy == row for score in scores["tuned"]])
        before, after = ious["base"][in_row].mean(), ious["tuned"][in_row].mean()
        if before - after > max_forgetting:
            reasons.append(
                f"it forgot {row} prompts, which it was not trained with: mIoU {before:.3f} "
                f"before, {after:.3f} after; at most {max_forgetting} may be lost "
                "(promote.max_forgetting)"
            )
    return reasons


def guard_objects(
    accuracies: dict[str, list[float]], sources: Sequence[str], max_forgetting: float
) -> list[str]:
    """Return the reasons against a tuned model that finds all objects worse; empty without one.

    As in `guard`, by the mean segmentation accuracy of each image. A model without an instance
    decoder is not compared.

    Args:
        accuracies: of `base`, `tuned` and `current`, of the same images, as far as there are any.
        sources: photo of each image.
        max_forgetting: in mean segmentation accuracy.
    """
    if "tuned" not in accuracies:
        return []
    values = {model: np.array(found) for model, found in accuracies.items()}
    reasons = []
    for other in ("base", "current"):
        if other in values:
            loss = _loss(values["tuned"], values[other], sources, max_forgetting)
            if loss is not None:
                reasons.append(
                    f"it finds all objects worse than {_TITLES[other]}: mean segmentation accuracy "
                    f"{loss}"
                )
    return reasons


def _loss(
    tuned: np.ndarray, other: np.ndarray, sources: Sequence[str], max_forgetting: float
) -> str | None:
    """How much worse the tuned model's values are, in words; None if they are not."""
    difference = tuned - other
    low, high = bootstrap_interval(sources, difference.tolist())
    num_images = len(set(sources))
    evidence = f"95 % interval {low:+.3f} to {high:+.3f}"
    worse = high < 0
    if num_images < MIN_IMAGES:
        evidence = f"with {num_images} test photos, too few for an interval"
        worse = difference.mean() < -max_forgetting
    if not worse:
        return None
    return (
        f"{tuned.mean():.3f} against {other.mean():.3f}, difference {difference.mean():+.3f} "
        f"({evidence})"
    )


_TITLES = {"base": "its base", "current": "the current version"}


def roll_back(config: Config) -> Version:
    """Make an earlier version current again; see `ModelStore.roll_back`."""
    name, folder = required(config, "promote.name", "promote.store")
    store = ModelStore(require_folder(resolve(folder, "--store"), "--store"))
    return store.roll_back(require_name(name), config.promote.version)
