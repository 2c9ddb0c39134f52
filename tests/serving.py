"""A real endpoint on Ray Serve, for the tests that speak to it over HTTP."""

import contextlib
import time
from collections.abc import Iterator

import requests
from ports import free_port

from samray.config import ServeConfig

TOKEN = "a token of enough letters"


@contextlib.contextmanager
def serving(
    settings: ServeConfig, proxies: bool = False, port: int | None = None, **options: object
) -> Iterator[str]:
    """Start the endpoint on a free port; give its address here once its models are loaded.

    Args:
        proxies: behind Serve's proxies, as on a cluster, and not listening by itself.
        port: another than a free one.
        options: of those proxies.
    """
    from ray import serve

    settings = settings.model_copy(update={"port": port or free_port()})
    try:
        deploy(settings, proxies, **options)
        address = f"http://127.0.0.1:{settings.port}"
        wait_until_ready(address)
        yield address
    finally:
        serve.shutdown()


def deploy(settings: ServeConfig, proxies: bool = False, **options: object) -> None:
    """Start Serve and the endpoint at the settings' address; arguments as for `serving`."""
    from ray import serve

    from samray.serving.app import bind_app, wait_for_port

    wait_for_port("127.0.0.1", settings.port)
    options = {"host": "127.0.0.1", "port": settings.port, "request_timeout_s": 90, **options}
    serve.start(proxy_location="HeadOnly" if proxies else "Disabled", http_options=options)
    serve.run(bind_app(settings, listen=not proxies), name="samray", route_prefix="/")


def wait_until_ready(address: str, seconds: float = 120) -> None:
    """Return once the models are loaded."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"{address}/v1/readyz", timeout=30).status_code == 200:
                return
        assert time.monotonic() < deadline, f"not ready after {seconds} s"
        time.sleep(0.5)
