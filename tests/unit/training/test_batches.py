"""The data order and prompts do not depend on the number of workers."""

import numpy as np
import pytest
import torch
from sam_parts import blob_record, small_sam

from samray.config import PromptConfig
from samray.errors import DatasetError
from samray.geometry.prompts import Prompt
from samray.geometry.views import View, cached_view
from samray.sam.decode import group_prompts
from samray.sam.embeddings import EmbeddingCache
from samray.training.batches import (
    BatchLoader,
    cached_entry,
    epoch_steps,
    share_work,
    valid_region,
)


@pytest.mark.parametrize("num_images", [1, 5, 12])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 40])
def test_an_epoch_has_every_image_once(num_images, batch_size):
    steps = epoch_steps(num_images, batch_size, seed=3, epoch=2)
    assert sorted(index for step in steps for index in step) == list(range(num_images))
    assert all(len(step) == batch_size for step in steps[:-1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_share_a_step_without_drop_or_repeat(world_size):
    for step in epoch_steps(11, 4, seed=0, epoch=0):
        shares = share_work(step, world_size)
        assert sorted(place for share in shares for place in share) == list(range(len(step)))


@pytest.mark.parametrize(
    ("work", "world_size", "expected"),
    [
        ([9, 1, 8, 2], 2, [[0, 1], [2, 3]]),
        ([5, 5, 5, 1, 1], 2, [[0, 2], [1, 3, 4]]),
        ([90, 1, 1, 1, 1, 1], 2, [[0, 4, 5], [1, 2, 3]]),  # three images each, however little
        ([0, 0, 7], 3, [[2], [0], [1]]),
        ([3], 3, [[0], [], []]),
    ],
)
def test_workers_get_about_the_same_work(work, world_size, expected):
    assert share_work(work, world_size) == expected


def test_a_worker_has_the_images_that_its_share_names(loader):
    """1, 4 and 7 objects: two workers have 7, and 4 with 1."""
    assert loader.shares([0, 1, 2], 2) == [[2], [0, 1]]
    loaded = [loader.load([0, 1, 2], rank, 2, epoch=0) for rank in (0, 1)]
    assert [[len(batch) for batch in batches] for batches in loaded] == [[7], [5]]


def test_order_changes_with_epoch_and_seed_and_repeats_with_both():
    assert epoch_steps(50, 2, 0, 0) == epoch_steps(50, 2, 0, 0)
    assert epoch_steps(50, 2, 0, 0) != epoch_steps(50, 2, 0, 1)
    assert epoch_steps(50, 2, 0, 0) != epoch_steps(50, 2, 1, 0)


@pytest.fixture
def loader(tmp_path):
    records = [blob_record(f"{n}.png", (60, 80 + n), n, seed=n) for n in (1, 4, 7)]
    sam = small_sam()
    cache = EmbeddingCache(tmp_path, sam)
    rng = np.random.default_rng(0)
    for record in records:
        cache.save(record.digest, rng.normal(size=(32, 4, 4)))
    return BatchLoader(
        None, records, PromptConfig(point_selection="mixed"), 5, cache, img_size=64, low_res_size=16
    )


def everything_in(batch):
    """All prompts of a batch as comparable rows, in any order."""
    rows = []
    for group, targets in zip(batch.groups, batch.targets, strict=True):
        given = group.boxes if group.boxes is not None else group.point_coords.flatten(1)
        for i in range(len(group)):
            rows.append((tuple(given[i].tolist()), round(float(targets[i].sum()), 4)))
    return sorted(rows)


def test_every_instance_of_every_image_is_trained_on(loader):
    (batch,) = loader.load([0, 1, 2], 0, 1, epoch=0)
    assert sum(len(group) for group in batch.groups) == 1 + 4 + 7
    assert batch.encoded.shape == (3, 32, 4, 4)
    assert batch.valid.shape == (3, 1, 16, 16)


def test_prompts_do_not_depend_on_the_number_of_workers(loader):
    alone = everything_in(*loader.load([2, 0, 1], 0, 1, epoch=4))
    shared = [loader.load([2, 0, 1], rank, 2, epoch=4)[0] for rank in range(2)]
    assert sorted(row for batch in shared for row in everything_in(batch)) == alone


def test_prompts_are_drawn_anew_each_epoch_and_repeat_with_the_seed(loader):
    first, again, later = (
        everything_in(*loader.load([1, 2], 0, 1, epoch=epoch)) for epoch in (0, 0, 1)
    )
    assert first == again
    assert first != later


def test_a_worker_without_an_image_gets_no_batch(loader):
    assert loader.load([1], rank=1, world_size=2, epoch=0) == []


def test_a_missing_embedding_is_an_error_that_names_it(loader):
    loader.cache.path(loader.records[1].digest).unlink()
    with pytest.raises(DatasetError, match=r"\.npy: the embedding of 4.png is missing"):
        loader.load([1], 0, 1, epoch=0)


def test_kinds_of_prompts_are_never_mixed_in_a_group():
    one = Prompt(np.zeros((1, 2), np.float32), np.ones(1, np.int64))
    three = Prompt(np.zeros((3, 2), np.float32), np.ones(3, np.int64))
    box = Prompt(box=np.array([0, 0, 5, 5], np.float32))
    both = Prompt(one.point_coords, one.point_labels, box.box)
    prompts = [one, box, three, one, both, box]
    groups = group_prompts(prompts, [0] * 6, [(10, 10)], img_size=64)
    assert sorted(sorted(places) for _, places in groups) == [[0, 3], [1, 5], [2], [4]]
    for group, places in groups:
        assert len(group) == len(places)
        assert group.point_labels is None or not torch.any(group.point_labels == -1)


def test_many_objects_are_trained_on_in_turn(loader):
    loader.max_objects = 3
    assert loader.chosen(0, epoch=0) == [0]
    seen = [loader.chosen(2, epoch) for epoch in range(7)]
    assert all(len(set(chosen)) == 3 for chosen in seen)
    assert sorted(number for chosen in seen for number in chosen) == sorted(3 * list(range(7)))
    assert loader.num_prompts([0, 1, 2]) == 1 + 3 + 3
    assert len(loader.load([0, 1, 2], 0, 1, epoch=0)[0]) == 7


def test_several_prompts_of_an_object_share_its_target(loader):
    loader.prompts = PromptConfig(point_selection="mixed", per_object=3)
    (batch,) = loader.load([1], 0, 1, epoch=0)
    assert len(batch) == loader.num_prompts([1]) == 12
    areas = sorted(area for _, area in everything_in(batch))
    assert [areas[number] for number in range(0, 12, 3)] == sorted(set(areas))


def test_epochs_take_an_images_cached_views_in_turn(loader):
    record, cache = loader.records[1], loader.cache
    loader.cached_views = 3
    with pytest.raises(DatasetError, match=r"the embedding of 4.png is missing"):
        [loader.load([1], 0, 1, epoch) for epoch in range(3)]
    for number in range(1, 3):
        cache.save(record.digest, np.full((32, 4, 4), number), number)
    seen = [loader.cached_number(1, epoch) for epoch in range(6)]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    assert seen[:3] == seen[3:]
    for epoch, number in enumerate(seen[:3]):
        (batch,) = loader.load([1], 0, 1, epoch)
        entry = cache.load(record.digest, number).astype("float32")
        np.testing.assert_array_equal(batch.encoded[0], entry)
        view = cached_view(record.digest, number)
        expected = valid_region(view.size(record.size), 64, 16)
        np.testing.assert_array_equal(batch.valid[0, 0], expected)


def test_the_first_cached_view_is_the_image_as_it_is(loader):
    digest = loader.records[1].digest
    assert cached_view(digest, 0) == View()
    assert cached_view(digest, 1) == cached_view(digest, 1) != cached_view(digest, 2)
    paths = {loader.cache.path(digest, number) for number in range(3)} | {loader.cache.path(digest)}
    assert len(paths) == 3
    assert loader.cache.lacking([(digest, 0), (digest, 1)]) == [(digest, 1)]


def test_training_on_a_damaged_embedding_names_the_file_and_what_to_do(loader):
    cache, record = loader.cache, loader.records[1]
    path = cache.path(record.digest, 5)
    cache.save(record.digest, np.zeros((32, 4, 4)), 5)
    path.write_bytes(b"")
    with pytest.raises(DatasetError, match=rf"{path}: .* {record.name} is missing.*--resume"):
        cached_entry(cache, record, 5)
    assert not path.exists()
