"""The guard before a promotion, on synthetic scores for each of its rules."""

from typing import get_args

import numpy as np
import pytest

from samray.config import PointSelection, load_config
from samray.evaluation.metrics import Score
from samray.evaluation.promote import ON_TARGET, guard, guard_objects, off_target
from samray.evaluation.scoring import MATRIX


def scores(shift=0.0, row=None, noise=0.0, images=12, seed=0):
    """IoU 0.7 in 12 images of 3 objects; `shift` is added, to one row of the matrix if named."""
    rng = np.random.default_rng(seed)
    found = []
    for image in range(images):
        for instance in range(3):
            for strategy in MATRIX:
                iou = 0.7 + rng.normal(0, noise)
                iou += shift if row in (None, strategy) else 0
                name = f"{image}.jpg"
                found.append(
                    Score(name, name, instance, "nut", strategy, iou, iou, iou, 0.9, 900, 30.0)
                )
    return found


def test_a_better_model_passes():
    assert guard({"base": scores(), "tuned": scores(0.05, noise=0.1)}, ["clicks"], 0.02) == []


def test_a_worse_model_is_refused_by_base_and_by_current():
    given = {"base": scores(), "tuned": scores(-0.1, noise=0.05), "current": scores(0.1)}
    reasons = guard(given, [], 0.02)
    assert len(reasons) == 2
    assert "worse than its base: mIoU over the prompt matrix 0.6" in reasons[0]
    assert "worse than the current version" in reasons[1]


def test_differences_within_chance_are_not_refused():
    def times_refused(shift):
        base = scores(noise=0.1)
        tuned = [scores(shift, noise=0.1, seed=seed) for seed in range(1, 41)]
        return sum(bool(guard({"base": base, "tuned": t}, [], 0.02)) for t in tuned)

    assert times_refused(0.0) <= 8  # as good as the base: 1 expected; all share one base
    assert times_refused(-0.1) == 40


def test_one_bad_image_of_many_instances_is_not_enough():
    """Instances of one image resemble each other; resampling instances would refuse."""
    base, tuned = scores(), scores()
    tuned = [Score(**{**s.__dict__, "iou": 0.1}) if s.image == "0.jpg" else s for s in tuned]
    assert guard({"base": base, "tuned": tuned}, [], 1.0) == []


def test_few_images_need_a_clear_loss():
    """Two images with the same loss give an interval of zero width, which is no evidence."""
    base, slightly, clearly = (scores(shift, images=2) for shift in (0.0, -0.013, -0.03))
    assert guard({"base": base, "tuned": slightly}, [], 0.02) == []
    (reason,) = guard({"base": base, "tuned": clearly}, [], 0.02)
    assert "2 test photos, too few for an interval" in reason


def test_forgetting_counts_off_target_only():
    given = {"base": scores(), "tuned": scores(-0.05, row="clicks")}
    given["tuned"] = [
        Score(**{**s.__dict__, "iou": 0.9}) if s.strategy == "bbox" else s for s in given["tuned"]
    ]
    (reason,) = guard(given, ["clicks"], 0.02)
    assert "forgot clicks prompts" in reason
    assert "0.700 before, 0.650 after" in reason
    assert guard(given, ["center"], 0.02) == []
    assert guard(given, ["clicks"], 0.06) == []


@pytest.mark.parametrize("row", MATRIX)
def test_forgetting_is_checked_in_every_row(row):
    given = {"base": scores(), "tuned": scores(-0.05, row=row)}
    assert any(row in reason for reason in guard(given, [row], 0.02))


def test_every_prompt_strategy_has_rows_that_it_trains_for():
    """Or `promote` would fail after training with a strategy that was added later."""
    assert set(ON_TARGET) == set(get_args(PointSelection))


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ((), []),
        (("prompts.num_clicks=0",), ["clicks"]),
        (("prompts.num_clicks=0", "prompts.mixture.bbox=0"), ["bbox", "clicks"]),
        (("prompts.point_selection=mixed",), ["clicks"]),
        (("prompts.point_selection=mixed", "prompts.mixture.random=0"), ["random", "clicks"]),
        (("prompts.point_selection=bbox",), ["center", "random", "clicks"]),
    ],
)
def test_what_training_never_draws_is_off_target(words, rows):
    prompts = load_config(overrides=words).prompts
    assert sorted(off_target(prompts)) == sorted(rows)


SOURCES = [f"{image}.jpg" for image in range(12)]


def accuracies(shift=0.0, seed=0):
    noise = np.random.default_rng(seed).normal(0, 0.05, 12)
    return (0.5 + shift + noise).tolist()


def test_a_model_that_finds_all_objects_worse_is_refused():
    given = {"base": accuracies(), "tuned": accuracies(-0.1, 1), "current": accuracies(0.05, 2)}
    reasons = guard_objects(given, SOURCES, 0.02)
    assert len(reasons) == 2
    assert "it finds all objects worse than its base: mean segmentation accuracy 0.4" in reasons[0]
    assert "than the current version" in reasons[1]
    assert "95 % interval -0.1" in reasons[0]


def test_all_objects_are_compared_by_photo_and_only_where_both_models_find_them():
    tuned = accuracies()
    tuned[0] = 0.0  # one photo is no evidence
    given = {"base": accuracies(), "tuned": tuned}
    assert guard_objects(given, SOURCES, 1.0) == []
    assert guard_objects({"tuned": [0.0] * 12}, SOURCES, 0.02) == []
    assert guard_objects({"current": [0.9] * 12}, SOURCES, 0.02) == []
    few = {"current": [0.5, 0.5], "tuned": [0.45, 0.45]}
    assert guard_objects(few, SOURCES[:2], 0.1) == []
    assert "too few for an interval" in guard_objects(few, SOURCES[:2], 0.02)[0]
