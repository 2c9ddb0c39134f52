"""A real cluster of two nodes on one machine: Ray jobs, and folders that one node cannot see."""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import requests
import yaml
from local_cluster import local_cluster
from ports import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
START_SECONDS = 120
MARK = "samray-marked-secret"
SECRETS = {  # in the environment of the cluster and of its users
    "SAMRAY_TOKEN": f"{MARK}-endpoint",
    "LABEL_STUDIO_API_KEY": f"{MARK}-label-studio",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}-mlflow",
    "AWS_ACCESS_KEY_ID": f"{MARK}-id",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}-key",
}


# Holds a CPU of somebody else's, and says at the end whether it was left alone.
TENANT = """
import os, ray
ray.init(logging_level="ERROR", log_to_driver=False)

@ray.remote(num_cpus=1)
class Tenant:
    def pid(self):
        return os.getpid()

tenant = Tenant.remote()
before = ray.get(tenant.pid.remote())
print("holds a CPU", flush=True)
input()
assert ray.get(tenant.pid.remote(), timeout=60) == before
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes and a second tenant; on the second node, `unshared` is an empty folder of its own.

    Ray asks for a token. Yields the environment variables to reach the cluster, the unshared
    folder, and the folder of Ray's logs.
    """
    unshared = tmp_path_factory.mktemp("unshared")
    own_folder = f"mount -t tmpfs none {unshared}"
    probe = subprocess.run(["unshare", "-m", "sh", "-c", own_folder], capture_output=True)
    if probe.returncode:
        pytest.skip("a separate folder for a node needs permission to mount (root)")
    with local_cluster(num_nodes=1, cpus=3, **SECRETS) as cluster:
        cluster.add_node(before=own_folder)
        with subprocess.Popen(
            [sys.executable, "-c", TENANT], env=cluster.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as tenant:  # fmt: skip
            assert tenant.stdout.readline() == "holds a CPU\n"
            yield cluster.environment, unshared, cluster.folder / "ray"
            tenant.communicate("\n")
        assert tenant.returncode == 0, "the other tenant was harmed"


def submit(environment, *words, wait=True):
    """Submit a job as in the README; retry while Ray has no agent for it."""
    options = ["--working-dir", ".", *([] if wait else ["--no-wait"])]
    command = ["ray", "job", "submit", *options, "--", "python", "-m", *words]
    for _ in range(10):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
        )
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(3)
    return done.returncode, done.stdout + done.stderr


def ask_ray(environment, path):
    """What Ray's dashboard tells those who have its token."""
    response = requests.get(
        environment["RAY_API_SERVER_ADDRESS"] + path,
        headers={"Authorization": f"Bearer {Path(environment['RAY_AUTH_TOKEN_PATH']).read_text()}"},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    return response.text


def assert_unmarked(text):
    assert MARK not in text, text[max(0, text.index(MARK) - 500) :][:1000]


def assert_no_file_is_marked(folder):
    files = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    assert not [path for path in files if MARK.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def prepared_on_two_nodes(cluster, photos, tmp_path_factory):
    environment, *_ = cluster
    output = tmp_path_factory.mktemp("shared") / "prepared"
    status, log = submit(
        environment, "jobs.prepare", "--data-dir", str(photos), "--output-dir", str(output)
    )
    assert status == 0, log
    return output


def test_a_training_job_is_stopped_and_submitted_again(cluster, prepared_on_two_nodes, tmp_path):
    """Across two nodes."""
    environment, *_ = cluster
    run = tmp_path / "run"
    words = [
        "jobs.train", "--config", "configs/demo.yaml", f"train.data_dir={prepared_on_two_nodes}",
        f"train.output_dir={run}", "train.resume=true", "scaling.num_workers=2",
        "scaling.cpus_per_worker=2", "train.num_epochs=200",  # none of which has to wait for us
        "train.max_objects=2", "train.instances=false", f"train.mlflow_uri={tmp_path / 'mlflow'}",
    ]  # fmt: skip
    status, log = submit(environment, *words, wait=False)
    assert status == 0, log
    (job,) = set(re.findall(r"raysubmit_\w+", log))
    deadline = time.monotonic() + 300
    while not ((run / "run.json").exists() and state_of(run)["epochs"]):
        assert time.monotonic() < deadline, "no epoch within five minutes"
        time.sleep(0.2)
    subprocess.run(["ray", "job", "stop", job], env=environment, check=True, capture_output=True)
    state = state_of(run)
    assert state["status"] in ("interrupted", "running")  # Ray kills it after three seconds
    last = len(state["epochs"]) + 2  # a worker may just have finished one more
    status, log = submit(environment, *words, f"train.num_epochs={last}")
    assert status == 0, log
    assert "resuming " in log
    assert log.count(f"epoch {last}/{last}  loss ") == 1
    assert "it/s" not in log, "a bar"
    assert "best: " in log
    assert state_of(run)["status"] == "finished"
    assert_unmarked(log)
    for folder in (prepared_on_two_nodes, run, tmp_path / "mlflow"):
        assert_no_file_is_marked(folder)


def state_of(run):
    return json.loads((run / "run.json").read_text())


def test_a_job_with_mistakes_fails_with_all_of_them_in_its_log(cluster, tmp_path):
    environment, *_ = cluster
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
    environment, *_ = cluster
    status, log = submit(environment, "jobs.prepare", "--data-dir", "a", "--output-dir", "b")
    assert status != 0
    assert "is relative, and a Ray job runs in Ray's own copy" in log


def test_an_output_folder_that_a_node_cannot_see_is_refused_before_any_work(
    cluster, photos, prepared_on_two_nodes
):
    environment, unshared, _ = cluster
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
    environment, *_ = cluster
    port = free_port()
    content = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    content["http_options"]["port"] = port
    content["proxy_location"] = "HeadOnly"  # both nodes have the same ports here
    content["applications"][0]["args"]["cpus_per_replica"] = 0.2
    config = tmp_path / "serve.yaml"
    content["applications"][0]["args"]["label_studio_url"] = "http://127.0.0.1:1"  # it has a key
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
        headers={"Authorization": f"Bearer {SECRETS['SAMRAY_TOKEN']}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["name"] == "tiny"
    refused = requests.post(f"http://127.0.0.1:{port}/v1/predict", json={}, timeout=60)
    assert refused.status_code == 401
    shown = subprocess.run(["serve", "status"], env=environment, capture_output=True, text=True)
    assert "RUNNING" in shown.stdout
    assert_unmarked(shown.stdout + ask_ray(environment, "/api/serve/applications/"))
    subprocess.run(["serve", "shutdown", "-y"], env=environment, check=True, capture_output=True)


def test_no_secret_of_the_environment_is_in_logs_or_in_what_ray_tells(cluster):
    """After jobs and an endpoint that had them all; docs/security.md says who reads memory."""
    environment, _, temporary = cluster
    assert_no_file_is_marked(temporary)
    jobs = ask_ray(environment, "/api/jobs/")
    assert "jobs.train" in jobs
    assert_unmarked(jobs)
    for kind in ("actors", "tasks", "workers", "runtime_envs"):
        assert_unmarked(ask_ray(environment, f"/api/v0/{kind}?detail=true&limit=1000"))
    refused = requests.get(environment["RAY_API_SERVER_ADDRESS"] + "/api/jobs/", timeout=60)
    assert refused.status_code in (401, 403)
