"""Files on disk or in S3: paths, reading, and writing outputs completely or not at all.

A `Place` is a local path or an S3 path (cloudpathlib's, which has pathlib's methods). Use these
methods to join, list and test paths; read and write content with the functions here, which send
one request per object. boto3 finds credentials and endpoint in the usual AWS ways.
"""

import contextlib
import csv
import datetime
import errno
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from cloudpathlib import S3Path
from cloudpathlib.exceptions import CloudPathException
from filelock import FileLock, Timeout
from urllib3.exceptions import HTTPError

from samray.errors import AnnotationError, ConfigError, DatasetError, StorageError

Place = Path | S3Path
# Bytes of a file's name that `whole_file` can write: of 255, its temporary file takes 14 more.
MAX_NAME = 241
FULL_DISK = 2**16  # free bytes, below which a failed write is due to that
LOCK = ".samray.lock"  # in an output folder: the process that writes to it
# What a killed process may leave: a lock, a probe of `cluster`, a temporary file of `whole_file`.
_LEFT = re.compile(r"\.(samray\.lock|samray-[0-9a-f]{32}|.+\.[0-9a-f]{8}\.tmp)")

# Ray sets this in the driver of `ray job submit`, whose working directory is Ray's own copy.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"

# boto3 reads these. Twelve attempts take about half a minute, enough for a server to restart.
os.environ.setdefault("AWS_RETRY_MODE", "standard")
os.environ.setdefault("AWS_MAX_ATTEMPTS", "12")
READ_TRIES = 5  # of a body whose connection breaks; boto3 does not retry that

_S3 = re.compile(r"s3://(?P<bucket>[^/@]+)(?P<key>/.*)?")
CURRENT = "current"  # in a store of models: the file that names the version in use


def resolve(path: str, what: str) -> Place:
    """Return a folder or file that the user named: an absolute local path, or one in S3.

    Args:
        what: the option, for the error message.

    Raises:
        ConfigError: it is neither, or it is relative inside a Ray job.
    """
    if "://" in path or path.lower().startswith("s3:"):
        match = _S3.fullmatch(path)
        if match is None:
            raise ConfigError(
                f"{what}: {path} is neither a local path nor s3://bucket/prefix, which holds no "
                "user or password"
            )
        key = posixpath.normpath(match["key"] or "/").lstrip("/")
        return S3Path(f"s3://{match['bucket']}/{key}".rstrip("/"))
    try:
        expanded = Path(path).expanduser()
    except RuntimeError as exc:  # `~name` of a user that does not exist
        raise ConfigError(f"{what}: {path} has no home folder ({exc})") from exc
    if not expanded.is_absolute() and os.environ.get(JOB_VARIABLE):
        raise ConfigError(
            f"{what}: {path} is relative, and a Ray job runs in Ray's own copy of the folder, "
            "where outputs are lost; pass an absolute path that every node can reach"
        )
    return Path(os.path.abspath(expanded))


def resolve_local(path: str, what: str) -> Path:
    """As `resolve`, for what must be on disk."""
    place = resolve(path, what)
    if not isinstance(place, Path):
        raise ConfigError(f"{what}: {path} must be a local folder here; copy from or to it")
    return place


def require_folder(path: Place, what: str) -> Place:
    """Return the path if it is a folder.

    Raises:
        ConfigError: it is a file, or does not exist.
        StorageError: the server does not answer, or refuses access.
    """
    with plain_errors(f"{what}: {path}"):
        if not path.is_dir():
            state = "is a file, not a folder" if path.exists() else "does not exist"
            raise ConfigError(f"{what}: {path} {state}; check the path")
    return path


def make_folder(path: Place, what: str) -> Place:
    """Create a folder and its parents (S3 has none) and return it.

    Raises:
        ConfigError: it cannot be created, or not written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"{what}: {path} cannot be created ({exc.strerror})") from exc
    if isinstance(path, Path) and not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{what}: {path} cannot be written; change its permissions, or choose another folder"
        )
    return path


def is_used(path: Place) -> bool:
    """Return whether the path is a file, or a folder with more than a killed process may leave."""
    with plain_errors(str(path)):
        if isinstance(path, Path) and path.is_dir():
            names = [entry.name for entry in path.iterdir()]
        elif isinstance(path, Path) or path.is_file():
            return path.exists()
        else:
            names = [name for name, _, _ in list_objects(path)]  # S3 has no empty folders
        return not all(_LEFT.fullmatch(name) for name in names)


@contextlib.contextmanager
def lock_folder(folder: Place, what: str) -> Iterator[None]:
    """Hold an output folder for this process, so that no second one writes to it.

    The folder is created, and removed again if it is still empty at the end. On disk the lock ends
    with the process, however it ends; between hosts it is as good as the file system's locks. In S3
    it is an object, which a killed process leaves behind; two processes that start in the same
    second may both get it.

    Args:
        what: the option, for the error message.

    Raises:
        ConfigError: another process, which the message names, holds the folder.
    """
    if not isinstance(folder, Path):
        with _lock_prefix(folder, what):
            yield
        return
    if folder.exists() and not folder.is_dir():
        yield  # the caller refuses it
        return
    make_folder(folder, what)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
        (folder / LOCK).write_text(json.dumps(_this_process()))
    except Timeout as exc:
        raise ConfigError(_in_use(folder, what, _owner(folder / LOCK))) from exc
    except NotImplementedError:  # a file system without locks
        pass
    except OSError as exc:
        raise ConfigError(f"{what}: {folder} cannot be written ({exc.strerror})") from exc
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()


@contextlib.contextmanager
def _lock_prefix(folder: S3Path, what: str) -> Iterator[None]:
    """`lock_folder` in S3."""
    lock = folder / LOCK
    owner, own = _owner(lock), _this_process()
    if owner is not None and not _has_ended(owner):
        raise ConfigError(
            f"{_in_use(folder, what, owner)}; if that process no longer runs, delete {lock}"
        )
    write_json(lock, own)
    try:
        yield
    finally:
        with plain_errors(str(lock)):
            lock.unlink(missing_ok=True)


def _this_process() -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _owner(lock: Place) -> dict[str, Any] | None:
    """The process that wrote a lock; None if there is none or it is not readable."""
    try:
        owner = json.loads(read_bytes(lock))
        return {key: owner[key] for key in ("host", "pid", "since")}
    except StorageError:
        raise
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _has_ended(owner: dict[str, Any]) -> bool:
    """Whether the process ran on this host and is gone; its number may be this process's now."""
    if owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return int(owner["pid"]) == os.getpid()


def _in_use(folder: Place, what: str, owner: dict[str, Any] | None) -> str:
    process = "another process"
    if owner is not None:
        process = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    return f"{what}: {folder} is in use by {process}; wait until it ends, or choose another folder"


def read_bytes(path: Place, max_bytes: int | None = None) -> bytes:
    """Return a file's content.

    Args:
        max_bytes: size limit, for a file from an untrusted source.

    Raises:
        AnnotationError: field `file`; it is larger than `max_bytes`.
        OSError: it does not exist or cannot be read.
    """
    if isinstance(path, Path):
        _require_small(path.stat().st_size if max_bytes else 0, max_bytes)
        return path.read_bytes()
    with plain_errors(str(path)):
        for attempt in range(1, READ_TRIES + 1):
            answer = path.client.client.get_object(Bucket=path.bucket, Key=path.key)
            _require_small(answer["ContentLength"], max_bytes)
            try:
                content: bytes = answer["Body"].read()
                return content
            except (HTTPClientError, IncompleteReadError):
                if attempt == READ_TRIES:
                    raise
                time.sleep(2**attempt / 4)
    raise AssertionError("the loop returns or raises")


def read_head(path: Place, num_bytes: int = 4096) -> bytes:
    """Return the first `num_bytes` bytes of a file."""
    if isinstance(path, Path):
        with path.open("rb") as file:
            return file.read(num_bytes)
    with plain_errors(str(path)):
        client, span = path.client.client, f"bytes=0-{num_bytes - 1}"
        try:
            answer = client.get_object(Bucket=path.bucket, Key=path.key, Range=span)
        except ClientError as exc:
            if _error_code(exc) == "InvalidRange":  # an empty object has no first byte
                return b""
            raise
        head: bytes = answer["Body"].read()
    return head


