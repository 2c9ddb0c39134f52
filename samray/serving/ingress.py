"""The routes of the HTTP endpoint. An image is encoded once in the whole cluster.

client -> Gate -> Ingress (routes, model, errors) -> Decoder (embeddings, masks)
                     |                                  |  cache miss
                     +-> ImageVault (files by sha256) <-+-> Encoder (batches)
"""

import asyncio
import base64
import concurrent.futures
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib import resources as package_files
from pathlib import PurePath
from typing import Any

import ray
import requests
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.util.metrics import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from samray import __version__
from samray.config import ServeConfig
from samray.errors import AnnotationError
from samray.geometry.images import size_from_header
from samray.prediction.requests import (
    IMAGE_NAME,
    ApiError,
    Asked,
    ImageAnswer,
    PredictAnswer,
    PredictRequest,
    SegmentAnswer,
    SegmentRequest,
    read_request,
    require_json,
)
from samray.serving import labelstudio, labelstudio_client
from samray.serving.catalogue import Call, ModelRef, read_catalogue
from samray.serving.gate import ACCESS_LOG, PAGE_FILES, Gate, Policy, open_access_log
from samray.serving.listener import Listener
from samray.serving.openapi import (
    IMAGE_BODY,
    PREVIEW_ANSWER,
    describe_api,
    errors,
    request_body,
)

POLL_SECONDS = 1.0  # of the store and the decoder
STUCK_SECONDS = 20.0
METRICS_SECONDS = 5
METRIC = re.compile(r"(# \w+ )?ray_samray_")  # Ray puts its name in front
RETRY_SECONDS = 0.1
FETCHES = 16  # concurrent fetches of images from Label Studio; more are answered 429
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a page and scripts of two versions must not meet
}
KNOWN_PICTURES, KNOWN_SECONDS = 1024, 600  # URLs whose image is not fetched for each click


def _policy() -> Policy:
    """The policy of this replica."""
    policy: Policy = serve.get_replica_context().servable_object.policy
    return policy


app = FastAPI(
    title="samray", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
)
app.add_middleware(Gate, policy_of=_policy)


def _openapi() -> dict[str, Any]:
    if app.openapi_schema is None:
        app.openapi_schema = describe_api(app, needs_token=_policy().token is not None)
    return app.openapi_schema


app.openapi = _openapi  # type: ignore[method-assign]


@app.exception_handler(ApiError)
async def _refuse(request: Request, error: ApiError) -> JSONResponse:
    return _policy().error_response(error, request.state.request_id)


@app.exception_handler(HTTPException)
async def _no_route(request: Request, error: HTTPException) -> JSONResponse:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    text = {404: "no such path", 405: "not by this method"}.get(error.status_code, "bad request")
    response = _policy().error_response(ApiError(code, text), request.state.request_id)
    response.headers.update(error.headers or {})
    return response


@app.exception_handler(Exception)
async def _internal(request: Request, error: Exception) -> JSONResponse:
    request_id = request.state.request_id
    ACCESS_LOG.exception("request %s", request_id)
    return _policy().error_response(ApiError("internal", "an error of ours; try again"), request_id)


# Serve copies `app` when the class below is decorated: its routes can only call what is above.
async def _multipart(request: Request) -> tuple[bytes | None, str | None, str | None]:
    """Return the file `image`, its name, and the field `request` of a form."""
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


