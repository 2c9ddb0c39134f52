"""What every request passes first: a request id, authorisation, limits on size; and the access log.

A plain ASGI layer around the routes, so that a body is refused while it arrives and not once it is
in memory. No Ray.
"""

import asyncio
import base64
import binascii
import json
import logging
import os
import secrets
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.prediction.requests import ApiError
from samray.serving import labelstudio

TOKEN_VARIABLE = "SAMRAY_TOKEN"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
BODIES = 16  # of the largest size may be in memory at once; more are answered 429
OPEN_PATHS = ("/", "/v1/healthz", "/v1/readyz", f"{labelstudio.PREFIX}/health")  # need no token
ACCESS_LOG = logging.getLogger("samray.access")  # a line of JSON a request, to stderr


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
        if not ACCESS_LOG.handlers:
            ACCESS_LOG.addHandler(logging.StreamHandler())
        ACCESS_LOG.setLevel(logging.INFO)
        ACCESS_LOG.propagate = False

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
        if path not in OPEN_PATHS:
            if self.token is None:
                client = (scope.get("client") or ("",))[0]
                if client not in LOOPBACK:
                    raise ApiError("forbidden", "without a token only this machine is served")
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

    def answered(self, scope: Any, request_id: str, status: int, seconds: float) -> None:
        """Count an answer, and write its line of the access log."""
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.on_answer(path, status)
        line = {
            "request_id": request_id,
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
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = request_id or uuid.uuid4().hex  # Serve gives one to each that comes without
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_on(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    *policy.cors_headers(scope),
                ]
            await send(message)

        received, arrived = 0, False
        deadline = asyncio.get_running_loop().time() + policy.settings.timeout_seconds

        async def receive_some() -> Any:
            nonlocal received, arrived
            if arrived:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as exc:
                raise ApiError("too_slow", "the request took too long to arrive") from exc
            arrived = not message.get("more_body", False)
            size = len(message.get("body", b""))
            received += size
            policy.body_bytes += size
            if received > policy.max_body:
                raise ApiError("too_large", f"the body has more than {policy.max_body} bytes")
            if policy.body_bytes > policy.max_bodies:
                raise ApiError("too_busy", "too much is being sent at once; try again soon")
            return message

        try:
            if scope["method"] == "OPTIONS" and policy.cors_headers(scope):
                await Response(status_code=204)(scope, receive, send_on)
                return
            policy.require_allowed(scope)
            await self.app(scope, receive_some, send_on)
        except ApiError as exc:
            await policy.error_response(exc, request_id)(scope, receive, send_on)
        finally:
            policy.body_bytes -= received
            # Without a status so far, FastAPI's outermost layer will answer 500.
            policy.answered(scope, request_id, status or 500, time.perf_counter() - started)


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


def _basic_password(header: bytes) -> bytes:
    """Return the password of HTTP Basic, all that Label Studio can send; empty otherwise."""
    scheme, _, content = header.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(content.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""
