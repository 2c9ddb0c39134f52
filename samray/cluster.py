"""Ray: start or join a cluster, and reject at once what it cannot run."""

import collections
import contextlib
import logging
import os
import socket
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from ray.util.state import list_actors

from samray.config import ScalingConfig
from samray.errors import ClusterError, ConfigError, StorageError
from samray.storage import Place, make_folder, plain_errors, write_bytes

# Attempts to start a local Ray, which sometimes fails on a busy machine.
START_TRIES = 3
CONNECT_SECONDS = 15.0  # for the cluster at RAY_ADDRESS to answer
SAY_SECONDS = 5.0  # without free resources, before a line says what is waited for
FREE_SECONDS = 120.0  # without free resources, before the stage ends
# The longest path of a local Ray's sockets below its temporary folder.
SOCKET = "ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
MAX_SOCKET = 107 if sys.platform.startswith("linux") else 103  # bytes, for AF_UNIX


@dataclass(frozen=True)
class Resources:
    """The resources of each worker.

    Attributes:
        num_workers: number of processes; of a range, the lowest.
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

    Raises:
        ClusterError: naming the environment variable that has to be changed.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        require_answer(address)
    if address in (None, "", "local"):
        require_temporary_folder()
        require_home()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(**options)
        except (ConnectionError, ValueError) as exc:
            raise ClusterError(f"RAY_ADDRESS: {address}: {_one_line(exc)}; {_JOIN}") from exc
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


def require_answer(address: str) -> None:
    """Check that a cluster answers at RAY_ADDRESS; Ray itself would try for a quarter of an hour.

    Raises:
        ClusterError: it is no address of a cluster, or nothing answers there.
    """
    if address in ("auto", "local"):
        return
    scheme, _, place = address.rpartition("://")
    what = f"RAY_ADDRESS: {address}"
    if scheme in ("http", "https"):
        raise ClusterError(
            f"{what} is an address for `ray job submit`, as RAY_API_SERVER_ADDRESS; {_JOIN}"
        )
    try:
        url = urllib.parse.urlsplit(f"//{place}")
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if scheme not in ("", "ray") or not host or not port:
        raise ClusterError(f"{what} is no address of a cluster; {_JOIN}")
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(1)
            connection.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(OSError):  # Ray, which speaks HTTP/2, may hang up
                if connection.recv(7) == b"HTTP/1.":
                    raise ClusterError(
                        f"{what} is a web server, such as Ray's dashboard, and no cluster; {_JOIN}"
                    )
    except OSError as exc:
        raise ClusterError(
            f"{what}: no Ray cluster answers there ({exc.strerror or exc}); start it, or {_JOIN}"
        ) from exc


def require_temporary_folder() -> None:
    """Check that a local Ray can create its sockets and files in the temporary folder.

    Raises:
        ClusterError: its path is too long, or it cannot be written.
    """
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ:
            folder, what = os.environ[variable], f"{variable}: {os.environ[variable]}"
            break
    else:
        folder, what = "/tmp", "RAY_TMPDIR is not set, and /tmp"
    surplus = len(os.fsencode(os.path.join(os.path.abspath(folder), SOCKET))) - MAX_SOCKET
    if surplus > 0:
        raise ClusterError(
            f"{what} is {surplus} bytes too long for the sockets of Ray; set RAY_TMPDIR to a "
            "shorter folder, e.g. /tmp"
        )
    try:
        Path(folder, "ray").mkdir(parents=True, exist_ok=True)
        writable = os.access(Path(folder, "ray"), os.W_OK | os.X_OK)
        reason = "no permission"
    except OSError as exc:
        writable, reason = False, str(exc.strerror)
    if not writable:
        raise ClusterError(
            f"{what}: Ray cannot write {Path(folder, 'ray')} ({reason}); set RAY_TMPDIR to a short "
            "folder that you can write"
        )


def require_home() -> None:
    """Check that a local Ray can keep its access token in the home folder.

    Raises:
        ClusterError: the home folder cannot be written.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        folder = Path("~/.ray").expanduser()
        if not (folder / "auth_token").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(13, "no permission")
    except (OSError, RuntimeError) as exc:  # RuntimeError: the user has no home folder
        home = os.environ.get("HOME")
        raise ClusterError(
            f"HOME: {home or 'is not set'}: Ray cannot write its access token there "
            f"({getattr(exc, 'strerror', None) or exc}); set HOME to a folder that you can write"
        ) from exc