async def _uploaded(request: Request) -> bytes:
    """Return the image of a request: the file `image` of a form, or the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return await request.body()
    raw, _, _ = await _multipart(request)
    if raw is None:
        raise ApiError("invalid_request", "image: a file of this name is missing", "image")
    return raw


async def _picture_bytes(ingress: "Ingress", address: str, field: str) -> bytes:
    """Return the image of a Label Studio task, from a data: URL or from Label Studio."""
    if address.startswith("data:"):
        return await asyncio.to_thread(labelstudio_client.read_data_url, address, field)
    if ingress.pictures is None:
        message = (
            f"{field}: pictures are fetched from Label Studio alone; start the endpoint with its "
            "address, samray serve --label-studio-url URL"
        )
        raise ApiError("invalid_request", message, field)
    # A client that disconnects does not end the thread, so threads are counted, not requests.
    ingress.fetching = [fetch for fetch in ingress.fetching if not fetch.done()]
    if len(ingress.fetching) >= FETCHES:
        raise ApiError("too_busy", "too many pictures are being fetched; try again soon")
    fetch = ingress.fetchers.submit(ingress.pictures.fetch, address, field)
    ingress.fetching.append(fetch)
    return await asyncio.wrap_future(fetch)


def read_metrics() -> str:
    """Collect the metrics named samray_* from the exporter of each node of the cluster.

    Raises:
        ApiError: bad_gateway; an exporter does not answer.
    """
    lines: dict[str, None] = {}  # in order, each once: nodes repeat the descriptions
    session = requests.Session()
    session.trust_env = False  # no proxy in between
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            text = session.get(address, timeout=METRICS_SECONDS).text
        except requests.RequestException as exc:
            raise ApiError("bad_gateway", "a node's metrics cannot be read") from exc
        lines |= dict.fromkeys(line for line in text.splitlines() if METRIC.match(line))
    return "".join(f"{line}\n" for line in lines)


@serve.deployment(max_ongoing_requests=512)
@serve.ingress(app)
class Ingress:
    """Receives HTTP requests, chooses model and image, and lets a Decoder answer."""

    def __init__(
        self,
        settings: ServeConfig,
        offered: dict[str, ModelRef],
        token: str | None,
        decoder: DeploymentHandle,
        encoder: DeploymentHandle,
        vault: DeploymentHandle,
        pictures: labelstudio_client.PictureSource | None,
        listen: bool,
        log_socket: str | None,
    ) -> None:
        open_access_log(log_socket)
        self.settings, self.pictures = settings, pictures
        self.decoder, self.encoder, self.vault = decoder, encoder, vault
        answers = Counter("samray_requests", "answers, by status", ("path", "status"))
        refusals = Counter("samray_rejects", "refusals, by reason", ("code",))
        self.policy = Policy(
            settings,
            token,
            on_answer=lambda path, status: answers.inc(tags={"path": path, "status": str(status)}),
            on_refusal=lambda code: refusals.inc(tags={"code": code}),
        )
        self.offered = offered  # the models that the settings name
        self.catalogue: dict[str, ModelRef] = {}  # those of them that are loaded
        self.states = dict.fromkeys(offered, "loading")
        # Digest of a model -> of its image encoder, for all versions served since the start.
        self.encoders: dict[str, str] = {}
        self.in_flight = 0
        self.parsing = asyncio.Lock()
        self.stuck = False
        # A pool of its own, so that a stalled Label Studio takes no threads from other requests.
        self.fetchers = concurrent.futures.ThreadPoolExecutor(FETCHES)
        self.fetching: list[concurrent.futures.Future[bytes]] = []
        self.known: OrderedDict[str, tuple[str, tuple[int, int], float]] = OrderedDict()
        loop = asyncio.get_event_loop()
        self.watching = loop.create_task(self._watch_models())
        self.listener: Listener | None = None
        self.listening = loop.create_task(self._listen()) if listen else None

    async def _listen(self) -> None:
        """Listen for requests in this process, without Serve's proxy.

        The proxy is a separate process that each request and answer passes: it made a click 18 ms
        slower.
        """
        while serve.get_replica_context().servable_object is None:
            await asyncio.sleep(0.01)  # until Serve has finished creating this replica
        self.listener = Listener(
            self._asgi_app,  # type: ignore[attr-defined]  # Serve's decorator sets it
            self.settings.host,
            self.settings.port,
            self.settings.grace_seconds,
        )
        await self.listener.run()

    def check_health(self) -> None:
        """Let Serve replace a replica that stopped listening by itself."""
        if self.listening is not None and self.listening.done() and not self.policy.draining:
            raise RuntimeError("this replica does not listen any more")

    async def drain(self) -> None:
        """Refuse new requests, and return once those in progress are answered, or time is up."""
        self.policy.draining = True
        if self.listener is not None and self.listening is not None:
            self.listener.stop()
            await asyncio.wait([self.listening], timeout=self.settings.grace_seconds)

    async def _watch_models(self) -> None:
        """Read which models there are; a store is polled."""
        told: set[str] = set()
        while True:
            try:
                self.offered = await asyncio.to_thread(read_catalogue, self.settings, self.offered)
                self.states = {name: self.states.get(name, "loading") for name in self.offered}
                loaded = {}
                for name, ref in self.offered.items():
                    known = self.catalogue.get(name)
                    if known == ref or await self._can_load(ref, told):
                        loaded[name] = ref
                        self.states[name] = "ready"
                    elif known is not None:
                        loaded[name] = known
                        self.states[name] = "outdated"
                    else:
                        self.states[name] = "failed"
                self.catalogue = loaded
                told.discard("")
            except Exception:  # the store may be unreachable for a while; loaded models stay
                if "" not in told:
                    ACCESS_LOG.exception("models could not be read; the last known ones stay")
                told.add("")
            self.stuck = bool(self.catalogue) and await self._decoder_is_stuck()
            await asyncio.sleep(POLL_SECONDS)

    async def _decoder_is_stuck(self) -> bool:
        """Whether a Decoder works on one piece for longer than any piece should take."""
        ref = next(iter(self.catalogue.values()))
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                seconds: float = await self._decoder(ref, "").busy_seconds.remote()
        except (TimeoutError, RayActorError):
            return True
        return seconds > STUCK_SECONDS

    async def _can_load(self, ref: ModelRef, told: set[str]) -> bool:
        """Let a Decoder load a new version; a broken one is logged once and blocks no other."""
        try:
            self.encoders[ref.digest] = await self._decoder(ref, "").warm_up.remote(ref)
        except Exception:
            if ref.version not in told:
                message = "%s %s cannot be loaded; what was loaded before stays"
                ACCESS_LOG.exception(message, ref.name, ref.version)
            told.add(ref.version)
            return False
        return True

    def _decoder(self, ref: ModelRef, image_id: str) -> DeploymentHandle:
        """The Decoder that keeps what belongs to an image under the model's image encoder."""
        encoder = self.encoders.get(ref.digest, ref.digest)
        return self.decoder.options(session_id=f"{image_id}{encoder}")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """The page where people click."""
        text = (package_files.files("samray") / "templates" / "endpoint.html").read_text("utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    @app.get(f"{PAGE_FILES}{{name}}", include_in_schema=False)
    async def page_file(self, name: str) -> Response:
        """A style sheet or script of the page."""
        folder = package_files.files("samray") / "templates" / "endpoint"
        kind = {".css": "text/css", ".js": "text/javascript"}.get(PurePath(name).suffix)
        if kind is None or name not in {file.name for file in folder.iterdir()}:
            raise ApiError("not_found", "no such path")
        return Response((folder / name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    @app.get("/v1/healthz", openapi_extra={"security": []})
    async def healthz(self) -> dict[str, str]:
        """Answer 200 while this process runs."""
        return {"status": "ok"}

    @app.get("/v1/readyz", responses=errors(404), openapi_extra={"security": []})
    async def readyz(self, model: str | None = None) -> dict[str, Any]:
        """Answer 200 once a model, or the one named, is loaded.

        `models` has the state of each: loading, ready, failed (it cannot be loaded), or outdated
        (its current version cannot be loaded, and the one before is served).
        """
        if model in self.states and model not in self.catalogue:
            raise ApiError("not_ready", f"the model {model!r}: {self.states[model]}", "model")
        self._model(model)
        if self.stuck:
            raise ApiError("not_ready", "the decoder does not finish its work")
        return {"status": "ready", "models": self.states}

    @app.get("/metrics", include_in_schema=False)
    async def metrics(self) -> PlainTextResponse:
        """Return samray's metrics of all nodes, in Prometheus' text format."""
        return PlainTextResponse(await asyncio.to_thread(read_metrics))

    @app.get("/v1/models", responses=errors())
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
        responses=errors(400, 404, 415),
        openapi_extra=IMAGE_BODY,
    )
    async def images(self, request: Request, model: str | None = None) -> Any:
        """Upload and encode an image, so that the first click is fast."""
        started = time.perf_counter()
        ref = self._model(model)
        image_id = await self._keep(await _uploaded(request))
        answer = await self._ask(Call(image_id, ref, None))
        return self._finished(answer, image_id, ref, request.state.request_id, started)

    @app.post(
        "/v1/preview",
        response_class=Response,
        responses={**errors(400, 415), **PREVIEW_ANSWER},
        openapi_extra=IMAGE_BODY,
    )
    async def preview(self, request: Request) -> Response:
        """Return an image as the models see it: an 8-bit PNG, EXIF applied, 16 bits stretched."""
        raw = await _uploaded(request)
        self._require_acceptable(raw)
        made = await self._answered(lambda: self.encoder.preview.remote(raw))
        if isinstance(made, str):
            raise ApiError("invalid_image", made, "image")
        return Response(made, media_type="image/png")

    @app.delete("/v1/images/{image_id}", status_code=204, responses=errors(404))
    async def forget(self, image_id: str) -> Response:
        """Delete an image, its embeddings and its answers."""
        there = await self.vault.drop.remote(image_id)
        for encoder in set(self.encoders.values()):
            await self.decoder.options(session_id=f"{image_id}{encoder}").forget.remote(image_id)
        if not there:
            raise ApiError("unknown_image", "this image is not here", "image_id")
        return Response(status_code=204)

    @app.post(
        "/v1/predict",
        response_model=PredictAnswer,
        response_model_exclude_none=True,
        responses=errors(400, 404, 415),
        openapi_extra=request_body(PredictRequest),
    )
    async def predict(self, request: Request) -> Any:
        """Answer prompts on one image with masks."""
        started = time.perf_counter()
        image_id, ref, asked = await self._asked(request, PredictRequest)
        answer = await self._ask(Call(image_id, ref, asked))
        return self._finished(answer, image_id, ref, request.state.request_id, started)

    @app.post(
        "/v1/segment",
        response_model=SegmentAnswer,
        responses=errors(400, 404, 415),
        openapi_extra=request_body(SegmentRequest),
    )
    async def segment(self, request: Request) -> Response:
        """Find all objects of an image, the surest first."""
        started = time.perf_counter()
        image_id, ref, asked = await self._asked(request, SegmentRequest)
        answer = await self._ask(Call(image_id, ref, asked))
        objects = answer.pop("json")  # as bytes: thousands of masks would keep this process busy
        rest = self._finished(answer, image_id, ref, request.state.request_id, started)
        content = json.dumps(rest)[:-1].encode() + b", " + objects + b"}"
        return Response(content, media_type="application/json")

    async def _asked(self, request: Request, model: type[Asked]) -> tuple[str, ModelRef, Asked]:
        """Read a request about an image, and keep the image if it brings one."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        raw: bytes | None = None
        name: str | None = None
        if kind == "multipart/form-data":
            raw, name, text = await _multipart(request)
            if text is None and model is SegmentRequest:
                text = "{}"  # every setting has a default
            if text is None:
                message = "request: a field of this name, JSON, is missing"
                raise ApiError("invalid_request", message, "request")
            asked = await asyncio.to_thread(read_request, text, model)
        else:
            require_json(kind)
            asked = await asyncio.to_thread(read_request, await request.body(), model)
        given = [raw is not None, asked.image is not None, asked.image_id is not None]
        if sum(given) != 1:
            raise ApiError("invalid_request", "give exactly one of image and image_id", "image")
        ref = self._model(asked.model)
        if asked.image is not None:
            raw = await asyncio.to_thread(base64.b64decode, asked.image.base64)
        image_id = asked.image_id or await self._keep(raw or b"")
        if asked.image_name is None and name and re.fullmatch(IMAGE_NAME, name[:200]):
            asked = asked.model_copy(update={"image_name": name[:200]})
        return image_id, ref, asked.model_copy(update={"image": None})

    # Label Studio defines these routes, so they are not in the OpenAPI document.
    @app.get(f"{labelstudio.PREFIX}/health", include_in_schema=False)
    async def label_studio_health(self) -> dict[str, str]:
        """Answer 200 once a model is loaded."""
        self._model(None)
        return {"status": "UP", "model_class": "samray"}

    @app.post(f"{labelstudio.PREFIX}/setup", include_in_schema=False)
    async def label_studio_setup(self) -> dict[str, str]:
        """Return the model version; nothing is kept, as each `predict` brings its own config."""
        return {"model_version": self._label_studio_version(self._model(None))}

    @app.post(f"{labelstudio.PREFIX}/webhook", include_in_schema=False)
    async def label_studio_webhook(self) -> dict[str, str]:
        """Ignore events: labels made in Label Studio do not train a model by themselves."""
        return {"status": "ignored"}

    @app.post(f"{labelstudio.PREFIX}/predict", include_in_schema=False)
    async def label_studio_predict(self, request: Request) -> Response:
        """Answer the regions of a smart tool with one mask, whole tasks with all objects."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        require_json(kind)
        body = await request.body()
        async with self.parsing:  # one at a time, as it takes many times the body's memory
            asked = await asyncio.to_thread(labelstudio.read_prediction_request, body)
        ref = self._model(None)
        version, regions = self._label_studio_version(ref), asked.regions()
        nothing = labelstudio.no_prediction(version, drawn=bool(regions))
        until = time.monotonic() + self.settings.timeout_seconds
        output: labelstudio.Output | ApiError
        try:
            to_name = next((region.to_name for region in regions if region.to_name), None)
            output = await asyncio.to_thread(labelstudio.read_output, asked.label_config, to_name)
        except ApiError as exc:
            output = exc
        results: list[bytes] = []
        for number in range(len(asked.tasks)):
            note = labelstudio.NO_OBJECT if regions else labelstudio.NOTHING_FOUND
            made: dict[str, Any] | None = None
            if number and time.monotonic() > until:
                note = labelstudio.NO_TIME
            elif sum(map(len, results)) > labelstudio.MAX_ANSWER_BYTES:
                note = labelstudio.NO_ROOM
            else:
                try:
                    if isinstance(output, ApiError):
                        raise output
                    made = await self._label_studio_prediction(asked, number, output, ref, version)
                except ApiError as exc:
                    # Label Studio drops the body of an error. This one it gives to the browser,
                    # and shows to a project's owner who sends a test request.
                    self.policy.on_refusal(exc.code)
                    error = exc.body(request.state.request_id)
                    text = json.dumps(error["error"])
                    ACCESS_LOG.warning("no mask for Label Studio: %s", text)
                    made = {**nothing, **error}
            made = made or {**nothing, "note": note}
            results.append((await asyncio.to_thread(json.dumps, made)).encode())
        content = b'{"results": [' + b", ".join(results) + b"]}"
        return Response(content, media_type="application/json")

    async def _label_studio_prediction(
        self,
        asked: labelstudio.PredictionRequest,
        number: int,
        output: labelstudio.Output,
        ref: ModelRef,
        version: str,
    ) -> dict[str, Any] | None:
        """Return the prediction for a task; None if there is nothing to show."""
        regions = asked.regions()
        field = f"tasks[{number}].data.{output.data_key}"
        address = asked.tasks[number].data.get(output.data_key)
        if not isinstance(address, str) or not address:
            message = f"{field}: needs the address of a picture"
            raise ApiError("invalid_request", message, field)
        for fresh in (False, True):
            image_id, size = await self._label_studio_image(address, field, fresh)
            prompt = labelstudio.prompt_of_regions(regions, size, output.to_name)
            if regions and prompt is None:
                return None
            try:
                answer = await self._ask(
                    Call(image_id, ref, labelstudio.request_for(prompt, output))
                )
                break
            except ApiError as exc:
                if exc.code != "unknown_image" or fresh:  # else the vault has evicted it
                    raise ApiError(exc.code, exc.message, field) from exc
        most = max(1, int(self.settings.max_mask_megapixels * 1e6 / (size[0] * size[1])))

        def build() -> dict[str, Any] | None:
            if prompt is not None:
                label = labelstudio.choose_label(regions, output)
                masks = [(answer["results"][0]["masks"][0], label)]
            else:
                found = json.loads(b"{" + answer["json"] + b"}")["objects"][:most]
                masks = [(one, labelstudio.own_label(one["label"], output)) for one in found]
            return labelstudio.build_prediction(masks, size, output, version)

        return await asyncio.to_thread(build)

    def _label_studio_version(self, ref: ModelRef) -> str:
        return f"{ref.name} {ref.version}"

    async def _label_studio_image(
        self, address: str, field: str, fresh: bool
    ) -> tuple[str, tuple[int, int]]:
        """Put a task's image into the vault; return its id and (H, W)."""
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
        """Check a file by its header and put it into the vault; return its id."""
        self._require_acceptable(raw)
        image_id = "sha256:" + await asyncio.to_thread(lambda: hashlib.sha256(raw).hexdigest())
        await self.vault.put.remote(image_id, raw)
        return image_id

    def _require_acceptable(self, raw: bytes) -> None:
        """Refuse what is no image, or too large a one, by its header."""
        try:
            height, width = size_from_header(raw)
        except AnnotationError as exc:
            codes = {"format": "unsupported_format", "size": "too_large"}
            code = codes.get(exc.field, "invalid_image")
            raise ApiError(code, exc.reason, "image") from exc
        if height * width > self.settings.max_megapixels * 1e6:
            limit = f"{self.settings.max_megapixels:g} megapixels"
            raise ApiError("too_large", f"{width} x {height} pixels; the limit is {limit}", "image")

    async def _ask(self, call: Call) -> dict[str, Any]:
        """Let a Decoder answer."""
        decoder = self._decoder(call.model, call.image_id)
        answer: dict[str, Any] = await self._answered(lambda: decoder.answer.remote(call))
        if "refused" in answer:
            raise ApiError(*answer["refused"])
        return answer

    async def _answered(self, send: Callable[[], DeploymentResponse]) -> Any:
        """Send a call unless too many requests wait; send it again if its process dies."""
        if self.in_flight >= self.settings.max_in_flight:
            raise ApiError("too_busy", "too many requests wait; try again soon")
        self.in_flight += 1
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                while True:
                    response = send()
                    try:
                        return await response
                    except RayActorError:  # it or its Encoder died; Serve starts another
                        await asyncio.sleep(RETRY_SECONDS)
                    except asyncio.CancelledError:
                        response.cancel()  # nobody waits for it: free the replica
                        raise
        except TimeoutError as exc:
            raise ApiError("timed_out", "the answer took too long; try again") from exc
        except BackPressureError as exc:
            raise ApiError("too_busy", "too many requests wait; try again soon") from exc
        finally:
            self.in_flight -= 1

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
