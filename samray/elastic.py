"""Ray Train's workers that are restarted, become more and become fewer, by rules of our own.

Ray retries a mistake in the data like a dead machine, counts what other jobs hold as free, ends the
workers' work without a checkpoint to let more of them start, and waits for ever, and silently, for
room. This file alone knows Ray Train's inner classes; Ray is pinned.

`ElasticTrainer` starts a controller (an actor of Ray Train), in which `Restarts` decides after a
failure, `Room` on the number of workers, and `Group` knows the workers that run.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import ray
import ray.train
import ray.train.torch
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.exceptions import (
    InsufficientClusterResourcesError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, ReschedulingState
from ray.train.v2._internal.execution.failure_handling import (
    DefaultFailurePolicy,
    FailureDecision,
)
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from ray.util.placement_group import (
    get_current_placement_group,
    placement_group_table,
    remove_placement_group,
)

from samray.errors import ClusterError, SamrayError, TrainingError

LOOK_SECONDS = 60.0  # between two looks whether there is room for more workers
SAY_SECONDS = 5.0  # without room for the fewest workers, before a line says so
WAIT_SECONDS = 900.0  # without such room, before the run ends: a new machine takes minutes
SAVE_AGAIN_SECONDS = 30.0  # between checkpoints while a machine is about to be taken away
ABORT_SECONDS = 20  # for the workers of an interrupted run to end
# Of workers that do not start although there is room, as a machine that died a moment ago counts
# until Ray has missed it, which takes about half a minute; Ray's own limit is a minute each.
START_TRIES, START_SECONDS = 6, 20

# In a worker's process: set when the controller wants a checkpoint at the next step, cleared once
# there is one.
wanted = threading.Event()

Send = Callable[[dict[str, Any]], None]


def want_checkpoint() -> None:
    """Ask the worker in whose process this runs for a checkpoint."""
    wanted.set()


def is_checkpoint_wanted() -> bool:
    """Whether it is not written yet."""
    return wanted.is_set()


class ElasticTrainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]
    """A trainer with our rules, whose `fit` raises `SamrayError`s, and KeyboardInterrupt on Ctrl-C.

    Ray Train's own handler of SIGINT raises SystemExit(0) in the middle of `fit`, and stays
    installed after it.

    Args:
        send: receives {"event": "restart" | "waiting" | "warning", "text": ...}, in the controller;
            when workers start {"event": "placement", "id": ...}, the group of their resources.
        checkpoint: says from where a restart goes on, e.g. "epoch 2, step 14"; called in the
            controller, too.
        arguments: of `TorchTrainer`.
    """

    controller: Any = None

    def __init__(self, *, send: Send, checkpoint: Callable[[], str], **arguments: Any) -> None:
        run_config = arguments["run_config"]
        run_config.callbacks = [Group(send)]
        super().__init__(**arguments)
        self._policies = {
            "failure_policy": Restarts(run_config.failure_config, send, checkpoint),
            "scaling_policy": Room(arguments["scaling_config"], send, SAY_SECONDS, WAIT_SECONDS),
        }

    def fit(self) -> Any:
        """Train; return Ray's result.

        Raises:
            SamrayError: one that a worker raised, or workers died too often, or there is no room.
        """
        os.environ.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(START_SECONDS))
        try:
            return super().fit()
        except ray.train.TrainingFailedError as exc:
            failure = find_cause(exc) or explained(exc)
            if failure is None:
                raise
            raise failure from exc
        except ray.exceptions.RayActorError as exc:
            raise TrainingError(
                "the process of Ray Train that leads the workers died, or its machine did; "
                "continue with --resume"
            ) from exc

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner looks for the controller in the Ray that was started last on this machine:
        # where that is another one, it would end our workers. The other one serves datasets of Ray,
        # which no worker reads, from a process that takes seconds of a CPU.
        unwanted = PlacementGroupCleanerCallback | DatasetsCallback
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unwanted)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**arguments | self._policies)

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def abort(self) -> None:
        """Stop the workers of an interrupted `fit`."""
        if self.controller is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # the controller ends itself
                ray.get(self.controller.abort.remote(), timeout=ABORT_SECONDS)


class Restarts(DefaultFailurePolicy):  # type: ignore[misc]
    """Restarts the workers after a failure, but not after a `SamrayError`.

    `max_failures` counts those in a row without a new checkpoint in between, so that a long run
    outlives any number of machines, and a failure that comes again and again ends.
    """

    def __init__(self, failure_config: Any, send: Send, checkpoint: Callable[[], str]) -> None:
        super().__init__(failure_config)
        self._send, self._checkpoint = send, checkpoint
        self._last: str | None = None

    def make_decision(self, training_failed_error: Exception) -> Any:
        """Return whether to restart, and tell it."""
        if find_cause(training_failed_error) is not None:
            return FailureDecision.RAISE
        checkpoint = "the last checkpoint"
        with contextlib.suppress(Exception):  # the storage may have caused the failure
            checkpoint = self._checkpoint()
        if checkpoint != self._last:
            self._worker_group_failures = self._controller_failures = 0
        self._last = checkpoint
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            text = f"{describe(training_failed_error)}; the workers go on from {checkpoint}"
            self._send({"event": "restart", "text": text})
        return decision

    def _is_retryable_error(self, training_failed_error: Exception) -> bool:
        """Also where one died while they started, which is an error of the controller."""
        reason = getattr(training_failed_error, "controller_failure", None)
        return not isinstance(reason, InsufficientClusterResourcesError)


class Group(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Knows the workers that run, in the controller's process; asks them for checkpoints.

    Attributes:
        workers, placement: by rank, and the placement group that holds their resources. Of the
            class, as Ray passes this object and `Room` on as copies.
    """

    workers: ClassVar[list[Any]] = []
    placement: ClassVar[Any] = None

    def __init__(self, send: Send) -> None:
        self._send, self._asked = send, float("-inf")

    @classmethod
    def nodes(cls) -> list[str]:
        """The nodes that hold the workers' resources, once for each worker.

        Not always the workers' own: Ray may place elsewhere what a dead machine held.
        """
        if cls.placement is None:
            return []
        held = placement_group_table(cls.placement)["bundles_to_node_id"]
        return [node_id for node_id in held.values() if node_id]

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Remember the workers."""
        Group.workers = list(workers)
        Group.placement = ray.get(workers[0].execute_async(get_current_placement_group))
        self._send({"event": "placement", "id": Group.placement.id.hex()})
        return {}

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """Forget them."""
        Group.workers, Group.placement = [], None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ask for checkpoints while one of the machines is about to be taken away.

        Called again and again, as long as that lasts.
        """
        if isinstance(current_state, ReschedulingState):
            self._remove_remains()
        if not isinstance(current_state, PreemptingState) or not Group.workers:
            return
        if not isinstance(previous_state, PreemptingState):
            ranks = current_state.preemption_info.preempted_ranks
            text = f"the machine of {_workers(ranks)} is about to be taken away; a checkpoint first"
            self._send({"event": "warning", "text": text})
            self._asked = float("-inf")
        if time.monotonic() - self._asked >= SAVE_AGAIN_SECONDS:
            self._asked = time.monotonic()
            Group.workers[0].execute_async(want_checkpoint)

    def _remove_remains(self) -> None:
        """End what is left of workers that did not start; Ray would leave their resources held."""
        for worker in Group.workers:
            ray.kill(worker.actor)
        if Group.placement is not None:
            remove_placement_group(Group.placement)
        Group.workers, Group.placement = [], None


