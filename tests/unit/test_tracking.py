"""A run's event files as TensorBoard reads them, its curves in MLflow, and what it ran with."""

import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from samray import __version__
from samray.config import Config, load_config
from samray.errors import ConfigError
from samray.storage import list_folder, read_json, resolve, write_json
from samray.tracking import Tracker, describe_start, git_commit, require_mlflow

STEPS = 3  # of an epoch


def epoch_event(number):
    return {
        "event": "epoch", "epoch": number, "step": number * STEPS, "loss": 1 / number,
        "loss_dice": 0.5, "val_iou": number / 10, "val_iou_bbox": 0.4, "seconds": 2.0,
        "skipped": [["a.jpg"]], "note": "text",
    }  # fmt: skip


def events(first, last):
    """The events of some epochs, with that of the base before the first one of all."""
    found = [{"event": "base", "val_iou": 0.05, "val_iou_bbox": 0.3}] if first == 1 else []
    for number in range(first, last + 1):
        found += [
            {"event": "step", "epoch": number, "step": n, "steps": STEPS, "loss": number + n / 10,
             "learning_rate": 1e-4}
            for n in range(1, STEPS + 1)
        ]  # fmt: skip
        found.append(epoch_event(number))
    return found


def track(run, given, step=0, config=None, pictures=dict):
    """Report events; return the lines for the user."""
    passed_on = []
    with Tracker(run, config or Config(), step, passed_on.append) as tracker:
        tracker.pictures = pictures
        for event in given:
            tracker.report(event)
    events = [event for event in passed_on if "text" not in event]
    assert events == [event for event in given if event["event"] != "within"]
    return [event["text"] for event in passed_on if "text" in event]


def read_curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()
    curves = {
        tag: [(point.step, pytest.approx(point.value)) for point in accumulator.Scalars(tag)]
        for tag in tags["scalars"]
    }
    pictures = {tag: accumulator.Images(tag) for tag in tags["images"]}
    return curves, pictures


def test_every_figure_becomes_a_curve_over_optimiser_steps(tmp_path):
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 30:] = 255
    track(tmp_path, events(1, 2), pictures=lambda: {"val/0": picture})
    curves, pictures = read_curves(tmp_path / "tensorboard")
    assert curves["step/loss"] == [(1, 1.1), (2, 1.2), (3, 1.3), (4, 2.1), (5, 2.2), (6, 2.3)]
    assert curves["step/learning_rate"] == [(n, 1e-4) for n in range(1, 7)]
    assert curves["epoch/loss"] == [(3, 1.0), (6, 0.5)]
    assert curves["epoch/number"] == [(3, 1), (6, 2)]
    assert curves["epoch/seconds"] == [(3, 2), (6, 2)]
    assert curves["epoch/skipped_steps"] == [(3, 1), (6, 1)]
    assert curves["val/iou"] == [(0, 0.05), (3, 0.1), (6, 0.2)]
    assert curves["val/iou_bbox"] == [(0, 0.3), (3, 0.4), (6, 0.4)]
    assert [(one.step, one.height, one.width) for one in pictures["val/0"]] == [
        (0, 20, 60), (3, 20, 60), (6, 20, 60),
    ]  # fmt: skip


@pytest.mark.parametrize("done", [0, 1])
def test_a_run_killed_in_an_epoch_and_resumed_has_each_step_once(tmp_path, done):
    killed = events(1, 2)[:-2]  # in the second epoch, after two of its steps
    if done == 0:
        killed = killed[:3]  # in the first, before there is a checkpoint
    track(tmp_path, killed)
    (written,) = (tmp_path / "tensorboard").iterdir()
    written.rename(written.with_name("events.out.tfevents.0000000001"))  # not in the same second
    track(tmp_path, events(done + 1, 3), step=done * STEPS)
    curves, _ = read_curves(tmp_path / "tensorboard")
    assert [step for step, _ in curves["step/loss"]] == list(range(1, 10))
    assert [step for step, _ in curves["val/iou"]] == [0, 3, 6, 9]


