"""A store of models: the versions of each, and which one is served.

    STORE/NAME/<version>/weights.pth, config.yaml, progress.json    a checkpoint folder
    STORE/NAME/<version>/promotion.json                             its origin; written last
    STORE/NAME/current                                              one line: the version in use

A version exists once its promotion.json does, and is never changed. `current` is replaced
atomically: of two concurrent promotions one becomes current, and both are in the store.
"""

import contextlib
import datetime
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from samray.errors import AnnotationError, DatasetError, StoreError
from samray.storage import (
    CURRENT,
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

if TYPE_CHECKING:
    from samray.sam.checkpoint import Checkpoint

RECORD = "promotion.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"\w[\w.-]*")
_REPAIR = "`samray promote --rollback --version V` sets another"
_FILES = ("weights.pth", "config.yaml", "progress.json")
_MORE = ("instances.pth", "instances.json")  # of a checkpoint with an instance decoder


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
        """Return the names of models that have a current version.

        Everything else in the folder is skipped: hidden files, `lost+found`, a model whose first
        promotion did not end.
        """
        return [name for name in list_folder(self.folder) if self._is_promoted(name)]

    def versions(self, name: str) -> list[Version]:
        """Return a model's versions, oldest first; empty if there is no such model."""
        found = []
        for version in _list(self.folder / require_name(name)):
            with contextlib.suppress(DatasetError):  # a damaged record does not hide the others
                found.append(self._version(name, version))
        return [version for version in found if version is not None]

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
            StoreError: `current` names a version that does not exist, or cannot be read.
        """
        version = self.current_version(name)
        if version is None:
            return None
        try:
            found = self._version(name, version)
        except DatasetError as exc:
            raise StoreError(f"{exc}; {_REPAIR}") from exc
        if found is None:
            raise StoreError(
                f"{self.folder / name / CURRENT}: names version {version!r}, which does not exist; "
                f"{_REPAIR}"
            )
        return found

    def current_version(self, name: str) -> str | None:
        """Return the name of the version in use, existing or not; reads `current` alone."""
        file = self.folder / require_name(name) / CURRENT
        try:
            return read_bytes(file, 1000).decode("ascii", "replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except AnnotationError as exc:  # it is too long
            raise StoreError(f"{file}: {exc}; {_REPAIR}") from exc

    def require_current(self, name: str) -> Version:
        """Return the version in use.

        Raises:
            StoreError: there is no such model, or it has versions and none is current.
        """
        current = self.current(name)
        if current is None:
            versions = [version.version for version in self.require_versions(name)]
            raise StoreError(
                f"--name: {self.folder / name} has no current version, e.g. because its promotion "
                f"was interrupted; choose one with `samray promote --rollback --version V`: "
                f"{', '.join(versions)}"
            )
        return current

    def add(self, name: str, checkpoint: "Checkpoint", record: dict[str, Any]) -> Version:
        """Copy a checkpoint folder into the store as a new version, and make it current.

        Args:
            record: content of promotion.json besides name, version, time and digest.
        """
        from samray.sam.weights import digest_of  # with torch, which reading a store does not need

        digest = digest_of(checkpoint.weights)
        now = datetime.datetime.now(datetime.UTC)
        version = f"{now:%Y%m%d-%H%M%S}-{digest[:8]}-{uuid.uuid4().hex[:4]}"
        folder = self.folder / require_name(name) / version
        with plain_errors(str(folder)):
            folder.parent.mkdir(parents=True, exist_ok=True)
        more = [file for file in _MORE if (checkpoint.path / file).exists()]
        copy_folder(checkpoint.path, folder, names=[*_FILES, *more])
        record = {
            "name": name,
            "version": version,
            "promoted_at": now.isoformat(timespec="seconds"),
            "model_type": checkpoint.model_type,
            "checkpoint_digest": digest,
            **record,
        }
        write_json(folder / RECORD, record, sync=True)
        self.set_current(name, version)
        return Version(name, version, folder, record)

    def set_current(self, name: str, version: str) -> None:
        """Make a version the one in use."""
        current = self.folder / require_name(name) / CURRENT
        write_bytes(current, f"{version}\n".encode(), sync=True)

    def roll_back(self, name: str, to: str | None = None) -> Version:
        """Make an earlier version current: the given one, else the previous one.

        Raises:
            StoreError: there is no such version.
        """
        versions = {version.version: version for version in self.require_versions(name)}
        if to is None:
            to = self.require_current(name).record["previous"]
            if to is None:
                raise StoreError(f"{self.folder}: {name} has no version before the current one")
        if to not in versions:
            raise StoreError(
                f"{self.folder}: {name} has no version {to!r}; it has {', '.join(versions)}"
            )
        self.set_current(name, to)
        return versions[to]

    def _is_promoted(self, name: str) -> bool:
        if not _is_name(name):
            return False
        with plain_errors(str(self.folder)):
            try:
                return (self.folder / name / CURRENT).is_file()
            except PermissionError:  # such as lost+found
                return False

    def _version(self, name: str, version: str) -> Version | None:
        """The version of a name, or None if there is none or it is not complete."""
        if not _VERSION.fullmatch(version):
            return None
        folder = self.folder / name / version
        with plain_errors(str(folder)):
            try:
                if not (folder / RECORD).is_file():
                    return None
            except PermissionError:
                return None
        return Version(name, version, folder, read_json(folder / RECORD))


def _list(folder: Place) -> list[str]:
    """The names in a folder; none if it is a file or may not be read."""
    try:
        return list_folder(folder)
    except PermissionError:
        return []


def _is_name(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name != CURRENT


def require_name(name: str) -> str:
    """Return a model's name, or refuse one that could be another path.

    Raises:
        StoreError: the name has other characters than allowed, or too many.
    """
    if not _is_name(name):
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
