"""Where files are read and written: checked paths, and outputs that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samray.errors import ConfigError, DatasetError

# Ray sets this in the driver of `ray job submit`, whose working directory is Ray's own copy.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def resolve(path: str, what: str) -> Path:
    """Return a folder or file that the user named, as an absolute path.

    Args:
        what: the option, for the message.

    Raises:
        ConfigError: it is no local path, or is relative inside a Ray job.
    """
    if "://" in path:
        raise ConfigError(f"{what}: {path} is not a local path; samray reads and writes folders")
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as exc:  # `~name` where nobody has that name
        raise ConfigError(f"{what}: {path} has no home folder to start at ({exc})") from exc
    if not expanded.is_absolute() and os.environ.get(JOB_VARIABLE):
        raise ConfigError(
            f"{what}: {path} is relative, and a Ray job runs in Ray's own copy of the folder, "
            "where outputs are lost; pass an absolute path that every node can reach"
        )
    return Path(os.path.abspath(expanded))


def require_folder(path: Path, what: str) -> Path:
    """Return the path if it is a folder, else raise ConfigError."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise ConfigError(f"{what}: {path} {state}; check the path")
    return path


def make_folder(path: Path, what: str) -> Path:
    """Create a folder and its parents, or raise ConfigError saying why not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"{what}: {path} cannot be created ({exc.strerror})") from exc
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what was written there appears at `path` on success."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all; NaN is refused, since no other reader knows it."""
    write_bytes(
        path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    )


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        DatasetError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as exc:
        raise DatasetError(f"{path}: cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise DatasetError(f"{path}: is damaged, not JSON ({exc})") from exc


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; it appears at `path` on success, replacing it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():  # an unfinished leftover of a killed run; registered ones are not redone
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Free disk space where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
