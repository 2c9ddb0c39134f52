"""Label Studio's addresses and keys: what is asked, with which key, and what is never asked."""

import base64
import http.server
import json
import threading

import pytest

from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.prediction.requests import ApiError
from samray.serving.labelstudio_client import Answer, PictureSource, read_data_url, read_source

LEGACY = "0123456789abcdef0123456789abcdef01234567"


def jwt(**claims):
    """A token in the form of Label Studio's."""
    parts = [{"alg": "HS256", "typ": "JWT"}, claims]
    words = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode() for part in parts]
    return ".".join([*(word.rstrip("=") for word in words), "s" * 43])


FOUND = Answer(200, b"x", "")
PERSONAL = jwt(token_type="refresh", exp=8_000_000_000, iat=1_700_000_000)


def refused(field):
    return pytest.raises(ApiError, match=field.replace("[", r"\[").replace(".", r"\."))


def test_data_addresses():
    content = base64.b64encode(b"a picture").decode()
    assert read_data_url(f"data:image/png;base64,{content}", "f") == b"a picture"
    for wrong in ("data:image/png,abc", "data:", "data:;base64,!!", "data:x;base64"):
        with refused("f: "):
            read_data_url(wrong, "f")


def source(url="http://studio.example:8080/"):
    return read_source(ServeConfig(label_studio_url=url))


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.example/x.png",
        "//evil.example/x.png",
        "https://studio.example:8080/x.png",
        "http://studio.example/x.png",
        "http://studio.example:8081/x.png",
        "http://studio.example:8080@evil.example/x.png",
        "http://me:secret@studio.example:8080/x.png",
        "http://studio.example:8080\\@evil.example/x.png",
        "http://studio.example:8080.evil.example/x.png",
        "\\\\evil.example/x.png",
        "http://studio.example:x/x.png",
        "http://[::1/x.png",
        "file:///etc/passwd",
        "ftp://studio.example:8080/x.png",
        "s3://bucket/x.png",
        "/x.png\r\nX-More: 1",
        "\t//evil.example/x.png",
        "/" + "x" * 9000,
    ],
)
def test_no_address_but_label_studios_is_asked(address, monkeypatch):
    """Nothing is connected to, so a wrong address costs nobody anything."""
    asked = []
    monkeypatch.setattr(PictureSource, "_ask", lambda *words: asked.append(words))
    with refused("tasks[0].data.image: "):
        source().fetch(address, "tasks[0].data.image")
    assert not asked


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("/data/upload/1/a.jpg", "/data/upload/1/a.jpg"),
        ("http://studio.example:8080/data/x.jpg?a=1&b=%2F", "/data/x.jpg?a=1&b=%2F"),
        ("HTTP://Studio.Example:8080/x.jpg#part", "/x.jpg"),
        ("/data/a b ü.jpg", "/data/a%20b%20%C3%BC.jpg"),
        ("data/local-files/?d=a.jpg", "/data/local-files/?d=a.jpg"),
    ],
)
def test_label_studios_own_addresses(address, path, monkeypatch):
    asked = []
    monkeypatch.setattr(PictureSource, "_ask", lambda self, *words: asked.append(words) or FOUND)
    assert source().fetch(address, "f") == b"x"
    assert [words[1] for words in asked] == [path]


def test_a_relative_address_starts_at_label_studios_own(monkeypatch):
    asked = []
    monkeypatch.setattr(PictureSource, "_ask", lambda self, *words: asked.append(words) or FOUND)
    below = source("https://example.org/studio")
    below.fetch("data/x.jpg", "f")
    assert asked[0][1] == "/studio/data/x.jpg"
    assert (below.host, below.port) == ("example.org", 443)


