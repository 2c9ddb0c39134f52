"""The encoder's frozen prefix and trained suffix, and LoRA adapters."""

import copy

import pytest
import torch
from sam_parts import small_sam, small_vit
from segment_anything import sam_model_registry

from samray.config import ENCODER_BLOCKS, ModelConfig, load_config, resolve_model
from samray.errors import ConfigError
from samray.sam.adapt import (
    merged_weights,
    num_blocks,
    prefix,
    prefix_digest,
    set_trainable,
    suffix,
    trained_state,
)
from samray.sam.model import PARTS, build_model


def adapted(sam, adapt="lora", blocks=1, **settings):
    set_trainable(sam, ModelConfig(adapt=adapt, adapt_blocks=blocks, **settings))
    return sam


def disturb(sam):
    """Change everything that learns, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained_state(sam).values():
            parameter += 0.05 * torch.randn_like(parameter)
    return sam


def learning(sam, part="image_encoder."):
    return {name for name in trained_state(sam) if name.startswith(part)}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64)


def test_a_seed_gives_the_same_adapters():
    """Whatever was drawn before; a run would otherwise differ from another of the same seed."""

    def down(seed):
        sam = small_vit()
        set_trainable(sam, ModelConfig(adapt="lora", adapt_blocks=2), seed)
        return torch.cat([v.flatten() for n, v in trained_state(sam).items() if "down" in n])

    first = down(0)
    torch.rand(1)
    assert torch.equal(down(0), first)
    assert not torch.equal(down(1), first)


@pytest.mark.parametrize("build", [small_sam, small_vit])
def test_prefix_and_suffix_are_the_encoder_at_every_depth(build, images):
    encoder = build().image_encoder.eval()
    with torch.no_grad():
        expected = encoder(images)
        for depth in range(1, num_blocks(encoder) + 1):
            found = suffix(encoder, prefix(encoder, images, depth), depth)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "adapt"), [(small_sam, "full"), (small_vit, "lora"), (small_vit, "full")]
)
def test_training_leaves_the_prefix_and_its_digest_as_they_were(build, adapt, images):
    sam = build().eval()
    before = prefix_digest(sam, num_blocks(sam.image_encoder) - 1)
    cached = prefix(sam.image_encoder, images, num_blocks(sam.image_encoder) - 1)
    disturb(adapted(sam, adapt))
    depth = num_blocks(sam.image_encoder) - 1
    assert prefix_digest(sam, depth) == before
    with torch.no_grad():
        torch.testing.assert_close(
            suffix(sam.image_encoder, cached, depth),
            sam.image_encoder(images),
            rtol=1e-5,
            atol=1e-6,
        )


def test_the_digest_depends_on_the_depth_and_on_the_prefix_alone():
    sam = small_sam()
    digests = [prefix_digest(sam, depth) for depth in range(1, num_blocks(sam.image_encoder) + 1)]
    assert len(set(digests)) == len(digests)
    other = copy.deepcopy(sam)
    torch.nn.init.ones_(other.image_encoder.stages[2][0].weight)
    changed = [prefix_digest(other, depth) for depth in range(1, len(digests) + 1)]
    assert changed[:2] == digests[:2]
    assert not set(changed[2:]) & set(digests)


def test_adapters_start_without_effect_and_merge_to_a_plain_sam(images):
    plain = small_vit().eval()
    sam = adapted(copy.deepcopy(plain), blocks=2, lora_rank=4)
    with torch.no_grad():
        torch.testing.assert_close(sam.image_encoder(images), plain.image_encoder(images))
        disturb(sam)
        merged = merged_weights(sam)
        assert merged.keys() == plain.state_dict().keys()
        plain.load_state_dict(merged)
        moved = sam.image_encoder(images)
        torch.testing.assert_close(plain.image_encoder(images), moved, rtol=1e-6, atol=1e-6)
    before, width = small_vit().state_dict(), plain.image_encoder.blocks[0].attn.qkv.in_features
    for name, value in merged.items():
        same = torch.equal(value, before[name])
        if name.startswith("image_encoder."):
            assert same != (name.endswith("qkv.weight") and ".blocks.0." not in name), name
        if name.endswith("blocks.1.attn.qkv.weight"):  # queries and values change, keys do not
            change = (value != before[name]).any(dim=1).split(width)
            assert [bool(part.any()) for part in change] == [True, False, True]


def test_a_resumed_model_is_the_one_that_was_saved(images):
    """The parameters that learn, on top of the base, are all that a run has changed."""
    for build, adapt in ((small_vit, "lora"), (small_vit, "full"), (small_sam, "full")):
        sam = disturb(adapted(build(), adapt))
        again = adapted(build(), adapt)
        again.load_state_dict(trained_state(sam), strict=False)
        expected, found = sam.state_dict(), again.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_what_learns():
    lora = learning(adapted(small_vit(), "lora", 1))
    assert len(lora) == 2
    assert all("blocks.2.attn.qkv.parametrizations" in name for name in lora)
    full = learning(adapted(small_vit(), "full", 1))
    assert all(".blocks.2." in name or ".neck." in name for name in full)
    every = learning(adapted(small_sam(), "full", "all"))
    assert every == {f"image_encoder.{n}" for n, _ in small_sam().image_encoder.named_parameters()}
    last = learning(adapted(small_sam(), "full", 1))
    assert last < every
    assert not any(".stem." in name or ".stages.2." in name for name in last)
    for settings in ({"adapt": "none"}, {"adapt": "full", "adapt_blocks": 0}):
        sam = small_sam()
        set_trainable(sam, ModelConfig(**settings))
        assert learning(sam) == set()
        assert learning(sam, "mask_decoder.")
        assert learning(sam, "prompt_encoder.")


@pytest.mark.parametrize("frozen", ["prompt_encoder", "mask_decoder"])
def test_the_other_parts_freeze_alone(frozen):
    sam = adapted(small_sam(), "full", "all", **{f"freeze_{frozen}": True})
    for part in PARTS:
        assert all(p.requires_grad == (part != frozen) for p in getattr(sam, part).parameters())


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ConfigError, match=r"lora is for attention.*use model.adapt=full"):
        resolve_model(load_config(overrides=["model.adapt=lora"]), True)
    settings = ["model.type=vit_b", "model.adapt_blocks=13"]
    with pytest.raises(ConfigError, match="13, but the image encoder of vit_b has 12 blocks"):
        resolve_model(load_config(overrides=settings), True)


@pytest.mark.parametrize("model_type", ["tiny", "vit_b"])
def test_the_number_of_blocks_is_known_without_the_model(model_type):
    with torch.device("meta"):
        encoder = build_model(model_type).image_encoder
    assert num_blocks(encoder) == ENCODER_BLOCKS[model_type]


@pytest.mark.parametrize(
    ("settings", "weights_given", "resolved"),
    [
        ({}, True, ("full", "all")),
        ({"model.type": "vit_b"}, True, ("lora", 3)),
        ({"model.type": "vit_h"}, True, ("lora", 8)),
        ({"model.type": "vit_b"}, False, ("full", "all")),
        ({"model.freeze_image_encoder": True}, True, ("none", 0)),
        ({"model.freeze_image_encoder": False, "model.type": "vit_b"}, True, ("full", "all")),
        ({"model.adapt": "none"}, False, ("none", 0)),
        ({"model.adapt": "full", "model.adapt_blocks": 2}, True, ("full", 2)),
        ({"model.adapt_blocks": 0}, True, ("none", 0)),
    ],
)
def test_settings_that_are_unset_follow_from_the_others(settings, weights_given, resolved):
    config = resolve_model(load_config(options=settings), weights_given)
    assert (config.model.adapt, config.model.adapt_blocks) == resolved
    assert config.model.freeze_image_encoder == (resolved[0] == "none")
    assert resolve_model(config, weights_given) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "full", "freeze_image_encoder": True}, "is true, but model.adapt is full"),
        ({"adapt": "none", "adapt_blocks": 2}, "adapt_blocks: 2, but .* no block learns"),
        ({"freeze_image_encoder": True, "adapt_blocks": "all"}, "adapt_blocks: all, but"),
    ],
)
def test_settings_that_contradict_are_refused(options, message):
    words = {f"model.{key}": value for key, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        resolve_model(load_config(options=words), weights_given=True)


@pytest.mark.slow
def test_a_step_of_vit_b_merges_to_weights_that_segment_anything_loads(tmp_path):
    sam = adapted(build_model("vit_b"), "lora", 1)
    torch.manual_seed(0)
    activations = torch.randn(1, 64, 64, 768)
    embedding = suffix(sam.image_encoder, activations, 11)
    (embedding * torch.randn_like(embedding)).mean().backward()
    optimizer = torch.optim.SGD(trained_state(sam).values(), lr=1e4)
    optimizer.step()
    torch.save(merged_weights(sam), tmp_path / "weights.pth")
    stock = sam_model_registry["vit_b"](checkpoint=tmp_path / "weights.pth").eval()
    with torch.no_grad():  # the blocks before are those of `build_model`, which other tests compare
        x = stock.image_encoder.blocks[11](activations)
        expected = stock.image_encoder.neck(x.permute(0, 3, 1, 2))
        found = suffix(sam.image_encoder, activations, 11)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - embedding).abs().max() > 0.01  # the adapters have learned
