"""What trials of a sweep may be compared by."""

import pytest

from samray.config import load_config
from samray.errors import ConfigError
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
