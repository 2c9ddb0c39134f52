"""`samray evaluate`: what is refused before a model is scored."""

from unittest.mock import Mock

import pytest
from sam_parts import blob_record

from samray.config import load_config
from samray.errors import CheckpointError, ConfigError
from samray.evaluation import evaluate as evaluation


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """`ask(checkpoint, output)` in an empty folder; no dataset is read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared").mkdir()

    class Dataset:
        def __init__(self, folder):
            pass

        def split(self, name, background):
            return []

    monkeypatch.setattr(evaluation, "PreparedDataset", Dataset)

    def run(checkpoint, output):
        named = {"data_dir": "prepared", "checkpoint": checkpoint, "output_dir": output}
        options = {f"evaluate.{key}": value for key, value in named.items()}
        return evaluation.evaluate(load_config(options=options))

    return run


@pytest.mark.parametrize(
    "name",
    ["run.json", "sweep.json", "manifest.json", "weights.pth", "promotion.json", "current"],
)
def test_the_folder_of_a_run_and_of_others_takes_no_report(ask, tmp_path, name):
    folder = tmp_path / "taken"
    folder.mkdir()
    for own in (name, "config.yaml"):
        (folder / own).write_text("own")
    with pytest.raises(ConfigError, match=rf"--output-dir: .*taken holds {name}, .*choose another"):
        ask("tiny", "taken")
    assert (folder / "config.yaml").read_text() == "own"
    assert sorted(path.name for path in folder.iterdir()) == sorted([name, "config.yaml"])


@pytest.mark.parametrize("name", ["tiny", "vit_b"])
def test_a_run_with_the_name_of_a_model_is_not_shadowed(ask, tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"--checkpoint {name}: .*give \./{name} for that"):
        ask(name, "report")
    with pytest.raises(CheckpointError, match=rf"{name}: holds no run.json"):
        ask(f"./{name}", "report")


def test_an_image_without_an_object_counts_in_the_search_for_all_objects_alone(monkeypatch):
    record = blob_record("empty", (60, 80), 0)
    judge = evaluation.Evaluator.__ray_metadata__.modified_class
    judge = judge.__new__(judge)
    judge.dataset, judge.seed = Mock(images={"empty": record}), 0
    judge.sams, judge.finders = {"base": Mock(), "tuned": Mock()}, {"base": None, "tuned": Mock()}
    judge._embedding = Mock()
    monkeypatch.setattr(evaluation, "decode_image", Mock())
    monkeypatch.setattr(evaluation, "compare_objects", lambda *_: "false objects")
    outcomes = judge.score("empty", ())
    assert outcomes["base"] == evaluation.Outcome([], [], [])
    assert outcomes["tuned"] == evaluation.Outcome([], [], ["false objects"])
    assert judge._embedding.call_count == 1  # not encoded for a model that looks for none
