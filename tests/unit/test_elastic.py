"""Which failures restart the workers of a run, and for how many the cluster has room."""

import time
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.util.placement_group import placement_group, remove_placement_group

from samray import elastic
from samray.errors import ClusterError, TrainingError


def death(rank=1):
    return ray.train.WorkerGroupError(
        "", {rank: WorkerHealthCheckFailedError("health check", ActorDiedError())}
    )


def preemption():
    return ray.train.PreemptionError(ray.train.PreemptionInfo(None, {"node": [2, 0]}))


class Run:
    """A policy with two restarts, what it says, and where the run is."""

    def __init__(self):
        self.said, self.checkpoint = [], "the beginning"
        failures = ray.train.FailureConfig(max_failures=2, controller_failure_limit=3)
        self.policy = elastic.Restarts(failures, self.said.append, lambda: self.checkpoint)

    def restarts_after(self, failure):
        return self.policy.make_decision(failure) == FailureDecision.RETRY


def test_deaths_in_a_row_end_a_run_and_a_checkpoint_begins_a_new_row():
    run = Run()
    assert [run.restarts_after(death()) for _ in range(3)] == [True, True, False]
    assert run.said[0] == {
        "event": "restart",
        "text": "the process of worker 1 died; the workers go on from the beginning",
    }
    assert len(run.said) == 2
    run.checkpoint = "epoch 2, step 14"
    assert run.restarts_after(death())
    assert run.said[-1]["text"].endswith("died; the workers go on from epoch 2, step 14")


def test_a_machine_that_is_taken_away_counts_not():
    run = Run()
    assert all(run.restarts_after(preemption()) for _ in range(5))
    assert run.said[0]["text"].startswith("the machine of workers 0, 2 goes away; ")


@pytest.mark.parametrize("others", [{}, {0: RuntimeError("connection closed by peer")}])
def test_a_mistake_ends_a_run_at_once_whatever_the_other_workers_say(others):
    run = Run()
    mistake = TrainingError("the gradient is no longer a finite number")
    failure = ray.train.WorkerGroupError("", {**others, 1: mistake})
    assert not run.restarts_after(failure)
    assert run.said == []
    assert elastic.find_cause(failure) is mistake
    assert elastic.find_cause(ray.train.ControllerError(ClusterError("no room"))) is not None
    assert elastic.find_cause(death()) is None


def test_an_error_in_the_code_is_shown_and_a_death_is_explained():
    failure = ray.train.WorkerGroupError("", {0: KeyError("name")})
    assert elastic.explained(failure) is None
    assert elastic.describe(failure) == "worker 0 failed: 'name'"
    message = str(elastic.explained(death(3)))
    assert message.startswith("the process of worker 3 died, once more than scaling.max_restarts")
    assert "--resume" in message
    not_started = ray.train.ControllerError(WorkerGroupStartupTimeoutError(3))
    assert isinstance(elastic.explained(not_started), ClusterError)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("Timed out waiting 600000ms for send operation", "waited in vain for one that hung"),
        ("Connection closed by peer [127.0.0.1]:23456", "lost one that died"),
    ],
)
def test_what_the_others_say_of_a_worker_that_hangs_or_died(words, said):
    """As gloo words it in torch 2.14."""
    error = RuntimeError(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] {words}")
    failure = ray.train.WorkerGroupError("", {1: error})
    assert elastic.describe(failure) == f"worker 1 {said}"
    assert isinstance(elastic.explained(failure), TrainingError)


@ray.remote
class Other:
    """Holds CPUs, as another user's actor."""

    def ready(self):
        return True


def test_room_is_what_others_leave(ray_cluster):
    """Ray's own policy would count all CPUs, and stop the workers to start more than fit."""
    said = []
    scaling = ray.train.ScalingConfig(num_workers=(1, 3), resources_per_worker={"CPU": 1})
    room = elastic.Room(scaling, said.append, 0.0, 60.0)
    room.after_controller_start(SimpleNamespace(run_id="test"))
    wait_for(lambda: number_of(room) == 3)
    other = Other.options(num_cpus=2.5).remote()
    ray.get(other.ready.remote())
    wait_for(lambda: number_of(room) == 1)
    ray.kill(other)
    other = Other.options(num_cpus=4).remote()
    ray.get(other.ready.remote())
    wait_for(lambda: number_of(room) == 0)
    assert said[0]["text"] == "waiting up to 60 s for room for 1 worker; there is room for 0"
    assert len(said) == 1
    impatient = elastic.Room(scaling, print, 0.0, 0.0)
    impatient.after_controller_start(SimpleNamespace(run_id="test"))
    with pytest.raises(ClusterError, match="no room for 1 worker for 0 s, only for 0"):
        impatient.make_decision_for_non_running_worker_group()
    ray.kill(other)
    wait_for(lambda: number_of(room) == 3)


def test_what_the_workers_hold_counts_wherever_it_is(ray_cluster, monkeypatch):
    """After a machine died, Ray has taken their resources on another one before they start."""
    scaling = ray.train.ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1})
    room = elastic.Room(scaling, print, 0.0, 60.0)
    room.after_controller_start(SimpleNamespace(run_id="test"))
    wait_for(lambda: number_of(room) == 4)
    held = placement_group([{"CPU": 1}] * 3)
    ray.get(held.ready())
    wait_for(lambda: number_of(room) == 1)
    monkeypatch.setattr(elastic.Group, "placement", held)
    assert number_of(room) == 4
    remove_placement_group(held)


def number_of(room):
    """Workers that would be started; 0 without a decision."""
    return getattr(room.make_decision_for_non_running_worker_group(), "num_workers", 0)


def wait_for(condition):
    """The cluster's view of what is free may be seconds old."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
