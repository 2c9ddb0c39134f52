"""Which image an annotation refers to, decided by the paths alone.

Usually the annotation file names its image. If no such file exists, the image is searched only
where no other one can be meant: beside the JSON, or in the folder parallel to the JSON's; for
COCO, in the data set that the JSON lies in. Frames of two clips often have the same name, so
a search of the whole dataset would attach masks to the wrong picture.
"""

import posixpath
import re
from pathlib import PurePosixPath, PureWindowsPath

from samray.data.discovery import RawFiles, fold
from samray.errors import AnnotationError

# fmt: off
ANNOTATION_WORDS = frozenset((
    "annotation", "annotations", "annotated", "ann", "anns", "anno", "annos", "annot", "annots",
    "label", "labels", "labelme", "json", "jsons", "mask", "masks", "gt", "polygons",
))
IMAGE_WORDS = frozenset((
    "image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos",
    "frame", "frames", "jpeg", "jpg", "png", "tif", "tiff", "bmp",
))
# fmt: on
# Names that tell one folder from no other.
COMMON_WORDS = ANNOTATION_WORDS | IMAGE_WORDS | {"data", "dataset", "default"}
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def find_image(annotation: str, image_path: str, files: RawFiles) -> str:
    """Return the image that a LabelMe file refers to, as a path from the root.

    First `imagePath`, relative to the JSON's folder; if no such file exists, the same path in
    another case, then `find_by_stem` with the JSON's own stem and with that of `imagePath`, which
    must not lead to two images; where `imagePath` names a folder, images of another one are not
    taken unless they lie beside the JSON and have its stem.
    A path out of the dataset is never followed; if the file it names has the JSON's stem, it is an
    old path of the annotator's machine, and the stem decides.

    Args:
        annotation: the JSON's path from the root.
        image_path: its `imagePath`, with forward slashes; may be empty.

    Raises:
        AnnotationError: field `imagePath`; no such image, or several that could be meant.
    """
    path = PurePosixPath(annotation)
    named = ""
    if image_path:
        named = _path_named(annotation, image_path)
        if found := _same_path(named, files):
            return found
        if _leads_out(named) and PurePosixPath(image_path).stem != path.stem:
            raise AnnotationError(
                "imagePath",
                f"{image_path!r:.120} leads out of the dataset's folder and is not followed; "
                "put the image beside its JSON, and its file name into imagePath",
            )
    own = _beside(annotation, path.stem, files)
    for name in (named, *files.unusable_by_stem.get(fold(path.stem), [])):
        beside = PurePosixPath(name).parent == path.parent
        if not own and name in files.unusable and (name == named or beside):
            raise AnnotationError("imagePath", f"{name} {files.unusable[name]}")
    images = []
    for stem in dict.fromkeys((path.stem, PurePosixPath(image_path).stem)):
        found = find_by_stem(annotation, stem, files) if stem else None
        if found and (found == own or not _is_of_another(annotation, image_path, found)):
            images.append(found)
    if len(set(images)) > 1:
        raise AnnotationError(
            "imagePath",
            f"{image_path!r:.120} points nowhere in here, and may be {images[1]} or, by the JSON's "
            f"name, {images[0]}; correct imagePath",
        )
    if images:
        return images[0]
    raise AnnotationError("imagePath", _not_found(path.stem, image_path, files))


def find_by_stem(annotation: str, stem: str, files: RawFiles) -> str | None:
    """Return the image with a stem beside a JSON or in the folder parallel to the JSON's, or None.

    Parallel is a folder whose path differs in one place, `annotations` and `images` or whatever
    the two are called. An image with a JSON of its own beside it is not taken by another JSON.

    Raises:
        AnnotationError: several could be meant.
    """
    if found := _beside(annotation, stem, files):
        return found
    folder = PurePosixPath(annotation).parent
    return _only(
        stem,
        [
            image
            for image in _unowned(annotation, stem, files)
            if _is_parallel(folder, PurePosixPath(image).parent, files)
        ],
    )


