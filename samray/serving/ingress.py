"""The endpoint: HTTP in front of SAM, on Ray Serve. An image is encoded once in the whole cluster.

client -> Ingress (FastAPI: limits, errors, which model) -> Decoder (embeddings, masks)
             |                                                |  a miss
             +-> ImageVault (the files, by sha256) <----------+-> Encoder (batches)
"""

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
import uuid
from collections import OrderedDict
from importlib import resources as package_files
from pathlib import Path
from typing import Any

import ray
import requests
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from samray import __version__, cluster
from samray.config import ServeConfig
from samray.errors import AnnotationError, ConfigError
from samray.geometry.images import size_from_header
from samray.prediction.requests import (
    IMAGE_NAME,
    ApiError,
    ErrorAnswer,
    ImageAnswer,
    PredictAnswer,
    PredictRequest,
    read_json,
    read_request,
)
from samray.serving import labelstudio
from samray.serving.catalogue import ModelRef, read_catalogue
from samray.serving.replicas import Call, Decoder, Encoder, ImageVault
from samray.storage import require_folder, resolve

TOKEN_VARIABLE = "SAMRAY_TOKEN"
STORE_POLL_SECONDS = 1.0
LISTEN_SECONDS = 60
BODIES = 16  # of the largest size may be in memory at once; more are answered 429
RETRY_SECONDS = 0.1
FETCHES = 16  # pictures on their way from Label Studio at once; more are answered 429
KNOWN_PICTURES, KNOWN_SECONDS = 1024, 600  # addresses whose image is not fetched for each click
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ACCESS_LOG = logging.getLogger("samray.access")  # a line of JSON a request, to stderr


class Gate:
    """What every request passes first: id, who may ask, how much may be sent; and the access log.

    A plain ASGI layer, so that a body is refused while it arrives and not when it is in memory.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ingress: Ingress = serve.get_replica_context().servable_object
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
                    *ingress.cors_headers(scope),
                ]
            await send(message)

        received, arrived = 0, False
        deadline = asyncio.get_running_loop().time() + ingress.settings.timeout_seconds

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
            ingress.body_bytes += size
            if received > ingress.max_body:
                raise ApiError("too_large", f"the body has more than {ingress.max_body} bytes")
            if ingress.body_bytes > ingress.max_bodies:
                raise ApiError("too_busy", "too much is being sent at once; try again soon")
            return message

        try:
            if scope["method"] == "OPTIONS" and ingress.cors_headers(scope):
                await Response(status_code=204)(scope, receive, send_on)
                return
            ingress.require_allowed(scope)
            await self.app(scope, receive_some, send_on)
        except ApiError as exc:
            await error_response(exc, request_id)(scope, receive, send_on)
        finally:
            ingress.body_bytes -= received
            # Without a status so far, an error of ours is on its way to FastAPI's outermost layer.
            ingress.answered(scope, request_id, status or 500, time.perf_counter() - started)


def error_response(error: ApiError, request_id: str) -> JSONResponse:
    """The one shape of every error; counted by its reason."""
    serve.get_replica_context().servable_object.rejects.inc(tags={"code": error.code})
    headers = {"Retry-After": "1"} if error.code in ("too_busy", "not_ready") else {}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(request_id), error.status, headers)


def _errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    return {
        code: {"model": ErrorAnswer} for code in (*codes, 401, 403, 408, 413, 422, 429, 500, 503)
    }


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/PredictRequest"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["request"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "request": {
                            "type": "string",
                            "contentMediaType": "application/json",
                            "description": "a PredictRequest, without image",
                        },
                    },
                }
            },
        },
    }
}
_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}

app = FastAPI(title="samray", version=__version__, docs_url=None, redoc_url=None)
app.add_middleware(Gate)


def _describe_api() -> dict[str, Any]:
    """FastAPI's document, with the request that the routes read by themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        schema = PredictRequest.model_json_schema(ref_template=template)
        document["components"]["schemas"] |= schema.pop("$defs")
        document["components"]["schemas"]["PredictRequest"] = schema
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        if serve.get_replica_context().servable_object.token is not None:
            document["security"] = [{"token": []}]
        app.openapi_schema = document
    return app.openapi_schema


app.openapi = _describe_api  # type: ignore[method-assign]


@app.exception_handler(ApiError)
async def _refuse(request: Request, error: ApiError) -> JSONResponse:
    return error_response(error, request.state.request_id)


