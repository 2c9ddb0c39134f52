"""The one way from prompts to masks: every prompt once, in bounded chunks."""

import numpy as np
import pytest
import torch
from sam_parts import add_noise, small_sam
from segment_anything.modeling.transformer import Attention

from samray.geometry.prompts import Prompt
from samray.sam.attention import image_to_tokens, tokens_to_image
from samray.sam.decode import (
    MAX_PIXELS,
    MAX_PROMPTS,
    PromptGroup,
    decode_prompts,
    predict_masks,
    prompt_chunks,
    prompts_at_once,
)
from samray.sam.model import build_model, build_tiny

SIZE = (48, 64)


@pytest.fixture(scope="module")
def sam():
    return small_sam()


@pytest.fixture(scope="module")
def embedding(sam):
    return torch.randn(32, 4, 4, generator=torch.Generator().manual_seed(0))


def point(x, y, label=1):
    return Prompt(np.array([[x, y]], np.float32), np.array([label], np.int64))


def box(x1, y1, x2, y2):
    return Prompt(box=np.array([x1, y1, x2, y2], np.float32))


@pytest.mark.parametrize(
    ("number", "size", "lengths"),
    [
        (0, (10, 10), []),
        (64, (10, 10), [64]),
        (130, (10, 10), [64, 64, 2]),
        (5, (4000, 2000), [2, 2, 1]),
        (2, (10_000, 10_000), [1, 1]),
    ],
)
def test_chunks_are_bounded_by_prompts_and_pixels(number, size, lengths):
    chunks = prompt_chunks(number, size)
    assert [len(chunk) for chunk in chunks] == lengths
    assert [n for chunk in chunks for n in chunk] == list(range(number))
    for chunk in chunks:
        assert len(chunk) <= MAX_PROMPTS
        assert len(chunk) == 1 or len(chunk) * size[0] * size[1] <= MAX_PIXELS


def test_each_prompt_is_answered_once_and_as_if_it_were_alone(sam, embedding):
    """Layouts mixed, more than one chunk of one of them, and corrections between new prompts."""
    prompts = [point(1 + n % 60, 5 + n % 40) for n in range(MAX_PROMPTS + 3)]
    prompts[10], prompts[40] = box(3, 4, 30, 28), box(8, 9, 50, 40)
    earlier = [None] * len(prompts)
    earlier[5] = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(1))
    earlier[40] = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(2))
    together = list(predict_masks(sam, embedding, prompts, SIZE, earlier))
    assert sorted(place for place, _ in together) == list(range(len(prompts)))
    for place, found in together:
        corrects = earlier[place] is not None
        ((_, alone),) = predict_masks(sam, embedding, [prompts[place]], SIZE, [earlier[place]])
        one_point = prompts[place].box is None and not corrects
        assert len(found.iou_predictions) == (3 if one_point else 1)
        torch.testing.assert_close(found.low_res_masks, alone.low_res_masks, rtol=0, atol=1e-4)
        torch.testing.assert_close(found.iou_predictions, alone.iou_predictions, rtol=0, atol=1e-5)


def test_masks_are_ranked_by_predicted_iou_and_have_the_images_resolution(sam, embedding):
    ((_, found),) = predict_masks(sam, embedding, [point(20, 20)], SIZE)
    scores = [float(found.iou_predictions[number]) for number in found.ranking]
    assert scores == sorted(scores, reverse=True)
    assert found.ranking[0] == found.best
    assert found.predicted_iou == scores[0]
    assert found.mask(found.best).shape == SIZE
    assert np.array_equal(found.mask(1), (found.logits(1) > 0).numpy())


def test_no_prompt_no_masks(sam, embedding):
    assert list(predict_masks(sam, embedding, [], SIZE)) == []


