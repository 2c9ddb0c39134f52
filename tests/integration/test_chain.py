"""All stages by the command line on a real Ray, and resuming a killed run."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch
from processes import named, processes_below, wait_until_ended
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samray import elastic
from samray.config import load_config
from samray.data.dataset import PreparedDataset
from samray.runs import RunFolder
from samray.sam.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
SMALL = ["--batch-size", "3", "train.warmup_steps=2"]
FROZEN = [*SMALL, "train.max_objects=2", "--freeze-image-encoder"]


@pytest.fixture(scope="module")
def first_run(prepared, tmp_path_factory, run_cli):
    """Two epochs from random weights on two workers; the encoder is trained, too."""
    run = tmp_path_factory.mktemp("runs") / "first"
    status, out, err = run_cli(
        "train", "--data-dir", prepared, "--output-dir", run, "--model-type", "tiny",
        "--checkpoint", "none", "--num-workers", 2, "--num-epochs", 2, "--lr", 1e-3, *SMALL,
        "train.max_objects=2",
    )  # fmt: skip
    assert status == 0, err
    assert "run.json" in out
    return run


@pytest.fixture(scope="module")
def tuned_run(prepared, first_run, tmp_path_factory, run_cli):
    """Two epochs from the first run's weights: the encoder is frozen and embeddings are cached.

    The dataset is named by a relative path.
    """
    run = tmp_path_factory.mktemp("runs") / "tuned"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared.parent)
        status, _, err = run_cli(
            "train", "--data-dir", prepared.name, "--output-dir", run, "--model-type", "tiny",
            "--checkpoint", first_run, "--num-epochs", 2, *FROZEN,
        )  # fmt: skip
    assert status == 0, err
    return run


def read_events(run):
    """Steps of each curve and of each picture in a run's event files."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    curves = {tag: [point.step for point in events.Scalars(tag)] for tag in tags["scalars"]}
    return curves, {tag: [one.step for one in events.Images(tag)] for tag in tags["images"]}


def state_of(run):
    return json.loads((run / "run.json").read_text())


