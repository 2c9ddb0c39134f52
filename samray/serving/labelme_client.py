"""`samray labelme`: labelme with the endpoint behind its AI tools.

labelme runs its models in its own process, through osam. `model_type` returns such a model that
forwards to an endpoint: the image is uploaded once, clicks and boxes are sent as they are made.
"""

import base64
import dataclasses
import io
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from samray.config import LabelmeConfig
from samray.errors import ConfigError, EndpointError

TRIED = "6.3.1 and 7.9.1"
INSTALL = "pip install labelme==6.3.1, or labelme==7.9.1 on Python 3.12 and newer"
NAME = "samray:latest"  # a model name in osam's format
TITLE = "samray"  # in labelme's list
TOKEN_VARIABLE = "SAMRAY_TOKEN"
TIMEOUTS = (5, 120)  # seconds to connect, and for an answer
PAUSE_SECONDS = 5.0  # after a failure; labelme sends a request with each mouse movement


class _Bearer(requests.auth.AuthBase):
    """Sends a token; where it is only a header, requests replaces it by what ~/.netrc holds."""

    def __init__(self, token: str) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class Endpoint:
    """A client of a samray endpoint."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url.rstrip("/")
        self.session = requests.Session()
        if token is not None:
            self.session.auth = _Bearer(token)
        if re.match(r"https?://(localhost|127[\d.]+|\[::1\])(:|/|$)", self.url):
            self.session.trust_env = False  # a proxy would look for the endpoint on its own machine

    def require_samray(self) -> None:
        """Check that the URL is a samray endpoint and that the token is right.

        Raises:
            EndpointError: no answer, an answer of another server, or a wrong token.
        """
        models = self._call("GET", "/v1/models").get("models")
        if not isinstance(models, list):
            raise EndpointError(f"{self.url} is no samray endpoint; `samray serve` starts one")
        if not models:
            raise EndpointError(f"{self.url} still loads its models; try again soon")

    def upload(self, image: np.ndarray) -> str:
        """Send an image; return its id.

        Args:
            image: H x W x 3 uint8 RGB.
        """
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG", compress_level=1)
        return str(self._call("POST", "/v1/images", data=file.getvalue())["image_id"])

    def predict(self, image_id: str, prompt: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the best mask, H x W bool, and its `MaskAnswer`.

        Raises:
            EndpointError: there is no mask; `code` is `unknown_image` if the image must be
                uploaded again.
        """
        body = {"image_id": image_id, "prompts": [prompt], "mask_format": "png"}
        answer = self._call("POST", "/v1/predict", json=body)["results"][0]["masks"][0]
        picture = Image.open(io.BytesIO(base64.b64decode(answer["png"])), formats=("PNG",))
        return np.asarray(picture.convert("1")), answer

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            response = self.session.request(method, self.url + path, timeout=TIMEOUTS, **content)
        except requests.RequestException as exc:
            if isinstance(exc, ValueError):  # InvalidURL and its like
                raise EndpointError(f"{self.url} is no address; http://HOST:PORT is one") from exc
            reason = "it took too long" if isinstance(exc, requests.Timeout) else "no connection"
            raise EndpointError(
                f"{self.url} does not answer ({reason}); is `samray serve` running there?"
            ) from exc
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if response.ok and isinstance(answer, dict):
            return answer
        error = answer.get("error") if isinstance(answer, dict) else None
        if not isinstance(error, dict):
            raise EndpointError(f"{self.url} is no samray endpoint; `samray serve` starts one")
        if error.get("code") == "unauthorized":
            raise EndpointError(
                f"{self.url} wants another token; give --token-file, or ${TOKEN_VARIABLE}"
            )
        raise EndpointError(f"{self.url}: {error.get('message')}", str(error.get("code")))


