"""The client, and the labelmes it refuses; integration/test_labelme_tool.py has the others."""

import http.server
import importlib.util
import sys
import threading

import pytest

from samray.config import LabelmeConfig
from samray.errors import ConfigError, EndpointError
from samray.serving.labelme_client import Endpoint, start

installed = importlib.util.find_spec("labelme") is not None
pytestmark = pytest.mark.skipif(installed, reason="labelme is installed here")


def test_the_token_reaches_the_endpoint_whatever_netrc_and_proxy_say(tmp_path, monkeypatch):
    seen = []

    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"models": ["tiny"]}')

    (tmp_path / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with http.server.HTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.handle_request).start()
        Endpoint(f"http://127.0.0.1:{server.server_port}", "token-of-mine").require_samray()
    assert seen == ["Bearer token-of-mine"]


@pytest.mark.parametrize("url", ["http://[::1", "http://[x]:8000", "x"])
def test_an_address_that_is_none_is_refused_in_a_sentence(url):
    with pytest.raises(EndpointError, match="is no address; http://HOST:PORT is one"):
        Endpoint(url, None).require_samray()


def test_without_labelme_a_sentence_says_what_to_install():
    with pytest.raises(ConfigError, match=r"^labelme is not installed here; pip install labelme=="):
        start(LabelmeConfig())


@pytest.mark.parametrize("version", ["5.5.0", "7.0.0", "8.0.0"])
def test_a_labelme_that_is_built_otherwise_is_refused_in_a_sentence(version, tmp_path, monkeypatch):
    for name, text in (("osam", ""), ("labelme", f"__version__ = {version!r}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    message = r"^this labelme cannot be used \(.+\); it was tried with 6.3.1 and 7.9.1: pip install"
    try:
        with pytest.raises(ConfigError, match=message):
            start(LabelmeConfig())
    finally:
        for name in ("osam", "labelme"):
            sys.modules.pop(name, None)
