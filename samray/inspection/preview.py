"""`samray inspect`: pictures of the masks and of the prompts that a model will be given."""

from pathlib import PurePosixPath
from typing import Any

import numpy as np

from samray.config import Config, InspectConfig, required
from samray.data.dataset import PreparedDataset
from samray.geometry.drawing import draw_masks, draw_prompt_marks, encode_picture, shrink
from samray.geometry.images import decode_image
from samray.geometry.prompts import draw_prompt
from samray.storage import (
    Place,
    lock_folder,
    require_folder,
    resolve,
    short_name,
    write_bytes,
    write_json,
)


def inspect(config: Config) -> list[Place]:
    """Draw samples with their masks and prompts.

    Args:
        config: its `inspect` section.

    Returns:
        The pictures; `prompts.json` beside them lists every prompt in pixels.

    Raises:
        SamrayError: a folder or the dataset cannot be used.
    """
    data_dir, output_dir = required(config, "inspect.data_dir", "inspect.output_dir")
    dataset = PreparedDataset(require_folder(resolve(data_dir, "--data-dir"), "--data-dir"))
    output = resolve(output_dir, "--output-dir")
    with lock_folder(output, "--output-dir"):  # prompts.json describes the pictures beside it
        return _draw(dataset, output, config.inspect)


def _draw(dataset: PreparedDataset, output: Place, settings: InspectConfig) -> list[Place]:
    records = [record for record in dataset.images.values() if record.num_instances]
    rng = np.random.default_rng(settings.seed)
    chosen = sorted(rng.permutation(len(records))[: settings.num_samples].tolist())
    splits = {name: split for split, names in dataset.manifest["splits"].items() for name in names}
    pictures: list[Place] = []
    listing = []
    for number, record in enumerate(records[i] for i in chosen):
        prompts = [  # one mask at a time, as each is as large as the image
            draw_prompt(settings.point_selection, record.decode(instance), settings.num_points, rng)
            for instance in record.instances
        ]
        crops = map(record.decode_crop, record.instances)
        picture = draw_masks(decode_image(dataset.image_bytes(record)), crops)
        for prompt in prompts:
            draw_prompt_marks(picture, prompt)
        stem = short_name(PurePosixPath(record.name).stem)
        name = f"{number:03d}_{stem}_{settings.point_selection}.jpg"
        write_bytes(output / name, encode_picture(shrink(picture, 1600), ".jpg"))
        pictures.append(output / name)
        listing.append(
            {
                "picture": name,
                "image": record.name,
                "split": splits[record.name],
                "instances": [
                    {"label": instance.label, "area": instance.area, **_as_lists(prompt)}
                    for instance, prompt in zip(record.instances, prompts, strict=True)
                ],
            }
        )
    write_json(output / "prompts.json", listing)
    return pictures


def _as_lists(prompt: Any) -> dict[str, Any]:
    return {name: None if value is None else value.tolist() for name, value in vars(prompt).items()}
