"""The command line: every option is a setting, is explained, and sets what it always set."""

import dataclasses
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from samray import __version__, cli
from samray.config import Config, setting

ROOT = Path(__file__).parents[2]
OPTIONS = [
    (stage, option, dotted)
    for stage, entry in cli.STAGES.items()
    for option, dotted in entry.options.items()
]


@pytest.fixture
def parse(monkeypatch, capsys):
    """`parse(stage, *words) -> Config`: what the stage would run with."""

    def parsed(stage: str, *words: str) -> Config:
        seen: list[Config] = []
        entry = dataclasses.replace(cli.STAGES[stage], run=seen.append)
        monkeypatch.setitem(cli.STAGES, stage, entry)
        assert cli.main([stage, *words]) == 0, capsys.readouterr().err
        return seen[0]

    monkeypatch.chdir(ROOT)
    return parsed


def differences(config: Config) -> dict[str, object]:
    """Dotted path -> value of every setting that is not at its default."""
    return {
        f"{section}.{key}": value
        for section, values in config
        for key, value in values
        if value != getattr(getattr(Config(), section), key)
    }


def test_every_option_is_a_setting():
    for _, _, dotted in OPTIONS:
        assert setting(dotted).description, dotted
    for entry in cli.STAGES.values():
        if entry.positional:
            assert setting(entry.positional[1]).description


