"""Reports: HTML pages from templates, with images and charts embedded."""

import base64
import io
from importlib import resources as package_files
from typing import Any

import jinja2
import numpy as np


def render_page(template: str, **values: Any) -> str:
    """Return a self-contained HTML page; values are escaped.

    Args:
        template: name of a file in `samray/templates`.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = (package_files.files("samray") / "templates" / template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)


def jpeg_uri(content: bytes) -> str:
    """Return a JPEG file as a data URI for the `src` of an image."""
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def histogram_svg(bins: list[str], counts: list[int], xlabel: str, num_marked: int = 0) -> str:
    """Return a bar chart as one SVG element.

    Args:
        bins: name of each bar.
        counts: height of each bar.
        num_marked: number of bars, from the left, to hatch in a warning colour.
    """
    import matplotlib as mpl  # slow to import, and only reports need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(range(len(bins)), counts, width=0.85, color="#0072b2")
    for bar in bars[:num_marked]:
        bar.set(facecolor="#fbe3d0", edgecolor="#d55e00", hatch="///")
    step = -(-len(bins) // 12)  # keeps the names from overlapping
    axes.set_xticks(range(0, len(bins), step), bins[::step], rotation=45 if len(bins) > 6 else 0)
    axes.set(xlabel=xlabel)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    with mpl.rc_context({"svg.fonttype": "none"}):  # text, not outlines: smaller and searchable
        return _svg(figure)


def curves_svg(epochs: list[dict[str, Any]]) -> str:
    """Return training loss and validation IoU over the epochs as one SVG element.

    Args:
        epochs: metrics of each epoch, as in run.json.
    """
    from matplotlib.figure import Figure  # slow to import, and only reports need it

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    numbers = [epoch["epoch"] for epoch in epochs]
    left.plot(numbers, [epoch["loss"] for epoch in epochs], color="#444")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    for key, title in (
        ("val_iou", "mean"),
        ("val_iou_center", "center"),
        ("val_iou_random", "random"),
        ("val_iou_bbox", "bbox"),
        ("val_iou_clicks", "three clicks"),
    ):
        width = 2.5 if key == "val_iou" else 1
        right.plot(
            numbers, [epoch.get(key, np.nan) for epoch in epochs], label=title, linewidth=width
        )
    right.set(xlabel="epoch", ylabel="val IoU", ylim=(0, 1))
    right.legend(frameon=False, ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure)


def scatter_svg(groups: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str) -> str:
    """Return a scatter plot of several groups, with a logarithmic x axis, as one SVG element.

    Args:
        groups: name -> (x, y) of each point.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    marks = zip("osD^vP*X", ("#0072b2", "#d55e00", "#009e73", "#cc79a7") * 2, strict=True)
    for (name, points), (marker, color) in zip(sorted(groups.items()), marks, strict=False):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker=marker, color=color, linewidth=0.7, alpha=0.9, label=name)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return _svg(figure)


def lines_svg(lines: dict[str, list[float]], bold: str, xlabel: str, ylabel: str) -> str:
    """Return lines over x = 1, 2, 3, ... as one SVG element, one of them bold.

    Args:
        lines: name -> y values.
        bold: name of the bold line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        color, width = ("#d55e00", 2.5) if name == bold else ("#5b7f95", 0.9)
        numbers = range(1, len(values) + 1)
        axes.plot(numbers, values, color=color, linewidth=width, marker=".", markersize=3)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _svg(figure)


def reliability_svg(bins: dict[str, list[dict[str, Any]]]) -> str:
    """Return true against predicted IoU, a line for each model, as one SVG element.

    Args:
        bins: model -> `bins` of `samray.evaluation.summary.calibration`; a mark's area grows with
            the number of scores in its bin.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999", linewidth=0.8, linestyle="--", label="as predicted")
    for (name, found), color in zip(bins.items(), ("#0072b2", "#d55e00"), strict=False):
        filled = [one for one in found if one["count"]]
        xs, ys = [one["predicted"] for one in filled], [one["true"] for one in filled]
        total = sum(one["count"] for one in filled)
        areas = [12 + 300 * one["count"] / total for one in filled]
        axes.plot(xs, ys, color=color, linewidth=1, label=name)
        axes.scatter(xs, ys, areas, color=color, alpha=0.6, linewidths=0)
    axes.set(xlabel="predicted IoU", ylabel="true IoU", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return _svg(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
