"""Masks from a checkpoint, an image and prompts; the image is encoded once for many prompts."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samray.config import Config, required
from samray.data.annotation import UNNAMED
from samray.data.labelme import labelme_document, mask_to_shapes, shapes_digest
from samray.errors import AnnotationError, ConfigError, DatasetError, StorageError
from samray.geometry.drawing import HIGHLIGHT, draw_masks, draw_prompt_marks, encode_picture
from samray.geometry.images import decode_image, read_image_file
from samray.geometry.prompts import Prompt
from samray.geometry.tiles import Window, tile_windows
from samray.sam.checkpoint import Checkpoint, load_checkpoint
from samray.sam.decode import predict_masks
from samray.sam.embeddings import encode_image
from samray.sam.model import local_device
from samray.sam.shipped import load_shipped
from samray.storage import (
    MAX_NAME,
    Place,
    make_folder,
    read_json,
    relative_path,
    resolve,
    write_bytes,
    write_json,
)


@dataclass(frozen=True)
class Prediction:
    """Masks for one prompt, C of them.

    Attributes:
        masks: C x H x W bool, original resolution.
        iou_predictions: C float32, the model's own estimate.
        low_res_masks: C x h x w float32 logits.
    """

    masks: np.ndarray
    iou_predictions: np.ndarray
    low_res_masks: np.ndarray

    @property
    def best(self) -> np.ndarray:
        """The mask of highest predicted IoU, H x W bool."""
        return np.asarray(self.masks[int(self.iou_predictions.argmax())])


class Predictor:
    """Answers points and boxes on one image at a time.

        predictor = Predictor.from_checkpoint("runs/nuts")
        predictor.set_image(image)
        mask = predictor.predict(Prompt(box=np.array([10, 20, 110, 90]))).best

    Args:
        sam: a `Sam`, on the device to compute on.
    """

    def __init__(self, sam: Any) -> None:
        self.sam = sam.eval()
        self._embedding: torch.Tensor | None = None
        self._original_size = (0, 0)

    @classmethod
    def from_checkpoint(
        cls, path: str | Place | None = None, device: str | None = None
    ) -> "Predictor":
        """Load the best checkpoint of a RUN, a checkpoint folder or a ViT weights file.

        Args:
            path: unset: the `tiny` that comes with samray.
            device: a torch device name; unset: the GPU if there is one.

        Raises:
            CheckpointError: it cannot be used.
        """
        checkpoint: Checkpoint = (
            load_shipped()
            if path is None
            else load_checkpoint(resolve(path, "path") if isinstance(path, str) else path)
        )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(checkpoint.model().to(device))

    def set_image(self, image: np.ndarray) -> None:
        """Encode an image, H x W x 3 uint8 RGB; `predict` then answers prompts on it."""
        self._embedding = encode_image(self.sam, image)
        self._original_size = (image.shape[0], image.shape[1])

    def predict(self, prompt: Prompt, multimask_output: bool | None = None) -> Prediction:
        """Return masks for one prompt.

        Args:
            prompt: points, a box or both, in pixels of the image.
            multimask_output: three masks or one; unset gives three for one point alone, which
                may mean part, object or group.

        Raises:
            ValueError: no image has been set, or the prompt is empty.
        """
        if self._embedding is None:
            raise ValueError("call set_image first")
        if prompt.layout == (0, False):
            raise ValueError("the prompt has neither a point nor a box")
        ((_, found),) = predict_masks(
            self.sam,
            self._embedding,
            [prompt],
            self._original_size,
            multimask_output=multimask_output,
        )
        return Prediction(
            np.stack([found.mask(number) for number in range(len(found.iou_predictions))]),
            found.iou_predictions.cpu().numpy(),
            found.low_res_masks.cpu().numpy(),
        )

    def predict_in_tiles(self, image: np.ndarray, prompt: Prompt, tile: int) -> np.ndarray:
        """Return the mask for a prompt on a large image, computed in windows: H x W bool.

        A prompt that fits into one window is answered there. A larger box is cut into windows that
        overlap by a quarter; each answers its part of the box, and the mask is their union.
        Replaces `set_image` and `predict`; call `set_image` again afterwards.

        Args:
            image: H x W x 3 uint8 RGB.
            tile: side of a window in pixels.
        """
        mask = np.zeros(image.shape[:2], dtype=bool)
        for window in _windows_around(prompt, image, tile):
            part = _part_of(prompt, window)
            if part is not None:
                self.set_image(np.ascontiguousarray(image[window.slices]))
                mask[window.slices] |= self.predict(part).best
        return mask


def _windows_around(prompt: Prompt, image: np.ndarray, tile: int) -> list[Window]:
    """Return windows of `tile` pixels, or the image's own side, that cover the prompt.

    A prompt that does not fit into one window gets a margin of a quarter of a window, so that no
    point lies at the border of a window, where half of its context is missing.
    """
    corners = np.empty((0, 2)) if prompt.point_coords is None else prompt.point_coords
    if prompt.box is not None:
        corners = np.concatenate([corners, prompt.box.reshape(2, 2)])
    low, high = np.floor(corners.min(axis=0)).astype(int), np.ceil(corners.max(axis=0)).astype(int)
    starts, spans = [], []
    for axis, side in enumerate((image.shape[1], image.shape[0])):
        needed = int(high[axis] - low[axis]) + 1
        span = min(tile if needed <= tile else needed + tile // 2, side)
        start = int(low[axis]) - (span - needed) // 2
        starts.append(max(0, min(start, side - span)))
        spans.append(span)
    return [
        Window(starts[0] + window.x, starts[1] + window.y, window.width, window.height)
        for window in tile_windows((spans[1], spans[0]), tile, tile // 4)
    ]


def _part_of(prompt: Prompt, window: Window) -> Prompt | None:
    """Return the prompt in a window's frame; None if no foreground part of it lies there."""
    corner = np.array([window.x, window.y], dtype=np.float32)
    size = np.array([window.width, window.height], dtype=np.float32)
    coords, labels, box = prompt.point_coords, prompt.point_labels, prompt.box
    if coords is not None and labels is not None:
        inside = ((coords >= corner) & (coords < corner + size)).all(axis=1)
        coords, labels = (coords[inside] - corner, labels[inside]) if inside.any() else (None, None)
    if box is not None:
        ends = np.clip(box.reshape(2, 2) - corner, 0, size).astype(np.float32)
        box = ends.reshape(4) if (ends[1] - ends[0] >= 1).all() else None
    if box is None and (labels is None or not labels.any()):
        return None
    return Prompt(coords, labels, box)


