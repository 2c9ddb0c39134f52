"""The training step: ragged batches, workers with few or no images, and known pitfalls."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_parts import blob_record, small_sam, small_vit
from small_dataset import write_dataset
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from samray.config import ModelConfig, PromptConfig, TrainConfig, load_config, resolve_model
from samray.data.dataset import ImageRecord, Instance
from samray.errors import ConfigError, TrainingError
from samray.geometry.masks import CroppedMask, encode_rle
from samray.instances.decoder import InstanceDecoder
from samray.runs import RunFolder
from samray.sam.adapt import num_blocks, prefix, set_trainable
from samray.sam.checkpoint import save_checkpoint
from samray.sam.decode import decode_prompts
from samray.sam.embeddings import EmbeddingCache
from samray.sam.losses import sam_loss
from samray.sam.shipped import load_shipped
from samray.training.batches import BatchLoader
from samray.training.loop import Worker, learning_rate_at, train_epoch, train_loop, train_step
from samray.training.optimizer import Optimizer, training_dtype
from samray.training.step import PromptedSam

WEIGHTS = (20.0, 1.0, 1.0)
INSTANCES = (1, 4, 7)
CPU = torch.device("cpu")


MIXED, INTERACTIVE = PromptConfig(point_selection="mixed"), PromptConfig(num_clicks=3)


def make_loader(folder, instances=INSTANCES, prompts=MIXED, dataset=None):
    records = [blob_record(f"{n}", (60, 80), n, seed=n) for n in instances]
    if dataset is not None:
        records = dataset.split("train")
    cache = EmbeddingCache(Path(folder), small_sam())
    for record in records:
        rng = np.random.default_rng(int(record.digest, 16))
        cache.save(record.digest, rng.normal(size=(32, 4, 4)))
    labels = None if dataset is None else ("disc", "square")
    return BatchLoader(dataset, records, prompts, 5, cache, 64, 16, labels=labels)


def frozen_module(max_prompts=64):
    sam = small_sam()
    set_trainable(sam, ModelConfig(adapt="none"))
    return PromptedSam(sam, WEIGHTS, max_prompts)


def optimizer_of(module, **settings):
    config = TrainConfig(**{"learning_rate": 1e-4, **settings})
    return Optimizer(module.sam, config, CPU, module.instances)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad}


def assert_same_gradients(one, two):
    assert one.keys() == two.keys()
    for name in one:
        scale = max(float(one[name].abs().max()), 1e-3)
        assert float((one[name] - two[name]).abs().max()) <= 1e-4 * scale, name


def loss_and_gradients(module, batches):
    module.zero_grad()
    total = sum(module(batch)["loss"] for batch in batches)
    (total / sum(INSTANCES)).backward()
    return float(total.detach()), gradients(module)


def test_a_ragged_batch_equals_looping_over_its_images(tmp_path):
    loader, module = make_loader(tmp_path), frozen_module()
    whole, grads = loss_and_gradients(module, loader.load([0, 1, 2], 0, 1, epoch=0))
    loader.images_at_once = 1
    parts = loader.load([0, 1, 2], 0, 1, epoch=0)
    assert len(parts) == 3
    looped, looped_grads = loss_and_gradients(module, parts)
    assert whole == pytest.approx(looped, rel=1e-5)
    assert_same_gradients(grads, looped_grads)


def test_the_loss_equals_the_stock_decoder_called_image_by_image(tmp_path):
    loader, module = make_loader(tmp_path), frozen_module()
    (batch,) = loader.load([0, 1, 2], 0, 1, epoch=0)
    ours = float(module(batch)["loss"].detach())
    sam, total = module.sam, 0.0
    for group, targets in zip(batch.groups, batch.targets, strict=True):
        for i, image in enumerate(group.image_index.tolist()):
            points = None
            if group.point_coords is not None:
                points = (group.point_coords[i : i + 1], group.point_labels[i : i + 1])
            boxes = None if group.boxes is None else group.boxes[i : i + 1]
            sparse, dense = sam.prompt_encoder(points, boxes, None)
            masks, ious = sam.mask_decoder(
                batch.encoded[image : image + 1],
                sam.prompt_encoder.get_dense_pe(),
                sparse,
                dense,
                multimask_output=points is not None,
            )
            valid = batch.valid[image : image + 1]
            total += float(
                sam_loss(masks, ious, targets[i : i + 1], valid, WEIGHTS)["loss"].detach()
            )
    assert ours == pytest.approx(total, rel=1e-5)


def test_chunks_do_not_change_loss_and_gradients(tmp_path):
    loader = make_loader(tmp_path)
    (batch,) = loader.load([0, 1, 2], 0, 1, epoch=0)
    whole = loss_and_gradients(frozen_module(max_prompts=64), [batch])
    chunked = loss_and_gradients(frozen_module(max_prompts=2), [batch])
    assert whole[0] == pytest.approx(chunked[0], rel=1e-5)
    assert_same_gradients(whole[1], chunked[1])


@pytest.mark.parametrize(("build", "num_frozen"), [(small_sam, 0), (small_vit, 0), (small_vit, 1)])
def test_recomputing_the_encoder_changes_no_gradient(build, num_frozen, tmp_path):
    (batch,) = make_loader(tmp_path).load([0, 1, 2], 0, 1, epoch=0)
    images = torch.randn(3, 3, 64, 64)
    found = []
    for recompute in (False, True):
        sam = build()
        blocks = num_blocks(sam.image_encoder) - num_frozen
        set_trainable(sam, ModelConfig(adapt="full", adapt_blocks=blocks if num_frozen else "all"))
        batch.images, batch.encoded = images, None
        if num_frozen:
            with torch.no_grad():
                batch.images, batch.encoded = None, prefix(sam.image_encoder, images, num_frozen)
        module = PromptedSam(sam, WEIGHTS, 64, num_frozen, recompute)
        found.append(loss_and_gradients(module, [batch])[1])
    assert any("image_encoder" in name for name in found[0])
    assert_same_gradients(*found)


def in_half(module, scale):
    """An optimiser in float16, as on a GPU without bfloat16."""
    optimizer = optimizer_of(module, clip_grad_norm=1e9)
    optimizer.dtype = torch.float16
    optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return optimizer


def test_in_float16_the_scale_falls_until_the_gradient_is_finite(tmp_path):
    batches = make_loader(tmp_path).load([0, 1, 2], 0, 1, epoch=0)
    found = []
    for half in (False, True):
        module = frozen_module()
        optimizer = in_half(module, 2.0**40) if half else optimizer_of(module, clip_grad_norm=1e9)
        losses = train_step(module, optimizer, batches, 12, Worker(0, 1, CPU))
        found.append((losses["loss"], gradients(module)))
    assert 1 < optimizer.scaler.get_scale() < 2.0**40
    assert found[0][0] == pytest.approx(found[1][0], rel=0.01)
    largest = max(float(g.abs().max()) for g in found[0][1].values())
    assert all(
        float((found[1][1][name] - gradient).abs().max()) < 0.02 * largest
        for name, gradient in found[0][1].items()
    )


def test_what_is_not_finite_at_any_scale_is_skipped_and_the_scale_kept(tmp_path):
    module = frozen_module()
    before = [p.detach().clone() for p in module.parameters()]
    batches = make_loader(tmp_path).load([0], 0, 1, epoch=0)
    batches[0].encoded = batches[0].encoded * float("nan")
    optimizer = in_half(module, 1024.0)
    assert train_step(module, optimizer, batches, 1, Worker(0, 1, CPU)) is None
    assert optimizer.scaler.get_scale() == 1024
    assert all(map(torch.equal, before, module.parameters()))


def test_the_state_of_the_scale_is_resumed():
    optimizer = in_half(frozen_module(), 512.0)
    resumed = in_half(frozen_module(), 2.0)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.scaler.get_scale() == 512


def test_precision_by_device():
    assert training_dtype("auto", "cpu") == torch.float32
    assert training_dtype("bfloat16", "cpu") == torch.bfloat16
    with pytest.raises(ConfigError, match=r"train.precision: float16 needs a GPU.*or auto"):
        training_dtype("float16", "cpu")


class NeverBetter:
    """A source whose validation never improves."""

    digest = "0"

    def __init__(self, loader):
        self.loader = loader

    def steps(self, epoch):
        return [[0]]

    def load(self, step, rank, world_size, epoch):
        batches = self.loader.load(step, rank, world_size, epoch)
        return batches, len(batches[0])

    def names(self, step):
        return ["photo"]

    def validate(self, worker):
        return {"val_iou": 0.5, "val_iou_center": 0.5}


def test_patience_ends_a_run_that_gets_no_better(tmp_path):
    settings = ["model.adapt=none", "train.num_epochs=9", "train.patience=2"]
    config = resolve_model(load_config(overrides=settings), weights_given=True)

    def open_source(module):
        record = blob_record("0", (60, 80), 1)
        cache = EmbeddingCache(tmp_path / "cache", module.sam)
        cache.save(record.digest, np.zeros((128, 16, 16)))
        return NeverBetter(BatchLoader(None, [record], MIXED, 5, cache, 256, 64))

    run = RunFolder.create(tmp_path / "run", config, "0")
    save_checkpoint(run.base, load_shipped().weights, config, {})
    for _ in range(2):  # resumed, it has had its epochs
        train_loop(config, run, open_source, Worker(0, 1, CPU))
        run = RunFolder(run.path)
        assert len(run.state["epochs"]) == run.epochs_without_best == 2
        assert run.state["best"] == "base"


def test_the_image_encoder_gets_gradients_unless_frozen(tmp_path):
    loader = make_loader(tmp_path)
    (batch,) = loader.load([0, 1], 0, 1, epoch=0)
    batch.images, batch.encoded = torch.randn(2, 3, 64, 64), None
    for max_prompts in (64, 2):  # through recomputed chunks, too
        module = PromptedSam(small_sam(), WEIGHTS, max_prompts)
        module(batch)["loss"].backward()
        assert float(module.sam.image_encoder.stem[0].weight.grad.abs().max()) > 0


def test_frozen_parts_get_no_gradient_and_never_move(tmp_path):
    module = frozen_module()
    before = {k: v.clone() for k, v in module.sam.image_encoder.state_dict().items()}
    batches = make_loader(tmp_path).load([0, 1, 2], 0, 1, epoch=0)
    train_step(module, optimizer_of(module, learning_rate=0.1), batches, 12, Worker(0, 1, CPU))
    after = module.sam.image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in module.sam.image_encoder.parameters())


def test_a_step_uses_its_own_gradients_only(tmp_path):
    """Gradients left over from the previous step would change the result."""
    batches = make_loader(tmp_path).load([0, 1, 2], 0, 1, epoch=0)
    results = []
    for leftover in (False, True):
        module = frozen_module()
        parameters = [p for p in module.parameters() if p.requires_grad]
        if leftover:
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
        train_step(module, optimizer_of(module), batches, 12, Worker(0, 1, CPU))
        results.append(module.sam.mask_decoder.iou_token.weight.detach().clone())
    assert torch.equal(*results)


class Damaged:
    """Steps of one image each; the gradient of those listed is not finite."""

    def __init__(self, loader, damaged, count=8):
        self.loader, self.damaged, self.count = loader, damaged, count

    def steps(self, epoch):
        return [[number] for number in range(self.count)]

    def load(self, step, rank, world_size, epoch):
        (batch,) = self.loader.load([step[0] % 3], rank, world_size, epoch)
        if step[0] in self.damaged:
            batch.encoded = batch.encoded * float("nan")
        return [batch], len(batch)

    def names(self, step):
        return [f"photo {step[0]}"]


def train_damaged(tmp_path, damaged):
    module, settings = frozen_module(), TrainConfig(num_epochs=1, learning_rate=1e-4)
    optimizer = optimizer_of(module)
    source, worker = Damaged(make_loader(tmp_path), damaged), Worker(0, 1, CPU)
    events = []
    losses, _ = train_epoch(module, optimizer, source, settings, worker, 0, 0, events.append)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    return losses, events


def test_a_step_without_a_finite_gradient_is_skipped_and_named(tmp_path):
    losses, events = train_damaged(tmp_path, {1, 2, 5})
    assert losses["skipped"] == [["photo 1"], ["photo 2"], ["photo 5"]]
    assert np.isfinite(losses["loss"])
    assert len(events) == 5
    assert "skipped" not in train_damaged(tmp_path, set())[0]


def test_three_such_steps_in_a_row_end_the_run_with_advice(tmp_path):
    with pytest.raises(TrainingError, match=r"photo 4, photo 5, photo 6; lower .* \(--lr\)"):
        train_damaged(tmp_path, {1, 2, 4, 5, 6})


def extreme_record(size=(60, 80)):
    """One pixel in a corner, all but a corner, the whole image, and a line of one pixel's width."""
    masks = np.zeros((4, *size), bool)
    masks[0, 0, 0] = masks[1:3] = masks[3, 30] = True
    masks[1, :5, :5] = False
    instances = []
    for mask in masks:
        cropped = CroppedMask(mask, (0, 0))
        rle = encode_rle(cropped, size)
        instances.append(Instance("blob", cropped.box, int(mask.sum()), rle))
    return ImageRecord("extreme", "extreme", "7" * 64, size, tuple(instances), 0, 0)


@pytest.mark.parametrize("selection", ["center", "random", "bbox", "interactive"])
def test_the_smallest_and_largest_objects_give_finite_steps(selection, tmp_path):
    record, module = extreme_record(), frozen_module()
    cache = EmbeddingCache(tmp_path, module.sam)
    cache.save(record.digest, np.random.default_rng(0).normal(size=(32, 4, 4)))
    prompts = PromptConfig(point_selection=selection, num_clicks=8)
    loader = BatchLoader(None, [record], prompts, 5, cache, img_size=64, low_res_size=16)
    optimizer = optimizer_of(module)
    for epoch in range(4):
        batches = loader.load([0], 0, 1, epoch)
        assert len(batches[0]) == 4
        losses = train_step(module, optimizer, batches, 4, Worker(0, 1, CPU))
        assert losses is not None
        assert all(np.isfinite(value) for value in losses.values())


def test_the_mask_depends_on_the_prompt(tmp_path):
    """Another point gives another mask, so the prompt reaches the decoder."""
    loader, module = make_loader(tmp_path), frozen_module()
    (batch,) = loader.load([2], 0, 1, epoch=0)
    group = next(g for g in batch.groups if g.point_coords is not None)
    with torch.no_grad():
        here, _ = decode_prompts(module.sam, batch.encoded, group, True)
        group.point_coords = 63 - group.point_coords
        there, _ = decode_prompts(module.sam, batch.encoded, group, True)
    assert float((here - there).abs().max()) > 1e-3


