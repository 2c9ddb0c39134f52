"""Places in S3, against a real server: reading, writing, listing, and failures."""

import json
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cloudpathlib import S3Client
from failing_proxy import FailingProxy
from s3 import READER

from samray.data.discovery import find_files
from samray.errors import AnnotationError, ConfigError, DatasetError, StorageError
from samray.storage import (
    LOCK,
    is_used,
    list_folder,
    list_objects,
    local_copy,
    lock_folder,
    plain_errors,
    read_bytes,
    read_head,
    read_json,
    relative_path,
    remove_folder,
    require_folder,
    resolve,
    whole_file,
    whole_folder,
    write_bytes,
    write_json,
)


class Killed(Exception):  # noqa: N818
    """Interrupts a writer."""


def write_half(path: Path) -> None:
    path.write_bytes(b"half")
    raise Killed


@pytest.fixture
def folder(bucket):
    return resolve(f"{bucket}/some/folder", "--output-dir")


@pytest.fixture
def patience(monkeypatch):
    """One attempt, so that tests of failures do not wait for retries."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(S3Client, "_default_client", None)


def test_a_path_is_normalised(bucket):
    assert str(resolve(f"{bucket}/a/./b//c/../d/", "x")) == f"{bucket}/a/b/d"
    assert str(resolve(bucket, "x")) == bucket
    assert str(resolve(f"{bucket}/../../a", "x")) == f"{bucket}/a"


def test_written_files_are_read_back(folder):
    assert not is_used(folder)
    content = bytes(range(256)) * 40
    write_bytes(folder / "file.bin", content)
    write_json(folder / "sub" / "file.json", {"a": "ü"})
    assert read_bytes(folder / "file.bin") == content
    assert read_head(folder / "file.bin", 10) == content[:10]
    assert read_json(folder / "sub" / "file.json") == {"a": "ü"}
    assert is_used(folder)
    assert require_folder(folder, "x") == folder
    assert list_folder(folder) == ["file.bin", "sub"]
    assert list_folder(folder / "nothing") == []
    sizes = [(name, size) for name, size, _ in list_objects(folder)]
    assert sizes == [("file.bin", len(content)), ("sub/file.json", 15)]


def test_the_head_of_an_empty_object_is_empty(folder):
    """S3 answers any range of it with InvalidRange, which ended `prepare` at an empty JSON."""
    write_bytes(folder / "empty.json", b"")
    assert read_head(folder / "empty.json") == b""


def test_a_missing_object_is_a_missing_file(folder):
    with pytest.raises(FileNotFoundError, match="gone"):
        read_bytes(folder / "gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        local_copy(folder / "gone")
    with pytest.raises(DatasetError, match=r"gone.*cannot be read"):
        read_json(folder / "gone")
    with pytest.raises(ConfigError, match=r"--data-dir: .*does not exist"):
        require_folder(folder, "--data-dir")
    remove_folder(folder)


def test_a_large_file_is_refused_before_its_body_is_read(folder):
    write_bytes(folder / "big", bytes(3 * 2**20))
    with pytest.raises(AnnotationError, match="has 3 MiB; at most 2 are read"):
        read_bytes(folder / "big", 2 * 2**20)
    assert len(read_bytes(folder / "big", 3 * 2**20)) == 3 * 2**20


def test_an_unfinished_file_does_not_appear(folder):
    with pytest.raises(Killed), whole_file(folder / "half.npy") as path:
        write_half(path)
    assert not is_used(folder)
    array = np.arange(12)
    with whole_file(folder / "all.npy") as path, path.open("wb") as file:
        np.save(file, array)
    assert np.array_equal(np.load(local_copy(folder / "all.npy"), mmap_mode="r"), array)


def test_a_folder_is_replaced_whole(folder):
    write_bytes(folder / "old" / "x", b"1")
    with pytest.raises(Killed), whole_folder(folder / "old") as path:
        write_half(path / "y")
    assert list_folder(folder / "old") == ["x"]
    with whole_folder(folder / "old") as path:
        (path / "sub").mkdir()
        (path / "sub" / "z").write_bytes(b"3")
    assert list_folder(folder / "old") == ["sub"]
    assert read_bytes(folder / "old" / "sub" / "z") == b"3"
    remove_folder(folder)
    assert not is_used(folder)


def test_a_copy_is_kept_until_the_object_changes(folder):
    write_bytes(folder / "w.pth", b"one")
    copy = local_copy(folder / "w.pth")
    assert copy.read_bytes() == b"one"
    assert copy.suffix == ".pth"
    written = copy.stat().st_mtime_ns
    assert local_copy(folder / "w.pth") == copy
    assert copy.stat().st_mtime_ns == written
    write_bytes(folder / "w.pth", b"two")
    assert local_copy(folder / "w.pth").read_bytes() == b"two"
    assert copy.read_bytes() == b"one"  # processes that mapped the old copy keep it


def test_places_travel_between_processes(folder):
    write_bytes(folder / "a", b"1")
    assert read_bytes(pickle.loads(pickle.dumps(folder / "a"))) == b"1"


def test_relative_path_from_folder_to_file(folder, tmp_path):
    root = folder.parent
    assert relative_path(root / "images" / "a.jpg", root / "annotations") == "../images/a.jpg"
    assert relative_path(root / "a.jpg", tmp_path) == "a.jpg"
    assert relative_path(tmp_path / "b" / "a.jpg", tmp_path / "c") == "../b/a.jpg"


def test_raw_files_are_found_and_odd_keys_are_listed(s3_server, bucket):
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for key in ("d/images/ä b.JPG", "d/annotations/ä b.json", "d/.hidden/x.json", "d/notes.txt"):
        client.put_object(Bucket=name, Key=key, Body=b"x")
    client.put_object(Bucket=name, Key="d2/other.json", Body=b"x")
    client.put_object(Bucket=name, Key="d/splits.json", Body=b"x")
    others = [resolve(f"{bucket}/d/splits.json", "--split-file"), Path("/d/annotations/ä b.json")]
    files = find_files(resolve(f"{bucket}/d", "--data-dir"), None, others)
    assert files.images == ["images/ä b.JPG"]
    assert files.annotations == ["annotations/ä b.json"]
    assert files.skipped == []
    before = dict(files.stamps)
    client.put_object(Bucket=name, Key="d/annotations/ä b.json", Body=b"y")
    after = find_files(resolve(f"{bucket}/d", "--data-dir"), None, others).stamps
    assert {key for key in after if after[key] != before[key]} == {"annotations/ä b.json"}


@pytest.mark.usefixtures("patience")
def test_failures_say_what_to_do(s3_server, bucket, folder, monkeypatch):
    missing = resolve("s3://no-such-bucket-here/x", "--data-dir")
    with pytest.raises(StorageError, match=r"--data-dir: s3://no-such.*no such bucket; create it"):
        require_folder(missing, "--data-dir")
    with pytest.raises(StorageError, match="no such bucket"):
        write_bytes(missing / "a", b"1")
    write_bytes(folder / "a", b"1")

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    monkeypatch.setattr(S3Client, "_default_client", None)
    reader = resolve(str(folder), "x")
    assert read_bytes(reader / "a") == b"1"
    with pytest.raises(StorageError, match=r"folder/b: .*no permission.*read, write and list"):
        write_bytes(reader / "b", b"1")
    with pytest.raises(StorageError, match="no permission"), whole_file(reader / "b") as path:
        path.write_bytes(b"1")

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(StorageError, match=r"refuses the AWS credentials.*check or renew"):
        require_folder(resolve(str(folder), "x"), "--data-dir")

    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(StorageError, match="found no AWS credentials; set AWS_ACCESS_KEY_ID"):
        read_bytes(resolve(f"{folder}/a", "x"))

    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # no server listens
    monkeypatch.setattr(S3Client, "_default_client", None)
    with pytest.raises(StorageError, match=r"cannot be reached.*check AWS_ENDPOINT_URL"):
        require_folder(resolve(str(folder), "x"), "--data-dir")


def test_other_errors_are_left_as_they_are():
    with pytest.raises(KeyError), plain_errors("x"):
        raise KeyError("other")


def test_a_server_that_is_killed_and_comes_back_is_waited_for(s3_server, folder):
    write_json(folder / "a.json", [1])
    s3_server.kill()
    try:
        starter = threading.Timer(2, s3_server.start)
        starter.start()
        assert read_json(folder / "a.json") == [1]
        starter.join()
    finally:
        if s3_server.process.poll() is not None:
            s3_server.start()


def test_a_server_that_has_too_much_to_do_is_asked_again(s3_server, folder, monkeypatch):
    proxy = FailingProxy(s3_server.ports["s3"][0])
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr(S3Client, "_default_client", None)
    behind = resolve(str(folder), "x")
    write_json(behind / "a.json", [1])
    proxy.fail("503")
    assert proxy.answered == 0
    threading.Timer(1, proxy.fail, ["pass"]).start()
    assert read_json(behind / "a.json") == [1]
    assert proxy.answered > 0
    proxy.close()


def test_wrong_json_in_s3_is_damaged_data(folder: Path):
    write_bytes(folder / "a.json", json.dumps([1]).encode()[:1])
    with pytest.raises(DatasetError, match="damaged, not JSON"):
        read_json(folder / "a.json")


def test_a_prefix_is_held_by_one_process(folder):
    """A lock of a process that has ended blocks other hosts only."""
    with lock_folder(folder, "--output-dir"):
        assert not is_used(folder)
        assert read_json(folder / LOCK)["host"] == socket.gethostname()
    assert not (folder / LOCK).exists()
    owner = {"host": "another", "pid": 7, "since": "2026-11-25 12:00:00 UTC"}
    write_json(folder / LOCK, owner)
    with (
        pytest.raises(ConfigError, match=r"in use by process 7 on another.*delete s3://"),
        lock_folder(folder, "--output-dir"),
    ):
        pass
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    write_json(folder / LOCK, owner | {"host": socket.gethostname(), "pid": int(ended.stdout)})
    with lock_folder(folder, "--output-dir"):
        write_json(folder / "run.json", {})
    assert list_folder(folder) == ["run.json"]
