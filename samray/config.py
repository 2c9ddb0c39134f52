"""One YAML is one run: every setting, its unit and its default.

A config has one section per stage or concern. Values come, later ones winning, from the
defaults below, a YAML file, ``section.key=value`` words and the command line's options. The
resolved config is saved beside every output, so any result tells how to repeat it.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from samray.errors import ConfigError
from samray.storage import Place, read_bytes, resolve, write_bytes

ModelType = Literal["tiny", "vit_b", "vit_l", "vit_h"]
PointSelection = Literal["center", "random", "bbox", "mixed", "interactive"]
Split = Literal["train", "val", "test"]

MAX_BOX_NOISE = 20.0  # pixels; Segment Anything, appendix A

# From random weights SAM's own 20 : 1 first learns, for thousands of images, to predict nothing.
FOCAL_WEIGHT_TUNING, FOCAL_WEIGHT_SCRATCH = 20.0, 1.0


class Section(BaseModel):
    """Frozen, and a misspelt key is an error instead of a setting that does nothing."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SampleDataConfig(Section):
    """`samray sample-data`: draw a LabelMe dataset to try things on."""

    output_dir: str | None = None
    """Folder to draw into."""
    num_images: int = Field(60, ge=1)
    """Images to draw."""
    seed: int = Field(0, ge=0)
    """The same seed draws the same images, byte for byte."""


class PrepareConfig(Section):
    """`samray prepare`: LabelMe pairs to a prepared dataset."""

    data_dir: str | None = None
    """Folder of images and LabelMe JSON files, in any layout."""
    output_dir: str | None = None
    """Folder for the prepared dataset."""
    labels: tuple[str, ...] | None = None
    """Keep these labels only, as named after `label_map`; none given keeps all."""
    label_map: str | None = None
    """JSON or YAML file of {old label: new label}; null as the new label drops the shape."""
    split_file: str | None = None
    """JSON {"train": [image, ...], "val": ..., "test": ...} or CSV lines `image,split`."""
    group_by: str | None = None
    """`folder`, or a regular expression on the image's path (its first group, else all of it)."""
    val_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the images, by hash, for choosing the best checkpoint."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the images, by hash, that only evaluation sees."""
    join_groups: bool = True
    """Shapes of one label and one group_id are one instance; false lets each stand alone."""
    images_per_shard: int = Field(32, ge=1)
    """Images in one Parquet shard, which is one parallel task."""
    tile: int | None = Field(None, ge=64)
    """Cut images that are larger than this many pixels, in width or height, into tiles."""
    overlap: int | None = Field(None, ge=0)
    """Pixels that neighbouring tiles share; unset: a quarter of `tile`. As wide as the objects."""
    max_megapixels: float = Field(100.0, gt=0, le=170)
    """Larger images are refused by their header, before they are decoded."""
    visualize: bool = False
    """Write pictures with the masks drawn over them to OUTPUT_DIR/overlays."""
    num_samples: int = Field(20, ge=1)
    """How many of those pictures."""
    strict: bool = False
    """Anything bad in the input makes the stage fail and publish nothing."""

    @property
    def overlap_pixels(self) -> int:
        """`overlap`, or what it is unset."""
        return (self.tile or 0) // 4 if self.overlap is None else self.overlap

    @model_validator(mode="after")
    def _overlap_at_most_half_a_tile(self) -> Self:
        if self.overlap is not None and self.tile is None:
            raise ValueError("overlap is for tiles; give prepare.tile (--tile), too")
        if self.tile is not None and self.overlap_pixels > self.tile // 2:
            raise ValueError(f"overlap {self.overlap} must be at most half of tile {self.tile}")
        return self

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                "val_fraction + test_fraction must be below 1, or nothing is trained on"
            )
        return self


class ExportConfig(Section):
    """`samray export`: a prepared dataset back to files for other tools."""

    data_dir: str | None = None
    """A prepared dataset."""
    output_dir: str | None = None
    """Folder to write."""
    format: Literal["labelme", "coco"] = "labelme"
    """LabelMe, one JSON an image; or COCO, one JSON a split."""


class InspectConfig(Section):
    """`samray inspect`: see what a model will see."""

    data_dir: str | None = None
    """A prepared dataset."""
    output_dir: str | None = None
    """Folder for the pictures."""
    num_samples: int = Field(3, ge=1)
    """How many images."""
    point_selection: Literal["center", "random", "bbox"] = "center"
    """The prompt that each instance gets."""
    num_points: int = Field(1, ge=1, le=64)
    """Points an instance, for center and random."""
    seed: int = Field(0, ge=0)
    """Chooses the images and draws the prompts."""
    report: bool = False
    """Write report.html and report.json on the whole dataset, instead of the pictures."""
    strict: bool = False
    """A report with a problem in it makes the stage fail, once the report is written."""

    @model_validator(mode="after")
    def _be_strict_about_a_report(self) -> Self:
        if self.strict and not self.report:
            raise ValueError("strict (--strict) judges the report: add --report")
        return self


