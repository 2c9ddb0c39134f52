"""What a sweep compares its trials by, and how many run at once."""

from pathlib import Path

import pytest

from samray.cluster import Resources
from samray.config import load_config
from samray.errors import ConfigError
from samray.training import tune
from samray.training.search_space import search_space
from samray.training.tune import METRICS, require_metric


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_an_epoch_may_be_chosen(metric):
    require_metric(load_config(overrides=[f"tune.metric={metric}"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune.metric=val_map"], "'val_map' is reported by no trial; choose from val_iou"),
        (["tune.metric=val_msa", "train.instances=false"], "set train.instances=true"),
        (
            ["tune.metric=val_msa", "tune.search_space={train.instances: {choice: [true, false]}}"],
            "leave it out of tune.search_space",
        ),
    ],
)
def test_a_metric_that_a_trial_lacks_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        require_metric(load_config(overrides=words))


@pytest.mark.parametrize("search", ["random", "optuna"])
@pytest.mark.parametrize(("asked", "workers", "expected"), [(None, 1, 4), (None, 2, 2), (1, 2, 1)])
def test_no_more_trials_run_at_once_than_asked_for_and_fit(search, asked, workers, expected):
    """Tune's own setting does not count for a random search."""
    if search == "optuna":
        pytest.importorskip("optuna", reason="optuna is not installed here")
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    options = {"tune.search_space": space, "tune.search": search}
    config = load_config(options={**options, "tune.max_concurrent_trials": asked})
    plan = tune.SweepPlan(config, Path("sweep"), Resources(workers, False, 1, 4), 16)
    assert tune._searcher(plan, search_space(config)).max_concurrent == expected