def model_type(endpoint: Endpoint, tell: Callable[[str], None]) -> Any:
    """Return an osam model class that forwards to the endpoint.

    Args:
        tell: shows the user an error. Nothing is raised, because any exception of a model ends
            labelme and loses unsaved work.
    """
    import osam

    class Upload(osam.types.ImageEmbedding):  # type: ignore[misc]
        """Placeholder for the embedding at the endpoint; labelme keeps one per image."""

        image_id: str | None = None

    class SamrayModel(osam.types.Model):  # type: ignore[misc]
        """Forwards prompts; it has no weights, so osam downloads nothing."""

        name = NAME
        metadata = osam.types.ModelMetadata(
            license_name="MIT", license_url="", source_url=endpoint.url, license_spdx="MIT"
        )
        _blobs: dict[str, Any] = {}  # noqa: RUF012
        silent_until = 0.0

        def encode_image(self, image: np.ndarray) -> Upload:
            """Defer the upload to the first click, when an error can be shown."""
            height, width = image.shape[:2]
            nothing = np.zeros((1, 1, 1), np.float32)
            return Upload(original_height=height, original_width=width, embedding=nothing)

        def generate(self, request: Any) -> Any:
            """Answer points or a box with the best mask, cropped to its box."""
            annotations = []
            if time.monotonic() >= self.silent_until:
                try:
                    annotations = self._answer(request)
                except EndpointError as exc:
                    self.silent_until = time.monotonic() + PAUSE_SECONDS
                    tell(str(exc))
            return osam.types.GenerateResponse(model=self.name, annotations=annotations)

        def _answer(self, request: Any) -> list[Any]:
            prompt, image = request.prompt, request.image
            if image is None or prompt is None or prompt.points is None:
                raise EndpointError("samray answers clicks and boxes on an image, not text")
            embedding = request.image_embedding
            upload = embedding if isinstance(embedding, Upload) else self.encode_image(image)
            asked = prompt_of_points(prompt.points, prompt.point_labels, image.shape[:2])
            if asked is None:
                return []
            mask, answer = _predict(endpoint, upload, image, asked)
            if not mask.any():
                return []
            x1, y1, x2, y2 = (int(value) for value in answer["bbox"])
            box = osam.types.BoundingBox(xmin=x1, ymin=y1, xmax=x2 - 1, ymax=y2 - 1)
            part = np.ascontiguousarray(mask[y1:y2, x1:x2])
            return [osam.types.Annotation(bounding_box=box, mask=part, score=answer["score"])]

    return SamrayModel


