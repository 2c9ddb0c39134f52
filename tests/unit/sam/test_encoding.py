"""Many images are encoded in order; 16 bits give the masks of float32; damaged and other caches."""

import functools

import numpy as np
import pytest
import torch
from sam_parts import small_sam, small_vit
from small_dataset import write_dataset

from samray.config import load_config
from samray.errors import ConfigError
from samray.evaluation.scoring import embedding_of
from samray.geometry.prompts import Prompt
from samray.sam.attention import fuse_attention
from samray.sam.checkpoint import save_checkpoint
from samray.sam.decode import predict_masks
from samray.sam.embeddings import (
    EmbeddingCache,
    ahead,
    compile_encoder,
    encode_image,
    encode_images,
    encode_many,
)
from samray.sam.encode import encode_missing
from samray.sam.model import build_model


def photos(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + n, 64, 3), dtype=np.uint8) for n in range(count)]


def test_what_threads_call_comes_in_order_and_not_all_at_once():
    begun = []

    def call(number):
        begun.append(number)
        return number

    results = ahead((functools.partial(call, number) for number in range(40)), 5)
    assert next(results) == 0
    results.close()
    assert len(begun) <= 6
    assert list(ahead((functools.partial(call, number) for number in range(40)), 5)) == [*range(40)]


def test_an_error_in_a_thread_comes_after_what_precedes_it():
    calls = [lambda: 0, lambda: 1, lambda: 1 // 0, lambda: 3]
    results = ahead(calls, 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_many_images_on_a_cpu_are_the_bits_of_each():
    sam, images = small_sam(), photos(3)
    loads = [functools.partial(np.copy, image) for image in images]
    for image, found in zip(images, encode_many(sam, loads), strict=True):
        assert np.array_equal(found, encode_image(sam, image).numpy().astype(np.float16))


def test_embeddings_of_another_precision_have_another_key(tmp_path):
    sam = small_sam()
    full, half = (EmbeddingCache(tmp_path, sam, full_precision=full) for full in (True, False))
    half.save("a" * 64, np.zeros((32, 4, 4)))
    assert full.load("a" * 64) is None
    assert half.load("a" * 64) is not None


@pytest.mark.parametrize("damage", ["empty", "cut", "cut in the header", "zeros"])
def test_a_damaged_embedding_is_encoded_again(tmp_path, damage, capsys):
    """As a power failure may leave it."""
    cache = EmbeddingCache(tmp_path, small_sam())
    for digest in "ab":
        cache.save(digest, np.ones((32, 4, 4)))
    path = cache.path("a")
    content = path.read_bytes()
    sizes = {"empty": 0, "cut": len(content) - 5, "cut in the header": 50}
    content = content[: sizes[damage]] if damage in sizes else bytes(len(content))
    path.write_bytes(content)
    if damage in sizes:  # seen before anything is trained
        assert cache.lacking([("a", 0), ("b", 0), ("c", 0)]) == [("a", 0), ("c", 0)]
    assert cache.load("a") is None
    assert f"{path}: is damaged" in capsys.readouterr().err
    assert cache.lacking(iter([("a", 0), ("b", 0)])) == [("a", 0)]
    cache.save("a", np.ones((32, 4, 4)))
    assert cache.load("a").shape == (32, 4, 4)
    assert cache.lacking([("a", 0), ("b", 0)]) == []


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_encoded(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    save_checkpoint(tmp_path / "base", build_model("tiny").state_dict(), load_config(), {})
    (tmp_path / "file").write_text("")
    config = load_config(options={"scaling.device": "cpu"})
    views = [(record, 0) for record in dataset.split("val")]
    with pytest.raises(ConfigError, match=r"embeddings\.cache_dir: .*file cannot be created"):
        encode_missing(dataset, views, tmp_path / "base", tmp_path / "file", config)


def test_an_embedding_that_cannot_be_kept_is_used_all_the_same(tmp_path):
    dataset, sam = write_dataset(tmp_path / "data"), small_sam()
    (record,) = dataset.split("val")
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file", sam)
    found = embedding_of(sam, dataset, cache, record)
    assert torch.equal(found, embedding_of(sam, dataset, None, record))


def masks_of(sam, embedding):
    prompts = [
        Prompt(np.array([[x, y]], np.float32), np.ones(1, np.int64))
        for x in (9, 31, 50)
        for y in (9, 25)
    ]
    found = predict_masks(sam, embedding.float(), prompts, (40, 64))
    return torch.stack([masks.logits(masks.best) for _, masks in found])


def mean_iou(logits, others):
    one, other = (logits > 0).flatten(1), (others > 0).flatten(1)
    return float(((one & other).sum(1) / (one | other).sum(1).clamp_min(1)).mean())


def test_masks_of_bfloat16_embeddings():
    sam, (image,) = small_vit(), photos(1)
    fuse_attention(sam.image_encoder)
    expected = encode_image(sam, image)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode_image(sam, image)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) <= 0.03 * float(expected.abs().max())
    assert mean_iou(masks_of(sam, found), masks_of(sam, expected)) >= 0.98


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_many_images_on_a_gpu(compiled):
    sam, images = small_vit(), photos(5)
    fuse_attention(sam.image_encoder)
    expected = torch.stack([encode_image(sam, image) for image in images])
    sam.cuda()
    if compiled:
        compile_encoder(sam.image_encoder)
    loads = [functools.partial(np.copy, image) for image in images]
    for full, tolerance in ((True, 1e-3), (False, 0.005)):
        many = np.stack(list(encode_many(sam, loads, full_precision=full)))
        found = torch.from_numpy(many).float()
        together = encode_images(sam, images, full_precision=full).cpu()
        largest = float(expected.abs().max())
        for some in (found, together):
            assert float((some - expected).abs().max()) <= tolerance * largest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_that_float16_cannot_hold_on_a_gpu():
    sam, images = small_vit(), photos(3)
    mlp = sam.image_encoder.blocks[0].mlp
    with torch.no_grad():
        mlp.lin1.weight *= 1e6
        mlp.lin2.weight *= 1e-6
    expected = torch.stack([encode_image(sam, image) for image in images])
    sam.cuda()
    found = encode_images(sam, images).cpu()
    loads = [functools.partial(np.copy, image) for image in images]
    many = torch.from_numpy(np.stack(list(encode_many(sam, loads)))).float()
    for some in (found, many):
        assert float((some - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
