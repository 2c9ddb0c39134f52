"""Write docs/settings.md from samray/config.py: `python docs/settings.py`.

tests/test_docs.py fails when the page is not what this script writes.
"""

import textwrap
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from samray.config import Config

PAGE = Path(__file__).with_name("settings.md")
INTRO = """# Settings

Generated from `samray/config.py` by `python docs/settings.py`; change the code, not this page.

One YAML file describes one run. It has one section per stage or concern:

```yaml
model: {type: vit_b}
train:
  data_dir: prepared
  output_dir: run
  num_epochs: 20
  learning_rate: 1.0e-4
```

Values come from four places; a later one overrides an earlier one:

1. the defaults below;
2. the file given with `--config`;
3. words of the form `section.key=value` on the command line, the value read as YAML;
4. the options of the command line, listed by `samray STAGE --help`.

```
samray train --data-dir prepared --output-dir run --config configs/vit_b.yaml train.seed=1
```

An unknown name is an error that lists the valid ones. `prepare`, `train`, `pretrain`, `tune` and
`evaluate` save their settings as `config.yaml` in the output folder. YAML reads `1e-5` as text:
samray converts it in a numeric setting and refuses it in `tune.search_space`; `1.0e-5` is a number
everywhere. "unset" means that a setting has no value; `null` in YAML unsets it.

"""
BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
TYPES = {str: "text", int: "integer", float: "number", bool: "true or false"}


def page() -> str:
    """Return the content of docs/settings.md."""
    sections = Config.model_fields.items()
    contents = ", ".join(f"[{name}](#{name})" for name, _ in sections)
    parts = [_section(name, _model(field)) for name, field in sections]
    return INTRO + textwrap.fill(f"Sections: {contents}.", 120) + "\n\n" + "\n".join(parts)


def _section(name: str, model: type[BaseModel]) -> str:
    lines = [f"## {name}", "", _one_line(model.__doc__ or ""), ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    lines += _rows(name, model)
    return "\n".join(lines) + "\n"


def _rows(path: str, model: type[BaseModel]) -> list[str]:
    rows = []
    for key, field in model.model_fields.items():
        dotted = f"{path}.{key}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(dotted, field.annotation)
            continue
        kind = ", ".join([_kind(field.annotation), *_bounds(field)])
        cells = (f"`{dotted}`", kind, _default(field), _one_line(field.description or ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _model(field: FieldInfo) -> type[BaseModel]:
    assert isinstance(field.annotation, type)
    assert issubclass(field.annotation, BaseModel)
    return field.annotation


def _kind(annotation: Any) -> str:
    """The type in words; that a setting may be unset is said by its default."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(kind) for kind in arguments if kind is not type(None))
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list: {_kind(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    return "mapping" if origin is dict else TYPES[annotation]


def _bounds(field: FieldInfo) -> list[str]:
    return [
        text.format(f"{getattr(limit, name):g}")
        for limit in field.metadata
        for name, text in BOUNDS.items()
        if getattr(limit, name, None) is not None
    ]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "unset"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
