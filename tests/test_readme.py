"""README commands reach their stage, shipped configs load; test_docs.py checks the rest."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from samray import cli
from samray.config import ServeConfig, load_config
from samray.errors import SamrayError

ROOT = Path(__file__).parents[1]
BLOCKS = "\n".join(
    block
    for page in ("README.md", "CONTRIBUTING.md")
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), flags=re.S | re.M)
)
COMMANDS = re.findall(r"^samray [a-z].*$", BLOCKS, flags=re.M)


def test_the_readme_shows_the_way_from_photos_to_masks():
    stages = [shlex.split(command)[1] for command in COMMANDS]
    assert stages == ["prepare", "train", "evaluate", "predict"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_reaches_its_stage(command, monkeypatch, tmp_path, capsys):
    """The stage itself is stopped by a missing folder, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    status = cli.main(shlex.split(command)[1:])
    message = capsys.readouterr().err
    assert status == cli.EXIT_MISTAKE
    assert re.search(r"does not exist|cannot be read", message), message
    assert not list(tmp_path.iterdir())


OTHERS = ("serve", "cluster")  # Ray's own
RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.name)
def test_shipped_configs_load(path):
    try:
        load_config(path)
    except SamrayError as exc:
        pytest.fail(str(exc))


def test_the_config_of_serve_deploy_is_ray_serves_and_ours():
    from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert ServeConfig.model_validate(application.args) == ServeConfig()
    module, function = application.import_path.split(":")
    assert module.startswith("samray."), "nodes have what pip installed, not this folder"
    assert callable(getattr(importlib.import_module(module), function))


def test_serve_build_lists_every_deployment(tmp_path):
    command = [Path(sys.executable).with_name("serve"), "build", "serve.app:app"]
    done = subprocess.run(
        [*command, "-o", tmp_path / "built.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (application,) = yaml.safe_load((tmp_path / "built.yaml").read_text())["applications"]
    names = {deployment["name"] for deployment in application["deployments"]}
    assert names == {"Ingress", "Decoder", "Encoder", "ImageVault"}


def test_make_targets_that_the_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([a-z0-9-]+)", BLOCKS, flags=re.M)
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile
