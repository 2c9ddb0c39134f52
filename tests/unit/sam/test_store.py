"""The store of models: complete versions and the current one, on disk and in S3."""

import threading

import pytest
import torch

from samray.config import load_config
from samray.errors import SamrayError, StoreError
from samray.sam.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from samray.sam.model import build_model
from samray.sam.store import ModelStore, require_store
from samray.sam.weights import load_state_dict
from samray.storage import resolve

NUM_THREADS, NUM_EACH = 4, 6


def checkpoint_in(folder, seed=0):
    weights = build_model("tiny", seed).state_dict()
    save_checkpoint(folder, weights, load_config(), {"epoch": 3}, {"state": {}, "param_groups": []})
    return load_checkpoint(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoint_in(tmp_path_factory.mktemp("store") / "epoch_0003")


@pytest.fixture(params=["disk", "s3"])
def store(request, tmp_path):
    folder = tmp_path if request.param == "disk" else request.getfixturevalue("bucket")
    return require_store(resolve(f"{folder}/models", "--store"))


def record(previous=None):
    return {"previous": previous, "guard": {"refused": [], "forced": False}, "metrics": {}}


def test_a_version_is_a_checkpoint_and_the_model_its_current_version(store, checkpoint):
    assert store.names() == []
    assert store.current("nuts") is None
    version = store.add("nuts", checkpoint, record())
    assert store.names() == ["nuts"]
    assert store.current("nuts") == version == store.versions("nuts")[0]
    assert version.record["checkpoint_digest"][:8] in version.version
    assert find_checkpoint(store.folder / "nuts") == version.folder
    loaded = load_checkpoint(store.folder / "nuts")
    assert loaded.progress == {"epoch": 3}
    assert not any(p.name.startswith("optimizer") for p in version.folder.iterdir())
    for name, value in checkpoint.weights.items():
        assert torch.equal(loaded.weights[name], value)
    assert load_state_dict(version.folder / "weights.pth").keys() == checkpoint.weights.keys()


def test_rolling_back_and_forth(store, checkpoint):
    first = store.add("nuts", checkpoint, record())
    second = store.add("nuts", checkpoint, record(first.version))
    third = store.add("nuts", checkpoint, record(second.version))
    assert store.roll_back("nuts").version == second.version
    assert store.roll_back("nuts").version == first.version
    with pytest.raises(StoreError, match="no version before"):
        store.roll_back("nuts")
    assert store.roll_back("nuts", third.version) == third
    assert store.current("nuts") == third
    with pytest.raises(StoreError, match="has no version 'gone'; it has"):
        store.roll_back("nuts", "gone")
    with pytest.raises(StoreError, match="no model 'fig'; it has nuts"):
        store.roll_back("fig")


def test_concurrent_promotions_lose_nothing(store, checkpoint):
    made, broken = [], []

    def promote():
        for _ in range(NUM_EACH):
            made.append(store.add("nuts", checkpoint, record()).version)

    def watch():
        while threads[0].is_alive():
            try:
                current = store.current("nuts")
                if current is not None:
                    load_state_dict(current.folder / "weights.pth")
            except SamrayError as exc:
                broken.append(exc)

    threads = [threading.Thread(target=promote) for _ in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    watch()
    for thread in threads:
        thread.join()
    assert not broken
    assert {v.version for v in store.versions("nuts")} == set(made)
    assert len(set(made)) == NUM_THREADS * NUM_EACH
    assert store.current("nuts").version in made


def test_an_incomplete_version_is_ignored(store, checkpoint):
    version = store.add("nuts", checkpoint, record())
    (version.folder / "promotion.json").unlink()
    assert store.versions("nuts") == []
    with pytest.raises(StoreError, match=r"names version .* which does not exist"):
        store.current("nuts")


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "current", "x" * 65, "a b", "ä"])
def test_names_that_are_paths_are_refused(tmp_path, name):
    with pytest.raises(StoreError, match="--name"):
        ModelStore(tmp_path).versions(name)


def test_a_current_version_that_is_a_path_is_refused(tmp_path, checkpoint):
    store = ModelStore(tmp_path)
    store.add("nuts", checkpoint, record())
    (tmp_path / "nuts" / "current").write_text("../../etc\n")
    with pytest.raises(StoreError, match="does not exist"):
        store.current("nuts")
    with pytest.raises(SamrayError, match="not the name of a version"):
        load_checkpoint(tmp_path / "nuts")


def test_a_store_that_is_not_writable_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SamrayError, match="--store"):
        require_store(tmp_path / "file")
