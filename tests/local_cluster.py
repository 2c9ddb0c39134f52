"""A real Ray cluster of several nodes on this machine, for tests, chaos and `make cluster`.

`python tests/local_cluster.py` starts one of three nodes, prints what to paste, and runs until
Ctrl-C. All ports are free ones; the dashboard listens on loopback, Ray's other servers as they
always do on all addresses, and all ask for a token. Only its own processes are ever ended:
`ray stop` would end every Ray of the user.
"""

import argparse
import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ports import free_ports
from processes import processes_below, wait_until_ended

BIN = Path(sys.executable).parent
START_SECONDS = 120
START_TRIES = 4  # Ray gives a node 30 seconds, which it sometimes needs on a busy machine
STOP_SECONDS = 5  # then they are killed, which harms nothing of theirs
NO_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


class LocalCluster:
    """Nodes that can be killed and added while jobs run.

    Args:
        num_nodes: started by `start`; the first is the head.
        cpus: of each node; logical ones, so that any machine has room for a job and a tenant.
        variables: environment variables of the nodes, e.g. S3's address and credentials.

    Attributes:
        nodes: `ray start --block` of each node, the head first.
        environment: with which `ray job submit`, `serve` and samray reach the cluster.
    """

    def __init__(
        self, num_nodes: int = 3, cpus: int = 2, variables: Mapping[str, str] | None = None
    ) -> None:
        self.num_nodes, self.cpus = num_nodes, cpus
        # Ray's sockets are here, and their paths may have at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.token_file = self.folder / "token"
        self.token_file.touch(0o600)
        self.token_file.write_text(secrets.token_hex(32))
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._gcs, self._dashboard = free_ports(2)
        given = {**os.environ, **(variables or {})}
        self._starting = {
            **{key: value for key, value in given.items() if key not in NO_RAY},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
        }
        self.environment = {
            **self._starting,
            "RAY_ADDRESS": f"127.0.0.1:{self._gcs}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self._dashboard}",
        }

    @property
    def dashboard(self) -> str:
        """Address of the dashboard and of the jobs' server."""
        return self.environment["RAY_API_SERVER_ADDRESS"]

    def start(self) -> None:
        """Start the nodes; return when all have joined and jobs can be submitted."""
        (client,) = free_ports(1)
        head = [
            "--head", f"--port={self._gcs}", f"--dashboard-port={self._dashboard}",
            "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
            f"--temp-dir={self.folder / 'ray'}",
        ]  # fmt: skip
        self._start_node(head)
        for _ in range(self.num_nodes - 1):
            self.add_node()

    def add_node(self, before: str | None = None) -> None:
        """Start one more node and wait until it has joined.

        Args:
            before: a shell command that the node runs first, with mounts of its own (needs root).
        """
        self._start_node([f"--address=127.0.0.1:{self._gcs}"], before)

    def kill_node(self, number: int) -> None:
        """`kill -9` of all processes of a node at once, as when its machine loses power."""
        node = self.nodes.pop(number)
        family = processes_below(node.pid) | {node.pid}
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()
        wait_until_ended(family)

    def processes(self) -> set[int]:
        """The processes of all nodes, without those that `samray` was started in."""
        return set().union(*(processes_below(node.pid) for node in self.nodes))

    def stop(self) -> None:
        """End the nodes and remove their files."""
        family = self.processes() | {node.pid for node in self.nodes}
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(STOP_SECONDS)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for node in self.nodes:
            node.wait()
        wait_until_ended(family)
        self.nodes = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, path: str) -> Any:
        """Return what the dashboard answers at a path, parsed from JSON."""
        request = urllib.request.Request(
            self.dashboard + path,
            headers={"Authorization": f"Bearer {self.token_file.read_text()}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def _start_node(self, words: list[str], before: str | None = None) -> None:
        """Start a node and wait until it has joined."""
        known = set() if "--head" in words else self._node_ids()
        for attempt in range(1, START_TRIES + 1):
            command = self._command(words)
            if before is not None:
                command = ["unshare", "-m", "sh", "-c", f"{before} && exec {shlex.join(command)}"]
            with (self.folder / "start.log").open("ab") as log:
                node = subprocess.Popen(
                    command, env=self._starting, start_new_session=True, stdout=log, stderr=log
                )
            self.nodes.append(node)
            if self._joins(known):
                return
            self.kill_node(-1)
            print(f"a node did not start, try {attempt} of {START_TRIES}", file=sys.stderr)
        log_end = (self.folder / "start.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"a node of Ray did not start:\n{log_end}")

    def _command(self, words: list[str]) -> list[str]:
        agent, metrics, runtime = free_ports(3)
        return [
            "ray", "start", "--block", "--disable-usage-stats", f"--num-cpus={self.cpus}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
            f"--runtime-env-agent-port={runtime}",
            # Two nodes would take the same ports of the default range.
            "--min-worker-port=0", "--max-worker-port=0", *words,
        ]  # fmt: skip

    def _node_ids(self) -> set[str]:
        """The nodes that Ray counts as alive; one that was killed stays among them for a while."""
        listed = self.ask("/api/v0/nodes")["data"]["result"]["result"]
        return {node["node_id"] for node in listed if node["state"] == "ALIVE"}

    def _joins(self, known: set[str]) -> bool:
        """Wait for one more than the known nodes, and for the jobs' server; False if it ended."""
        deadline = time.monotonic() + START_SECONDS
        while self.nodes[-1].poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # it does not listen yet
                if self._node_ids() - known and isinstance(self.ask("/api/jobs/"), list):
                    return True
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def local_cluster(num_nodes: int = 3, cpus: int = 2, **variables: str) -> Iterator[LocalCluster]:
    """Run a cluster for the time of a `with` block."""
    cluster = LocalCluster(num_nodes, cpus, variables)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    """Run a cluster until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="of each node")
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)
    print(f"starting {arguments.num_nodes} nodes", flush=True)
    with (
        contextlib.suppress(KeyboardInterrupt),
        local_cluster(arguments.num_nodes, arguments.cpus) as cluster,
    ):
        print(_what_to_paste(cluster), flush=True)
        while all(node.poll() is None for node in cluster.nodes):
            time.sleep(0.5)
        print("a node has ended, so the others end too", file=sys.stderr)


def _what_to_paste(cluster: LocalCluster) -> str:
    return f"""
A cluster of {cluster.num_nodes} nodes with {cluster.cpus} CPUs each, on {socket.gethostname()}.
In another terminal:

. .venv/bin/activate
export RAY_API_SERVER_ADDRESS={cluster.dashboard}
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH={cluster.token_file}

samray sample-data /tmp/samray/photos
ray job submit --working-dir . -- python -m jobs.prepare \\
  --data-dir /tmp/samray/photos --output-dir /tmp/samray/prepared
ray job submit --working-dir . -- python -m jobs.train --config configs/demo.yaml \\
  train.data_dir=/tmp/samray/prepared train.output_dir=/tmp/samray/run train.resume=true

Dashboard: {cluster.dashboard}; it asks for the token in {cluster.token_file}.
Ctrl-C ends these nodes and no other Ray."""


if __name__ == "__main__":
    main()