@app.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    text = {404: "no such path", 405: "not by this method"}.get(error.status_code, "bad request")
    response = error_response(ApiError(code, text), request.state.request_id)
    response.headers.update(error.headers or {})
    return response


@app.exception_handler(Exception)
async def _internal(request: Request, error: Exception) -> JSONResponse:
    request_id = request.state.request_id
    ACCESS_LOG.exception("request %s", request_id)
    return error_response(ApiError("internal", "an error of ours; try again"), request_id)


# Serve copies `app` while the class below is made: what its routes call must stand above.
async def _multipart(request: Request) -> tuple[bytes | None, str | None, str | None]:
    """The file `image`, its name, and the field `request` of a form."""
    try:
        async with request.form(max_files=2, max_fields=2, max_part_size=8 * 2**20) as form:
            image, text = form.get("image"), form.get("request")
            if len(form) != len(form.multi_items()) or form.keys() - {"image", "request"}:
                message = "the form may hold one file `image` and one field `request`, nothing else"
                raise ApiError("bad_request", message)
            if isinstance(image, str):
                message = "image: must be a file; with curl, -F image=@photo.jpg"
                raise ApiError("invalid_request", message, "image")
            raw, name = (None, None) if image is None else (await image.read(), image.filename)
            if text is not None and not isinstance(text, str):
                text = (await text.read()).decode("utf-8", "replace")
            return raw, name, text
    except (HTTPException, ClientDisconnect) as exc:
        message = "the body is no whole multipart form of one file `image` and one field `request`"
        raise ApiError("bad_request", message) from exc


