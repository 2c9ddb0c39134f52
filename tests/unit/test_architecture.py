"""The drawn house is the built one: imports go one way, and Ray stays in its group."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = re.findall(r"^\| (`[^|]+\.py`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.M)
ORDER = [name for cell in TABLE for name in re.findall(r"`(\w+)\.py`", cell)]
WITH_RAY = {
    "cluster",
    "prepare",
    "encode",
    "train",
    "tune",
    "evaluate",
    "replicas",
    "endpoint",
    "batch_predict",
}


def imports_of(module):
    """Names of samray modules and top-level packages that a module imports anywhere."""
    own, others = set(), set()
    for node in ast.walk(ast.parse((ROOT / "samray" / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "samray":
            own |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("samray."):
            own.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.split(".")[0])
    return own, others


def test_the_table_lists_every_file():
    files = {path.stem for path in (ROOT / "samray").glob("*.py")} - {"__init__"}
    assert set(ORDER) == files
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_files_above_it(module):
    own, others = imports_of(module)
    below = {name for name in own if ORDER.index(name) >= ORDER.index(module)}
    assert not below
    if module not in WITH_RAY:
        assert "ray" not in others
