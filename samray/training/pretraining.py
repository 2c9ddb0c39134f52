"""Pre-train `tiny` on drawn scenes: `pretrain` -> `samray.training.loop.train_loop`.

Plain torch on one device, without Ray, so that any machine with a GPU can run it. Step and loop are
those of fine-tuning; only the batches have another source.
"""

import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from samray.config import MAX_BOX_NOISE, Config, required, resolve_model, with_settings
from samray.errors import ConfigError
from samray.geometry.frames import PIXEL_MEAN, PIXEL_STD
from samray.runs import (
    RunFolder,
    keep_num_epochs,
    num_epochs_of,
    open_run,
    require_same_run,
)
from samray.sam.checkpoint import load_checkpoint, refuse_ambiguous, save_checkpoint
from samray.sam.decode import PromptGroup, best_masks, decode_prompts
from samray.sam.losses import low_res_iou
from samray.sam.model import build_model, local_device, low_res_size
from samray.sam.shipped import export_weights, load_shipped
from samray.sam.weights import digest_of
from samray.storage import Place, lock_folder, resolve, resolve_local
from samray.tracking import Tracker, describe_start, git_commit
from samray.training.loop import Worker, train_loop
from samray.training.scenes import VERSION, draw_scenes, region_masks
from samray.training.step import Batch, draw_correction_plan, drawn_place, error_click

SEEDS = 2**40  # distance between the scenes of two seeds; more than any run draws
VAL_BATCH = 16


@dataclass
class _Drawing:
    """Some scenes, and P regions of them to segment.

    Attributes:
        images: B x 3 x S x S float32, normalised.
        valid: B x 1 x h x w float32.
        scene_index: P int64.
        masks: P x S x S bool.
        targets: P x 1 x h x w float32.
        generator: for further random draws.
    """

    images: Tensor
    valid: Tensor
    scene_index: Tensor
    masks: Tensor
    targets: Tensor
    generator: torch.Generator

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.masks.device)

    def point_group(self, chosen: Tensor) -> PromptGroup:
        """Prompt the chosen regions by a point, uniform over the region."""
        points = _random_points(self.masks[chosen], self.uniform(len(chosen)))
        labels = torch.ones(len(chosen), 1, dtype=torch.int64, device=points.device)
        return PromptGroup(self.scene_index[chosen], points[:, None], labels)

    def box_group(self, chosen: Tensor, noise: float) -> PromptGroup:
        """Prompt the chosen regions by their box, with noise as in `tight_box`."""
        boxes = _boxes(self.masks[chosen])
        sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        shift = torch.randn(boxes.shape, generator=self.generator, device=boxes.device)
        shift = (shift * noise * sides).clamp(-MAX_BOX_NOISE, MAX_BOX_NOISE)
        moved = (boxes + shift).clamp(0, self.masks.shape[-1])
        kept = ((moved[:, 2:] - moved[:, :2]) >= 1).all(dim=1, keepdim=True)
        return PromptGroup(self.scene_index[chosen], boxes=torch.where(kept, moved, boxes))