def _basic_password(header: bytes) -> bytes:
    """The password of HTTP Basic, which is all that Label Studio can send; empty for others."""
    scheme, _, content = header.partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(content.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


async def _picture_bytes(ingress: "Ingress", address: str, field: str) -> bytes:
    """A picture that Label Studio's task names, in it or at Label Studio."""
    if address.startswith("data:"):
        return await asyncio.to_thread(labelstudio.read_data_url, address, field)
    if ingress.pictures is None:
        message = (
            f"{field}: pictures are fetched from Label Studio alone; start the endpoint with its "
            "address, samray serve --label-studio-url URL"
        )
        raise ApiError("invalid_request", message, field)
    # A client that hangs up ends its waiting and not the thread, so threads are what is counted.
    ingress.fetching = [fetch for fetch in ingress.fetching if not fetch.done()]
    if len(ingress.fetching) >= FETCHES:
        raise ApiError("too_busy", "too many pictures are being fetched; try again soon")
    fetch = ingress.fetchers.submit(ingress.pictures.fetch, address, field)
    ingress.fetching.append(fetch)
    return await asyncio.wrap_future(fetch)


@serve.deployment(max_ongoing_requests=512)
@serve.ingress(app)
class Ingress:
    """HTTP: which model, which image, how much, and every refusal."""

    def __init__(
        self,
        settings: ServeConfig,
        token: str | None,
        decoder: DeploymentHandle,
        vault: DeploymentHandle,
        pictures: labelstudio.PictureSource | None,
        listen: bool,
    ) -> None:
        self.settings, self.token, self.pictures = settings, token, pictures
        self.decoder, self.vault = decoder, vault
        self.max_body = int(settings.max_body_mb * 2**20)
        self.max_bodies, self.body_bytes = BODIES * self.max_body, 0
        self.catalogue: dict[str, ModelRef] = {}
        self.ready = False
        self.in_flight = 0
        # Of their own, so that a Label Studio that stalls takes no thread from other requests.
        self.fetchers = concurrent.futures.ThreadPoolExecutor(FETCHES)
        self.fetching: list[concurrent.futures.Future[bytes]] = []
        self.known: OrderedDict[str, tuple[str, tuple[int, int], float]] = OrderedDict()
        self.requests = Counter("samray_requests", "answers, by status", ("path", "status"))
        self.rejects = Counter("samray_rejects", "refusals, by reason", ("code",))
        if not ACCESS_LOG.handlers:
            ACCESS_LOG.addHandler(logging.StreamHandler())
        ACCESS_LOG.setLevel(logging.INFO)
        ACCESS_LOG.propagate = False
        loop = asyncio.get_event_loop()
        self.watching = loop.create_task(self._watch_models())
        self.listening = loop.create_task(self._listen()) if listen else None

    async def _listen(self) -> None:
        """Take requests from the network right here, without Serve's proxy in front.

        The proxy is a process of its own, in which each request waits twice.
        """
        while serve.get_replica_context().servable_object is None:
            await asyncio.sleep(0.01)  # until Serve has made all of this replica
        options = HTTPOptions(host=self.settings.host, port=self.settings.port)
        # Shared, for after a kill the port is still held for a minute by connections that were.
        serving, _ = await start_asgi_http_server(
            self._asgi_app,  # type: ignore[attr-defined]  # Serve's decorator sets it
            options,
            event_loop=asyncio.get_running_loop(),
            enable_so_reuseport=True,
        )
        await serving

    def check_health(self) -> None:
        """Have Serve replace a replica that stopped listening."""
        if self.listening is not None and self.listening.done():
            raise RuntimeError("this replica does not listen any more")

    async def _watch_models(self) -> None:
        """Learn which models there are; for a store, again and again."""
        told: set[str] = set()
        while True:
            try:
                catalogue = await asyncio.to_thread(read_catalogue, self.settings, self.catalogue)
                loaded = {}
                for name, ref in catalogue.items():
                    known = self.catalogue.get(name)
                    if known == ref or await self._can_load(ref, told):
                        loaded[name] = ref
                    elif known is not None:
                        loaded[name] = known
                self.catalogue, self.ready = loaded, bool(loaded)
                told.discard("")
            except Exception:  # the store may be away for a while; what is loaded goes on
                if "" not in told:
                    ACCESS_LOG.exception("models could not be read; the last known ones stay")
                told.add("")
            await asyncio.sleep(STORE_POLL_SECONDS)

    async def _can_load(self, ref: ModelRef, told: set[str]) -> bool:
        """Let a Decoder load a new version; a broken one is told once and keeps out no other."""
        try:
            await self._decoder(ref, "").warm_up.remote(ref)
        except Exception:
            if ref.version not in told:
                message = "%s %s cannot be loaded; what was loaded before stays"
                ACCESS_LOG.exception(message, ref.name, ref.version)
            told.add(ref.version)
            return False
        return True

    def _decoder(self, ref: ModelRef, image_id: str) -> DeploymentHandle:
        return self.decoder.options(session_id=f"{image_id}{ref.digest}")

    def cors_headers(self, scope: Any) -> list[tuple[bytes, bytes]]:
        """What lets a page of a listed origin read the answer; nothing for others."""
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
        """Refuse strangers and bodies that say they are too large.

        Raises:
            ApiError: unauthorized, forbidden or too_large.
        """
        headers = dict(scope["headers"])
        path = scope["path"]
        if path not in ("/", "/v1/healthz", "/v1/readyz", f"{labelstudio.PREFIX}/health"):
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
        """Count, and write a line of the access log."""
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.requests.inc(tags={"path": path, "status": str(status)})
        line = {
            "request_id": request_id,
            "method": scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
        }
        ACCESS_LOG.info(json.dumps(line))

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """The page where people click."""
        text = (package_files.files("samray") / "templates" / "endpoint.html").read_text("utf-8")
        policy = "default-src 'self'; img-src 'self' blob: data:; style-src 'unsafe-inline'; "
        policy += "script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/v1/healthz", openapi_extra={"security": []})
    async def healthz(self) -> dict[str, str]:
        """Answer as long as this process lives."""
        return {"status": "ok"}

    @app.get("/v1/readyz", responses=_errors(), openapi_extra={"security": []})
    async def readyz(self) -> dict[str, str]:
        """Answer 200 once a model is loaded."""
        if not self.ready:
            raise ApiError("not_ready", "models are still being loaded")
        return {"status": "ready"}

    @app.get("/v1/models", responses=_errors())
    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """List the models that requests may name; the first is the default."""
        return {
            "models": [
                {
                    "name": ref.name,
                    "version": ref.version,
                    "checkpoint_digest": ref.digest,
                    "model_type": ref.model_type,
                }
                for ref in self.catalogue.values()
            ]
        }

    @app.post(
        "/v1/images",
        response_model=ImageAnswer,
        responses=_errors(400, 404, 415),
        openapi_extra=_IMAGE_BODY,
    )
    async def images(self, request: Request, model: str | None = None) -> Any:
        """Upload an image and encode it, so that the first click is fast, too."""
        started = time.perf_counter()
        ref = self._model(model)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            raw, _, _ = await _multipart(request)
            if raw is None:
                raise ApiError("invalid_request", "image: a file of this name is missing", "image")
        else:
            raw = await request.body()
        image_id = await self._keep(raw)
        answer = await self._ask(Call(image_id, ref, None))
        return self._finished(answer, image_id, ref, request.state.request_id, started)

    @app.delete("/v1/images/{image_id}", status_code=204, responses=_errors(404))
    async def forget(self, image_id: str) -> Response:
        """Forget an image and what was made of it."""
        there = await self.vault.drop.remote(image_id)
        for ref in self.catalogue.values():
            await self._decoder(ref, image_id).forget.remote(image_id)
        if not there:
            raise ApiError("unknown_image", "this image is not here", "image_id")
        return Response(status_code=204)

    @app.post(
        "/v1/predict",
        response_model=PredictAnswer,
        response_model_exclude_none=True,
        responses=_errors(400, 404, 415),
        openapi_extra=_BODY,
    )
    async def predict(self, request: Request) -> Any:
        """Answer prompts on one image with masks."""
        started = time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        raw: bytes | None = None
        name: str | None = None
        if kind == "multipart/form-data":
            raw, name, text = await _multipart(request)
            if text is None:
                message = "request: a field of this name, JSON, is missing"
                raise ApiError("invalid_request", message, "request")
            asked = await asyncio.to_thread(read_request, text)
        else:
            asked = await asyncio.to_thread(read_request, await request.body())
        given = [raw is not None, asked.image is not None, asked.image_id is not None]
        if sum(given) != 1:
            raise ApiError("invalid_request", "give exactly one of image and image_id", "image")
        ref = self._model(asked.model)
        if asked.image is not None:
            raw = await asyncio.to_thread(base64.b64decode, asked.image.base64)
        image_id = asked.image_id or await self._keep(raw or b"")
        if asked.image_name is None and name and re.fullmatch(IMAGE_NAME, name[:200]):
            asked = asked.model_copy(update={"image_name": name[:200]})
        slim = asked.model_copy(update={"image": None})
        answer = await self._ask(Call(image_id, ref, slim))
        return self._finished(answer, image_id, ref, request.state.request_id, started)

    # Label Studio's own routes: it says how they are called, so they stand in no document of ours.
    @app.get(f"{labelstudio.PREFIX}/health", include_in_schema=False)
    async def label_studio_health(self) -> dict[str, str]:
        """Answer 200 once a model is loaded."""
        self._model(None)
        return {"status": "UP", "model_class": "samray"}

    @app.post(f"{labelstudio.PREFIX}/setup", include_in_schema=False)
    async def label_studio_setup(self) -> dict[str, str]:
        """Name the model; each `predict` brings its own labelling config, so nothing is kept."""
        return {"model_version": self._label_studio_version(self._model(None))}

    @app.post(f"{labelstudio.PREFIX}/webhook", include_in_schema=False)
    async def label_studio_webhook(self) -> dict[str, str]:
        """Take note of nothing: what people label here trains no model."""
        return {"status": "ignored"}

    @app.post(f"{labelstudio.PREFIX}/predict", include_in_schema=False)
    async def label_studio_predict(self, request: Request) -> dict[str, list[dict[str, Any]]]:
        """Answer the regions drawn by a smart tool with one mask."""
        body = await request.body()
        asked = await asyncio.to_thread(read_json, labelstudio.PredictionRequest, body)
        regions = asked.regions()
        if not regions:  # Label Studio asks for whole tasks, too; an empty list stores nothing
            return {"results": []}
        to_name = next((region.to_name for region in regions if region.to_name), None)
        output = await asyncio.to_thread(labelstudio.read_output, asked.label_config, to_name)
        field = f"tasks[0].data.{output.data_key}"
        address = asked.tasks[0].data.get(output.data_key)
        if not isinstance(address, str) or not address:
            message = f"{field}: needs the address of a picture"
            raise ApiError("invalid_request", message, field)
        ref = self._model(None)
        version = self._label_studio_version(ref)
        nothing = {"result": [], "score": 0.0, "model_version": version}
        for fresh in (False, True):
            image_id, size = await self._label_studio_image(address, field, fresh)
            prompt = labelstudio.read_prompt(regions, size, output.to_name)
            if prompt is None:
                return {"results": [nothing]}
            try:
                call = Call(image_id, ref, labelstudio.request_for(prompt, output))
                answer = await self._ask(call)
                break
            except ApiError as exc:
                if exc.code != "unknown_image" or fresh:  # else the vault has forgotten it
                    raise ApiError(exc.code, exc.message, field) from exc
        label = labelstudio.choose_label(regions, output)
        mask = answer["results"][0]["masks"][0]
        made = await asyncio.to_thread(
            labelstudio.build_prediction, mask, size, output, label, version
        )
        return {"results": [made]}

    def _label_studio_version(self, ref: ModelRef) -> str:
        return f"{ref.name} {ref.version}"

    async def _label_studio_image(
        self, address: str, field: str, fresh: bool
    ) -> tuple[str, tuple[int, int]]:
        """Return id and (H, W) of a task's picture, which the vault then has."""
        known = self.known.get(address)
        if known is not None and not fresh and time.monotonic() < known[2]:
            return known[0], known[1]
        raw = await _picture_bytes(self, address, field)
        try:
            image_id = await self._keep(raw)
        except ApiError as exc:
            hint = ""
            if exc.code == "unsupported_format" and not address.startswith("data:"):
                hint = "; if it is a page to log in, check Label Studio's key"
            raise ApiError(exc.code, f"{field}: {exc.message}{hint}", field) from exc
        size = size_from_header(raw)
        if not address.startswith("data:"):
            self.known[address] = (image_id, size, time.monotonic() + KNOWN_SECONDS)
            self.known.move_to_end(address)
            while len(self.known) > KNOWN_PICTURES:
                self.known.popitem(last=False)
        return image_id, size

    def _model(self, name: str | None) -> ModelRef:
        if not self.catalogue:
            raise ApiError("not_ready", "models are still being loaded")
        if name is None:
            return next(iter(self.catalogue.values()))
        if name not in self.catalogue:
            there = ", ".join(self.catalogue)
            raise ApiError(
                "unknown_model", f"there is no model {name!r}; there is {there}", "model"
            )
        return self.catalogue[name]

    async def _keep(self, raw: bytes) -> str:
        """Check a file by its header and give it to the vault; return its id."""
        try:
            height, width = size_from_header(raw)
        except AnnotationError as exc:
            codes = {"format": "unsupported_format", "size": "too_large"}
            code = codes.get(exc.field, "invalid_image")
            raise ApiError(code, exc.reason, "image") from exc
        if height * width > self.settings.max_megapixels * 1e6:
            limit = f"{self.settings.max_megapixels:g} megapixels"
            raise ApiError("too_large", f"{width} x {height} pixels; the limit is {limit}", "image")
        image_id = "sha256:" + await asyncio.to_thread(lambda: hashlib.sha256(raw).hexdigest())
        await self.vault.put.remote(image_id, raw)
        return image_id

    async def _ask(self, call: Call) -> dict[str, Any]:
        """Let a Decoder answer, unless too many wait already; another if one dies meanwhile."""
        if self.in_flight >= self.settings.max_in_flight:
            raise ApiError("too_busy", "too many requests wait; try again soon")
        self.in_flight += 1
        try:
            decoder = self._decoder(call.model, call.image_id)
            async with asyncio.timeout(self.settings.timeout_seconds):
                while True:
                    response = decoder.answer.remote(call)
                    try:
                        answer: dict[str, Any] = await response
                        break
                    except RayActorError:  # it, or its Encoder; Serve starts another
                        await asyncio.sleep(RETRY_SECONDS)
                    except asyncio.CancelledError:
                        response.cancel()  # nobody waits for it any more; nor should others
                        raise
        except TimeoutError as exc:
            raise ApiError("timed_out", "the answer took too long; try again") from exc
        except BackPressureError as exc:
            raise ApiError("too_busy", "too many requests wait; try again soon") from exc
        finally:
            self.in_flight -= 1
        if "refused" in answer:
            raise ApiError(*answer["refused"])
        return answer

    def _finished(
        self,
        answer: dict[str, Any],
        image_id: str,
        ref: ModelRef,
        request_id: str,
        started: float,
    ) -> dict[str, Any]:
        total = 1000 * (time.perf_counter() - started)
        encode, decode = answer.pop("encode_ms"), answer.pop("decode_ms")
        timing = {
            "queue": max(0.0, total - encode - decode),
            "encode": encode,
            "decode": decode,
            "total": total,
        }
        return {
            "image_id": image_id,
            "model": {"name": ref.name, "version": ref.version, "checkpoint_digest": ref.digest},
            "timing_ms": {key: round(value, 2) for key, value in timing.items()},
            "request_id": request_id,
            **answer,
        }


