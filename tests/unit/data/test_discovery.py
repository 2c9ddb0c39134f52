"""Which JSON refers to which image, in all known layouts; never a file outside the folder."""

import os
from pathlib import Path

import pytest

from samray.data.discovery import RawFiles, find_files, find_image
from samray.errors import AnnotationError


def lay_out(root: Path, *names: str) -> RawFiles:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return find_files(root)


def test_files_are_listed_sorted_with_paths_from_the_root(tmp_path: Path) -> None:
    files = lay_out(
        tmp_path, "b/2.json", "b/1.JSON", "a.json", "b/x.JPG", "z.png", "a.txt", "b/README", "c.gif"
    )
    assert files.annotations == ["a.json", "b/1.JSON", "b/2.json"]
    assert files.images == ["b/x.JPG", "z.png"]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "bmp", "tif", "tiff", "webp", "JPeG"])
def test_every_image_extension_is_seen_in_any_case(tmp_path: Path, extension: str) -> None:
    assert lay_out(tmp_path, f"a.{extension}").images == [f"a.{extension}"]


@pytest.mark.parametrize(
    ("names", "annotation", "image_path", "expected"),
    [
        # imagePath, relative to the JSON's folder.
        (["images/a.jpg"], "annotations/a.json", "../images/a.jpg", "images/a.jpg"),
        (["a.jpg"], "a.json", "a.jpg", "a.jpg"),
        (["x/y/a.jpg"], "x/y/a.json", "./a.jpg", "x/y/a.jpg"),
        (["x/y/a.jpg"], "x/y/a.json", "../../x/y/a.jpg", "x/y/a.jpg"),
        (["a.jpg", "b.jpg"], "a.json", "b.jpg", "b.jpg"),
        (["images/a b.jpg"], "annotations/é.json", "../images/a b.jpg", "images/a b.jpg"),
        # Equal stems in different folders.
        (["x/a.jpg", "y/a.jpg"], "y/a.json", "a.jpg", "y/a.jpg"),
        (["x/a.jpg", "y/a.jpg"], "y/a.json", "", "y/a.jpg"),
        (["images/x/a.jpg", "images/y/a.jpg"], "labels/y/a.json", "gone.jpg", "images/y/a.jpg"),
        (["x/images/a.jpg", "y/images/a.jpg"], "x/labels/a.json", "gone.jpg", "x/images/a.jpg"),
        (["a.jpg", "x/a.jpg"], "x/a.json", "gone.jpg", "x/a.jpg"),
        (["images/a.jpg", "old/images/a.jpg"], "annotations/a.json", "gone.jpg", "images/a.jpg"),
        # imagePath is wrong, but the JSON's own stem matches.
        (["images/a.jpg"], "annotations/a.json", "a.jpg", "images/a.jpg"),
        (["images/a.png"], "annotations/a.json", "a.jpg", "images/a.png"),
        (["deep/er/images/a.jpg"], "a.json", "gone.jpg", "deep/er/images/a.jpg"),
        (["a.jpg", "b.jpg"], "a.json", "gone/b.jpg", "a.jpg"),
        (["a.jpg"], "a.json", "", "a.jpg"),
        (["a.b.jpg", "a.jpg"], "a.b.json", "", "a.b.jpg"),
        # The stem of imagePath, as the last resort.
        (["images/b.jpg"], "annotations/a.json", "gone/b.jpg", "images/b.jpg"),
        # A path of the annotator's machine, out of the folder: only its stem is used.
        (["images/a.jpg"], "annotations/a.json", "/home/ann/a.jpg", "images/a.jpg"),
        (["images/a.jpg"], "annotations/a.json", "../../../ann/a.jpg", "images/a.jpg"),
        (["images/a.jpg"], "annotations/a.json", "C:/Users/ann/a.jpg", "images/a.jpg"),
        # Written on a file system without case.
        (["Images/A.JPG"], "annotations/b.json", "../images/a.jpg", "Images/A.JPG"),
        # Spaces and non-ASCII letters.
        (["фото/мой кот.jpg"], "разметка/мой кот.json", "", "фото/мой кот.jpg"),
        (["b/Straße 1.jpg"], "a/Straße 1.json", "../b/Straße 1.jpg", "b/Straße 1.jpg"),
    ],
)  # fmt: skip
def test_right_image_is_found(
    tmp_path: Path, names: list[str], annotation: str, image_path: str, expected: str
) -> None:
    files = lay_out(tmp_path, *names, annotation)
    assert annotation in files.annotations
    assert find_image(annotation, image_path, files) == expected


