"""Which JSON refers to which image, in all known layouts; never the image of another folder."""

from pathlib import Path

import pytest

from samray.data.discovery import RawFiles, find_files
from samray.data.pairing import find_by_stem, find_image, find_listed_image
from samray.errors import AnnotationError


def lay_out(root: Path, *names: str, coco: tuple[str, ...] = ()) -> RawFiles:
    for name in (*names, *coco):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    files = find_files(root)
    files.coco += coco
    return files


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
        (["a.jpg", "b.jpg"], "a.json", "gone/c.jpg", "a.jpg"),
        (["a.jpg"], "a.json", "", "a.jpg"),
        (["a.b.jpg", "a.jpg"], "a.b.json", "", "a.b.jpg"),
        # The stem of imagePath, as the last resort.
        (["images/b.jpg"], "annotations/a.json", "gone/b.jpg", "images/b.jpg"),
        # A path of the annotator's machine, out of the folder: only its stem is used.
        (["images/a.jpg"], "annotations/a.json", "/home/ann/a.jpg", "images/a.jpg"),
        (["images/a.jpg"], "annotations/a.json", "../../../ann/a.jpg", "images/a.jpg"),
        (["images/a.jpg"], "annotations/a.json", "C:/Users/ann/a.jpg", "images/a.jpg"),
        (["cam/images/a.jpg"], "cam/annotations/a.json", "C:/ann/cam/a.jpg", "cam/images/a.jpg"),
        # Another image has the stem of imagePath, but is not the one that it names.
        (["x/images/a.jpg", "y/images/b.jpg"], "x/labels/a.json", "b.jpg", "x/images/a.jpg"),
        (["x/a.jpg", "x/b.jpg"], "x/a.json", "../y/b.jpg", "x/a.jpg"),
        # Written on a file system without case.
        (["Images/A.JPG"], "annotations/b.json", "../images/a.jpg", "Images/A.JPG"),
        (["IMG_1.JPG"], "img_1.json", "", "IMG_1.JPG"),
        (["a.jpg", "A.jpg"], "A.json", "", "A.jpg"),
        # Accents as macOS stores them.
        (["u\u0308.jpg"], "x.json", "\u00fc.jpg", "u\u0308.jpg"),
        (["images/u\u0308.jpg"], "labels/\u00fc.json", "", "images/u\u0308.jpg"),
        # Parallel folders by their names, whatever else is in them.
        (["train/images/a.jpg"], "train/labels/a.json", "a.jpg", "train/images/a.jpg"),
        (["images/train/a.jpg"], "labels/train/a.json", "a.jpg", "images/train/a.jpg"),
        (["imagesTr/a.png"], "labelsTr/a.json", "a.png", "imagesTr/a.png"),
        (["JPEGImages/a.jpg"], "Annotations/a.json", "a.jpg", "JPEGImages/a.jpg"),
        (["set/img_1/a.jpg", "set/img_2/a.jpg"], "set/ann_2/a.json", "a.jpg", "set/img_2/a.jpg"),
        (["images/a.jpg", "depth/a.jpg"], "annotations/a.json", "a.jpg", "images/a.jpg"),
        # An old folder in imagePath, where no other one can be meant.
        (["cam1/images/0.png"], "cam1/annotations/0.json", "../stale/0.png", "cam1/images/0.png"),
        (["images/y/0.png"], "labels/y/0.json", "old/0.png", "images/y/0.png"),
        (["images/y/0.png"], "labels/y/0.json", "C:/Users/ann/pics/0.png", "images/y/0.png"),
        (["x/images/0.png"], "x/labels/0.json", "/home/ann/pics/0.png", "x/images/0.png"),
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
    [
        *("/etc/passwd", "../../../../../../etc/passwd", "/home/ann/b.jpg", "../../b.jpg", "../.."),
        *("C:/pics/b.jpg", "//server/pics/b.jpg"),
    ],
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
        (["images/a.jpg", "imgs/a.jpg"], "annotations/a.json", ""),
        (["b.jpg", "b.png"], "a.json", "old/b.jpg"),
    ],
)
def test_equally_near_images_are_an_error_and_no_guess(
    tmp_path: Path, names: list[str], annotation: str, image_path: str
) -> None:
    files = lay_out(tmp_path, *names)
    with pytest.raises(AnnotationError, match="2 images have this stem") as caught:
        find_image(annotation, image_path, files)
    assert names[0] in caught.value.reason


@pytest.mark.parametrize(
    ("names", "annotation", "image_path"),
    [
        (["images/2.jpg", "images/1.jpg"], "annotations/2.json", "1.jpg"),
        (["images/2.png", "images/1.png"], "annotations/2.json", "../old/1.jpg"),
        (["2.jpg", "1.jpg"], "2.json", "gone/1.jpg"),
        (["x/2.jpg", "x/1.jpg"], "x/2.json", "../1.jpg"),
    ],
)
def test_json_and_image_path_with_the_names_of_two_images_are_an_error(
    tmp_path: Path, names: list[str], annotation: str, image_path: str
) -> None:
    """Beside the images, the same JSON is that of the image which imagePath names."""
    files = lay_out(tmp_path, *names, annotation)
    with pytest.raises(AnnotationError, match=r"points nowhere .* correct imagePath") as caught:
        find_image(annotation, image_path, files)
    assert caught.value.field == "imagePath"
    assert all(text in caught.value.reason for text in (*names, image_path))


def test_error_of_a_json_without_image_says_what_to_add(tmp_path: Path) -> None:
    files = lay_out(tmp_path, "images/b.jpg", "a.json")
    with pytest.raises(AnnotationError, match=r"'c\.jpg' points nowhere.* named a\.\*; add"):
        find_image("a.json", "c.jpg", files)
    with pytest.raises(AnnotationError, match="no imagePath"):
        find_image("a.json", "", files)


@pytest.mark.parametrize(
    ("names", "annotation", "image_path"),
    [
        # Frames of the same name; the JSON's own picture was not copied.
        (["c_1/2.png", "c_1/2.json", "c_2/1.png", "c_2/1.json"], "c_1/1.json", "1.png"),
        (["c_1/2.png", "c_2/1.png"], "c_1/1.json", "1.png"),  # the other one is not annotated
        (["c_2/1.png"], "c_1/1.json", "1.png"),
        (["c_2/1.png"], "c_1/1.json", ""),
        (["c_2/1.png"], "c_1/1.json", "D:/videos/c_1/1.png"),
        (["c_2/1.png"], "c_1/1.json", "/videos/c_1/1.png"),
        (["b/1.png"], "a/1.json", "1.png"),
        (["night/1.png", "night/2.png", "rain/1.png"], "day/1.json", "1.png"),
        (["val/1.png"], "train/1.json", "1.png"),
        (["images/val/1.png"], "images/train/1.json", "1.png"),
        (["val/images/1.png"], "train/labels/1.json", "1.png"),
        (["images_2/1.png"], "labels_1/1.json", "1.png"),
        (["images_2/1.png", "images_1/2.png"], "labels_1/1.json", "1.png"),
        (["old/1.png"], "1.json", "1.png"),
        (["1.png"], "new/1.json", "1.png"),
        (["a/deep/1.png"], "b/1.json", "gone/1.png"),
        # The other picture has a JSON of its own beside it.
        (["images/1.png", "images/1.json"], "annotations/1.json", "1.png"),
        (["b.png", "b.json"], "a.json", "old/b.png"),
    ],
    ids=str,
)
def test_the_picture_of_another_json_is_never_taken(
    tmp_path: Path, names: list[str], annotation: str, image_path: str
) -> None:
    files = lay_out(tmp_path, *names, annotation)
    with pytest.raises(AnnotationError, match=r"is not used|add the image|not followed") as caught:
        find_image(annotation, image_path, files)
    assert caught.value.field == "imagePath"
    assert find_by_stem(annotation, Path(annotation).stem, files) is None, "nor claimed"


@pytest.mark.parametrize(
    ("names", "annotation", "image_path"),
    [
        (["dogs/1.png"], "annotations/cats_1.json", "../cats/1.png"),
        (["dogs/1.png"], "annotations/1.json", "../cats/1.png"),
        (["set/dogs/1.png"], "set/annotations/1.json", "../cats/1.png"),
        (["images/dogs/1.png"], "annotations/dogs/1.json", "../../images/cats/1.png"),
        (["dogs/1.png"], "annotations/1.json", "/home/ann/cats/1.png"),
        (["dogs/1.png"], "annotations/1.json", "C:/Users/ann/cats/1.png"),
    ],
    ids=str,
)
def test_the_picture_of_another_folder_than_image_path_names_is_never_taken(
    tmp_path: Path, names: list[str], annotation: str, image_path: str
) -> None:
    files = lay_out(tmp_path, *names, annotation)
    with pytest.raises(AnnotationError, match=r"is not used|add the image"):
        find_image(annotation, image_path, files)