def test_a_run_is_self_contained(first_run, prepared):
    state = state_of(first_run)
    dataset = PreparedDataset(prepared)
    steps = -(-len(dataset.split("train")) // 3)
    assert state["status"] == "finished"
    assert state["embeddings"] is None
    assert [epoch["step"] for epoch in state["epochs"]] == [steps, 2 * steps]
    for epoch in state["epochs"]:
        four = [epoch[f"val_iou_{name}"] for name in ("center", "random", "bbox", "clicks")]
        assert epoch["val_iou"] == pytest.approx(sum(four) / 4)
        assert 0 <= epoch["val_dice"] <= 1
    best = max(state["epochs"], key=lambda epoch: epoch["val_iou"])
    checkpoint = load_checkpoint(first_run)
    assert checkpoint.progress["epoch"] == best["epoch"]
    assert checkpoint.progress["dataset_digest"] == dataset.digest
    assert checkpoint.progress["base"]["source"] == "random weights, seed 0"
    assert not (first_run / "ray").exists()
    (start,) = state["starts"]
    assert (start["num_workers"], start["seed"], start["epochs_done"]) == (2, 0, 0)
    assert start["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert len(list((first_run / "tensorboard").iterdir())) == 1  # of rank 0 alone
    curves, pictures = read_events(first_run)
    assert curves["step/loss"] == list(range(1, 2 * steps + 1))
    assert curves["val/iou"] == curves["epoch/seconds"] == [steps, 2 * steps]
    assert len(pictures) == 2


def test_training_moves_the_encoder_from_random_weights_and_not_when_frozen(first_run, tuned_run):
    def encoder(folder):
        weights = load_checkpoint(folder).weights
        return {k: v for k, v in weights.items() if k.startswith("image_encoder.")}

    base, trained = encoder(first_run / "base"), encoder(first_run)
    tuned = encoder(tuned_run / "latest")
    assert not all(torch.equal(base[name], trained[name]) for name in base)
    assert all(torch.equal(trained[name], tuned[name]) for name in base)
    decoder = "mask_decoder.iou_token.weight"
    before, after = (load_checkpoint(run).weights for run in (first_run, tuned_run / "latest"))
    assert not torch.equal(before[decoder], after[decoder])


def test_each_image_is_encoded_once_and_paths_are_saved_as_absolute_ones(tuned_run, prepared):
    assert state_of(tuned_run)["embeddings"]["encoded"] == num_learned(prepared)
    assert state_of(tuned_run)["embeddings"]["found"] == 0
    saved = load_config(tuned_run / "config.yaml").train
    assert (saved.data_dir, saved.output_dir) == (str(prepared), str(tuned_run))


def num_learned(prepared):
    dataset = PreparedDataset(prepared)
    return len(dataset.split("train")) + len(dataset.split("val"))


def untested(prepared, folder):
    """A copy of a prepared dataset of which three images are left, all in the train split."""
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("embeddings"))
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = pq.read_table(folder / manifest["shards"][0], columns=["name", "annotation"]).to_pylist()
    manifest["splits"] = {"train": [row["name"] for row in rows[:3]], "val": [], "test": []}
    manifest["dropped_annotations"] = [row["annotation"] for row in rows[3:]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_evaluate_compares_base_with_tuned(first_run, prepared, tmp_path, run_cli):
    cached = set((prepared / "embeddings").rglob("*.npy"))
    other = untested(prepared, tmp_path / "other")
    status, out, err = run_cli(
        "evaluate", "--data-dir", prepared, "--checkpoint", first_run, "--output-dir", tmp_path,
        "--other-data-dir", other, "evaluate.noc_objects=3",
    )  # fmt: skip
    assert status == 0, err
    new = set((prepared / "embeddings").rglob("*.npy")) - cached
    # Those of the tuned encoder are of no use to others.
    assert len(new) == len(PreparedDataset(prepared).split("test"))
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    labels = set(PreparedDataset(prepared).manifest["labels"])
    for model in ("base", "tuned"):
        for value in ("iou", "dice"):
            assert set(evaluation[model][value]["strategy"]) == {
                "center",
                "random",
                "bbox",
                "clicks",
            }
            assert set(evaluation[model][value]["label"]) <= labels
            assert all(0 <= v <= 1 for v in evaluation[model][value]["strategy"].values())
        clicks = evaluation[model]["clicks_to_iou"]
        assert clicks["num_objects"] == 3
        assert 1 <= clicks["85"]["mean"] <= clicks["90"]["mean"] <= 20
        assert 0 <= clicks["85"]["failed"] <= clicks["90"]["failed"] <= 1
        assert sum(b["count"] for b in evaluation[model]["calibration"]["bins"]) == (
            4 * evaluation["num_instances"]
        )
        for key in ("iou_by_size", "iou_by_model_size"):
            counts = [found["count"] for found in evaluation[model][key].values()]
            assert sum(counts) == evaluation["num_instances"]
        for name, (low, high) in evaluation[model]["iou_ci95"]["strategy"].items():
            assert low <= evaluation[model]["iou"]["strategy"][name] <= high
    assert f"{evaluation['tuned']['iou']['strategy']['random']:.3f}" in out
    assert "clicks to 90 % IoU: " in out
    assert "other mIoU" in out
    for name, change in evaluation["change"]["strategy"].items():
        before, after = (evaluation[model]["iou"]["strategy"][name] for model in ("base", "tuned"))
        assert change["iou"] == pytest.approx(after - before)
        low, high = change["ci95"]
        assert low <= change["iou"] <= high
        assert evaluation["num_images"] == 4
        assert change["verdict"] == "too few images"
        assert "too few images" in out
    for figures in (evaluation, evaluation["other"]):
        assert 0 <= figures["tuned"]["instances"]["msa"] <= 1
        assert "instances" not in {**figures["base"], **figures["change"]}  # random weights
    assert evaluation["other"]["split"] == "all"
    assert evaluation["other"]["num_images"] == len(PreparedDataset(other).images)
    assert set(evaluation["other"]["change"]["strategy"]) == set(evaluation["change"]["strategy"])
    scores = json.loads((tmp_path / "instances.json").read_text())["tuned"]
    with (tmp_path / "instances.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(scores) == 4 * evaluation["num_instances"]
    for row, found in zip(rows, scores, strict=True):
        assert (row["image"], row["strategy"]) == (found["image"], found["strategy"])
        for value in ("iou", "dice", "boundary_iou", "predicted_iou"):
            assert float(row[f"tuned_{value}"]) == pytest.approx(found[value], abs=1e-6)
    html = (tmp_path / "report.html").read_text()
    assert html.count("data:image/jpeg;base64,") >= 8
    assert "<svg" in html
    outside = re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", html)
    assert not outside, "the report must need no other file"


@pytest.mark.slow
def test_evaluate_scores_a_model_of_no_run_alone(tuned_run, prepared, tmp_path, run_cli):
    """`tiny` as it ships, and a checkpoint folder copied out of its run."""
    copied = tmp_path / "copied"
    shutil.copytree(tuned_run / "base", copied)
    for name, checkpoint in (("tiny", "tiny"), ("copied", copied)):
        output = tmp_path / f"report_{name}"
        status, out, err = run_cli(
            "evaluate", "--data-dir", prepared, "--checkpoint", checkpoint, "--output-dir", output,
            "evaluate.noc_objects=0",
        )  # fmt: skip
        assert status == 0, err
        evaluation = json.loads((output / "evaluation.json").read_text())
        assert "tuned" not in evaluation
        assert "clicks_to_iou" not in evaluation["base"]
        assert f"mIoU of {checkpoint}" in out
        assert f"{evaluation['base']['iou']['strategy']['bbox']:.3f}" in out
        html = (output / "report.html").read_text()
        assert "Scores of tiny" in html
        assert "change" not in html


@pytest.mark.slow
def test_evaluate_and_promote_take_the_checkpoint_that_is_named(
    tuned_run, prepared, tmp_path, run_cli, monkeypatch
):
    """`best` and `latest` are made to differ, by a copy whose best epoch is the first."""
    run = tmp_path / "run"
    shutil.copytree(tuned_run, run, symlinks=True)
    state = state_of(run)
    latest = state["latest"]
    if state["best"] in (latest, "base"):
        weights = load_checkpoint(run / "base").weights
        progress = json.loads((run / latest / "progress.json").read_text()) | {"epoch": 1}
        config = load_config(run / "config.yaml")
        save_checkpoint(run / "checkpoints" / "epoch_0001", weights, config, progress)
        RunFolder(run).update(best="checkpoints/epoch_0001")
    best = state_of(run)["best"]
    assert best != latest
    for given, expected in (("", best), ("/latest", latest), (f"/{best}", best)):
        assert load_checkpoint(Path(f"{run}{given}")).path.samefile(run / expected)
    status, _, err = run_cli(
        "evaluate", "--data-dir", prepared, "--checkpoint", run / "latest", "--output-dir",
        tmp_path / "report", "evaluate.noc_objects=0",
    )  # fmt: skip
    assert status == 0, err
    evaluation = json.loads((tmp_path / "report/evaluation.json").read_text())
    assert evaluation["checkpoint"] == latest
    assert latest.endswith(f"{evaluation['epoch']:04d}")
    monkeypatch.chdir(tmp_path)
    status, _, err = run_cli(
        "promote", "run/latest", "--name", "nuts", "--store", "store", "--force"
    )
    assert status == 0, err
    stored = load_checkpoint(tmp_path / "store" / "nuts").weights
    for name, value in load_checkpoint(run / "latest").weights.items():
        assert torch.equal(stored[name], value)


@pytest.mark.slow
def test_ctrl_c_ends_a_training_and_its_status(tuned_run, first_run, prepared, tmp_path, run_cli):
    """Ctrl-C reaches all processes of the terminal. A second command meanwhile is refused."""
    run = tmp_path / "run"
    shutil.copytree(tuned_run, run, symlinks=True)
    words = ["--data-dir", prepared, "--output-dir", run, "--checkpoint", first_run, *FROZEN]
    assert state_of(run)["status"] == "finished"
    again = [*map(str, words), "--num-epochs", "500", "--resume"]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", *again], cwd=ROOT, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=restore_sigint,
        )  # fmt: skip
    try:
        check_interruption(process, again, run, log, run_cli)
    finally:
        process.kill()
    found = f"embeddings: 0 images to encode, {num_learned(prepared)} found"
    assert found in log.read_text(), "what an earlier run has encoded"


def restore_sigint():
    """Tests that run in the background of a shell inherit that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_interruption(process, again, run, log, run_cli):
    deadline = time.monotonic() + 240
    while "epoch 3/500" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert state_of(run)["status"] == "running"
    status, _, err = run_cli("train", *again)
    assert status == 2
    assert f"in use by process {process.pid} on {socket.gethostname()}" in err
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert log.read_text().endswith(
        "samray train: interrupted; the same command with --resume continues\n"
    )
    assert "Traceback" not in log.read_text()
    state = state_of(run)
    assert state["status"] == "interrupted"
    assert 3 <= len(state["epochs"]) < 500
    assert not (run / ".samray.lock").exists()


def test_predict_writes_mask_overlay_and_labelme_that_prepare_reads(
    tuned_run, photos, tmp_path, run_cli
):
    image = sorted((photos / "images").iterdir())[0]
    status, _, err = run_cli(
        "predict", "--checkpoint", tuned_run, "--image-path", image, "--point", 100, 80,
        "--negative-point", 5, 5, "--box", 20, 20, 200, 200, "--label", "stone",
        "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert status == 0, err
    document = json.loads((tmp_path / "out" / f"{image.stem}.json").read_text())
    assert (tmp_path / "out" / document["imagePath"]).resolve() == image.resolve()
    assert {shape["label"] for shape in document["shapes"]} <= {"stone"}
    assert (tmp_path / "out" / f"{image.stem}_mask.png").stat().st_size > 0
    assert (tmp_path / "out" / f"{image.stem}_overlay.png").stat().st_size > 0


def test_a_used_folder_needs_resume_and_a_finished_run_is_not_trained_again(
    tuned_run, first_run, prepared, run_cli
):
    again = ["train", "--data-dir", prepared, "--output-dir", tuned_run, "--checkpoint", first_run]
    status, _, err = run_cli(*again, "--num-epochs", 2, *FROZEN)
    assert status == 2
    assert "--resume" in err
    before = state_of(tuned_run)
    status, _, err = run_cli(*again, "--resume", *FROZEN)  # with its own number of epochs
    assert status == 0, err
    assert state_of(tuned_run)["epochs"] == before["epochs"]
    status, _, err = run_cli(*again, "--num-epochs", 2, "--resume", "--lr", 0.5, *FROZEN)
    assert status == 2
    assert "train.learning_rate (was 0.0003, now 0.5)" in err


def test_a_dry_run_says_what_a_run_needs_and_writes_nothing(prepared, tmp_path, run_cli):
    before = sorted(prepared.rglob("*"))
    words = ["train", "--data-dir", prepared, "--output-dir", tmp_path / "run", "--dry-run"]
    status, out, err = run_cli(*words, *SMALL, "model.adapt_blocks=2", "--num-epochs", 3)
    assert status == 0, err
    num_images = len(PreparedDataset(prepared).split("train"))
    assert f"an epoch of {num_images} images" in out
    assert re.search(r"mask_decoder +0\.7\d of 0\.7\d million parameters learn", out)
    assert re.search(r"cache +\d+\.\d MiB\nmemory +0\.\d\d GiB a worker, estimated", out)
    assert re.search(r"time +\d+\.\d\d s for the largest step on CPU: at most", out)
    assert sorted(prepared.rglob("*")) == before
    assert not (tmp_path / "run").exists()


def five_epochs(prepared, run, start, *more):
    """Words for a run with cached activations of two stages."""
    return [
        "--data-dir", prepared, "--output-dir", run, "--checkpoint", start, "--num-epochs", "5",
        *SMALL, "scaling.cpus_per_worker=1", "model.adapt_blocks=2", "train.instances=false", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(prepared, first_run, tmp_path_factory, run_cli):
    """Five epochs of one worker that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    status, _, err = run_cli("train", *five_epochs(prepared, run, first_run))
    assert status == 0, err
    return run


@pytest.mark.slow
def test_a_run_killed_and_resumed_equals_an_undisturbed_one(
    prepared, first_run, whole_run, tmp_path, run_cli
):
    """The same steps, losses and weights, bit for bit.

    What it started from has gone in the meantime, and a limit of memory has changed.
    """
    start, killed = tmp_path / "start", tmp_path / "killed"
    shutil.copytree(first_run, start)
    words = five_epochs(prepared, killed, start)
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.train", *map(str, words)], cwd=ROOT,
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            if (killed / "run.json").exists() and len(state_of(killed)["epochs"]) >= 2:
                break
            time.sleep(0.05)
        started = processes_below(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    wait_until_ended(started)
    done = len(state_of(killed)["epochs"])
    assert 2 <= done < 5, "the kill came too late to show anything"
    shutil.rmtree(start)
    status, _, err = run_cli("train", *words, "--resume", "train.max_prompts=100")
    assert status == 0, err
    one, two = state_of(whole_run), state_of(killed)
    assert two["epochs"][-1]["step"] == one["epochs"][-1]["step"]
    assert two["embeddings"]["encoded"] == 0, "the other run has encoded all images"
    assert len(two["starts"]) == 2
    steps = [read_events(run)[0]["step/loss"] for run in (whole_run, killed)]
    assert steps[0] == steps[1], "the curve of a resumed run is not doubled"
    for before, after in zip(one["epochs"], two["epochs"], strict=True):
        del before["seconds"], after["seconds"]
        assert after == before
    weights = [load_checkpoint(run / "latest").weights for run in (whole_run, killed)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@ray.remote
class Tenant:
    """Holds CPUs, as another user's actor."""

    def ready(self):
        return True


@pytest.mark.slow
def test_workers_that_join_and_die_change_no_result(
    prepared, first_run, whole_run, tmp_path, run_cli, monkeypatch
):
    """One worker; three, when another user leaves; one of them is killed."""
    monkeypatch.setattr(elastic, "LOOK_SECONDS", 0.0)
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    run = tmp_path / "run"
    tenant = Tenant.options(num_cpus=3).remote()
    ray.get(tenant.ready.remote())
    with ThreadPoolExecutor(max_workers=1) as pool:
        words = five_epochs(prepared, run, first_run, "--num-workers", "1..3")
        training = pool.submit(run_cli, "train", *words)
        wait_for_starts(run, 1, training)
        ray.kill(tenant)
        wait_for_starts(run, 2, training)
        workers = named(processes_below(os.getpid()), "ray::RayTrainWorker")
        assert len(workers) >= 3
        os.kill(max(workers), signal.SIGKILL)
        status, _, err = training.result()
    assert status == 0, err
    assert "samray: 3 workers instead of 1\n" in err
    assert re.search(r"samray: .*; the workers go on from epoch \d, step \d+\n", err)
    one, two = state_of(whole_run), state_of(run)
    # After the kill fewer may start at first, until Ray has missed the worker that died.
    assert [start["num_workers"] for start in two["starts"]][:2] == [1, 3]
    steps = [start["step"] for start in two["starts"]]
    assert len(steps) >= 3
    assert steps == sorted(steps)
    assert 0 < steps[1] <= steps[-1] < one["epochs"][-1]["step"]
    assert [epoch["step"] for epoch in two["epochs"]] == [epoch["step"] for epoch in one["epochs"]]
    for epoch, expected in zip(two["epochs"], one["epochs"], strict=True):
        assert epoch["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    curves = [read_events(folder)[0]["step/loss"] for folder in (whole_run, run)]
    assert curves[0] == curves[1]
    before, after = (load_checkpoint(folder / "latest").weights for folder in (whole_run, run))
    for name, value in before.items():
        # Softmax ignores what is added to all keys: such a bias learns from rounding errors alone.
        if not name.endswith("k_proj.bias"):
            assert float((value - after[name]).abs().max()) < 1e-4, name


def wait_for_starts(run, number, training):
    """Wait until the workers have started so many times."""
    deadline = time.monotonic() + 240
    while not (run / "run.json").exists() or len(state_of(run).get("starts", [])) < number:
        assert not training.done(), training.result()
        assert time.monotonic() < deadline
        time.sleep(0.05)
