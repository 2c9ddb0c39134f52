"""What each stage runs and prints.

Each function imports its own modules, so that `samray --help` does not wait for torch and Ray.
"""

from typing import Any

from samray.config import Config, required
from samray.errors import ConfigError, StoreError
from samray.storage import require_folder, resolve, resolve_local


def run_sample_data(config: Config) -> None:
    """Draw a LabelMe dataset."""
    from samray.data.sample_data import write_sample_data

    settings = config.sample_data
    if not settings.output_dir:
        raise ConfigError("missing OUT, the folder to draw into (or sample_data.output_dir=...)")
    output = resolve_local(settings.output_dir, "OUT")
    write_sample_data(output, settings.num_images, settings.seed)
    print(f"{settings.num_images} images with LabelMe JSON in {output}")


def run_prepare(config: Config) -> None:
    """Prepare a dataset; print counts and rejected files."""
    from samray.data.prepare import prepare

    manifest = prepare(config)
    splits = ", ".join(f"{name} {len(members)}" for name, members in manifest["splits"].items())
    labels = ", ".join(f"{_short(label)} {n}" for label, n in manifest["labels"].items())
    counts = f"{manifest['num_images']} images, {manifest['num_instances']} instances"
    print(f"{counts} ({labels}); {splits}")
    if tiles := manifest["tiles"]:
        print(
            f"{tiles['num_tiles']} tiles with an instance; {tiles['num_instances_cut']} instances "
            "are cut by their tile"
        )
    if others := manifest["not_instances"]:
        listed = ", ".join(f"{_short(kind)} {number}" for kind, number in others.items())
        print(f"shapes that are no single object: {listed}")
    kinds = ("unlabelled", "empty", "warnings", "rejected")
    print(", ".join(f"{len(manifest[kind])} {kind}" for kind in kinds))
    _print_rejected(manifest["rejected"], "manifest.json")
    for note in manifest["notes"]:
        print(f"note: {note}")
    print(f"prepared dataset: {config.prepare.output_dir}/manifest.json")


def _short(label: str) -> str:
    """A label on one line of the terminal."""
    label = " ".join(label.split())
    return label if len(label) <= 60 else f"{label[:57]}..."


def run_export(config: Config) -> None:
    """Write a prepared dataset as LabelMe or COCO files."""
    from samray.data.export import export

    folder = export(config)
    print(f"{config.export.format} files: {folder}")
    print(f"to prepare them with the same splits: --split-file {folder / 'splits.csv'}")


def run_inspect(config: Config) -> None:
    """Draw samples and print their files, or report on the whole dataset."""
    if config.inspect.report:
        _report(config)
        return
    from samray.inspection.preview import inspect

    for picture in inspect(config):
        print(picture)


def _report(config: Config) -> None:
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


def run_train(config: Config) -> None:
    """Fine-tune; print the best epoch."""
    if config.train.dry_run:
        _forecast(config)
        return
    from samray.training.train import fit

    state = fit(config)
    output = config.train.output_dir
    stopped = len(state["epochs"]) < state["num_epochs"]
    if stopped:
        print(f"stopped after epoch {len(state['epochs'])}: train.patience")
    print(f"best: {_best_epoch(state, stopped)}")
    if state["embeddings"]:
        encoded, found = state["embeddings"]["encoded"], state["embeddings"]["found"]
        print(f"embeddings: {encoded} images encoded, {found} found")
    print(f"run: {output}/run.json, best checkpoint: {output}/{state['best']}")


