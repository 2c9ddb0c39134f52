"""The Ray Serve deployments that hold models: the Encoder and the Decoder.

Requests for one image and image encoder go to one Decoder, by consistent hashing, so that its cache
holds what they need, also for other models with the same encoder. On a cache miss, for example
because replicas were added or removed, the Decoder fetches the file from the vault and has it
encoded; the client does not notice. Every key contains a digest of the image's bytes, computed by
the Ingress, and of the weights, so neither clients nor models are mixed up.
"""

import asyncio
import collections
import contextlib
import contextvars
import ctypes
import io
import itertools
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from samray.config import ServeConfig
from samray.data.labelme import labelme_document
from samray.errors import AnnotationError, CheckpointError
from samray.geometry.images import decode_image
from samray.prediction.answers import describe_mask, drop_small_parts, prompt_of
from samray.prediction.requests import (
    ApiError,
    PredictRequest,
    SegmentRequest,
    mistakes_error,
)
from samray.sam.decode import PromptMasks, predict_masks
from samray.sam.embeddings import encode_images
from samray.sam.model import encoder_digest
from samray.serving.catalogue import LOG, Call, ModelRef
from samray.serving.vault import ByteCache

PROMPTS_AT_ONCE = 4  # decoded in one piece: a quarter of a second of a ViT on one core
MODELS_LOADED = 4  # by one replica; the least recently used is evicted
LATENCY = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 30000]  # ms

SEARCH_SHARE = 0.7  # of the time limit, after which no more objects are looked for


class LoadedModels:
    """The models that a replica has loaded, each once for concurrent requests."""

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._sams: OrderedDict[Any, asyncio.Future[Any]] = OrderedDict()
        self._instances: OrderedDict[Any, asyncio.Future[Any]] = OrderedDict()

    async def get(self, ref: ModelRef) -> tuple[Any, str]:
        """Return a model and its image encoder's digest."""
        found: tuple[Any, str] = await _once(self._sams, ref.digest, lambda: self._load(ref))
        return found

    async def instances(self, ref: ModelRef, sam: Any) -> Any:
        """Return the `InstanceModel` of a model, or None; loaded only if somebody asks for it.

        The same weights may have been saved beside two decoders, so the folder tells them apart.
        """
        return await _once(self._instances, ref, lambda: self._load_instances(ref, sam))

    def _load(self, ref: ModelRef) -> tuple[Any, str]:
        sam = ref.load().model().to(self.device).eval()
        return sam, encoder_digest(sam)

    def _load_instances(self, ref: ModelRef, sam: Any) -> Any:
        from samray.instances.saved import instances_of  # 25 MB of libraries for it alone

        try:
            model = instances_of(ref.load(), sam)
        except CheckpointError as exc:  # its message names folders of the server
            LOG.warning("all objects by %s %s: %s", ref.name, ref.version, exc)
            raise ApiError(
                "unusable_model",
                f"the instance decoder of {ref.name!r} is damaged or another model's; points and "
                "boxes work; promote the model again",
                "model",
            ) from exc
        if model is not None:
            model.decoder.to(self.device)
        return model


async def _once(
    loaded: OrderedDict[Any, asyncio.Future[Any]], key: Any, load: Callable[[], Any]
) -> Any:
    """Load something in a thread, once for concurrent requests; the latest few are kept."""
    if key not in loaded:
        loaded[key] = asyncio.ensure_future(asyncio.to_thread(load))
        while len(loaded) > MODELS_LOADED:
            loaded.popitem(last=False)
    loaded.move_to_end(key)
    try:
        return await asyncio.shield(loaded[key])
    except Exception:
        loaded.pop(key, None)  # whatever the reason was, the next request retries
        raise


