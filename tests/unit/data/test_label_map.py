"""`--label-map`: JSON or YAML that maps labels to labels."""

from pathlib import Path

import pytest

from samray.config import PrepareConfig
from samray.data.prepare import _read_label_map
from samray.errors import ConfigError


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
