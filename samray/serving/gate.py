"""What every request passes first: a request id, authorisation, limits on size; and the access log.

A plain ASGI layer around the routes, so that a body is refused while it arrives and not once it is
in memory. No Ray.
"""

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import logging.handlers
import os
import queue
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import Response
from fastapi.responses import JSONResponse

from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.prediction.requests import ApiError
from samray.serving import labelstudio

TOKEN_VARIABLE = "SAMRAY_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BODIES = 16  # of the largest size may be in memory at once; more are answered 429
PAGE_FILES = "/page/"  # style sheet and scripts of the page
OPEN_PATHS = ("/", "/v1/healthz", "/v1/readyz", f"{labelstudio.PREFIX}/health")  # need no token
MAX_LOG_BYTES = 60_000  # of a record, to fit a datagram
WAITING_RECORDS = 10_000  # for a slow reader of the log; more are dropped
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
HUNG_UP = 499  # nginx's status in the log for a client that disconnected
ACCESS_LOG = logging.getLogger("samray.access")  # a line of JSON a request, to stderr


def open_access_log(socket_path: str | None) -> None:
    """Write the access log to this process's stderr, and to a process that reads a UNIX socket.

    stderr itself, not `sys.stderr`: Ray Serve puts a buffer of 1,000 lines in front of that.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(os.fdopen(os.dup(2), "w"))]
    if socket_path is not None:
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(WAITING_RECORDS)
        logging.handlers.QueueListener(waiting, SocketHandler(socket_path)).start()
        handlers.append(WaitingHandler(waiting))
    ACCESS_LOG.handlers = handlers
    ACCESS_LOG.setLevel(logging.INFO)
    ACCESS_LOG.propagate = False


class WaitingHandler(logging.handlers.QueueHandler):
    """Passes records on to a thread: where nobody reads, sending would hold up all requests."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, the name is logging's
        """Drop a record for which there is no room."""


