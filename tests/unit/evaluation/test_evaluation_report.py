"""The report's page, from figures of drawn scores."""

import re

import numpy as np
import pytest

from samray.config import Config, resolve_model
from samray.evaluation.clicks import ClickCount, clicks_change, clicks_summary
from samray.evaluation.metrics import Score
from samray.evaluation.report import instance_rows, report_page
from samray.evaluation.scoring import MATRIX
from samray.evaluation.summary import changes, objects_change, summary
from samray.geometry.masks import CroppedMask, encode_rle
from samray.instances.metrics import ImageObjects, score_instances
from samray.runs import RunFolder


def drawn_scores(shift, label="nut"):
    rng = np.random.default_rng(0)
    found = []
    for image in range(8):
        for place in range(5):
            area = int(10 ** rng.uniform(1.5, 4.5))
            for strategy in MATRIX:
                iou = float(np.clip(rng.normal(0.6, 0.15) + shift, 0, 1))
                predicted = float(np.clip(iou + rng.normal(0.1, 0.1), 0, 1))
                name = f"{image}.jpg"
                found.append(
                    Score(name, name, place, label, strategy, iou, iou, iou, predicted, area,
                          area**0.5 / 4)
                )  # fmt: skip
    return found


def figures(base, tuned=None):
    found = {"base": summary(base)}
    if tuned is not None:
        found |= {"tuned": summary(tuned), "change": changes(base, tuned)}
    return found


def evaluation(**more):
    about = {
        "samray_version": "1", "split": "test", "num_images": 8, "num_instances": 40, "seed": 0,
        "dataset_digest": "0" * 64, "model_type": "tiny", "epoch": 1,
        "base_source": {"source": "tiny"}, "same_dataset_as_trained_on": True,
    }  # fmt: skip
    return about | more


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = resolve_model(Config(), weights_given=True)
    run = RunFolder.create(tmp_path_factory.mktemp("report") / "run", config, "0" * 64)
    epoch = {"epoch": 1, "step": 4, "loss": 0.5, "val_iou": 0.6, "seconds": 1.0}
    run.update(epochs=[epoch], latest="checkpoints/epoch_0001", best="checkpoints/epoch_0001")
    return run


def test_a_comparison_has_every_section(run):
    base, tuned = drawn_scores(0), drawn_scores(0.1)
    clicks = [
        [ClickCount(f"{n}.jpg", f"{n}.jpg", 0, tuple(ious)) for n in range(4)]
        for ious in ([0.5] * 20, [0.7, 0.91])
    ]
    content = evaluation(**figures(base, tuned))
    for model, counts in zip(("base", "tuned"), clicks, strict=True):
        content[model]["clicks_to_iou"] = clicks_summary(counts)
    content["change"]["clicks_to_iou"] = clicks_change(*clicks)
    content["other"] = {
        "data_dir": "/data/<other>", "split": "all", "num_images": 8, "num_instances": 40,
        **figures(base, drawn_scores(-0.1)),
    }  # fmt: skip
    content["other"]["tuned"]["instances"] = {"msa": 0.25, "found": 7, "true": 9}
    page = report_page(content, run, [])
    titles = [title.split(" <")[0] for title in re.findall("<h2>(.*?)</h2>", page)]
    assert titles == [
        "Per prompt", "Clicks needed", "Per label", "Per size", "Predicted IoU",
        "On another dataset", "Training",
    ]  # fmt: skip
    assert page.count("<svg") == 2
    assert ">-18.0 " in page  # clicks to 90 %
    assert ">100 %</td><td>0 %</td>" in page
    assert "/data/&lt;other&gt;" in page
    assert 'class="loss">worse' in page.partition("On another dataset")[2]
    assert "tuned 0.250, 7 found where 9 are annotated." in page


