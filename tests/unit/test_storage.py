"""Invalid paths are refused early; outputs appear completely or not at all."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import botocore.exceptions as boto
import pytest
from boto3.exceptions import RetriesExceededError, S3UploadFailedError
from urllib3.exceptions import ProtocolError

from samray.errors import ConfigError, DatasetError, StorageError
from samray.storage import (
    JOB_VARIABLE,
    LOCK,
    csv_bytes,
    free_bytes,
    is_used,
    lock_folder,
    make_folder,
    plain_errors,
    read_json,
    require_folder,
    resolve,
    whole_file,
    whole_folder,
    write_bytes,
    write_csv,
    write_json,
)


class Killed(Exception):  # noqa: N818
    """Interrupts a writer."""


def write_half(path: Path) -> None:
    path.write_bytes(b"half")
    raise Killed


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)


def test_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    assert resolve("a/../b", "--data-dir") == tmp_path / "b"
    assert resolve("~/b", "--data-dir") == Path("/home/ann/b")


def test_relative_path_in_a_ray_job_is_refused_because_outputs_would_be_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert JOB_VARIABLE == "RAY_JOB_CONFIG_JSON_ENV_VAR"
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    with pytest.raises(ConfigError, match=r"--output-dir: runs/one is relative.*absolute path"):
        resolve("runs/one", "--output-dir")
    assert resolve(str(tmp_path), "--output-dir") == tmp_path


@pytest.mark.parametrize(
    "path", ["s3://", "s3:/bucket/x", "gs://bucket", "file:///data", "https://x/y"]
)
def test_path_of_another_store_is_refused_and_makes_no_folder_of_its_name(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"--data-dir: {path} is neither a local path nor s3"):
        resolve(path, "--data-dir")


def test_home_of_an_unknown_user_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="--data-dir: ~no-such-user/data"):
        resolve("~no-such-user/data", "--data-dir")


def test_folder_that_is_missing_or_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    assert require_folder(tmp_path, "--data-dir") == tmp_path
    with pytest.raises(ConfigError, match=r"--data-dir: .*gone does not exist"):
        require_folder(tmp_path / "gone", "--data-dir")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        require_folder(tmp_path / "file", "--data-dir")
    with pytest.raises(ConfigError, match=r"--output-dir: .* cannot be created"):
        make_folder(tmp_path / "file" / "below", "--output-dir")
    assert make_folder(tmp_path / "a" / "b", "--output-dir").is_dir()
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may do all
    with pytest.raises(ConfigError, match=r"--output-dir: .*b cannot be written; change its perm"):
        make_folder(tmp_path / "a" / "b", "--output-dir")


def test_whole_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # so the rename is atomic
        assert temporary.name.startswith(".")
    assert contents(tmp_path) == {"model.bin": b"new"}


@pytest.mark.parametrize("old", [None, b"old"])
def test_failed_whole_file_leaves_nothing_behind_and_keeps_the_old_one(
    tmp_path: Path, old: bytes | None
) -> None:
    path = tmp_path / "model.bin"
    before = {} if old is None else {"model.bin": old}
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(Killed), whole_file(path) as temporary:
        write_half(temporary)
    assert contents(tmp_path) == before


def test_a_full_disk_is_said_in_a_line(tmp_path: Path) -> None:
    for opened in (whole_file, whole_folder):
        path = tmp_path / opened.__name__
        with (
            pytest.raises(StorageError, match=rf"{path}: the disk .* is full; .*--resume"),
            opened(path),
            open("/dev/full", "wb", buffering=0) as full,
        ):
            full.write(b"content")
    assert contents(tmp_path) == {}


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with whole_file(path) as one, whole_file(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
    assert contents(tmp_path) == {"a": b"one"}


@pytest.mark.parametrize("old", [None, b"old"])
def test_failed_whole_folder_leaves_nothing_behind_and_keeps_the_old_one(
    tmp_path: Path, old: bytes | None
) -> None:
    path = tmp_path / "checkpoint"
    before = {} if old is None else {"checkpoint/weights": old}
    if old is not None:
        path.mkdir()
        (path / "weights").write_bytes(old)
    with pytest.raises(Killed), whole_folder(path) as temporary:
        write_half(temporary / "weights")
    assert contents(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([path] if old else [])


def test_whole_folder_replaces_an_unfinished_one_entirely(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "leftover").write_bytes(b"old")
    with whole_folder(path) as temporary:
        (temporary / "weights").write_bytes(b"new")
        assert contents(path) == {"leftover": b"old"}
    assert contents(tmp_path) == {"checkpoint/weights": b"new"}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused_by_json_and_the_old_file_stays(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 1.5})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": [value]})
    assert contents(tmp_path) == before


def test_half_a_surrogate_pair_is_written_and_read_again(tmp_path: Path) -> None:
    content = {"caf\udce9.jpg": "\ud800 é"}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content


def test_json_keeps_labels_readable(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"labels": ["Straße", "кот"], "path": Path("a").name})
    assert "Straße" in path.read_text(encoding="utf-8")
    assert (
        read_json(path)
        == json.loads(path.read_bytes())
        == {
            "labels": ["Straße", "кот"],
            "path": "a",
        }
    )


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}"])
def test_damaged_json_is_a_dataset_error_that_names_the_file(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "manifest.json"
    write_bytes(path, content)
    with pytest.raises(DatasetError, match=r"manifest\.json: is damaged"):
        read_json(path)


def test_missing_json_is_a_dataset_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.json: cannot be read"):
        read_json(tmp_path / "gone.json")


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\n=1", "=a\n,b"])
def test_text_that_a_spreadsheet_would_run_gets_an_apostrophe(tmp_path: Path, text: str) -> None:
    write_csv(tmp_path / "a.csv", [("label", "iou"), (text, -0.5), ('nut, "big"', 1)])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["label", "iou"], [f"'{text}", "-0.5"], ['nut, "big"', "1"]]


def test_a_carriage_return_in_a_label_begins_no_row() -> None:
    assert csv_bytes([("nut\r=1", "a\r\nb")]) == b'"nut\n=1","a\nb"\n'


def test_numbers_written_as_text_and_harmless_text_stay_as_they_are() -> None:
    assert csv_bytes([("-0.250000", "+1e-3", "größe", "a=b", "")]) == (
        "-0.250000,+1e-3,größe,a=b,\n".encode()
    )


def test_free_space_is_known_before_the_folder_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "yet") > 0


def answer(code: str) -> boto.ClientError:
    return boto.ClientError({"Error": {"Code": code, "Message": "m"}}, "GetObject")


URL = "http://127.0.0.1:9"
UNREACHABLE = "the S3 server cannot be reached, tried "


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answer("NoSuchBucket"), "there is no such bucket; create it or check the name"),
        (answer("AccessDenied"), "these credentials have no permission for it; ask for read"),
        (answer("403"), "these credentials have no permission for it; ask for read"),
        (answer("ExpiredToken"), "the server refuses the AWS credentials (ExpiredToken); check"),
        (answer("RequestTimeout"), UNREACHABLE),
        (answer("SlowDown"), "S3 answered SlowDown (An error occurred (SlowDown)"),
        (boto.NoCredentialsError(), "found no AWS credentials; set AWS_ACCESS_KEY_ID and "),
        (boto.EndpointConnectionError(endpoint_url=URL), UNREACHABLE),
        (boto.ConnectTimeoutError(endpoint_url=URL), UNREACHABLE),
        (boto.ReadTimeoutError(endpoint_url=URL), UNREACHABLE),
        (boto.ConnectionClosedError(endpoint_url=URL), UNREACHABLE),
        (boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), UNREACHABLE),
        (boto.ResponseStreamingError(error="cut"), UNREACHABLE),
        (RetriesExceededError(OSError("cut")), UNREACHABLE),
        (ProtocolError("cut"), UNREACHABLE),
        (boto.ProfileNotFound(profile="x"), "S3 answered ProfileNotFound (The config profile (x)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_errors_of_boto3_become_one_line_with_advice(error: Exception, reason: str) -> None:
    with pytest.raises(StorageError) as caught, plain_errors("s3://b/a"):
        raise error
    assert str(caught.value).startswith(f"s3://b/a: {reason}")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("code", ["NoSuchKey", "404"])
def test_an_object_that_does_not_exist_is_a_missing_file(code: str) -> None:
    with pytest.raises(FileNotFoundError, match="s3://b/a"), plain_errors("s3://b/a"):
        raise answer(code)


def fail_to_upload() -> None:
    try:
        raise answer("NoSuchBucket")
    except boto.ClientError:
        raise S3UploadFailedError("Failed to upload a")  # noqa: B904 - as boto3 does


def test_a_failed_upload_gives_the_reason_of_its_request() -> None:
    with pytest.raises(StorageError, match="no such bucket"), plain_errors("s3://b/a"):
        fail_to_upload()


HOLDER = """
import sys, time
from samray.storage import lock_folder, resolve
with lock_folder(resolve(sys.argv[1], "--output-dir"), "--output-dir"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        for _ in range(2):  # the first refusal does not remove the lock or its owner
            with pytest.raises(ConfigError) as caught, lock_folder(folder, "--output-dir"):
                pass
            assert str(caught.value).startswith(
                f"--output-dir: {folder} is in use by process {process.pid} "
                f"on {socket.gethostname()}, since 20"
            )
        assert not is_used(folder)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with lock_folder(folder, "--output-dir"):
        (folder / "run.json").write_text("{}")
        assert is_used(folder)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_a_folder_that_was_locked_in_vain_is_gone_again(tmp_path):
    with pytest.raises(Killed), lock_folder(tmp_path / "run", "--output-dir"):
        raise Killed
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with lock_folder(tmp_path / "file", "--output-dir"):  # whoever wants a folder refuses it
        assert is_used(tmp_path / "file")


def test_a_damaged_lock_that_nobody_holds_is_taken(tmp_path):
    (tmp_path / LOCK).write_text("{")
    with lock_folder(tmp_path, "--output-dir"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