def test_without_an_event_nothing_is_written(tmp_path):
    """As on all ranks but the first."""
    track(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_mlflow_has_settings_curves_and_status_and_a_resumed_run_goes_on(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    from mlflow import MlflowClient

    store = tmp_path / "store"
    config = load_config(options={"train.mlflow_uri": str(store), "train.learning_rate": 0.25})
    run = tmp_path / "run"
    run.mkdir()
    track(run, events(1, 1), config=config)
    client = MlflowClient(tracking_uri=str(store))
    (found,) = client.search_runs([client.get_experiment_by_name("samray").experiment_id])
    assert found.info.run_id == read_json(run / "mlflow.json")["run_id"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["train.learning_rate"] == "0.25"
    assert found.data.params["prompts.point_selection"] == config.prompts.point_selection
    assert found.data.metrics["val/iou"] == pytest.approx(0.1)

    with pytest.raises(KeyError, match="epoch"):
        track(run, [*events(2, 2), {"event": "step"}], STEPS, config)
    (found,) = client.search_runs([client.get_experiment_by_name("samray").experiment_id])
    assert found.info.status == "FAILED"
    losses = client.get_metric_history(found.info.run_id, "step/loss")
    assert [(m.step, m.value) for m in losses] == [
        (n, pytest.approx(v)) for n, v in enumerate((1.1, 1.2, 1.3, 2.1, 2.2, 2.3), start=1)
    ]
    assert [m.step for m in client.get_metric_history(found.info.run_id, "val/iou")] == [0, 3, 6]


@pytest.mark.parametrize("damage", ["empty", "deleted"])
def test_a_run_that_mlflow_cannot_continue_is_followed_by_a_new_one(tmp_path, damage):
    """As after a kill while MLflow wrote the file."""
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    from mlflow import MlflowClient

    store, run = tmp_path / "store", tmp_path / "run"
    config = load_config(options={"train.mlflow_uri": str(store)})
    run.mkdir()
    track(run, events(1, 1), config=config)
    first = read_json(run / "mlflow.json")["run_id"]
    client = MlflowClient(tracking_uri=str(store))
    if damage == "empty":
        (meta,) = store.glob(f"*/{first}/meta.yaml")
        meta.write_text("")
    else:
        client.delete_run(first)
    (text,) = track(run, events(2, 2), STEPS, config)
    assert f"MLflow's run {first} cannot be continued" in text
    second = read_json(run / "mlflow.json")["run_id"]
    assert client.get_run(second).info.status == "FINISHED"
    assert second != first
    assert [m.step for m in client.get_metric_history(second, "val/iou")] == [6]


def test_with_a_checkpoint_within_an_epoch_the_steps_before_it_are_kept(tmp_path, bucket):
    """What comes after it, a killed run computes again."""
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    from mlflow import MlflowClient

    store, run = tmp_path / "store", resolve(f"{bucket}/run", "run")
    config = load_config(options={"train.mlflow_uri": str(store)})
    tracker = Tracker(run, config, 0, lambda event: None)  # never closed, as after a kill
    for event in [*events(1, 1)[:3], {"event": "within", "step": 2}, events(1, 1)[3]]:
        tracker.report(event)
    client = MlflowClient(tracking_uri=str(store))
    run_id = read_json(run / "mlflow.json")["run_id"]
    assert [m.step for m in client.get_metric_history(run_id, "step/loss")] == [1, 2]
    curves, _ = read_curves(run / "tensorboard")
    assert [step for step, _ in curves["step/loss"]] == [1, 2]


def test_an_mlflow_that_does_not_work_is_a_mistake_in_the_setting(tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    (tmp_path / "file").write_text("")
    config = load_config(options={"train.mlflow_uri": "nosuchscheme://server"})
    with pytest.raises(ConfigError, match=r"train\.mlflow_uri: nosuchscheme"):
        track(tmp_path, events(1, 1), config=config)


def test_a_server_that_is_away_ends_the_first_start_alone_and_soon(tmp_path, monkeypatch):
    """A restart keeps the run's id, so that the server has one run with all curves."""
    pytest.importorskip("mlflow", reason="mlflow is not installed here")
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}", raising=False)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        config = load_config(options={"train.mlflow_uri": uri})
        with pytest.raises(ConfigError, match=rf"train\.mlflow_uri: {uri} cannot be used"):
            track(tmp_path, events(1, 1), config=config)
        known = {"tracking_uri": uri, "run_id": "abc"}
        write_json(tmp_path / "mlflow.json", known)
        started = time.perf_counter()
        texts = track(tmp_path, events(1, 2), config=config)
    assert time.perf_counter() - started < 60  # four minutes a request by MLflow's own settings
    assert "MLflow does not answer now" in texts[0]
    assert len(texts) > 1
    assert read_json(tmp_path / "mlflow.json") == known


def test_mlflow_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(__import__("sys").modules, "mlflow", raising=False)
    with pytest.raises(ConfigError, match=r"tune\.mlflow_uri: mlflow is not installed"):
        require_mlflow("tune.mlflow_uri", "http://server")


def test_a_start_names_versions_device_seed_and_commit():
    config = load_config(options={"train.seed": 7})
    found = describe_start(config, 2, 14, torch.device("cpu"), 3, "abc")
    assert found["packages"]["samray"] == __version__
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert set(found["packages"]) == {
        *("samray", "torch", "torchvision", "ray", "segment-anything", "numpy")
    }
    assert (found["seed"], found["epochs_done"], found["num_workers"]) == (7, 2, 3)
    assert found["step"] == 14
    assert found["git_commit"] == "abc"
    assert len(found["device"]) > 2


def test_the_commit_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    Path("a.txt").write_text("one")
    for words in (["init", "-q"], ["add", "a.txt"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *words], check=True)
    commit = git_commit()
    assert len(commit) == 40
    Path("new.txt").write_text("two")
    assert git_commit() == commit
    Path("a.txt").write_text("two")
    assert git_commit() == f"{commit}+changes"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None


def test_event_files_of_a_run_in_s3_are_there_after_each_epoch(bucket):
    run = resolve(f"{bucket}/run", "run")
    files = run / "tensorboard"
    kept = []
    with Tracker(run, Config(), 0, lambda event: kept.append(list_folder(files))) as tracker:
        for event in events(1, 2):
            tracker.report(event)
    assert [len(names) for names in kept] == [1] * 4 + [2] * 4 + [3]  # base, then an epoch each
    curves, _ = read_curves(files)
    assert [step for step, _ in curves["val/iou"]] == [0, 3, 6]
    assert [step for step, _ in curves["step/loss"]] == list(range(1, 7))


@pytest.mark.parametrize("setting", ["train.mlflow_uri", "tune.mlflow_uri"])
def test_a_password_is_not_saved_with_a_run(setting):
    with pytest.raises(ConfigError, match=f"{setting}: holds a user or a password") as refused:
        load_config(options={setting: "https://me:marked-secret@server:5000"})
    assert "marked-secret" not in str(refused.value)
    server = "https://server:5000"
    section, _, name = setting.partition(".")
    assert getattr(load_config(options={setting: server}), section).model_dump()[name] == server
