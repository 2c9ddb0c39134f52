"""Which files of a folder are read; never one outside of it, and none is left out in silence."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from cloudpathlib import S3Path

from samray.data.discovery import RawFiles, find_files


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


@pytest.mark.parametrize(
    "extension",
    [
        "jpg",
        "jpeg",
        "png",
        "bmp",
        "tif",
        "tiff",
        "webp",
        "JPeG",
        "jfif",
        "jpe",
        "JFIF",
    ],
)
def test_every_image_extension_is_seen_in_any_case(tmp_path: Path, extension: str) -> None:
    assert lay_out(tmp_path, f"a.{extension}").images == [f"a.{extension}"]


def test_files_that_are_no_part_of_the_dataset_are_left_out(tmp_path: Path) -> None:
    """A split file inside it was rejected as another kind of JSON, and --strict failed on it."""
    root, outside = tmp_path / "data", tmp_path / "splits.json"
    outside.write_text("{}")
    lay_out(root, "a.json", "a.jpg", "map.json", "b/splits.json", "splits.json")
    (root / "link.json").symlink_to(outside)
    (root / "inner.json").symlink_to("map.json")
    (tmp_path / "mount").symlink_to(root)
    given = [root / "link.json", root / "inner.json", tmp_path / "mount/b/splits.json", outside]
    files = find_files(root, None, [*given, S3Path("s3://bucket/splits.json")])
    assert files.annotations == ["a.json", "splits.json"]
    assert set(files.stamps) == {"a.json", "a.jpg", "splits.json"}
    assert files.skipped == []


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


def test_pictures_of_other_formats_are_known_but_not_read(tmp_path: Path) -> None:
    files = lay_out(tmp_path, "a.HEIC", "x/b.gif", "c.png", "d.txt")
    assert (files.images, files.unread) == (["c.png"], ["a.HEIC", "x/b.gif"])
    assert "a.HEIC" not in files.stamps
    assert files.unusable["x/b.gif"].startswith("is there, but samray does not read .gif; convert")


def test_links_into_the_link_root_are_followed_once(tmp_path: Path) -> None:
    store, root = tmp_path / "store", tmp_path / "data"
    lay_out(store, "blobs/1f", "folder/b.json", "folder/b.jpg")
    lay_out(tmp_path / "other", "c.jpg")
    lay_out(root, "real.jpg")
    (root / "a.jpg").symlink_to(store / "blobs/1f")
    (root / "folder").symlink_to(store / "folder")
    (root / "folder again").symlink_to(store / "folder")
    (store / "folder" / "circle").symlink_to(store)
    (root / "c.jpg").symlink_to(tmp_path / "other/c.jpg")
    files = find_files(root, store)
    assert files.images == ["a.jpg", "folder/b.jpg", "real.jpg"]
    assert files.annotations == ["folder/b.json"]
    skipped = {name: problem.field for name, problem in files.skipped}
    assert skipped["c.jpg"] == "file"
    assert skipped["folder again"] == "folder"
    assert find_files(root).images == ["real.jpg"]
    assert "prepare.link_root" in find_files(root).unusable["a.jpg"]


def test_folder_that_may_not_be_read_is_listed() -> None:
    """As another user if this one is root, whom no permission stops."""
    root = Path(tempfile.mkdtemp())
    try:
        lay_out(root, "a.json", "locked/b.json")
        root.chmod(0o755)
        (root / "locked").chmod(0)
        uid = os.geteuid()
        if uid == 0:
            os.seteuid(65534)
        try:
            files = find_files(root)
        finally:
            os.seteuid(uid)
        assert files.annotations == ["a.json"]
        ((name, problem),) = files.skipped
        assert (name, problem.field) == ("locked", "folder")
        assert "cannot be read (Permission denied)" in problem.reason
    finally:
        (root / "locked").chmod(0o700)
        shutil.rmtree(root)
