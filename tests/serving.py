"""A real endpoint on Ray Serve, for the tests that speak to it over HTTP."""

import contextlib
import time
from collections.abc import Iterator

import requests
from ports import free_port

from samray.config import ServeConfig

TOKEN = "a token of enough letters"


@contextlib.contextmanager
def serving(settings: ServeConfig, proxies: bool = False, **options: object) -> Iterator[str]:
    """Start the endpoint on a free port; give its address here once its models are loaded.

    Args:
        proxies: behind Serve's proxies, as on a cluster, and not listening by itself.
        options: of those proxies.
    """
    from ray import serve

    from samray.serving.app import bind_app

    settings = settings.model_copy(update={"port": free_port()})
    options = {"host": "127.0.0.1", "port": settings.port, "request_timeout_s": 90, **options}
    serve.start(proxy_location="HeadOnly" if proxies else "Disabled", http_options=options)
    try:
        serve.run(bind_app(settings, listen=not proxies), name="samray", route_prefix="/")
        address = f"http://127.0.0.1:{settings.port}"
        wait_until_ready(address)
        yield address
    finally:
        serve.shutdown()


def wait_until_ready(address: str, seconds: float = 120) -> None:
    """Return once the models are loaded."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{address}/v1/readyz", timeout=30).status_code == 200:
                return
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.5)
