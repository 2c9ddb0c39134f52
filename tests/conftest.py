"""Shared by the integration tests: Ray, a drawn dataset, a prepared one, S3, the CLI."""

import contextlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3 import S3Server

START_TRIES = 4  # Ray's start sometimes fails on a busy machine


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 4 logical CPUs, which `samray.cluster.start` finds and uses."""
    import ray

    ray.shutdown()  # a Ray that a test started without this fixture
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for attempt in range(1, START_TRIES + 1):
        try:
            ray.init(address="local", num_cpus=4, log_to_driver=False, logging_level=logging.ERROR)
            break
        except Exception:
            ray.shutdown()
            if attempt == START_TRIES:
                raise
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawn images with LabelMe JSON. Copy it before changing it."""
    from samray.data.sample_data import write_sample_data

    return write_sample_data(tmp_path_factory.mktemp("data") / "photos", 24, 3)


@pytest.fixture(scope="session")
def prepared(ray_cluster: None, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos`, prepared with the default settings."""
    from samray.config import load_config
    from samray.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data") / "prepared"
    folders = {"prepare.data_dir": str(photos), "prepare.output_dir": str(folder)}
    prepare(load_config(options=folders))
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; a test that kills it must start it again."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """`s3://...` of a new bucket that this process may read and write."""
    from cloudpathlib import S3Client

    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "samray cache"))
    monkeypatch.setattr(S3Client, "_default_client", None)  # it keeps its first endpoint
    name = f"b{uuid.uuid4().hex[:12]}"
    s3_server.client().create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., tuple[int, str, str]]:
    """`run_cli(*words) -> (status, stdout, stderr)`: the command line, in this process."""
    from samray.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main([str(word) for word in words])
            except SystemExit as exc:  # argparse's own exit
                status = exc.code if isinstance(exc.code, int) else 1
        return status, out.getvalue(), err.getvalue()

    return run
