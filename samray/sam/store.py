"""A store of models: the versions of each, and which one is served.

    STORE/NAME/<version>/weights.pth, config.yaml, progress.json    a checkpoint folder
    STORE/NAME/<version>/promotion.json                             its origin; written last
    STORE/NAME/current                                              one line: the version in use

A version exists once its promotion.json does, and is never changed. `current` is replaced
atomically: of two concurrent promotions one becomes current, and both are in the store.
"""

import datetime
import re
import uuid
from dataclasses import dataclass
from typing import Any

from samray.errors import StoreError
from samray.sam.checkpoint import CURRENT, Checkpoint
from samray.sam.weights import digest_of
from samray.storage import (
    Place,
    copy_folder,
    list_folder,
    make_folder,
    plain_errors,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)

RECORD = "promotion.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FILES = ("weights.pth", "config.yaml", "progress.json")


@dataclass(frozen=True)
class Version:
    """One version of a model.

    Attributes:
        name, version: of the model, and of this version.
        folder: a checkpoint folder, for `load_checkpoint`.
        record: the content of promotion.json.
    """

    name: str
    version: str
    folder: Place
    record: dict[str, Any]


class ModelStore:
    """Models by name, each with its versions.

    Args:
        folder: on disk or in S3.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of models that have a version."""
        return [name for name in list_folder(self.folder) if self.versions(name)]

    def versions(self, name: str) -> list[Version]:
        """Return a model's versions, oldest first; empty if there is no such model."""
        folder = self.folder / require_name(name)
        found = []
        for version in list_folder(folder):
            with plain_errors(str(folder)):
                complete = (folder / version / RECORD).is_file()
            if complete:
                record = read_json(folder / version / RECORD)
                found.append(Version(name, version, folder / version, record))
        return found

    def require_versions(self, name: str) -> list[Version]:
        """Return a model's versions.

        Raises:
            StoreError: there is no such model.
        """
        found = self.versions(name)
        if not found:
            raise StoreError(
                f"--name: {self.folder} has no model {name!r}; it has "
                f"{', '.join(self.names()) or 'none yet'}"
            )
        return found

    def current(self, name: str) -> Version | None:
        """Return the version in use, or None before the first promotion.

        Raises:
            StoreError: `current` names a version that does not exist.
        """
        folder = self.folder / require_name(name)
        try:
            version = read_bytes(folder / CURRENT, 1000).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        for known in self.versions(name):
            if known.version == version:
                return known
        raise StoreError(
            f"{folder / CURRENT}: names version {version!r}, which does not exist; "
            "`samray promote --rollback --version V` sets another"
        )

    def add(self, name: str, checkpoint: Checkpoint, record: dict[str, Any]) -> Version:
        """Copy a checkpoint folder into the store as a new version, and make it current.

        Args:
            record: content of promotion.json besides name, version, time and digest.
        """
        digest = digest_of(checkpoint.weights)
        now = datetime.datetime.now(datetime.UTC)
        version = f"{now:%Y%m%d-%H%M%S}-{digest[:8]}-{uuid.uuid4().hex[:4]}"
        folder = self.folder / require_name(name) / version
        with plain_errors(str(folder)):
            folder.parent.mkdir(parents=True, exist_ok=True)
        copy_folder(checkpoint.path, folder, names=_FILES)
        record = {
            "name": name,
            "version": version,
            "promoted_at": now.isoformat(timespec="seconds"),
            "model_type": checkpoint.model_type,
            "checkpoint_digest": digest,
            **record,
        }
        write_json(folder / RECORD, record)
        self.set_current(name, version)
        return Version(name, version, folder, record)

    def set_current(self, name: str, version: str) -> None:
        """Make a version the one in use."""
        write_bytes(self.folder / require_name(name) / CURRENT, f"{version}\n".encode())

    def roll_back(self, name: str, to: str | None = None) -> Version:
        """Make an earlier version current: the given one, else the previous one.

        Raises:
            StoreError: there is no such version.
        """
        versions = {version.version: version for version in self.require_versions(name)}
        if to is None:
            current = self.current(name)
            to = current.record["previous"] if current else None
            if to is None:
                raise StoreError(f"{self.folder}: {name} has no version before the current one")
        if to not in versions:
            raise StoreError(
                f"{self.folder}: {name} has no version {to!r}; it has {', '.join(versions)}"
            )
        self.set_current(name, to)
        return versions[to]


def require_name(name: str) -> str:
    """Return a model's name, or refuse one that could be another path.

    Raises:
        StoreError: the name has other characters than allowed, or too many.
    """
    if not _NAME.fullmatch(name) or name == CURRENT:
        raise StoreError(
            f"--name: {name!r} must be up to 64 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    return name


def require_store(path: Place) -> ModelStore:
    """Return the store in a folder, which is created if necessary and must be writable.

    Raises:
        SamrayError: it is not.
    """
    make_folder(path, "--store")
    token = path / f".samray-{uuid.uuid4().hex}"
    write_bytes(token, b"writable?")
    with plain_errors(str(path)):
        token.unlink()
    return ModelStore(path)