def _forecast(config: Config) -> None:
    from samray.training.dry_run import dry_run

    found = dry_run(config)
    for part, (learning, all_of_it) in found.learning.items():
        print(f"{part:<15} {learning / 1e6:.2f} of {all_of_it / 1e6:.2f} million parameters learn")
    total = found.steps * found.num_epochs
    print(
        f"steps           {found.steps} an epoch of {found.num_images} images, {total} in "
        f"{found.num_epochs} epochs; the largest has {found.num_prompts} prompts on a worker"
    )
    cached = found.cache_bytes
    size = f"{cached / 2**20:.1f} MiB" if cached < 2**30 else f"{_gib(cached)} GiB"
    print(f"cache           {size if cached else 'none: all blocks learn'}")
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in vars(found.memory).items())
    print(f"memory          {_gib(found.memory.total)} GiB a worker, estimated ({parts})")
    if found.peak is not None:
        print(f"                {_gib(found.peak)} GiB allocated on the GPU, measured")
    if found.seconds is None:
        print(f"time            not measured: {found.device} has not enough free memory for a step")
        return
    print(
        f"time            {found.seconds:.2f} s for the largest step on {found.device}: at most "
        f"{found.seconds * total / 60:.1f} min of steps, without encoding and validation"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _best_epoch(state: dict[str, Any], stopped: bool) -> str:
    from samray.runs import best_epoch

    base, epochs, number = state.get("base_metrics") or {}, state["epochs"], best_epoch(state)
    if number is None:
        patience = "more patience (train.patience), " if stopped else ""
        return (
            f"the base, val_iou {base['val_iou']:.3f}: no epoch was better without losing on a "
            f"kind of prompt; try {patience}more images, more epochs or another learning rate"
        )
    iou = epochs[number - 1]["val_iou"]
    before = f" ({base['val_iou']:.3f} before)" if base else ""
    higher = sum(epoch["val_iou"] > iou for epoch in epochs)
    reason = f"; {higher} with a higher mean lost on a kind of prompt" if higher else ""
    return f"epoch {number} of {len(epochs)}, val_iou {iou:.3f}{before}{reason}"


def run_pretrain(config: Config) -> None:
    """Train `tiny` from random weights; print the best epoch."""
    from samray.training.pretraining import pretrain

    state = pretrain(config)
    best = max(state["epochs"], key=lambda epoch: epoch["val_iou"])
    output = config.train.output_dir
    done = f"{len(state['epochs'])} of {state['num_epochs']} epochs"
    print(f"{done}; best: epoch {best['epoch']}, val_iou {best['val_iou']:.3f}")
    print(f"run: {output}/run.json, best checkpoint: {output}/{state['best']}")
    if config.pretrain.export_dir is not None:
        print(f"exported: {config.pretrain.export_dir}/tiny.safetensors and tiny.json")


def run_tune(config: Config) -> None:
    """Run or continue a sweep; print the best trial against the base."""
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
    if next(t for t in state["trials"] if t["run"] == state["best"]).get("kept") == "base":
        print("note: its best checkpoint is the base: no epoch beat it without losing on a prompt")
    base, best = state["test"]["base"], state["test"]["best"]
    print("test mIoU     base    best   change")
    for name in base["iou"]["strategy"]:
        before, after = base["iou"]["strategy"][name], best["iou"]["strategy"][name]
        print(f"  {name:<10} {before:6.3f}  {after:6.3f}   {after - before:+6.3f}")
    output = config.tune.output_dir
    print(f"report: {output}/report.html, figures: {output}/sweep.json")


def run_promote(config: Config) -> None:
    """Promote a model into the store, or roll back; print the scores of the guard."""
    from samray.evaluation.metrics import MIN_IMAGES
    from samray.evaluation.promote import promote, roll_back

    if config.promote.rollback:
        version = roll_back(config)
        print(f"{version.name}: current is {version.version} again")
        return
    version = promote(config)
    metrics, guard = version.record["metrics"], version.record["guard"]
    if guard["num_images"] < MIN_IMAGES:
        print(f"note: {guard['num_images']} test photos are few for a comparison; prepare more")
    print("test mIoU over the prompt matrix")
    for model in metrics:
        low, high = metrics[model]["miou_ci95"]
        print(f"  {model:<8} {metrics[model]['miou']:.3f}  ({low:.3f} to {high:.3f})")
    for reason in guard["refused"]:
        print(f"note: forced although {reason}")
    if not version.record["same_dataset_as_trained_on"]:
        print(
            "note: the guard's dataset is not the one trained on; check that none of its test "
            "photos was trained on"
        )
    print(f"{version.name}: current is {version.version}: {version.folder}")


def run_benchmark(config: Config) -> None:
    """Measure this machine; print a table, and what a run would take."""
    from samray.benchmark import benchmark

    found = benchmark(config)
    machine, forecast = found["machine"], found["forecast"]
    print(f"{machine['device']}, {machine['cpus']} CPUs, {machine['memory_gib']} GiB of memory")
    if machine["load"] > machine["cpus"] / 2:
        print(f"note: other work runs here (load {machine['load']}); an idle machine is faster")
    for row in found["figures"]:
        note = f"  ({row['note']})" if row["note"] else ""
        print(f"{row['what']:<26} {row['value']:>10.4g} {row['unit']}{note}")
    print(
        f"{found['model']} on {forecast['images']} images of {forecast['objects_an_image']} "
        f"objects: encoding {forecast['encode_seconds'] / 60:.1f} min, cache "
        f"{_gib(forecast['cache_bytes'])} GiB, {forecast['epochs']} epochs "
        f"{forecast['train_seconds'] / 60:.1f} min on one such worker, without validation"
    )
    print(f"figures: {config.benchmark.output}")


def run_models(config: Config) -> None:
    """Print the models of a store and their versions."""
    from samray.sam.store import ModelStore

    (folder,) = required(config, "promote.store")
    store = ModelStore(require_folder(resolve(folder, "--store"), "--store"))
    names = [config.promote.name] if config.promote.name else store.names()
    for name in names:
        versions = store.require_versions(name)
        try:
            current = store.current(name)
        except StoreError as exc:  # the other models are listed all the same
            current = None
            print(f"note: {exc}")
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


def run_serve(config: Config) -> None:
    """Serve until interrupted."""
    from samray.serving.app import serve_here

    serve_here(config.serve)


def run_labelme(config: Config) -> None:
    """Start labelme with an endpoint behind its AI tools."""
    from samray.serving.labelme_client import start

    start(config.labelme)


def run_evaluate(config: Config) -> None:
    """Compare base and tuned weights; print their scores."""
    from samray.evaluation.evaluate import evaluate

    evaluation = evaluate(config)
    _print_scores(evaluation, evaluation["split"], str(config.evaluate.checkpoint))
    if evaluation.get("checkpoint") == "base":
        print(
            "note: no epoch of this run was better than its base, so both are the same; give "
            "--checkpoint RUN/checkpoints/EPOCH to compare another one"
        )
    if "other" in evaluation:
        _print_scores(evaluation["other"], "other", str(config.evaluate.checkpoint))
    if evaluation["same_dataset_as_trained_on"] is False:
        print(
            "note: the run was trained on another dataset; if that one held photos of this split, "
            "these scores may be too high"
        )
    output = config.evaluate.output_dir
    print(f"report: {output}/report.html, figures: {output}/evaluation.json")


def _print_scores(figures: dict[str, Any], images: str, checkpoint: str) -> None:
    """Print the prompt matrix, the clicks and all objects, of two models with their change."""
    everything = figures["tuned" if "tuned" in figures else "base"].get("instances")
    if everything is not None:
        print(
            f"every object: {everything['found']} found, {everything['true']} annotated, mean "
            f"segmentation accuracy {everything['msa']:.3f}, at IoU 0.5 {everything['sa50']:.3f}"
        )
        if change := figures.get("change", {}).get("instances"):
            before = figures["base"]["instances"]
            print(
                f"before tuning: {before['found']} found, mean segmentation accuracy "
                f"{before['msa']:.3f}; change {change['msa']:+.3f}, {change['verdict']}"
            )
    base = figures["base"]["iou"]["strategy"]
    clicks = [figures[m].get("clicks_to_iou") for m in ("base", "tuned") if m in figures]
    means = [f"{found['90']['mean']:.1f}" for found in clicks if found]
    if "tuned" in figures:
        tuned = figures["tuned"]["iou"]["strategy"]
        print(f"{images} mIoU     base    tuned   change")
        for name, change in figures["change"]["strategy"].items():
            row = f"{base[name]:6.3f}   {tuned[name]:6.3f}   {change['iou']:+6.3f}"
            print(f"  {name:<10} {row}   {change['verdict']}")
        if means:
            verdict = figures["change"]["clicks_to_iou"]["90"]["verdict"]
            print(f"clicks to 90 % IoU: {means[0]} before, {means[1]} after, {verdict}")
        return
    print(f"{images} mIoU of {checkpoint}")
    for name, iou in base.items():
        print(f"  {name:<10} {iou:6.3f}")
    if means:
        print(f"clicks to 90 % IoU: {means[0]}")


def run_predict(config: Config) -> None:
    """Segment one prompt in an image, or all objects of many images."""
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
    if corrected := summary["corrected"]:
        named = ", ".join(corrected[:10]) + (", ..." if len(corrected) > 10 else "")
        print(f"{len(corrected)} corrected by hand; the other outputs show what was found: {named}")
    output = config.predict.output_dir
    _print_rejected(summary["rejected"], f"{output}/predictions.json")
    if advice := _nothing_found(summary):
        print(advice)
    print(f"results: {output}/predictions.json")


def _nothing_found(summary: dict[str, Any]) -> str | None:
    """What to do where the grid's thresholds, which suit SAM as it ships, dropped all masks."""
    used = summary["settings"]
    if summary["objects"] or used["prompts"] or "pred_iou_thresh" not in used:
        return None
    return (
        "no objects: the grid of points dropped all masks; lower predict.pred_iou_thresh "
        f"({used['pred_iou_thresh']}) and predict.stability_score_thresh "
        f"({used['stability_score_thresh']}), or train an instance decoder (train.instances)"
    )


def _print_rejected(rejected: list[dict[str, Any]], listed_in: str) -> None:
    shown = 10
    for problem in rejected[:shown]:
        print(f"  rejected {problem['file']}: {problem['field']}: {problem['reason']}")
    if len(rejected) > shown:
        print(f"  and {len(rejected) - shown} more, all listed in {listed_in}")
