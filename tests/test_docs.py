"""The pages under docs/ and the README stay true: links, commands, settings, code, messages."""

import ast
import contextlib
import io
import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest

from samray import cli
from samray.config import Config, load_config
from samray.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "samray" / "tiny_weights" / "MODEL_CARD.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
MAX_LINE = 120

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def parts(page):
    """(language, text) of each code block of a page, and (None, text) of what is between them."""
    found, language, lines = [], None, []
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            found.append((language, "\n".join(lines)))
            language, lines = (line.strip("` ") if language is None else None), []
        else:
            lines.append(line)
    return [*found, (language, "\n".join(lines))]


def blocks(page, language=""):
    """Code blocks of a page; those of commands have no language."""
    return [textwrap.dedent(text) for kind, text in parts(page) if kind == language]


def prose(page):
    """A page without its code blocks."""
    return "\n".join(text for kind, text in parts(page) if kind is None)


def commands():
    """(page, command) of each stage that a page runs, in a block or in backticks."""
    found = []
    for page in PAGES:
        text = "\n".join(blocks(page)).replace("\\\n", " ")
        lines = [line.strip() for line in text.splitlines()]
        lines += [code for code in re.findall(r"`([^`\n]+)`", prose(page)) if " --" in code]
        for line in lines:
            if match := re.match(r"(?:ray job submit .*?-- )?python -m jobs\.(\w+)(.*)", line):
                found.append((page.name, f"samray {match[1].replace('_', '-')}{match[2]}"))
            elif re.match(r"samray [a-z]", line) and not line.startswith("samray STAGE"):
                found.append((page.name, line))
    return found


COMMANDS = commands()


def test_the_pages_show_every_stage():
    shown = {shlex.split(command)[1] for _, command in COMMANDS}
    assert shown == set(cli.STAGES)


class _ParsedError(Exception):
    """Stops a command once its words are understood."""


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_is_understood(page, command, monkeypatch):
    """The real parser and the real config take it; the stage itself does not run."""

    def stop(path, words, options):
        load_config(ROOT / path if path else None, words, options)
        raise _ParsedError

    monkeypatch.setattr(cli, "load_config", stop)
    words = shlex.split(command, comments=True)[1:]
    with pytest.raises(SystemExit if "--help" in words else _ParsedError) as stopped:
        cli.main(words)
    assert stopped.type is _ParsedError or stopped.value.code == 0


def test_a_wrong_command_would_be_found(monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["train", "--no-such-option"])
    with pytest.raises(ConfigError):
        load_config(None, ["train.no_such_setting=1"])


@pages
def test_lines_are_short(page):
    lines = page.read_text().splitlines()
    generated = page.name == "settings.md"  # its tables are as wide as the settings' docstrings
    long = [
        number
        for number, line in enumerate(lines, 1)
        if len(line) > MAX_LINE and not (generated and line.startswith("|"))
    ]
    assert not long


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(path), target


def anchors(page):
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\(docs/(\w[\w-]*\.md)", (ROOT / "README.md").read_text()))
    assert linked == {page.name for page in PAGES if page.parent == ROOT / "docs"}


def settings():
    """Dotted paths of all sections and settings."""
    found = set()
    waiting = [("", Config)]
    while waiting:
        prefix, model = waiting.pop()
        for key, field in model.model_fields.items():
            found.add(f"{prefix}{key}")
            if hasattr(field.annotation, "model_fields"):
                waiting.append((f"{prefix}{key}.", field.annotation))
    return found


SECTIONS = "|".join(Config.model_fields)
NO_SETTINGS = {"app", "fit", "py", "json", "yaml", "html"}  # modules, functions, files


@pages
def test_settings_exist(page):
    known = settings()
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        for name in re.findall(rf"(?<![\w./-])(?:{SECTIONS})(?:\.[a-z_]+)+", code):
            if name.rpartition(".")[2] not in NO_SETTINGS:
                assert name in known, name


def test_settings_md_is_generated():
    """`python docs/settings.py` writes it."""
    script = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert (ROOT / "docs" / "settings.md").read_text() == script["page"]()


@pages
def test_options_in_prose_exist(page):
    known = {option for stage in cli.STAGES for option in options_of(stage)}
    others = {
        "--",
        "--user",
        "--head",
        "--working-dir",
        "--project-name",
        "--path",
        "--platform",
        "--env",
        "--data",
    }
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        if "benchmarks/" in code:  # a script with options of its own
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code):
            assert option in known | others, option


def options_of(stage):
    """The options that a stage's `--help` shows."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    return re.findall(r"(?<![\w-])--[a-z][a-z-]*", text.getvalue())


def test_yaml_blocks_are_configs(tmp_path):
    for page in PAGES:
        for number, block in enumerate(blocks(page, "yaml")):
            path = tmp_path / f"{page.stem}{number}.yaml"
            path.write_text(block)
            load_config(path)


@pages
def test_python_blocks_compile(page):
    import samray

    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "samray":
                assert node.attr in samray.__all__


def test_the_python_api_page_names_every_name():
    import samray

    text = (ROOT / "docs" / "python-api.md").read_text()
    for name in samray.__all__:
        assert name == "__version__" or f"samray.{name}" in text, name


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """What stands between values, shown as `...`, is a part of one text in the code."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    texts = code_texts()
    missing = []
    for cell in re.findall(r"^\| (`[^`]+`(?:, `[^`]+`)*) \|", page, flags=re.M):
        for message in re.findall(r"`([^`]+)`", cell):
            pieces = [p.strip(" :'[]") for p in re.split(r"\.\.\.+|\d+|: ", message)]
            for piece in pieces:
                if len(piece) > 5 and not any(piece in text for text in texts):
                    missing.append((message, piece))
    assert not missing


def code_texts():
    """All texts of the package; the values in an f-string are cut out."""
    found = {"Input should be", "unknown option"}  # pydantic's
    for path in (ROOT / "samray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.add("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found
