"""Pre-training: no scene is repeated, a seed repeats its steps, and resuming is bit-equal."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from samray.cli import main
from samray.config import load_config, resolve_model
from samray.errors import ConfigError
from samray.runs import RunFolder
from samray.sam.checkpoint import load_checkpoint
from samray.sam.model import build_model
from samray.storage import LOCK
from samray.training.pretraining import DrawnScenes, pretrain

SETTINGS = [
    "model.checkpoint=none", "prompts.num_clicks=1", "train.batch_size=2", "train.warmup_steps=1",
    "pretrain.scenes_per_epoch=6", "pretrain.regions_per_scene=2", "pretrain.val_scenes=2",
    "scaling.cpus_per_worker=1", "scaling.device=cpu",
]  # fmt: skip


def config_of(run, *words):
    return load_config(None, [*SETTINGS, f"train.output_dir={run}", *words])


@pytest.fixture(scope="module")
def source():
    return DrawnScenes(resolve_model(config_of("unused"), False), build_model("tiny"))


def test_every_scene_is_drawn_once(source):
    steps = [step for epoch in range(3) for step in source.steps(epoch)]
    scenes = [scene for step in steps for scene in step]
    assert sorted(scenes) == list(range(18))
    assert {len(step) for step in steps} == {2}


def test_a_step_is_reproducible_and_another_step_differs(source):
    (one,), count = source.load([4, 5], 0, 1, epoch=0)
    (two,), again = source.load([4, 5], 0, 1, epoch=0)
    assert count == again == len(one) >= 2
    assert torch.equal(one.images, two.images)
    for a, b in zip(one.targets, two.targets, strict=True):
        assert torch.equal(a, b)
    assert one.corrections == two.corrections
    (other,), _ = source.load([6, 7], 0, 1, epoch=0)
    assert not torch.equal(one.images, other.images)


def test_points_lie_in_their_region_and_boxes_around_it(source):
    seen = set()
    for first in range(0, 16, 2):
        (batch,), _ = source.load([first, first + 1], 0, 1, epoch=0)
        for group, targets in zip(batch.groups, batch.targets, strict=True):
            assert float(targets.amax(dim=(1, 2, 3)).min()) > 0
            seen.add(group.point_coords is None)
            if group.point_coords is not None:
                x, y = (group.point_coords[:, 0] // 4).long().T
                assert (targets[torch.arange(len(group)), 0, y, x] > 0).all()
            else:
                rows = targets[:, 0].amax(dim=2) > 0
                # From first to last row, as an occluding object may split the region.
                last = rows.shape[1] - rows.flip(1).int().argmax(dim=1)
                height = (last - rows.int().argmax(dim=1)) * 4
                given = group.boxes[:, 3] - group.boxes[:, 1]
                assert ((given - height).abs() <= 0.7 * height + 8).all()
    assert seen == {True, False}, "points and boxes"


@pytest.mark.slow
def test_a_run_stopped_and_resumed_equals_an_undisturbed_one(tmp_path):
    whole = pretrain(config_of(tmp_path / "whole", "train.num_epochs=2"))
    assert whole["status"] == "finished"
    pieces = tmp_path / "pieces"
    limit = "pretrain.max_minutes=0.0001"  # one epoch always runs, a second would be too long
    first = pretrain(config_of(pieces, "train.num_epochs=2", limit))
    assert len(first["epochs"]) == 1
    assert first["status"] == "interrupted"
    with pytest.raises(ConfigError, match="--resume"):
        pretrain(config_of(pieces, "train.num_epochs=2"))
    second = pretrain(config_of(pieces, "train.num_epochs=2", "train.resume=true"))
    for one, two in zip(whole["epochs"], second["epochs"], strict=True):
        del one["seconds"], two["seconds"]
        assert one == two
    weights = [load_checkpoint(RunFolder(r).latest).weights for r in (tmp_path / "whole", pieces)]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


@pytest.fixture
def sigint():
    """SIGINT as in a foreground process; in the background of a shell it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_that_is_interrupted_says_so_and_is_resumed(tmp_path, monkeypatch, sigint):
    """Ctrl-C after the first epoch; meanwhile a second command is refused."""
    run, refused = tmp_path / "run", []

    def interrupt(bar, config, event):
        if event["event"] == "epoch" and not refused:
            assert json.loads((run / "run.json").read_text())["status"] == "running"
            with pytest.raises(ConfigError) as caught:
                pretrain(config_of(run, "train.num_epochs=2", "train.resume=true"))
            refused.append(str(caught.value))
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("samray.training.pretraining._show", interrupt)
    monkeypatch.chdir(tmp_path)
    words = [*SETTINGS, "--output-dir", "run", "--num-epochs", "2"]
    assert main(["pretrain", *words]) == 130
    assert f"{run} is in use by process {os.getpid()} on {socket.gethostname()}" in refused[0]
    assert RunFolder(run).state["status"] == "interrupted"
    assert not (run / LOCK).exists()
    assert main(["pretrain", *words, "--resume"]) == 0
    assert RunFolder(run).state["status"] == "finished"
    assert [epoch["epoch"] for epoch in RunFolder(run).state["epochs"]] == [1, 2]


def test_it_runs_where_ray_is_not_installed():
    code = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "from samray.cli import main\n"
        "import samray.training.pretraining\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "imported\n", done.stderr


def test_only_tiny_is_pretrained(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.type: only tiny"):
        pretrain(config_of(tmp_path / "run", "model.type=vit_b"))


def test_the_command_exports_weights_in_the_shipped_form(tmp_path, run_cli):
    from samray.sam.shipped import load_shipped

    run, out = tmp_path / "run", tmp_path / "out"
    words = ["pretrain", "--output-dir", run, "--num-epochs", 1, "--export", out, *SETTINGS]
    status, stdout, stderr = run_cli(*words)
    assert status == 0, stderr
    assert "exported" in stdout
    shipped, best = load_shipped(out), load_checkpoint(run)
    for name, value in best.weights.items():
        torch.testing.assert_close(shipped.weights[name], value, rtol=1e-3, atol=1e-4)
    history = json.loads((out / "tiny.json").read_text())["made_by"]
    assert history["scenes"] == 6
    assert history["seed"] == 0
    assert history["scores"]["val_iou"] == pytest.approx(best.progress["val_iou"], abs=1e-4)
