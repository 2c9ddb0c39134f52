"""Maps to objects: on maps of drawn objects, where the answer is known."""

import numpy as np
import pytest
import torch
from sam_parts import small_sam

from samray.geometry.masks import CroppedMask, crop_mask, encode_rle, mask_ious
from samray.instances.decoder import InstanceDecoder, Maps, frame_of
from samray.instances.segment import (
    Way,
    find_objects,
    flood,
    image_maps,
    maps_of,
    suppress,
)
from samray.instances.targets import map_targets, number_objects
from samray.sam.embeddings import encode_image


def discs(size, places):
    rows, columns = np.mgrid[: size[0], : size[1]]
    return [np.hypot(rows - y, columns - x) < radius for y, x, radius in places]


def perfect_maps(masks, classes, size, side, num_classes=1):
    """What a decoder without any error would say."""
    targets = map_targets(number_objects(map(crop_mask, masks), size), classes, side)
    inside = torch.from_numpy(targets.numbers > 0)
    kinds = torch.nn.functional.one_hot(torch.from_numpy(targets.classes), num_classes)
    return Maps(
        torch.where(inside, 6.0, -6.0)[None],
        torch.from_numpy(targets.center)[None],
        torch.from_numpy(targets.boundary)[None],
        5.0 * kinds.permute(2, 0, 1)[None, :, ::2, ::2],
    )


def true_ious(found, masks, size):
    rles = [encode_rle(one.mask, size) for one in found]
    truth = [encode_rle(CroppedMask(mask, (0, 0)), size) for mask in masks]
    return mask_ious(rles, truth, size)


@pytest.mark.parametrize("size", [(256, 256), (180, 256), (300, 520), (90, 60)])
def test_touching_objects_come_back_from_perfect_maps(size):
    h, w = size
    r = min(size) / 6
    masks = discs(size, [(h / 2, w / 4, r), (h / 2, w / 4 + 2 * r - 1, r), (h / 5, w * 0.8, r / 2)])
    classes = [0, 1, 1]
    maps = image_maps(perfect_maps(masks, classes, size, 128, 2), size)
    found = find_objects(None, maps, torch.zeros(1), Way())
    ious = true_ious(found, masks, size)
    assert ious.shape == (3, 3)
    assert (ious.max(axis=0) > 0.85).all()
    for one, row in zip(found, ious, strict=True):
        assert one.class_index == classes[row.argmax()]
        assert one.score > 0.9


def test_an_image_larger_than_the_maps_gets_masks_of_its_own_size():
    size = (400, 1200)
    masks = discs(size, [(200, 300, 90), (200, 900, 60)])
    maps = image_maps(perfect_maps(masks, [0, 0], size, 128), size)
    assert maps.foreground.shape[1] < 1200
    found = find_objects(None, maps, torch.zeros(1), Way())
    assert (true_ious(found, masks, size).max(axis=0) > 0.9).all()


def test_nothing_is_found_where_nothing_is():
    maps = image_maps(perfect_maps([], [], (50, 50), 64), (50, 50))
    for kind in ("watershed", "point", "box", "both"):
        assert find_objects(small_sam(), maps, torch.zeros(32, 4, 4), Way(kind=kind)) == []


def test_one_object_over_the_whole_image_is_one_object():
    maps = image_maps(perfect_maps([np.ones((60, 60), bool)], [0], (60, 60), 64), (60, 60))
    found = find_objects(None, maps, torch.zeros(1), Way())
    assert [one.mask.pixels.sum() for one in found] == [3600]


def test_objects_smaller_than_asked_are_left_out():
    size = (128, 128)
    masks = discs(size, [(30, 30, 15), (90, 90, 4)])
    maps = image_maps(perfect_maps(masks, [0, 0], size, 128), size)
    assert flood(maps, Way(min_area=4)).max() == 2
    assert flood(maps, Way(min_area=100)).max() == 1


def test_objects_that_all_touch_stay_apart():
    """Tiles of a floor: no background between them, and none beside them."""
    size = (96, 96)
    masks = []
    for y in range(0, 96, 16):
        for x in range(0, 96, 16):
            masks.append(np.zeros(size, bool))
            masks[-1][y : y + 16, x : x + 16] = True
    maps = image_maps(perfect_maps(masks, [0] * 36, size, 96), size)
    found = find_objects(None, maps, torch.zeros(1), Way())
    assert len(found) == 36
    assert true_ious(found, masks, size).max(axis=0).min() > 0.8


def test_thousands_of_objects_are_numbered():
    size = (512, 512)
    masks = discs((8, 8), [(4, 4, 3)])
    numbers = np.tile(masks[0], (64, 64))
    tile = perfect_maps(masks, [0], (8, 8), 8)
    maps = Maps(*(value.repeat(*[1] * (value.ndim - 2), 64, 64) for value in vars(tile).values()))
    found = flood(image_maps(maps, size), Way())
    assert found.max() == 4096
    assert ((found > 0) == numbers).mean() > 0.95


def test_of_two_masks_of_one_object_the_surer_stays():
    mask = CroppedMask(np.ones((10, 10), bool), (5, 5))
    moved = CroppedMask(np.ones((10, 10), bool), (6, 5))
    apart = CroppedMask(np.ones((10, 10), bool), (20, 20))
    kept = suppress([(mask, 0.5), (moved, 0.9), (apart, 0.1)], (40, 40), max_iou=0.5)
    assert [answer[1] for answer in kept] == [0.9, 0.1]
    assert len(suppress([(mask, 0.5), (moved, 0.9)], (40, 40), max_iou=0.95)) == 2
    assert suppress([], (40, 40), 0.5) == []


@pytest.mark.parametrize("kind", ["point", "box", "both"])
def test_prompts_give_what_the_mask_decoder_answers_to_them(kind):
    """Every seed is asked once; the masks are those of `predict_masks`, in the image's frame."""
    from samray.geometry.prompts import Prompt
    from samray.sam.decode import predict_masks

    sam, size = small_sam(), (48, 64)
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    embedding = encode_image(sam, image)
    masks = discs(size, [(24, 20, 10)])
    maps = image_maps(perfect_maps(masks, [0], size, 64), size)
    found = find_objects(sam, maps, embedding, Way(kind=kind, min_score=-10))
    point, box = np.array([[20, 24]], np.float32), np.array([11, 15, 30, 34], np.float32)
    prompt = Prompt(
        None if kind == "box" else point,
        None if kind == "box" else np.ones(1, np.int64),
        None if kind == "point" else box,
    )
    ((_, expected),) = predict_masks(sam, embedding, [prompt], size)
    assert len(found) == 1
    mask = np.zeros(size, bool)
    (x, y), pixels = found[0].mask.origin, found[0].mask.pixels
    mask[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    assert (mask == expected.mask(expected.best)).mean() > 0.97


def test_the_decoder_gives_maps_of_any_image():
    """Maps at two pixels of the frame a cell, whatever the image's size and colour."""
    sam = small_sam()
    decoder = InstanceDecoder(32, 64, num_classes=3).eval()
    assert (decoder.frame, frame_of(256), frame_of(1024)) == (128, 512, 1024)
    for size in ((40, 64), (300, 20), (1, 1)):
        image = np.full((*size, 3), 7, np.uint8)
        maps = maps_of(decoder, image, encode_image(sam, image))
        assert maps.classes.shape[0] == 3
        assert np.isfinite(maps.foreground).all()
        assert maps.original_size == size
