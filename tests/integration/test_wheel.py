"""The wheel: its content, and that it works outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path, PurePosixPath

import pytest

import samray

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".*", "demo", "runs", "build", "dist", "*.egg-info", "__pycache__", "node_modules"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout, as a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    assert (folder / "source" / "tests").is_dir()  # must be left out
    assert (folder / "source" / "jobs").is_dir()
    words = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    build = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        cwd=folder / "source",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert build.returncode == 0, build.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_unpacked(unpacked: Path, cwd: Path, program: str, *words: str):
    """Run a program that imports from the unpacked wheel, not the checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(unpacked)
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {PurePosixPath(name).parts[0] for name in names}
    assert tops == {"samray", f"samray-{samray.__version__}.dist-info"}
    source = wheel.parent / "source"
    modules = {p.relative_to(source).as_posix() for p in (source / "samray").rglob("*.py")}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == modules
    assert {"samray/py.typed", "samray/templates/report.html"} <= set(names)
    assert "samray/templates/dataset_report.html" in names
    page = {p.relative_to(source).as_posix() for p in source.glob("samray/templates/endpoint*/*")}
    assert page | {"samray/templates/endpoint.html"} <= set(names)
    assert page
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_metadata_of_the_wheel(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    metadata = message_from_bytes((info / "METADATA").read_bytes())
    assert (metadata["Name"], metadata["Version"]) == ("samray", samray.__version__)
    required = [text for text in metadata.get_all("Requires-Dist") if "extra ==" not in text]
    assert any(text.startswith("ray[") and "==" in text for text in required)
    assert not any(text.startswith(("pytest", "ruff", "mypy")) for text in required)
    assert "samray = samray.cli:main" in (info / "entry_points.txt").read_text()


def test_the_unpacked_wheel_works_in_an_empty_folder(unpacked, tmp_path):
    program = (
        "import sys, samray; from samray.cli import main; "
        "print(samray.__file__, file=sys.stderr); sys.exit(main(sys.argv[1:]))"
    )
    drawn = run_unpacked(unpacked, tmp_path, program, "sample-data", "photos", "--num-images", "2")
    assert drawn.returncode == 0, drawn.stderr
    assert Path(drawn.stderr.splitlines()[0]) == unpacked / "samray" / "__init__.py"
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("sample_*"))
    assert files == [
        "photos/annotations/sample_00000.json",
        "photos/annotations/sample_00001.json",
        "photos/images/sample_00000.jpg",
        "photos/images/sample_00001.jpg",
    ]
    shown = run_unpacked(unpacked, tmp_path, program, "inspect", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "--point-selection" in shown.stdout
    version = run_unpacked(unpacked, tmp_path, program, "--version")
    assert version.stdout.split() == ["samray", samray.__version__]


def test_every_module_and_the_template_come_from_the_wheel(unpacked, tmp_path):
    """No module needs a file or package of the checkout."""
    program = """
import importlib, pkgutil
from importlib import resources
import samray
for found in pkgutil.walk_packages(samray.__path__, "samray."):
    print(importlib.import_module(found.name).__file__)
text = (resources.files("samray") / "templates" / "report.html").read_text()
assert "<html" in text
"""
    result = run_unpacked(unpacked, tmp_path, program)
    assert result.returncode == 0, result.stderr
    paths = {Path(line) for line in result.stdout.splitlines()}
    assert paths == set((unpacked / "samray").rglob("*.py")) - {unpacked / "samray/__init__.py"}
