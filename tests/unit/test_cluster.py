"""Joining Ray: environments that it cannot work in, and clusters that are busy."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ray

from samray import cluster
from samray.errors import ClusterError, ConfigError


@pytest.fixture
def environment(monkeypatch):
    """An environment without Ray's variables."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def no_ray(*_, **__):
        pytest.fail("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)
    return monkeypatch


def refusal():
    with pytest.raises(ClusterError) as caught:
        cluster.start()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_too_long_for_sockets_is_named(environment, tmp_path, variable):
    long = tmp_path / ("t" * 90)
    environment.setenv(variable, str(long))
    message = refusal()
    assert message.startswith(f"{variable}: {long} is ")
    assert "bytes too long" in message
    assert not long.exists()


def test_the_length_of_a_temporary_folder_is_what_ray_allows(environment):
    """The shortest path that is refused is one byte longer than the longest that Ray accepts."""
    from ray._private.utils import validate_socket_filepath

    longest = "/" + "t" * (cluster.MAX_SOCKET - len(cluster.SOCKET) - 2)
    validate_socket_filepath(f"{longest}/{cluster.SOCKET}")
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(f"{longest}t/{cluster.SOCKET}")
    environment.setenv("RAY_TMPDIR", f"{longest}t")
    assert "is 1 bytes too long" in refusal()


def test_a_temporary_folder_that_cannot_be_written_is_named(environment, tmp_path):
    (tmp_path / "ray").write_text("")
    environment.setenv("RAY_TMPDIR", str(tmp_path))
    environment.setattr(cluster, "MAX_SOCKET", 1000)
    assert refusal().startswith(f"RAY_TMPDIR: {tmp_path}: Ray cannot write {tmp_path / 'ray'}")


def test_a_home_that_cannot_be_written_is_named(environment):
    environment.setenv("HOME", "/proc")
    assert refusal().startswith("HOME: /proc: Ray cannot write its access token there")
    environment.setenv("RAY_AUTH_MODE", "disabled")
    cluster.require_home()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:8265", "is an address for `ray job submit`"),
        ("https://ray.example.org", "is an address for `ray job submit`"),
        ("127.0.0.1", "is no address of a cluster"),
        ("127.0.0.1:port", "is no address of a cluster"),
        ("ssh://127.0.0.1:22", "is no address of a cluster"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there"),
    ],
)
def test_an_address_that_is_no_cluster_is_named(environment, address, message):
    environment.setenv("RAY_ADDRESS", address)
    assert refusal().startswith(f"RAY_ADDRESS: {address}")
    assert message in refusal()


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_gone_is_answered_at_once(environment, scheme):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{closed.getsockname()[1]}"
    environment.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    assert f"RAY_ADDRESS: {address}: no Ray cluster answers there" in refusal()
    assert time.monotonic() - began < 5


def test_a_host_that_never_answers_is_given_up(environment):
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        others = [socket.socket() for _ in range(4)]  # fill the queue of connections
        for other in others:
            other.setblocking(False)
            other.connect_ex(address)
        environment.setenv("RAY_ADDRESS", "{}:{}".format(*address))
        environment.setattr(cluster, "CONNECT_SECONDS", 0.5)
        assert "no Ray cluster answers there (timed out)" in refusal()
        for other in others:
            other.close()


def test_a_web_server_is_no_cluster(environment):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        environment.setenv("RAY_ADDRESS", f"127.0.0.1:{server.server_port}")
        assert "is a web server, such as Ray's dashboard, and no cluster" in refusal()


@pytest.mark.parametrize("address", ["auto", "local"])
def test_rays_own_words_are_passed_on(address):
    cluster.require_answer(address)


@ray.remote
class Holder:
    """Holds resources of the cluster, as another user's actor."""

    def ready(self):
        return True


@ray.remote
class Doubler:
    def double(self, number, seconds=0.0):
        time.sleep(seconds)
        return 2 * number, os.getpid()


def doubled(pool, numbers, seconds=0.0):
    """Return the results in order, and how many actors gave them."""
    found = dict(pool.map(lambda actor, n: actor.double.remote(n, seconds), numbers))
    results, actors = zip(*(found[index] for index in range(len(numbers))), strict=True)
    return list(results), len(set(actors))


@pytest.fixture
def hold(ray_cluster):
    """`hold(cpus)`: an actor of someone else's that holds CPUs until the test ends."""
    holders = []

    def start(cpus):
        holders.append(Holder.options(num_cpus=cpus).remote())
        ray.get(holders[-1].ready.remote())
        return holders[-1]

    yield start
    for holder in holders:
        ray.kill(holder)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_pool_starts_with_one_actor_and_grows_where_that_pays(hold):
    """Into the CPUs that are free, and into those that become free later."""
    holder = hold(2.5)
    pool = cluster.start_pool(Doubler, "cpu", 100)
    assert doubled(pool, [3, 1, 2]) == ([6, 2, 4], 1)
    threading.Timer(2, ray.kill, [holder]).start()
    results, actors = doubled(pool, list(range(80)), seconds=0.25)
    assert results == list(range(0, 160, 2))
    assert actors == 4
    pool.stop()


def test_a_busy_cluster_is_waited_for_in_words_and_given_up(hold, monkeypatch, capsys):
    monkeypatch.setattr(cluster, "SAY_SECONDS", 0.3)
    monkeypatch.setattr(cluster, "FREE_SECONDS", 1.0)
    holder = hold(3.5)
    with pytest.raises(ClusterError) as caught:
        cluster.start_pool(Doubler, "cpu", 10)
    assert str(caught.value).startswith(
        "the cluster had no 1 free CPU for 1 s: 0.5 of 4 CPU are free on all nodes, the others are "
        "held by "
    )
    assert capsys.readouterr().err.startswith(
        "samray: waiting up to 1 s for 1 free CPU; 0.5 of 4 CPU are free"
    )
    monkeypatch.setattr(cluster, "FREE_SECONDS", 60.0)
    threading.Timer(1, ray.kill, [holder]).start()
    cluster.wait_for_room(2, 2, 0)
    assert "waiting up to 60 s for 2 x 2 free CPU; " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_setting_to_change(tmp_path, monkeypatch):
    def refuse(*given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cluster, "write_bytes", refuse)  # a test may run as root
    with pytest.raises(ConfigError, match=r"embeddings\.cache_dir: .* cannot be written \(Perm"):
        cluster.require_shared(tmp_path, "embeddings.cache_dir")