def test_learning_rate_warms_up_and_decays_to_its_final_fraction():
    settings = TrainConfig(learning_rate=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate_at(step, 100, settings) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


# The images of a step, its prompts, and how the image encoder learns.
SHARED_STEPS = {
    "one worker has fewer": ([0, 1, 2], MIXED, "frozen"),
    "one worker has none": ([2], MIXED, "frozen"),
    "correction clicks": ([1, 0, 2], INTERACTIVE, "frozen"),
    "adapters on cached activations": ([0, 1, 2], MIXED, "lora"),
    "an instance decoder": ([0, 1, 2], MIXED, "instances"),
    "an instance decoder, one worker has none": ([1], MIXED, "instances"),
}


def shared_step(folder, name):
    """The loader and the module of a step that workers share."""
    step, prompts, kind = SHARED_STEPS[name]
    if kind == "frozen":
        return make_loader(folder, prompts=prompts), frozen_module()
    if kind == "instances":
        dataset = write_dataset(Path(folder) / f"prepared {len(step)}")
        loader = make_loader(folder, dataset=dataset)
        torch.manual_seed(0)
        module = PromptedSam(frozen_module().sam, WEIGHTS, 64, instances=InstanceDecoder(32, 64, 2))
        return loader, module
    sam = small_vit()
    loader = make_loader(folder, prompts=prompts)
    loader.cache = EmbeddingCache(Path(folder), sam, num_frozen=2)
    for record in loader.records:
        rng = np.random.default_rng(int(record.digest, 16))
        loader.cache.save(record.digest, rng.normal(size=(4, 4, 48)))
    set_trainable(sam, ModelConfig(adapt="lora", adapt_blocks=1))
    torch.manual_seed(0)  # the adapters' initial values
    for name, parameter in sam.named_parameters():
        if "parametrizations.weight.0" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return loader, PromptedSam(sam, WEIGHTS, 64, num_frozen=2)


def ddp_worker(rank, world_size, folder):
    """One process: its part of each step through DDP; saves its gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    for name, (step, _, _) in SHARED_STEPS.items():
        loader, module = shared_step(f"{folder}/cache {rank}", name)
        optimizer = optimizer_of(module, learning_rate=1e-9, clip_grad_norm=1e9)
        ddp = DistributedDataParallel(module)
        num_prompts = loader.num_prompts(step)
        loader.images_at_once = 1  # one worker adds up two batches, the other may have none
        batches = loader.load(step, rank, world_size, epoch=0)
        train_step(ddp, optimizer, batches, num_prompts, Worker(rank, world_size, CPU))
        torch.save(gradients(module), f"{folder}/{name} {rank}.pth")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared_gradients(tmp_path_factory):
    """Each step's gradients, as two processes have them; started once, which takes seconds."""
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(ddp_worker, args=(2, str(folder)), nprocs=2)
    return {
        name: [torch.load(folder / f"{name} {rank}.pth") for rank in range(2)]
        for name in SHARED_STEPS
    }


@pytest.mark.parametrize("name", SHARED_STEPS)
def test_two_workers_give_the_gradients_of_one(name, shared_gradients, tmp_path):
    assert_same_gradients(*shared_gradients[name])
    step, prompts, _ = SHARED_STEPS[name]
    loader, module = shared_step(tmp_path, name)
    (batch,) = loader.load(step, 0, 1, epoch=0)
    assert bool(batch.corrections) == (prompts is INTERACTIVE)
    losses = module(batch)
    ((losses["loss"] + losses["loss_instances"]) / len(batch)).backward()
    assert_same_gradients(shared_gradients[name][0], gradients(module))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_reduced_over_nccl(tmp_path):
    """In a group of one process, whose sums are the process's own gradients."""
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        for name, (step, _, _) in SHARED_STEPS.items():
            loader, module = shared_step(tmp_path / name, name)
            module.to(device)
            (batch,) = loader.load(step, 0, 1, epoch=0)
            found = []
            for model in (module, DistributedDataParallel(module, device_ids=[device.index])):
                module.zero_grad()
                losses = model(batch.to(device))
                ((losses["loss"] + losses["loss_instances"]) / len(batch)).backward()
                found.append({key: value.cpu() for key, value in gradients(module).items()})
            assert_same_gradients(*found)
    finally:
        dist.destroy_process_group()
