"""labelmes that `samray labelme` refuses; integration/test_labelme_tool.py has those it can use."""

import importlib.util
import sys

import pytest
import requests

from samray.config import LabelmeConfig
from samray.errors import ConfigError
from samray.serving.labelme_client import Endpoint, start

installed = importlib.util.find_spec("labelme") is not None
pytestmark = pytest.mark.skipif(installed, reason="labelme is installed here")


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


@pytest.mark.parametrize(
    ("url", "token", "proxy"),
    [
        ("http://127.0.0.1:8000", "the token", None),
        ("http://localhost:8000", "the token", None),
        ("http://[::1]:8000", None, None),
        ("http://sam.example.org:8000", "the token", "http://proxy.example.org:3128"),
    ],
)
def test_the_token_is_sent_whatever_netrc_has_and_loopback_needs_no_proxy(
    url, token, proxy, tmp_path, monkeypatch
):
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    sent = []

    def send(request, **options):
        sent.append((request.headers.get("Authorization"), options["proxies"].get("http")))
        answer = requests.Response()
        answer.status_code, answer._content = 200, b'{"models": ["tiny"]}'
        return answer

    endpoint = Endpoint(url, token)
    monkeypatch.setattr(endpoint.session, "send", send)
    endpoint.require_samray()
    assert sent == [(token and f"Bearer {token}", proxy)]
