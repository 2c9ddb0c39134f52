"""The instance decoder in the training loop: what it costs the model, saving, resuming."""

import functools
import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from sam_parts import small_sam
from small_dataset import write_dataset

from samray.config import PromptConfig, load_config, resolve_model, save_config
from samray.errors import CheckpointError
from samray.geometry.images import decode_image
from samray.geometry.masks import crop_mask, encode_rle
from samray.instances.saved import instances_of, is_finished, load_instances, new_decoder
from samray.instances.segment import Way
from samray.runs import RunFolder
from samray.sam.checkpoint import Checkpoint, load_checkpoint, load_optimizer, save_checkpoint
from samray.sam.embeddings import EmbeddingCache, encode_image
from samray.sam.shipped import load_shipped
from samray.training import finetuning
from samray.training.batches import BatchLoader
from samray.training.finetuning import FineTuning, finish_instances, instance_labels
from samray.training.loop import INSTANCES, Worker, train_loop
from samray.training.train import finish_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def cache(dataset, tmp_path_factory):
    """Embeddings of all images by the shipped model."""
    sam = load_shipped().model()
    cache = EmbeddingCache(tmp_path_factory.mktemp("data") / "cache", sam)
    for record in dataset.images.values():
        image = decode_image(dataset.image_bytes(record))
        cache.save(record.digest, encode_image(sam, image).numpy())
    return cache


class StoppedError(Exception):
    """Raised in the middle of a run."""


def train(folder, dataset, cache, instances=True, stop_after=None, minutes=1e-9):
    """Train two epochs; if asked, die after an event and go on from the checkpoint.

    One is written after `minutes`, and where it is wanted from outside: after the second step.
    """
    words = ["model.adapt=none", "train.num_epochs=2", f"train.instances={instances}"]
    words += ["train.batch_size=1", f"train.checkpoint_minutes={minutes if stop_after else 'null'}"]
    wanted = threading.Event()
    config = resolve_model(load_config(overrides=words), weights_given=True)
    run = RunFolder.create(folder, config, "d")
    save_checkpoint(run.base, load_shipped().weights, config, {})

    def report(event):
        if tuple(event.get(key) for key in ("event", "epoch", "step")) == stop_after:
            raise StoppedError
        if (event["event"], event.get("step")) == ("step", 1):
            wanted.set()

    arguments = {
        "open_source": functools.partial(FineTuning, config, dataset, cache),
        "worker": Worker(0, 1, CPU),
        "labels": instance_labels(config, dataset),
        "wanted": wanted,
    }
    if stop_after is not None:
        with pytest.raises(StoppedError):
            train_loop(config, run, report=report, **arguments)
        assert not wanted.is_set()
        run = RunFolder(folder)
        assert (run.state["within"] is None) == (stop_after[0] == "epoch")
    train_loop(config, run, **arguments)
    return RunFolder(folder)


@pytest.fixture(scope="module")
def run(dataset, cache, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "run", dataset, cache)


def latest(run):
    checkpoint = load_checkpoint(run.latest)
    return checkpoint, load_instances(checkpoint, checkpoint.model())


def test_the_model_learns_the_same_weights_with_and_without(run, dataset, cache, tmp_path):
    without = train(tmp_path / "run", dataset, cache, instances=False)
    (one, found), (other, none) = latest(run), latest(without)
    assert all(torch.equal(one.weights[name], value) for name, value in other.weights.items())
    assert found.labels == ("disc", "square")
    assert none is None
    assert "val_msa" in run.state["epochs"][0]
    assert not {"val_msa", "loss_instances"} & without.state["epochs"][0].keys()


def test_the_decoder_learns_and_is_saved_beside_the_weights(run):
    first, second = (epoch["loss_instances"] for epoch in run.state["epochs"])
    assert second < first
    start = new_decoder(load_shipped().model(), 2, seed=0).state_dict()
    saved = latest(run)[1].decoder.state_dict()
    assert all(not torch.equal(start[name], value) for name, value in saved.items())


