"""The same numbers as segment_anything with the same weights; decoding many images at once."""

import numpy as np
import pytest
import torch
from sam_parts import add_noise, small_sam
from segment_anything import SamPredictor, sam_model_registry

from samray.config import load_config
from samray.errors import CheckpointError
from samray.geometry.prompts import Prompt
from samray.prediction.predictor import Predictor
from samray.sam.checkpoint import save_checkpoint
from samray.sam.decode import PromptGroup, decode_prompts
from samray.sam.embeddings import EmbeddingCache, encode_image, encode_images
from samray.sam.model import build_model, encoder_digest, load_weights

TOLERANCE = 1e-4  # of the largest logit

IMAGES = {"landscape": (61, 133), "very_small": (11, 7)}


def prompts_for(size):
    height, width = size
    near, far = [width * 0.3, height * 0.4], [width * 0.8, height * 0.7]
    box = np.array([width * 0.1, height * 0.2, width * 0.9, height * 0.8], np.float32)
    one, two = np.array([near], np.float32), np.array([near, far], np.float32)
    return {
        "point": Prompt(one, np.array([1])),
        "points": Prompt(two, np.array([1, 0])),
        "box": Prompt(box=box),
        "point_and_box": Prompt(two, np.array([1, 1]), box),
    }


def test_images_encoded_together_equal_those_encoded_alone():
    sam = build_model("tiny").eval()
    rng = np.random.default_rng(0)
    sizes = [(90, 120), (300, 200), (64, 64)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    together = encode_images(sam, images)
    for image, embedding in zip(images, together, strict=True):
        alone = encode_image(sam, image)
        assert (alone - embedding).abs().max() <= TOLERANCE * alone.abs().max()


def assert_equals_sam_predictor(sam, size, stock=None):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    reference, ours = SamPredictor(stock or sam), Predictor(sam)
    reference.set_image(image)
    ours.set_image(image)
    embedding = reference.get_image_embedding()[0]
    difference = (encode_image(sam, image) - embedding).abs().max()
    assert difference <= TOLERANCE * embedding.abs().max()
    for name, prompt in prompts_for(size).items():
        for multimask_output in (True, False):
            masks, ious, low_res = reference.predict(
                prompt.point_coords,
                prompt.point_labels,
                prompt.box,
                multimask_output=multimask_output,
            )
            prediction = ours.predict(prompt, multimask_output)
            scale = np.abs(low_res).max()
            assert np.abs(prediction.low_res_masks - low_res).max() <= TOLERANCE * scale, name
            assert np.abs(prediction.iou_predictions - ious).max() <= TOLERANCE * scale, name
            # A logit within rounding of zero may fall on either side of it.
            assert (prediction.masks != masks).mean() < 1e-3, name


@pytest.mark.parametrize("size", IMAGES.values(), ids=IMAGES)
def test_tiny_gives_the_numbers_of_sam_predictor(size):
    assert_equals_sam_predictor(add_noise(build_model("tiny")), size)


@pytest.mark.slow
def test_vit_b_gives_the_numbers_of_sam_predictor(vit_b):
    """On one image, as it takes a minute; sizes are a matter of the code that `tiny` shares."""
    stock = sam_model_registry["vit_b"]()
    stock.load_state_dict(vit_b.state_dict())
    assert_equals_sam_predictor(vit_b, IMAGES["landscape"], stock)


@pytest.fixture(scope="module")
def vit_b():
    return add_noise(build_model("vit_b"))


@pytest.mark.slow
def test_vit_b_checkpoints_load_with_the_stock_registry(vit_b, tmp_path):
    config = load_config(None, ["model.type=vit_b"])
    save_checkpoint(tmp_path / "checkpoint", vit_b.state_dict(), config, {})
    stock = sam_model_registry["vit_b"](checkpoint=str(tmp_path / "checkpoint" / "weights.pth"))
    for name, tensor in vit_b.state_dict().items():
        assert torch.equal(stock.state_dict()[name], tensor)


def random_embeddings(sam, count):
    generator = torch.Generator().manual_seed(1)
    shape = (count, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size)
    return torch.randn(shape, generator=generator)


def test_prompts_of_many_images_decode_as_one_image_at_a_time():
    sam = small_sam()
    embeddings = random_embeddings(sam, 3)
    index = torch.tensor([2, 0, 1, 0, 2, 2])
    coords = torch.rand(6, 2, 2) * 64
    group = PromptGroup(index, coords, torch.ones(6, 2))
    with torch.no_grad():
        masks, ious = decode_prompts(sam, embeddings, group, multimask_output=True)
        for place, image in enumerate(index.tolist()):
            sparse, dense = sam.prompt_encoder(
                (coords[place : place + 1], torch.ones(1, 2)), None, None
            )
            low_res, predicted = sam.mask_decoder(
                embeddings[image : image + 1],
                sam.prompt_encoder.get_dense_pe(),
                sparse,
                dense,
                multimask_output=True,
            )
            torch.testing.assert_close(masks[place], low_res[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ious[place], predicted[0], rtol=1e-4, atol=1e-5)


def test_padding_a_box_with_a_point_would_move_the_logits():
    """The reason why prompts of different layouts are never padded into one group."""
    sam = small_sam()
    embeddings = random_embeddings(sam, 1)
    box = torch.tensor([[10.0, 12.0, 40.0, 50.0]])
    padded = PromptGroup(torch.tensor([0]), torch.zeros(1, 1, 2), torch.full((1, 1), -1), boxes=box)
    with torch.no_grad():
        plain, _ = decode_prompts(sam, embeddings, PromptGroup(torch.tensor([0]), boxes=box), False)
        moved, _ = decode_prompts(sam, embeddings, padded, False)
    assert (plain - moved).abs().max() > 1e-3 * plain.abs().max()


def test_same_seed_same_weights():
    one, two, other = (build_model("tiny", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_encoder_digest_follows_the_encoder_only():
    sam = small_sam()
    before = encoder_digest(sam)
    with torch.no_grad():
        sam.mask_decoder.iou_token.weight.add_(1)
    assert encoder_digest(sam) == before
    with torch.no_grad():
        sam.image_encoder.stem[0].weight.add_(1)
    assert encoder_digest(sam) != before


def test_weights_of_another_type_are_refused_by_name():
    sam = small_sam()
    with pytest.raises(CheckpointError, match="tensors missing"):
        load_weights(sam, {}, "tiny", "some.pth")
    foreign = {"image_encoder.patch_embed.proj.weight": torch.zeros(768, 3, 16, 16)}
    foreign["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 256)
    with pytest.raises(CheckpointError, match=r"some.pth: holds vit_b weights.*--model-type vit_b"):
        load_weights(sam, foreign, "tiny", "some.pth")


def test_tensors_outside_sam_are_ignored():
    sam, other = small_sam(0), small_sam(1)
    load_weights(sam, {**other.state_dict(), "decoder.up.weight": torch.zeros(1)}, "tiny", "m.pt")
    assert torch.equal(sam.mask_decoder.iou_token.weight, other.mask_decoder.iou_token.weight)


def test_cached_float16_embeddings_move_logits_by_little(tmp_path):
    """The difference of the cached path, stated in docs/architecture.md."""
    sam = add_noise(build_model("tiny"))
    image = np.random.default_rng(0).integers(0, 256, (100, 140, 3), dtype=np.uint8)
    cache = EmbeddingCache(tmp_path, sam)
    exact = encode_image(sam, image)
    cache.save("a" * 64, exact.numpy())
    cached = cache.load("a" * 64)
    assert cached.dtype == np.float16
    group = PromptGroup(torch.tensor([0]), torch.tensor([[[80.0, 60.0]]]), torch.ones(1, 1))
    with torch.no_grad():
        plain, _ = decode_prompts(sam, exact[None], group, True)
        through, _ = decode_prompts(sam, torch.from_numpy(cached.astype("f4"))[None], group, True)
    difference = (plain - through).abs().max() / plain.abs().max()
    print(f"float16 cache: largest difference {difference:.1e} of the largest logit")
    assert 0 < difference < 5e-3


def test_a_cache_has_room_until_the_reserve(tmp_path):
    sam, folder = small_sam(), tmp_path / "not" / "made"
    assert EmbeddingCache(folder, sam).has_room()
    assert not EmbeddingCache(folder, sam, reserve_gb=1e9).has_room()