@pytest.mark.parametrize(
    "image_path",
    ["/etc/passwd", "../../../../../../etc/passwd", "/home/ann/b.jpg", "../../b.jpg", "../.."],
)
def test_path_out_of_the_folder_is_refused_and_not_followed(
    tmp_path: Path, image_path: str
) -> None:
    files = lay_out(tmp_path, "annotations/a.json", "images/a.jpg", "images/b.jpg")
    with pytest.raises(AnnotationError, match="leads out of the dataset's folder") as caught:
        find_image("annotations/a.json", image_path, files)
    assert caught.value.field == "imagePath"


def test_image_outside_the_folder_is_not_found_though_it_exists(tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(b"")
    files = lay_out(tmp_path / "data", "outside.json")
    for image_path in ("../outside.jpg", str(tmp_path / "outside.jpg")):
        with pytest.raises(AnnotationError, match="there is no image named outside"):
            find_image("outside.json", image_path, files)


@pytest.mark.parametrize(
    ("names", "annotation", "image_path"),
    [
        (["a.jpg", "a.png"], "a.json", "gone.jpg"),
        (["x/a.jpg", "y/a.jpg"], "a.json", ""),
        (["x/images/a.jpg", "y/images/a.jpg"], "z/labels/a.json", "../images/a.jpg"),
        (["x/b.jpg", "y/b.jpg"], "a.json", "b.jpg"),
    ],
)
def test_equally_near_images_are_an_error_and_no_guess(
    tmp_path: Path, names: list[str], annotation: str, image_path: str
) -> None:
    files = lay_out(tmp_path, *names)
    with pytest.raises(AnnotationError, match="2 images have this stem") as caught:
        find_image(annotation, image_path, files)
    assert names[0] in caught.value.reason


def test_error_of_a_json_without_image_says_what_to_add(tmp_path: Path) -> None:
    files = lay_out(tmp_path, "images/b.jpg", "a.json")
    with pytest.raises(AnnotationError, match=r"'c\.jpg' points nowhere.* named a\.\*; add"):
        find_image("a.json", "c.jpg", files)
    with pytest.raises(AnnotationError, match="no imagePath"):
        find_image("a.json", "", files)


def test_links_out_of_the_folder_are_skipped_and_links_within_are_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    lay_out(secret, "a.json", "a.jpg")
    root = tmp_path / "data"
    lay_out(root, "real.jpg", "real.json")
    (root / "a.json").symlink_to(secret / "a.json")
    (root / "a.jpg").symlink_to("../secret/a.jpg")
    (root / "folder").symlink_to(secret)
    (root / "dead.jpg").symlink_to("gone.jpg")
    (root / "link.jpg").symlink_to("real.jpg")
    files = find_files(root)
    assert files.annotations == ["real.json"]
    assert files.images == ["link.jpg", "real.jpg"]
    skipped = {name: problem.reason for name, problem in files.skipped}
    assert skipped.keys() == {"a.json", "a.jpg", "folder", "dead.jpg"}, "nothing drops in silence"
    assert "is a link out of the dataset's folder" in skipped["a.json"]
    assert "is a linked folder" in skipped["folder"]
    assert "is a link to nowhere" in skipped["dead.jpg"]


def test_folder_with_the_name_of_a_neighbour_in_front_is_still_outside(tmp_path: Path) -> None:
    lay_out(tmp_path / "data-private", "a.jpg")
    root = tmp_path / "data"
    root.mkdir()
    (root / "a.jpg").symlink_to(tmp_path / "data-private" / "a.jpg")
    assert find_files(root).images == []


def test_root_that_is_itself_a_link_is_read(tmp_path: Path) -> None:
    lay_out(tmp_path / "real", "a.json", "a.jpg")
    (tmp_path / "link").symlink_to("real")
    files = find_files(tmp_path / "link")
    assert (files.annotations, files.images) == (["a.json"], ["a.jpg"])


def test_pipe_does_not_hang_the_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert find_files(tmp_path).annotations == []


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    """macOS leaves `._a.jpg` beside every file; editors leave `.ipynb_checkpoints`."""
    files = lay_out(
        tmp_path, "a.json", "a.jpg", "._a.jpg", "._a.json", ".cache/b.jpg", "x/.old/c.json"
    )
    assert (files.annotations, files.images) == (["a.json"], ["a.jpg"])


def test_file_name_that_is_not_utf_8_is_skipped_and_named(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    files = find_files(tmp_path)
    assert files.images == []
    ((name, problem),) = files.skipped
    assert "caf" in name
    assert "is not UTF-8; rename it" in problem.reason
