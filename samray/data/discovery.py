"""Which JSON refers to which image, in all known layouts, without leaving the folder.

Known layouts: `images/` beside `annotations/`, the JSON beside its image (LabelMe's default),
nested folders, equal stems in different folders.
"""

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cloudpathlib import S3Path

from samray.errors import AnnotationError
from samray.geometry.images import EXTENSIONS
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
    """

    root: Place
    annotations: list[str]
    images: list[str]
    skipped: list[tuple[str, AnnotationError]] = field(default_factory=list)
    stamps: dict[str, str] = field(default_factory=dict)
    image_set: frozenset[str] = field(init=False)
    by_folded: Mapping[str, list[str]] = field(init=False)
    by_stem: Mapping[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.image_set = frozenset(self.images)
        by_stem = defaultdict(list)
        for image in self.images:
            by_stem[PurePosixPath(image).stem].append(image)
        self.by_stem = dict(by_stem)
        by_folded = defaultdict(list)
        for image in self.images:
            by_folded[image.casefold()].append(image)
        self.by_folded = dict(by_folded)


def find_files(root: Place) -> RawFiles:
    """List JSON and image files below a folder, without hidden files and links out of it."""
    files = RawFiles(root, [], [])
    entries = _files_on_disk(root, files) if isinstance(root, Path) else _files_in_s3(root, files)
    for name, stamp in sorted(entries):
        files.stamps[name] = stamp
        (files.annotations if _extension(name) == ".json" else files.images).append(name)
    return RawFiles(root, files.annotations, files.images, files.skipped, files.stamps)


def _files_on_disk(root: Path, files: RawFiles) -> Iterator[tuple[str, str]]:
    """Yield (path from the root, stamp); unusable files go to `files.skipped`."""
    real_root = os.path.realpath(root)

    def skip(name: str, kind: str, reason: str) -> None:
        files.skipped.append((name, AnnotationError(kind, reason)))

    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for subfolder in subfolders:
            link = Path(folder, subfolder)
            if link.is_symlink():
                relative = link.relative_to(root).as_posix()
                relative = relative if _is_text(relative) else ascii(relative)
                reason = "is a linked folder, which is not followed; copy or mount the folder here"
                skip(relative, "folder", reason)
        for name in names:
            path = os.path.join(folder, name)
            relative = Path(path).relative_to(root).as_posix()
            if name.startswith(".") or _extension(name) not in (".json", *EXTENSIONS):
                continue
            if not _is_text(relative):
                skip(ascii(relative), "file", "has a name that is not UTF-8; rename it")
            elif not _is_inside(os.path.realpath(path), real_root):
                reason = "is a link out of the dataset's folder and is not followed; copy the file"
                skip(relative, "file", reason)
            elif not os.path.isfile(path):
                reason = "is a link to nowhere, or no regular file; remove it"
                skip(relative, "file", reason)
            else:
                status = Path(path).stat()
                yield relative, f"{status.st_size} {status.st_mtime_ns}"


def _files_in_s3(root: S3Path, files: RawFiles) -> Iterator[tuple[str, str]]:
    """As `_files_on_disk`; S3 has no links, but keys that are not valid paths."""
    for name, size, version in list_objects(root):
        parts = name.split("/")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        if hidden or _extension(name) not in (".json", *EXTENSIONS):
            continue
        if {"", ".", ".."} & set(parts):
            reason = "has a key that is no plain path; rename it"
            files.skipped.append((name, AnnotationError("file", reason)))
        else:
            yield name, f"{size} {version}"


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def find_image(annotation: str, image_path: str, files: RawFiles) -> str:
    """Return the image that an annotation refers to, as a path from the root.

    First `imagePath`, relative to the JSON's folder; if no such file exists, the same path in
    another case, then the nearest image with the JSON's own stem, then with the stem of
    `imagePath`. A path out of the dataset is never followed; if the file it names has the JSON's
    stem, it is an old path of the annotator's machine, and the stem decides.

    Args:
        annotation: the JSON's path from the root.
        image_path: its `imagePath`, with forward slashes; may be empty.

    Raises:
        AnnotationError: no such image, or several that are equally near.
    """
    folder = PurePosixPath(annotation).parent
    stem = PurePosixPath(annotation).stem
    if image_path:
        named = posixpath.normpath(posixpath.join(str(folder), image_path))
        if named in files.image_set:  # which holds nothing from outside the root
            return named
        same_but_for_case = files.by_folded.get(named.casefold(), [])
        if len(same_but_for_case) == 1:  # from a file system without case
            return same_but_for_case[0]
        leads_out = posixpath.isabs(named) or named.split("/")[0] == ".."
        if leads_out and PurePosixPath(image_path).stem != stem:
            raise AnnotationError(
                "imagePath",
                f"{image_path!r:.120} leads out of the dataset's folder and is not followed; "
                "put the image beside its JSON",
            )
    image = find_by_stem(folder, stem, files)
    if image is None and image_path:
        image = find_by_stem(folder, PurePosixPath(image_path).stem, files)
    if image is None:
        said = (
            f"imagePath {image_path!r:.120} points nowhere in here"
            if image_path
            else "no imagePath"
        )
        raise AnnotationError(
            "imagePath", f"{said}, and there is no image named {stem}.*; add the image"
        )
    return image


def find_listed_image(annotation: str, file_name: str, files: RawFiles) -> str:
    """Return the image that an entry of a file with many images refers to.

    The name is relative to that file's folder; else the one image whose path ends with it; else,
    for a path of another machine, the one image with that file name.

    Raises:
        AnnotationError: field `file_name`; no such image, or several.
    """
    named = posixpath.normpath(posixpath.join(PurePosixPath(annotation).parent, file_name))
    if named in files.image_set:
        return named
    stem = PurePosixPath(file_name).stem
    candidates = files.by_stem.get(stem, [])
    for tail in (posixpath.normpath(file_name), PurePosixPath(file_name).name):
        found = [image for image in candidates if f"/{image}".endswith(f"/{tail}")]
        if len(found) == 1:
            return found[0]
        if found:
            raise AnnotationError(
                "file_name",
                f"{file_name!r:.120} may be any of {len(found)} images ({', '.join(found[:3])}); "
                "name it with its folder",
            )
    raise AnnotationError("file_name", f"there is no image {file_name!r:.120}; add it")


def find_by_stem(folder: PurePosixPath, stem: str, files: RawFiles) -> str | None:
    """Return the image with a stem that is nearest to a JSON's folder, or None.

    Nearest means: in that folder; else in the folder whose path differs by `annotations`
    and `images` (or whatever the two are called) in one place; else anywhere.

    Raises:
        AnnotationError: several are equally near.
    """
    candidates = files.by_stem.get(stem, [])
    if not candidates:
        return None
    ranked = defaultdict(list)
    for image in candidates:
        ranked[_distance(folder.parts, PurePosixPath(image).parent.parts)].append(image)
    nearest = ranked[min(ranked)]
    if len(nearest) > 1:
        raise AnnotationError(
            "imagePath",
            f"points nowhere, and {len(nearest)} images have this stem ({', '.join(nearest[:3])}); "
            "correct imagePath",
        )
    return nearest[0]


def _distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    if a == b:
        return 0
    if len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1:
        return 1
    return 2


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the name has bytes that are not UTF-8
        return False
    return True