def wide_sam():
    """`small_sam` with 128 channels: its attention is computed without projecting the cells."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return add_noise(build_tiny(img_size=64, embed_dim=128).eval())


def gradients_of(loss, module, *others):
    inputs = [*others, *module.parameters()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    pairs = zip(inputs, found, strict=True)
    return [torch.zeros_like(x) if g is None else g for x, g in pairs]


def assert_same(found, expected):
    scale = max(float(tensor.detach().abs().max()) for tensor in expected)
    for one, two in zip(found, expected, strict=True):
        assert float((one - two).detach().abs().max()) <= 1e-5 * scale


@pytest.mark.parametrize("num_tokens", [7, 40], ids=["cells not projected", "cells projected"])
def test_attention_of_few_or_many_tokens_equals_the_stock_modules(num_tokens):
    torch.manual_seed(0)
    stock = Attention(64, num_heads=2, downsample_rate=2)
    tokens, pe = torch.randn(2, num_tokens, 64), torch.randn(2, num_tokens, 64)
    cells, keys = torch.randn(2, 30, 64), torch.randn(2, 30, 64)
    inputs = [tensor.requires_grad_() for tensor in (tokens, pe, cells, keys)]
    for ours, theirs in (
        (tokens_to_image(stock, tokens, keys, cells), stock(tokens, keys, cells)),
        (image_to_tokens(stock, keys, tokens + pe, tokens), stock(keys, tokens + pe, tokens)),
    ):
        assert_same([ours], [theirs])
        weights = torch.randn(ours.shape)
        assert_same(
            gradients_of((ours * weights).sum(), stock, *inputs),
            gradients_of((theirs * weights).sum(), stock, *inputs),
        )


def mixed_groups():
    """Prompts of three images: a point, two points, a box with an earlier answer."""
    generator = torch.Generator().manual_seed(3)
    index = torch.tensor([2, 0, 0, 1, 2])
    one, two = (64 * torch.rand(5, number, 2, generator=generator) for number in (1, 2))
    corners = torch.rand(5, 2, 2, generator=generator).sort(dim=1).values
    logits = torch.randn(5, 1, 16, 16, generator=generator)
    return [
        PromptGroup(index, one, torch.ones(5, 1)),
        PromptGroup(index, two, torch.tensor([1, 0]).expand(5, 2)),
        PromptGroup(index, boxes=64 * corners.flatten(1), mask_inputs=logits),
    ]


def stock_decode(sam, embeddings, group, multimask_output):
    """Each prompt alone through segment_anything's decoder."""
    found = []
    for row, image in enumerate(group.image_index.tolist()):
        alone = group.part(range(row, row + 1))
        points = None if alone.point_coords is None else (alone.point_coords, alone.point_labels)
        sparse, dense = sam.prompt_encoder(points, alone.boxes, alone.mask_inputs)
        pe = sam.prompt_encoder.get_dense_pe()
        image = embeddings[image : image + 1]
        found.append(sam.mask_decoder(image, pe, sparse, dense, multimask_output))
    return [torch.cat(tensors) for tensors in zip(*found, strict=True)]


@pytest.mark.parametrize("build", [small_sam, wide_sam])
def test_masks_and_gradients_equal_the_stock_decoders(build):
    """Images mixed; points, boxes and mask inputs; one mask and three; with and without a graph."""
    sam = build()
    parts = torch.nn.ModuleList([sam.prompt_encoder, sam.mask_decoder])
    embeddings = torch.randn(3, sam.prompt_encoder.embed_dim, 4, 4).requires_grad_()
    for group in mixed_groups():
        for multimask_output in (True, False):
            expected = stock_decode(sam, embeddings, group, multimask_output)
            found = decode_prompts(sam, embeddings, group, multimask_output)
            with torch.no_grad():
                without_graph = decode_prompts(sam, embeddings, group, multimask_output)
            assert_same(found, expected)
            assert_same(without_graph, expected)
            weights = [torch.randn(tensor.shape) for tensor in expected]
            one, two = (
                sum((tensor * weight).sum() for tensor, weight in zip(way, weights, strict=True))
                for way in (found, expected)
            )
            assert_same(gradients_of(one, parts, embeddings), gradients_of(two, parts, embeddings))


def test_bfloat16_errs_no_more_than_in_the_stock_decoder():
    sam = wide_sam()
    embeddings = torch.randn(3, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    for group in mixed_groups():
        with torch.no_grad():
            exact, _ = stock_decode(sam, embeddings, group, True)
            with torch.autocast("cpu", torch.bfloat16):
                stock, _ = stock_decode(sam, embeddings, group, True)
                ours, _ = decode_prompts(sam, embeddings, group, True)
        assert ours.dtype == torch.bfloat16
        allowed = float((stock - exact).square().mean().sqrt())
        assert 0 < float((ours - exact).square().mean().sqrt()) < 1.5 * allowed


def test_a_cpu_decodes_few_prompts_of_a_large_image_at_once_and_many_of_a_small_one(sam):
    """Chunks do not show in the answers; they do in the time (benchmarks/decoder.py)."""
    assert prompts_at_once(sam) == MAX_PROMPTS
    assert prompts_at_once(build_model("tiny")) == 64
    with torch.device("meta"):
        vit = build_model("vit_b")
    vit.pixel_mean = torch.zeros(3)  # which tells the model's device
    assert prompts_at_once(vit) == 2
