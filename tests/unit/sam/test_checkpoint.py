"""Checkpoints: the best and the latest, registration, and what a path names."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from sam_parts import add_noise, small_sam

from samray.config import load_config
from samray.errors import CheckpointError
from samray.runs import RunFolder
from samray.sam.checkpoint import (
    find_checkpoint,
    find_tuned,
    load_checkpoint,
    load_optimizer,
    refuse_ambiguous,
    save_checkpoint,
    stands_alone,
)
from samray.sam.model import build_model


@pytest.fixture(scope="module")
def tiny():
    return add_noise(build_model("tiny"))


@pytest.fixture
def run(tmp_path, tiny):
    """A run of three epochs; the second is the best."""
    run = RunFolder.create(tmp_path / "run", load_config(), dataset_digest="d1")
    for epoch, val_iou in enumerate((0.3, 0.6, 0.5), start=1):
        add_epoch(run, tiny, epoch, val_iou)
    return run


def add_epoch(run, sam, epoch, val_iou):
    name = f"epoch_{epoch:04d}"
    save_checkpoint(run.path / "checkpoints" / name, sam.state_dict(), load_config(), {"e": epoch})
    run.register(name, {"epoch": epoch, "val_iou": val_iou})


def test_consumers_take_the_best_and_only_best_and_latest_are_kept(run):
    assert run.state["best"] == "checkpoints/epoch_0002"
    assert run.state["latest"] == "checkpoints/epoch_0003"
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "epoch_0002",
        "epoch_0003",
    ]
    assert load_checkpoint(run.path).progress == {"e": 2}
    for name in ("best", "latest"):
        assert (run.path / name).resolve() == run.path / run.state[name]
        assert (run.path / name / "weights.pth").is_file()


def test_the_base_is_the_best_until_an_epoch_beats_it_without_losing_on_a_row(tmp_path, tiny):
    run = RunFolder.create(tmp_path / "run", load_config(), dataset_digest="d1")
    save_checkpoint(run.base, tiny.state_dict(), load_config(), {"e": 0})
    run.update(base_metrics={"val_iou": 0.5, "val_iou_random": 0.4, "val_iou_bbox": 0.6})
    for epoch, random, box, best in (
        (1, 0.3, 0.6, "base"),  # worse
        (2, 0.9, 0.58, "base"),  # better on the mean, and worse with a box
        (3, 0.5, 0.598, "checkpoints/epoch_0003"),  # within the tolerance
        (4, 0.45, 0.7, "checkpoints/epoch_0004"),
        (5, 0.9, 0.5, "checkpoints/epoch_0004"),
    ):
        name = f"epoch_{epoch:04d}"
        save_checkpoint(
            run.path / "checkpoints" / name, tiny.state_dict(), load_config(), {"e": epoch}
        )
        rows = {"val_iou_random": random, "val_iou_bbox": box}
        run.register(name, {"epoch": epoch, "val_iou": (random + box) / 2, **rows})
        assert run.state["best"] == best
        found = load_checkpoint(run.path)
        assert found.progress == {"e": 0 if best == "base" else int(best[-4:])}
        assert (run.path / "best" / "weights.pth").is_file()


@pytest.mark.parametrize(
    ("named", "epoch"),
    [
        ("", 2),
        ("best", 2),
        ("latest", 3),
        ("checkpoints/epoch_0003", 3),
        ("checkpoints/epoch_0002", 2),
        ("latest/weights.pth", 3),
        ("run.json", 2),
    ],
)
def test_the_checkpoint_that_a_path_names_is_the_one_that_is_compared(run, named, epoch):
    found, checkpoint = find_tuned(run.path / named)
    assert found.path == run.path
    assert checkpoint.progress == {"e": epoch}
    assert checkpoint.path.resolve() == run.path / "checkpoints" / f"epoch_{epoch:04d}"


def test_other_weights_that_lie_in_a_run_are_not_the_run(run):
    other = run.path / "other_vit_b.pth"
    other.write_bytes(b"")
    assert stands_alone(other)
    assert not stands_alone(run.path / "latest" / "weights.pth")
    with pytest.raises(CheckpointError, match=r"other_vit_b.pth: is a file of no run; pass a RUN"):
        find_tuned(other)


def test_a_name_with_a_meaning_is_refused_where_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuse_ambiguous("vit_b", "the published weights")
    (tmp_path / "vit_b").mkdir()
    with pytest.raises(CheckpointError, match=r"--checkpoint vit_b: means .*; give \./vit_b for"):
        refuse_ambiguous("vit_b", "the published weights")


def test_best_and_latest_are_found_without_links(run):
    """As in S3 and on file systems without links."""
    for name in ("best", "latest"):
        (run.path / name).unlink()
    assert load_checkpoint(run.path / "latest").progress == {"e": 3}
    assert find_tuned(run.path / "best")[1].progress == {"e": 2}


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (ValueError, "failed")],
)
def test_the_status_of_a_run_that_ends_early(run, tiny, error, status):
    def state():
        return json.loads((run.path / "run.json").read_text())

    def train():
        with run.running():
            assert state()["status"] == "running"
            add_epoch(RunFolder(run.path), tiny, 4, 0.1)  # as a worker
            raise error

    run.update(status="finished")
    with pytest.raises(error):
        train()
    assert state()["status"] == status
    assert state()["latest"] == "checkpoints/epoch_0004"
    with RunFolder(run.path).running():
        assert state()["status"] == "running"


def test_a_checkpoint_that_was_written_but_not_registered_is_ignored(run, tiny):
    save_checkpoint(run.path / "checkpoints" / "epoch_0004", tiny.state_dict(), load_config(), {})
    again = RunFolder(run.path)
    assert again.latest.name == "epoch_0003"
    add_epoch(again, tiny, 4, 0.9)  # a resumed run writes it anew
    assert load_checkpoint(run.path).progress == {"e": 4}


def test_weights_come_back_exactly(run, tiny):
    loaded = load_checkpoint(run.path / "latest").model().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.state_dict().items())


def test_the_optimizer_comes_back_exactly_from_one_file(tmp_path):
    sam = small_sam()
    optimizer = torch.optim.AdamW(sam.parameters(), lr=0.1)
    sum(p.sum() for p in sam.parameters()).backward()
    optimizer.step()
    state = optimizer.state_dict()
    trained = dict(sam.mask_decoder.named_parameters())
    save_checkpoint(tmp_path / "checkpoint", sam.state_dict(), load_config(), {}, (trained, state))
    files = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert files == {"weights.pth", "config.yaml", "progress.json", "optimizer.pth"}
    parameters, loaded = load_optimizer(tmp_path / "checkpoint")
    assert parameters.keys() == trained.keys()
    assert all(torch.equal(parameters[name], trained[name]) for name in trained)
    assert loaded["param_groups"] == state["param_groups"]
    assert loaded["state"].keys() == state["state"].keys()
    for number, values in state["state"].items():
        assert loaded["state"][number].keys() == values.keys()
        for name, value in values.items():
            assert torch.equal(loaded["state"][number][name], value)


def test_a_checkpoint_without_an_optimizer_says_how_to_train_on_from_it(run):
    """Runs of earlier development versions kept it in pieces, under other names."""
    with pytest.raises(
        CheckpointError, match=r"optimizer.pth: does not exist.*--checkpoint \S+_0003"
    ):
        load_optimizer(run.latest)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "foreign"])
def test_a_damaged_optimizer_says_how_to_train_on_without_it(damage, tmp_path):
    state = ({"a": torch.ones(99)}, {})
    save_checkpoint(tmp_path, small_sam().state_dict(), load_config(), {}, state)
    path = tmp_path / "optimizer.pth"
    size = path.stat().st_size
    contents = {"empty": b"", "cut": path.read_bytes()[:-500], "zeros": bytes(size)}
    path.write_bytes(contents.get(damage, b"text"))
    with pytest.raises(
        CheckpointError, match=r"optimizer.pth: is damaged, .*--checkpoint \S+ with another"
    ):
        load_optimizer(tmp_path)


def test_what_a_run_needs_to_go_on_is_on_the_disk_before_it_counts(run, tiny, monkeypatch):
    """Else a power failure could leave empty files under the names of whole ones."""
    events = []
    sync, replace = os.fsync, os.replace

    def synced(number):
        events.append(Path(f"/proc/self/fd/{number}").resolve().name.lstrip(".").split(".")[0])
        sync(number)

    def replaced(old, new):
        events.append(f"name {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    add_epoch(run, tiny, 4, 0.9)
    begin = events.index("name epoch_0004")
    assert {"weights", "config", "progress"} <= set(events[:begin])
    assert events[begin + 1 : begin + 3] == ["run", "name run.json"]


def test_a_run_without_an_epoch_says_so(tmp_path):
    RunFolder.create(tmp_path / "run", load_config(), "d1")
    with pytest.raises(CheckpointError, match="finished no epoch yet"):
        load_checkpoint(tmp_path / "run")


def test_a_folder_that_is_no_checkpoint_says_what_to_pass(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no config.yaml.*pass a RUN folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_damaged_run_json_is_a_clear_error(run):
    (run.path / "run.json").write_text('{"format": 1, ')
    with pytest.raises(CheckpointError, match=r"run.json: is damaged"):
        load_checkpoint(run.path)


def test_a_truncated_checkpoint_is_a_clear_error(run):
    weights = run.path / "checkpoints" / "epoch_0002" / "weights.pth"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"weights.pth.*truncated"):
        load_checkpoint(run.path)


def test_a_checkpoint_folder_is_usable_elsewhere(run, tmp_path):
    shutil.copytree(run.path / "best", tmp_path / "elsewhere")
    assert load_checkpoint(tmp_path / "elsewhere").model_type == "tiny"
    assert json.loads((tmp_path / "elsewhere" / "progress.json").read_text()) == {"e": 2}
