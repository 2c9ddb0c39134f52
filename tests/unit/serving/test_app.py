"""`samray serve` waits for its port, which may be held for a moment. Real sockets."""

import socket
import threading

import pytest

from samray.errors import ConfigError
from samray.serving import app
from samray.serving.app import wait_for_port
from samray.serving.listener import Listener


@pytest.fixture
def held():
    """A socket that listens, as that of an endpoint that is just ending."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def test_a_port_that_is_held_for_a_moment_is_waited_for(held, capsys):
    port = held.getsockname()[1]
    ending = threading.Timer(0.5, held.close)
    ending.start()
    wait_for_port("127.0.0.1", port)
    assert held.fileno() == -1  # and no earlier
    ending.join()
    assert capsys.readouterr().err == (
        f"samray serve: waiting up to 15 s for port {port}, which another process holds\n"
    )
    wait_for_port("127.0.0.1", port)
    assert capsys.readouterr().err == ""


def test_a_connection_that_a_client_keeps_open_holds_no_port(capsys):
    """As a browser's, whose server has ended."""
    listener = Listener(None, "127.0.0.1", 0, grace_seconds=1).socket
    listener.listen()
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        accepted, _ = listener.accept()
        accepted.close()
        listener.close()
        wait_for_port("127.0.0.1", port)
    assert capsys.readouterr().err == ""


def test_a_port_that_stays_held_is_refused(held, monkeypatch):
    monkeypatch.setattr(app, "PORT_SECONDS", 0.3)
    port = held.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"--port {port} .*in use.*choose another --port"):
        wait_for_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused_at_once(capsys):
    with pytest.raises(ConfigError, match=r"on 192\.0\.2\.1 cannot be had"):
        wait_for_port("192.0.2.1", 8000)
    assert capsys.readouterr().err == ""