def _require_small(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise AnnotationError(
            "file", f"has {size / 2**20:.0f} MiB; at most {max_bytes // 2**20} are read"
        )


def local_copy(path: Place) -> Path:
    """Return a file for memory mapping and random access: itself, or a copy of the S3 object.

    Copies are kept in `$SAMRAY_CACHE/s3`, by name and version of the object, and shared by all
    processes of the machine and later runs.

    Raises:
        FileNotFoundError: it does not exist.
        StorageError: it cannot be read.
    """
    if isinstance(path, Path):
        return path
    with plain_errors(str(path)):
        client = path.client.client
        head = client.head_object(Bucket=path.bucket, Key=path.key)
        version = f"{client.meta.endpoint_url}\0{path}\0{head['ETag']}"
        copy = cache_folder() / "s3" / hashlib.sha256(version.encode()).hexdigest()[:32]
        copy = copy.with_suffix(path.suffix)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(copy) as temporary:
                client.download_file(path.bucket, path.key, str(temporary))
    return copy


def cache_folder() -> Path:
    """Return the folder of samray's caches: $SAMRAY_CACHE, else ~/.cache/samray."""
    cache = os.environ.get("SAMRAY_CACHE") or "~/.cache/samray"
    return Path(cache).expanduser().absolute()


def list_objects(folder: S3Path) -> Iterator[tuple[str, int, str]]:
    """Yield the objects below an S3 folder: relative key, size in bytes, ETag."""
    with plain_errors(str(folder)):
        prefix = f"{folder.key}/" if folder.key else ""
        pages = folder.client.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=folder.bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                yield entry["Key"][len(prefix) :], entry["Size"], entry["ETag"]


def list_folder(folder: Place) -> list[str]:
    """Return the sorted names in a folder; none if it does not exist."""
    with plain_errors(str(folder)):
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def file_sizes(folder: Place) -> dict[str, int]:
    """Return the size in bytes of each file in a folder, by name; none if it does not exist."""
    if isinstance(folder, S3Path):
        return {name: size for name, size, _ in list_objects(folder) if "/" not in name}
    return {path.name: path.stat().st_size for path in folder.glob("*") if path.is_file()}


@contextlib.contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Translate errors of boto3 into a StorageError that says what to do.

    Args:
        what: path or option that the message begins with.

    Raises:
        FileNotFoundError: there is no such object.
        StorageError: any other failure of S3.
    """
    try:
        yield
    except _S3_ERRORS as raised:
        exc: BaseException = raised
        if isinstance(exc, S3UploadFailedError) and exc.__context__ is not None:
            exc = exc.__context__  # the failed request, whose error code boto3 hides
        code = _error_code(exc)
        if code in _MISSING_OBJECT:
            raise FileNotFoundError(2, "No such file or directory", what) from exc
        raise StorageError(f"{what}: {_s3_reason(exc, code)}") from exc


_S3_ERRORS = (BotoCoreError, ClientError, Boto3Error, HTTPError, CloudPathException)
_UNREACHABLE = (
    *(BotoConnectionError, HTTPClientError, IncompleteReadError),
    *(RetriesExceededError, HTTPError),
)
# S3's error codes; a HEAD request has no body and gives the HTTP status instead.
_MISSING_OBJECT = ("NoSuchKey", "404")
_TIMED_OUT = ("RequestTimeout", "GatewayTimeout", "504")
_NO_PERMISSION = "these credentials have no permission for it; ask for read, write and list"
_REFUSED_CREDENTIALS = "the server refuses the AWS credentials ({code}); check or renew them"
_REASONS = {
    "NoSuchBucket": "there is no such bucket; create it or check the name",
    "AccessDenied": _NO_PERMISSION,
    "403": _NO_PERMISSION,
    "InvalidAccessKeyId": _REFUSED_CREDENTIALS,
    "SignatureDoesNotMatch": _REFUSED_CREDENTIALS,
    "ExpiredToken": _REFUSED_CREDENTIALS,
    "InvalidToken": _REFUSED_CREDENTIALS,
}


def _error_code(exc: BaseException) -> str:
    """The code in the server's answer, or the name of an exception that got no answer."""
    if isinstance(exc, ClientError):
        return str(exc.response.get("Error", {}).get("Code", "Unknown"))
    return type(exc).__name__


def _s3_reason(exc: BaseException, code: str) -> str:
    """What went wrong with S3, and what to do about it."""
    if code in _REASONS:
        return _REASONS[code].format(code=code)
    if isinstance(exc, NoCredentialsError):
        return (
            "found no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE"
        )
    message = " ".join(str(exc).split())[:200]
    if isinstance(exc, _UNREACHABLE) or code in _TIMED_OUT:
        tries = os.environ["AWS_MAX_ATTEMPTS"]
        return (
            f"the S3 server cannot be reached, tried {tries} times ({message}); "
            "check AWS_ENDPOINT_URL and the network, then run the same command again"
        )
    return f"S3 answered {code} ({message})"


@contextlib.contextmanager
def whole_file(path: Place, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary local path; on success the file written there appears at `path`.

    Args:
        sync: wait until the disk has the content. Without it a power failure can leave the name
            with an empty or cut file, which only files that can be made again may risk.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="samray-") as folder:
            local = Path(folder, path.name)
            yield local
            _upload(local, path)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _plain_full_disk(path):
            yield temporary
            if sync:
                _sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _plain_full_disk(path: Path) -> Iterator[None]:
    """Translate the errors of a full disk, of which torch's says nothing of it."""
    try:
        yield
    except (OSError, RuntimeError) as exc:
        full = getattr(exc, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and shutil.disk_usage(path.parent).free > FULL_DISK:
            raise
        raise StorageError(
            f"{path}: the disk or your share of it is full; free some space and give the same "
            "command again, to `samray train` with --resume"
        ) from exc


def _upload(local: Path, path: S3Path) -> None:
    with plain_errors(str(path)):  # a large file goes in parts and appears with the last one
        path.client.client.upload_file(str(local), path.bucket, path.key)


def write_bytes(path: Place, content: bytes, sync: bool = False) -> None:
    """Write a file completely or not at all; see `whole_file` for `sync`."""
    if not isinstance(path, Path):
        with plain_errors(str(path)):
            path.client.client.put_object(Bucket=path.bucket, Key=path.key, Body=content)
        return
    with whole_file(path, sync) as temporary:
        temporary.write_bytes(content)


def write_json(path: Place, content: Any, sync: bool = False) -> None:
    """Write JSON completely or not at all; NaN is rejected, as it is not valid JSON.

    Half of a surrogate pair, as in file names that are no UTF-8, becomes an escape of JSON.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode(errors="backslashreplace") + b"\n", sync)


def write_csv(path: Place, rows: Iterable[Iterable[Any]]) -> None:
    """Write `csv_bytes` completely or not at all."""
    write_bytes(path, csv_bytes(rows))


def csv_bytes(rows: Iterable[Iterable[Any]]) -> bytes:
    """Return rows as a CSV file in UTF-8.

    Spreadsheets run a cell that begins as a formula, and names and labels come from anyone. Such
    text gets an apostrophe in front, as OWASP advises ("CSV Injection"); numbers are left alone.
    Line breaks in text are written as \\n: csv leaves a carriage return without quotes.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[_harmless(cell) for cell in row] for row in rows])
    return text.getvalue().encode()


