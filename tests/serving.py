"""A real endpoint on Ray Serve, for the tests that speak to it over HTTP."""

import contextlib
import socket
import time
from collections.abc import Iterator

import requests

from samray.config import ServeConfig

TOKEN = "a token of enough letters"


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(settings: ServeConfig, host: str = "127.0.0.1") -> Iterator[str]:
    """Start the endpoint on a free port; give its address here once its models are loaded."""
    from ray import serve

    from samray.endpoint import build_app

    port = free_port()
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": 90})
    try:
        serve.run(build_app(settings), name="samray", route_prefix="/")
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while requests.get(f"{address}/v1/readyz", timeout=30).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield address
    finally:
        serve.shutdown()
