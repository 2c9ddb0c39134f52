"""Which image is in train, val or test.

By a split file, by groups, by folders named train, val and test, else by a hash of each image.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from samray.config import PrepareConfig
from samray.data.dataset import SPLITS
from samray.data.outcome import FileWarning, PreparedImage
from samray.data.pairing import split_in
from samray.errors import ConfigError, DatasetError
from samray.geometry.duplicates import near_duplicates, unpack
from samray.storage import read_bytes, resolve

MAX_COMPARED = 20_000  # photos compared with one another; takes seconds, and grows with the square


def split_of_hash(digest: str, val_fraction: float, test_fraction: float) -> str:
    """Return the split of an image or group by its sha256 in hex.

    It depends on nothing else, so the same image is never in two splits, and adding images moves
    no other image.
    """
    u = int(digest[:8], 16) / 2**32
    if u < val_fraction:
        return "val"
    return "test" if u < val_fraction + test_fraction else "train"


@dataclass(frozen=True)
class Splits:
    """The split of each image, and how it was chosen.

    Attributes:
        members: names of the images of each split, sorted.
        by: `file`, `groups`, `folders`, `hashes`, or `order of hashes` where photos are few.
        notes: sentences for the user about the choice.
        warnings: images that are in two splits, exactly or nearly.
    """

    members: dict[str, list[str]]
    by: str
    notes: list[str]
    warnings: list[FileWarning]


class SplitRule:
    """How a dataset is split.

    Args:
        settings: of which `split_file`, `group_by`, `split_folders`, `val_fraction` and
            `test_fraction` are used.

    Raises:
        ConfigError: the split file or the group pattern cannot be used.
    """

    def __init__(self, settings: PrepareConfig) -> None:
        self.settings = settings
        self.listed = _read_split_file(settings.split_file) if settings.split_file else {}
        self.known: frozenset[str] = frozenset()  # paths of all images, once they are known
        self.pattern: re.Pattern[str] | None = None
        if settings.group_by not in (None, "folder"):
            try:
                self.pattern = re.compile(str(settings.group_by))
            except re.error as exc:
                raise ConfigError(
                    f"--group-by: {settings.group_by!r} is neither `folder` nor a regular "
                    f"expression: {exc}"
                ) from exc
        self.shares = {
            "train": 1 - settings.val_fraction - settings.test_fraction,
            "val": settings.val_fraction,
            "test": settings.test_fraction,
        }

    def assign(self, images: list[PreparedImage]) -> Splits:
        """Return the images of each split, and warnings about photos that are in two.

        Raises:
            ConfigError: the split file names an image by a file name that several have.
            DatasetError: a split with a share above 0 has no instance and cannot be filled.
        """
        notes: list[str] = []
        if plan := self._by_folders(images, notes):
            by = "folders"
        else:
            by = "file" if self.listed else "groups" if self.settings.group_by else "hashes"
            named = self._by_file(images)
            named |= self._with_their_group(images, named, notes)
            plan = {image.name: named.get(image.name) or self._by_hash(image) for image in images}
            if self.listed and (others := [name for name in plan if name not in named]):
                notes.append(
                    f"{len(others)} images are not in --split-file (the first: {others[0]}): they "
                    "are split by hash"
                )
            if not self.listed and self._lacking(plan, images):
                filled = self._in_order(images, notes)
                by, plan = ("order of hashes", filled) if filled else (by, plan)
            if by in ("file", "groups", "hashes") and (lacking := self._lacking(plan, images)):
                raise _empty_split(lacking, plan, images)
        members: dict[str, list[str]] = {split: [] for split in SPLITS}
        for name, split in plan.items():
            members[split].append(name)
        warnings = _copies(images, plan) + _near_copies(images, plan, notes)
        return Splits({split: sorted(n) for split, n in members.items()}, by, notes, warnings)

    def _by_file(self, images: list[PreparedImage]) -> dict[str, str]:
        """The split of each image that the split file names, by its path or else its file name.

        A name that is the path of an image means no image of that name in another folder.
        """
        named = {i.name: self.listed[i.name] for i in images if i.name in self.listed}
        paths = self.known | {image.name for image in images}
        meant: dict[str, list[str]] = defaultdict(list)
        for image in images:
            file_name = PurePosixPath(image.name).name
            if image.name not in named and file_name in self.listed and file_name not in paths:
                meant[file_name].append(image.name)
        for file_name, candidates in meant.items():
            if len(candidates) > 1:
                raise ConfigError(
                    f"--split-file {self.settings.split_file}: {file_name} may be any of "
                    f"{len(candidates)} images ({', '.join(candidates[:3])}); write paths as seen "
                    "from --data-dir"
                )
            named[candidates[0]] = self.listed[file_name]
        return named

    def _with_their_group(
        self, images: list[PreparedImage], named: dict[str, str], notes: list[str]
    ) -> dict[str, str]:
        """The split of each image that the split file does not name, but others of its group."""
        if self.settings.group_by is None or not named:
            return {}
        splits_of: dict[str | None, set[str]] = defaultdict(set)
        for name, split in named.items():
            splits_of[self._find_group(name)].add(split)
        groups = {i.name: self._group_of(i.name) for i in images if i.name not in named}
        found = {name: splits_of.get(group, set()) for name, group in groups.items()}
        joining = {name: next(iter(splits)) for name, splits in found.items() if len(splits) == 1}
        if joining:
            notes.append(
                f"{len(joining)} images are not in --split-file (the first: {next(iter(joining))}),"
                " but others of their group are: they are in the same split"
            )
        if torn := sorted({groups[name] for name, splits in found.items() if len(splits) > 1}):
            notes.append(
                f"--split-file puts images of one group in several splits ({len(torn)} groups, the "
                f"first: {torn[0]}); name all images of them there, or none"
            )
        return joining

    def _by_hash(self, image: PreparedImage) -> str:
        """The split by the hash of an image's group, else its own."""
        digest = self._unit_of(image.name, image.image_digest)
        return split_of_hash(digest, self.settings.val_fraction, self.settings.test_fraction)

    def _by_folders(self, images: list[PreparedImage], notes: list[str]) -> dict[str, str]:
        """The plan of a dataset whose folders are the splits; empty if they are not."""
        settings = self.settings
        wanted = settings.split_folders and self.shares["train"] < 1  # 0 and 0: all in train
        if self.listed or settings.group_by is not None or not wanted:
            return {}
        folders = {image.name: split_in(PurePosixPath(image.name).parent) for image in images}
        found = {folders[image.name] for image in images if image.num_instances} - {None}
        if "train" not in found or len(found) < 2:
            return {}
        names = {_split_folder(name) for name, split in folders.items() if split in found}
        outside = sum(split is None for split in folders.values())
        more = f"; {outside} images outside of them are split by hash" if outside else ""
        notes.append(
            f"the folders {', '.join(f'{name}/' for name in sorted(names))} are the splits "
            f"(prepare.split_folders=false splits by hash){more}"
        )
        plan = {image.name: folders[image.name] or self._by_hash(image) for image in images}
        notes += [_nothing_in(split) for split in self._lacking(plan, images)]
        return plan

    def _in_order(self, images: list[PreparedImage], notes: list[str]) -> dict[str, str]:
        """The plan of a dataset with too few photos for hashes: each split gets its share of them.

        Photos, or groups of them, are taken in the order of their hashes. With fewer of them than
        splits, all are in train. Empty if groups are too few, or no image has an object.
        """
        units = {image.name: self._unit_of(image.name, image.image_digest) for image in images}
        filled = sorted({units[image.name] for image in images if image.num_instances})
        wanted = [split for split in SPLITS if self.shares[split] > 0]
        what = "groups" if self.settings.group_by else "photos"
        if len(filled) < len(wanted):
            if not filled or (what == "groups" and len(images) > 2):
                return {}
            notes.append(f"{len(filled)} photos are too few for {len(wanted)} splits: all in train")
            notes.extend(_nothing_in(split) for split in wanted if split != "train")
            return dict.fromkeys(units, "train")
        counts = {
            split: max(1, int(len(filled) * self.shares[split])) if split in wanted else 0
            for split in ("val", "test")
        }
        while sum(counts.values()) >= len(filled):
            counts[max(counts, key=lambda split: counts[split])] -= 1
        order = [split for split, count in counts.items() for _ in range(count)]
        split_of = dict(zip(filled, order + ["train"] * len(filled), strict=False))
        notes.append(
            f"{len(filled)} {what} are few, and hashes alone left a split empty: the splits are "
            f"filled in the order of the hashes; {what} added later may move others"
        )
        return {
            image.name: split_of.get(units[image.name]) or self._by_hash(image) for image in images
        }

    def _lacking(self, plan: dict[str, str], images: list[PreparedImage]) -> list[str]:
        """The splits with a share above 0 that have no instance."""
        filled = {plan[image.name] for image in images if image.num_instances}
        return [split for split in SPLITS if self.shares[split] > 0 and split not in filled]

    def _unit_of(self, name: str, image_digest: str) -> str:
        """The hash that decides the split of an image: of its group, else its own."""
        if self.settings.group_by is None:
            return image_digest
        return hashlib.sha256(self._group_of(name).encode()).hexdigest()

    def require_known(self, images: list[PreparedImage], claimed: list[str]) -> None:
        """Refuse a split file that names images which are not in the dataset, not even rejected.

        Raises:
            ConfigError: naming the first of them.
        """
        self.known = frozenset(image.name for image in images) | frozenset(claimed)
        known = self.known | {PurePosixPath(name).name for name in self.known}
        unknown = [name for name in self.listed if name not in known]
        if unknown:
            raise ConfigError(
                f"--split-file {self.settings.split_file}: {len(unknown)} of its names match "
                f"no annotated image of the dataset (the first: {unknown[0]}); write paths as "
                "seen from --data-dir"
            )

    def _group_of(self, name: str) -> str:
        group = self._find_group(name)
        if group is None:
            raise ConfigError(
                f"--group-by: {self.settings.group_by!r} does not match {name}; each image needs "
                "a group"
            )
        return group

    def _find_group(self, name: str) -> str | None:
        """The group of an image; None if the pattern has no match, or without its optional one."""
        if self.pattern is None:
            return str(PurePosixPath(name).parent)
        match = self.pattern.search(name)
        return match and match.group(1 if self.pattern.groups else 0)