def test_every_object_has_a_section_of_its_own(run):
    """Figures and confused labels of the tuned model, and pictures of images with errors."""
    content = evaluation(**figures(drawn_scores(0), drawn_scores(0.1)))
    boxes = [encode_rle(CroppedMask(np.ones((9, 9), bool), (x, 4)), (20, 60)) for x in (0, 15, 30)]
    found = ImageObjects(
        (20, 60), tuple(boxes), ("fig", "<date>", "fig"), (0.9, 0.8, 0.7), tuple(boxes[:2]),
        ("fig", "fig"),
    )  # fmt: skip
    content["tuned"]["instances"] = score_instances([found])
    picture = {"kind": "objects", "image": "7.jpg", "errors": 1, "panels": [b"one", b"two"]}
    page = report_page(content, run, [picture])
    section = page.partition("<h2>Every object</h2>")[2].partition("<h2>")[0]
    assert "3 found, 2 annotated" in section
    assert "<b>0.667</b>" in section  # 2 of 2 with one false: TP / (TP + FP + FN)
    assert "&lt;date&gt; 1" in section
    assert "7.jpg: 1 missed or false" in section
    assert section.count("data:image/jpeg;base64,") == 2
    assert "<td>none</td>" in section  # no true object has the label <date>, so it has no AP
    assert "Before tuning" not in section
    content["base"]["instances"] = score_instances([found.only([0, 2], [0, 1])])
    before = report_page(content, run, []).partition("Before tuning")[2].partition("</p>")[0]
    assert "the decoder that ships with samray" in before
    assert "at IoU 0.5 0.333, 2 found" in before  # one right, one false, one missed
    sources = [f"{number}.jpg" for number in range(6)]
    change = objects_change(sources, [found.only([0, 2], [0, 1])] * 6, [found] * 6)
    assert change == {"msa": pytest.approx(1 / 3), "ci95": pytest.approx((1 / 3, 1 / 3)),
                      "verdict": "better"}  # fmt: skip
    content["change"]["instances"] = change
    page = report_page(content, run, [])
    assert "<b>+0.333</b> (+0.333 to +0.333), better" in page
    assert "The model knows none of these labels" not in page


def test_objects_of_a_model_that_does_not_know_the_labels_are_explained(run):
    box = encode_rle(CroppedMask(np.ones((9, 9), bool), (0, 4)), (20, 60))
    found = ImageObjects((20, 60), (box,), ("object",), (0.9,), (box,), ("fig",))
    content = evaluation(**figures(drawn_scores(0)))
    content["base"]["instances"] = score_instances([found])
    assert "The model knows none of these labels" in report_page(content, None, [])


def test_the_scores_of_one_model_speak_of_no_change():
    page = report_page(evaluation(**figures(drawn_scores(0))), None, [])
    titles = [title.split(" <")[0] for title in re.findall("<h2>(.*?)</h2>", page)]
    assert titles == ["Per prompt", "Per label", "Per size", "Predicted IoU"]
    assert "change" not in page
    assert page.count("<svg") == 1


def test_the_table_has_a_row_for_each_instance_and_prompt_with_the_figures_of_all_models():
    base, tuned = drawn_scores(0, "=nut"), drawn_scores(0.1, "=nut")
    heading, *rows = instance_rows({"base": base, "tuned": tuned})
    assert len(rows) == len(base)
    for row, before, after in zip(rows, base, tuned, strict=True):
        cells = dict(zip(heading, row, strict=True))
        assert (cells["image"], cells["instance"]) == (before.image, before.instance)
        assert (cells["label"], cells["strategy"]) == ("=nut", before.strategy)
        assert cells["area"] == before.area
        for model, score in (("base", before), ("tuned", after)):
            for name in ("iou", "dice", "boundary_iou", "predicted_iou"):
                assert float(cells[f"{model}_{name}"]) == pytest.approx(
                    getattr(score, name), abs=1e-6
                )
    heading, first, *_ = instance_rows({"base": base})
    assert len(heading) == len(first) == 10