@pytest.mark.parametrize("place", ["after an epoch", "in the first", "in the second", "as wanted"])
def test_a_run_that_died_goes_on_exactly(place, run, dataset, cache, tmp_path):
    steps = len(dataset.split("train"))
    assert steps > 2
    stop_after = {
        "after an epoch": ("epoch", 1, steps),
        "in the first": ("step", 1, 2),
        "in the second": ("step", 2, 1),
        "as wanted": ("step", 1, 2),
    }
    minutes = 1e9 if place == "as wanted" else 1e-9
    resumed = train(tmp_path / "run", dataset, cache, True, stop_after[place], minutes)
    assert resumed.state["within"] is None
    names = {folder.name for folder in (resumed.path / "checkpoints").iterdir()}
    assert not [name for name in names if name.startswith("within")]
    (plain, whole), (other, again) = latest(run), latest(resumed)
    assert all(torch.equal(plain.weights[n], value) for n, value in other.weights.items())
    expected = whole.decoder.state_dict()
    assert all(torch.equal(expected[n], value) for n, value in again.decoder.state_dict().items())
    assert [e["loss_instances"] for e in run.state["epochs"]] == [
        e["loss_instances"] for e in resumed.state["epochs"]
    ]


def config_of(run):
    return resolve_model(load_config(run.path / "config.yaml"), weights_given=True)


def test_the_best_decoder_is_finished_on_its_encoder_and_its_way_chosen(run, dataset, cache):
    run.update(best=run.state["latest"])
    before = latest(run)[1].decoder.state_dict()
    finish_instances(config_of(run), run, dataset, cache, CPU)
    description = json.loads((run.latest / "instances.json").read_text())
    assert "watershed" in description["val_msa"]
    best = max(description["val_msa"].values())
    assert description["val_msa"][description["way"]["kind"]] == best
    finished = latest(run)[1]
    assert finished.way == Way(**description["way"])
    after = finished.decoder.state_dict()
    assert all(not torch.equal(before[name], value) for name, value in after.items())


def test_an_interrupted_finish_is_repeated_and_a_whole_one_is_not(
    run, dataset, cache, tmp_path, monkeypatch
):
    """Interrupted between its two files: the weights are written last.

    The repetition, which may keep no embedding, learns the same weights.
    """
    embedded: list[str] = []

    def count(*arguments):
        embedded.append(arguments[-1].name)
        return embed(*arguments)

    embed = finetuning._embedding
    monkeypatch.setattr(finetuning, "_embedding", count)
    shutil.copytree(run.path, tmp_path / "run", symlinks=True)
    copy = RunFolder(tmp_path / "run")
    copy.update(best=copy.state["latest"])
    description, weights = copy.latest / "instances.json", copy.latest / "instances.pth"
    unfinished = json.loads(description.read_text())
    unfinished.pop("finished", None)  # another test may have finished it
    description.write_text(json.dumps(unfinished))
    torch.save(new_decoder(load_shipped().model(), 2, seed=0).state_dict(), weights)
    before = weights.read_bytes()
    begun: list[bytes] = []
    arguments = config_of(copy), copy, dataset, cache, CPU
    finish_instances(*arguments, lambda: begun.append(weights.read_bytes()))
    whole = weights.read_bytes()
    finish_instances(*arguments, lambda: begun.append(weights.read_bytes()))
    assert weights.read_bytes() == whole
    assert len(embedded) == len(set(embedded)) > 0
    monkeypatch.setattr(finetuning, "KEPT_BYTES", 0)
    weights.write_bytes(before)
    finish_instances(*arguments, lambda: begun.append(weights.read_bytes()))
    assert weights.read_bytes() == whole != before
    assert begun == [before, before]


def test_a_run_that_was_stopped_is_finished_from_its_folder(run, dataset, cache, tmp_path):
    """As the best trial of a sweep, which the scheduler may stop after any epoch."""
    shutil.copytree(run.path, tmp_path / "run", symlinks=True)
    copy = RunFolder(tmp_path / "run")
    copy.update(best=copy.state["latest"])
    description = json.loads((copy.latest / "instances.json").read_text())
    description.pop("finished", None)
    (copy.latest / "instances.json").write_text(json.dumps(description))
    settings = {"embeddings.cache_dir": str(cache.folder.parent)}
    save_config(load_config(copy.path / "config.yaml", options=settings), copy.path / "config.yaml")
    finish_run(copy.path, dataset.folder, CPU, threads=1, full_precision=True)
    assert is_finished(copy.latest, latest(copy)[1])


