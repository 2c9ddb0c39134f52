"""The report of an evaluation as an HTML page, and its table of instances."""

from collections.abc import Iterator
from typing import Any

from samray.charts import curves_svg, jpeg_uri, reliability_svg, render_page
from samray.config import load_config
from samray.evaluation.metrics import Score
from samray.evaluation.scoring import MATRIX
from samray.runs import RunFolder

MODELS = ("base", "tuned")
ABOUT = ("image", "source", "instance", "label", "area", "strategy")  # what a row is about


def instance_rows(scores: dict[str, list[Score]]) -> Iterator[tuple[Any, ...]]:
    """Yield a heading, then a row for each instance and kind of prompt, for a CSV file.

    Args:
        scores: model -> scores of the same instances and prompts, in the same order.
    """
    figures = ("iou", "dice", "boundary_iou", "predicted_iou")
    columns = [f"{model}_{name}" for model in scores for name in figures]
    yield (*ABOUT, *columns)
    for same in zip(*scores.values(), strict=True):
        about = [getattr(same[0], name) for name in ABOUT]
        yield (*about, *(f"{getattr(score, name):.6f}" for score in same for name in figures))


def report_page(
    evaluation: dict[str, Any], run: RunFolder | None, pictures: list[dict[str, Any]]
) -> str:
    """Return a self-contained HTML page.

    Args:
        evaluation: the content of evaluation.json.
        pictures: of the worst and the best instances, and of all objects of images; with JPEG
            files as `panels`.
    """
    for picture in pictures:
        picture["panels"] = [jpeg_uri(panel) for panel in picture["panels"]]
    models = [model for model in MODELS if model in evaluation]
    return render_page(
        "report.html",
        evaluation=evaluation,
        strategies=MATRIX,
        labels=sorted(evaluation["base"]["iou"]["label"]),
        models=models,
        reliability=reliability_svg({m: evaluation[m]["calibration"]["bins"] for m in models}),
        state=run.state if run else None,
        config=load_config(run.path / "config.yaml").model_dump() if run else None,
        curves=curves_svg(run.state["epochs"]) if run else "",
        worst=[p for p in pictures if p["kind"] == "worst"],
        best=[p for p in pictures if p["kind"] == "best"],
        everything=(everything := evaluation[models[-1]].get("instances")),
        labels_known=everything is not None
        and any(row["true"] and row["found"] for row in everything["labels"].values()),
        everything_before=evaluation["base"].get("instances") if len(models) > 1 else None,
        objects=[p for p in pictures if p["kind"] == "objects"],
    )