class Room(ScalingPolicy):  # type: ignore[misc]
    """Starts as many workers as the cluster has room for, from the lowest to the highest number.

    What counts is what is free on machines that stay, and what the workers hold themselves. Where
    there is room for more than run, they write a checkpoint, and start again with the others.

    Args:
        say_seconds, wait_seconds: see `SAY_SECONDS`, `WAIT_SECONDS`.
    """

    def __init__(
        self, scaling_config: Any, send: Send, say_seconds: float, wait_seconds: float
    ) -> None:
        super().__init__(scaling_config)
        self._coordinator_client: Any = None
        self._send = send
        self._say_seconds, self._wait_seconds = say_seconds, wait_seconds
        self._waits_since: float | None = None
        self._said = False
        self._looked = float("-inf")
        self._asked = False

    def after_controller_start(self, train_run_context: Any) -> None:
        """Remember the run; Ray's own would ask for machines at once, even where all fits.

        What takes the request is another process, whose start takes seconds.
        """
        self._requester_id = f"train-{train_run_context.run_id}"

    def make_decision_for_non_running_worker_group(self) -> Any:
        """Return to start the workers, or nothing where there is no room yet.

        Raises:
            ClusterError: there has been none for `wait_seconds`.
        """
        self._asked = False
        room, least = self._room(), self.scaling_config.min_workers
        if room < self.scaling_config.max_workers:
            self._ask_for_machines()
        if room >= least:
            self._waits_since, self._said = None, False
            return self._resize(room)
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        waited = now - self._waits_since
        if waited >= self._say_seconds and not self._said:
            text = (
                f"waiting up to {self._wait_seconds:.0f} s for room for {number_of(least)}; there "
                f"is room for {room}"
            )
            self._send({"event": "waiting", "text": text})
            self._said = True
        if waited >= self._wait_seconds:
            raise ClusterError(
                f"the cluster had no room for {number_of(least)} for {self._wait_seconds:.0f} s, "
                f"only for {room}; start more nodes and continue with --resume, or continue with "
                "--resume and fewer --num-workers"
            )
        time.sleep(0.5)  # Ray asks again at once, and would keep a CPU busy
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Return to start again with more workers, once they have written a checkpoint."""
        if len(Group.workers) < self.scaling_config.max_workers:
            self._ask_for_machines()
        first = worker_group_state.workers[0]
        if self._asked:
            with contextlib.suppress(ray.exceptions.RayError):  # it died, as Ray sees soon
                self._asked = ray.get(first.execute_async(is_checkpoint_wanted), timeout=10)
            if self._asked:
                return NoopDecision()
            room = self._room()
            return self._resize(room) if room > len(Group.workers) else NoopDecision()
        now = time.monotonic()
        since = now - max(worker_group_state.start_time, self._looked)
        if since >= self.scaling_config.elastic_resize_monitor_interval_s:
            self._looked = now
            if self._room() > len(Group.workers):
                self._asked = True
                first.execute_async(want_checkpoint)
        return NoopDecision()

    def _ask_for_machines(self) -> None:
        """Tell a cluster that starts machines on demand what the highest number needs."""
        if self._coordinator_client is None:
            self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        self._maybe_send_resource_request()

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers)

    def _resize(self, num_workers: int) -> Any:
        return ResizeDecision(num_workers, self.scaling_config._resources_per_worker_not_none)

    def _room(self) -> int:
        """Number of workers that there is room for, at most the highest."""
        free = available_resources_per_node()
        for node in ray_state.get_draining_nodes():
            free.pop(node, None)
        each = self.scaling_config._resources_per_worker_not_none
        for node_id in Group.nodes():
            node = free.get(node_id)
            for name, amount in each.items() if node else ():
                node[name] = node.get(name, 0) + amount
        room = sum(
            min(int(node.get(name, 0) / amount + 1e-6) for name, amount in each.items() if amount)
            for node in free.values()
        )
        return int(min(room, self.scaling_config.max_workers))


def find_cause(failure: BaseException | None) -> SamrayError | None:
    """Return the `SamrayError` that made workers fail, if one did."""
    workers = list(getattr(failure, "worker_failures", {}).values())
    for exc in [*workers, getattr(failure, "controller_failure", None), failure]:
        while exc is not None:
            if isinstance(exc, SamrayError):
                return exc
            exc = getattr(exc, "cause", None) or exc.__cause__
    return None


def describe(failure: Exception) -> str:
    """Say in a few words what failed."""
    if isinstance(failure, ray.train.PreemptionError):
        return f"the machine of {_workers(failure.preemption_info.preempted_ranks)} goes away"
    failures = getattr(failure, "worker_failures", {})
    died = {
        rank: exc for rank, exc in failures.items() if isinstance(exc, WorkerHealthCheckFailedError)
    }
    if died:
        words = str(next(iter(died.values())).health_check_failure)
        if "node" in words and ("died" in words or "dead" in words) and "its node" in words:
            return f"the machine of {_workers(list(died))} is gone"
        if "memory" in words and "running low" in words:
            return f"{_workers(list(died))} was ended, as its machine ran out of memory"
        return f"the process of {_workers(list(died))} died"
    for rank, exc in failures.items():
        if _is_of_gloo(exc):
            hung = "timed out" in str(exc).lower()
            what = "waited in vain for one that hung" if hung else "lost one that died"
            return f"worker {rank} {what}"
        return f"worker {rank} failed: {_first_line(exc)}"
    return (
        f"the workers did not start: {_first_line(getattr(failure, 'controller_failure', failure))}"
    )


def explained(failure: Exception) -> SamrayError | None:
    """What to do where workers died; None for an error in the code, which is shown as it is."""
    died = getattr(failure, "worker_failures", {}).values()
    if any(isinstance(exc, WorkerHealthCheckFailedError) or _is_of_gloo(exc) for exc in died):
        return TrainingError(
            f"{describe(failure)}, once more than scaling.max_restarts since the last checkpoint; "
            "mend its machine, or lower what a step needs of memory, and continue with --resume"
        )
    if isinstance(getattr(failure, "controller_failure", None), WorkerGroupStartupTimeoutError):
        return ClusterError(
            "the workers could not be started, as others took their CPUs or GPUs meanwhile; "
            "continue with --resume when these are free"
        )
    return None


def _is_of_gloo(exc: BaseException) -> bool:
    """Whether it comes from torch's connections between CPU workers."""
    return isinstance(exc, RuntimeError) and "gloo" in str(exc)


def number_of(workers: int) -> str:
    """Return "1 worker" or "2 workers"."""
    return f"{workers} worker{'s' if workers > 1 else ''}"


def _workers(ranks: list[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return (lines[0] if lines else type(exc).__name__)[:200].rstrip(".")
