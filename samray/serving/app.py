"""The endpoint as one Ray Serve application, and `samray serve`, which runs it."""

import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import ray
import requests
from ray import serve

from samray import cluster
from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.serving import labelstudio_client
from samray.serving.catalogue import read_catalogue
from samray.serving.gate import LOOPBACK, TOKEN_VARIABLE, read_token
from samray.serving.ingress import Ingress
from samray.serving.replicas import Decoder, Encoder
from samray.serving.vault import ImageVault
from samray.storage import require_folder, resolve

LISTEN_SECONDS = 60
PORT_SECONDS = 15  # after `samray serve` has ended, Ray may hold its port for some seconds
NAME = "samray"  # of the application


def build_app(settings: ServeConfig) -> serve.Application:
    """Return the application for `serve deploy configs/serve.yaml`, behind Serve's proxies.

    Raises:
        ConfigError: no model can be served under these settings.
    """
    return bind_app(settings, listen=False)  # Serve allows a builder one parameter only


def bind_app(
    settings: ServeConfig, listen: bool, log_socket: str | None = None
) -> serve.Application:
    """Return the application.

    Args:
        listen: the Ingress listens at the settings' host and port itself; otherwise Serve's
            proxies do, which find it on any node of a cluster.
        log_socket: UNIX socket that the access log is also sent to.

    Raises:
        ConfigError: no model can be served under these settings.
    """
    if settings.store is not None and settings.checkpoint is not None:
        raise ConfigError("give --checkpoint or --store, not both")
    if settings.model is not None and settings.store is None and settings.checkpoint is None:
        raise ConfigError("--model names a model of a --store, or a --checkpoint; give one of them")
    if settings.store is not None:
        require_folder(resolve(settings.store, "--store"), "--store")
    offered = read_catalogue(settings, {})  # fail now if no replica could load the models
    token = read_token(settings)
    pictures = labelstudio_client.read_source(settings)
    options = {"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica}
    vault = ImageVault.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0}
    ).bind(settings)
    encoder = Encoder.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings.encoder_replicas,
            "target_ongoing_requests": 4,
        },
    ).bind(settings)
    decoder = Decoder.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        num_replicas=settings.decoder_replicas,
        # More than the Ingress lets through: requests queue inside the Decoder. Serve's router
        # polls full replicas repeatedly, which halved the answers per second.
        max_ongoing_requests=2 * settings.max_in_flight,
        max_queued_requests=settings.max_in_flight,
    ).bind(settings, encoder, vault)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,  # until a dead one is noticed, clients get no answer
    )
    application: serve.Application = ingress.bind(
        settings, offered, token, decoder, encoder, vault, pictures, listen, log_socket
    )
    return application


def serve_here(settings: ServeConfig) -> None:
    """Start the endpoint on this machine, or on the cluster of RAY_ADDRESS, until Ctrl-C.

    Raises:
        ConfigError: no model can be served, the port is taken, Label Studio refuses the key, or
            other machines could send requests without a token.
    """
    if settings.host not in LOOPBACK and read_token(settings) is None:
        raise ConfigError(
            f"--host {settings.host}: others could ask; set a token first (--token-file or "
            f"${TOKEN_VARIABLE}), e.g. `openssl rand -hex 24 > token.txt`"
        )
    wait_for_port(settings.host, settings.port)
    if (pictures := labelstudio_client.read_source(settings)) is not None:
        pictures.check_key(_say)
    alone = not os.environ.get("RAY_ADDRESS")
    # The handlers never block, so they need no thread of their own; this raises throughput.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")  # it would choose its own ports
    with _access_log() if alone else contextlib.nullcontext() as log_socket:
        application = bind_app(settings, listen=alone, log_socket=log_socket)
        _say("starting Ray")
        cluster.start()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            _say("starting the endpoint's processes")
            _deploy(application, settings, alone)
            _serve_until_stopped(settings)
        finally:
            if alone:
                ray.shutdown()  # this process started it
            else:
                serve.delete(NAME)  # and no other application of the cluster


def wait_for_port(host: str, port: int) -> None:
    """Return once the address can be listened on.

    Raises:
        ConfigError: it cannot, at once or, while another process listens there, after
            `PORT_SECONDS`.
    """
    deadline, said = time.monotonic() + PORT_SECONDS, False
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise ConfigError(
                        f"--port {port} on {host} cannot be had ({exc.strerror}); "
                        "choose another --port"
                    ) from exc
        if not said:
            _say(f"waiting up to {PORT_SECONDS} s for port {port}, which another process holds")
            said = True
        time.sleep(0.2)


def _deploy(application: serve.Application, settings: ServeConfig, alone: bool) -> None:
    serve.start(
        proxy_location="Disabled" if alone else "EveryNode",
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": settings.timeout_seconds + 30,
        },
        logging_config={"log_level": "WARNING"},
    )
    serve.run(application, name=NAME, route_prefix="/")


def _serve_until_stopped(settings: ServeConfig) -> None:
    """Wait for Ctrl-C, which ends at once, or SIGTERM, after which answers in progress are sent."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    address = f"http://{host}:{settings.port}/"
    _say("loading the models")
    _wait_until_ready(address)
    print(f"serving {address}  (Ctrl-C ends it)", flush=True)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with contextlib.suppress(KeyboardInterrupt):
        stop.wait()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a second one ends at once
        _say("stopping once the requests in progress are answered")
        ingress = serve.get_deployment_handle("Ingress", app_name=NAME)
        ingress.drain.remote().result(timeout_s=settings.grace_seconds + 10)
    print("stopped", flush=True)


@contextlib.contextmanager
def _access_log() -> Iterator[str]:
    """Print what the Ingress sends to the UNIX socket given, as it comes, on stderr."""
    with tempfile.TemporaryDirectory(prefix="samray-") as folder:
        path = os.path.join(folder, "log")
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(path)

        def print_lines() -> None:
            while line := receiver.recv(2**16):
                with contextlib.suppress(OSError):  # nobody reads stderr any more
                    print(line.decode(errors="replace"), file=sys.stderr, flush=True)

        threading.Thread(target=print_lines, daemon=True).start()
        yield path


def _say(text: str) -> None:
    print(f"samray serve: {text}", file=sys.stderr, flush=True)


def _wait_until_ready(address: str) -> None:
    session = requests.Session()
    session.trust_env = False  # no proxy of http_proxy knows this machine's own address
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        try:
            if session.get(f"{address}v1/readyz", timeout=60).status_code == 200:
                return
        except requests.ConnectionError:  # not listening yet
            if time.monotonic() > deadline:
                raise
        else:
            deadline = float("inf")  # models are being loaded
        time.sleep(0.2)
