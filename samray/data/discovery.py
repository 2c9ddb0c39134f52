"""The JSON and image files of a raw dataset, without leaving its folder.

`pairing` finds out which JSON refers to which image.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cloudpathlib import S3Path

from samray.errors import AnnotationError, ConfigError
from samray.geometry.images import EXTENSIONS, UNREAD_EXTENSIONS
from samray.storage import Place, list_objects


@dataclass
class RawFiles:
    """The JSON and image files of a raw dataset.

    Attributes:
        root: the dataset's folder.
        annotations: JSON files, paths from the root with forward slashes, sorted.
        images: image files, likewise.
        skipped: files that are not read, with the reason, e.g. links out of the root.
        stamps: of each annotation and image, a text that changes when the file does.
        unread: image files of formats that samray does not read, likewise.
        coco: those of the JSON files that are COCO's; `prepare` moves them from `annotations`.
    """

    root: Place
    annotations: list[str]
    images: list[str]
    skipped: list[tuple[str, AnnotationError]] = field(default_factory=list)
    stamps: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    coco: list[str] = field(default_factory=list)
    image_set: frozenset[str] = field(init=False)
    json_set: frozenset[str] = field(init=False)  # folded
    by_path: Mapping[str, list[str]] = field(init=False)  # folded path -> images
    by_name: Mapping[str, list[str]] = field(init=False)  # folded file name -> images
    by_stem: Mapping[str, list[str]] = field(init=False)  # folded stem -> images
    image_folders: frozenset[str] = field(init=False)  # with an image in them or below
    json_folders: frozenset[str] = field(init=False)
    unusable: Mapping[str, str] = field(init=False)  # image that is there -> why it is not read
    unusable_by_stem: Mapping[str, list[str]] = field(init=False)  # folded stem -> these images

    def __post_init__(self) -> None:
        self.image_set = frozenset(self.images)
        self.json_set = frozenset(map(fold, self.annotations))
        self.by_path = _index(self.images, fold)
        self.by_name = _index(self.images, lambda image: fold(PurePosixPath(image).name))
        self.by_stem = _index(self.images, lambda image: fold(PurePosixPath(image).stem))
        self.image_folders = _folders(self.images)
        self.json_folders = _folders(self.annotations)
        self.unusable = {name: unread_reason(name) for name in self.unread} | {
            name: problem.reason for name, problem in self.skipped if _extension(name) != ".json"
        }
        stem_of = {name: fold(PurePosixPath(name).stem) for name in self.unusable}
        self.unusable_by_stem = _index(list(self.unusable), stem_of.__getitem__)


def fold(name: str) -> str:
    """Return a name without what file systems ignore: its case, and how accents are stored."""
    return unicodedata.normalize("NFC", name).casefold()


def unread_reason(name: str) -> str:
    """Why an image file of another format is not read."""
    return f"is there, but samray does not read {_extension(name)}; convert it to PNG or JPEG"


def find_files(
    root: Place, link_root: Path | None = None, others: Sequence[Place] = ()
) -> RawFiles:
    """List JSON and image files below a folder, without hidden files and links out of it.

    Args:
        link_root: a folder; links that lead into it are followed.
        others: files that are no part of the dataset, wherever they lie, such as a split file.

    Raises:
        ConfigError: the folder itself cannot be listed.
    """
    files = RawFiles(root, [], [])
    if isinstance(root, Path):
        entries = _files_on_disk(root, link_root, files)
    else:
        entries = _files_in_s3(root, files)
    left_out = _names_of(others, root)
    for name, stamp in sorted(entries):
        if name in left_out:
            continue
        if _extension(name) in UNREAD_EXTENSIONS:
            files.unread.append(name)
            continue
        files.stamps[name] = stamp
        (files.annotations if _extension(name) == ".json" else files.images).append(name)
    skipped = [item for item in files.skipped if item[0] not in left_out]
    return RawFiles(root, files.annotations, files.images, skipped, files.stamps, files.unread)


def _names_of(others: Sequence[Place], root: Place) -> set[str]:
    """The paths from the root of files that lie in it, and of what they link to."""
    names: set[str] = set()
    for other in others:
        if isinstance(other, Path) and isinstance(root, Path):
            pairs = ((other, root), (other.resolve(), root.resolve()))
            names |= {p.relative_to(top).as_posix() for p, top in pairs if p.is_relative_to(top)}
        elif isinstance(other, S3Path) and isinstance(root, S3Path) and other.is_relative_to(root):
            names.add(str(other.relative_to(root)))
    return names


def _files_on_disk(
    root: Path, link_root: Path | None, files: RawFiles
) -> Iterator[tuple[str, str]]:
    """Yield (path from the root, stamp); unusable files go to `files.skipped`."""
    allowed = [os.path.realpath(folder) for folder in (root, link_root) if folder is not None]

    def skip(path: str, kind: str, reason: str) -> None:
        name = Path(path).relative_to(root).as_posix()
        name = name if _is_text(name) else ascii(name)
        files.skipped.append((name, AnnotationError(kind, reason)))

    def unreadable(exc: OSError) -> None:
        if Path(exc.filename) == root:
            raise ConfigError(f"{root}: cannot be read ({exc.strerror})") from exc
        reason = f"cannot be read ({exc.strerror}); change its permissions, or move it away"
        skip(exc.filename, "folder", reason)

    waiting, seen = [str(root)], {allowed[0]}  # each folder once: links may lead in circles
    while waiting:
        start = waiting.pop()
        for folder, subfolders, names in os.walk(start, onerror=unreadable):
            if link_root is not None and folder != start:
                if (real := os.path.realpath(folder)) in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for link in (os.path.join(folder, name) for name in subfolders):
                if not Path(link).is_symlink():
                    continue
                target = os.path.realpath(link)
                if target in seen or not any(_is_inside(target, top) for top in allowed[1:]):
                    skip(link, "folder", _LINKED_FOLDER)
                else:
                    seen.add(target)
                    waiting.append(link)
            for name in names:
                if not name.startswith(".") and _extension(name) in _SEEN:
                    try:
                        yield _stamped(os.path.join(folder, name), root, allowed)
                    except AnnotationError as problem:
                        skip(os.path.join(folder, name), problem.field, problem.reason)


_SEEN = (".json", *EXTENSIONS, *UNREAD_EXTENSIONS)
_LINKED_FOLDER = (
    "is a linked folder, which is not followed; copy or mount the folder here, or name a folder "
    "that it leads into in prepare.link_root"
)


def _stamped(path: str, root: Path, allowed: list[str]) -> tuple[str, str]:
    """Return (path from the root, stamp) of a file.

    Raises:
        AnnotationError: it cannot be used.
    """
    relative = Path(path).relative_to(root).as_posix()
    if not _is_text(relative):
        raise AnnotationError("file", "has a name that is not UTF-8; rename it")
    if not any(_is_inside(os.path.realpath(path), folder) for folder in allowed):
        raise AnnotationError(
            "file",
            "is a link out of the dataset's folder and is not followed; copy the file, or name a "
            "folder that it leads into in prepare.link_root",
        )
    if not os.path.isfile(path):
        raise AnnotationError(
            "file", "is a link to nowhere, or no regular file; fetch what it links to, or remove it"
        )
    status = Path(path).stat()
    return relative, f"{status.st_size} {status.st_mtime_ns}"


def _files_in_s3(root: S3Path, files: RawFiles) -> Iterator[tuple[str, str]]:
    """As `_files_on_disk`; S3 has no links, but keys that are not valid paths."""
    for name, size, version in list_objects(root):
        parts = name.split("/")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        if hidden or _extension(name) not in _SEEN:
            continue
        if {"", ".", ".."} & set(parts):
            reason = "has a key that is no plain path; rename it"
            files.skipped.append((name, AnnotationError("file", reason)))
        else:
            yield name, f"{size} {version}"


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _index(names: list[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for name in names:
        index[key(name)].append(name)
    return dict(index)


def _folders(names: Iterable[str]) -> frozenset[str]:
    """The folders that hold these files, directly or below; the root is `.`."""
    parents = {PurePosixPath(name).parent for name in names}
    return frozenset(str(folder) for parent in parents for folder in (parent, *parent.parents))


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the name has bytes that are not UTF-8
        return False
    return True
