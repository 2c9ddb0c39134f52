"""The search space of a sweep: every mistake is found before anything starts."""

import pytest

from samray.config import load_config
from samray.errors import ConfigError
from samray.training.search_space import (
    cached_configs,
    count_trials,
    default_point,
    grid_points,
    search_space,
    with_default_space,
)


def config_of(space, **options):
    return load_config(options={"tune.search_space": space, **options})


def test_a_grid_sets_the_number_of_trials_and_their_multiples():
    config = config_of(
        {
            "train.learning_rate": {"grid_search": [1e-4, 1e-3, 1e-2]},
            "prompts.point_selection": {"grid_search": ["center", "bbox"]},
            "loss.focal_weight": {"uniform": [1.0, 20.0]},
        }
    )
    space = search_space(config)
    assert grid_points(space) == 6
    assert count_trials(config, space) == 6
    assert default_point(config, space) is None  # a grid has its own points


def test_the_default_is_a_point_only_if_the_space_contains_it():
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    for model_type, rate in (("tiny", 3e-4), ("vit_b", 1e-4)):
        config = with_default_space(config_of(space, **{"model.type": model_type}))
        assert default_point(config, search_space(config)) == {"train.learning_rate": rate}
    config = config_of({**space, "prompts.point_selection": {"choice": ["center"]}})
    assert default_point(config, search_space(config)) is None
    assert count_trials(config, search_space(config)) == 16


def test_every_combination_that_is_cached_in_its_own_way_is_known_before_the_trials():
    config = config_of(
        {
            "model.adapt": {"choice": ["none", "lora"]},
            "model.adapt_blocks": {"grid_search": [1, 2]},
            "train.learning_rate": {"uniform": [0.1, 1.0]},
        },
        **{"model.type": "vit_b"},
    )
    found = [(one.model.adapt, one.model.adapt_blocks) for one in cached_configs(config)]
    assert found == [("lora", 1), ("lora", 2)]  # `none` has no blocks: those trials are refused
    with pytest.raises(ConfigError, match=r"train.cached_views: takes choice or grid_search, not"):
        search_space(config_of({"train.cached_views": {"randint": [1, 4]}}))


@pytest.mark.parametrize(
    "options",
    [{}, {"train.learning_rate": 3e-3, "prompts.point_selection": "center"}],
)
def test_without_a_space_learning_rate_and_prompt_strategy_are_searched(options):
    config = with_default_space(config_of({}, **options))
    space = search_space(config)
    assert set(space) == {"train.learning_rate", "prompts.point_selection"}
    rate = config.train.learning_rate
    assert (space["train.learning_rate"].lower, space["train.learning_rate"].upper) == (
        pytest.approx(rate / 10),
        pytest.approx(rate * 10),
    )
    assert {"mixed", "interactive"} <= set(space["prompts.point_selection"].categories)
    assert default_point(config, space) == {
        "train.learning_rate": rate,
        "prompts.point_selection": config.prompts.point_selection,
    }
    assert count_trials(config, space) == 16
    assert with_default_space(config) is config


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.learning_rte": {"choice": [1]}}, "did you mean learning_rate"),
        ({"train": {"choice": [1]}}, "train"),
        ({"scaling.num_workers": {"choice": [1]}}, "no setting of training"),
        ({"train.num_epochs": {"choice": [1]}}, "what the trials are compared at"),
        ({"model.checkpoint": {"choice": ["a"]}}, "one base"),
        ({"prompts.point_selection": {"choice": ["centre"]}}, "'center'"),
        ({"prompts.point_selection": {"chioce": ["center"]}}, "choice, grid_search"),
        ({"prompts.point_selection": "center"}, "choice, grid_search"),
        ({"prompts.point_selection": {"choice": []}}, "nothing to choose from"),
        ({"train.learning_rate": {"loguniform": ["1e-5", 1]}}, "YAML reads 1e-5 as a text"),
        ({"train.learning_rate": {"loguniform": [1.0e-3, 1.0e-5]}}, "below"),
        ({"train.learning_rate": {"loguniform": [0, 1.0e-5]}}, "learning_rate"),
        ({"train.learning_rate": {"uniform": [-1.0, 1.0]}}, "greater than 0"),
        ({"train.learning_rate": {"uniform": [1.0]}}, "learning_rate"),
        ({"prompts.num_points": {"randint": [0, 3]}}, "greater than or equal to 1"),
    ],
)
def test_a_search_space_is_checked_before_anything_starts(space, message):
    with pytest.raises(ConfigError) as caught:
        search_space(config_of(space))
    assert message in str(caught.value)


def test_all_mistakes_of_a_search_space_at_once():
    space = {"train.lr": {"choice": [1]}, "prompts.point_selection": {"choice": ["boxes"]}}
    with pytest.raises(ConfigError) as caught:
        search_space(config_of(space))
    assert "train.lr" in str(caught.value)
    assert "boxes" in str(caught.value)