def _split_folder(name: str) -> str:
    """The path of the folder that puts an image into a split, as seen from the dataset's folder."""
    folder = PurePosixPath(name).parent
    while split_in(folder.parent):
        folder = folder.parent
    return str(folder)


def _nothing_in(split: str) -> str:
    stage = {"val": "train", "test": "evaluate"}[split]
    return (
        f"{split} is empty, and `samray {stage}` needs {split} photos; add photos, or choose the "
        "members with --split-file"
    )


def _empty_split(
    lacking: list[str], plan: dict[str, str], images: list[PreparedImage]
) -> DatasetError:
    counts = Counter(plan[image.name] for image in images if image.num_instances)
    listed = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
    return DatasetError(
        f"the {' and '.join(lacking)} split would be empty ({listed} images with an "
        "object); choose the members with --split-file, or other groups with --group-by, "
        "or add images "
        "(prepare.val_fraction and prepare.test_fraction set the shares; 0 wants none)"
    )


def _copies(images: list[PreparedImage], plan: dict[str, str]) -> list[FileWarning]:
    """Warnings about files of the same content in two splits."""
    warnings = []
    seen: dict[str, str] = {}
    for image in images:
        twin = seen.setdefault(image.image_digest, image.name)
        if plan[twin] != (split := plan[image.name]):
            reason = f"is the same photo as {twin}, but {split} and {plan[twin]} have one each"
            warnings.append(FileWarning(image.name, "image", reason))
    return warnings


