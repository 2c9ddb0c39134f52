"""Drawn scenes: images, exact masks, and reproducible from a seed."""

import pytest
import torch

from samray.training.scenes import MAX_FRACTION, MAX_OBJECTS, MIN_PIXELS, draw_scenes, region_masks

SIZE = 128


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(generator(1), 24, SIZE)


def test_a_seed_draws_the_same_pixels_and_another_seed_others():
    one, again, other = (draw_scenes(generator(seed), 4, SIZE) for seed in (1, 1, 2))
    for name in ("images", "objects", "parts", "valid"):
        assert torch.equal(getattr(one, name), getattr(again, name)), name
    assert not torch.equal(one.images, other.images)


def test_images_are_bytes_with_content_and_the_padding_is_empty(scenes):
    assert scenes.images.shape == (24, 3, SIZE, SIZE)
    assert float(scenes.images.min()) >= 0
    assert float(scenes.images.max()) <= 255
    assert torch.equal(scenes.images, scenes.images.round())
    for image, valid in zip(scenes.images, scenes.valid, strict=True):
        assert float(image[:, valid].std()) > 3
        assert not image[:, ~valid].any()
    assert not scenes.objects[~scenes.valid].any()
    height, width = scenes.valid.any(dim=2).sum(dim=1), scenes.valid.any(dim=1).sum(dim=1)
    assert (torch.maximum(height, width) == SIZE).all()  # the longest side fills the frame
    assert (torch.minimum(height, width) < SIZE).any()
    assert (scenes.valid.sum(dim=(1, 2)) == height * width).all()


def test_parts_lie_inside_their_objects(scenes):
    in_part = scenes.parts > 0
    assert in_part.any()
    assert torch.equal(scenes.parts[in_part], scenes.objects[in_part])
    assert int(scenes.objects.max()) <= MAX_OBJECTS


def test_scenes_are_diverse(scenes):
    counts = [len(objects.unique()) - 1 for objects in scenes.objects]
    assert min(counts) < 6
    assert max(counts) > 12
    spread = (scenes.images.amax(dim=1) - scenes.images.amin(dim=1)).mean(dim=(1, 2))
    assert (spread < 3).any(), "no grey image"
    assert (spread > 40).any(), "no colourful image"
    _, masks = region_masks(scenes, 8, generator(0))
    shares = masks.sum(dim=(1, 2)) / SIZE**2
    assert float(shares.min()) < 0.005
    assert float(shares.max()) > 0.15


def test_regions_are_visible_and_never_repeated(scenes):
    scene_index, masks = region_masks(scenes, 5, generator(0))
    assert masks.dtype == torch.bool
    areas = masks.sum(dim=(1, 2))
    pixels = scenes.valid.sum(dim=(1, 2))[scene_index]
    assert int(areas.min()) >= MIN_PIXELS
    assert bool((areas <= MAX_FRACTION * pixels).all())
    assert not (masks & ~scenes.valid[scene_index]).any()
    for scene in range(24):
        mine = masks[scene_index == scene]
        assert 1 <= len(mine) <= 5
        assert len({mask.numpy().tobytes() for mask in mine}) >= len(mine) - 1


def test_masks_follow_edges_of_the_image(scenes):
    """Colours differ more across an outline than within, so masks match the pixels."""
    image, objects = scenes.images, scenes.objects
    step = (image[..., 1:] - image[..., :-1]).abs().mean(dim=1)
    inside = scenes.valid[..., 1:] & scenes.valid[..., :-1]
    across = (objects[..., 1:] != objects[..., :-1]) & inside
    within = (objects[..., 1:] == objects[..., :-1]) & inside
    assert float(step[across].mean()) > 1.5 * float(step[within].mean())
