"""The one Label Studio that images are fetched from: its address, its key, its images.

Label Studio has two kinds of keys. A legacy token is sent as it is. A personal access token is a
JWT that is exchanged for an access token, which lasts a few minutes. Source: Label Studio's
`label_studio/jwt_auth`.
"""

import base64
import binascii
import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from samray.config import ServeConfig
from samray.errors import ConfigError
from samray.prediction.requests import ApiError, mistakes_error

KEY_VARIABLE = "LABEL_STUDIO_API_KEY"
KEY_OPTION = "--label-studio-key-file"
URL_OPTION = "--label-studio-url"
HOW_TO = "create a personal access token in Label Studio, under Account & Settings"
REFRESH = "api/token/refresh/"  # a personal access token for an access token
WHOAMI = "api/current-user/whoami"
MAX_ADDRESS = 8000  # characters
MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
REFUSED = (401, 403)
CHUNK = 2**16  # bytes
MAX_ANSWER = 2**20  # bytes of an answer that is no image
CHECK_SECONDS = 5.0
RENEW_EARLY = 0.8  # of an access token's life, after which it is renewed
ACCESS_SECONDS = 60.0  # its life if it does not tell


class TooLargeError(Exception):
    """An answer has more bytes than it may."""


@dataclass(frozen=True)
class Answer:
    """An answer of Label Studio.

    Attributes:
        location: where a redirect leads.
    """

    status: int
    content: bytes
    location: str


