"""The store of models: complete versions and the current one, on disk and in S3."""

import threading
from pathlib import Path

import pytest
import torch

from samray.config import load_config
from samray.errors import SamrayError, StoreError
from samray.sam.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from samray.sam.model import build_model
from samray.sam.store import ModelStore, require_store
from samray.sam.weights import load_state_dict
from samray.storage import resolve, write_bytes

NUM_THREADS, NUM_EACH = 4, 6


def checkpoint_in(folder, seed=0):
    weights = build_model("tiny", seed).state_dict()
    save_checkpoint(
        folder, weights, load_config(), {"epoch": 3}, ({}, {"state": {}, "param_groups": []})
    )
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


def test_what_is_no_model_does_not_hide_the_models(store, checkpoint):
    """What file systems, desktops and killed promotions leave in a store."""
    store.add("nuts", checkpoint, record())
    killed = store.add("figs", checkpoint, record())
    (store.folder / "figs" / "current").unlink()
    strays = [
        *("lost+found/.keep", ".DS_Store", ".samray-0a1b", "notes.txt", "empty/.keep"),
        *("nuts/.DS_Store", "nuts/readme.md", "nuts/old/promotion.json", "ä b/current"),
        "nuts/lost+found/promotion.json",
    ]
    for stray in strays:
        if isinstance(store.folder, Path):
            (store.folder / stray).parent.mkdir(exist_ok=True)
        write_bytes(store.folder / stray, b"x\n")
    assert store.names() == ["nuts"]
    assert store.current("nuts") == store.versions("nuts")[0]
    assert len(store.versions("nuts")) == 1
    assert store.current("figs") is None
    assert store.current("notes.txt") is None
    with pytest.raises(StoreError, match=r"figs has no current version.*--rollback --version V"):
        store.require_current("figs")
    with pytest.raises(StoreError, match="no model 'fig'; it has nuts"):
        store.require_current("fig")
    assert store.roll_back("figs", killed.version) == killed
    assert store.names() == ["figs", "nuts"]


def test_a_folder_that_may_not_be_read_does_not_hide_the_models(tmp_path, checkpoint, monkeypatch):
    """As `lost+found` of a disk; root may read everything, so the refusal is simulated."""
    store = ModelStore(tmp_path)
    store.add("nuts", checkpoint, record())
    (tmp_path / "private").mkdir()
    is_file = Path.is_file

    def refused(path):
        if "private" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    assert store.names() == ["nuts"]


def test_the_current_version_is_read_from_two_files(tmp_path, checkpoint, monkeypatch):
    store = ModelStore(tmp_path)
    first = store.add("nuts", checkpoint, record())
    second = store.add("nuts", checkpoint, record(first.version))
    (first.folder / "promotion.json").write_text("damaged")
    read = []
    read_path = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_path(path))
    assert store.current("nuts") == second
    assert read == [tmp_path / "nuts" / "current", second.folder / "promotion.json"]
    assert store.names() == ["nuts"]
    assert len(read) == 2


@pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\xff\xfe", b"../../etc"])
def test_a_damaged_current_says_how_to_repair_it(tmp_path, checkpoint, content):
    store = ModelStore(tmp_path)
    version = store.add("nuts", checkpoint, record())
    (tmp_path / "nuts" / "current").write_bytes(content)
    with pytest.raises(StoreError, match=r"current: .*--rollback --version V` sets another"):
        store.current("nuts")
    assert store.roll_back("nuts", version.version) == version


def test_a_damaged_model_does_not_hide_the_others_in_the_list(tmp_path, checkpoint, run_cli):
    store = ModelStore(tmp_path)
    scores = {model: {"miou": 0.5} for model in ("base", "tuned")}
    for name in ("figs", "nuts"):
        version = store.add(name, checkpoint, {**record(), "metrics": scores})
    (tmp_path / "figs" / "current").write_text("gone\n")
    status, out, err = run_cli("models", "--store", tmp_path)
    assert status == 0, err
    assert "figs/current: names version 'gone', which does not exist" in out
    assert f"* {version.version}  tiny" in out


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