def predict(config: Config) -> dict[str, Place]:
    """Segment one object of one image and write mask, overlay and LabelMe JSON.

    The folder is not locked: calls for several images may write to one folder at once, each its own
    files.

    Args:
        config: its `predict` section, and the device of `scaling`.

    Returns:
        {`mask`, `overlay`, `labelme`: path}.

    Raises:
        ConfigError: no prompt, or one outside the image; the image cannot be used, the outputs not
            be written, or there is no such device.
        StorageError: S3 does not give the image.
        CheckpointError: the checkpoint cannot be used.
    """
    settings = config.predict
    image_path, output_dir = required(config, "predict.image_path", "predict.output_dir")
    path = resolve(image_path, "--image-path")
    output = resolve(output_dir, "--output-dir")
    prompt = _prompt_from(config)
    device = local_device(config.scaling.device)
    try:
        image = decode_image(read_image_file(path))
    except StorageError:
        raise
    except OSError as exc:
        raise ConfigError(f"--image-path: {path} cannot be read ({exc.strerror})") from exc
    except AnnotationError as exc:
        raise ConfigError(f"--image-path: {path} {exc.reason}") from exc
    _require_inside(prompt, image)
    outputs = {
        "mask": output / f"{path.stem}_mask.png",
        "overlay": output / f"{path.stem}_overlay.png",
        "labelme": output / f"{path.stem}.json",
    }
    if settings.coco:
        raise ConfigError("--coco is for all objects of images; leave it out, or the prompt")
    longest = max((place.name for place in outputs.values()), key=len)
    if isinstance(output, Path) and len(os.fsencode(longest)) > MAX_NAME:
        raise ConfigError(
            f"--image-path: the name of {path} is too long to write a file with "
            f"{longest.removeprefix(path.stem)} after it; rename the image"
        )
    image_name = relative_path(path, output)
    _require_own(outputs, image_name)
    checkpoint = settings.checkpoint
    predictor = Predictor.from_checkpoint(
        None if checkpoint is None else resolve(checkpoint, "--checkpoint"), str(device)
    )
    make_folder(output, "--output-dir")  # now, as a large image takes long
    if settings.tile is not None and max(image.shape[:2]) > settings.tile:
        mask = predictor.predict_in_tiles(image, prompt, settings.tile)
    else:
        predictor.set_image(image)
        mask = predictor.predict(prompt).best
    size = (image.shape[0], image.shape[1])
    shapes = mask_to_shapes(mask, settings.label or UNNAMED)
    document = labelme_document(image_name, size, shapes)
    picture = draw_prompt_marks(draw_masks(image, [mask], [HIGHLIGHT]), prompt)
    try:
        # First, as it says whose the other files are.
        write_json(outputs["labelme"], {**document, "samray": {"shapes": shapes_digest(document)}})
        write_bytes(outputs["mask"], encode_picture(mask.astype(np.uint8) * 255, ".png"))
        write_bytes(outputs["overlay"], encode_picture(picture, ".png"))
    except StorageError:
        raise
    except OSError as exc:
        raise ConfigError(f"--output-dir: {output} cannot be written ({exc})") from exc
    return outputs