@dataclass
class PictureSource:
    """The one server that images are fetched from.

    Attributes:
        scheme, host, port: of Label Studio; no other host is ever connected to.
        base: its URL, which relative URLs are resolved against.
        key: a legacy token or a personal access token.
        key_origin: the option or variable that the key is from, for messages.
        max_bytes: larger images are refused while they arrive.
        timeout: seconds for an image, redirects and a new access token included.
    """

    scheme: str
    host: str
    port: int
    base: str
    key: str | None = field(repr=False)
    key_origin: str
    max_bytes: int
    timeout: float
    # An access token, and when it is renewed.
    _access: tuple[str, float] | None = field(default=None, repr=False)

    def fetch(self, url: str, field: str) -> bytes:
        """Return an image file. Blocks: never call it on an event loop.

        Args:
            url: as in the task; relative ones refer to Label Studio.
            field: its place in the request, for messages.

        Raises:
            ApiError: the URL is of another host, Label Studio refuses it, or it is too large.
        """
        deadline = time.monotonic() + self.timeout
        base = self.base
        try:
            for hop in range(MAX_REDIRECTS + 1):
                path, base = self._own_path(url, base, field, redirected=hop > 0)
                answer = self._ask("GET", path, deadline, self.max_bytes)
                if answer.status not in REDIRECTS:
                    break
                url = answer.location
            else:
                raise _refusal(field, f"Label Studio redirects more than {MAX_REDIRECTS} times")
        except TooLargeError as exc:
            message = f"{field}: the picture has more than {self.max_bytes} bytes"
            raise ApiError("too_large", message, field) from exc
        except TimeoutError as exc:
            message = f"{field}: Label Studio took more than {self.timeout:g} seconds for it"
            raise ApiError("timed_out", message, field) from exc
        except (OSError, http.client.HTTPException) as exc:
            message = f"{field}: Label Studio does not answer ({_first_words(exc)})"
            raise ApiError("bad_gateway", message, field) from exc
        if answer.status != 200:
            hint = ""
            if answer.status in (*REFUSED, 404):
                hint = f"; check the key ({KEY_OPTION} or ${KEY_VARIABLE})"
            raise _refusal(field, f"Label Studio answered {answer.status} for it{hint}")
        return answer.content

    def check_key(self, tell: Callable[[str], None]) -> None:
        """Ask Label Studio whose the key is.

        Args:
            tell: shows the operator a warning, where images may be available later.

        Raises:
            ConfigError: Label Studio refuses the key, or the address is of another server.
        """
        deadline = time.monotonic() + min(self.timeout, CHECK_SECONDS)
        try:
            answer = self._ask("GET", urlsplit(self.base).path + WHOAMI, deadline, MAX_ANSWER)
        except (OSError, http.client.HTTPException, TooLargeError) as exc:
            tell(f"Label Studio at {self.base} does not answer yet ({_first_words(exc)})")
            return
        status = answer.status
        if status in REFUSED and self.key is None:
            why = "Label Studio gives no pictures without a key"
            tell(f"${KEY_VARIABLE} is not set; {why}; {HOW_TO}")
        elif status in REFUSED:
            legacy = "" if _is_jwt(self.key or "") else "; legacy tokens are disabled by default"
            raise ConfigError(
                f"{self.key_origin}: Label Studio at {self.base} refuses this key{legacy}; {HOW_TO}"
            )
        elif status >= 500:
            tell(f"Label Studio at {self.base} answers {status} now")
        elif status != 200 or not isinstance(_json(answer.content).get("email"), str):
            where = f", which redirects to {answer.location[:200]!r}" if answer.location else ""
            raise ConfigError(f"{URL_OPTION}: there is no Label Studio at {self.base}{where}")

    def _own_path(self, url: str, base: str, field: str, redirected: bool) -> tuple[str, str]:
        """Return path and query of a URL of Label Studio, and the whole URL.

        The connection always goes to the configured host, so URL parsers that disagree (on
        backslashes, user names, white space) cannot be exploited.
        """
        if len(url) > MAX_ADDRESS:
            raise _refusal(field, f"is an address of more than {MAX_ADDRESS} characters")
        try:
            whole = urljoin(base, url)
            parts = urlsplit(whole)
            port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        except ValueError as exc:
            raise _refusal(field, "is no address of a picture") from exc
        place = (parts.scheme, parts.hostname, port)
        odd = "@" in parts.netloc or re.search(r"^ |[\x00-\x1f\x7f\\]| $", url)
        if odd or place != (self.scheme, self.host, self.port):
            raise _refusal(
                field,
                f"{'is redirected to ' if redirected else ''}{url[:200]!r}, which does not lie at "
                f"{self.scheme}://{self.host}:{self.port}; pictures are fetched only from the "
                f"address of samray serve's {URL_OPTION}",
            )
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        if parts.query:
            path += "?" + quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return path, whole

    def _ask(self, method: str, path: str, deadline: float, max_bytes: int) -> Answer:
        """Send a request with the key; return its answer, or that to the exchange of the key.

        Raises:
            TooLargeError, TimeoutError, OSError, http.client.HTTPException.
        """
        headers = {}
        if self.key is not None and _is_jwt(self.key):
            token = self._access_token(deadline)
            if isinstance(token, Answer):
                return token
            headers["Authorization"] = f"Bearer {token}"
        elif self.key is not None:
            headers["Authorization"] = f"Token {self.key}"
        answer = self._exchange(method, path, headers, None, deadline, max_bytes)
        if answer.status in REFUSED:
            self._access = None  # ended early
        return answer

    def _access_token(self, deadline: float) -> str | Answer:
        """Return an access token, a new one before it expires; or the answer that holds none.

        Two threads may both get a new one, which does no harm.
        """
        now, known = time.monotonic(), self._access
        if known is not None and now < known[1]:
            return known[0]
        body = json.dumps({"refresh": self.key}).encode()
        headers = {"Content-Type": "application/json"}
        path = urlsplit(self.base).path + REFRESH
        answer = self._exchange("POST", path, headers, body, deadline, MAX_ANSWER)
        token = _json(answer.content).get("access")
        if not isinstance(token, str) or not _is_jwt(token):
            return answer
        self._access = token, now + RENEW_EARLY * _lifetime(token)
        return token

    def _exchange(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes | None,
        deadline: float,
        max_bytes: int,
    ) -> Answer:
        """Send one request on a connection of its own.

        http.client follows no redirects, uses no proxy, reads no .netrc and decompresses nothing.
        """
        left = max(deadline - time.monotonic(), 0.01)
        kind = http.client.HTTPSConnection if self.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=left)
        late = threading.Event()
        watch = threading.Timer(left, _hang_up)
        always = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "samray"}
        try:
            connection.connect()
            # A socket's own timeout restarts with each byte received; this one does not.
            watch.args = (connection.sock, late)
            watch.daemon = True
            watch.start()
            connection.request(method, path, body=body, headers={**always, **headers})
            response = connection.getresponse()
            content = _read(response, max_bytes) if response.status == 200 else b""
            if late.is_set():
                raise TimeoutError
            return Answer(response.status, content, response.headers.get("Location", ""))
        except (OSError, http.client.HTTPException) as exc:
            if late.is_set():
                raise TimeoutError from exc
            raise
        finally:
            watch.cancel()
            connection.close()


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    length = response.length  # None without Content-Length
    if (length or 0) > max_bytes:
        raise TooLargeError
    content = bytearray()
    while length is None or len(content) < length:
        chunk = response.read1(CHUNK if length is None else min(CHUNK, length - len(content)))
        if not chunk:
            break
        content += chunk
        if len(content) > max_bytes:
            raise TooLargeError
    if length is not None and len(content) < length:
        raise http.client.IncompleteRead(b"", length - len(content))
    return bytes(content)