def test_error_names_the_picture_that_is_not_used(tmp_path: Path) -> None:
    files = lay_out(tmp_path, "clip_01/1.json", "clip_02/1.png")
    with pytest.raises(AnnotationError, match=r"clip_02/1\.png may be another picture and is not"):
        find_image("clip_01/1.json", "1.png", files)


@pytest.mark.parametrize("image_path", ["a.heic", "photo/a.HEIC", ""])
def test_a_picture_that_is_not_read_is_named_and_no_other_one_taken(
    tmp_path: Path, image_path: str
) -> None:
    files = lay_out(tmp_path, "labels/a.json", "labels/a.heic", "images/a.png")
    with pytest.raises(AnnotationError, match=r"a\.heic is there.* not read \.heic; convert"):
        find_image("labels/a.json", image_path, files)
    (tmp_path / "labels/a.png").write_bytes(b"")  # converted
    assert find_image("labels/a.json", image_path, find_files(tmp_path)) == "labels/a.png"


def test_a_picture_that_is_a_link_out_of_the_folder_is_named(tmp_path: Path) -> None:
    files = lay_out(tmp_path / "data", "a.json", "b/a.png")
    (tmp_path / "store.png").write_bytes(b"")
    (tmp_path / "data/a.png").symlink_to(tmp_path / "store.png")
    files = find_files(tmp_path / "data")
    with pytest.raises(AnnotationError, match=r"a\.png is a link out of the dataset's folder"):
        find_image("a.json", "a.png", files)


@pytest.mark.parametrize(
    ("names", "coco", "file_name", "expected"),
    [
        (["a.png"], "c.json", "a.png", "a.png"),
        (["A.PNG"], "c.json", "a.png", "A.PNG"),
        (["train/a.png", "valid/a.png"], "train/_annotations.coco.json", "a.png", "train/a.png"),
        (["images/a.png"], "c.json", "a.png", "images/a.png"),
        (["images/deep/a.png"], "c.json", "deep/a.png", "images/deep/a.png"),
        (["images/deep/A.png"], "c.json", "DEEP/a.png", "images/deep/A.png"),
        (["x/a.png", "y/a.png"], "c.json", "y/a.png", "y/a.png"),
        (["x/y/a.png", "z/a.png"], "c.json", "/home/ann/x/y/a.png", "x/y/a.png"),
        (["deep/er/a.png"], "c.json", "a.png", "deep/er/a.png"),
        (["images/a.png"], "c.json", "C:/Users/ann/a.png", "images/a.png"),
        (["images/a.png"], "c.json", "../../media/upload/1/a.png", "images/a.png"),
        (["images/default/a.png"], "annotations/instances_default.json", "a.png",
         "images/default/a.png"),
        (["images/a.png"], "annotations/instances_default.json", "a.png", "images/a.png"),
        (["train2017/a.jpg", "val2017/a.jpg"], "annotations/instances_train2017.json", "a.jpg",
         "train2017/a.jpg"),
        (["images/train/a.jpg", "images/val/a.jpg"], "annotations/val.json", "a.jpg",
         "images/val/a.jpg"),
        (["images/train/a.jpg", "images/val/a.jpg"], "annotations/train/c.json", "a.jpg",
         "images/train/a.jpg"),
        (["set/images/a.png"], "set/export/result.json", "a.png", "set/images/a.png"),
        (["a/images/1.png", "b/images/1.png"], "b/annotations/c.json", "1.png", "b/images/1.png"),
        (["images/a.png", "images/x/a.png"], "c.json", "a.png", "images/a.png"),
        (["images/a.png", "images/x/a.png"], "c.json", "x/a.png", "images/x/a.png"),
        (["images/train/a.png"], "test.json", "train/a.png", "images/train/a.png"),
        (["images/cats/a.png"], "c.json", "/home/ann/cats/a.png", "images/cats/a.png"),
        (["cats/images/a.png"], "c.json", "cats/a.png", "cats/images/a.png"),
        (["images/val/a.png"], "annotations/val.json", "/data/x/a.png", "images/val/a.png"),
        # The path is there as it is named, whatever folder the JSON's own name names.
        (["a/1.png", "b/1.png"], "annotations/a.json", "b/1.png", "b/1.png"),
        (["train/1.png", "val/1.png"], "annotations/instances_train.json", "val/1.png",
         "val/1.png"),
        (["set/a/1.png", "set/B/1.png"], "set/annotations/a.json", "b/1.png", "set/B/1.png"),
        (["images/1.png", "images/train/1.png"], "annotations/instances_train.json",
         "images/1.png", "images/1.png"),
        (["images/1.png", "images/train/1.png"], "annotations/instances_train.json",
         "train/1.png", "images/train/1.png"),
    ],
    ids=str,
)  # fmt: skip
def test_listed_image_is_found_in_its_data_set(
    tmp_path: Path, names: list[str], coco: str, file_name: str, expected: str
) -> None:
    files = lay_out(tmp_path, *names, coco=(coco,))
    assert find_listed_image(coco, file_name, files) == expected


