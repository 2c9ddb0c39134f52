"""Does the number of workers change the result, and what does a change cost?

`python benchmarks/resize.py` starts a Ray of one node with one CPU on this machine, trains with one
worker from start to end, and again with `scaling.num_workers=1..3`: meanwhile two nodes join, Ray
is told to take one of them away within a minute, and the other one is killed. It prints the largest
difference of the two runs' weights, and per change the steps done twice and the seconds from the
last step before it to the next new step.
"""

import argparse
import json
import logging
import os
import socket
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nodes of this process, on loopback

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from samray import elastic
from samray.config import load_config
from samray.data.prepare import prepare
from samray.data.sample_data import write_sample_data
from samray.sam.checkpoint import load_checkpoint
from samray.training.train import fit

PHASE_STEPS = 6  # with each number of workers, before it changes
WAIT_SECONDS = 300.0
DRAIN_SECONDS = 60


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=24)
    parser.add_argument("--num-epochs", type=int, default=8)
    parser.add_argument("--look-seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    elastic.LOOK_SECONDS = arguments.look_seconds
    with tempfile.TemporaryDirectory(prefix="samray-resize-") as folder:
        with socket.socket() as free:  # another Ray of this machine may have the usual one
            free.bind(("127.0.0.1", 0))
            head = {"num_cpus": 1, "dashboard_port": free.getsockname()[1]}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        try:
            compare(cluster, Path(folder), arguments)
        finally:
            ray.shutdown()
            cluster.shutdown()


def compare(cluster: Cluster, folder: Path, arguments: argparse.Namespace) -> None:
    """Train twice and print the figures."""
    photos = write_sample_data(folder / "photos", arguments.num_images, 3)
    paths = {"prepare.data_dir": str(photos), "prepare.output_dir": str(folder / "prepared")}
    prepare(load_config(options=paths))
    runs = {}
    for name, num_workers in (("one", 1), ("resized", "1..3")):
        runs[name] = folder / name
        settings = {
            "train.data_dir": str(folder / "prepared"),
            "train.output_dir": str(runs[name]),
            "train.num_epochs": arguments.num_epochs,
            "train.batch_size": 3,
            "scaling.num_workers": num_workers,
            "scaling.cpus_per_worker": 1,
            "scaling.device": "cpu",
        }
        began = time.monotonic()
        with ThreadPoolExecutor(max_workers=1) as pool:  # nodes are started in the main thread
            training = pool.submit(fit, load_config(options=settings))
            if name == "resized":
                resize(cluster, runs[name], training)
            training.result()
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    one, resized = (load_checkpoint(run / "latest").weights for run in runs.values())
    differences = {name: float((one[name] - resized[name]).abs().max()) for name in one}
    # Softmax ignores the bias of a key: its gradient is float noise, which Adam scales to steps.
    others = {n: value for n, value in differences.items() if not n.endswith("k_proj.bias")}
    for what, values in (("the weights", differences), ("those but keys' biases", others)):
        name = max(values, key=lambda name: values[name])
        print(f"largest difference of {what}: {values[name]:.1e} ({name})")
    losses = [state_of(run)["epochs"][-1] for run in runs.values()]
    print(f"val_iou at the end: {losses[0]['val_iou']:.5f} and {losses[1]['val_iou']:.5f}")
    for line in resizes(runs["resized"]):
        print(line)


def resize(cluster: Cluster, run: Path, training: Future[Any]) -> None:
    """Let two nodes join while one worker trains, then drain one of them and kill the other."""
    wait_for_steps(run, 1, training)
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    wait_for_steps(run, 3, training)
    deadline = int(1000 * (time.time() + DRAIN_SECONDS))
    accepted, reason = GcsClient(cluster.address).drain_node(
        nodes[1].node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline
    )
    assert accepted, reason
    wait_for_steps(run, 2, training)
    cluster.remove_node(nodes[1])
    cluster.remove_node(nodes[0], allow_graceful=False)


def wait_for_steps(run: Path, num_workers: int, training: Future[Any]) -> None:
    """Wait until as many workers have done `PHASE_STEPS` steps."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if training.done():
            training.result()  # raises
            break
        starts = state_of(run).get("starts", []) if (run / "run.json").exists() else []
        files = sorted((run / "tensorboard").glob("*"))
        they_run = len(files) == len(starts) > 0 and starts[-1]["num_workers"] == num_workers
        if they_run and len(steps_of(files[-1])) >= PHASE_STEPS:
            return
        time.sleep(1)
    raise TimeoutError(f"{num_workers} workers of {run} have not done {PHASE_STEPS} steps")


def resizes(run: Path) -> list[str]:
    """What each change of the workers cost, from the event file of each start."""
    starts = [steps_of(path) for path in sorted((run / "tensorboard").glob("*"))]
    numbers = [start["num_workers"] for start in state_of(run)["starts"]]
    lines = []
    for place in range(1, len(starts)):
        before, after = starts[place - 1], starts[place]
        last = max(before)
        new = min(step for step in after if step > last)
        lines.append(
            f"{numbers[place - 1]} -> {numbers[place]} workers: {last - min(after) + 1} steps "
            f"done twice, {after[new] - before[last]:.1f} s between steps {last} and {new}"
        )
    return lines


def steps_of(file: Path) -> dict[int, float]:
    """The time of each step in an event file."""
    events = EventAccumulator(str(file))
    events.Reload()
    if "step/loss" not in events.Tags()["scalars"]:
        return {}
    return {point.step: point.wall_time for point in events.Scalars("step/loss")}


def state_of(run: Path) -> dict[str, Any]:
    """The content of run.json."""
    state: dict[str, Any] = json.loads((run / "run.json").read_text())
    return state


if __name__ == "__main__":
    main()
