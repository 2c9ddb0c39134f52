"""One damaged model of a store keeps no other from being served."""

import pytest

from samray.config import ServeConfig, load_config
from samray.errors import StoreError
from samray.sam.checkpoint import load_checkpoint, save_checkpoint
from samray.sam.shipped import load_shipped
from samray.sam.store import ModelStore
from samray.serving.catalogue import read_catalogue


@pytest.fixture
def store(tmp_path):
    shipped = load_shipped()
    progress = {"epoch": 1, "base": shipped.progress["base"]}
    save_checkpoint(tmp_path / "checkpoint", shipped.weights, load_config(), progress)
    store = ModelStore(tmp_path / "models")
    for name in ("figs", "nuts"):
        record = {"previous": None, "metrics": {}, "guard": {}}
        store.add(name, load_checkpoint(tmp_path / "checkpoint"), record)
    (store.folder / "figs" / "current").write_text("no such version\n")
    (store.folder / "lost+found").mkdir()
    (store.folder / ".DS_Store").write_bytes(b"x")
    return store


def test_a_damaged_model_does_not_hide_the_others_and_is_logged_once(store, caplog):
    settings = ServeConfig(store=str(store.folder))
    for _ in range(3):
        assert list(read_catalogue(settings, {})) == ["nuts"]
    (line,) = caplog.messages
    assert line.startswith("figs cannot be read (not served): ")


def test_a_model_that_is_damaged_later_stays_as_it_was_read(store, caplog):
    """Also as the default one: no other answers for it."""
    (name,) = (path.name for path in (store.folder / "figs").iterdir() if path.is_dir())
    (store.folder / "figs" / "current").write_text(f"{name}\n")
    settings = ServeConfig(store=str(store.folder))
    known = read_catalogue(settings, {})
    assert list(known) == ["figs", "nuts"]
    (store.folder / "figs" / "current").write_text("no such version\n")
    again = read_catalogue(settings, known)
    assert list(again.items()) == list(known.items())
    (line,) = caplog.messages
    assert line.startswith("figs cannot be read (the one before stays): ")


def test_a_version_is_read_once_and_a_new_one_is_noticed(store):
    """The record may go, as the poll of a store reads `current` alone."""
    settings = ServeConfig(store=str(store.folder), model="nuts")
    known = read_catalogue(settings, {})
    version = store.current("nuts")
    record = version.folder / "promotion.json"
    content = record.read_bytes()
    record.unlink()
    assert read_catalogue(settings, known) == known
    record.write_bytes(content)
    again = store.add("nuts", load_checkpoint(version.folder), version.record)
    assert read_catalogue(settings, known)["nuts"].version == again.version


def test_a_damaged_model_that_is_asked_for_is_an_error(store):
    with pytest.raises(StoreError, match="current"):
        read_catalogue(ServeConfig(store=str(store.folder), model="figs"), {})