class SocketHandler(logging.Handler):
    """Sends each record as a datagram to a UNIX socket; nobody listening is no error."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        with contextlib.suppress(OSError):
            self.socket.sendto(self.format(record).encode()[:MAX_LOG_BYTES], self.path)


class Policy:
    """Who may send what, and what is logged of each answer.

    Args:
        token: what clients must send; None serves only this machine.
        on_answer: is given the route's path and the status of each answer, to count it.
        on_refusal: is given the code of each error.
    """

    def __init__(
        self,
        settings: ServeConfig,
        token: str | None,
        on_answer: Callable[[str, int], None],
        on_refusal: Callable[[str], None],
    ) -> None:
        self.settings, self.token = settings, token
        self.on_answer, self.on_refusal = on_answer, on_refusal
        self.max_body = int(settings.max_body_mb * 2**20)
        self.max_bodies, self.body_bytes = BODIES * self.max_body, 0
        self.draining = False

    def cors_headers(self, scope: Any) -> list[tuple[bytes, bytes]]:
        """Return the headers that let pages of a listed origin read the answer; else none."""
        origin = dict(scope["headers"]).get(b"origin", b"").decode("latin-1")
        if origin not in self.settings.cors_origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST, DELETE"),
            (b"vary", b"Origin"),
        ]

    def require_allowed(self, scope: Any) -> None:
        """Refuse clients without the token, and bodies whose declared size is too large.

        Raises:
            ApiError: unauthorized, forbidden or too_large.
        """
        headers = dict(scope["headers"])
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith(PAGE_FILES)
        if self.draining:
            raise ApiError("not_ready", "the endpoint is being stopped")
        if not is_open:
            self._require_host(headers)
        if scope["method"] not in SAFE_METHODS:
            self._require_own_origin(headers)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError("unsupported_format", "send the body uncompressed")
        if not is_open:
            if self.token is None:
                self._require_this_machine(scope, headers)
            else:
                given = headers.get(b"authorization", b"")
                scheme, _, credential = given.partition(b" ")
                allowed = scheme.lower() == b"bearer"
                allowed &= secrets.compare_digest(credential.strip(), self.token.encode())
                way = "send Authorization: Bearer TOKEN"
                if path.startswith(f"{labelstudio.PREFIX}/"):
                    password = _basic_password(given)
                    allowed |= secrets.compare_digest(password, self.token.encode())
                    way = "give the token as the password of Basic Auth"
                if not allowed:
                    raise ApiError("unauthorized", way)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise ApiError("too_large", f"the body has more than {self.max_body} bytes")

    def _require_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse a Host that is not ours: without a token, DNS rebinding would let any page in."""
        allowed = {*self.settings.allowed_hosts}
        if self.token is None:
            allowed |= {*LOOPBACK, self.settings.host}
        host = _parts_of(f"//{headers.get(b'host', b'').decode('latin-1')}", "Host").hostname or ""
        if allowed and host not in allowed:
            raise ApiError(
                "forbidden", f"Host {host[:100]!r} is not served; serve.allowed_hosts lists others"
            )

    def _require_own_origin(self, headers: dict[bytes, bytes]) -> None:
        """Refuse requests of pages from elsewhere on everything that computes or changes."""
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not origin or origin in self.settings.cors_origins:
            return
        if _parts_of(origin, "Origin").netloc != headers.get(b"host", b"").decode("latin-1"):
            raise ApiError(
                "forbidden", f"pages of {origin[:100]!r} may not ask; --cors-origin admits them"
            )

    def _require_this_machine(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        client = (scope.get("client") or ("",))[0]
        if client not in LOOPBACK or b"x-forwarded-for" in headers or b"forwarded" in headers:
            raise ApiError("forbidden", "without a token only this machine is served")

    def answered(self, scope: Any, request_id: str, status: int, seconds: float) -> None:
        """Count an answer, and write its line of the access log."""
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.on_answer(path, status)
        line = {
            "request_id": request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        ACCESS_LOG.info(json.dumps(line))

    def error_response(self, error: ApiError, request_id: str) -> JSONResponse:
        """Return an error in the form that all errors have, and count it."""
        self.on_refusal(error.code)
        headers = {"Retry-After": "1"} if error.code in ("too_busy", "not_ready") else {}
        if error.code == "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(error.body(request_id), error.status, headers)


class Gate:
    """The ASGI layer.

    Args:
        policy_of: returns the policy of this process, which exists once its Ingress does.
    """

    def __init__(self, app: Any, policy_of: Callable[[], Policy]) -> None:
        self.app, self.policy_of = app, policy_of

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        policy = self.policy_of()
        request = Passage(scope, receive, send, policy)
        started = time.perf_counter()
        try:
            if scope["method"] == "OPTIONS" and policy.cors_headers(scope):
                await Response(status_code=204)(scope, receive, request.send)
                return
            policy.require_allowed(scope)
            await request.run(self.app)
        except ApiError as exc:
            response = policy.error_response(exc, request.id)
            await response(scope, receive, request.send)
        finally:
            policy.body_bytes -= request.received
            # Without a status so far, FastAPI's outermost layer will answer 500.
            seconds = time.perf_counter() - started
            policy.answered(scope, request.id, request.status or 500, seconds)


class Passage:
    """One request on its way through the gate.

    Attributes:
        id: its X-Request-Id.
        status: of the response, 0 before it starts.
        received: bytes of the body so far.
    """

    def __init__(self, scope: Any, receive: Any, send: Any, policy: Policy) -> None:
        self.scope, self._receive, self._send, self.policy = scope, receive, send, policy
        # The listener, or Serve's proxy, has given each request one.
        self.id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:128]
        scope.setdefault("state", {})["request_id"] = self.id
        self.status = self.received = 0
        self.arrived, self.gone = asyncio.Event(), asyncio.Event()
        self.deadline = asyncio.get_running_loop().time() + policy.settings.timeout_seconds

    async def run(self, app: Any) -> None:
        """Let the routes answer; cancel them when the client disconnects, so that work ends."""
        scope = self.scope
        if scope["method"] == "HEAD":  # the answer to GET, without its body
            scope = {**scope, "method": "GET"}
        work = asyncio.ensure_future(app(scope, self.receive, self.send))
        watch = asyncio.ensure_future(self._watch(work))
        try:
            await work
        except asyncio.CancelledError:
            if not self.gone.is_set():
                raise
            self.status = HUNG_UP
        finally:
            watch.cancel()

    async def _watch(self, work: asyncio.Future[None]) -> None:
        await self.arrived.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone.set()
        work.cancel()

    async def send(self, message: Any) -> None:
        """Pass on a part of the response, with the headers for pages of listed origins."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = self.policy.cors_headers(self.scope)
            message["headers"] = [*message.get("headers", []), *own]
        elif self.scope["method"] == "HEAD":
            message["body"] = b""
        await self._send(message)

    async def receive(self) -> Any:
        """Pass on a part of the body, within the limits of time and size."""
        if self.arrived.is_set():
            await self.gone.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self._receive()
        except TimeoutError as exc:
            raise ApiError("too_slow", "the request took too long to arrive") from exc
        if not message.get("more_body", False):
            self.arrived.set()
        size = len(message.get("body", b""))
        self.received += size
        self.policy.body_bytes += size
        if self.received > self.policy.max_body:
            raise ApiError("too_large", f"the body has more than {self.policy.max_body} bytes")
        if self.policy.body_bytes > self.policy.max_bodies:
            raise ApiError("too_busy", "too much is being sent at once; try again soon")
        return message


def read_token(settings: ServeConfig) -> str | None:
    """Return the token that clients must send: from a file, else $SAMRAY_TOKEN, else None.

    Raises:
        ConfigError: the file cannot be read, or holds less than 16 characters.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if settings.token_file is not None:
        try:
            token = Path(settings.token_file).expanduser().read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigError(f"--token-file: cannot be read ({exc.strerror})") from exc
    if token is None:
        return None
    token = token.strip()
    if len(token) < 16 or not token.isascii():
        raise ConfigError(
            "the token must have at least 16 plain characters; `openssl rand -hex 24`"
        )
    return token


def _parts_of(address: str, header: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as exc:
        raise ApiError("forbidden", f"{header} {address[:100]!r} is no address") from exc


def _basic_password(header: bytes) -> bytes:
    """Return the password of HTTP Basic, all that Label Studio can send; empty otherwise."""
    scheme, _, content = header.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(content.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
