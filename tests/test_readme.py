"""Shipped text stays true: every command in the README parses, and every file it names exists."""

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
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", README, flags=re.S | re.M))
INLINE = re.findall(r"`(samray [a-z-]+ --[^`]+)`", README)
COMMANDS = re.findall(
    r"^(?:samray [a-z]|ray job submit .*? -- python -m jobs\.).*$", BLOCKS, flags=re.M
)


def test_the_readme_shows_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS + INLINE)
def test_a_command_of_the_readme_is_understood(command, monkeypatch, capsys):
    """The parser and the config take it; the stage itself is stopped by a missing folder."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "ray":
        module = words[words.index("-m") + 1]
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
        words = [
            "samray",
            module.removeprefix("jobs.").replace("_", "-"),
            *words[words.index("-m") + 2 :],
        ]
    status = cli.main(words[1:])
    message = capsys.readouterr().err
    assert status == cli.EXIT_MISTAKE
    assert re.search(r"does not exist|cannot be read", message), message


RUNS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "serve")


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


def test_files_that_the_readme_names_exist():
    for name in re.findall(r"\(((?:docs|configs|samray)/[^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_make_targets_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", BLOCKS, flags=re.M):
        assert f"\n{target}:" in makefile