class ModelConfig(Section):
    """Which SAM, from which weights, and which of its parts learn."""

    type: ModelType = "tiny"
    """SAM's ViT-B, ViT-L, ViT-H, or samray's own `tiny`."""
    checkpoint: str | None = None
    """A weights file, a RUN, or `none` for random weights; unset takes the published ones."""
    freeze_image_encoder: bool | None = None
    """Unset: frozen when weights are given, trained when they are random."""
    freeze_prompt_encoder: bool = False
    """Keep the prompt encoder as it is."""
    freeze_mask_decoder: bool = False
    """Keep the mask decoder as it is."""


class MixtureConfig(Section):
    """How often `mixed` draws each kind of prompt, in proportion."""

    center: float = Field(1.0, ge=0)
    """Of the innermost point."""
    random: float = Field(1.0, ge=0)
    """Of a random point."""
    bbox: float = Field(1.0, ge=0)
    """Of a box."""

    @model_validator(mode="after")
    def _draw_something(self) -> Self:
        if not self.center + self.random + self.bbox > 0:
            raise ValueError("one of center, random and bbox must be above 0")
        return self


class PromptConfig(Section):
    """The prompts that training draws, afresh in every epoch."""

    point_selection: PointSelection = "mixed"
    """center, random or bbox for every instance; mixed draws one of the three for each;
    interactive begins with a random point or a box and then clicks on the answers' errors."""
    mixture: MixtureConfig = MixtureConfig()
    """How often `mixed` draws which."""
    num_points: int = Field(1, ge=1, le=64)
    """Points an instance, for center and random."""
    num_clicks: int = Field(8, ge=0, le=32)
    """Correction clicks at most, for interactive; each step draws how many."""
    box_noise: float = Field(0.1, ge=0, le=0.5)
    """Standard deviation of the box corners' noise, as a share of the box's side (max 20 px)."""


