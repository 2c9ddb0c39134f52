"""Which image is in train, val or test: by a split file, else by a hash of each image or group."""

import csv
import hashlib
import json
import re
from pathlib import PurePosixPath

from samray.config import PrepareConfig
from samray.data.dataset import SPLITS
from samray.data.outcome import FileWarning, PreparedImage
from samray.errors import ConfigError, DatasetError
from samray.storage import read_bytes, resolve


def split_of_hash(digest: str, val_fraction: float, test_fraction: float) -> str:
    """Return the split of an image or group by its sha256 in hex.

    It depends on nothing else, so the same image is never in two splits, and adding images moves
    no other image.
    """
    u = int(digest[:8], 16) / 2**32
    if u < val_fraction:
        return "val"
    return "test" if u < val_fraction + test_fraction else "train"


class SplitRule:
    """How a dataset is split.

    Args:
        settings: of which `split_file`, `group_by`, `val_fraction` and `test_fraction` are used.

    Raises:
        ConfigError: the split file or the group pattern cannot be used.
    """

    def __init__(self, settings: PrepareConfig) -> None:
        self.settings = settings
        self.listed = _read_split_file(settings.split_file) if settings.split_file else {}
        self.pattern: re.Pattern[str] | None = None
        if settings.group_by not in (None, "folder"):
            try:
                self.pattern = re.compile(str(settings.group_by))
            except re.error as exc:
                raise ConfigError(
                    f"--group-by: {settings.group_by!r} is neither `folder` nor a regular "
                    f"expression: {exc}"
                ) from exc

    def split_of(self, name: str, image_digest: str) -> str:
        """Return the split of one image: by the split file, else by its group's hash, else its own.

        Args:
            name: the image's path from the dataset's folder.
            image_digest: sha256 of its bytes.
        """
        for key in (name, PurePosixPath(name).name):
            if key in self.listed:
                return self.listed[key]
        digest = image_digest
        if self.settings.group_by is not None:
            digest = hashlib.sha256(self._group_of(name).encode()).hexdigest()
        return split_of_hash(digest, self.settings.val_fraction, self.settings.test_fraction)

    def assign(self, images: list[PreparedImage]) -> tuple[dict[str, list[str]], list[FileWarning]]:
        """Return the images of each split, and warnings about photos that are in two.

        Raises:
            DatasetError: a split with a share above 0 has no instance.
        """
        splits: dict[str, list[str]] = {split: [] for split in SPLITS}
        warnings = []
        filled = set()
        seen: dict[str, tuple[str, str]] = {}
        for image in images:
            split = self.split_of(image.name, image.image_digest)
            splits[split].append(image.name)
            if image.num_instances:
                filled.add(split)
            twin, twin_split = seen.setdefault(image.image_digest, (image.name, split))
            if twin_split != split:
                reason = f"is the same photo as {twin}, but {split} and {twin_split} have one each"
                warnings.append(FileWarning(image.name, "image", reason))
        shares = {"train": 1.0, "val": self.settings.val_fraction}
        shares["test"] = self.settings.test_fraction
        lacking = [split for split in SPLITS if shares[split] > 0 and split not in filled]
        if lacking:
            objects = {image.name for image in images if image.num_instances}
            counts = ", ".join(
                f"{split} {len(objects & set(members))}" for split, members in splits.items()
            )
            raise DatasetError(
                f"the {' and '.join(lacking)} split would be empty ({counts} images with an "
                "object); choose the members with --split-file, or other groups with --group-by, "
                "or add images "
                "(prepare.val_fraction and prepare.test_fraction set the shares; 0 wants none)"
            )
        return {split: sorted(members) for split, members in splits.items()}, warnings

    def require_known(self, images: list[PreparedImage], claimed: list[str]) -> None:
        """Refuse a split file that names images which are not in the dataset, not even rejected.

        Raises:
            ConfigError: naming the first of them.
        """
        known = {image.name for image in images} | set(claimed)
        known |= {PurePosixPath(name).name for name in known}
        unknown = [name for name in self.listed if name not in known]
        if unknown:
            raise ConfigError(
                f"--split-file {self.settings.split_file}: {len(unknown)} of its names match "
                f"no annotated image of the dataset (the first: {unknown[0]}); write paths as "
                "seen from --data-dir"
            )

    def _group_of(self, name: str) -> str:
        if self.pattern is None:
            return str(PurePosixPath(name).parent)
        match = self.pattern.search(name)
        group = match and match.group(1 if self.pattern.groups else 0)
        if group is None:  # no match, or one without its optional group
            raise ConfigError(
                f"--group-by: {self.settings.group_by!r} does not match {name}; each image needs "
                "a group"
            )
        return str(group)


def _read_split_file(file: str) -> dict[str, str]:
    """{image path or file name: split}."""
    path = resolve(file, "--split-file")
    try:
        text = read_bytes(path).decode("utf-8-sig")  # spreadsheets write a byte order mark
        if path.suffix.lower() == ".json":
            listed = json.loads(text)
            pairs = [(name, split) for split, names in listed.items() for name in names]
            if not all(isinstance(names, list) for names in listed.values()) or not all(
                isinstance(name, str) for name, _ in pairs
            ):
                raise TypeError("each split must have a list of image paths")
        else:
            rows = [row for row in csv.reader(text.splitlines()) if row]
            pairs = [(row[0].strip(), row[1].strip()) for row in rows]
            pairs = [pair for pair in pairs if pair != ("image", "split")]
    except (OSError, ValueError, AttributeError, TypeError, IndexError, csv.Error) as exc:
        raise ConfigError(
            f'--split-file: {path} must be JSON {{"train": [image, ...], ...}} or CSV lines '
            f"`image,split`: {exc}"
        ) from exc
    splits: dict[str, str] = {}
    for name, split in pairs:
        if split not in SPLITS:
            raise ConfigError(
                f"--split-file: {path} puts {name} in {split!r}; splits are {', '.join(SPLITS)}"
            )
        if splits.setdefault(name, split) != split:
            raise ConfigError(f"--split-file: {path} puts {name} in {splits[name]} and in {split}")
    return splits
