"""The command line: `samray STAGE` and `python -m jobs.STAGE` call the same functions.

An option is a second name of a setting: `STAGES` holds, per stage, option -> dotted path. Its type,
choices, help and default come from the field in `samray.config`.
"""

import argparse
import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from samray import __version__, stages
from samray.config import Config, load_config, setting
from samray.errors import SamrayError
from samray.storage import plain_errors

# Exit statuses that scripts rely on: 0 the stage is done, 2 the user can correct the mistake.
EXIT_MISTAKE = 2
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


@dataclass(frozen=True)
class Stage:
    """One subcommand.

    Attributes:
        help: one line.
        example: for the end of its `--help`.
        options: option, with its values as in the usage -> dotted path of its setting.
        run: does the work and prints where the results are.
        positional: name in the usage and dotted path of the setting that a bare word sets.
    """

    help: str
    example: str
    options: Mapping[str, str]
    run: Callable[[Config], None]
    positional: tuple[str, str] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # labels may hold letters that its encoding lacks
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(
        prog="samray",
        description="Fine-tune Segment Anything on your polygons, across a Ray cluster.",
        epilog=_WALKTHROUGH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"samray {__version__}")
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, stage in STAGES.items():
        _add_stage(commands, name, stage)
    given = list(sys.argv[1:] if arguments is None else arguments)
    passed_on: list[str] = []
    if given[:1] == ["labelme"] and "--" in given:
        place = given.index("--")
        given, passed_on = given[:place], given[place + 1 :]
    # argparse does not accept positional words between options; here they may stand anywhere.
    options, words = parser.parse_known_args(given)
    if passed_on:
        setattr(options, "labelme.arguments", passed_on)
    unknown = [word for word in words if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {' '.join(unknown)}; see samray {options.stage} --help")
    return _run(options, words)


def job(stage: str) -> int:
    """Run one stage as `python -m jobs.<stage>`; return the exit status."""
    return main([stage, *sys.argv[1:]])


def _add_stage(commands: Any, name: str, stage: Stage) -> None:
    description, positional = stage.help, ""
    if stage.positional:
        word, dotted = stage.positional
        positional = f" {word}"
        description += f"\n\n{word}: {_help(dotted)}"
    parser = commands.add_parser(
        name,
        help=stage.help,
        description=description,
        epilog="example:\n" + stage.example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # an option not given does not change the config
    )
    for option, dotted in stage.options.items():
        _add_option(parser, option, dotted)
    parser.add_argument(
        "--config", metavar="YAML", default=None, help="YAML file of settings, by section"
    )
    own = parser.format_usage().split("[-h]", 1)[1].rstrip()
    parser.usage = f"samray {name}{positional} [-h]{own} [section.key=value ...]"


def _add_option(parser: argparse.ArgumentParser, option: str, dotted: str) -> None:
    """Add an option such as `--box X1 Y1 X2 Y2`, parsed by the type of its setting."""
    name, *metavar = option.split()
    how: dict[str, Any] = {"metavar": metavar[0] if len(metavar) == 1 else tuple(metavar)}
    kind = setting(dotted).annotation
    optional = get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind)
    if optional:
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple and get_args(kind)[-1] is ...:
        kind = get_args(kind)[0]
        if metavar == ["a,b"]:
            how["type"] = _comma_separated
        else:
            how["action"] = "append"  # each use of the option adds one item
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction if optional else "store_true"}
    elif get_origin(kind) is Literal:
        how = {"choices": get_args(kind)}
    elif get_origin(kind) is tuple:
        how |= {"nargs": len(get_args(kind)), "type": get_args(kind)[0]}
    elif kind in (int, float):
        how["type"] = kind
    parser.add_argument(name, dest=dotted, help=_help(dotted), **how)


def _comma_separated(text: str) -> list[str]:
    return [label.strip() for label in text.split(",") if label.strip()]


def _help(dotted: str) -> str:
    """The first sentence of the setting's description, and its default where there is one."""
    field = setting(dotted)
    text = " ".join((field.description or "").split())
    sentence = re.split(r"\.(?: (?=[A-Z])|$)", text)[0].replace("%", "%%")
    if field.default is None or field.default is False or field.default == ():
        return sentence
    return f"{sentence} (default: {field.default})"


def _run(arguments: argparse.Namespace, words: list[str]) -> int:
    options = vars(arguments)
    stage, path = options.pop("stage"), options.pop("config")
    if positional := STAGES[stage].positional:
        folders = [word for word in words if not _OVERRIDE.match(word)]
        words = [word for word in words if _OVERRIDE.match(word)]
        if folders:
            options[positional[1]] = folders[0]
            words += folders[1:]
    try:
        with ending_at_a_second_interrupt(stage), plain_errors("S3"):
            STAGES[stage].run(load_config(path, words, options))
    except SamrayError as exc:
        # Ray wraps what its actors raise; the message of the wrapper is a traceback.
        print(f"samray {stage}: error: {getattr(exc, 'cause', exc)}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt as exc:
        hint = f"; {exc}" if exc.args else ""
        print(f"samray {stage}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def ending_at_a_second_interrupt(stage: str) -> Iterator[None]:
    """Let a second Ctrl-C end the process at once, with status 130.

    The first one raises KeyboardInterrupt, which is lost where it meets a destructor, or a lock of
    `logging` that is never released then. Outputs are whole at any time.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # under nohup it is ignored
        return

    def end(*_: object) -> None:
        os.write(2, f"samray {stage}: interrupted again, ended at once\n".encode())
        os._exit(130)

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, end)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


_WALKTHROUGH = """all steps:
  samray sample-data photos --num-images 60 --seed 0
  samray prepare  --data-dir photos --output-dir prepared --visualize
  samray inspect  --data-dir prepared --point-selection bbox --output-dir look
  samray train    --data-dir prepared --output-dir run --model-type tiny --num-workers 2
  samray evaluate --data-dir prepared --checkpoint run --output-dir report
  samray tune     --data-dir prepared --output-dir sweep --config configs/tune.yaml
  samray predict  --checkpoint run --image-path photos/images/sample_00000.jpg \\
                  --point 120 80 --output-dir out

Every stage also takes --config YAML and section.key=value words, and runs as
`python -m jobs.STAGE` in a Ray job. Exit status: 0 done (bad items are listed), 2 a mistake
in options or input that you can correct.
"""

STAGES: dict[str, Stage] = {
    "sample-data": Stage(
        help="draw a LabelMe dataset to try samray with",
        run=stages.run_sample_data,
        positional=("OUT", "sample_data.output_dir"),
        options={
            "--num-images N": "sample_data.num_images",
            "--seed N": "sample_data.seed",
        },
        example="  samray sample-data photos --num-images 60 --seed 0",
    ),
    "prepare": Stage(
        help="check and rasterise annotated images into a prepared dataset",
        run=stages.run_prepare,
        options={
            "--data-dir DIR": "prepare.data_dir",
            "--output-dir DIR": "prepare.output_dir",
            "--labels a,b": "prepare.labels",
            "--label-map FILE": "prepare.label_map",
            "--split-file FILE": "prepare.split_file",
            "--group-by folder|REGEX": "prepare.group_by",
            "--tile SIZE": "prepare.tile",
            "--overlap N": "prepare.overlap",
            "--visualize": "prepare.visualize",
            "--num-samples N": "prepare.num_samples",
            "--strict": "prepare.strict",
        },
        example="  samray prepare --data-dir photos --output-dir prepared --visualize\n"
        "  samray prepare --data-dir video --output-dir prepared --group-by 'clip_[0-9]+' --strict",
    ),
    "export": Stage(
        help="write a prepared dataset as LabelMe or COCO files",
        run=stages.run_export,
        options={
            "--data-dir DIR": "export.data_dir",
            "--output-dir DIR": "export.output_dir",
            "--format": "export.format",
        },
        example="  samray export --data-dir prepared --output-dir coco --format coco",
    ),
    "inspect": Stage(
        help="draw samples with the prompts that a model will get, or report on the whole dataset",
        run=stages.run_inspect,
        options={
            "--data-dir DIR": "inspect.data_dir",
            "--output-dir DIR": "inspect.output_dir",
            "--num-samples N": "inspect.num_samples",
            "--point-selection": "inspect.point_selection",
            "--num-points N": "inspect.num_points",
            "--report": "inspect.report",
            "--strict": "inspect.strict",
        },
        example="  samray inspect --data-dir prepared --num-samples 3 --point-selection random \\\n"
        "                 --num-points 3 --output-dir look\n"
        "  samray inspect --data-dir prepared --report --output-dir look",
    ),
    "train": Stage(
        help="fine-tune SAM on a prepared dataset",
        run=stages.run_train,
        options={
            "--data-dir DIR": "train.data_dir",
            "--output-dir DIR": "train.output_dir",
            "--model-type": "model.type",
            "--checkpoint FILE|RUN|none": "model.checkpoint",
            "--freeze-image-encoder": "model.freeze_image_encoder",
            "--freeze-prompt-encoder": "model.freeze_prompt_encoder",
            "--freeze-mask-decoder": "model.freeze_mask_decoder",
            "--batch-size N": "train.batch_size",
            "--num-epochs N": "train.num_epochs",
            "--lr RATE": "train.learning_rate",
            "--point-selection": "prompts.point_selection",
            "--num-points N": "prompts.num_points",
            "--num-workers N|MIN..MAX": "scaling.num_workers",
            "--device": "scaling.device",
            "--dry-run": "train.dry_run",
            "--resume": "train.resume",
        },
        example="  samray train --data-dir prepared --output-dir run --model-type vit_b "
        "--num-workers 2\n"
        "  samray train --data-dir prepared --output-dir run --resume --num-epochs 20\n"
        "  samray train --config configs/vit_b.yaml train.learning_rate=5e-5",
    ),
    "tune": Stage(
        help="search for the best settings; each trial is a `samray train`",
        run=stages.run_tune,
        options={
            "--data-dir DIR": "tune.data_dir",
            "--output-dir DIR": "tune.output_dir",
            "--model-type": "model.type",
            "--checkpoint FILE|RUN|none": "model.checkpoint",
            "--num-trials N": "tune.num_trials",
            "--num-epochs N": "train.num_epochs",
            "--device": "scaling.device",
        },
        example="  samray tune --data-dir prepared --output-dir sweep\n"
        "  samray tune --config configs/tune.yaml --data-dir prepared --output-dir sweep\n"
        "  samray tune --config configs/tune.yaml --data-dir prepared --output-dir sweep "
        "--num-trials 24 tune.search=optuna\n"
        "The same command again continues an interrupted sweep.",
    ),
    "promote": Stage(
        help="add a tuned model to a store, if it is not worse than the current version",
        run=stages.run_promote,
        positional=("RUN_OR_SWEEP", "promote.checkpoint"),
        options={
            "--store DIR": "promote.store",
            "--name NAME": "promote.name",
            "--data-dir DIR": "promote.data_dir",
            "--force": "promote.force",
            "--rollback": "promote.rollback",
            "--version V": "promote.version",
        },
        example="  samray promote run --name nuts --store models\n"
        "  samray promote sweep --name nuts --store s3://bucket/models\n"
        "  samray promote --rollback --name nuts --store models",
    ),
    "models": Stage(
        help="list the models of a store; * marks the version in use",
        run=stages.run_models,
        options={
            "--store DIR": "promote.store",
            "--name NAME": "promote.name",
        },
        example="  samray models --store models",
    ),
    "serve": Stage(
        help="serve a model over HTTP, with a page where you click and see the mask",
        run=stages.run_serve,
        options={
            "--checkpoint RUN": "serve.checkpoint",
            "--store DIR": "serve.store",
            "--model NAME": "serve.model",
            "--host ADDRESS": "serve.host",
            "--port N": "serve.port",
            "--token-file FILE": "serve.token_file",
            "--cors-origin URL": "serve.cors_origins",
            "--label-studio-url URL": "serve.label_studio_url",
            "--label-studio-key-file FILE": "serve.label_studio_key_file",
        },
        example="  samray serve\n"
        "  samray serve --checkpoint run --port 8000\n"
        "  samray serve --store models --model nuts --host 0.0.0.0 --token-file token.txt\n"
        "  samray serve --label-studio-url http://127.0.0.1:8080 --label-studio-key-file key.txt\n"
        "On a Ray cluster: serve deploy configs/serve.yaml. Ctrl-C stops it.",
    ),
    "labelme": Stage(
        help="start your labelme with an endpoint behind its AI tools",
        run=stages.run_labelme,
        options={
            "--url URL": "labelme.url",
            "--token-file FILE": "labelme.token_file",
        },
        example="  samray labelme --url http://127.0.0.1:8000 -- photos --output annotations\n"
        "Arguments after -- are labelme's own. In labelme choose AI-Points or AI-Box, then click.",
    ),
    "pretrain": Stage(
        help="train `tiny` from random weights on drawn scenes; needs no Ray",
        run=stages.run_pretrain,
        options={
            "--output-dir RUN": "train.output_dir",
            "--num-epochs N": "train.num_epochs",
            "--batch-size N": "train.batch_size",
            "--lr RATE": "train.learning_rate",
            "--device": "scaling.device",
            "--max-minutes N": "pretrain.max_minutes",
            "--resume": "train.resume",
            "--export DIR": "pretrain.export_dir",
        },
        example="  samray pretrain --config configs/pretrain_tiny.yaml --output-dir run\n"
        "  samray pretrain --config configs/pretrain_tiny.yaml --output-dir run --resume "
        "--max-minutes 10",
    ),
    "benchmark": Stage(
        help="measure this machine in a few minutes, and forecast a run on it; needs no Ray",
        run=stages.run_benchmark,
        options={
            "--model-type": "model.type",
            "--device": "scaling.device",
            "--num-images N": "benchmark.num_images",
            "--storage DIR": "benchmark.storage",
            "--output FILE": "benchmark.output",
        },
        example="  samray benchmark --num-images 5000\n"
        "  samray benchmark --model-type vit_b --device gpu --storage s3://bucket/prefix",
    ),
    "evaluate": Stage(
        help="compare a run's initial weights with its best checkpoint",
        run=stages.run_evaluate,
        options={
            "--data-dir DIR": "evaluate.data_dir",
            "--output-dir DIR": "evaluate.output_dir",
            "--checkpoint RUN": "evaluate.checkpoint",
            "--other-data-dir DIR": "evaluate.other_data_dir",
            "--split": "evaluate.split",
        },
        example="  samray evaluate --data-dir prepared --checkpoint run --output-dir report\n"
        "  samray evaluate --data-dir prepared --checkpoint tiny --output-dir before",
    ),
    "predict": Stage(
        help="segment one object of an image by points or a box; or all objects of many images",
        run=stages.run_predict,
        options={
            "--checkpoint RUN": "predict.checkpoint",
            "--image-path IMAGE": "predict.image_path",
            "--prompts FILE": "predict.prompts",
            "--point X Y": "predict.points",
            "--negative-point X Y": "predict.negative_points",
            "--box X1 Y1 X2 Y2": "predict.box",
            "--tile SIZE": "predict.tile",
            "--label TEXT": "predict.label",
            "--coco": "predict.coco",
            "--output-dir OUT": "predict.output_dir",
        },
        example="  samray predict --checkpoint run --image-path photo.jpg --point 120 80 \\\n"
        "                 --negative-point 30 40 --output-dir out\n"
        "  samray predict --checkpoint run --image-path photo.jpg --box 10 20 200 180 "
        "--output-dir out\n"
        "  samray predict --checkpoint run --image-path photos --output-dir out\n"
        "  samray predict --checkpoint run --image-path photos --prompts prompts.json "
        "--output-dir out",
    ),
}