def preview_png(raw: bytes) -> bytes:
    """Return an image file as the models see it: an 8-bit PNG, grey if it has no colours.

    Raises:
        AnnotationError: as in `decode_image`.
    """
    image = decode_image(raw)
    grey = image[:, :, 0]
    if np.array_equal(grey, image[:, :, 1]) and np.array_equal(grey, image[:, :, 2]):
        image = grey
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def keep_large_blocks_apart() -> None:
    """Let glibc give each large array back to the system when it is freed.

    glibc raises its mmap threshold up to 32 MiB as arrays are freed, and kept logits between large
    temporaries then fragment the heap: a decoder grew to 4.6 GB, and to 1.1 GB with this.
    """
    m_mmap_threshold = -3  # malloc.h
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 * 1024)


@serve.deployment(max_ongoing_requests=16)
class Encoder:
    """Encodes image files; its only state is the loaded models."""

    def __init__(self, settings: ServeConfig) -> None:
        torch.set_num_threads(settings.threads)
        keep_large_blocks_apart()
        self.models = LoadedModels()
        self.sizes = Histogram("samray_encode_batch_size", "images encoded together", [1, 2, 4, 8])
        on_gpu = self.models.device == "cuda"
        self.encode.set_max_batch_size(settings.encode_batch or (4 if on_gpu else 1))
        # One at a time, which bounds memory, also when clients disconnect.
        self.previewer = ThreadPoolExecutor(1)

    async def preview(self, raw: bytes) -> bytes | str:
        """Return an image file as the models see it, as PNG, or the reason why it is unusable."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.previewer, preview_png, raw)
        except AnnotationError as exc:
            return exc.reason

    async def warm_up(self, ref: ModelRef) -> None:
        """Load a model ahead of the first request."""
        await self.models.get(ref)

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.002)
    async def encode(
        self, files: list[bytes], refs: list[ModelRef]
    ) -> list[tuple[np.ndarray, tuple[int, int]] | str]:
        """Return C x h x w float16 and (H, W) for each file, or the reason why it is unusable."""
        self.sizes.observe(len(files))
        sams = [(await self.models.get(ref))[0] for ref in refs]
        return await asyncio.to_thread(self._encode, files, sams)

    def _encode(
        self, files: list[bytes], sams: list[Any]
    ) -> list[tuple[np.ndarray, tuple[int, int]] | str]:
        """Encode the images of each model together; a bad file does not affect the others."""
        made: list[tuple[np.ndarray, tuple[int, int]] | str] = [""] * len(files)
        images: dict[int, np.ndarray] = {}
        for place, raw in enumerate(files):
            try:
                images[place] = decode_image(raw)
            except AnnotationError as exc:
                made[place] = exc.reason
        for sam in {id(sam): sam for sam in sams}.values():
            places = [place for place in images if sams[place] is sam]
            if places:
                encoded = encode_images(sam, [images[place] for place in places])
                for place, embedding in zip(places, encoded.cpu().numpy(), strict=True):
                    made[place] = embedding.astype(np.float16), images[place].shape[:2]
        return made


@serve.deployment(
    request_router_config=RequestRouterConfig(
        request_router_class="ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
    ),
)
class Decoder:
    """Decodes prompts, with a cache of embeddings and of earlier answers."""

    def __init__(
        self, settings: ServeConfig, encoder: DeploymentHandle, vault: DeploymentHandle
    ) -> None:
        torch.set_num_threads(settings.threads)
        keep_large_blocks_apart()
        self.encoder, self.vault = encoder, vault
        self.models = LoadedModels()
        self.embeddings = ByteCache(settings.embedding_cache_mb * 2**20)
        self.logits = ByteCache(settings.logits_cache_mb * 2**20)
        self.encoding: dict[Any, asyncio.Task[Any]] = {}
        self.waiting: collections.Counter[asyncio.Task[Any]] = collections.Counter()  # for these
        # Requests in progress by image, and those of these images that were deleted meanwhile.
        self.active: collections.Counter[str] = collections.Counter()
        self.forgotten: set[str] = set()
        # One decoding at a time uses torch's threads; a cancelled request leaves the queue.
        self.worker = ThreadPoolExecutor(1)
        lookup = "embedding cache lookups"
        self.lookups = Counter("samray_embedding_lookups", lookup, ("result",))
        self.decode_ms = Histogram("samray_decode_ms", "decoding", LATENCY)
        self.encode_ms = Histogram("samray_encode_ms", "waiting for an embedding", LATENCY)
        self.busy = Gauge("samray_decoder_busy_seconds", "time on the piece of work in progress")
        self.busy_since: float | None = None
        self.settings = settings

    async def warm_up(self, ref: ModelRef) -> str:
        """Load a model here and in an encoder; return its image encoder's digest."""
        (_, encoder), _ = await asyncio.gather(
            self.models.get(ref), self.encoder.warm_up.remote(ref)
        )
        return str(encoder)

    async def answer(self, call: Call) -> dict[str, Any]:
        """Encode the image if needed, and decode the prompts.

        Returns:
            The content of a `PredictAnswer` without what the Ingress adds; of a `SegmentAnswer`
            with its objects as `json`; or {"refused": (code, message, field)}.
        """
        self.active[call.image_id] += 1
        try:
            return await self._answer(call)
        except ApiError as exc:
            return {"refused": (exc.code, exc.message, exc.field)}
        finally:
            self.active[call.image_id] -= 1
            if call.image_id in self.forgotten:
                self._drop(call.image_id)
            if not self.active[call.image_id]:
                del self.active[call.image_id]
                self.forgotten.discard(call.image_id)

    async def _answer(self, call: Call) -> dict[str, Any]:
        started = time.perf_counter()
        sam, encoder = await self.models.get(call.model)
        key = (call.image_id, encoder)
        found = self.embeddings.get(key)
        self.lookups.inc(tags={"result": "hit" if found else "miss"})
        embedding, size = found or await self._encode(key, call)
        encoded = time.perf_counter()
        self.encode_ms.observe(1000 * (encoded - started))
        answer: dict[str, Any] = {
            "width": size[1],
            "height": size[0],
            "cache": "hit" if found else "miss",
            "encode_ms": 1000 * (encoded - started),
            "decode_ms": 0.0,
        }
        if isinstance(call.request, PredictRequest):
            self._require_inside(call.request, size)
            self._require_affordable(call.request, size)
            earlier = self._earlier_answers(call, call.request)
            answer |= await self._decode(sam, embedding, size, call, call.request, earlier)
        elif call.request is not None:
            answer |= await self._search(sam, embedding, size, call, call.request)
        if call.request is not None:
            self.decode_ms.observe(answer["decode_ms"])
        return answer

    async def _encode(self, key: Any, call: Call) -> tuple[np.ndarray, tuple[int, int]]:
        """Encode once per key for all concurrent requests, as long as one of them waits."""
        if key not in self.encoding:
            # In no request's context: when a client disconnects, Serve cancels what was called in
            # its request's, and others may wait for the same encoding.
            self.encoding[key] = asyncio.get_running_loop().create_task(
                self._encode_once(key, call), context=contextvars.Context()
            )
        task = self.encoding[key]
        self.waiting[task] += 1
        try:
            embedding: tuple[np.ndarray, tuple[int, int]] = await asyncio.shield(task)
            return embedding
        finally:
            self.waiting[task] -= 1
            if not self.waiting[task]:
                del self.waiting[task]
                if not task.done():
                    task.cancel()
                    if self.encoding.get(key) is task:  # who comes now starts anew
                        del self.encoding[key]

    async def _encode_once(self, key: Any, call: Call) -> tuple[np.ndarray, tuple[int, int]]:
        try:
            raw = await self.vault.get.remote(call.image_id)
            if raw is None:
                raise ApiError("unknown_image", "this image is not here; upload it", "image_id")
            response = self.encoder.encode.remote(raw, call.model)
            try:
                made = await response
            except asyncio.CancelledError:
                response.cancel()  # nobody waits for it: free the Encoder
                raise
            if isinstance(made, str):
                raise ApiError("invalid_image", made, "image")
            if self.encoding.get(key) is asyncio.current_task():  # else deleted meanwhile
                self.embeddings.put(key, made, made[0].nbytes)
            embedding: tuple[np.ndarray, tuple[int, int]] = made
            return embedding
        finally:
            if self.encoding.get(key) is asyncio.current_task():
                del self.encoding[key]

    def _require_inside(self, request: PredictRequest, size: tuple[int, int]) -> None:
        mistakes = [
            mistake
            for number, prompt in enumerate(request.prompts)
            for mistake in prompt.require_inside(size, f"prompts[{number}]")
        ]
        if mistakes:
            raise mistakes_error(mistakes)

    def _earlier_answers(self, call: Call, request: PredictRequest) -> list[torch.Tensor | None]:
        """Return the logits that the prompts correct, 1 x h x w each, or None."""
        found: list[torch.Tensor | None] = []
        for number, prompt in enumerate(request.prompts):
            logits = None
            if prompt.mask_token is not None:
                logits = self.logits.get((prompt.mask_token, call.image_id, call.model.digest))
                if logits is None:
                    raise ApiError(
                        "unknown_mask_token",
                        "this answer is not here any more, or is another image's or model's; "
                        "send the points without it",
                        f"prompts[{number}].mask_token",
                    )
            found.append(logits)
        return found

    def _require_affordable(self, request: PredictRequest, size: tuple[int, int]) -> None:
        """Refuse a request whose masks would take too long, before any work is done."""
        masks = sum(request.masks_of(prompt) for prompt in request.prompts)
        megapixels = masks * size[0] * size[1] / 1e6
        if megapixels > self.settings.max_mask_megapixels:
            raise ApiError(
                "too_large",
                f"{masks} masks of {size[1]} x {size[0]} pixels are {megapixels:.0f} megapixels; "
                f"the limit is {self.settings.max_mask_megapixels:g}; send fewer prompts, "
                "multimask_output=false, or a smaller image",
                "prompts",
            )

    async def _decode(
        self,
        sam: Any,
        embedding: np.ndarray,
        size: tuple[int, int],
        call: Call,
        request: PredictRequest,
        earlier: list[torch.Tensor | None],
    ) -> dict[str, Any]:
        """Decode all prompts and describe their masks."""
        pieces = self._pieces(sam, embedding, size, call, request, earlier)
        done, seconds = await self._worked(pieces)
        described: list[list[dict[str, Any]]] = [[] for _ in request.prompts]
        for number, mask in done:
            described[number].append(mask)
        results = [
            {"id": prompt.id, "masks": masks}
            for prompt, masks in zip(request.prompts, described, strict=True)
        ]
        answer: dict[str, Any] = {"results": results, "decode_ms": 1000 * seconds}
        if request.mask_format == "labelme":
            shapes = [shape for masks in described for shape in masks[0]["shapes"]]
            answer["labelme"] = labelme_document(_image_name(call, request), size, shapes)
        return answer

    async def _search(
        self,
        sam: Any,
        embedding: np.ndarray,
        size: tuple[int, int],
        call: Call,
        request: SegmentRequest,
    ) -> dict[str, Any]:
        """Find all objects and describe them."""
        from samray.prediction.search import Bounds, search

        seconds = SEARCH_SHARE * self.settings.timeout_seconds
        bounds = Bounds(
            self.settings.max_mask_megapixels,
            int(self.settings.max_answer_mb * 2**20),
            time.monotonic() + seconds,
            PROMPTS_AT_ONCE,
        )
        model = await self.models.instances(call.model, sam)
        raw = await self.vault.get.remote(call.image_id)
        if raw is None:
            raise ApiError("unknown_image", "this image is not here; upload it", "image_id")
        named = request.model_copy(update={"image_name": _image_name(call, request)})
        pieces = search(
            sam, model, call.model.model_type, raw, _on_device(sam, embedding), size, named, bounds
        )
        done, seconds = await self._worked(pieces)
        return {"json": done[-1], "decode_ms": 1000 * seconds}

    async def _worked(self, pieces: Iterator[Any]) -> tuple[list[Any], float]:
        """Return all pieces of a work, between which others get a turn, and the seconds taken.

        A request that is cancelled, by its deadline or because the client disconnected, ends after
        the piece in progress.
        """
        loop = asyncio.get_running_loop()
        done: list[Any] = []
        seconds = 0.0
        while True:
            some, taken = await loop.run_in_executor(self.worker, self._timed, pieces)
            seconds += taken
            if not some:
                return done, seconds
            done += some

    def _timed(self, pieces: Iterator[Any]) -> tuple[list[Any], float]:
        """Work on the next piece; return it, nothing after the last, and the seconds taken."""
        self.busy_since = time.perf_counter()
        try:
            some = list(itertools.islice(pieces, 1))
            return some, time.perf_counter() - self.busy_since
        finally:
            self.busy_since = None

    async def busy_seconds(self) -> float:
        """Return for how long the piece in progress has been worked on."""
        since = self.busy_since
        seconds = 0.0 if since is None else time.perf_counter() - since
        self.busy.set(seconds)
        return seconds

    def _pieces(
        self,
        sam: Any,
        embedding: np.ndarray,
        size: tuple[int, int],
        call: Call,
        request: PredictRequest,
        earlier: list[torch.Tensor | None],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (place of the prompt, one of its masks), each prompt's best mask first.

        Raises:
            ApiError: too_large; the masks need more than `max_answer_mb`.
        """
        used, most = 0, self.settings.max_answer_mb * 2**20
        found = predict_masks(
            sam,
            _on_device(sam, embedding),
            [prompt_of(prompt) for prompt in request.prompts],
            size,
            [None if logits is None else logits.float().to(sam.device) for logits in earlier],
            request.multimask_output,
            max_prompts=PROMPTS_AT_ONCE,
        )
        for number, masks in found:
            for rank, place in enumerate(masks.ranking):
                mask = self._describe(number, masks, place, call, request)
                twice = rank == 0 and request.mask_format == "labelme"  # in `labelme`, too
                used += len(json.dumps(mask)) * (2 if twice else 1)
                if used > most:
                    raise ApiError(
                        "too_large",
                        "the masks need more than the "
                        f"{self.settings.max_answer_mb:g} MiB of an answer; send fewer prompts, "
                        "multimask_output=false, or choose a smaller mask_format",
                        "prompts",
                    )
                yield number, mask

    def _describe(
        self, number: int, found: PromptMasks, place: int, call: Call, request: PredictRequest
    ) -> dict[str, Any]:
        """Return one mask as the request asks for it, and keep its logits for corrections."""
        mask = drop_small_parts(found.mask(place), request.min_area)
        token = secrets.token_urlsafe(12)
        # A copy: a view would keep the masks of the whole chunk in memory. Half precision, so that
        # all answers to a request of MAX_PROMPTS prompts to a ViT fit the cache.
        logits = found.low_res_masks[place][None].to("cpu", torch.float16, copy=True)
        self.logits.put((token, call.image_id, call.model.digest), logits, logits.nbytes)
        content = describe_mask(
            mask, request.mask_format, request.label, request.polygon_tolerance, number + 1
        )
        score = float(found.iou_predictions[place])
        return {"score": score, **content, "mask_token": token}

    async def forget(self, image_id: str) -> None:
        """Drop an image's embeddings and the answers for it, those in progress too once sent."""
        if image_id in self.active:
            self.forgotten.add(image_id)
        for key in [key for key in self.encoding if key[0] == image_id]:
            del self.encoding[key]
        self._drop(image_id)

    def _drop(self, image_id: str) -> None:
        for key in [key for key in self.embeddings.entries if key[0] == image_id]:
            self.embeddings.drop(key)
        for key in [key for key in self.logits.entries if key[1] == image_id]:
            self.logits.drop(key)


def _on_device(sam: Any, embedding: np.ndarray) -> torch.Tensor:
    """C x h x w float32, where the model is."""
    return torch.from_numpy(embedding.astype(np.float32)).to(sam.device)


def _image_name(call: Call, request: PredictRequest | SegmentRequest) -> str:
    """LabelMe's `imagePath`."""
    return request.image_name or f"{call.image_id.removeprefix('sha256:')[:16]}.png"
