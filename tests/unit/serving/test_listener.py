"""Silent connections are closed, and requests in progress survive a stop. Real sockets."""

import asyncio
import contextlib

import pytest

from samray.serving import listener
from samray.serving.listener import Listener


async def app(scope, receive, send):
    """Answers after 0.6 s on /slow, 32 MiB on /large, else at once, and never reads a body."""
    if scope["path"] == "/slow":
        await asyncio.sleep(0.6)
    body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


LARGE = 32 * 2**20  # more than the sockets of both sides hold


@contextlib.asynccontextmanager
async def listening():
    server = Listener(app, "127.0.0.1", 0, grace_seconds=5)
    running = asyncio.ensure_future(server.run())
    while not server.server.started:
        await asyncio.sleep(0.01)
    yield server, server.socket.getsockname()[1], running
    server.stop()
    await running


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(listener, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(listener, "CHECK_SECONDS", 0.05)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Half: ",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc",  # answered, not read
    ],
)
def test_a_silent_connection_is_closed(sent):
    async def talk():
        async with listening() as (_, port, _running):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(sent)
            await asyncio.wait_for(reader.read(), 10)  # until the server closes
            writer.close()

    asyncio.run(talk())


def test_a_slow_answer_is_not_cut_and_a_connection_serves_many_requests():
    async def talk():
        async with listening() as (_, port, _running):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for path in (b"/slow", b"/", b"/slow"):
                writer.write(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
                assert head.startswith(b"HTTP/1.1 200")
                assert await reader.readexactly(2) == b"ok"
            writer.close()

    asyncio.run(talk())


@pytest.mark.parametrize("reads", [True, False])
def test_an_answer_that_is_not_read_is_dropped_and_a_slow_reader_gets_all(reads, monkeypatch):
    monkeypatch.setattr(listener, "SLOWEST", 1000)

    async def talk():
        async with listening() as (_, port, _running):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            size = 0
            with contextlib.suppress(ConnectionError):
                if not reads:
                    await asyncio.sleep(3)
                while part := await asyncio.wait_for(reader.read(2**20), 20):
                    size += len(part)
                    await asyncio.sleep(0.03 if reads else 0)
            writer.close()
            return size

    assert (asyncio.run(talk()) > LARGE) is reads


def test_a_stop_waits_for_the_request_in_progress():
    async def talk():
        async with listening() as (server, port, running):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.2)
            server.stop()
            assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ok")
            await asyncio.wait_for(running, 10)
            writer.close()
            with pytest.raises(OSError, match=r"refused|Connect"):
                await asyncio.open_connection("127.0.0.1", port)

    asyncio.run(talk())


@pytest.mark.parametrize(("given", "kept"), [("abc-1", True), ("x" * 129, False), ("a b", False)])
def test_a_clients_request_id_is_kept_if_it_is_short_and_plain(given, kept):
    async def talk():
        async with listening() as (_, port, _running):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: {given}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            writer.close()
            return [line.partition(": ")[2] for line in head.splitlines() if "x-request-id" in line]

    (request_id,) = asyncio.run(talk())
    assert (request_id == given) is kept
    assert len(request_id) <= 128
