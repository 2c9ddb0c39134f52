"""`--label-map`: JSON or YAML that maps labels to labels; where `--output-dir` may lie."""

import json
from pathlib import Path

import pytest

from samray.config import PrepareConfig, load_config
from samray.data.prepare import _read_label_map, prepare
from samray.errors import ConfigError, SamrayError


def read(folder: Path, content: bytes) -> dict[str, str | None]:
    path = folder / "map"
    path.write_bytes(content)
    return _read_label_map(PrepareConfig(label_map=str(path)))


@pytest.mark.parametrize(
    "content",
    [
        b'{\n\t"\\ud83d\\ude00": "smile ",\n\t"b": null\n}\n',
        b'\xef\xbb\xbf{"\\ud83d\\ude00": "smile", "b": null}',
        "\N{GRINNING FACE}: smile\nb: null\n".encode(),
        "\ufeff\N{GRINNING FACE}: smile\nb:\n".encode(),
        "{\N{GRINNING FACE}: smile, b: ~}".encode("utf-16"),
    ],
    ids=["json", "json-with-byte-order-mark", "yaml", "yaml-with-byte-order-mark", "yaml-utf-16"],
)
def test_json_and_yaml_are_read(content: bytes, tmp_path: Path) -> None:
    """As YAML, JSON with tabs was refused, and of escaped letters no label was found."""
    assert read(tmp_path, content) == {"\N{GRINNING FACE}": "smile", "b": None}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"2024-99-99: x", "cannot be read as JSON or YAML (month must be in 1..12)"),
        (b"[" * 20_000, "cannot be read as JSON or YAML"),
        (b"\xff\xfe\x00", "cannot be read as JSON or YAML"),
        (b'{"a": "\\ud83d"}', "gives 'a' a label that is not Unicode text ('\\ud83d')"),
        (b'{"a": 1}', "must map texts to texts"),
        (b"", "must map texts to texts"),
    ],
    ids=["no-such-date", "deep", "binary", "half-a-letter", "number", "empty"],
)
def test_what_is_no_label_map_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"--label-map: {tmp_path / 'map'} ")
    assert said in str(caught.value)


@pytest.mark.parametrize("below", ["x", "data/deep/x"])
def test_a_folder_inside_a_prepared_dataset_is_refused(below: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    outer = tmp_path / "prepared"
    outer.mkdir()
    manifest = {"format": 3, "samray_version": "0.1.0"}
    (outer / "manifest.json").write_text(json.dumps(manifest))
    words = [f"prepare.data_dir={tmp_path / 'photos'}", f"prepare.output_dir={outer / below}"]
    with pytest.raises(ConfigError, match=rf"inside the prepared dataset {outer}; .* beside it"):
        prepare(load_config(None, words))
    assert [path.name for path in outer.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "content", ["{}", '{"format": 1, "name": "a page"}', "[1]", "{", "[" * 99_999]
)
def test_another_manifest_above_the_folder_is_no_dataset(content: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "manifest.json").write_text(content)
    words = [f"prepare.data_dir={tmp_path / 'photos'}", f"prepare.output_dir={tmp_path / 'out'}"]
    with pytest.raises(SamrayError, match="no LabelMe JSON or COCO file"):
        prepare(load_config(None, words))
