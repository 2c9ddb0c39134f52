"""`samray inspect`: pictures of samples."""

import small_dataset

from samray.config import Config, InspectConfig
from samray.inspection.preview import inspect


def test_the_picture_of_an_image_with_a_long_name_has_a_shorter_one(tmp_path, monkeypatch):
    """With what is added, and the suffix of an unfinished file, it would have over 255 bytes."""
    names = {"train": [f"0{'n' * 235}.png"], "val": ["3.png"], "test": ["4.png"]}
    monkeypatch.setattr(small_dataset, "SPLITS", names)
    small_dataset.write_dataset(tmp_path / "data")
    folders = {"data_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    pictures = inspect(Config(inspect=InspectConfig(num_samples=3, **folders)))
    assert [path.name[:5] for path in pictures] == ["000_0", "001_3", "002_4"]
    assert all(path.is_file() for path in pictures)
