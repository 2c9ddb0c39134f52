"""A real sweep on a real Ray: trials, crashes, kills, refusals, promotion."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import named, processes_below, wait_until_ended

from samray.config import load_config
from samray.errors import SamrayError
from samray.sam.checkpoint import load_checkpoint
from samray.sam.model import build_model
from samray.training.tune import can_restore, sweep

SPACE = {"train.learning_rate": {"choice": [3e-4, 1e-3]}}


@pytest.fixture(scope="module")
def own_prepared(prepared, tmp_path_factory):
    """`prepared` without embeddings, so that encoding can be counted."""
    folder = tmp_path_factory.mktemp("tune") / "prepared"
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("embeddings"))
    return folder


def config_file(folder: Path, **tune) -> Path:
    settings = {
        "model": {"adapt": "none"},
        "prompts": {"point_selection": "mixed"},
        # The instance decoder is a matter of the single run; here it would double the time.
        "train": {"num_epochs": 3, "batch_size": 2, "instances": False},
        "tune": {"search_space": SPACE, "num_trials": 4, "grace_epochs": 1, **tune},
    }
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def swept(own_prepared, tmp_path_factory, run_cli):
    """A sweep of three trials; one cannot learn, as its learning rate is absurd."""
    folder = tmp_path_factory.mktemp("swept")
    space = {
        "train.learning_rate": {"grid_search": [1.0e-4, 1.0e-3, 1.0e12]},
        "prompts.mixture.bbox": {"uniform": [0.0, 2.0]},
    }
    path = config_file(folder, search_space=space, num_trials=3)
    arguments = ("--data-dir", own_prepared, "--output-dir", folder / "sweep", "--config", path)
    status, out, err = run_cli("tune", *arguments)
    assert status == 0, err
    return folder / "sweep", out, arguments


def test_a_crashed_trial_is_reported_and_the_others_finish(swept):
    output, out, _ = swept
    state = json.loads((output / "sweep.json").read_text())
    assert state["status"] == "finished"
    by_rate = {trial["settings"]["train.learning_rate"]: trial for trial in state["trials"]}
    assert by_rate[1e12]["status"] == "failed"
    assert "no longer a finite number" in by_rate[1e12]["reason"]
    assert "no longer a finite number" in out
    for rate in (1e-4, 1e-3):
        assert by_rate[rate]["status"] in ("finished", "stopped")
        run = json.loads((output / by_rate[rate]["run"] / "run.json").read_text())
        assert run["status"] == by_rate[rate]["status"]
        assert max(e["val_iou"] for e in run["epochs"]) == by_rate[rate]["score"]
        config = load_config(output / by_rate[rate]["run"] / "config.yaml")
        assert config.train.learning_rate == rate
        assert config.prompts.mixture.bbox == by_rate[rate]["settings"]["prompts.mixture.bbox"]
        kept = (
            run["base_metrics"]
            if run["best"] == "base"
            else run["epochs"][int(run["best"][-4:]) - 1]
        )
        assert by_rate[rate]["kept_score"] == kept["val_iou"]
    scored = [trial for trial in state["trials"] if trial["kept"]]
    best = max(scored, key=lambda trial: (trial["kept_score"], trial["score"]))
    assert state["best"] == best["run"]


def test_each_image_is_encoded_once_for_all_trials(swept, own_prepared):
    state = json.loads((swept[0] / "sweep.json").read_text())
    manifest = json.loads((own_prepared / "manifest.json").read_text())
    images = sum(len(members) for members in manifest["splits"].values())
    assert state["embeddings"]["encoded"] == images
    assert len(list((own_prepared / "embeddings").rglob("*.npy"))) == images
    for trial in state["trials"]:
        run = json.loads((swept[0] / trial["run"] / "run.json").read_text())
        assert run["embeddings"]["encoded"] == 0


def test_the_report_has_test_scores_and_cost(swept):
    output, _, _ = swept
    state = json.loads((output / "sweep.json").read_text())
    for model in ("base", "best"):
        assert set(state["test"][model]["iou"]["strategy"]) == {
            *("center", "random", "bbox", "clicks")
        }
    assert state["cost"]["epochs"] == sum(t["epochs"] for t in state["trials"])
    page = (output / "report.html").read_text()
    for trial in state["trials"]:
        assert trial["trial_id"] in page
    assert f"{state['test']['best']['miou']:.3f}" in page
    assert "<script" not in page
    assert list((output / "tune").rglob("events.out.tfevents*"))


def test_the_same_command_again_repeats_nothing(swept, run_cli):
    output, _, arguments = swept
    assert can_restore(output / "tune")  # Ray's files are the ones that it looks at
    before = {path: path.stat().st_mtime_ns for path in (output / "trials").rglob("*")}
    status, _, err = run_cli("tune", *arguments)
    assert status == 0, err
    assert before == {path: path.stat().st_mtime_ns for path in (output / "trials").rglob("*")}


def test_another_sweep_under_the_same_output_is_refused(swept, run_cli):
    _, _, arguments = swept
    for word in ("train.batch_size=4", "tune.seed=1", "tune.num_trials=6"):
        status, _, err = run_cli("tune", *arguments, word)
        assert status == 2
        assert "holds another sweep" in err
        assert word.split("=")[0].split(".")[1] in err


def test_a_sweep_is_read_as_its_best_run(swept, own_prepared, tmp_path, run_cli):
    output, _, _ = swept
    state = json.loads((output / "sweep.json").read_text())
    assert f"/{state['best']}/" in str(load_checkpoint(output).path)
    status, _, err = run_cli(
        "evaluate", "--data-dir", own_prepared, "--checkpoint", output, "--output-dir", tmp_path,
        "evaluate.noc_objects=0",
    )  # fmt: skip
    assert status == 0, err
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["tuned"]["miou"] == pytest.approx(state["test"]["best"]["miou"], abs=1e-6)


def test_promote_list_and_roll_back(swept, tmp_path, run_cli):
    output, _, _ = swept
    store = tmp_path / "models"
    versions = []
    for _ in range(2):
        status, out, err = run_cli(
            "promote", output, "--name", "drawn", "--store", store, "--force"
        )
        assert status == 0, err
        versions.append((store / "drawn" / "current").read_text().strip())
        assert versions[-1] in out
    status, out, _ = run_cli("models", "--store", store)
    assert status == 0
    assert f"* {versions[1]}" in out
    assert f"  {versions[0]}" in out
    status, out, _ = run_cli("promote", "--rollback", "--name", "drawn", "--store", store)
    assert status == 0
    assert (store / "drawn" / "current").read_text().strip() == versions[0]
    best, stored = load_checkpoint(output), load_checkpoint(store / "drawn")
    assert all(torch.equal(stored.weights[name], best.weights[name]) for name in best.weights)
    record = json.loads((store / "drawn" / versions[1] / "promotion.json").read_text())
    assert record["previous"] == versions[0]
    assert record["base"]["digest"] == best.progress["base"]["digest"]
    assert set(record["metrics"]) == {"base", "tuned", "current"}
    for figures in record["metrics"].values():  # all have the encoder of the shipped decoder
        assert 0 <= figures["instances"]["msa"] <= 1


@pytest.mark.slow
def test_a_bad_checkpoint_is_refused_unless_forced(swept, tmp_path, run_cli):
    output, _, _ = swept
    state = json.loads((output / "sweep.json").read_text())
    run = tmp_path / "run"
    shutil.copytree(output / state["best"], run, symlinks=True)
    folder = (run / "latest").resolve()
    weights = dict(load_checkpoint(folder).weights)
    random = build_model("tiny", 1).state_dict()
    weights |= {name: random[name] for name in weights if name.startswith("mask_decoder")}
    (folder / "weights.pth").unlink()  # it may be linked with the sweep's
    torch.save(weights, folder / "weights.pth")
    store = tmp_path / "models"
    status, _, err = run_cli("promote", folder, "--name", "drawn", "--store", store)
    assert status == 2
    assert "worse than its base" in err
    assert "forgot clicks" in err
    assert not (store / "drawn").exists()
    status, out, err = run_cli("promote", folder, "--name", "drawn", "--store", store, "--force")
    assert status == 0, err
    assert "forced although it is worse" in out
    (version,) = [path for path in (store / "drawn").iterdir() if path.is_dir()]
    assert json.loads((version / "promotion.json").read_text())["guard"]["forced"] is True


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tune.metric", "val_miou", "reported by no trial; choose from val_iou"),
        ("tune.num_trials", 3, "no multiple of the 2 points"),
        ("scaling.cpus_per_worker", 4096, "do not fit the cluster"),
        ("scaling.device", "gpu", "needs 1 GPUs"),
        ("model.type", "vit_q", "vit_q"),
    ],
)
def test_what_cannot_run_is_refused_at_once(prepared, tmp_path, option, value, message):
    if option == "scaling.device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    settings = {
        "tune.data_dir": str(prepared),
        "tune.output_dir": str(tmp_path / "sweep"),
        "tune.search_space": {"train.learning_rate": {"grid_search": [1e-4, 1e-3]}},
    }
    with pytest.raises(SamrayError) as caught:
        sweep(load_config(options={**settings, option: value}))
    assert message in str(caught.value)
    assert not (tmp_path / "sweep" / "sweep.json").exists()


@pytest.mark.slow
def test_a_sweep_interrupted_and_then_killed_is_resumed(own_prepared, tmp_path, run_cli):
    """Ctrl-C in the first trial, kill -9 of the driver after it; the same command each time."""
    output, log, num_trials = tmp_path / "sweep", tmp_path / "log", 3
    words = ["--data-dir", str(own_prepared), "--output-dir", str(output)]
    words += ["--num-trials", str(num_trials), "tune.scheduler=none", "--num-epochs", "3"]
    # One after the other: the second may be done before it notices the kill, the third is not.
    words += ["model.adapt=none", "train.instances=false", "tune.max_concurrent_trials=1"]
    process = start_sweep(words, log)
    wait_for(lambda: list(output.glob("trials/*/run.json")), process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    assert "samray tune: interrupted" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((output / "sweep.json").read_text())["status"] == "interrupted"

    process = start_sweep(words, log)
    wait_for(lambda: "\ntrial 1/" in log.read_text(), process, log)
    started = processes_below(process.pid)
    agents = named(started, "ray::DashboardAgent") | named(started, "ray::RuntimeEnvAgent")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert json.loads((output / "sweep.json").read_text())["status"] == "running"
    assert started - agents
    wait_until_ended(started - agents)
    for pid in agents:  # they write no files of samray, and would stay for a minute
        os.kill(pid, signal.SIGKILL)
    runs = {p.parent.name: json.loads(p.read_text()) for p in output.glob("trials/*/run.json")}
    done = {name: run for name, run in runs.items() if len(run["epochs"]) == 3}
    assert done
    assert len(done) < num_trials
    embeddings = {p: p.stat().st_mtime_ns for p in (own_prepared / "embeddings").rglob("*.npy")}
    assert embeddings

    status, _, err = run_cli("tune", *words)
    assert status == 0, err
    state = json.loads((output / "sweep.json").read_text())
    assert state["status"] == "finished"
    assert state["interrupted"] is True
    assert {trial["status"] for trial in state["trials"]} == {"finished"}
    for trial in state["trials"]:  # those of a sweep without a search space of its own
        assert set(trial["settings"]) == {"train.learning_rate", "prompts.point_selection"}
    names = {trial["trial_id"] for trial in state["trials"]}
    assert len(names) == num_trials
    assert set(runs) <= names
    for name, before in done.items():  # not repeated: the same epochs, even their seconds
        after = json.loads((output / "trials" / name / "run.json").read_text())
        assert after["epochs"] == before["epochs"]
    assert embeddings == {
        p: p.stat().st_mtime_ns for p in (own_prepared / "embeddings").rglob("*.npy")
    }


def start_sweep(words, log):
    """`jobs.tune` in a process with a Ray of its own, both outputs in a file."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tune", *words], stdout=file, stderr=file,
            env=environment, start_new_session=True,
        )  # fmt: skip


def wait_for(condition, process, log):
    """Wait until it holds, at most four minutes, while the process runs."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
