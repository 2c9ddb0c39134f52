"""Copies of an image are found however they were saved; other images are not."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from samray.errors import AnnotationError
from samray.geometry.duplicates import (
    BLOCK,
    fingerprint,
    fingerprint_of,
    near_duplicates,
    pack,
    unpack,
)
from samray.geometry.images import decode_image


def scene(seed, size=(300, 400)):
    """A picture of soft blobs, as a PIL image of size (H, W)."""
    cells = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size[::-1], Image.Resampling.BICUBIC)


def saved(picture, form="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def groups_of(files):
    prints = np.stack([fingerprint(file) for file in files])
    return near_duplicates(prints, [hashlib.sha256(file).hexdigest() for file in files])


def test_copies_are_found_and_other_photos_are_not():
    one = scene(1)
    turned = one.transpose(Image.Transpose.ROTATE_90)  # stored on its side, shown upright
    exif = Image.Exif()
    exif[0x0112] = 6
    copies = [
        saved(one),
        saved(one, "JPEG", quality=30),
        saved(one.resize((170, 128)), "JPEG"),
        saved(one.point(lambda v: min(255, int(v * 1.1) + 12))),
        saved(one.crop((4, 3, 396, 297))),
        saved(turned, "JPEG", exif=exif),
    ]
    others = [saved(scene(seed)) for seed in range(2, 12)]
    assert groups_of([*others[:4], *copies, *others[4:]]) == [list(range(4, 10))]


def test_deep_images_are_compared_by_what_is_shown():
    grey = np.asarray(scene(3).convert("L"), dtype=np.uint16)
    deep = saved(Image.fromarray(1000 + 40 * grey))
    assert groups_of([saved(scene(4)), deep, saved(Image.fromarray(grey.astype(np.uint8)))]) == [
        [1, 2]
    ]


def test_images_of_one_colour_are_the_same_only_as_equal_files():
    """They have no structure to compare, so black and white must not count as similar."""
    black, white = (saved(Image.new("RGB", (40, 40), color)) for color in ("black", "white"))
    assert groups_of([black, white, scene_file := saved(scene(5)), black]) == [[0, 3]]
    assert groups_of([scene_file]) == []


def test_chains_and_blocks_join_to_one_group():
    """A resembles B and B resembles C; they lie in different blocks of the comparison."""
    rng = np.random.default_rng(0)
    prints = rng.normal(size=(2 * BLOCK + 30, 480)).astype(np.float32)
    chain = [5, BLOCK + 7, 2 * BLOCK + 20]
    start, aside = prints[5], prints[6]
    for step, place in enumerate(chain):
        angle = 0.4 * step  # neighbours at cos 0.4 = 0.92, the ends at cos 0.8 = 0.70
        prints[place] = np.cos(angle) * start + np.sin(angle) * aside
    prints[6] = rng.normal(size=480)
    prints[3], prints[2 * BLOCK + 1] = 1, 1
    prints /= np.linalg.norm(prints, axis=1, keepdims=True)
    names = [str(number) for number in range(len(prints))]
    assert near_duplicates(prints, names) == [[3, 2 * BLOCK + 1], chain]


def test_a_damaged_file_is_refused():
    with pytest.raises(AnnotationError, match="cannot be decoded"):
        fingerprint(saved(scene(1))[:500])


def test_fingerprint_of_a_decoded_image_and_its_text_are_nearly_the_same_vector():
    for seed in range(5):
        raw = saved(scene(seed), "JPEG", quality=90)
        exact = fingerprint(raw)
        for vector in (fingerprint_of(decode_image(raw)), unpack(pack(exact))):
            assert float(vector @ exact) > 0.99
    flat = fingerprint_of(np.full((20, 30, 3), 7, np.uint8))
    assert not unpack(pack(flat)).any()