def find_listed_image(annotation: str, file_name: str, files: RawFiles) -> str:
    """Return the image that an entry of a COCO file refers to.

    The name is relative to that file's folder; or to its data set or the images' folder in that,
    unless there is such a file in both, or also in a folder that the JSON's own name names. If no
    such file exists, the image is the one of the same data set whose path ends most like it and
    whose folders are no others than those named; a path of another machine ends with the file name.
    The data set is the JSON's folder; if that one holds annotations only, its parent. Folders
    of other COCO files, and those of another split or another clip, are not part of it.

    Args:
        annotation: the COCO file's path from the root.
        file_name: with forward slashes.

    Raises:
        AnnotationError: field `file_name`; no such image, or several.
    """
    named = posixpath.normpath(posixpath.join(PurePosixPath(annotation).parent, file_name))
    if found := _same_path(named, files):
        return found
    scope = _data_set(PurePosixPath(annotation).parent, files)
    same_name = files.by_name.get(fold(PurePosixPath(file_name).name), [])
    candidates = [
        image
        for image in same_name
        if _is_below(image, scope) and not _owner(annotation, image, files)
    ]
    exact, own = _with_path(annotation, file_name, candidates, scope, files)
    if exact and (own or PurePosixPath(posixpath.normpath(file_name)).parent.name):
        nearest = exact + own
    else:
        usable = [i for i in candidates if _may_be_listed(annotation, i, file_name, scope, files)]
        lengths = [_common_tail(image, file_name) for image in usable]
        nearest = [i for i, n in zip(usable, lengths, strict=True) if n == max(lengths)]
        nearest = [image for image in exact if image in nearest] or nearest
    if len(nearest) == 1:
        return nearest[0]
    if nearest:
        path = posixpath.relpath(nearest[0], PurePosixPath(annotation).parent)
        raise AnnotationError(
            "file_name",
            f"{file_name!r:.120} may be any of {len(nearest)} images ({', '.join(nearest[:3])}); "
            f"give its path from the JSON's folder, like {path}",
        )
    for name in files.unusable_by_stem.get(fold(PurePosixPath(file_name).stem), []):
        same = fold(PurePosixPath(name).name) == fold(PurePosixPath(file_name).name)
        if same and _is_below(name, scope):
            raise AnnotationError("file_name", f"{name} {files.unusable[name]}")
    elsewhere = ""
    if owned := [image for image in same_name if _owner(annotation, image, files)]:
        its_json = PurePosixPath(owned[0]).with_suffix(".json").name
        elsewhere = f", and {owned[0]} belongs to the {its_json} beside it; remove that, or"
    elif same_name:
        elsewhere = f" in this data set, and {same_name[0]} is not taken from another one;"
    raise AnnotationError(
        "file_name", f"there is no image {file_name!r:.120}{elsewhere or ';'} add it"
    )


def split_in(folder: PurePosixPath) -> str | None:
    """Return the split that the first folder of a path with such a name stands for, or None.

    `train`, `val`, `valid`, `validation` and `test` in any case, also with a year as in COCO.
    """
    for part in folder.parts:
        if split := SPLIT_WORDS.get(re.sub(r"20\d\d$", "", fold(part))):
            return split
    return None


def _path_named(annotation: str, image_path: str) -> str:
    """What `imagePath` names, from the dataset's root; absolute if it is, also on Windows."""
    if PureWindowsPath(image_path).is_absolute():  # C:/pics/1.jpg
        image_path = f"/{image_path}"
    return posixpath.normpath(posixpath.join(PurePosixPath(annotation).parent, image_path))


def _leads_out(named: str) -> bool:
    return posixpath.isabs(named) or named.split("/")[0] == ".."


def _same_path(named: str, files: RawFiles) -> str | None:
    if named in files.image_set:  # which holds nothing from outside the root
        return named
    same_but_for_case = files.by_path.get(fold(named), [])  # from a file system without case
    return same_but_for_case[0] if len(same_but_for_case) == 1 else None


def _beside(annotation: str, stem: str, files: RawFiles) -> str | None:
    folder = PurePosixPath(annotation).parent
    return _only(
        stem,
        [i for i in _unowned(annotation, stem, files) if PurePosixPath(i).parent == folder],
    )


def _unowned(annotation: str, stem: str, files: RawFiles) -> list[str]:
    images = files.by_stem.get(fold(stem), [])
    return [image for image in images if not _owner(annotation, image, files)]


def _owner(annotation: str, image: str, files: RawFiles) -> bool:
    """Whether an image has a JSON of its own beside it, other than this one."""
    own = fold(str(PurePosixPath(image).with_suffix(".json")))
    return own != fold(annotation) and own in files.json_set


def _only(stem: str, images: list[str]) -> str | None:
    exact = [image for image in images if PurePosixPath(image).stem == stem]
    images = exact or images
    if len(images) > 1:
        raise AnnotationError(
            "imagePath",
            f"points nowhere, and {len(images)} images have this stem ({', '.join(images[:3])}); "
            "correct imagePath",
        )
    return images[0] if images else None


