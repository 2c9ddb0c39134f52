"""Fused attention gives the numbers of the stock module."""

import copy

import pytest
import torch
from sam_parts import small_vit
from segment_anything.modeling.image_encoder import Attention, Block

from samray.sam import attention
from samray.sam.attention import FusedAttention, FusedBlock, fuse_attention
from samray.sam.model import build_model
from samray.training.dry_run import saved_bytes


@pytest.mark.parametrize(
    ("batch", "size", "trained_size"),
    [(3, (14, 14), 14), (2, (64, 64), 64), (1, (10, 6), 8)],
    ids=["windows", "a large image", "interpolated positions"],
)
def test_fused_attention_equals_stock_and_so_do_its_gradients(batch, size, trained_size):
    torch.manual_seed(0)
    stock = Attention(48, 4, use_rel_pos=True, input_size=(trained_size, trained_size))
    for position in (stock.rel_pos_h, stock.rel_pos_w):
        torch.nn.init.normal_(position, std=0.5)
    fused = copy.deepcopy(stock)
    fused.__class__ = FusedAttention
    x = torch.randn(batch, *size, 48)
    found, expected = [], []
    for module, results in ((fused, found), (stock, expected)):
        given = x.clone().requires_grad_()
        seen = module(given)
        (seen * torch.linspace(-1, 1, seen.numel()).view_as(seen)).sum().backward()
        results += [seen, given.grad, *(parameter.grad for parameter in module.parameters())]
    assert len(found) == 2 + 6
    # The bias of the keys changes no weight of attention, so its gradient is rounding alone.
    largest = [float(x.detach().abs().max()) for x in expected]
    scale = largest[0], max(largest[1:])
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert float((one - other).detach().abs().max()) <= 1e-5 * scale[index > 0]


def test_a_backward_pass_keeps_no_matrix_of_all_pairs_of_cells():
    fused = FusedAttention(48, 4, use_rel_pos=True, input_size=(64, 64))
    x = torch.zeros(1, 64, 64, 48, requires_grad=True)
    assert saved_bytes(fused, lambda: fused(x)) < 0.2 * 4 * 4 * 4096**2


@pytest.mark.parametrize("window", [0, 7], ids=["global", "windows, the last ones cut"])
def test_a_fused_block_equals_stock(window, monkeypatch):
    monkeypatch.setattr(attention, "SCORES_BYTES", 10**5)  # several chunks
    torch.manual_seed(0)
    side = window or 12
    stock = Block(48, 4, use_rel_pos=True, window_size=window, input_size=(side, side))
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused = copy.deepcopy(stock)
    fused.__class__, fused.attn.__class__ = FusedBlock, FusedAttention
    x = torch.randn(2, 12, 10, 48)
    given = x.clone()
    with torch.no_grad():
        expected, found = stock(x), fused(x)
    assert torch.equal(x, given), "the block's input is left as it is"
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_an_encoder_keeps_its_weights_and_gradients():
    sam = small_vit()
    image = torch.randn(1, 3, 64, 64)
    names, expected = list(sam.state_dict()), sam.image_encoder(image)
    fuse_attention(sam.image_encoder)
    assert list(sam.state_dict()) == names
    found = sam.image_encoder(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(sam.image_encoder(image), expected, rtol=1e-4, atol=1e-5)


def test_samrays_vits_are_fused():
    with torch.device("meta"):
        blocks = build_model("vit_b").image_encoder.blocks
    assert {(type(block), type(block.attn)) for block in blocks} == {(FusedBlock, FusedAttention)}
