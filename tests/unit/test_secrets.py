"""Marked secrets: none is printed, saved, or sent along."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from samray import cli
from samray.config import Config, load_config
from samray.errors import AnnotationError, EndpointError, SamrayError, StorageError, without_secrets

ROOT = Path(__file__).parents[2]
MARK = "samray-marked-secret"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no URL: me@example.org and a?b", "no URL: me@example.org and a?b"),
        (f"http://me:{MARK}@host:80/a; try again", "http://host:80/a; try again"),
        (f"s3://KEY:{MARK}@bucket/a and http://{MARK}@b", "s3://bucket/a and http://b"),
        (f"(https://b.example/x.jpg?X-Amz-Signature={MARK}&b=1)", "(https://b.example/x.jpg)"),
        (f"'http://a?token={MARK}', http://b/?k={MARK}; no", "'http://a', http://b/; no"),
        ("s3://bucket/photos/a b@2x.jpg", "s3://bucket/photos/a b@2x.jpg"),
        ("GET /v1/images?model=NAME", "GET /v1/images?model=NAME"),
    ],
)
def test_addresses_are_shown_without_what_may_be_secret(text, shown):
    assert without_secrets(text) == shown


def errors_of(kind):
    for child in kind.__subclasses__():
        yield child
        yield from errors_of(child)


def test_no_error_shows_a_secret_of_an_address():
    """Of none of the kinds, and not after it has crossed processes."""
    kinds = [kind for kind in errors_of(SamrayError) if kind.__module__ == "samray.errors"]
    assert StorageError in kinds
    text = f"http://me:{MARK}@host does not answer"
    for kind in kinds:
        error = kind("field", text) if kind is AnnotationError else kind(text)
        for seen in (error, pickle.loads(pickle.dumps(error))):
            assert MARK not in str(seen) + repr(seen)
            assert "http://host does not answer" in str(seen)
    assert EndpointError("a", "b").code == "b"


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--data-dir", f"https://me:{MARK}@host/x", "--output-dir", "out"],
        ["prepare", "--data-dir", f"https://host/x?sig={MARK}", "--output-dir", "out"],
        ["prepare", "--data-dir", f"s3://KEY:{MARK}@bucket/x", "--output-dir", "out"],
        ["train", f"train.mlflow_uri=https://me:{MARK}@host"],
        ["train", f"train.mlflow_uri=postgresql://host/db?password={MARK}"],
        ["train", f"train.api_key={MARK}"],
        ["evaluate", "--checkpoint", f"http://me:{MARK}@host/run", "--data-dir", "p"],
        ["predict", "--image-path", f"https://me:{MARK}@host/a.jpg", "--output-dir", "out"],
        ["serve", "--label-studio-url", f"http://me:{MARK}@host:8080"],
        ["serve", "--label-studio-url", f"http://host:8080?access_token={MARK}"],
        ["serve", f"serve.token={MARK}"],
        ["serve", "--token-file", "odd.token", "--host", "0.0.0.0"],
        ["labelme", "--url", f"http://me:{MARK}@127.0.0.1:1"],
        ["models", "--store", f"https://me:{MARK}@host/models"],
        ["predict", "--config", f"https://me:{MARK}@host/run.yaml"],
    ],
    ids=lambda words: "-".join(words[:2]),
)
def test_a_mistake_beside_a_secret_does_not_print_it(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.token").write_text(f"{MARK} with a letter beyond ASCII: \u00e9")
    for name in ("SAMRAY_TOKEN", "LABEL_STUDIO_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, MARK)
    assert cli.main(words) == cli.EXIT_MISTAKE
    printed = capsys.readouterr()
    assert MARK not in printed.out + printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["odd.token"], "nothing is written"


def test_a_server_that_does_not_answer_is_named_without_the_secrets(tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "AWS_ENDPOINT_URL": f"http://me:{MARK}@127.0.0.1:1",
        "AWS_ACCESS_KEY_ID": f"{MARK}-id",
        "AWS_SECRET_ACCESS_KEY": MARK,
        "AWS_SESSION_TOKEN": MARK,
        "AWS_MAX_ATTEMPTS": "1",
    }
    command = [sys.executable, "-m", "samray.cli", "models", "--store", "s3://bucket/models"]
    command[1:3] = ["-c", "import sys; from samray.cli import main; sys.exit(main())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == cli.EXIT_MISTAKE, done.stderr
    assert "cannot be reached" in done.stderr
    assert MARK not in done.stdout + done.stderr


def test_settings_hold_no_secret_but_the_file_that_does():
    """They are saved with every output, so a secret among them would be, too."""
    names = [name for _, section in Config() for name, _ in section]
    secret = [n for n in names if any(w in n for w in ("password", "secret", "token", "key"))]
    assert set(secret) == {"token_file", "label_studio_key_file"}
    with pytest.raises(SamrayError) as refused:
        load_config(None, [f"labelme.url=http://me:{MARK}@host"])
    assert "--token-file" in str(refused.value)
    assert MARK not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["token.txt", "key.txt", "ray.token", "serve.token", "redis.password", "s3.env", ".env"]
)
def test_files_of_secrets_that_the_pages_name_stay_on_this_machine(name):
    """Ray's upload, git and the build of the image leave them out."""
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    ignored = get_excludes_from_ignore_files(ROOT, include_gitignore=False)
    assert any(excluded(ROOT / name) for excluded in ignored)
    status = subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT)
    assert status.returncode == 0
    assert f"!{name}" not in (ROOT / "configs" / "Dockerfile.dockerignore").read_text()
