"""What the endpoint's processes keep in memory, without a cluster."""

import asyncio
import contextlib
import contextvars
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from samray.config import Config, ServeConfig
from samray.instances.saved import InstanceModel, instance_files, new_decoder
from samray.instances.segment import Way
from samray.prediction.requests import ApiError, PredictRequest, PromptRequest
from samray.sam.checkpoint import save_checkpoint
from samray.sam.embeddings import encode_image
from samray.sam.model import build_model, encoder_digest
from samray.sam.shipped import load_shipped
from samray.serving.catalogue import Call, ModelRef
from samray.serving.replicas import Decoder, LoadedModels
from samray.serving.vault import ByteCache


def test_a_cache_holds_no_more_than_its_bytes_and_drops_what_was_used_least():
    cache = ByteCache(10)
    for key in "abc":
        cache.put(key, key.upper(), 3)
    assert cache.get("a") == "A"
    cache.put("d", "D", 3)
    assert cache.get("b") is None
    assert [cache.get(key) for key in "acd"] == ["A", "C", "D"]
    cache.put("a", "a", 4)  # once more: counted once
    assert cache.used == 10
    cache.put("large", "L", 11)
    assert (cache.used, dict(cache.entries)) == (0, {})
    assert cache.drop("a") is False


def test_a_kept_answer_holds_no_memory_but_its_own():
    """Of a request with many prompts, one answer in the cache must not keep all the others."""
    sam = build_model("tiny").eval()
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    embedding = encode_image(sam, image).numpy().astype(np.float16)
    decoder = Decoder.func_or_class(ServeConfig(), None, None)
    prompts = [PromptRequest(point_coords=[(10 + n, 20)]) for n in range(8)]
    ref = ModelRef("tiny", "1", None, "digest", "tiny")
    request = PredictRequest(prompts=prompts, mask_format="none")
    call = Call("sha256:0", ref, request)
    answer = asyncio.run(decoder._decode(sam, embedding, (60, 80), call, request, [None] * 8))
    assert len(answer["results"]) == 8
    assert len(decoder.logits.entries) == 24
    for logits, size in decoder.logits.entries.values():
        assert logits.untyped_storage().nbytes() == logits.nbytes == size


@pytest.mark.parametrize("mask_format", ["polygon", "labelme", "png"])
def test_an_answer_is_no_larger_than_its_limit(mask_format):
    """Its size is known only from the masks: outlines may have few points or thousands."""
    sam = build_model("tiny").eval()
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    embedding = encode_image(sam, image).numpy().astype(np.float16)
    prompts = [PromptRequest(point_coords=[(10 + n, 20)]) for n in range(8)]
    request = PredictRequest(prompts=prompts, mask_format=mask_format, polygon_tolerance=0)
    call = Call("sha256:0", ModelRef("tiny", "1", None, "digest", "tiny"), request)

    def answer(most):
        decoder = Decoder.func_or_class(ServeConfig(max_answer_mb=most / 2**20), None, None)
        given = sam, embedding, (60, 80), call, request, [None] * 8
        return len(json.dumps(asyncio.run(decoder._decode(*given))))

    whole = answer(2**20)
    assert answer(1.05 * whole) == pytest.approx(whole, rel=0.01)
    with pytest.raises(ApiError, match="MiB of an answer; send fewer prompts") as refused:
        answer(0.8 * whole)
    assert (refused.value.code, refused.value.field) == ("too_large", "prompts")


# As Serve, which cancels what was called in the context of a request that is cancelled.
REQUEST: contextvars.ContextVar[str | None] = contextvars.ContextVar("request", default=None)