def test_a_run_that_is_prolonged_goes_on_from_what_it_trained(run, dataset, cache, tmp_path):
    """Not from the finished decoder, which is beside the weights where the best is the latest."""
    decoders = []
    for name in ("finished", "not"):
        shutil.copytree(run.path, tmp_path / name, symlinks=True)
        copy = RunFolder(tmp_path / name)
        copy.update(best=copy.state["latest"])
        if name == "finished":
            finish_instances(config_of(copy), copy, dataset, cache, CPU)
        else:  # another test may have finished it
            trained, _ = load_optimizer(copy.latest)
            weights = {k.removeprefix(INSTANCES): v for k, v in trained.items() if INSTANCES in k}
            torch.save(weights, copy.latest / "instances.pth")
        config = config_of(copy)
        config = config.model_copy(
            update={"train": config.train.model_copy(update={"num_epochs": 3})}
        )
        source = functools.partial(FineTuning, config, dataset, cache)
        labels = instance_labels(config, dataset)
        train_loop(config, copy, source, Worker(0, 1, CPU), labels=labels)
        decoders.append(latest(RunFolder(copy.path))[1].decoder.state_dict())
    for name, value in decoders[0].items():
        assert torch.equal(value, decoders[1][name]), name


def test_an_ignored_region_counts_in_no_loss_however_the_image_is_turned(dataset):
    """Left out in the targets of the instance decoder, turned with the image; prompts are as ever.

    A corner of 48 x 64 pixels is ignored: 24 x 32 of them in one quarter of the frame.
    """
    region = np.zeros((48, 64), bool)
    region[:24, 32:] = True
    (record,) = dataset.split("val")
    for instance in record.instances:
        region &= ~record.decode(instance)
    marked = replace(record, ignored=encode_rle(crop_mask(region), (48, 64)))
    arguments = PromptConfig(), 0, None, 64, 16, True, None, None, ("disc", "square")
    plain, ignoring = (BatchLoader(dataset, [one], *arguments) for one in (record, marked))
    shown = set()
    for epoch in range(6):
        (with_all,), (without) = plain.load([0], 0, 1, epoch), ignoring.load([0], 0, 1, epoch)
        before, after = with_all.scene.maps, without[0].scene.maps
        unknown = (before.known - after.known)[0]
        cells = (128 // 2 / 64) ** 2  # of the grid, a pixel of the image
        assert unknown.sum() == pytest.approx(region.sum() * cells, rel=0.05)
        assert not (unknown * after.foreground[0]).any()
        assert torch.equal(before.foreground, after.foreground)
        rows, columns = torch.nonzero(unknown, as_tuple=True)
        shown.add((round(float(rows.float().mean())), round(float(columns.float().mean()))))
        for one, other in zip(with_all.targets, without[0].targets, strict=True):
            assert torch.equal(one, other)
    assert len(shown) > 2


def test_a_base_that_is_the_best_has_no_decoder_and_needs_no_choice(run, dataset, cache):
    run.update(best="base")
    begun: list[bool] = []
    finish_instances(config_of(run), run, dataset, cache, CPU, lambda: begun.append(True))
    assert not begun
    checkpoint = load_checkpoint(run.path)
    assert load_instances(checkpoint, checkpoint.model()) is None
    assert instances_of(checkpoint, checkpoint.model()).labels == ("object",)  # the shipped one
    other = small_sam()
    assert instances_of(Checkpoint(run.base, "tiny", other.state_dict(), {}), other) is None
    run.update(best=run.state["latest"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d | {"encoder_digest": "0" * 64}, "belongs to the image encoder 000000000000"),
        (lambda d: d | {"format": 9}, "has format 9"),
        (lambda d: {key: d[key] for key in ("format", "labels")}, "'way'"),
        (lambda d: d | {"labels": ["one"]}, "instances.pth: cannot be read"),
        (lambda d: d | {"way": {"kind": "magic"}}, "'magic'"),
        (lambda d: d | {"way": d["way"] | {"boundary": "high"}}, "boundary must be a number"),
        (lambda d: d | {"way": d["way"] | {"cells": 3}}, "cells"),
        (lambda d: d | {"labels": [1, 2]}, "must be texts"),
        (lambda d: d | {"labels": None}, "TypeError"),
        (lambda d: d | {"encoder_digest": 7}, "belongs to the image encoder 7"),
        (lambda d: [d], "TypeError"),
    ],
)
def test_a_decoder_that_does_not_fit_is_an_error_that_says_what_to_do(
    run, damage, message, tmp_path
):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in run.latest.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    description = json.loads((folder / "instances.json").read_text())
    (folder / "instances.json").write_text(json.dumps(damage(description)))
    checkpoint = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        load_instances(checkpoint, checkpoint.model())


def test_weights_of_the_decoder_may_not_be_missing(run, tmp_path):
    for name in ("weights.pth", "config.yaml", "progress.json", "instances.json"):
        (tmp_path / name).write_bytes((run.latest / name).read_bytes())
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"instances.pth: does not exist"):
        load_instances(checkpoint, checkpoint.model())
