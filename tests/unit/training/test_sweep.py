"""What a sweep compares its trials by, how many run at once, and when it goes on or starts anew."""

import contextlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from small_dataset import write_dataset

from samray.cluster import Resources
from samray.config import load_config
from samray.errors import ClusterError, ConfigError, DatasetError, SweepError
from samray.runs import RunFolder
from samray.storage import resolve
from samray.training import tune
from samray.training.search_space import search_space
from samray.training.train import Trial, finish_run, fit, train_loop_per_worker
from samray.training.tune import METRICS, can_restore, require_all, require_metric

SESSION = "2026-01-01_00-00-00"


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_an_epoch_may_be_chosen(metric):
    require_metric(load_config(overrides=[f"tune.metric={metric}"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune.metric=val_map"], "'val_map' is reported by no trial; choose from val_iou"),
        (["tune.metric=val_msa", "train.instances=false"], "set train.instances=true"),
        (
            ["tune.metric=val_msa", "tune.search_space={train.instances: {choice: [true, false]}}"],
            "leave it out of tune.search_space",
        ),
    ],
)
def test_a_metric_that_a_trial_lacks_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        require_metric(load_config(overrides=words))


@pytest.mark.parametrize("search", ["random", "optuna"])
@pytest.mark.parametrize(("asked", "workers", "expected"), [(None, 1, 4), (None, 2, 2), (1, 2, 1)])
def test_no_more_trials_run_at_once_than_asked_for_and_fit(search, asked, workers, expected):
    """Tune's own setting does not count for a random search."""
    if search == "optuna":
        pytest.importorskip("optuna", reason="optuna is not installed here")
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    options = {"tune.search_space": space, "tune.search": search}
    config = load_config(options={**options, "tune.max_concurrent_trials": asked})
    plan = tune.SweepPlan(config, Path("sweep"), Resources(workers, False, 1, 4), 16, "d")
    assert tune._searcher(plan, search_space(config)).max_concurrent == expected


def plan_in(folder, num_trials=3, words=()):
    space = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}
    config = load_config(None, words, {"tune.search_space": space})
    return tune.SweepPlan(config, folder, Resources(1, False, 1, 2), num_trials, "d")


def write_state(folder, trials=("t",)):
    """Tune's own files, as far as they are read."""
    folder.mkdir(parents=True, exist_ok=True)
    state = json.dumps({"trial_data": list(trials), "runner_data": {}})
    (folder / f"experiment_state-{SESSION}.json").write_text(state)
    (folder / f"basic-variant-state-{SESSION}.json").write_bytes(pickle.dumps({"counter": 1}))
    (folder / f"callback-states-{SESSION}.pkl").write_bytes(pickle.dumps({}))
    (folder / "tuner.pkl").write_bytes(pickle.dumps({"a": 1}))


def test_a_whole_state_of_tune_is_restored(tmp_path):
    write_state(tmp_path)
    assert can_restore(tmp_path)
    (tmp_path / "experiment_state-2025-01-01_00-00-00.json").write_text("{")  # of an earlier start
    assert can_restore(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize("kind", ["experiment_state", "basic-variant-state", "tuner"])
def test_a_state_of_tune_that_is_not_whole_is_not_restored(tmp_path, kind, damage):
    write_state(tmp_path)
    (path,) = tmp_path.glob(f"{kind}*")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 9 if damage == "cut" else 0])
    expected = (kind, damage) == ("basic-variant-state", "missing")  # with optuna it has none
    assert can_restore(tmp_path) == expected


def test_a_state_of_tune_before_its_first_trial_is_not_restored(tmp_path):
    assert not can_restore(tmp_path)
    write_state(tmp_path, trials=())
    assert not can_restore(tmp_path)


class FakeTuner:
    """Stands for Ray's; remembers how it was made, and has run no trial."""

    made: list  # (how, keywords)

    def __init__(self, trainable, **keywords):
        self.made.append(("new", keywords))

    @classmethod
    def restore(cls, path, trainable, **keywords):
        cls.made.append(("restored", keywords))
        return cls.__new__(cls)

    def fit(self):
        return []


@pytest.fixture
def tuners(monkeypatch):
    FakeTuner.made = []
    monkeypatch.setattr(tune.tune, "Tuner", FakeTuner)
    monkeypatch.setattr(tune.tune, "with_parameters", lambda trainable, **parameters: trainable)
    monkeypatch.setattr(tune.tune, "with_resources", lambda trainable, resources: trainable)
    monkeypatch.setattr(tune.cluster, "wait_for_room", lambda *wanted: None)
    return FakeTuner.made


def run_trials(plan):
    with contextlib.suppress(KeyboardInterrupt, SweepError):  # there are no trials
        tune._run_trials(plan, search_space(plan.config))


def test_a_sweep_that_found_no_room_has_begun_nothing(tuners, tmp_path, monkeypatch):
    def refuse(*wanted):
        raise ClusterError("the cluster had no 1 free CPU")

    monkeypatch.setattr(tune.cluster, "wait_for_room", refuse)
    with pytest.raises(ClusterError):
        tune._run_trials(plan_in(tmp_path), {})
    assert tuners == []
    assert not (tmp_path / "tune").exists()