def _predict(
    endpoint: Endpoint, upload: Any, image: np.ndarray, prompt: dict[str, Any]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Answer a prompt; upload the image first where `upload.image_id` is None or unknown."""
    known = upload.image_id is not None
    if not known:
        upload.image_id = endpoint.upload(image)
    try:
        return endpoint.predict(upload.image_id, prompt)
    except EndpointError as exc:
        if exc.code != "unknown_image" or not known:
            raise
    upload.image_id = endpoint.upload(image)  # the endpoint was restarted, or its cache was full
    return endpoint.predict(upload.image_id, prompt)


def prompt_of_points(
    points: np.ndarray, labels: np.ndarray, size: tuple[int, int]
) -> dict[str, Any] | None:
    """Turn osam's points into a prompt of API v1; None without a foreground point and a box.

    Args:
        points: N x 2, (x, y) pixels; labelme allows points on the border.
        labels: N; 1 foreground, 0 background, 2 and 3 are corners of a box.
        size: (H, W).
    """
    inside = np.clip(points, 0, [np.nextafter(size[1], 0), np.nextafter(size[0], 0)])
    clicks = labels < 2
    prompt: dict[str, Any] = {}
    if clicks.any():
        prompt["point_coords"] = inside[clicks].tolist()
        prompt["point_labels"] = labels[clicks].tolist()
    if (~clicks).any():
        corners = np.clip(points[~clicks], 0, [size[1], size[0]])
        low, high = corners.min(axis=0), corners.max(axis=0)
        if (low < high).all():
            prompt["box"] = [*low.tolist(), *high.tolist()]
    return prompt if "box" in prompt or (labels == 1).any() else None


def start(settings: LabelmeConfig) -> None:
    """Run the user's labelme with the endpoint as its first model, until it is closed.

    Raises:
        ConfigError: the token file cannot be read, or labelme is missing or of another version.
        EndpointError: the endpoint does not answer, or refuses.
    """
    endpoint = Endpoint(settings.url, _read_token(settings.token_file))
    version, main, qt_core, qt_widgets = _import_labelme()
    endpoint.require_samray()
    showing = False

    def tell(message: str) -> None:
        """Show a message once labelme has drawn: it also requests masks while it draws."""
        nonlocal showing
        print(f"samray: {message}", file=sys.stderr)
        if not showing:
            showing = True
            qt_core.QTimer.singleShot(0, lambda: show(message))

    def show(message: str) -> None:
        nonlocal showing
        qt_widgets.QMessageBox.warning(None, TITLE, message)
        showing = False

    import osam

    osam.apis.registered_model_types.append(model_type(endpoint, tell))
    print(f"labelme {version} with {endpoint.url}", flush=True)
    sys.argv = ["labelme", *settings.arguments]
    main()


def _import_labelme() -> tuple[str, Callable[[], None], Any, Any]:
    """Import the labelme that is installed, with samray first in its list of models.

    Returns:
        Its version, its `main`, and QtCore and QtWidgets of its Qt.

    Raises:
        ConfigError: it is missing, or built otherwise than the versions that were tried.
    """
    try:
        import osam  # noqa: F401
        from labelme import __version__

        if int(__version__.split(".")[0]) >= 7:
            _offer_in_labelme_7()
            from PySide6 import QtCore, QtWidgets
        else:
            _offer_in_labelme_6()
            from PyQt5 import QtCore, QtWidgets
        from labelme.__main__ import main
    except ModuleNotFoundError as exc:
        if exc.name in ("labelme", "osam"):
            raise ConfigError(f"labelme is not installed here; {INSTALL}") from exc
        raise _unusable(exc) from exc
    except (ImportError, AttributeError, TypeError) as exc:
        raise _unusable(exc) from exc
    return __version__, main, QtCore, QtWidgets


def _unusable(exc: Exception) -> ConfigError:
    reason = " ".join(str(exc).split())[:160]
    return ConfigError(
        f"this labelme cannot be used ({reason}); it was tried with {TRIED}: {INSTALL}"
    )


def _offer_in_labelme_6() -> None:
    from labelme.widgets._ai_assisted_annotation_widget import AiAssistedAnnotationWidget as Widget

    Widget._available_models = [(NAME, TITLE), *Widget._available_models]
    begin = Widget.__init__

    def begin_with_samray(
        self: Any,
        default_model: str,
        on_model_changed: Callable[[str], None],
        *words: Any,
        **options: Any,
    ) -> None:
        begin(self, TITLE, on_model_changed, *words, **options)
        on_model_changed(NAME)  # Qt emits no signal when the first entry is selected

    Widget.__init__ = begin_with_samray


def _offer_in_labelme_7() -> None:
    # The settings repeat the list of models, so they are imported before it grows.
    from labelme import _ai_models, _config

    option = _ai_models._AiAssistModelOption(
        model_name=NAME, display_name=TITLE, supports_point_prompts=True
    )

    def with_samray(setting: Any) -> Any:
        if setting.key_path != ("ai", "default"):
            return setting
        choices, labels = (*setting.choices, TITLE), (*setting.choice_labels, TITLE)
        return dataclasses.replace(setting, choices=choices, choice_labels=labels)

    load = _config.load_config

    def load_config(**options: Any) -> dict[str, Any]:
        config: dict[str, Any] = load(**options)
        config["ai"]["default"] = TITLE  # for this run only; the user's file stays as it is
        return config

    _config.SETTINGS = tuple(with_samray(setting) for setting in _config.SETTINGS)
    _config.load_config = load_config
    _ai_models.AI_ASSIST_MODEL_OPTIONS = (option, *_ai_models.AI_ASSIST_MODEL_OPTIONS)


def _read_token(path: str | None) -> str | None:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise ConfigError(f"--token-file: cannot be read ({exc.strerror})") from exc
