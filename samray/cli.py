"""The command line. `samray STAGE` and `python -m jobs.STAGE` are the same doors.

Each stage lists its options once, with the dotted path of the setting each one sets.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from samray import __version__
from samray.config import Config, load_config
from samray.errors import ConfigError, SamrayError
from samray.storage import plain_errors

# What a person scripts against: 0 the stage did its work, 2 the user can mend it.
EXIT_MISTAKE = 2
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)+=")


@dataclass(frozen=True)
class Stage:
    """One subcommand.

    Attributes:
        help: one line.
        example: for the end of its `--help`.
        add_options: adds options whose `dest` is the dotted path of a setting.
        run: does the work and prints where the results are.
        positional: what stands without an option, for the usage line.
        positional_setting: dotted path of the setting that it gives.
    """

    help: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Config], None]
    positional: str = ""
    positional_setting: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
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
    # argparse gives up on positional words between options; here they may stand anywhere.
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
    parser = commands.add_parser(
        name,
        help=stage.help,
        description=stage.help,
        epilog="example:\n" + stage.example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # an option not given leaves the config alone
    )
    stage.add_options(parser)
    parser.add_argument("--config", metavar="YAML", default=None, help="one run's settings")
    own = parser.format_usage().split("[-h]", 1)[1].rstrip()
    parser.usage = f"samray {name}{stage.positional} [-h]{own} [section.key=value ...]"


def _run(arguments: argparse.Namespace, words: list[str]) -> int:
    options = vars(arguments)
    stage, path = options.pop("stage"), options.pop("config")
    if setting := STAGES[stage].positional_setting:
        folders = [word for word in words if not _OVERRIDE.match(word)]
        words = [word for word in words if _OVERRIDE.match(word)]
        if folders:
            options[setting] = folders[0]
            words += folders[1:]
    try:
        with plain_errors("S3"):
            STAGES[stage].run(load_config(path, words, options))
    except SamrayError as exc:
        print(f"samray {stage}: error: {exc}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt as exc:
        hint = f"; {exc}" if exc.args else ""
        print(f"samray {stage}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def _sample_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-images", dest="sample_data.num_images", type=int, metavar="N")
    parser.add_argument("--seed", dest="sample_data.seed", type=int, metavar="N")


def _run_sample_data(config: Config) -> None:
    from samray.data.sample_data import write_sample_data
    from samray.storage import resolve_local

    settings = config.sample_data
    if not settings.output_dir:
        raise ConfigError("missing OUT, the folder to draw into (or sample_data.output_dir=...)")
    output = resolve_local(settings.output_dir, "OUT")
    write_sample_data(output, settings.num_images, settings.seed)
    print(f"{settings.num_images} images with LabelMe JSON in {output}")


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "prepare", "folder of images and LabelMe JSON", "prepared dataset to write")
    parser.add_argument(
        "--labels",
        dest="prepare.labels",
        type=lambda text: [label.strip() for label in text.split(",") if label.strip()],
        metavar="a,b",
        help="keep these labels only",
    )
    parser.add_argument(
        "--label-map", dest="prepare.label_map", metavar="FILE", help="JSON or YAML {old: new}"
    )
    parser.add_argument(
        "--split-file",
        dest="prepare.split_file",
        metavar="FILE",
        help='JSON {"train": [image, ...], "val": ..., "test": ...} or CSV image,split',
    )
    parser.add_argument(
        "--group-by",
        dest="prepare.group_by",
        metavar="folder|REGEX",
        help="keep a folder, or images whose path gives the same match, in one split",
    )
    parser.add_argument(
        "--tile",
        dest="prepare.tile",
        type=int,
        metavar="SIZE",
        help="cut images with more pixels a side into tiles of SIZE",
    )
    parser.add_argument(
        "--overlap",
        dest="prepare.overlap",
        type=int,
        metavar="N",
        help="pixels that neighbouring tiles share; as wide as the objects (a quarter of SIZE)",
    )
    parser.add_argument(
        "--visualize", dest="prepare.visualize", action="store_true", help="write overlays"
    )
    parser.add_argument("--num-samples", dest="prepare.num_samples", type=int, metavar="N")
    parser.add_argument(
        "--strict", dest="prepare.strict", action="store_true", help="fail on anything bad"
    )


def _run_prepare(config: Config) -> None:
    from samray.data.prepare import prepare

    manifest = prepare(config)
    splits = ", ".join(f"{name} {len(members)}" for name, members in manifest["splits"].items())
    labels = ", ".join(f"{label} {count}" for label, count in manifest["labels"].items())
    counts = f"{manifest['num_images']} images, {manifest['num_instances']} instances"
    print(f"{counts} ({labels}); {splits}")
    if tiles := manifest["tiles"]:
        print(
            f"{tiles['num_tiles']} tiles with an instance; {tiles['num_instances_cut']} instances "
            "do not lie whole in theirs"
        )
    kinds = ("unlabelled", "empty", "warnings", "rejected")
    print(", ".join(f"{len(manifest[kind])} {kind}" for kind in kinds))
    _print_rejected(manifest["rejected"], "manifest.json")
    print(f"prepared dataset: {config.prepare.output_dir}/manifest.json")


def _export_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "export", "prepared dataset", "folder to write")
    parser.add_argument("--format", dest="export.format", choices=["labelme", "coco"])


def _run_export(config: Config) -> None:
    from samray.data.export import export

    print(f"{config.export.format} files: {export(config)}")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "inspect", "prepared dataset", "folder for the pictures")
    parser.add_argument("--num-samples", dest="inspect.num_samples", type=int, metavar="N")
    parser.add_argument(
        "--point-selection", dest="inspect.point_selection", choices=["center", "random", "bbox"]
    )
    parser.add_argument("--num-points", dest="inspect.num_points", type=int, metavar="N")
    parser.add_argument(
        "--report",
        dest="inspect.report",
        action="store_true",
        help="write report.html and report.json on the dataset, instead of pictures",
    )
    parser.add_argument(
        "--strict",
        dest="inspect.strict",
        action="store_true",
        help="with --report: fail, once it is written, if anything was rejected, warned of, or "
        "lies in two splits",
    )


def _run_inspect(config: Config) -> None:
    if config.inspect.report:
        _run_report(config)
        return
    from samray.inspection.preview import inspect

    for picture in inspect(config):
        print(picture)


def _run_report(config: Config) -> None:
    from samray.inspection.report import report

    facts = report(config)
    counts = facts["counts"]
    print(f"{counts['images']} images, {counts['instances']} instances, labels: {counts['labels']}")
    for kind in facts["problems"]:
        print(f"  {kind['level']}: {kind['title']}: {len(kind['items'])}")
    for model, seen in facts["resolution"].items():
        advice = f"; {seen['command']}" if seen["tile"] else ""
        print(f"  {model}: {seen['small']} instances ({seen['share']:.0%}) are small{advice}")
    output = config.inspect.output_dir
    print(f"report: {output}/report.html, figures: {output}/report.json")


def _train_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "train", "prepared dataset", "RUN folder")
    parser.add_argument(
        "--model-type", dest="model.type", choices=["tiny", "vit_b", "vit_l", "vit_h"]
    )
    parser.add_argument(
        "--checkpoint",
        dest="model.checkpoint",
        metavar="FILE|RUN|none",
        help="weights to start from; without it the published ones; none for random ones",
    )
    parser.add_argument(
        "--freeze-image-encoder",
        dest="model.freeze_image_encoder",
        action=argparse.BooleanOptionalAction,
        help="the default whenever weights are given",
    )
    parser.add_argument(
        "--freeze-prompt-encoder", dest="model.freeze_prompt_encoder", action="store_true"
    )
    parser.add_argument(
        "--freeze-mask-decoder", dest="model.freeze_mask_decoder", action="store_true"
    )
    parser.add_argument(
        "--batch-size",
        dest="train.batch_size",
        type=int,
        metavar="N",
        help="images in a step, over all workers",
    )
    parser.add_argument("--num-epochs", dest="train.num_epochs", type=int, metavar="N")
    parser.add_argument("--lr", dest="train.learning_rate", type=float, metavar="RATE")
    parser.add_argument(
        "--point-selection",
        dest="prompts.point_selection",
        choices=["center", "random", "bbox", "mixed", "interactive"],
    )
    parser.add_argument("--num-points", dest="prompts.num_points", type=int, metavar="N")
    parser.add_argument("--num-workers", dest="scaling.num_workers", type=int, metavar="N")
    parser.add_argument("--device", dest="scaling.device", choices=["auto", "cpu", "gpu"])
    parser.add_argument(
        "--resume", dest="train.resume", action="store_true", help="go on with the run in RUN"
    )


def _run_train(config: Config) -> None:
    from samray.training.train import fit

    state = fit(config)
    best = max(state["epochs"], key=lambda epoch: epoch["val_iou"])
    output = config.train.output_dir
    print(f"best: epoch {best['epoch']} of {len(state['epochs'])}, val_iou {best['val_iou']:.3f}")
    if state["embeddings"]:
        encoded, found = state["embeddings"]["encoded"], state["embeddings"]["found"]
        print(f"embeddings: {encoded} images encoded, {found} found")
    print(f"run: {output}/run.json, best checkpoint: {output}/{state['best']}")


def _pretrain_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", dest="train.output_dir", metavar="RUN", help="RUN folder")
    parser.add_argument("--num-epochs", dest="train.num_epochs", type=int, metavar="N")
    parser.add_argument("--batch-size", dest="train.batch_size", type=int, metavar="N")
    parser.add_argument("--lr", dest="train.learning_rate", type=float, metavar="RATE")
    parser.add_argument("--device", dest="scaling.device", choices=["auto", "cpu", "gpu"])
    parser.add_argument(
        "--max-minutes",
        dest="pretrain.max_minutes",
        type=float,
        metavar="N",
        help="stop in time, at the end of an epoch",
    )
    parser.add_argument(
        "--resume", dest="train.resume", action="store_true", help="go on with the run in RUN"
    )
    parser.add_argument(
        "--export",
        dest="pretrain.export_dir",
        metavar="DIR",
        help="write the best weights as the package ships them",
    )


def _run_pretrain(config: Config) -> None:
    from samray.training.pretraining import pretrain

    state = pretrain(config)
    best = max(state["epochs"], key=lambda epoch: epoch["val_iou"])
    output = config.train.output_dir
    done = f"{len(state['epochs'])} of {config.train.num_epochs} epochs"
    print(f"{done}; best: epoch {best['epoch']}, val_iou {best['val_iou']:.3f}")
    print(f"run: {output}/run.json, best checkpoint: {output}/{state['best']}")
    if config.pretrain.export_dir is not None:
        print(f"exported: {config.pretrain.export_dir}/tiny.safetensors and tiny.json")


def _tune_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "tune", "prepared dataset", "SWEEP folder")
    parser.add_argument("--num-trials", dest="tune.num_trials", type=int, metavar="N")
    parser.add_argument("--num-epochs", dest="train.num_epochs", type=int, metavar="N")
    parser.add_argument("--device", dest="scaling.device", choices=["auto", "cpu", "gpu"])


def _run_tune(config: Config) -> None:
    from samray.training.tune import sweep

    state = sweep(config)
    kinds = ("finished", "stopped", "failed")
    counts = {kind: sum(t["status"] == kind for t in state["trials"]) for kind in kinds}
    print(", ".join(f"{number} {kind}" for kind, number in counts.items() if number))
    for trial in state["trials"]:
        if trial["reason"]:
            print(f"  failed {trial['trial_id']}: {trial['reason']}")
    chosen = " ".join(f"{key}={value}" for key, value in state["best_settings"].items())
    print(f"best: {state['best']} ({chosen})")
    base, best = state["test"]["base"], state["test"]["best"]
    print("test mIoU     base    best   change")
    for name in base["iou"]["strategy"]:
        before, after = base["iou"]["strategy"][name], best["iou"]["strategy"][name]
        print(f"  {name:<10} {before:6.3f}  {after:6.3f}   {after - before:+6.3f}")
    output = config.tune.output_dir
    print(f"report: {output}/report.html, figures: {output}/sweep.json")


def _store_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", dest="promote.store", metavar="DIR", help="the store of models, or s3://"
    )
    parser.add_argument(
        "--name", dest="promote.name", metavar="NAME", help="the model's name there"
    )


def _promote_options(parser: argparse.ArgumentParser) -> None:
    _store_options(parser)
    parser.add_argument(
        "--data-dir",
        dest="promote.data_dir",
        metavar="DIR",
        help="prepared dataset whose test split guards; without it the one trained on",
    )
    parser.add_argument(
        "--force",
        dest="promote.force",
        action="store_true",
        help="promote although the guard refuses; the record says so",
    )
    parser.add_argument(
        "--rollback",
        dest="promote.rollback",
        action="store_true",
        help="make the version before the current one current again",
    )
    parser.add_argument(
        "--version", dest="promote.version", metavar="V", help="with --rollback: that version"
    )


def _run_promote(config: Config) -> None:
    from samray.evaluation.promote import MIN_IMAGES, promote, roll_back

    if config.promote.rollback:
        version = roll_back(config)
        print(f"{version.name}: current is {version.version} again")
        return
    version = promote(config)
    metrics, guard = version.record["metrics"], version.record["guard"]
    if guard["num_images"] < MIN_IMAGES:
        print(f"note: {guard['num_images']} test photos are few to judge by; prepare more")
    print("test mIoU over the prompt matrix")
    for model in metrics:
        low, high = metrics[model]["miou_ci95"]
        print(f"  {model:<8} {metrics[model]['miou']:.3f}  ({low:.3f} to {high:.3f})")
    for reason in guard["refused"]:
        print(f"note: forced although {reason}")
    if not version.record["same_dataset_as_trained_on"]:
        print("note: the guard's dataset is not the one trained on; do its test photos overlap?")
    print(f"{version.name}: current is {version.version}: {version.folder}")


def _run_models(config: Config) -> None:
    from samray.config import required
    from samray.sam.store import ModelStore
    from samray.storage import require_folder, resolve

    (folder,) = required(config, "promote.store")
    store = ModelStore(require_folder(resolve(folder, "--store"), "--store"))
    names = [config.promote.name] if config.promote.name else store.names()
    for name in names:
        current, versions = store.current(name), store.require_versions(name)
        print(name)
        for version in versions:
            mark = "*" if current and version.version == current.version else " "
            record = version.record
            base, tuned = (record["metrics"][model]["miou"] for model in ("base", "tuned"))
            forced = "  forced" if record["guard"]["forced"] else ""
            scores = f"test mIoU {base:.3f} -> {tuned:.3f}{forced}"
            print(f"{mark} {version.version}  {record['model_type']}  {scores}")
    if not names:
        print("no models yet")


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        dest="serve.checkpoint",
        metavar="RUN",
        help="a RUN, SWEEP, checkpoint folder or ViT weights file; without it, `tiny`",
    )
    parser.add_argument(
        "--store", dest="serve.store", metavar="DIR", help="serve what is current in this store"
    )
    parser.add_argument(
        "--model", dest="serve.model", metavar="NAME", help="this model of the store alone"
    )
    parser.add_argument("--host", dest="serve.host", metavar="ADDRESS", help="default: 127.0.0.1")
    parser.add_argument("--port", dest="serve.port", type=int, metavar="N", help="default: 8000")
    parser.add_argument(
        "--token-file",
        dest="serve.token_file",
        metavar="FILE",
        help="clients must send this token; else $SAMRAY_TOKEN",
    )
    parser.add_argument(
        "--cors-origin",
        dest="serve.cors_origins",
        action="append",
        metavar="URL",
        help="pages of this origin may ask, too; may be given again",
    )
    parser.add_argument(
        "--label-studio-url",
        dest="serve.label_studio_url",
        metavar="URL",
        help="fetch the pictures of /compat/labelstudio from this address, and no other",
    )
    parser.add_argument(
        "--label-studio-key-file",
        dest="serve.label_studio_key_file",
        metavar="FILE",
        help="your access token in Label Studio, to fetch them with; else $LABEL_STUDIO_API_KEY",
    )


def _run_serve(config: Config) -> None:
    from samray.serving.app import serve_here

    serve_here(config.serve)


def _labelme_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        dest="labelme.url",
        metavar="URL",
        help="the endpoint that `samray serve` started; default: http://127.0.0.1:8000",
    )
    parser.add_argument(
        "--token-file",
        dest="labelme.token_file",
        metavar="FILE",
        help="the endpoint's token; else $SAMRAY_TOKEN",
    )


def _run_labelme(config: Config) -> None:
    from samray.serving.labelme_client import start

    start(config.labelme)


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _paths(parser, "evaluate", "prepared dataset", "folder for evaluation.json and report.html")
    parser.add_argument("--checkpoint", dest="evaluate.checkpoint", metavar="RUN")
    parser.add_argument("--split", dest="evaluate.split", choices=["train", "val", "test"])


def _run_evaluate(config: Config) -> None:
    from samray.evaluation.evaluate import evaluate

    evaluation = evaluate(config)
    base, tuned = (evaluation[model]["iou"]["strategy"] for model in ("base", "tuned"))
    print(f"{evaluation['split']} mIoU     base    tuned   change")
    for name in base:
        gain = tuned[name] - base[name]
        print(f"  {name:<10} {base[name]:6.3f}   {tuned[name]:6.3f}   {gain:+6.3f}")
    if not evaluation["same_dataset_as_trained_on"]:
        print(
            "note: the run was trained on another dataset; if that one held photos of this split, "
            "these figures flatter"
        )
    output = config.evaluate.output_dir
    print(f"report: {output}/report.html, figures: {output}/evaluation.json")


def _predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        dest="predict.checkpoint",
        metavar="RUN",
        help="without it, `tiny` as it comes with samray",
    )
    parser.add_argument(
        "--image-path",
        dest="predict.image_path",
        metavar="IMAGE",
        help="an image; or a folder of images, to segment all objects in them",
    )
    parser.add_argument(
        "--prompts",
        dest="predict.prompts",
        metavar="FILE",
        help='JSON {"images/a.jpg": [{"point_coords": [[X, Y]], "box": [X1, Y1, X2, Y2]}, ...], '
        "...}: what to segment in which image",
    )
    for option, key in (("--point", "points"), ("--negative-point", "negative_points")):
        parser.add_argument(
            option,
            dest=f"predict.{key}",
            nargs=2,
            type=float,
            action="append",
            metavar=("X", "Y"),
            help="pixels of the image as shown; may be given again",
        )
    parser.add_argument(
        "--box", dest="predict.box", nargs=4, type=float, metavar=("X1", "Y1", "X2", "Y2")
    )
    parser.add_argument(
        "--tile",
        dest="predict.tile",
        type=int,
        metavar="SIZE",
        help="in a larger image, look at SIZE pixels a side around the prompt, as in training",
    )
    parser.add_argument("--label", dest="predict.label", metavar="TEXT")
    parser.add_argument("--output-dir", dest="predict.output_dir", metavar="OUT")


def _run_predict(config: Config) -> None:
    settings = config.predict
    if settings.prompts is None and (settings.points or settings.negative_points or settings.box):
        from samray.prediction.predictor import predict

        for kind, path in predict(config).items():
            print(f"{kind}: {path}")
        return
    from samray.prediction.batch import predict_images

    summary = predict_images(config)
    earlier = f" ({summary['found']} were done before)" if summary["found"] else ""
    print(f"{summary['images']} images{earlier}, {summary['objects']} objects")
    print(f"{summary['skipped']} skipped, {len(summary['rejected'])} rejected")
    output = config.predict.output_dir
    _print_rejected(summary["rejected"], f"{output}/predictions.json")
    print(f"results: {output}/predictions.json")


def _print_rejected(rejected: list[dict[str, Any]], listed_in: str) -> None:
    shown = 10
    for problem in rejected[:shown]:
        print(f"  rejected {problem['file']}: {problem['field']}: {problem['reason']}")
    if len(rejected) > shown:
        print(f"  and {len(rejected) - shown} more, all listed in {listed_in}")


def _paths(parser: argparse.ArgumentParser, section: str, data: str, output: str) -> None:
    parser.add_argument("--data-dir", dest=f"{section}.data_dir", metavar="DIR", help=data)
    parser.add_argument("--output-dir", dest=f"{section}.output_dir", metavar="DIR", help=output)


_WALKTHROUGH = """the whole way:
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
in options or input that you can mend.
"""

STAGES: dict[str, Stage] = {
    "sample-data": Stage(
        "draw a LabelMe dataset to try things on",
        "  samray sample-data photos --num-images 60 --seed 0",
        _sample_data_options,
        _run_sample_data,
        positional=" OUT",
        positional_setting="sample_data.output_dir",
    ),
    "prepare": Stage(
        "check and rasterise LabelMe pairs into a prepared dataset",
        "  samray prepare --data-dir photos --output-dir prepared --visualize\n"
        "  samray prepare --data-dir video --output-dir prepared --group-by 'clip_[0-9]+' --strict",
        _prepare_options,
        _run_prepare,
    ),
    "export": Stage(
        "write a prepared dataset as LabelMe or COCO files",
        "  samray export --data-dir prepared --output-dir coco --format coco",
        _export_options,
        _run_export,
    ),
    "inspect": Stage(
        "draw samples with the prompts a model will be given, or report on the whole dataset",
        "  samray inspect --data-dir prepared --num-samples 3 --point-selection random \\\n"
        "                 --num-points 3 --output-dir look\n"
        "  samray inspect --data-dir prepared --report --output-dir look",
        _inspect_options,
        _run_inspect,
    ),
    "train": Stage(
        "fine-tune SAM on a prepared dataset",
        "  samray train --data-dir prepared --output-dir run --model-type vit_b --num-workers 2\n"
        "  samray train --data-dir prepared --output-dir run --resume --num-epochs 20\n"
        "  samray train --config configs/vit_b.yaml train.learning_rate=5e-5",
        _train_options,
        _run_train,
    ),
    "tune": Stage(
        "search the settings that tune best; each trial is a `samray train`",
        "  samray tune --config configs/tune.yaml --data-dir prepared --output-dir sweep\n"
        "  samray tune --config configs/tune.yaml --data-dir prepared --output-dir sweep "
        "--num-trials 24 tune.search=optuna\n"
        "The same command again goes on with a sweep that was interrupted.",
        _tune_options,
        _run_tune,
    ),
    "promote": Stage(
        "put a tuned model into a store, if it is no worse than what is there",
        "  samray promote run --name nuts --store models\n"
        "  samray promote sweep --name nuts --store s3://bucket/models\n"
        "  samray promote --rollback --name nuts --store models",
        _promote_options,
        _run_promote,
        positional=" RUN_OR_SWEEP",
        positional_setting="promote.checkpoint",
    ),
    "models": Stage(
        "list the models of a store; * marks the version in use",
        "  samray models --store models",
        _store_options,
        _run_models,
    ),
    "serve": Stage(
        "serve a model over HTTP, with a page where you click and see the mask",
        "  samray serve\n"
        "  samray serve --checkpoint run --port 8000\n"
        "  samray serve --store models --model nuts --host 0.0.0.0 --token-file token.txt\n"
        "  samray serve --label-studio-url http://127.0.0.1:8080 --label-studio-key-file key.txt\n"
        "On a Ray cluster: serve deploy configs/serve.yaml. Ctrl-C ends it.",
        _serve_options,
        _run_serve,
    ),
    "labelme": Stage(
        "start your labelme with an endpoint behind its AI tools",
        "  samray labelme --url http://127.0.0.1:8000 -- photos --output annotations\n"
        "What follows -- is labelme's own. In labelme choose AI-Points or AI-Box, then click.",
        _labelme_options,
        _run_labelme,
    ),
    "pretrain": Stage(
        "train `tiny` from nothing, on drawn scenes; no Ray needed",
        "  samray pretrain --config configs/pretrain_tiny.yaml --output-dir run\n"
        "  samray pretrain --config configs/pretrain_tiny.yaml --output-dir run --resume "
        "--max-minutes 10",
        _pretrain_options,
        _run_pretrain,
    ),
    "evaluate": Stage(
        "compare the weights a run started from with its best checkpoint",
        "  samray evaluate --data-dir prepared --checkpoint run --output-dir report",
        _evaluate_options,
        _run_evaluate,
    ),
    "predict": Stage(
        "segment one object of an image by points or a box; or all objects of many images",
        "  samray predict --checkpoint run --image-path photo.jpg --point 120 80 \\\n"
        "                 --negative-point 30 40 --output-dir out\n"
        "  samray predict --checkpoint run --image-path photo.jpg --box 10 20 200 180 "
        "--output-dir out\n"
        "  samray predict --checkpoint run --image-path photos --output-dir out\n"
        "  samray predict --checkpoint run --image-path photos --prompts prompts.json "
        "--output-dir out",
        _predict_options,
        _run_predict,
    ),
}
