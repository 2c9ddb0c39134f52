"""Which settings a sweep searches: `tune.search_space` as Ray Tune's domains, checked at once."""

import contextlib
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Integer

from samray.config import Config, resolve_model, with_learning_rate, with_settings
from samray.errors import ConfigError

SEARCHED = ("model", "prompts", "loss", "train")
WORDS = (
    *("choice", "grid_search", "uniform", "quniform", "loguniform", "qloguniform"),
    *("randint", "qrandint", "lograndint", "qlograndint", "randn", "qrandn"),
)
# Settings that all trials share, or that are set for the sweep itself.
FIXED = {
    "model.type": "all trials start from one base; make a sweep for each",
    "model.checkpoint": "all trials start from one base; make a sweep for each",
    "train.data_dir": "pass --data-dir",
    "train.output_dir": "pass --output-dir",
    "train.num_epochs": "it is what the trials are compared at; set it in the config",
    "train.resume": "the same command resumes a sweep by itself",
}
# Settings that decide what of the images is cached, which is done before the trials.
CACHED = (
    "model.adapt",
    "model.adapt_blocks",
    "model.freeze_image_encoder",
    "train.cached_views",
)
LISTED = ("choice", "grid_search")
NUM_RANDOM_TRIALS = 16
# `center` is left out, because the points of users and of `random` are not in the centre.
DEFAULT_STRATEGIES = ("mixed", "interactive", "random", "bbox")


def with_default_space(config: Config) -> Config:
    """Return the config with a learning rate and a search space, its own ones or the defaults.

    The default one surrounds the config's own learning rate by a factor of ten.
    """
    config = with_learning_rate(config)
    if config.tune.search_space:
        return config
    rate, selection = config.train.learning_rate, config.prompts.point_selection
    assert rate is not None
    strategies = dict.fromkeys([*DEFAULT_STRATEGIES, selection])
    space = {
        "train.learning_rate": {"loguniform": [rate / 10, rate * 10]},
        "prompts.point_selection": {"choice": list(strategies)},
    }
    return with_settings(config, {"tune.search_space": space}, "sweep")


def search_space(config: Config) -> dict[str, Any]:
    """Return `tune.search_space` as Ray Tune's own objects, each checked at its bounds.

    Returns:
        Dotted path of a setting -> a Tune `Domain`, or Tune's {"grid_search": [...]}.

    Raises:
        ConfigError: listing every setting, word, argument or value that is invalid.
    """
    space: dict[str, Any] = {}
    mistakes = []
    for dotted, spec in config.tune.search_space.items():
        try:
            space[dotted] = _domain(config, dotted, spec)
        except (ConfigError, ValueError, TypeError) as exc:
            mistakes.append(f"tune.search_space: {dotted}: {exc}")
    if config.tune.search == "optuna":
        if importlib.util.find_spec("optuna") is None:
            mistakes.append("tune.search: optuna is not installed; pip install optuna, or random")
        if any(isinstance(domain, dict) for domain in space.values()):
            mistakes.append("tune.search: optuna takes no grid_search; use choice, or random")
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    return space


def grid_points(space: dict[str, Any]) -> int:
    """Return the number of points of the grid; 1 without a grid_search."""
    points = 1
    for domain in space.values():
        points *= len(domain["grid_search"]) if isinstance(domain, dict) else 1
    return points


def count_trials(config: Config, space: dict[str, Any]) -> int:
    """Return how many trials the sweep has, of all points of the grid together.

    Raises:
        ConfigError: `tune.num_trials` is no multiple of the grid's points.
    """
    points = grid_points(space)
    number = config.tune.num_trials or (points if points > 1 else NUM_RANDOM_TRIALS)
    if number % points:
        raise ConfigError(
            f"--num-trials {number} is no multiple of the {points} points of the grid in "
            "tune.search_space; each point is tried equally often"
        )
    return number


def cached_configs(config: Config) -> Iterator[Config]:
    """Yield the config with each combination of the searched settings that decide what is cached.

    Without combinations that no trial can have.
    """
    values = {}
    for dotted in CACHED:
        if dotted in config.tune.search_space:
            (listed,) = config.tune.search_space[dotted].values()
            values[dotted] = listed if isinstance(listed, list) else [listed]
    for chosen in itertools.product(*values.values()):
        with contextlib.suppress(ConfigError):  # the trial itself says it
            one = with_settings(config, dict(zip(values, chosen, strict=True)), "sweep")
            resolve_model(one, weights_given=one.model.checkpoint != "none")
            yield one


def default_point(config: Config, space: dict[str, Any]) -> dict[str, Any] | None:
    """Return the config's own values of the searched settings, if they lie in the space."""
    resolved = resolve_model(config, weights_given=config.model.checkpoint != "none").model_dump()
    point = {}
    for dotted, domain in space.items():
        value: Any = resolved
        for key in dotted.split("."):
            value = value[key]
        if isinstance(domain, dict):
            return None  # a grid has its own points
        inside = (
            value in domain.categories
            if isinstance(domain, Categorical)
            else value is not None and domain.is_valid(value)
        )
        if not inside:
            return None
        point[dotted] = value
    return point


def _domain(config: Config, dotted: str, spec: Any) -> Any:
    """One setting's domain: a Tune `Domain`, or Tune's {"grid_search": [...]}."""
    if dotted in FIXED:
        raise ConfigError(f"cannot be searched: {FIXED[dotted]}")
    if dotted.split(".")[0] not in SEARCHED:
        raise ConfigError(f"is no setting of training; those are in {', '.join(SEARCHED)}")
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in WORDS:
        raise ConfigError(f"must be one of {{{', '.join(WORDS)}}} with its arguments, not {spec!r}")
    ((word, arguments),) = spec.items()
    arguments = arguments if isinstance(arguments, list) else [arguments]
    if word in LISTED:
        if not arguments:
            raise ConfigError(f"{word} has nothing to choose from")
        for value in arguments:
            with_settings(config, {dotted: value}, word)
        return getattr(tune, word)(arguments)
    if dotted in CACHED:
        raise ConfigError(
            f"takes {' or '.join(LISTED)}, not {word}: the images are encoded for each value "
            "before the trials"
        )
    if not all(isinstance(value, int | float) for value in arguments):
        raise ConfigError(
            f"{word} takes numbers, not {arguments!r}; YAML reads 1e-5 as a text, write 1.0e-5"
        )
    domain = getattr(tune, word)(*arguments)
    assert isinstance(domain, Domain)
    # Bounds are checked exactly; random values also cover the unbounded normal distributions.
    values = [domain.sample() for _ in range(20)]
    if isinstance(domain, Float | Integer) and word not in ("randn", "qrandn"):
        if not domain.lower < domain.upper:
            raise ConfigError(f"{word}: {domain.lower} must be below {domain.upper}")
        last = domain.upper - 1 if isinstance(domain, Integer) else domain.upper
        values += [domain.lower, last]
    for value in values:
        with_settings(config, {dotted: value}, f"{word} can draw {value!r}")
    return domain
