"""The HTTP server of `samray serve` on one machine: uvicorn that closes silent connections."""

import asyncio
import contextlib
import re
import socket
import uuid
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_SECONDS = 30  # for a request's headers to arrive, and for the next request on a connection
CHECK_SECONDS = 5
SLOWEST = 10_000  # bytes a second at which a client must read its answer
REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class TimedProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's protocol with a limit on the time between requests.

    uvicorn waits without limit for the first byte, for the rest of half-sent headers, for the rest
    of a body whose answer has been sent, and for a client to read an answer, which stays in memory.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Start to watch the connection."""
        super().connection_made(transport)
        self._last_cycle: Any = None
        self._unsent = 0
        self._idle_since = self.loop.time()
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        self._timer.cancel()
        super().connection_lost(exc)

    def _check(self) -> None:
        now = self.loop.time()
        busy = self.cycle is not None and not self.cycle.response_complete
        unsent = self.transport.get_write_buffer_size()
        read = self._unsent - unsent >= SLOWEST * CHECK_SECONDS
        if busy or read or self.cycle is not self._last_cycle:
            self._last_cycle, self._idle_since = self.cycle, now
        elif now - self._idle_since > HEAD_SECONDS:
            if unsent:  # `close` would wait until it is read
                self.transport.abort()
            else:
                self.transport.close()
            return
        self._unsent = unsent
        self._timer = self.loop.call_later(CHECK_SECONDS, self._check)


class RequestIds:
    """Gives each request an id, and each response the header X-Request-Id.

    A client's own id is kept if it is short and plain.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        header = (b"x-request-id", request_id.encode())
        others = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), header]
            await send(message)

        await self.app({**scope, "headers": [*others, header]}, receive, send_with_id)


class Listener:
    """A server on one address.

    Args:
        grace_seconds: for the requests in progress when it stops.

    Raises:
        OSError: the address cannot be bound.
    """

    def __init__(self, app: Any, host: str, port: int, grace_seconds: float) -> None:
        config = uvicorn.Config(
            RequestIds(app),
            http=TimedProtocol,
            lifespan="off",
            access_log=False,
            log_config=None,
            timeout_keep_alive=HEAD_SECONDS,
            timeout_graceful_shutdown=int(grace_seconds),
        )
        self.server = uvicorn.Server(config)
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        # After a kill, old connections hold the port for another minute. SO_REUSEADDR frees it for
        # `wait_for_port`, SO_REUSEPORT for a replica that starts before the old one has ended.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.socket.bind((host, port))
        # uvicorn's own handlers need the main thread, which is the replica's.
        self.server.capture_signals = contextlib.nullcontext  # type: ignore[assignment]

    async def run(self) -> None:
        """Serve until `stop`; requests in progress are answered first."""
        await self.server.serve(sockets=[self.socket])

    def stop(self) -> None:
        """Accept no more connections, and let `run` return once none is busy."""
        self.server.should_exit = True