@pytest.mark.parametrize(
    "url", ["studio", "ftp://studio", "http://", "http://studio?x=1", "http://s:x"]
)
def test_an_address_of_label_studio_that_is_none(url):
    with pytest.raises(ConfigError, match="--label-studio-url"):
        source(url)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    url = "http://studio.example"
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "fromtheenvironment\n")
    assert source(url).key == "fromtheenvironment"
    file = tmp_path / "key"
    file.write_text("fromthefile\n")
    settings = ServeConfig(label_studio_url=url, label_studio_key_file=str(file))
    assert read_source(settings).key == "fromthefile"
    file.write_text("two words")
    with pytest.raises(ConfigError, match="one word"):
        read_source(settings)
    file.unlink()
    with pytest.raises(ConfigError, match="--label-studio-key-file: cannot be read"):
        read_source(settings)
    with pytest.raises(ConfigError, match="needs --label-studio-url"):
        read_source(ServeConfig(label_studio_key_file=str(file)))
    assert read_source(ServeConfig()) is None


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (PERSONAL.rpartition(".")[0], "is cut off"),
        (jwt(token_type="access"), "lasts minutes"),
    ],
)
def test_what_looks_like_a_personal_access_token_and_is_none(key, message, monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
    with pytest.raises(ConfigError, match=rf"^\$LABEL_STUDIO_API_KEY: .*{message}") as caught:
        source()
    assert key not in str(caught.value)


def test_a_key_is_never_printed(monkeypatch):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", PERSONAL)
    assert PERSONAL not in repr(source())


class Keeper(http.server.BaseHTTPRequestHandler):
    """Label Studio's answers to keys, as 1.23.2 gives them."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.startswith("/api"):
            self.do_GET()
            return
        if self.path == "/api/token/refresh/" and body == {"refresh": self.server.valid}:
            ends = 100 + self.server.lifetime
            self.server.access = jwt(token_type="access", iat=100, exp=ends)
            self.server.given.append(self.server.access)
            self.answer(200, json.dumps({"access": self.server.access}).encode())
        else:
            self.answer(401, b"{}")

    def do_GET(self):
        given = self.headers.get("Authorization")
        valid = (f"Token {self.server.valid}", f"Bearer {self.server.access}")
        if self.path.startswith("/moved"):
            self.answer(302, b"", Location="https://studio.example/")
        elif self.path.startswith("/broken"):
            self.answer(500, b"")
        elif self.path.startswith("/other"):
            self.answer(200, b"<html>another program</html>")
        elif given not in valid:
            self.answer(401, b"{}")
        elif self.path == "/api/current-user/whoami":
            self.answer(200, b'{"id": 1, "email": "a@b.example"}')
        else:
            self.answer(200, b"a picture")

    def answer(self, status, content, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def keeper():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keeper)
    server.valid, server.access, server.given, server.lifetime = PERSONAL, None, [], 600
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def with_key(monkeypatch, address, key):
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", key)
    return source(address)


def test_a_personal_access_token_is_exchanged_once_until_it_ends(keeper, monkeypatch):
    studio = with_key(monkeypatch, keeper.address, PERSONAL)
    studio.check_key(pytest.fail)
    for _ in range(3):
        assert studio.fetch("/data/upload/1/a.jpg", "f") == b"a picture"
    assert len(keeper.given) == 1
    keeper.lifetime = 0
    studio = with_key(monkeypatch, keeper.address, PERSONAL)
    for _ in range(3):
        assert studio.fetch("/data/upload/1/a.jpg", "f") == b"a picture"
    assert len(keeper.given) == 4


def test_an_access_token_that_ended_early_is_replaced(keeper, monkeypatch):
    studio = with_key(monkeypatch, keeper.address, PERSONAL)
    assert studio.fetch("/a.jpg", "f") == b"a picture"
    keeper.access = None  # as after a restart with another secret
    with refused("f: Label Studio answered 401"):
        studio.fetch("/a.jpg", "f")
    assert studio.fetch("/a.jpg", "f") == b"a picture"


def test_a_legacy_token_is_sent_as_it_is(keeper, monkeypatch):
    keeper.valid = LEGACY
    studio = with_key(monkeypatch, keeper.address, LEGACY)
    studio.check_key(pytest.fail)
    assert studio.fetch("/data/upload/1/a.jpg", "f") == b"a picture"
    assert keeper.given == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (PERSONAL[:-1] + "x", "refuses this key; create a personal access token"),
        (LEGACY, "refuses this key; legacy tokens are disabled by default; create"),
    ],
)
def test_a_refused_key_ends_the_start_and_names_its_variable(keeper, monkeypatch, key, message):
    studio = with_key(monkeypatch, keeper.address, key)
    with pytest.raises(ConfigError, match=rf"^\$LABEL_STUDIO_API_KEY: .*{message}") as caught:
        studio.check_key(pytest.fail)
    assert key not in str(caught.value)
    with refused("f: Label Studio"):
        studio.fetch("/data/upload/1/a.jpg", "f")


def test_a_label_studio_that_may_come_later_is_a_warning(keeper, monkeypatch):
    told = []
    with_key(monkeypatch, "http://127.0.0.1:9", PERSONAL).check_key(told.append)
    with_key(monkeypatch, f"{keeper.address}/broken", LEGACY).check_key(told.append)
    with_key(monkeypatch, f"{keeper.address}/broken", PERSONAL).check_key(told.append)
    with_key(monkeypatch, keeper.address, "").check_key(told.append)
    assert "does not answer yet" in told[0]
    assert "answers 500 now" in told[1]
    assert "answers 500 now" in told[2]
    assert "$LABEL_STUDIO_API_KEY is not set" in told[3]
    assert len(told) == 4


@pytest.mark.parametrize("key", [LEGACY, PERSONAL])
@pytest.mark.parametrize("path", ["other", "moved"])
def test_another_server_is_not_taken_for_label_studio(keeper, monkeypatch, path, key):
    studio = with_key(monkeypatch, f"{keeper.address}/{path}", key)
    with pytest.raises(ConfigError, match="--label-studio-url: there is no Label Studio at"):
        studio.check_key(pytest.fail)