class Handle:
    """A process at the other end of a handle, whose methods wait until `ready`."""

    def __init__(self, ready, **answers):
        self.ready, self.answers = ready, answers
        self.calls = []  # (method, request that called it, answer)

    def __getattr__(self, name):
        async def answer():
            await self.ready.wait()
            return self.answers[name]

        def remote(*arguments):
            future = asyncio.ensure_future(answer())
            self.calls.append((name, REQUEST.get(), future))
            return future

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize("decoded", [False, True])
def test_an_image_deleted_during_a_request_leaves_nothing(decoded):
    """Neither its embedding, nor the answer, whether the request waits for an encoding or not."""
    made = np.zeros((128, 16, 16), np.float16), (60, 80)
    prompt = PromptRequest(point_coords=[(10, 20)])
    ref = ModelRef("tiny", "1", None, "digest", "tiny")
    call = Call("sha256:0", ref, PredictRequest(prompts=[prompt], mask_format="none"))

    async def run():
        ready = asyncio.Event()
        decoder = Decoder.func_or_class(
            ServeConfig(), Handle(ready, encode=made), Handle(ready, get=b"file")
        )
        _, encoder = await decoder.models.get(ref)
        if decoded:
            decoder.embeddings.put(("sha256:0", encoder), made, made[0].nbytes)
        request = asyncio.ensure_future(decoder.answer(call))
        await asyncio.sleep(0)  # it has begun
        while not decoder.active:
            await asyncio.sleep(0.001)
        while not (decoded or decoder.encoding):
            await asyncio.sleep(0.001)
        await decoder.forget("sha256:0")
        ready.set()
        assert len((await request)["results"]) == 1
        kept = decoder.embeddings.entries, decoder.logits.entries, decoder.encoding
        return [len(entries) for entries in kept], decoder.active, decoder.forgotten

    assert asyncio.run(run()) == ([0, 0, 0], {}, set())


def test_a_client_that_hangs_up_costs_nobody_else_the_encoding():
    """And once nobody waits for it, it is not wanted; who comes then has it encoded again."""
    made = np.zeros((128, 16, 16), np.float16), (60, 80)
    ref = ModelRef("tiny", "1", None, "digest", "tiny")
    call = Call("sha256:0", ref, None)

    async def run():
        ready = asyncio.Event()
        encoder = Handle(ready, encode=made)
        vault = Handle(asyncio.Event(), get=b"file")
        vault.ready.set()
        decoder = Decoder.func_or_class(ServeConfig(), encoder, vault)
        await decoder.models.get(ref)

        async def ask(name):
            REQUEST.set(name)
            return await decoder.answer(call)

        async def hang_up(*requests):
            for request in requests:
                request.cancel()
            await asyncio.wait(requests)
            for handle in (encoder, vault):  # as Serve does
                for _, caller, future in handle.calls:
                    if caller in [request.get_name() for request in requests]:
                        future.cancel()

        def begin(name):
            return asyncio.create_task(ask(name), name=name)

        first, second, third = (begin(name) for name in "abc")
        while not encoder.calls:
            await asyncio.sleep(0.001)
        await hang_up(first)
        await hang_up(second, third)
        await asyncio.sleep(0.01)
        assert (decoder.encoding, dict(decoder.waiting)) == ({}, {})
        assert [future.cancelled() for _, _, future in encoder.calls] == [True]

        first, second = begin("d"), begin("e")
        while len(encoder.calls) < 2:
            await asyncio.sleep(0.001)
        await hang_up(first)
        ready.set()
        assert (await second)["cache"] == "miss"
        assert (await begin("f"))["cache"] == "hit"
        assert len(encoder.calls) == 2

    asyncio.run(run())


def test_a_damaged_instance_decoder_is_told_without_the_servers_folders_and_tried_again(tmp_path):
    shipped = load_shipped()
    sam = shipped.model()
    model = InstanceModel(new_decoder(sam, 1, seed=0), ("thing",), Way())
    more = instance_files(model, encoder_digest(sam))
    save_checkpoint(tmp_path / "best", shipped.weights, Config(), {}, more=more)
    whole = (tmp_path / "best/instances.pth").read_bytes()
    (tmp_path / "best/instances.pth").write_bytes(whole[:1000])
    ref = ModelRef("cells", "1", tmp_path / "best", "digest", "tiny")
    models = LoadedModels()
    with pytest.raises(ApiError, match="instance decoder of 'cells' is damaged") as refused:
        asyncio.run(models.instances(ref, sam))
    assert (refused.value.code, refused.value.field) == ("unusable_model", "model")
    assert str(tmp_path) not in refused.value.message
    (tmp_path / "best/instances.pth").write_bytes(whole)
    assert asyncio.run(models.instances(ref, sam)).labels == ("thing",)


def test_a_request_whose_client_hangs_up_ends_after_the_piece_in_progress():
    decoder = Decoder.func_or_class(ServeConfig(), None, None)
    done = []

    def pieces():
        for number in range(100):
            time.sleep(0.02)
            done.append(number)
            yield None

    async def ask_and_leave():
        task = asyncio.ensure_future(decoder._worked(pieces()))
        while not done:
            await asyncio.sleep(0.005)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        seen = len(done)
        await asyncio.sleep(0.3)
        return seen

    assert len(done) <= asyncio.run(ask_and_leave()) + 1
    assert len(done) < 20