class DrawnScenes:
    """Trains on drawn scenes and validates on others; a `samray.training.loop.Source`.

    Args:
        sam: the model in training; the scenes are drawn on its device.
    """

    def __init__(self, config: Config, sam: Any) -> None:
        self.config, self.sam = config, sam
        self.digest = scenes_digest(config)

    def steps(self, epoch: int) -> list[list[int]]:
        """Return the scenes of each step; no scene is repeated."""
        count, size = self.config.pretrain.scenes_per_epoch, self.config.train.batch_size
        end = (epoch + 1) * count
        return [
            list(range(start, min(start + size, end))) for start in range(epoch * count, end, size)
        ]

    def names(self, step: list[int]) -> list[str]:
        """Return the names of a step's scenes."""
        return [f"scene {number}" for number in step]

    def load(
        self, step: list[int], rank: int, world_size: int, epoch: int
    ) -> tuple[list[Batch], int]:
        """Draw a step's scenes and prompts: point or box with equal chance, then clicks."""
        prompts, seed = self.config.prompts, self.config.train.seed
        drawing = self._draw(seed * SEEDS + step[0], len(step))
        by_point = drawing.uniform(len(drawing.masks)) < 0.5
        plan = draw_correction_plan(prompts.num_clicks, np.random.default_rng([seed, step[0]]))
        groups, targets, draws = [], [], []
        for with_points in (True, False):
            chosen = torch.nonzero(by_point == with_points)[:, 0]
            if len(chosen) == 0:
                continue
            groups.append(
                drawing.point_group(chosen)
                if with_points
                else drawing.box_group(chosen, prompts.box_noise)
            )
            targets.append(drawing.targets[chosen])
            draws.append(drawing.uniform(len(chosen), len(plan)))
        batch = Batch(drawing.images, None, groups, targets, drawing.valid, plan, draws)
        return [batch], max(1, len(batch))

    @torch.inference_mode()
    def validate(self, worker: Worker) -> dict[str, float]:
        """Score held-out scenes with one random point, one tight box, and three clicks.

        Returns:
            `val_iou`, the mean over the three, and the IoU of each. IoU is computed on the
            decoder's cells, against the fractions that the true region covers.
        """
        settings, seed = self.config.pretrain, (self.config.train.seed + 1) * SEEDS
        ious: dict[str, list[Tensor]] = {"random": [], "bbox": [], "clicks3": []}
        for start in range(0, settings.val_scenes, VAL_BATCH):
            number = min(VAL_BATCH, settings.val_scenes - start)
            drawing = self._draw(seed - 1 - start, number)
            embeddings = self.sam.image_encoder(drawing.images)
            target, valid = drawing.targets, drawing.valid[drawing.scene_index]
            regions = torch.arange(len(target), device=target.device)
            answer, _ = self._answer(embeddings, drawing.box_group(regions, noise=0))
            ious["bbox"].append(low_res_iou(answer, target, valid))
            group = drawing.point_group(regions)
            for clicks in (1, 2, 3):
                answer, group = self._answer(embeddings, group)
                if clicks in (1, 3):
                    name = "random" if clicks == 1 else "clicks3"
                    ious[name].append(low_res_iou(answer, target, valid))
                draw = drawing.uniform(len(target))
                point, label = error_click(
                    answer, target, valid, draw, self.sam.image_encoder.img_size
                )
                group = group.with_point(point, label)
        scores = {f"val_iou_{name}": float(torch.cat(v).mean()) for name, v in ious.items()}
        return {"val_iou": sum(scores.values()) / len(scores), **scores}

    def _draw(self, seed: int, count: int) -> _Drawing:
        device, size = self.sam.device, self.sam.image_encoder.img_size
        generator = torch.Generator(device).manual_seed(seed)
        scenes = draw_scenes(generator, count, size)
        chosen = region_masks(scenes, self.config.pretrain.regions_per_scene, generator)
        cell = size // low_res_size(self.sam)
        mean = torch.tensor(PIXEL_MEAN, device=device)[:, None, None]
        std = torch.tensor(PIXEL_STD, device=device)[:, None, None]
        valid = scenes.valid[:, None].float()
        return _Drawing(
            images=(scenes.images - mean) / std * valid,
            valid=F.avg_pool2d(valid, cell),
            scene_index=chosen[0],
            masks=chosen[1],
            targets=F.avg_pool2d(chosen[1][:, None].float(), cell),
            generator=generator,
        )

    def _answer(self, embeddings: Tensor, group: PromptGroup) -> tuple[Tensor, PromptGroup]:
        """Return the best logits, P x 1 x h x w, and the prompts with these as mask inputs."""
        masks, ious = decode_prompts(self.sam, embeddings, group, group.ambiguous)
        answer = best_masks(masks, ious)
        return answer, group.with_answer(answer)


def pretrain(config: Config) -> dict[str, Any]:
    """Train `tiny` from random weights or a checkpoint, and keep the best checkpoint.

    Args:
        config: its `model`, `prompts`, `loss`, `train`, `scaling` and `pretrain` sections.

    Returns:
        The content of RUN/run.json.

    Raises:
        SamrayError: a setting does not allow the run, or the gradient is no longer finite.
    """
    (output_dir,) = required(config, "train.output_dir")
    if config.model.type != "tiny":
        raise ConfigError(f"model.type: only tiny is pre-trained, not {config.model.type}")
    output = resolve(output_dir, "--output-dir")
    epochs = {"train.num_epochs": num_epochs_of(output, config)}
    config = with_settings(config, epochs, "pretrain")
    with lock_folder(output, "--output-dir"):
        return _pretrain(config, output)


