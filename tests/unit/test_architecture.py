"""The map of the code is the code: imports go one way, and Ray stays where it belongs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A folder imports only from folders above it; `*` marks the files that may import Ray.
HOUSE = """
.           errors storage config runs charts tracking cluster* events* elastic*
geometry    shapes masks polygons images views tiles prompts frames drawing duplicates
data        annotation labelme coco discovery pairing outcome intake prepare* splits dataset \
            export sample_data
sam         model tiny attention adapt weights shipped checkpoint store losses embeddings \
            encode* decode
instances   decoder targets losses segment windows metrics choice saved
inspection  preview report problems
evaluation  metrics scoring objects clicks summary report evaluate* promote*
prediction  requests answers predictor segmentation collection search batch*
training    batches step optimizer loop finetuning dry_run* train* tune* search_space* \
            sweep_report pretraining scenes
serving     gate openapi listener ingress* app* replicas* vault* catalogue labelstudio \
            labelstudio_client labelme_client
"""
ROOMS = {line.split()[0]: line.split()[1:] for line in HOUSE.strip().splitlines()}
ORDER = list(ROOMS)
FILES = [(room, name) for room, names in ROOMS.items() for name in names]


def test_every_file_is_on_the_map():
    listed = {f"{room}/{name.rstrip('*')}.py".removeprefix("./") for room, name in FILES}
    listed |= {"cli.py", "stages.py", "benchmark.py", "__main__.py"}  # below all folders
    found = {
        path.relative_to(ROOT / "samray").as_posix() for path in (ROOT / "samray").rglob("*.py")
    }
    assert {name for name in found if not name.endswith("__init__.py")} == listed
    assert all(len(names) <= 12 for names in ROOMS.values())


@pytest.mark.parametrize(("room", "name"), FILES)
def test_a_file_imports_only_from_folders_above_its_own(room, name):
    for module in imports_of(ROOT / "samray" / room / f"{name.rstrip('*')}.py"):
        if module.split(".")[0] == "ray":
            assert name.endswith("*"), "imports Ray"
        if match := re.match(r"samray\.(\w+)(\.\w+)?", module):
            target = match[1] if match[1] in ROOMS else "."
            assert ORDER.index(target) <= ORDER.index(room), f"imports {module}"
            assert match[1] not in ("cli", "stages", "benchmark")


def test_no_two_files_import_one_another():
    """Inside a folder, too: what imports each other is one file."""
    graph = {}
    for room, name in FILES:
        stem = name.rstrip("*")
        own = f"samray.{stem}" if room == "." else f"samray.{room}.{stem}"
        graph[own] = {m for m in imports_of(ROOT / "samray" / room / f"{stem}.py") if m != own}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph


def test_the_map_in_the_docs_is_this_one():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = re.search(r"```\nsamray/\n(.*?)```", text, re.S)[1]
    assert drawn.split() == HOUSE.split()


def test_importing_samray_is_quick_and_loads_neither_torch_nor_ray():
    code = (
        "import sys, time; start = time.perf_counter(); import samray\n"
        "print(time.perf_counter() - start, 'torch' in sys.modules, 'ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, torch, ray = done.stdout.split()
    assert (torch, ray) == ("False", "False")
    assert float(seconds) < 0.3


def test_prepare_does_not_load_torch():
    code = "import sys, samray.data.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_of_the_python_api_is_there():
    import samray

    assert {name for name in samray.__all__ if name != "__version__"} <= set(dir(samray))
    for name in samray.__all__:
        assert getattr(samray, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = samray.no_such_name


def imports_of(path):
    """Full names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from samray import cluster` and `from samray.serving import labelstudio` name modules
            joined = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in joined if (ROOT / f"{name.replace('.', '/')}.py").is_file()}
            found |= modules or {node.module}
    return found
