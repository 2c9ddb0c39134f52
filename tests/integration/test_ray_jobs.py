"""A real cluster of two nodes on one machine: Ray jobs, and folders that one node cannot see."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import ray
import requests
import yaml
from ports import free_ports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 120


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes; on the second, `unshared` is an empty folder of its own.

    Yields the environment variables to reach the cluster, and the unshared folder.
    """
    unshared = tmp_path_factory.mktemp("unshared")
    own_folder = f"mount -t tmpfs none {unshared}"
    probe = subprocess.run(["unshare", "-m", "sh", "-c", own_folder], capture_output=True)
    if probe.returncode:
        pytest.skip("a separate folder for a node needs permission to mount (root)")
    gcs, dashboard, client, agent, second_agent = free_ports(5)
    # Ray's sockets are here, and their paths may have at most 107 characters.
    temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_AUTH_MODE": "disabled",
    }
    starting = {key: value for key, value in environment.items() if key != "RAY_ADDRESS"}
    head = [
        "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
        f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temporary}",
    ]  # fmt: skip
    second = (
        f"{own_folder} && exec ray start --block --num-cpus=2 --address=127.0.0.1:{gcs} "
        f"--dashboard-agent-listen-port={second_agent}"
    )
    log = tmp_path_factory.mktemp("ray") / "start.log"
    processes = []
    try:
        for command in (head, ["unshare", "-m", "sh", "-c", second]):
            with log.open("ab") as output:
                processes.append(
                    subprocess.Popen(
                        command, env=starting, start_new_session=True, stdout=output, stderr=output
                    )
                )
            wait_for_nodes(environment, len(processes), log)
        yield environment, unshared
    finally:
        for process in reversed(processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_nodes(environment, count, log):
    """Wait until the cluster lists `count` nodes and its job agent answers."""
    count_nodes = (
        "import ray, sys; ray.init(log_to_driver=False, logging_level='ERROR'); "
        f"sys.exit(sum(n['Alive'] for n in ray.nodes()) < {count})"
    )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for command in ([sys.executable, "-c", count_nodes], ["ray", "job", "list"]):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                break
        else:
            return
        time.sleep(1)
    pytest.fail(f"no Ray of {count} nodes: {log.read_text()[-2000:]} {done.stderr[-1000:]}")


def submit(environment, *words):
    """Submit a job as in the README; retry while Ray has no agent for it."""
    command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", *words]
    for _ in range(10):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(3)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def prepared_on_two_nodes(cluster, photos, tmp_path_factory):
    environment, _ = cluster
    output = tmp_path_factory.mktemp("shared") / "prepared"
    status, log = submit(
        environment, "jobs.prepare", "--data-dir", str(photos), "--output-dir", str(output)
    )
    assert status == 0, log
    return output


def test_a_training_job_runs_across_two_nodes(cluster, prepared_on_two_nodes, tmp_path):
    environment, _ = cluster
    status, log = submit(
        environment, "jobs.train", "--config", "configs/demo.yaml",
        f"train.data_dir={prepared_on_two_nodes}", f"train.output_dir={tmp_path / 'run'}",
        "train.num_epochs=1", "scaling.num_workers=2", "scaling.cpus_per_worker=2",
    )  # fmt: skip
    assert status == 0, log
    assert "epoch 1/1" in log
    assert "best: epoch 1 of 1" in log or "best: the base" in log
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert state["status"] == "finished"


def test_a_job_with_mistakes_fails_with_all_of_them_in_its_log(cluster, tmp_path):
    environment, _ = cluster
    status, log = submit(
        environment, "jobs.train", "--config", "configs/vit_b.yaml", "train.learning_rte=1",
        "train.batch_size=0", "model.type=vit_x",
    )  # fmt: skip
    assert status != 0
    assert "exit code 2" in log
    for mistake in ("train.learning_rte", "train.batch_size", "model.type"):
        assert mistake in log
    assert "Traceback" not in log


def test_a_job_refuses_relative_paths(cluster):
    environment, _ = cluster
    status, log = submit(environment, "jobs.prepare", "--data-dir", "a", "--output-dir", "b")
    assert status != 0
    assert "is relative, and a Ray job runs in Ray's own copy" in log


def test_an_output_folder_that_a_node_cannot_see_is_refused_before_any_work(
    cluster, photos, prepared_on_two_nodes
):
    environment, unshared = cluster
    for stage, words in {
        "prepare": ["--data-dir", str(photos), "--output-dir", str(unshared / "prepared")],
        "train": [
            "--data-dir", str(prepared_on_two_nodes), "--output-dir", str(unshared / "run"),
            "--checkpoint", "none",
        ],
    }.items():  # fmt: skip
        done = subprocess.run(
            ["samray", stage, *words], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 2, done.stderr
        assert "is not shared" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (unshared / "run" / "run.json").exists()
    assert not (unshared / "prepared" / "data").exists()


def test_ray_is_the_pinned_one():
    assert ray.__version__ in (ROOT / "constraints.txt").read_text()


def test_the_endpoint_is_deployed_and_answers(cluster, photos, tmp_path):
    """`serve deploy` with the shipped file, on a free port and from another folder."""
    environment, _ = cluster
    (port,) = free_ports(1)
    content = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    content["http_options"]["port"] = port
    content["proxy_location"] = "HeadOnly"  # both nodes have the same ports here
    content["applications"][0]["args"]["cpus_per_replica"] = 0.2
    config = tmp_path / "serve.yaml"
    config.write_text(yaml.safe_dump(content))
    environment = {**environment, "RAY_DASHBOARD_ADDRESS": environment["RAY_API_SERVER_ADDRESS"]}
    done = subprocess.run(
        ["serve", "deploy", config], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):  # while it starts
            if requests.get(f"http://127.0.0.1:{port}/v1/readyz", timeout=30).status_code == 200:
                break
        if time.monotonic() > deadline:
            status = subprocess.run(["serve", "status"], env=environment, capture_output=True)
            pytest.fail(status.stdout.decode())
        time.sleep(1)
    photo = sorted((photos / "images").iterdir())[0].read_bytes()
    prompts = json.dumps({"prompts": [{"point_coords": [[100, 80]]}], "mask_format": "rle"})
    answer = requests.post(
        f"http://127.0.0.1:{port}/v1/predict",
        files={"image": photo},
        data={"request": prompts},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["name"] == "tiny"
    subprocess.run(["serve", "shutdown", "-y"], env=environment, check=True, capture_output=True)
