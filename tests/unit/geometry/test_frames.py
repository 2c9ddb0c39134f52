"""The geometry equals that of `SamPredictor` and `Sam`."""

import cv2
import numpy as np
import pytest
import torch
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from samray.geometry.frames import (
    box_to_input,
    image_to_input,
    input_size_of,
    masks_to_original,
    points_to_input,
)
from samray.geometry.masks import crop_mask
from samray.sam.model import build_tiny
from samray.training.batches import mask_to_target, valid_region

IMG_SIZE, LOW_RES_SIZE = 64, 16
SIZES = [(40, 100), (100, 40), (64, 64), (7, 5), (1, 3), (333, 500)]


@pytest.fixture(scope="module")
def sam() -> Sam:
    return build_tiny(IMG_SIZE, 32)


@pytest.mark.parametrize("size", SIZES)
def test_model_input_equals_sams_own(sam: Sam, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = ResizeLongestSide(IMG_SIZE).apply_image(image)
    expected = sam.preprocess(torch.as_tensor(resized).permute(2, 0, 1))
    ours = image_to_input(image, IMG_SIZE)
    assert ours.dtype == torch.float32
    assert ours.shape == (3, IMG_SIZE, IMG_SIZE)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert input_size_of(size, IMG_SIZE) == resized.shape[:2]


def test_channels_stay_red_green_blue_and_padding_is_zero_after_normalising() -> None:
    image = np.full((32, 64, 3), (255, 0, 0), np.uint8)
    ours = image_to_input(image, IMG_SIZE)
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert ours[:, 10, 10].tolist() == pytest.approx(expected, abs=1e-5)
    assert not ours[:, 32:].any()
    assert ours[:, :32].all()


@pytest.mark.parametrize("size", SIZES)
def test_points_and_boxes_move_as_sam_moves_them(size: tuple[int, int]) -> None:
    reference = ResizeLongestSide(IMG_SIZE)
    points = np.random.default_rng(0).uniform(0, 1, (5, 2)) * (size[1], size[0])
    ours = points_to_input(points, size, IMG_SIZE)
    assert ours.dtype == np.float32
    assert np.allclose(ours, reference.apply_coords(points, size))
    box = np.array([1, 2, 30.5, 40])
    expected = reference.apply_boxes(box[None], size)[0]
    assert np.allclose(box_to_input(box, size, IMG_SIZE), expected)


def test_points_move_by_hand_and_the_callers_array_stays() -> None:
    points = np.array([[100.0, 0.0], [50.0, 20.0]])
    # 40 x 100 becomes 26 x 64 (25.6 rounded): y is scaled by 26 / 40.
    assert points_to_input(points, (40, 100), 64).tolist() == [[64, 0], [32, 13]]
    assert points.tolist() == [[100, 0], [50, 20]]
    assert box_to_input(np.array([0, 0, 100, 40]), (40, 100), 64).tolist() == [0, 0, 64, 26]


def target_of(
    mask: np.ndarray, img_size: int = IMG_SIZE, low_res_size: int = LOW_RES_SIZE
) -> np.ndarray:
    height, width = mask.shape
    return mask_to_target(crop_mask(mask), (height, width), img_size, low_res_size)


@pytest.mark.parametrize("size", [(640, 480), (333, 480), (50, 64), (20, 13)])
def test_target_is_the_resized_mask_averaged_over_cells(size: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(size) < 0.5
    mask[: size[0] // 2] = False
    height, width = input_size_of(size, IMG_SIZE)
    frame = np.zeros((IMG_SIZE, IMG_SIZE), np.float32)
    frame[:height, :width] = cv2.resize(
        mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA
    )
    expected = frame.reshape(LOW_RES_SIZE, 4, LOW_RES_SIZE, 4).mean(axis=(1, 3))
    assert np.allclose(target_of(mask), expected, atol=1e-5)


def test_target_is_the_covered_share_of_each_cell_by_hand() -> None:
    mask = np.zeros((64, 64), bool)
    mask[0:4, 0:6] = True  # cell (0, 0) whole, cell (0, 1) half
    mask[63, 63] = True  # one pixel of 16 in the last cell
    expected = np.zeros((16, 16))
    expected[0, 0], expected[0, 1], expected[15, 15] = 1, 0.5, 1 / 16
    target = target_of(mask)
    assert target.dtype == np.float32
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("size", [(640, 640), (300, 640), (640, 300), (480, 333)])
def test_shares_add_up_to_the_objects_area(size: tuple[int, int]) -> None:
    rows, columns = np.mgrid[: size[0], : size[1]]
    mask = np.hypot(rows - size[0] / 2, columns - size[1] / 3) < 70
    target = target_of(mask)
    height, width = input_size_of(size, IMG_SIZE)
    cells = mask.mean() * height * width / 16  # a cell is 4 x 4 pixels of the model's frame
    assert target.sum() == pytest.approx(cells, rel=1e-4)
    assert (target.min(), target.max()) == (0, pytest.approx(1))


def test_object_thinner_than_a_cell_has_a_nonzero_target() -> None:
    mask = np.zeros((1024, 1024), bool)
    mask[:, 500] = True  # 1/64 of a cell wide
    target = target_of(mask)
    assert target[:, 500 // 64] == pytest.approx(1 / 64)
    assert target.sum() == pytest.approx(16 / 64)


def test_target_and_valid_region_leave_the_padding_out_by_hand() -> None:
    """40 x 100 becomes 26 x 64: six rows of cells are whole, one holds 2 of 4 rows, nine none."""
    rows = np.array([1.0] * 6 + [0.5] + [0.0] * 9)
    valid = valid_region((40, 100), IMG_SIZE, LOW_RES_SIZE)
    assert valid.dtype == np.float32
    assert np.array_equal(valid, np.repeat(rows[:, None], 16, axis=1))
    assert np.array_equal(valid_region((100, 40), IMG_SIZE, LOW_RES_SIZE), valid.T)
    assert valid_region((50, 50), IMG_SIZE, LOW_RES_SIZE).all()
    full = target_of(np.ones((40, 100), bool))
    assert np.allclose(full, valid)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_masks", [1, 3])
def test_logits_are_resized_as_sam_does(sam: Sam, size: tuple[int, int], num_masks: int) -> None:
    low_res = torch.randn(2, num_masks, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = sam.postprocess_masks(low_res, input_size_of(size, IMG_SIZE), size)
    ours = masks_to_original(low_res, size, IMG_SIZE)
    assert ours.shape == (2, num_masks, *size)
    assert torch.allclose(ours, expected, atol=1e-6)


def test_mask_survives_the_round_trip_to_model_resolution() -> None:
    rows, columns = np.mgrid[:150, :200]
    mask = np.hypot(rows - 100, columns - 50) < 30
    target = torch.from_numpy(target_of(mask, 256, 64))
    back = masks_to_original(target[None, None] - 0.5, (150, 200), 256)[0, 0].numpy() > 0
    assert (back & mask).sum() / (back | mask).sum() > 0.95