def _hang_up(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):
        # Unlike `close` this wakes the reader. Not SSLSocket.shutdown, which would unwrap it.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def read_data_url(url: str, field: str) -> bytes:
    """Return the content of a `data:` URL.

    Raises:
        ApiError: invalid_request; it is not base64.
    """
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise _refusal(field, "a data: address needs ;base64, before its content")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise _refusal(field, "the content of this data: address is not base64") from exc


def read_source(settings: ServeConfig) -> PictureSource | None:
    """Return the server to fetch images from; None if the settings name no Label Studio.

    Raises:
        ConfigError: the address or the key cannot be used.
    """
    if settings.label_studio_url is None:
        if settings.label_studio_key_file is not None:
            raise ConfigError("--label-studio-key-file needs --label-studio-url, where it is sent")
        return None
    url = settings.label_studio_url.rstrip("/") + "/"
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as exc:
        raise ConfigError(f"{URL_OPTION}: {url} is no address ({exc})") from exc
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    if port is None or parts.scheme not in ("http", "https") or not parts.hostname or not plain:
        raise ConfigError(f"{URL_OPTION}: {url} must look like https://label-studio.example:8080")
    return PictureSource(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        base=url,
        key=_read_key(settings),
        key_origin=KEY_OPTION if settings.label_studio_key_file else f"${KEY_VARIABLE}",
        max_bytes=int(settings.max_body_mb * 2**20),
        timeout=settings.label_studio_timeout_seconds,
    )


def _read_key(settings: ServeConfig) -> str | None:
    key, origin = os.environ.get(KEY_VARIABLE), f"${KEY_VARIABLE}"
    if settings.label_studio_key_file is not None:
        origin = KEY_OPTION
        try:
            key = Path(settings.label_studio_key_file).expanduser().read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigError(f"{KEY_OPTION}: cannot be read ({exc.strerror})") from exc
    key = (key or "").strip()
    if key and not re.fullmatch(r"[\x21-\x7e]+", key):
        raise ConfigError(f"{origin}: Label Studio's key must be one word of plain characters")
    if key.startswith("eyJ"):
        if not _is_jwt(key):
            raise ConfigError(f"{origin}: this personal access token is cut off; copy the whole")
        if _claims(key).get("token_type") == "access":
            raise ConfigError(f"{origin}: this access token lasts minutes; {HOW_TO}")
    return key or None


def _is_jwt(key: str) -> bool:
    """Whether it has a JWT's form: header, claims, signature. Legacy tokens have no dots."""
    return re.fullmatch(r"eyJ[\w-]+\.[\w-]+\.[\w-]+", key, re.ASCII) is not None


def _claims(token: str) -> dict[str, Any]:
    """What a JWT says about itself; the signature is Label Studio's to check."""
    part = token.split(".")[1]
    try:
        return _json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except ValueError:
        return {}


def _lifetime(token: str) -> float:
    """Seconds that an access token is valid, whatever this machine's clock says."""
    claims = _claims(token)
    try:
        return float(min(max(claims["exp"] - claims["iat"], 0), 86400))
    except (KeyError, TypeError):
        return ACCESS_SECONDS


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first_words(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "it took too long"
    return " ".join(str(exc).split())[:120] or type(exc).__name__


def _refusal(field: str, message: str) -> ApiError:
    return mistakes_error([(field, message)])
