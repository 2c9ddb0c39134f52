"""The report of a sweep: trials, importance of settings, cost."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from samray.charts import lines_svg, render_page, scatter_svg

LEARNING_RATE, STRATEGY = "train.learning_rate", "prompts.point_selection"


def importance(trials: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the share of the scores' variance that each setting explains, 0..1, largest first.

    For numbers: the squared rank correlation (Spearman) of value and score, which detects monotonic
    effects only. For names: the variance between groups as a share of the total, adjusted for the
    number of groups (adjusted eta squared). The shares need not add up to 1.

    Args:
        trials: rows of sweep.json; those without a score are ignored.
    """
    scored = [trial for trial in trials if trial["score"] is not None]
    scores = np.array([trial["score"] for trial in scored])
    shares: dict[str, float] = {}
    if len(scored) < 3 or np.ptp(scores) == 0:
        return shares
    for key in scored[0]["settings"]:
        values = [trial["settings"][key] for trial in scored]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            if len(set(values)) > 1:
                correlation = np.corrcoef(_ranks(np.array(values)), _ranks(scores))[0, 1]
                shares[key] = float(correlation**2)
        else:
            shares[key] = _explained([str(value) for value in values], scores)
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks; equal values get their mean rank."""
    order = np.sort(values)
    return (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / 2


def _explained(names: list[str], scores: np.ndarray) -> float:
    """Adjusted eta squared."""
    groups: dict[str, list[float]] = defaultdict(list)
    for name, score in zip(names, scores, strict=True):
        groups[name].append(float(score))
    within = sum(float(np.var(values)) * len(values) for values in groups.values())
    total = float(np.var(scores)) * len(scores)
    if len(groups) < 2 or len(scores) <= len(groups):
        return 0.0
    return max(0.0, 1 - (within / (len(scores) - len(groups))) / (total / (len(scores) - 1)))


def _place(trial: dict[str, Any]) -> tuple[float, float]:
    """Trials in the order of what they are worth, those without a score last."""
    if trial["score"] is None:
        return np.inf, np.inf
    return -trial["kept_score"], -trial["score"]


def write_report(state: dict[str, Any]) -> str:
    """Return the HTML page of a sweep.

    Args:
        state: the content of sweep.json.
    """
    trials = sorted(state["trials"], key=_place)
    by_strategy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for trial in trials:
        settings = trial["settings"]
        if trial["score"] is not None and LEARNING_RATE in settings:
            name = str(settings.get(STRATEGY, state["deciding"][STRATEGY]))
            by_strategy[name].append((settings[LEARNING_RATE], trial["score"]))
    curves = {trial["trial_id"]: trial["curve"] for trial in trials if trial["curve"]}
    return render_page(
        "sweep_report.html",
        state=state,
        trials=trials,
        keys=list(trials[0]["settings"]),
        metric=state["deciding"]["tune.metric"],
        scatter=scatter_svg(by_strategy, "learning rate", "best score") if by_strategy else "",
        curves=lines_svg(curves, state["best"].rpartition("/")[2], "epoch", "score"),
    )