def test_what_tune_left_before_its_first_trial_is_begun_again(tuners, tmp_path):
    write_state(tmp_path / "tune")
    (tmp_path / "tune" / f"experiment_state-{SESSION}.json").unlink()
    (tmp_path / "trials" / "a").mkdir(parents=True)
    run_trials(plan_in(tmp_path))
    assert [how for how, _ in tuners] == ["new"]
    assert tuners[0][1]["tune_config"].num_samples == 3
    assert not (tmp_path / "tune").exists()
    assert (tmp_path / "trials" / "a").exists()


def test_a_resumed_sweep_gives_its_failed_trials_another_attempt(tuners, tmp_path):
    write_state(tmp_path / "tune")
    run_trials(plan_in(tmp_path))
    ((how, keywords),) = tuners
    assert (how, keywords["resume_errored"]) == ("restored", True)


def test_trials_of_a_search_begun_again_have_the_same_ids(tmp_path):
    """So each goes on from its RUN."""
    prefixes = set()
    for _ in range(2):
        plan = plan_in(tmp_path)
        prefixes.add(tune._searcher(plan, search_space(plan.config))._uuid_prefix)
    assert len(prefixes) == 1


@pytest.mark.parametrize(
    ("statuses", "stopped", "error"),
    [
        (("finished", "failed", "stopped"), False, None),
        (("finished", "unfinished", "finished"), False, KeyboardInterrupt),
        (("finished", "finished"), True, KeyboardInterrupt),
        (("finished",), False, SweepError),
    ],
)
def test_tune_ended_before_all_trials(statuses, stopped, error, tmp_path):
    rows = [{"status": status} for status in statuses]
    if error is None:
        require_all(rows, plan_in(tmp_path), stopped)
        return
    with pytest.raises(error) as caught:
        require_all(rows, plan_in(tmp_path), stopped)
    if error is SweepError:
        assert "after 1 of 3 trials; remove this folder" in str(caught.value)


@pytest.mark.parametrize(
    ("chosen", "word", "finished"),
    [
        ({"train.instances": True}, "train.instances=false", True),
        ({"train.instances": False}, "train.instances=auto", False),
        ({}, "train.instances=auto", True),
        ({}, "train.instances=false", False),
    ],
)
def test_the_instance_decoder_of_the_best_trial_is_finished(
    chosen, word, finished, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(tune, "_finish", lambda *given: calls.append(given[-1]))
    for name in ("_test_scores", "_cost", "importance"):
        monkeypatch.setattr(tune, name, lambda *given: {})
    trial = {"run": "trials/a", "score": 0.5, "kept_score": 0.5, "settings": chosen}
    tune._result(plan_in(tmp_path, words=[word]), None, {"trials": [trial]})
    assert calls == (["trials/a"] if finished else [])


def test_finishing_the_best_trial_waits_for_room_with_a_message(tmp_path, monkeypatch):
    def refuse(*wanted):
        raise ClusterError(f"had no room for {wanted}")

    monkeypatch.setattr(tune.cluster, "wait_for_room", refuse)
    with pytest.raises(ClusterError, match=r"had no room for \(1, 1, 0\)"):
        tune._finish(plan_in(tmp_path), None, "trials/a")


def test_a_relative_mlflow_folder_is_kept_absolute(tmp_path, monkeypatch):
    write_dataset(tmp_path / "data")
    seen = []
    monkeypatch.setattr(tune, "_sweep", lambda config, *given: seen.append(config.tune.mlflow_uri))
    monkeypatch.setattr(tune, "require_mlflow", lambda setting, uri: None)
    monkeypatch.chdir(tmp_path)
    paths = {"tune.data_dir": "data", "tune.output_dir": "sweep"}
    for uri in ("mlruns", "http://server:5000"):
        tune.sweep(load_config(options={**paths, "tune.mlflow_uri": uri}))
    assert seen == [str(resolve("mlruns", "")), "http://server:5000"]


@pytest.mark.parametrize("where", ["worker", "trial", "finish"])
def test_a_dataset_that_is_prepared_again_meanwhile_ends_the_run(where, tmp_path):
    """Else the weights would come from one dataset and the scores from another."""
    write_dataset(tmp_path / "data")  # its digest is "d"
    paths = {"train.data_dir": str(tmp_path / "data"), "train.output_dir": str(tmp_path / "run")}
    config = load_config(options=paths)
    run, data = tmp_path / "run", tmp_path / "data"
    if where != "trial":
        RunFolder.create(run, config, "before")
    facts = {"config": config, "threads": 1, "use_gpu": False}
    start = {
        "worker": lambda: train_loop_per_worker({"run": run, "dataset": data, **facts}),
        "trial": lambda: fit(config, Trial(tmp_path / "base", print, dataset_digest="before")),
        "finish": lambda: finish_run(run, data, torch.device("cpu"), 1, full_precision=True),
    }[where]
    with pytest.raises(DatasetError, match=r"was prepared again while .* into another folder"):
        start()