def _harmless(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    cell = cell.replace("\r\n", "\n").replace("\r", "\n")
    if not cell.startswith(_FORMULA_STARTS):
        return cell
    try:
        float(cell)
    except ValueError:
        return f"'{cell}"
    return cell


_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n")


def read_json(path: Place) -> Any:
    """Read a JSON file that samray wrote.

    Raises:
        DatasetError: it is missing or damaged.
    """
    try:
        return json.loads(read_bytes(path))
    except StorageError:
        raise
    except OSError as exc:
        raise DatasetError(f"{path}: cannot be read ({exc.strerror})") from exc
    except ValueError as exc:
        raise DatasetError(f"{path}: is damaged, not JSON ({exc})") from exc


@contextlib.contextmanager
def whole_folder(path: Place, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary local folder; on success it replaces `path`.

    In S3 its files appear one by one, so readers must rely on a file that is written afterwards.

    Args:
        sync: see `whole_file`; of the files directly in the folder.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="samray-") as folder:
            yield Path(folder)
            remove_folder(path)
            for local in sorted(Path(folder).rglob("*")):
                if local.is_file():
                    _upload(local, path / local.relative_to(folder).as_posix())
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        with _plain_full_disk(path):
            yield temporary
            for file in temporary.iterdir() if sync else ():
                _sync(file)
            if path.exists():  # left unfinished by a killed run; finished ones are never rewritten
                shutil.rmtree(path)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_folder(
    source: Place, target: Place, names: Iterable[str] | None = None, link: bool = False
) -> None:
    """Copy the files of a folder, completely or not at all.

    Args:
        names: of the files; None: all.
        link: use hard links on the same disk; only for files that are never changed in place.
    """
    with whole_folder(target, sync=True) as temporary:
        for name in list_folder(source) if names is None else names:
            here = local_copy(source / name)
            try:
                if not link:
                    raise OSError
                os.link(here, temporary / name)
            except OSError:  # another disk, or a file system without hard links
                shutil.copyfile(here, temporary / name)


def remove_folder(path: Place) -> None:
    """Remove a folder and its content, if it exists."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    with plain_errors(str(path)):
        if path.exists():
            path.rmtree()


def short_name(name: str) -> str:
    """Return a file's name that leaves room for a longer extension (see MAX_NAME)."""
    raw = name.encode()
    if len(raw) <= 200:
        return name
    return f"{raw[:180].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:12]}"


def relative_path(file: Place, folder: Place) -> str:
    """Return a file's path relative to a folder, with forward slashes; else its name."""
    if isinstance(file, Path) and isinstance(folder, Path):
        return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
    if isinstance(file, S3Path) and isinstance(folder, S3Path) and file.bucket == folder.bucket:
        return posixpath.relpath(f"/{file.key}", f"/{folder.key}")
    return file.name


def free_bytes(path: Place) -> float:
    """Return the free disk space at `path`, which need not exist, in bytes; infinite in S3."""
    if not isinstance(path, Path):
        return float("inf")
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
