"""Ports for the servers that tests start."""

import contextlib
import random
import socket

# Below the range from which systems choose the ports of outgoing connections: one of those could
# take a port between its choice here and the server's start.
RANGE = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on now, on any address."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().choice(RANGE)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            ports += [port] if port not in ports else []
    return ports


def free_port() -> int:
    """Return one such port."""
    (port,) = free_ports(1)
    return port