def _near_copies(
    images: list[PreparedImage], plan: dict[str, str], notes: list[str]
) -> list[FileWarning]:
    """Warnings about groups of nearly the same photo in different splits."""
    images = [image for image in images if image.fingerprint]
    if len({plan[image.name] for image in images}) < 2:
        return []
    if len(images) > MAX_COMPARED:
        notes.append(
            f"{len(images)} photos were not searched for near-duplicates in different splits; "
            "`samray inspect --report` does"
        )
        return []
    prints = np.stack([unpack(image.fingerprint) for image in images])
    warnings = []
    for group in near_duplicates(prints, [image.image_digest for image in images]):
        first, *others = (images[number] for number in group)
        torn = [o for o in others if plan[o.name] != plan[first.name]]
        if torn and any(other.image_digest != first.image_digest for other in torn):
            listed = ", ".join(f"{other.name} ({plan[other.name]})" for other in torn[:3])
            more = f" and {len(torn) - 3} more" if len(torn) > 3 else ""
            reason = f"({plan[first.name]}) is nearly the same photo as {listed}{more}"
            warnings.append(FileWarning(first.name, "image", reason))
    if warnings:
        notes.append(
            f"{len(warnings)} groups of near-duplicate photos are in more than one split, so "
            "scores will be too high; keep each together with --group-by, or with the split file "
            "that `samray inspect --report` writes"
        )
    return warnings


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
            rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
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