@pytest.mark.parametrize(
    ("names", "coco", "others", "file_name"),
    [
        (["b/1.png"], "a/instances.json", ["b/instances.json"], "1.png"),
        (["b/1.png"], "a/instances.json", [], "1.png"),  # not annotated
        (["a/2.png", "b/1.png"], "a/instances.json", [], "1.png"),
        (["b/1.png"], "instances.json", ["b/instances.json"], "1.png"),
        (["b/images/1.png"], "c.json", ["b/annotations/c.json"], "1.png"),
        (["b/images/1.png"], "a/annotations/c.json", ["b/annotations/c.json"], "1.png"),
        (["val2017/1.png"], "annotations/instances_train2017.json", [], "1.png"),
        (["images/b/1.png"], "annotations/a.json", ["annotations/b.json"], "1.png"),
        (["images/b/1.png", "images/a/2.png"], "annotations/a.json", [], "1.png"),
        (["valid/1.png"], "train/_annotations.coco.json", [], "1.png"),
        (["c_2/1.png", "c_1/2.png"], "all.json", [], "c_1/1.png"),
        (["c_2/1.png"], "all.json", [], "c_1/1.png"),
        (["c_2/1.png"], "all.json", [], "/home/ann/c_1/1.png"),
        (["1.png", "1.json"], "all.json", [], "old/1.png"),  # has a LabelMe file
        # The name's folder is not here.
        (["camera_right/1.png"], "c.json", [], "camera_left/1.png"),
        (["images/rear/1.png"], "annotations/c.json", [], "front/1.png"),
        (["dogs/1.png"], "c.json", [], "cats/1.png"),
        (["right/day_1/1.png"], "c.json", [], "left/day_1/1.png"),
        (["right/images/1.png"], "c.json", [], "left/images/1.png"),
        (["right/1.png"], "c.json", [], "/home/ann/left/1.png"),
        # Named exactly, and has a LabelMe file.
        (["b/1.png", "b/1.json", "a/1.png"], "annotations/a.json", [], "b/1.png"),
    ],
    ids=str,
)
def test_the_picture_of_another_data_set_is_never_taken(
    tmp_path: Path, names: list[str], coco: str, others: list[str], file_name: str
) -> None:
    files = lay_out(tmp_path, *names, coco=(coco, *others))
    with pytest.raises(AnnotationError, match=r"there is no image .*add it") as caught:
        find_listed_image(coco, file_name, files)
    assert caught.value.field == "file_name"


def test_a_json_beside_a_listed_image_that_keeps_it_is_named(tmp_path: Path) -> None:
    files = lay_out(tmp_path, "images/1.png", "images/1.json", coco=("c.json",))
    with pytest.raises(AnnotationError, match=r"images/1\.png belongs to the 1\.json beside it"):
        find_listed_image("c.json", "1.png", files)


@pytest.mark.parametrize(
    ("names", "coco", "file_name"),
    [
        (["x/a.png", "y/a.png"], "c.json", "a.png"),
        # Relative to images/, or to the folder that the JSON's own name names.
        (["images/1.png", "images/train/1.png"], "annotations/instances_train.json", "1.png"),
        (["1.png", "train/1.png"], "annotations/instances_train.json", "1.png"),
        (["b/1.png", "a/b/1.png"], "annotations/a.json", "b/1.png"),
        # Relative to the data set, or to images/ in it.
        (["b/1.png", "images/b/1.png"], "annotations/c.json", "b/1.png"),
    ],
    ids=str,
)
def test_listed_image_that_may_be_several_is_refused(
    tmp_path: Path, names: list[str], coco: str, file_name: str
) -> None:
    files = lay_out(tmp_path, *names, coco=(coco,))
    with pytest.raises(AnnotationError, match="may be any of 2 images") as caught:
        find_listed_image(coco, file_name, files)
    assert all(name in caught.value.reason for name in names)
    advice = caught.value.reason.rpartition(" ")[2]
    assert find_listed_image(coco, advice, files) in names