def test_python_m_samray_is_the_command():
    command = [sys.executable, "-m", "samray", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown == f"samray {__version__}\n"


@pytest.mark.parametrize("stage", cli.STAGES)
def test_help_explains_every_option_and_shows_its_default(stage, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([stage, "--help"])
    assert ended.value.code == 0
    # From `--name` on, up to the next option: its values, then the sentence.
    shown = " ".join(capsys.readouterr().out.split("\noptions:\n")[1].split())
    for option, dotted in cli.STAGES[stage].options.items():
        text = re.split(rf"(?<!-){option.split()[0]}(?![\w-])", shown)[1]
        field = setting(dotted)
        beginning = " ".join(field.description.split()).partition(".")[0][:25]
        assert beginning in text, option
        if field.default is not None and field.default is not False and field.default != ():
            assert f"(default: {field.default})" in text, option


# fmt: off
LINES = [
    ("sample-data photos --num-images 60 --seed 1",
     {"sample_data.output_dir": "photos", "sample_data.seed": 1}),
    ("sample-data --num-images 5 photos",
     {"sample_data.output_dir": "photos", "sample_data.num_images": 5}),
    ("prepare --data-dir photos --output-dir prepared --visualize",
     {"prepare.data_dir": "photos", "prepare.output_dir": "prepared", "prepare.visualize": True}),
    ("prepare --group-by 'clip_[0-9]+' --strict --labels ' a, b,,Straße' --num-samples 3",
     {"prepare.group_by": "clip_[0-9]+", "prepare.strict": True, "prepare.num_samples": 3,
      "prepare.labels": ("a", "b", "Straße")}),
    ("prepare --label-map m.yaml --split-file s.csv --tile 512 --overlap 64",
     {"prepare.label_map": "m.yaml", "prepare.split_file": "s.csv", "prepare.tile": 512,
      "prepare.overlap": 64}),
    ("export --data-dir prepared --output-dir coco --format coco",
     {"export.data_dir": "prepared", "export.output_dir": "coco", "export.format": "coco"}),
    ("inspect --data-dir p --num-samples 4 --point-selection random --num-points 3 --output-dir o",
     {"inspect.data_dir": "p", "inspect.num_samples": 4, "inspect.point_selection": "random",
      "inspect.num_points": 3, "inspect.output_dir": "o"}),
    ("inspect --report --strict", {"inspect.report": True, "inspect.strict": True}),
    ("train --data-dir p --output-dir r --model-type vit_b --num-workers 2 --num-epochs 30",
     {"train.data_dir": "p", "train.output_dir": "r", "model.type": "vit_b",
      "scaling.num_workers": 2, "train.num_epochs": 30}),
    ("train --resume --checkpoint none --lr 5e-5 --batch-size 4 --device cpu --num-points 2",
     {"train.resume": True, "model.checkpoint": "none", "train.learning_rate": 5e-5,
      "train.batch_size": 4, "scaling.device": "cpu", "prompts.num_points": 2}),
    ("train --freeze-image-encoder --freeze-prompt-encoder --freeze-mask-decoder",
     {"model.freeze_image_encoder": True, "model.freeze_prompt_encoder": True,
      "model.freeze_mask_decoder": True}),
    ("train --no-freeze-image-encoder --point-selection mixed --dry-run",
     {"model.freeze_image_encoder": False, "prompts.point_selection": "mixed",
      "train.dry_run": True}),
    ("train train.seed=3 --output-dir r loss.focal_weight=2 --lr=1e-3 train.learning_rate=1",
     {"train.seed": 3, "train.output_dir": "r", "loss.focal_weight": 2.0,
      "train.learning_rate": 1e-3}),
    ("pretrain --output-dir r --num-epochs 2 --batch-size 8 --lr 1e-3 --device gpu --resume",
     {"train.output_dir": "r", "train.num_epochs": 2, "train.batch_size": 8,
      "train.learning_rate": 1e-3, "scaling.device": "gpu", "train.resume": True}),
    ("pretrain --max-minutes 10 --export weights",
     {"pretrain.max_minutes": 10.0, "pretrain.export_dir": "weights"}),
    ("benchmark --model-type vit_b --device cpu --num-images 5 --storage s3://b/p --output b.json",
     {"model.type": "vit_b", "scaling.device": "cpu", "benchmark.num_images": 5,
      "benchmark.storage": "s3://b/p", "benchmark.output": "b.json"}),
    ("tune --data-dir p --output-dir s --model-type vit_b --checkpoint none --num-trials 24 "
     "--num-epochs 3 --device cpu tune.seed=1",
     {"tune.data_dir": "p", "tune.output_dir": "s", "model.type": "vit_b",
      "model.checkpoint": "none", "tune.num_trials": 24, "train.num_epochs": 3,
      "scaling.device": "cpu", "tune.seed": 1}),
    ("promote sweep --name nuts --store s3://bucket/models --data-dir p --force",
     {"promote.checkpoint": "sweep", "promote.name": "nuts", "promote.store": "s3://bucket/models",
      "promote.data_dir": "p", "promote.force": True}),
    ("promote --rollback --name nuts --store models --version v1",
     {"promote.rollback": True, "promote.name": "nuts", "promote.store": "models",
      "promote.version": "v1"}),
    ("models --store models --name nuts", {"promote.store": "models", "promote.name": "nuts"}),
    ("serve --checkpoint run --port 8001 --host 0.0.0.0 --token-file token.txt",
     {"serve.checkpoint": "run", "serve.port": 8001, "serve.host": "0.0.0.0",
      "serve.token_file": "token.txt"}),
    ("serve --store models --model nuts --cors-origin http://a --cors-origin http://b",
     {"serve.store": "models", "serve.model": "nuts", "serve.cors_origins": ("http://a", "http://b")}),
    ("serve --label-studio-url http://127.0.0.1:8080 --label-studio-key-file key.txt",
     {"serve.label_studio_url": "http://127.0.0.1:8080", "serve.label_studio_key_file": "key.txt"}),
    ("labelme --url http://h:1 --token-file t -- photos --output annotations",
     {"labelme.url": "http://h:1", "labelme.token_file": "t",
      "labelme.arguments": ("photos", "--output", "annotations")}),
    ("evaluate --data-dir p --checkpoint run --output-dir report --split val --other-data-dir o",
     {"evaluate.data_dir": "p", "evaluate.checkpoint": "run", "evaluate.output_dir": "report",
      "evaluate.split": "val", "evaluate.other_data_dir": "o"}),
    ("predict --checkpoint r --image-path a.jpg --point 120 80 --point 1.5 2 --negative-point 3 4",
     {"predict.checkpoint": "r", "predict.image_path": "a.jpg",
      "predict.points": ((120, 80), (1.5, 2)), "predict.negative_points": ((3, 4),)}),
    ("predict --box 10 20 200 180 --tile 512 --label nut --output-dir out --prompts p.json --coco",
     {"predict.box": (10, 20, 200, 180), "predict.tile": 512, "predict.label": "nut",
      "predict.output_dir": "out", "predict.prompts": "p.json", "predict.coco": True}),
]
# fmt: on


@pytest.mark.parametrize(("line", "expected"), LINES, ids=[line for line, _ in LINES])
def test_a_command_line_sets_what_it_always_set(line, expected, parse):
    assert differences(parse(*shlex.split(line))) == expected


def test_the_command_lines_above_use_every_option():
    words = {(line.split()[0], word) for line, _ in LINES for word in re.split(r"[ =]", line)}
    assert {(stage, option.split()[0]) for stage, option, _ in OPTIONS} <= words


EXAMPLES = [
    example
    for stage in cli.STAGES.values()
    for example in re.findall(r"^  samray (.*)$", stage.example.replace("\\\n", ""), flags=re.M)
] + re.findall(r"^  samray (.*)$", cli._WALKTHROUGH.replace("\\\n", ""), flags=re.M)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_of_the_help_are_understood(example, parse):
    parse(*shlex.split(example))


def test_options_win_over_words_and_words_over_the_file(tmp_path, parse):
    (tmp_path / "run.yaml").write_text("train: {seed: 1, batch_size: 3, num_epochs: 7}\n")
    file = str(tmp_path / "run.yaml")
    words = ["train.batch_size=4", "--num-epochs", "5", "--config", file, "train.num_epochs=6"]
    assert differences(parse("train", *words)) == {
        "train.seed": 1,
        "train.batch_size": 4,
        "train.num_epochs": 5,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --epochs 3", "samray: error: unknown option --epochs; see samray train --help"),
        ("train --num-epochs x", "argument --num-epochs: invalid int value: 'x'"),
        ("train --lr fast", "argument --lr: invalid float value: 'fast'"),
        ("train --device tpu", "argument --device: invalid choice: 'tpu'"),
        ("predict --point 5", "argument --point: expected 2 arguments"),
        ("predict --box 1 2 3", "argument --box: expected 4 arguments"),
        ("trian", "argument STAGE: invalid choice: 'trian'"),
        ("", "the following arguments are required: STAGE"),
    ],
)
def test_a_mistake_in_the_options_ends_with_status_2(line, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(line.split())
    assert ended.value.code == cli.EXIT_MISTAKE
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train nonsense", "config: 'nonsense' is not of the form section.key=value"),
        ("train train.num_epoch=3", "train.num_epoch is not a setting (did you mean num_epochs?)"),
        ("promote run other", "'other' is not of the form section.key=value"),
        ("prepare --overlap 3", "overlap is for tiles"),
        ("sample-data", "missing OUT, the folder to draw into"),
        ("models", "missing --store (or promote.store=...)"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_and_status_2(line, message, capsys):
    assert cli.main(line.split()) == cli.EXIT_MISTAKE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"samray {line.split()[0]}: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_interruption_ends_with_status_130_and_its_hint(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt("resume with --resume")

    entry = dataclasses.replace(cli.STAGES["train"], run=interrupted)
    monkeypatch.setitem(cli.STAGES, "train", entry)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "samray train: interrupted; resume with --resume\n"


SWALLOWING = """
import time
from samray import cli
with cli.ending_at_a_second_interrupt("prepare"):
    for word in ("ready", "swallowed"):
        try:
            print(word, flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pass
"""


def test_a_second_interrupt_ends_what_swallowed_the_first():
    command = [sys.executable, "-c", SWALLOWING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        for word in ("ready", "swallowed"):
            assert process.stdout.readline() == f"{word}\n"
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "samray prepare: interrupted again, ended at once\n"


def test_a_job_is_the_stage_of_its_name(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jobs/train.py", "train.num_epochs=0"])
    assert cli.job("train") == cli.EXIT_MISTAKE
    assert "train.num_epochs: Input should be greater than or equal to 1" in capsys.readouterr().err
    for path in (ROOT / "jobs").glob("[a-z]*.py"):
        (stage,) = re.findall(r'job\("([a-z-]+)"\)', path.read_text())
        assert stage.replace("-", "_") == path.stem
        assert stage in cli.STAGES
