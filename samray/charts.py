"""Charts for reports, as SVG text that an HTML page can hold."""

import io
from typing import Any


def curves_svg(epochs: list[dict[str, Any]]) -> str:
    """Return loss and validation IoU over the epochs as one SVG element.

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
    ):
        width = 2.5 if key == "val_iou" else 1
        right.plot(numbers, [epoch[key] for epoch in epochs], label=title, linewidth=width)
    right.set(xlabel="epoch", ylabel="val IoU", ylim=(0, 1))
    right.legend(frameon=False, ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