_JOIN = (
    "set RAY_ADDRESS to HOST:PORT of a running cluster, e.g. 10.0.0.1:6379, or unset it to start a "
    "local Ray"
)


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200].rstrip(".")


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
    workers, share = scaling.min_workers, scaling.gpus_per_worker
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
        per_worker = max(1, cpus // (scaling.max_workers * num_trials)) if alone else 1
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


class Pool:
    """Actors for independent items: one at first, all once the work left takes longer than a start.

    Starting an actor costs seconds of a CPU, which few or quick items do not pay back. Actors that
    find no free resources join when they do.

    Args:
        create: creates an actor.
        limit: of actors.
    """

    def __init__(self, create: Callable[[], Any], limit: int) -> None:
        self.limit = limit
        self._create = create
        self._actors: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        started = time.perf_counter()
        self._start(1)
        (ref,), _ = ray.wait(list(self._starting), num_returns=1)
        self._join(ref)
        self._start_seconds = time.perf_counter() - started

    def map(self, call: Callable[[Any, Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield index and result of each item, in the order in which they are done.

        Args:
            call: receives an actor and an item; returns an `ObjectRef`.
        """
        waiting = collections.deque(enumerate(items))
        running: dict[Any, tuple[int, Any]] = {}
        done, began = 0, time.perf_counter()
        while waiting or running:
            while waiting and self._idle:
                index, item = waiting.popleft()
                actor = self._idle.pop()
                running[call(actor, item)] = index, actor
            self._grow(len(waiting), done, time.perf_counter() - began)
            ready, _ = ray.wait(
                [*running, *(self._starting if waiting else ())],
                num_returns=1,
                timeout=self._start_seconds,  # then the first item is a long one
            )
            if ready and ready[0] in self._starting:
                self._join(ready[0])
            elif ready:
                index, actor = running.pop(ready[0])
                self._idle.append(actor)
                done += 1
                yield index, ray.get(ready[0])

    def stop(self) -> None:
        """Stop the actors at once."""
        for actor in self._actors:
            ray.kill(actor)

    def _grow(self, waiting: int, done: int, seconds: float) -> None:
        """Start the other actors if the items that wait will take longer than a start.

        Args:
            done: items finished in `seconds`.
        """
        left = seconds / done * waiting if done > 1 else seconds  # the first item is often slower
        if left > self._start_seconds:
            self._start(min(self.limit - len(self._actors), waiting))

    def _start(self, count: int) -> None:
        for _ in range(count):
            actor = self._create()
            self._actors.append(actor)
            self._starting[actor.__ray_ready__.remote()] = actor

    def _join(self, ref: Any) -> None:
        ray.get(ref)  # raises if the actor could not be created
        self._idle.append(self._starting.pop(ref))


def start_pool(actor_class: Any, device: str, num_items: int, *arguments: Any) -> Pool:
    """Start a pool for independent items; return when its first actor is ready.

    Args:
        device: auto, cpu or gpu; auto uses GPUs if the cluster has any.

    Raises:
        ClusterError: nothing becomes free within `FREE_SECONDS`.
    """
    num_gpus = gpus_per_actor(device)
    wait_for_room(1, 1, num_gpus)
    options = actor_class.options(num_cpus=1, num_gpus=num_gpus)
    return Pool(lambda: options.remote(*arguments), pool_size(device, num_items))


def wait_for_room(count: int, num_cpus: float, num_gpus: float) -> None:
    """Wait until the cluster has free CPUs and GPUs; Ray itself would wait silently for ever.

    Args:
        count: processes that start together.
        num_cpus, num_gpus: of each.

    Raises:
        ClusterError: they are not free after `FREE_SECONDS`; the message says who has them.
    """
    wanted = {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
    group = placement_group([dict(wanted) for _ in range(count)])
    try:
        if group.wait(SAY_SECONDS):
            return
        times = f"{count} x " if count > 1 else ""  # each on one node
        need = " and ".join(f"{times}{number:g} free {name}" for name, number in wanted.items())
        print(
            f"samray: waiting up to {FREE_SECONDS:.0f} s for {need}; {_occupied(wanted)}",
            file=sys.stderr,
            flush=True,
        )
        if not group.wait(max(0.0, FREE_SECONDS - SAY_SECONDS)):
            raise ClusterError(
                f"the cluster had no {need} for {FREE_SECONDS:.0f} s: {_occupied(wanted)}; wait "
                "until they end, stop them, or start more nodes"
            )
    finally:
        remove_placement_group(group)


def _occupied(names: Iterable[str]) -> str:
    """Which resources of the cluster are free, and the actors that hold the others."""
    totals, free = ray.cluster_resources(), ray.available_resources()
    shown = ", ".join(
        f"{free.get(name, 0):g} of {totals.get(name, 0):g} {name} are free" for name in names
    )
    held: collections.Counter[str] = collections.Counter()
    with contextlib.suppress(Exception):  # it asks the dashboard, which may not run
        alive = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=5)
        for actor in alive:
            if any((actor.required_resources or {}).get(name) for name in names):
                held[actor.class_name.rpartition(".")[2]] += 1
    actors = ", ".join(f"{number} {name}" for name, number in held.most_common(5))
    return f"{shown} on all nodes, the others are held by {actors or 'tasks or other jobs'}"


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


def actor_device() -> str:
    """Return torch's device of the calling actor; on a CPU, limit torch to one thread."""
    if ray.get_gpu_ids():
        return "cuda"
    import torch  # here, as it takes two seconds to import, and `prepare` does without it

    torch.set_num_threads(1)  # the other actors use the other CPUs
    return "cpu"


def _num_gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def require_shared(folder: Place, what: str) -> None:
    """Create an output folder and check that every node sees the files written to it.

    Raises:
        ConfigError: it cannot be written, or naming the nodes that do not see it.
    """
    make_folder(folder, what)
    token = folder / f".samray-{uuid.uuid4().hex}"
    try:
        write_bytes(token, b"seen by every node?")
    except StorageError:
        raise
    except OSError as exc:
        raise ConfigError(
            f"{what}: {folder} cannot be written ({exc.strerror}); choose a folder that you can "
            "write"
        ) from exc
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
