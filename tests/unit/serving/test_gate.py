"""What the gate refuses before any route sees it; and that a client that hangs up ends the work."""

import asyncio
import json
import socket

import pytest

from samray.config import ServeConfig
from samray.serving.gate import ACCESS_LOG, Gate, Policy, open_access_log

TOKEN = "a token of enough letters"


class Client:
    """Sends requests through a Gate to an app that answers 200 with the body it received."""

    def __init__(self, token=None, **settings):
        self.refusals = []
        self.policy = Policy(
            ServeConfig(**settings), token, lambda path, status: None, self.refusals.append
        )
        self.gate = Gate(self.echo, lambda: self.policy)
        self.cancelled = False

    async def echo(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/slow":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    def ask(self, method="POST", path="/v1/predict", client="127.0.0.1", parts=(b"{}",), **headers):
        """Return status, headers and body of the answer; the connection ends after the parts."""
        headers = {"host": "127.0.0.1:8000", **headers}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": (client, 5000),
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
        }
        messages = [
            {"type": "http.request", "body": part, "more_body": n + 1 < len(parts)}
            for n, part in enumerate(parts)
        ]
        sent = []

        async def receive():
            if messages:
                return messages.pop(0)
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        asyncio.run(self.gate(scope, receive, send))
        if not sent:
            return None, {}, b""
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], dict(sent[0]["headers"]), body


def code_of(body):
    return json.loads(body)["error"]["code"]


def test_a_request_of_this_machine_passes():
    assert Client().ask() == (200, {}, b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},  # DNS rebinding
        {"host": "evil.example:8000"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9000"},  # another server's page on this machine
        {"x_forwarded_for": "10.0.0.7"},
        {"forwarded": "for=10.0.0.7"},
    ],
)
def test_without_a_token_no_web_page_drives_it(headers):
    client = Client()
    status, _, body = client.ask(**headers)
    assert (status, code_of(body)) == (403, "forbidden")
    assert client.refusals == ["forbidden"]


def test_without_a_token_other_machines_are_refused():
    assert Client().ask(client="10.0.0.7")[0] == 403


def test_the_pages_own_origin_and_listed_ones_pass():
    assert Client().ask(origin="http://127.0.0.1:8000")[0] == 200
    status, headers, _ = Client(cors_origins=["https://a.example"]).ask(origin="https://a.example")
    assert status == 200
    assert headers[b"access-control-allow-origin"] == b"https://a.example"


def test_a_foreign_page_may_not_change_anything_even_with_a_token():
    given = {"authorization": f"Bearer {TOKEN}", "origin": "https://evil.example"}
    assert Client(TOKEN).ask(**given)[0] == 403


def test_with_a_token_any_host_is_served_unless_hosts_are_listed():
    given = {"authorization": f"Bearer {TOKEN}", "host": "samray.example"}
    assert Client(TOKEN).ask(**given, client="10.0.0.7")[0] == 200
    assert Client(TOKEN, allowed_hosts=["samray.example"]).ask(**given)[0] == 200
    assert Client(TOKEN, allowed_hosts=["other.example"]).ask(**given)[0] == 403


@pytest.mark.parametrize(
    "headers", [{"host": "["}, {"origin": "http://["}, {"origin": "http://[::1"}]
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_malformed_host_or_origin_is_refused(headers, token):
    settings = {"allowed_hosts": ("samray.example",)} if token else {}
    status, _, body = Client(token, **settings).ask(**headers)
    assert status == 403
    assert code_of(body) == "forbidden"


def test_a_log_that_nobody_reads_holds_up_no_request(tmp_path):
    """The kernel keeps a few datagrams; a sender waits from then on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reader:
        reader.bind(str(tmp_path / "log"))
        open_access_log(str(tmp_path / "log"))
        for number in range(1000):
            ACCESS_LOG.info("line %d", number)
        lines = [reader.recv(2**16).decode() for _ in range(1000)]
    assert lines == [f"line {number}" for number in range(1000)]
    ACCESS_LOG.handlers = []


def test_compressed_bodies_are_refused_as_such():
    status, _, body = Client().ask(content_encoding="gzip")
    assert (status, code_of(body)) == (415, "unsupported_format")


def test_health_is_answered_whatever_the_host():
    assert Client().ask("GET", "/v1/healthz", host="10.1.2.3:8000")[0] == 200


def test_head_is_get_without_a_body():
    status, _, body = Client().ask("HEAD", "/v1/healthz")
    assert (status, body) == (200, b"")


def test_a_client_that_hangs_up_ends_the_work():
    client = Client()
    assert client.ask(path="/slow")[0] is None
    assert client.cancelled


def test_bodies_are_counted_while_they_arrive_and_freed_afterwards():
    client = Client(max_body_mb=1)
    parts = [b"x" * 2**19] * 3
    status, _, body = client.ask(parts=parts)
    assert (status, code_of(body)) == (413, "too_large")
    assert client.policy.body_bytes == 0


def test_nothing_new_is_taken_while_the_endpoint_stops():
    client = Client()
    client.policy.draining = True
    status, _, body = client.ask()
    assert (status, code_of(body)) == (503, "not_ready")