def _not_found(stem: str, image_path: str, files: RawFiles) -> str:
    said = f"imagePath {image_path!r:.120} points nowhere in here" if image_path else "no imagePath"
    said += f", and there is no image named {stem}.*"
    if elsewhere := files.by_stem.get(fold(stem)):
        return (
            f"{said} beside it or in a parallel folder; {elsewhere[0]} may be another picture and "
            "is not used; add the image, or correct imagePath if that is the one"
        )
    return f"{said}; add the image"


def _is_parallel(folder: PurePosixPath, other: PurePosixPath, files: RawFiles) -> bool:
    """Whether the image of a JSON in `folder` may lie in `other`: they differ in one place."""
    a, b = folder.parts, other.parts
    places = [n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    if len(a) != len(b) or len(places) != 1:
        return False
    end = places[0] + 1
    return _are_pair(PurePosixPath(*a[:end]), PurePosixPath(*b[:end]), files)


def _are_pair(jsons: PurePosixPath, images: PurePosixPath, files: RawFiles) -> bool:
    """Whether one folder holds the annotations of its neighbour's images.

    Either their names say so, or they are the only ones of their parent with JSON files and with
    images, and do not look like two of a series (clip_01 and clip_02).
    """
    a, b = _words(jsons.name), _words(images.name)
    if a & ANNOTATION_WORDS and b & IMAGE_WORDS:
        rests = a - ANNOTATION_WORDS, b - IMAGE_WORDS
        if rests[0] == rests[1]:
            return True
        if rests[0] and rests[1]:  # annotations_1 and images_2
            return False
    if _alike(jsons.name, images.name):
        return False
    with_jsons = [f for f in files.json_folders if PurePosixPath(f).parent == jsons.parent]
    with_images = [f for f in files.image_folders if PurePosixPath(f).parent == jsons.parent]
    return set(with_jsons) - {"."} == {str(jsons)} and set(with_images) - {"."} == {str(images)}


def _words(name: str) -> frozenset[str]:
    """The words of a folder's name: `imagesTr`, `my_images` and `JPEGImages` all hold `images`."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return frozenset(filter(None, re.split(r"[\W_]+", fold(apart))))


def _alike(one: str, other: str) -> bool:
    """Whether two different folders look like members of a series: clips, sets or splits."""
    a, b = fold(one), fold(other)
    if re.sub(r"\d+", "", a) == re.sub(r"\d+", "", b):
        return True
    if split_in(PurePosixPath(one)) and split_in(PurePosixPath(other)):
        return True
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) == 1


def _data_set(folder: PurePosixPath, files: RawFiles) -> PurePosixPath:
    """The folder of a COCO file's data set."""
    if str(folder) in files.image_folders:
        return folder
    for ancestor in (folder, folder.parent):
        if _words(ancestor.name) & ANNOTATION_WORDS:
            return ancestor.parent
    neighbours = (f for f in map(PurePosixPath, files.image_folders) if f.parent == folder.parent)
    if any(_words(neighbour.name) & IMAGE_WORDS for neighbour in neighbours if neighbour.name):
        return folder.parent
    return folder


def _may_be_listed(
    annotation: str, image: str, file_name: str, scope: PurePosixPath, files: RawFiles
) -> bool:
    """Whether an image of its data set may be one of a COCO file, by the folders on its way."""
    place = PurePosixPath(image).parent.relative_to(scope)
    same_set = [annotation]
    for other in files.coco:
        theirs = _data_set(PurePosixPath(other).parent, files)
        if other == annotation:
            continue
        if theirs == scope:
            same_set.append(other)
        elif theirs.is_relative_to(scope) and _is_below(image, theirs):
            return False  # of a data set inside this one
    tags = _tags(annotation, scope)
    split = split_in(PurePosixPath(*re.split(r"[^a-z0-9]+", "/".join(tags))))
    if None not in (split, split_in(place)) and split != split_in(place):
        return False
    if not _names_folder(tags, place):
        if any(_names_folder(_tags(other, scope), place) for other in same_set[1:]):
            return False  # instances_b.json names b/, and this one is instances_a.json
        below = (f for f in map(PurePosixPath, files.image_folders) if f.is_relative_to(scope))
        if any(_names_folder(tags, folder.relative_to(scope)) for folder in below):
            return False  # the folder that this one names is there, without the image
    not_named = [part for part in place.parts if not _names_folder(tags, PurePosixPath(part))]
    if _means_another(file_name, PurePosixPath(*not_named)):
        return False
    return _common_tail(image, file_name) > 1 or not _is_elsewhere(file_name, place, scope, files)


def _with_path(
    annotation: str, file_name: str, images: list[str], scope: PurePosixPath, files: RawFiles
) -> tuple[list[str], list[str]]:
    """The images that have just the path that a COCO file names, by the folder it begins in.

    Returns:
        exact: from the data set's folder, or from `images`, or one called alike, in it.
        own: from a folder that the COCO file's own name names, as train in instances_train.json.
    """
    path = fold(posixpath.normpath(file_name))
    exact, own = [], []
    for image in images:
        if not f"/{fold(image)}".endswith(f"/{path}"):
            continue
        parts = PurePosixPath(image).relative_to(scope).parts
        above = PurePosixPath(*parts[: -len(PurePosixPath(path).parts)])
        if len(above.parts) < 2 and _words(above.name) <= IMAGE_WORDS:
            exact.append(image)
        elif _names_folder(_tags(annotation, scope), above):
            own.append(image)
    return exact, [i for i in own if _may_be_listed(annotation, i, file_name, scope, files)]


def _is_of_another(annotation: str, image_path: str, image: str) -> bool:
    """Whether a LabelMe file's `imagePath` names another folder than an image's.

    Folders that the two paths share, or the JSON's and the image's where `imagePath` is of another
    machine, tell nothing: all that is in `cam1/` may be of one camera.
    """
    if not PurePosixPath(image_path).parent.name:
        return False  # a file name alone
    json_folder, folder = PurePosixPath(annotation).parent, PurePosixPath(image).parent
    named = _path_named(annotation, image_path)
    if _leads_out(named):
        return _means_another(named, PurePosixPath(*_apart(folder, json_folder)))
    file, parent = PurePosixPath(named).name, PurePosixPath(named).parent
    own = posixpath.join(*_apart(parent, folder), file)
    return _means_another(own, PurePosixPath(*_apart(folder, parent)))


def _apart(folder: PurePosixPath, other: PurePosixPath) -> list[str]:
    """The parts of a folder's path that the other does not have at the same place."""
    others = [*other.parts, *[""] * len(folder.parts)]
    return [part for part, same in zip(folder.parts, others, strict=False) if part != same]


def _means_another(path: str, folder: PurePosixPath) -> bool:
    """Whether a path names another folder than the one given.

    Their folders are compared from the last on, without those whose name tells nothing.

    Args:
        path: of an image, as an annotation has it.
        folder: of an image that is there.
    """
    named, real = (
        [fold(part) for part in folders.parts if part != ".." and not _words(part) <= COMMON_WORDS]
        for folders in (PurePosixPath(posixpath.normpath(path)).parent, folder)
    )
    if not named or not real:
        return False
    last = named[-1]
    places = [n for n, part in enumerate(real) if part == last]
    if not places:
        return True
    pairs = zip(reversed(named[:-1]), reversed(real[: places[-1]]), strict=False)
    return any(one != other for one, other in pairs)


def _is_elsewhere(
    file_name: str, place: PurePosixPath, scope: PurePosixPath, files: RawFiles
) -> bool:
    """Whether the folder in a file name is another one than the image's."""
    named = fold(PurePosixPath(file_name).parent.name)
    if named in ("", ".", "..") or named in map(fold, place.parts):
        return False
    below = (PurePosixPath(f) for f in files.image_folders if _is_below(f, scope))
    if any(fold(folder.name) == named for folder in below):
        return True
    return place.name != "" and _alike(named, place.name)


def _tags(annotation: str, scope: PurePosixPath) -> tuple[str, ...]:
    """What a COCO file may name folders by: its folders in the data set, and its own name."""
    path = PurePosixPath(annotation).relative_to(scope).with_suffix("")
    return tuple(fold(part) for part in path.parts if not _words(part) <= ANNOTATION_WORDS)


def _names_folder(tags: tuple[str, ...], folder: PurePosixPath) -> bool:
    parts = [fold(part) for part in folder.parts if not _words(part) <= IMAGE_WORDS]
    return any(re.search(rf"(^|[\W_]){re.escape(part)}$", tag) for part in parts for tag in tags)


def _common_tail(image: str, file_name: str) -> int:
    """Number of last parts that two paths have in common."""
    pairs = zip(
        reversed(PurePosixPath(fold(image)).parts),
        reversed(PurePosixPath(posixpath.normpath(fold(file_name))).parts),
        strict=False,
    )
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count


def _is_below(name: str, folder: PurePosixPath) -> bool:
    return str(folder) == "." or name.startswith(f"{folder}/")
