"""What the endpoint's processes keep in memory, without a cluster."""

import asyncio

import numpy as np

from samray.config import ServeConfig
from samray.prediction.requests import PredictRequest, PromptRequest
from samray.sam.embeddings import encode_image
from samray.sam.model import build_model
from samray.serving.catalogue import Call, ModelRef
from samray.serving.replicas import Decoder
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
