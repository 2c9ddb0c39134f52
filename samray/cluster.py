"""Ray: start or join a cluster, and reject at once what it cannot run."""

import logging
import os
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util import ActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from samray.config import ScalingConfig
from samray.errors import ClusterError, ConfigError
from samray.storage import Place, make_folder, plain_errors, write_bytes

# Attempts to start a local Ray, which sometimes fails on a busy machine.
START_TRIES = 3


@dataclass(frozen=True)
class Resources:
    """The resources of each worker.

    Attributes:
        num_workers: number of processes.
        use_gpu: whether each gets a GPU, or the configured share of one.
        cpus_per_worker: CPUs of each, and its threads when it runs on CPUs.
        room: number of such workers that fit the cluster at once.
    """

    num_workers: int
    use_gpu: bool
    cpus_per_worker: int
    room: int


def start() -> None:
    """Join the cluster at RAY_ADDRESS (set in every Ray job), else start a local Ray.

    Without RAY_ADDRESS no running Ray is joined, as it may belong to someone else.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
        return
    for attempt in range(1, START_TRIES + 1):
        try:
            # At least two logical CPUs, so that two workers run on any laptop.
            ray.init(address="local", num_cpus=max(2, os.cpu_count() or 1), **options)
            return
        except Exception:
            if attempt == START_TRIES:
                raise
            ray.shutdown()


def plan_resources(scaling: ScalingConfig, num_trials: int = 1) -> Resources:
    """Return the resources of each worker.

    Args:
        num_trials: runs that share a single node's CPUs if `cpus_per_worker` is unset.

    Raises:
        ClusterError: the cluster has too few CPUs or GPUs; Ray itself would wait forever.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus = int(sum(node.get("CPU", 0) for node in nodes))
    workers, share = scaling.num_workers, scaling.gpus_per_worker
    gpu_places = [int(node.get("GPU", 0)) * int(1 / share + 1e-9) for node in nodes]
    enough = sum(gpu_places) >= workers
    use_gpu = scaling.device == "gpu" or (scaling.device == "auto" and enough)
    if scaling.device == "gpu" and not enough:
        raise ClusterError(
            f"--num-workers {workers} with --device gpu needs {workers * share:g} GPUs; the "
            f"cluster has {gpus}; ask for fewer workers or --device cpu"
        )
    per_worker = scaling.cpus_per_worker
    if per_worker is None:
        alone = len(nodes) == 1 and not use_gpu
        per_worker = max(1, cpus // (workers * num_trials)) if alone else 1
    room = sum(
        min(int(node.get("CPU", 0)) // per_worker, on_gpus if use_gpu else cpus)
        for node, on_gpus in zip(nodes, gpu_places, strict=True)
    )
    if room < workers:
        gpu = f" and {share:g} GPU" if use_gpu else ""
        raise ClusterError(
            f"{workers} workers of {per_worker} CPUs{gpu} each do not "
            f"fit the cluster, which has room for {room} ({cpus} CPUs, {gpus} GPUs on "
            f"{len(nodes)} nodes); lower --num-workers or scaling.cpus_per_worker"
        )
    return Resources(workers, use_gpu, per_worker, room)


def pool_size(device: str, num_items: int) -> int:
    """Return the number of actors: one per GPU, else per CPU, at most one per item."""
    totals = ray.cluster_resources()
    gpus = _num_gpus() if device != "cpu" else 0
    return max(1, min(num_items, gpus or int(totals.get("CPU", 1))))


def start_pool(actor_class: Any, device: str, num_items: int, *arguments: Any) -> ActorPool:
    """Start actors for independent items and wait until all are ready.

    Args:
        device: auto, cpu or gpu; auto uses GPUs if the cluster has any.
    """
    num_gpus = gpus_per_actor(device)
    actors = [
        actor_class.options(num_cpus=1, num_gpus=num_gpus).remote(*arguments)
        for _ in range(pool_size(device, num_items))
    ]
    ray.get([actor.__ray_ready__.remote() for actor in actors])
    return ActorPool(actors)


def gpus_per_actor(device: str) -> int:
    """Return 1 if actors for independent items use a GPU, else 0.

    Raises:
        ClusterError: `device` is gpu and the cluster has none.
    """
    num_gpus = 1 if device != "cpu" and _num_gpus() else 0
    if device == "gpu" and not num_gpus:
        raise ClusterError("scaling.device is gpu, but the cluster has no GPU; use auto or cpu")
    return num_gpus


def quiet_ray_data() -> None:
    """Configure Ray Data for samray's tasks, which have their own progress bar."""
    import ray.data  # here, as it takes a second to import and most stages do not need it

    # samray's bar counts images; Ray Data's bars count blocks and log many lines.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # The reservation keeps half of a small cluster for an idle operator: with two CPUs, only one
    # task would run at a time.
    context.op_resource_reservation_enabled = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def stop_pool(pool: ActorPool) -> None:
    """Stop the actors of an idle pool at once."""
    while pool.has_free():
        ray.kill(pool.pop_idle())


def actor_device() -> str:
    """Return torch's device of the calling actor; on a CPU, limit torch to one thread."""
    if ray.get_gpu_ids():
        return "cuda"
    torch.set_num_threads(1)  # the other actors use the other CPUs
    return "cpu"


def _num_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def require_shared(folder: Place, what: str) -> None:
    """Create an output folder and check that every node sees the files written to it.

    Raises:
        ConfigError: it cannot be created, or naming the nodes that do not see it.
    """
    make_folder(folder, what)
    token = folder / f".samray-{uuid.uuid4().hex}"
    write_bytes(token, b"seen by every node?")
    try:
        require_visible(token, what)
    finally:
        token.unlink(missing_ok=True)


def require_visible(file: Place, what: str) -> None:
    """Check that every node sees a file that this node sees.

    Raises:
        ConfigError: naming the nodes that do not.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    checks = {
        f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})": _exists.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(file)
        for node in nodes
    }
    blind = [name for name, check in checks.items() if not ray.get(check)]
    if blind:
        raise ConfigError(
            f"{what}: {file.parent} is not shared: node {', '.join(blind)} cannot see its "
            "files; use a folder on a file system that every node mounts"
        )


@ray.remote(num_cpus=0)
def _exists(path: Place) -> bool:
    with plain_errors(str(path)):
        return path.exists()