def _pretrain(config: Config, output: Place) -> dict[str, Any]:
    resumed = open_run(output, config.train.resume)
    if resumed is None and config.model.checkpoint == "none":
        refuse_ambiguous("none", "random weights")
    device = local_device(config.scaling.device)
    config = resolve_model(config, weights_given=False)
    digest = scenes_digest(config)
    if resumed is not None:
        require_same_run(resumed, config, digest)
        keep_num_epochs(resumed, config)
        print(f"resuming after epoch {len(resumed.state['epochs'])} of {config.train.num_epochs}")
    run = resumed or RunFolder.create(output, config, digest)
    if not run.has_base:
        _write_base(run, config)
    if device.type == "cpu":
        # One core draws the next scenes in the meantime.
        torch.set_num_threads(config.scaling.cpus_per_worker or max(1, (os.cpu_count() or 2) - 1))
    else:
        torch.set_float32_matmul_precision("high")
    steps = -(-config.pretrain.scenes_per_epoch // config.train.batch_size)
    bar = tqdm(total=config.train.num_epochs * steps, file=sys.stderr, disable=None, unit="step")
    done = run.state["epochs"]
    start = describe_start(config, len(done), run.step, device, 1, git_commit())
    tracker = Tracker(run.path, config, run.step, lambda event: _show(bar, config, event))
    with bar, run.running(), tracker:
        run.update(starts=[*run.state.get("starts", []), start])
        train_loop(
            config,
            run,
            lambda module: DrawnScenes(config, module.sam),
            Worker(0, 1, device),
            tracker.report,
            config.pretrain.max_minutes,
        )
        ended = len(run.state["epochs"]) >= config.train.num_epochs
        patience = config.train.patience
        ended = ended or (patience is not None and run.epochs_without_best >= patience)
        run.update(status="finished" if ended else "interrupted")  # by pretrain.max_minutes
    if config.pretrain.export_dir is not None:
        export_weights(run, resolve_local(config.pretrain.export_dir, "--export"))
    return run.state


def scenes_digest(config: Config) -> str:
    """Return a name for a run's scenes, which depend on their VERSION and these settings."""
    settings = config.pretrain
    return (
        f"scenes-{VERSION}-seed-{config.train.seed}"
        f"-{settings.scenes_per_epoch}x{settings.regions_per_scene}"
    )


def _write_base(run: RunFolder, config: Config) -> None:
    """Write the checkpoint that the run starts from."""
    source = config.model.checkpoint
    if source == "none":
        name = f"random weights, seed {config.train.seed}"
        sam = build_model("tiny", config.train.seed)
    elif source is None:
        name = "tiny as it ships"
        sam = load_shipped().model()
    else:
        name = str(resolve(str(source), "--checkpoint"))
        sam = load_checkpoint(resolve(str(source), "--checkpoint")).model()
    weights = sam.state_dict()
    base = {"source": name, "digest": digest_of(weights)}
    save_checkpoint(run.base, weights, config, {"base": base})


def _show(bar: Any, config: Config, event: dict[str, Any]) -> None:
    """Show a bar on a terminal, else print a line per epoch."""
    if event["event"] == "base":
        return
    if "text" in event:
        bar.write(event["text"], file=sys.stderr)
        return
    if event["event"] == "step":
        bar.n = (event["epoch"] - 1) * event["steps"] + event["step"]
        bar.set_postfix(loss=f"{event['loss']:.3f}", refresh=False)
        bar.update(0)
        return
    line = (
        f"epoch {event['epoch']}/{config.train.num_epochs}  loss {event['loss']:.3f}  "
        f"point {event['val_iou_random']:.3f}  box {event['val_iou_bbox']:.3f}  "
        f"3 clicks {event['val_iou_clicks3']:.3f}  {event['seconds']:.0f} s"
    )
    if bar.disable:
        print(line, flush=True)
    else:
        bar.write(line)


def _random_points(masks: Tensor, draw: Tensor) -> Tensor:
    """Return one pixel of each mask, uniform over it: P x 2 float32, (x, y)."""
    side = masks.shape[-1]
    place = drawn_place(masks.flatten(1), draw)
    return torch.stack([place % side, place // side], dim=1).float()


def _boxes(masks: Tensor) -> Tensor:
    """Return P x 4 float32, XYXY, x2 and y2 exclusive."""
    size = masks.shape[-1]
    ends = []
    for dim in (1, 2):  # columns hold x, rows hold y
        hit = masks.any(dim=dim).int()
        ends.append((hit.argmax(dim=1), size - hit.flip(1).argmax(dim=1)))
    (x1, x2), (y1, y2) = ends
    return torch.stack([x1, y1, x2, y2], dim=1).float()