def read_token(settings: ServeConfig) -> str | None:
    """The token that clients must send: from a file, else from $SAMRAY_TOKEN; None if neither.

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


def build_app(settings: ServeConfig) -> serve.Application:
    """Return the application for `serve deploy configs/serve.yaml`, behind Serve's proxies.

    Raises:
        ConfigError: no model can be served under these settings.
    """
    return bind_app(settings, listen=False)  # Serve allows a builder one parameter only


def bind_app(settings: ServeConfig, listen: bool) -> serve.Application:
    """Return the application.

    Args:
        listen: have the Ingress take requests at the settings' host and port by itself; else
            Serve's proxies do, which find it wherever in a cluster it is.

    Raises:
        ConfigError: no model can be served under these settings.
    """
    if settings.store is not None and settings.checkpoint is not None:
        raise ConfigError("give --checkpoint or --store, not both")
    if settings.model is not None and settings.store is None and settings.checkpoint is None:
        raise ConfigError("--model names a model of a --store, or a --checkpoint; give one of them")
    if settings.store is not None:
        require_folder(resolve(settings.store, "--store"), "--store")
    read_catalogue(settings, {})  # refuse now what no replica could load
    token = read_token(settings)
    pictures = labelstudio.read_source(settings)
    options = {"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica}
    vault = ImageVault.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0}
    ).bind(settings)
    encoder = Encoder.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": settings.encoder_replicas,
            "target_ongoing_requests": 4,
        },
    ).bind(settings)
    decoder = Decoder.options(  # type: ignore[attr-defined]
        ray_actor_options=options,
        num_replicas=settings.decoder_replicas,
        # More than the Ingress lets through: waiting inside costs nothing, while Serve's router
        # asks a full replica again and again, which halved the answers per second.
        max_ongoing_requests=2 * settings.max_in_flight,
        max_queued_requests=settings.max_in_flight,
    ).bind(settings, encoder, vault)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,  # clients wait while nobody notices that it died
    )
    application: serve.Application = ingress.bind(settings, token, decoder, vault, pictures, listen)
    return application


def serve_here(settings: ServeConfig) -> None:
    """Start the endpoint on this machine, or on the cluster of RAY_ADDRESS, until Ctrl-C.

    Raises:
        ConfigError: no model can be served, the port is taken, or strangers could ask.
    """
    if settings.host not in LOOPBACK and read_token(settings) is None:
        raise ConfigError(
            f"--host {settings.host}: others could ask; set a token first (--token-file or "
            f"${TOKEN_VARIABLE}), e.g. `openssl rand -hex 24 > token.txt`"
        )
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as exc:
            raise ConfigError(
                f"--port {settings.port} on {settings.host} cannot be had ({exc.strerror}); "
                "choose another --port"
            ) from exc
    alone = not os.environ.get("RAY_ADDRESS")
    application = bind_app(settings, listen=alone)
    # Our handlers never block, so they need no thread of their own; more requests pass without.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")  # its ports are Serve's choice
    cluster.start()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    options = {
        "host": settings.host,
        "port": settings.port,
        "request_timeout_s": settings.timeout_seconds + 30,
    }
    try:
        serve.start(
            proxy_location="Disabled" if alone else "EveryNode",
            http_options=options,
            logging_config={"log_level": "WARNING"},
        )
        serve.run(application, name="samray", route_prefix="/")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        host = f"[{host}]" if ":" in host else host
        address = f"http://{host}:{settings.port}/"
        _wait_until_ready(address)
        print(f"serving {address}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        print("stopped", flush=True)
    finally:
        if alone:
            ray.shutdown()  # all of it was ours
        else:
            serve.shutdown()


def _wait_until_ready(address: str) -> None:
    deadline = time.monotonic() + LISTEN_SECONDS
    while True:
        try:
            if requests.get(f"{address}v1/readyz", timeout=60).status_code == 200:
                return
        except requests.ConnectionError:  # not listening yet
            if time.monotonic() > deadline:
                raise
        else:
            deadline = float("inf")  # models are being loaded
        time.sleep(0.2)