def _require_own(outputs: dict[str, Place], image_name: str) -> None:
    """Refuse to replace a file not written for this image, or that was corrected since.

    Args:
        image_name: as seen from the folder of the outputs.

    Raises:
        ConfigError: naming the file.
    """
    there = [path for path in outputs.values() if path.exists()]
    if outputs["labelme"] in there:
        with contextlib.suppress(DatasetError, KeyError, TypeError, AttributeError):
            document = read_json(outputs["labelme"])
            record = document["samray"]
            same_image = document["imagePath"] == image_name
            of_prompt = "digest" not in record  # else of all objects, by `predict_images`
            if same_image and of_prompt and record["shapes"] == shapes_digest(document):
                return
        there = [outputs["labelme"]]
    if there:
        raise ConfigError(
            f"--output-dir: {there[0]} is there and was not written by this command for this "
            "image, or was corrected since; it is left as it is; choose another folder, or remove "
            "the file"
        )


def _prompt_from(config: Config) -> Prompt:
    settings = config.predict
    points = [*settings.points, *settings.negative_points]
    if not settings.points and settings.box is None:
        raise ConfigError("give the object by --point X Y, or --box X1 Y1 X2 Y2, or both")
    labels = [1] * len(settings.points) + [0] * len(settings.negative_points)
    return Prompt(
        np.array(points, np.float32) if points else None,
        np.array(labels, np.int64) if points else None,
        np.array(settings.box, np.float32) if settings.box is not None else None,
    )


def _require_inside(prompt: Prompt, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    if prompt.point_coords is not None:
        for x, y in prompt.point_coords.tolist():
            if not (0 <= x < width and 0 <= y < height):
                raise ConfigError(
                    f"--point {x:g} {y:g}: lies outside the image of {width} x {height} pixels"
                )
    if prompt.box is not None:
        x1, y1, x2, y2 = prompt.box.tolist()
        if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
            raise ConfigError(
                f"--box {x1:g} {y1:g} {x2:g} {y2:g}: must be X1 Y1 X2 Y2 with X1 < X2 and "
                f"Y1 < Y2, inside the image of {width} x {height} pixels"
            )