class LossConfig(Section):
    """Weights of the loss's three parts (Segment Anything, appendix A: 20, 1, 1)."""

    focal_weight: float | None = Field(None, ge=0)
    """Unset: 20 from given weights; 1 from random ones, which at 20 first learn nothing."""
    balanced_weight: float | None = Field(None, ge=0)
    """Of a cross-entropy in which object and ground count the same; it fades over the first fifth
    of the epochs. Unset: 0 from given weights; 1 from random ones, to get them started."""
    dice_weight: float = Field(1.0, ge=0)
    """Weight of the Dice loss."""
    iou_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of the predicted IoU."""


class TrainConfig(Section):
    """`samray train`: the run and its optimiser."""

    data_dir: str | None = None
    """A prepared dataset."""
    output_dir: str | None = None
    """The RUN folder."""
    batch_size: int = Field(2, ge=1)
    """Images in one optimiser step, over all workers, whose number thus changes no result."""
    num_epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    learning_rate: float = Field(1e-4, gt=0)
    """AdamW's peak learning rate, reached after the warm-up."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay."""
    warmup_steps: int = Field(20, ge=0)
    """Optimiser steps over which the learning rate rises from zero; then it falls as a cosine."""
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    clip_grad_norm: float = Field(1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of convolutions and matrix products; weights and sums stay float32."""
    max_prompts: int = Field(64, ge=1)
    """Instances decoded at once; a step with more recomputes in chunks, to save memory."""
    seed: int = Field(0, ge=0)
    """Orders the images, draws the prompts and any random weights."""
    resume: bool = False
    """Go on with the run in output_dir; only epochs and workers may have changed."""


class ScalingConfig(Section):
    """What the run takes of the cluster; named after Ray Train's ScalingConfig."""

    num_workers: int = Field(1, ge=1)
    """DDP processes."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes GPUs when the Ray cluster (not this machine) has one for each worker."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs and threads a worker; unset shares the CPUs of a single node out, else 1."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Share of a GPU a worker takes where it takes one; 0.25 lets four trials share one GPU."""


class EmbeddingsConfig(Section):
    """The cache of image embeddings, used while the image encoder is frozen."""

    cache_dir: str | None = None
    """Folder shared by all nodes; unset: `embeddings` inside the prepared dataset."""
    reserve_gb: float = Field(1.0, ge=0)
    """Disk space in GB that filling the cache must leave free."""


class PretrainConfig(Section):
    """`samray pretrain`: `tiny` from nothing, on drawn scenes. `train.*` holds the optimiser."""

    scenes_per_epoch: int = Field(4000, ge=1)
    """Scenes between two checkpoints; no scene is drawn twice."""
    regions_per_scene: int = Field(4, ge=1, le=40)
    """Regions of each scene to learn from."""
    val_scenes: int = Field(64, ge=1)
    """Scenes, never trained on, by which the best checkpoint is chosen."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop in time, at the end of an epoch; --resume goes on."""
    export_dir: str | None = None
    """Folder for the best weights, in the form that the package ships."""


class TuneConfig(Section):
    """`samray tune`: a sweep over settings; each trial is a `samray train`."""

    data_dir: str | None = None
    """A prepared dataset."""
    output_dir: str | None = None
    """The SWEEP folder."""
    search_space: dict[str, Any] = {}
    """Dotted path of a setting -> one of Ray Tune's words with its arguments, such as
    {loguniform: [1e-5, 1e-2]}, {choice: [center, bbox]}, {grid_search: [1, 2]}."""
    num_trials: int | None = Field(None, ge=1)
    """Trials in all; unset: 16, or each point of a grid once."""
    search: Literal["random", "optuna"] = "random"
    """optuna (installed by hand) learns from the trials before; grids are always searched whole."""
    try_default: bool = True
    """The first trial is the config as it stands, where that lies in the search space."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops trials that lag behind at the same epoch; none lets all train to the end."""
    grace_epochs: int = Field(2, ge=1)
    """Epochs before asha stops anything."""
    reduction_factor: float = Field(3.0, gt=1)
    """asha lets the best 1 / reduction_factor go on, at each of its rungs."""
    metric: str = "val_iou"
    """What trials are compared by: val_iou is the mean over the prompt matrix."""
    max_failures: int = Field(1, ge=0)
    """Times that a crashed trial is tried again."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Trials side by side; unset: as many as the cluster has room for."""
    mlflow_uri: str | None = None
    """Also log every trial to this MLflow server or folder (needs mlflow installed)."""
    seed: int = Field(0, ge=0)
    """Draws the trials' settings; each trial trains with train.seed."""


class PromoteConfig(Section):
    """`samray promote` and `samray models`: the store of models that are served."""

    checkpoint: str | None = None
    """A RUN, or a SWEEP, of which the best trial counts."""
    store: str | None = None
    """Folder or s3:// of the store."""
    name: str | None = None
    """Name of the model in the store."""
    data_dir: str | None = None
    """The prepared dataset whose test split guards; unset: the one that was trained on."""
    max_forgetting: float = Field(0.02, ge=0, le=1)
    """mIoU that a kind of prompt which was not trained with may lose against the base."""
    force: bool = False
    """Promote although the guard refuses; the record says so."""
    rollback: bool = False
    """Instead, make the version before the current one current again."""
    version: str | None = None
    """With rollback: that version."""

    @model_validator(mode="after")
    def _know_where_to(self) -> Self:
        if self.version and not self.rollback:
            raise ValueError("version says where to go back to; add rollback (--rollback)")
        return self


class ServeConfig(Section):
    """`samray serve`: the endpoint. Also the arguments in `configs/serve.yaml`."""

    checkpoint: str | None = None
    """A RUN, SWEEP, checkpoint folder or ViT weights file; unset, without a store: `tiny`."""
    store: str | None = None
    """A store of models, whose `current` versions are served, new ones as they are promoted."""
    model: str | None = None
    """Name of the one model of the store to serve; unset: all."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own need a token."""
    port: int = Field(8000, ge=1, le=65535)
    """TCP port."""
    token_file: str | None = None
    """File with the token that clients must send; else $SAMRAY_TOKEN, else none."""
    cors_origins: tuple[str, ...] = ()
    """Pages of these origins may ask, e.g. https://annotate.example.org."""
    label_studio_url: str | None = None
    """Address of Label Studio, the only one that its pictures are fetched from."""
    label_studio_key_file: str | None = None
    """File with an access token of Label Studio's; else $LABEL_STUDIO_API_KEY, else none."""
    label_studio_timeout_seconds: float = Field(20.0, gt=0)
    """A picture that takes longer is given up."""
    decoder_replicas: int = Field(1, ge=1)
    """Processes that answer prompts; each image and model has its own among them."""
    encoder_replicas: int = Field(1, ge=1)
    """Processes that encode images, at most."""
    encode_batch: int | None = Field(None, ge=1)
    """Images encoded together, at most; unset: 4 on a GPU, 1 without, where it saves nothing."""
    cpus_per_replica: float = Field(0.5, gt=0)
    """CPUs that Ray sets aside for each of those processes."""
    gpus_per_replica: float = Field(0.0, ge=0, le=1)
    """Share of a GPU for each of those processes."""
    threads: int = Field(1, ge=1)
    """Threads of torch in each of those processes."""
    embedding_cache_mb: int = Field(512, ge=1)
    """Embeddings a decoder keeps, in MiB; `tiny` needs 1/16 an image, ViTs 2."""
    logits_cache_mb: int = Field(128, ge=1)
    """Answers a decoder keeps for correction clicks, in MiB."""
    image_cache_mb: int = Field(1024, ge=1)
    """Image files kept, in MiB."""
    max_body_mb: float = Field(64.0, gt=0)
    """Larger requests are refused while they arrive, in MiB."""
    max_megapixels: float = Field(100.0, gt=0, le=170)
    """Larger images are refused by their header."""
    max_in_flight: int = Field(64, ge=1)
    """Requests that may wait for masks; more are answered 429."""
    timeout_seconds: float = Field(60.0, gt=0)
    """An answer that takes longer is given up."""


class LabelmeConfig(Section):
    """`samray labelme`: labelme with an endpoint behind its AI tools."""

    url: str = "http://127.0.0.1:8000"
    """Address of the endpoint."""
    token_file: str | None = None
    """File with the endpoint's token; else $SAMRAY_TOKEN, else none."""
    arguments: tuple[str, ...] = ()
    """Words for labelme's own command line."""


class EvaluateConfig(Section):
    """`samray evaluate`: base against tuned."""

    data_dir: str | None = None
    """A prepared dataset."""
    checkpoint: str | None = None
    """A RUN folder."""
    output_dir: str | None = None
    """Folder for evaluation.json and report.html."""
    split: Split = "test"
    """Split to score."""
    seed: int = Field(0, ge=0)
    """Draws the evaluation prompts; keep it to compare runs."""
    num_overlays: int = Field(6, ge=0, le=50)
    """Worst and best instances to show in the report, each."""


class PredictConfig(Section):
    """`samray predict`: one image and its prompt to a mask; or many images to all their objects."""

    checkpoint: str | None = None
    """A RUN folder, a checkpoint folder or a ViT weights file; unset: `tiny` as it ships."""
    image_path: str | None = None
    """The image; or a folder of images, in any layout."""
    prompts: str | None = None
    """JSON {"images/a.jpg": [prompt, ...], ...}, prompts as the endpoint's, names as seen from
    `image_path`; without it, and without points and box, everything in the images is segmented."""
    points: tuple[tuple[float, float], ...] = ()
    """Foreground points (x, y) in pixels of the image as shown (EXIF applied)."""
    negative_points: tuple[tuple[float, float], ...] = ()
    """Background points (x, y)."""
    box: tuple[float, float, float, float] | None = None
    """Box (x1, y1, x2, y2)."""
    tile: int | None = Field(None, ge=64)
    """In a larger image, look at this many pixels a side around the prompt; as prepare.tile."""
    label: str = "object"
    """Label to write in the LabelMe JSON."""
    output_dir: str | None = None
    """Folder for mask, overlay and LabelMe JSON; of many images, for label maps, CSV and LabelMe
    JSON, in the folders that the images lie in."""
    points_per_side: int = Field(32, ge=1, le=256)
    """Everything: this many points across the image and down it are asked about."""
    pred_iou_thresh: float | None = Field(None, ge=0, le=1)
    """Everything: masks of lower predicted IoU are left out. Unset: SAM's 0.88; for `tiny`, whose
    predictions are too low, 0.4."""
    stability_score_thresh: float | None = Field(None, ge=0, le=1)
    """Everything: masks that change more with the logits' cutoff are left out. Unset: SAM's 0.95;
    for `tiny` 0.9."""
    min_mask_region_area: int = Field(0, ge=0)
    """Everything: parts and holes of a mask below this many pixels are removed."""


class Config(Section):
    """A whole run; each stage reads the sections it needs."""

    sample_data: SampleDataConfig = SampleDataConfig()
    prepare: PrepareConfig = PrepareConfig()
    export: ExportConfig = ExportConfig()
    inspect: InspectConfig = InspectConfig()
    model: ModelConfig = ModelConfig()
    prompts: PromptConfig = PromptConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    scaling: ScalingConfig = ScalingConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    pretrain: PretrainConfig = PretrainConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    serve: ServeConfig = ServeConfig()
    labelme: LabelmeConfig = LabelmeConfig()
    predict: PredictConfig = PredictConfig()


def load_config(
    path: str | Place | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Merge a YAML file, ``section.key=value`` words and options into one checked config.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: words such as ``train.learning_rate=1e-5``; values are read as YAML.
        options: dotted path -> value, from the command line's options; they win.

    Raises:
        ConfigError: one error that lists every mistake with its dotted path.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if isinstance(path, str):  # a relative one lies in a Ray job's own folder, and shall
            path = resolve(path, "--config") if "://" in path else Path(path)
        values = _read_yaml(path)
    mistakes: list[str] = []
    for word in overrides:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            mistakes.append(f"'{word}' is not of the form section.key=value")
            continue
        try:
            _set(values, dotted, yaml.safe_load(text))
        except (yaml.YAMLError, ValueError) as exc:
            mistakes.append(f"{dotted}: {' '.join(str(exc).split())}")
    for dotted, value in (options or {}).items():
        try:
            _set(values, dotted, value)
        except ValueError as exc:
            mistakes.append(f"{dotted}: {exc}")
    source = str(path) if path is not None else "config"
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        mistakes += [_explain(error) for error in exc.errors()]
    if mistakes:
        raise ConfigError(f"{source}: " + "; ".join(mistakes))
    return config


def with_settings(config: Config, settings: Mapping[str, Any], what: str) -> Config:
    """Return the config with some settings changed.

    Args:
        settings: dotted path -> value.
        what: who asks, for the error.

    Raises:
        ConfigError: one error that lists every mistake with its dotted path.
    """
    values = config.model_dump()
    mistakes = []
    for dotted, value in settings.items():
        try:
            _set(values, dotted, value)
        except ValueError as exc:
            mistakes.append(f"{dotted}: {exc}")
    try:
        changed = Config.model_validate(values)
    except ValidationError as exc:
        mistakes += [_explain(error) for error in exc.errors()]
    if mistakes:
        raise ConfigError(f"{what}: " + "; ".join(mistakes))
    return changed


def save_config(config: Config, path: Place) -> None:
    """Write the resolved config as YAML that `load_config` reads back."""
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_bytes(path, content.encode())


def resolve_model(config: Config, weights_given: bool) -> Config:
    """Return the config with the settings that follow from whether weights are given.

    Raises:
        ConfigError: all three parts are frozen.
    """
    model = config.model
    freeze = weights_given if model.freeze_image_encoder is None else model.freeze_image_encoder
    if freeze and model.freeze_prompt_encoder and model.freeze_mask_decoder:
        raise ConfigError("all three parts of the model are frozen; leave one to train")
    focal = config.loss.focal_weight
    if focal is None:
        focal = FOCAL_WEIGHT_TUNING if weights_given else FOCAL_WEIGHT_SCRATCH
    balanced = config.loss.balanced_weight
    if balanced is None:
        balanced = 0.0 if weights_given else 1.0
    return config.model_copy(
        update={
            "model": model.model_copy(update={"freeze_image_encoder": freeze}),
            "loss": config.loss.model_copy(
                update={"focal_weight": focal, "balanced_weight": balanced}
            ),
        }
    )


def required(config: Config, *dotted_paths: str) -> list[str]:
    """Return the values of settings that a stage cannot do without.

    Raises:
        ConfigError: naming every one that is missing, as option and as setting.
    """
    values, missing = [], []
    for dotted in dotted_paths:
        section, key = dotted.split(".")
        value = getattr(getattr(config, section), key)
        values.append(value)
        if value is None or value == "":
            missing.append(f"--{key.replace('_', '-')} (or {dotted}=...)")
    if missing:
        raise ConfigError("missing " + " and ".join(missing))
    return values


def _read_yaml(path: Place) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_bytes(path))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror}); check --config") from exc
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(exc).split())}") from exc
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold sections such as `train:`, not a {type(values).__name__}"
        )
    # A section with every line commented out reads as null.
    return {section: {} if content is None else content for section, content in values.items()}


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ValueError(f"{section} is not a section")
    values[key] = value


def _explain(error: Any) -> str:
    """One pydantic error as `dotted.path ...`, with the valid names for an unknown key."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    *sections, key = (str(part) for part in error["loc"])
    model: type[BaseModel] = Config
    for section in sections:
        annotation = model.model_fields[section].annotation
        if not isinstance(annotation, type):  # tune.search_space's own keys
            break
        assert issubclass(annotation, BaseModel)
        model = annotation
    names = list(model.model_fields)
    close = difflib.get_close_matches(key, names, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return (
        f"{where} is not a setting{hint}; {'.'.join(sections) or 'a config'} has {', '.join(names)}"
    )
