"""A RUN folder: when it is resumed, and from where."""

import pytest
from small_dataset import write_dataset

from samray.config import load_config
from samray.errors import ConfigError
from samray.runs import RunFolder, keep_num_epochs, open_run, require_same_run, resume_point
from samray.storage import write_json
from samray.training import pretraining, train
from samray.training.pretraining import pretrain
from samray.training.train import fit


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path / "run", load_config(), dataset_digest="d1")


def test_where_workers_go_on(run):
    assert resume_point(run.path) == "the beginning"
    for name, register in (
        ("epoch_0001", lambda name: run.register(name, {"val_iou": 0.5})),
        ("step_000014", run.register_within),
    ):
        folder = run.path / "checkpoints" / name
        folder.mkdir(parents=True)
        write_json(folder / "progress.json", {"step": 14 if "step" in name else 9})
        register(name)
        expected = "epoch 2, step 14" if "step" in name else "epoch 2, step 9"
        assert resume_point(run.path) == expected


@pytest.mark.parametrize("left", [(), ("run.json",), ("run.json", "config.yaml")])
def test_a_run_killed_as_it_began_is_begun_again(left, tmp_path):
    folder = tmp_path / "run"
    RunFolder.create(folder, load_config(), "d1")
    for name in {"run.json", "config.yaml"} - set(left):
        (folder / name).unlink()
    (folder / f".samray-{'0' * 32}").write_text("a probe")
    (folder / ".config.yaml.0123abcd.tmp").write_text("half")
    found = open_run(folder, resume=True)
    assert (found is not None) == ("config.yaml" in left)
    if left:
        with pytest.raises(ConfigError, match="add --resume"):
            open_run(folder, resume=False)
    else:
        assert open_run(folder, resume=False) is None
    (folder / "mine.txt").write_text("somebody's")
    if not left:
        with pytest.raises(ConfigError, match="holds no run of samray"):
            open_run(folder, resume=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=0.5", r"train.learning_rate \(was None, now 0.5\)"),
        ("train.seed=9", "train.seed"),
        ("prompts.point_selection=bbox", "prompts.point_selection"),
        ("loss.dice_weight=2", "loss.dice_weight"),
        ("model.freeze_mask_decoder=true", "model.freeze_mask_decoder"),
    ],
)
def test_resuming_with_another_setting_is_refused_by_name(run, override, message):
    with pytest.raises(ConfigError, match=message):
        require_same_run(run, load_config(None, [override]), "d1")


def test_resuming_with_other_epochs_and_workers_is_allowed(run):
    config = load_config(None, ["train.num_epochs=99", "scaling.num_workers=4"])
    require_same_run(run, config, "d1")


@pytest.mark.parametrize(
    ("resume", "words", "expected"),
    [
        (True, [], 40),
        (True, ["train.num_epochs=20"], 20),  # given, though it is the default
        (True, ["train.num_epochs=60"], 60),
        (False, [], 20),
    ],
)
@pytest.mark.parametrize("stage", [fit, pretrain])
def test_a_resumed_run_keeps_its_number_of_epochs_unless_another_is_given(
    stage, resume, words, expected, tmp_path, monkeypatch
):
    """The default would change the learning rate of every step that is left."""
    write_dataset(tmp_path / "data")
    paths = {"train.data_dir": str(tmp_path / "data"), "train.output_dir": str(tmp_path / "run")}
    RunFolder.create(tmp_path / "run", load_config(None, ["train.num_epochs=40"]), "d1")
    options = {**paths, "train.resume": resume, "model.type": "tiny"}
    seen = []
    for module in (train, pretraining):
        name = "_fit" if module is train else "_pretrain"
        monkeypatch.setattr(module, name, lambda config, *given: seen.append(config))
    stage(load_config(None, words, options))
    assert seen[0].train.num_epochs == expected


def test_another_number_of_epochs_is_said_and_saved(run, capsys):
    keep_num_epochs(run, load_config(None, ["train.num_epochs=60"]))
    assert capsys.readouterr().out == "num_epochs: 20 before, 60 now\n"
    assert load_config(run.path / "config.yaml").train.num_epochs == 60
    assert RunFolder(run.path).state["num_epochs"] == 60
    keep_num_epochs(run, load_config(None, ["train.num_epochs=60"]))
    assert capsys.readouterr().out == ""


def test_resuming_on_other_data_is_refused(run):
    with pytest.raises(ConfigError, match="was trained on dataset d1"):
        require_same_run(run, load_config(), "d2")
