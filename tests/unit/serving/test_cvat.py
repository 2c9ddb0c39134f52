"""CVAT's function without an endpoint; integration/test_annotation_tools.py has the rest."""

import base64
import importlib.util
import io
import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import yaml

FOLDER = Path(__file__).parents[3] / "serve" / "cvat"


def test_all_requests_of_a_click_share_one_limit(monkeypatch):
    """Nuclio kills a worker that takes longer than its limit, and the next click has none."""
    spec = importlib.util.spec_from_file_location("cvat_function", FOLDER / "main.py")
    function = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(function)
    now, limits = 100.0, []

    def urlopen(request, timeout):
        """Take eleven seconds; forget each image at once."""
        nonlocal now
        limits.append((request.full_url.rpartition("/")[2], timeout))
        now += min(11, timeout)
        if timeout < 11:
            raise TimeoutError
        if request.full_url.endswith("images"):
            return io.BytesIO(json.dumps({"width": 30, "height": 20}).encode())
        error = json.dumps({"error": {"code": "unknown_image", "message": "upload it"}}).encode()
        raise urllib.error.HTTPError(request.full_url, 404, "", {}, io.BytesIO(error))

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("SAMRAY_URL", "http://127.0.0.1:8000")
    context = SimpleNamespace(user_data=SimpleNamespace(), Response=SimpleNamespace)
    function.init_context(context)
    image = base64.b64encode(b"image").decode()
    event = SimpleNamespace(body={"image": image, "pos_points": [[5, 5]]})
    assert function.handler(context, event).status_code == 404
    assert limits == [("images", 25), ("predict", 14)]
    limits.clear()
    assert function.handler(context, event).status_code == 502  # a known image is not sent at first
    assert limits == [("predict", 25), ("images", 14), ("predict", 3)]
    spec = yaml.safe_load((FOLDER / "function.yaml").read_text())["spec"]
    assert int(spec["eventTimeout"].removesuffix("s")) > function.SECONDS
