"""Settings: every one with its unit and default; one YAML file describes one run.

A config has one section per stage or concern. Values come from the defaults below, a YAML file,
``section.key=value`` words and command-line options; later sources win. The resolved config is
saved with every output, so any result can be reproduced.

The docstring of a field is its documentation: its first sentence is the help of the option.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from samray.errors import ConfigError, StorageError
from samray.storage import Place, read_bytes, resolve, write_bytes

ModelType = Literal["tiny", "vit_b", "vit_l", "vit_h"]
PointSelection = Literal["center", "random", "bbox", "mixed", "interactive"]
Split = Literal["train", "val", "test"]

MAX_BOX_NOISE = 20.0  # pixels; Segment Anything, appendix A
MIN_TILE = 64  # pixels

# `docs/measurements.md` has the comparison for `tiny`; 1e-4 is MedSAM's.
LEARNING_RATE_TINY, LEARNING_RATE_VIT = 3e-4, 1e-4

# Transformer blocks of the image encoder; stages of `tiny`.
ENCODER_BLOCKS = {"tiny": 4, "vit_b": 12, "vit_l": 24, "vit_h": 32}

# With SAM's own ratio of 20 : 1, a decoder with random weights predicts empty masks for thousands
# of images before it learns anything else.
FOCAL_WEIGHT_TUNING, FOCAL_WEIGHT_SCRATCH = 20.0, 1.0


class Section(BaseModel):
    """A frozen group of settings; a misspelt key is an error, not a setting without effect."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


def _without_secret(uri: str, instead: str) -> str:
    """Refuse secrets in an address, because settings are saved with every output."""
    if re.search(r"//[^/@]*@|[?&]\w*(password|token|secret|key)\w*=", uri, re.IGNORECASE):
        raise PydanticCustomError(  # of a type of its own, whose input is not shown
            "secret",
            "holds a user or a password, which would be saved with the run; {instead}",
            {"instead": instead},
        )
    return uri


def _secret_goes(instead: str) -> AfterValidator:
    return AfterValidator(functools.partial(_without_secret, instead=instead))


_MLFLOW_WAY = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
MlflowUri = Annotated[str, _secret_goes(_MLFLOW_WAY)]
LabelStudioUrl = Annotated[str, _secret_goes("give the key in --label-studio-key-file")]
EndpointUrl = Annotated[str, _secret_goes("give the token in --token-file")]


def _number_or_range(value: Any) -> int | str:
    """Check a number of at least 1, or a range such as `2..8`."""
    found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value).replace(" ", ""))
    low, high = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if isinstance(value, bool) or not 1 <= low <= high:
        raise PydanticCustomError(
            "range", "must be a number of at least 1, or MIN..MAX such as 2..8, where MIN <= MAX"
        )
    return low if low == high else f"{low}..{high}"


NumberOrRange = Annotated[int | str, PlainValidator(_number_or_range)]


class SampleDataConfig(Section):
    """`samray sample-data`: draw a LabelMe dataset to try samray with."""

    output_dir: str | None = None
    """Folder to draw the dataset into."""
    num_images: int = Field(60, ge=1)
    """Number of images."""
    seed: int = Field(0, ge=0)
    """Random seed; the same seed draws the same images, byte for byte."""


class PrepareConfig(Section):
    """`samray prepare`: annotated images to a prepared dataset."""

    data_dir: str | None = None
    """Folder of images and their LabelMe or COCO JSON files, in any layout."""
    output_dir: str | None = None
    """Folder of the prepared dataset to write."""
    link_root: str | None = None
    """Local folder; symbolic links of `data_dir` that lead into it are followed, as in a dataset of
    links into a store; unset: links out of `data_dir` are not."""
    labels: tuple[str, ...] | None = None
    """Labels to keep, as they are named after `label_map`; unset: all."""
    label_map: str | None = None
    """JSON or YAML file {old label: new label}; null as the new label drops the shapes."""
    split_file: str | None = None
    """Split of each image: JSON {"train": [image, ...], "val": ..., "test": ...} or CSV lines
    `image,split`; unset: by hash."""
    group_by: str | None = None
    """Images to keep in one split: `folder` for those of a folder, or a regular expression for
    those whose paths give the same match (its first group, else the whole match)."""
    split_folders: bool = True
    """Folders named train, val (valid, validation) and test are the splits, if train and another
    one hold annotated images; `split_file` and `group_by` override it."""
    val_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the images, chosen by hash, in the validation split, which selects the best
    checkpoint."""
    test_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the images, chosen by hash, in the test split, which only evaluation reads."""
    join_groups: bool = True
    """Join shapes of the same label and group_id into one instance; false: one instance each."""
    crowd_as_instances: bool = False
    """Take COCO annotations with `iscrowd` 1 as instances; CVAT writes brush masks so."""
    images_per_shard: int = Field(32, ge=1)
    """Images per Parquet shard; each shard is one parallel task."""
    tile: int | None = Field(None, ge=MIN_TILE)
    """Cut images that exceed this width or height, in pixels, into tiles of that side; unset:
    no tiles."""
    overlap: int | None = Field(None, ge=0)
    """Overlap of neighbouring tiles in pixels, best as wide as the objects; unset: a quarter of
    `tile`."""
    max_megapixels: float = Field(100.0, gt=0, le=170)
    """Largest image accepted, in megapixels; checked in the file's header, before decoding."""
    visualize: bool = False
    """Write overlays of the masks on their images to OUTPUT_DIR/overlays."""
    num_samples: int = Field(20, ge=1)
    """`visualize` writes overlays of so many images, the first ones; of a rejected one, none."""
    strict: bool = False
    """Fail and publish nothing if any part of the input is bad."""

    @property
    def overlap_pixels(self) -> int:
        """`overlap`, or its default, in pixels."""
        return (self.tile or 0) // 4 if self.overlap is None else self.overlap

    @model_validator(mode="after")
    def _overlap_at_most_half_a_tile(self) -> Self:
        if self.overlap is not None and self.tile is None:
            raise ValueError("overlap is for tiles; add prepare.tile (--tile)")
        if self.tile is not None and self.overlap_pixels > self.tile // 2:
            raise ValueError(f"overlap {self.overlap} must be at most half of tile {self.tile}")
        return self

    @model_validator(mode="after")
    def _fractions_leave_a_training_split(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError(
                "val_fraction + test_fraction must be below 1, or nothing is trained on"
            )
        return self


class ExportConfig(Section):
    """`samray export`: a prepared dataset back to files for other tools."""

    data_dir: str | None = None
    """Folder of the prepared dataset."""
    output_dir: str | None = None
    """Folder to write the files to."""
    format: Literal["labelme", "coco"] = "labelme"
    """Format of the files: `labelme`, one JSON per image, or `coco`, one JSON per split."""


class InspectConfig(Section):
    """`samray inspect`: view a prepared dataset as the model will see it."""

    data_dir: str | None = None
    """Folder of the prepared dataset."""
    output_dir: str | None = None
    """Folder to write the pictures or the report to."""
    num_samples: int = Field(3, ge=1)
    """Number of images to draw."""
    point_selection: Literal["center", "random", "bbox"] = "center"
    """Prompt of each instance: its innermost point, random points, or its box."""
    num_points: int = Field(1, ge=1, le=64)
    """Points per instance, for center and random."""
    seed: int = Field(0, ge=0)
    """Random seed that selects the images and draws the prompts."""
    report: bool = False
    """Write report.html and report.json about the whole dataset instead of pictures."""
    strict: bool = False
    """With `report`: fail after writing it if anything was rejected or warned about, or is in
    two splits."""

    @model_validator(mode="after")
    def _strict_needs_a_report(self) -> Self:
        if self.strict and not self.report:
            raise ValueError("strict (--strict) checks the report; add --report")
        return self


class ModelConfig(Section):
    """Which SAM, its initial weights, and which parts are trained."""

    type: ModelType = "tiny"
    """Architecture: SAM's ViT-B, ViT-L or ViT-H, or samray's own small `tiny`."""
    checkpoint: str | None = None
    """Initial weights: a weights file, a RUN folder, or `none` for random ones; unset: the
    published weights of the type."""
    adapt: Literal["none", "lora", "full"] | None = None
    """How the image encoder learns: not at all, through LoRA adapters on the attention of a ViT, or
    in full; unset: full for tiny and random weights, else lora."""
    adapt_blocks: Annotated[int, Field(ge=0)] | Literal["all"] | None = None
    """How many of the image encoder's last blocks learn (stages of tiny), or `all`; what comes
    before them is computed once an image and cached; unset: all for tiny and random weights, else
    the last quarter."""
    lora_rank: int = Field(8, ge=1)
    """Rank of the LoRA adapters."""
    freeze_image_encoder: bool | None = None
    """Keep the image encoder's weights fixed, as `adapt: none`; false is `adapt: full` with all
    blocks."""
    freeze_prompt_encoder: bool = False
    """Keep the prompt encoder's weights fixed."""
    freeze_mask_decoder: bool = False
    """Keep the mask decoder's weights fixed."""


class MixtureConfig(Section):
    """Relative frequencies of the prompts that `mixed` draws."""

    center: float = Field(1.0, ge=0)
    """Relative frequency of the innermost point."""
    random: float = Field(1.0, ge=0)
    """Relative frequency of random points."""
    bbox: float = Field(1.0, ge=0)
    """Relative frequency of a box."""

    @model_validator(mode="after")
    def _not_all_zero(self) -> Self:
        if not self.center + self.random + self.bbox > 0:
            raise ValueError("one of center, random and bbox must be above 0")
        return self


class PromptConfig(Section):
    """The training prompts, drawn again in every epoch."""

    point_selection: PointSelection = "interactive"
    """Prompt of each instance: center, random or bbox; mixed draws one of these three for each;
    interactive starts with one of them and adds clicks on the prediction's errors."""
    mixture: MixtureConfig = MixtureConfig()
    """Relative frequencies of the prompts that `mixed` draws, and `interactive` starts with."""
    num_points: int = Field(1, ge=1, le=64)
    """Points per instance, for center and random."""
    num_clicks: int = Field(3, ge=0, le=32)
    """Maximum number of correction clicks, for interactive; each step draws the number."""
    per_object: int = Field(1, ge=1, le=16)
    """Prompts drawn for each instance in a step."""
    box_noise: float = Field(0.1, ge=0, le=0.5)
    """Standard deviation of the noise on box corners, as a share of the box's side; the noise is
    limited to 20 pixels."""


class LossConfig(Section):
    """Weights of the parts of the loss (Segment Anything, appendix A: 20, 1, 1)."""

    focal_weight: float | None = Field(None, ge=0)
    """Weight of the focal loss; unset: 1 if the initial weights are random, which at 20 learn
    nothing at first, else 20."""
    balanced_weight: float | None = Field(None, ge=0)
    """Weight of a cross-entropy in which object and background count the same, faded out over the
    first fifth of the epochs; unset: 1 if the initial weights are random, else 0."""
    dice_weight: float = Field(1.0, ge=0)
    """Weight of the Dice loss."""
    iou_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of the predicted IoU."""


class TrainConfig(Section):
    """`samray train`: the run and its optimiser."""

    data_dir: str | None = None
    """Folder of the prepared dataset."""
    output_dir: str | None = None
    """RUN folder to write."""
    batch_size: int = Field(2, ge=1)
    """Images per optimiser step, over all workers, so their number does not change the result."""
    num_epochs: int = Field(20, ge=1)
    """Number of epochs. An epoch is one pass over the training split, or
    `pretrain.scenes_per_epoch` scenes."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of AdamW, reached after the warm-up; unset: 3e-4 for tiny, 1e-4 for
    ViTs."""
    encoder_lr_share: float = Field(1.0, gt=0, le=1)
    """Learning rate of the image encoder, as a share of the learning rate of the other parts."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""
    warmup_steps: int = Field(20, ge=0)
    """Optimiser steps over which the learning rate rises linearly from zero, before its cosine
    decay."""
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    clip_grad_norm: float = Field(1.0, gt=0)
    """Maximum norm of the gradient; longer gradients are scaled down to it."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of convolutions and matrix products; weights and sums stay float32. auto: bfloat16
    on a GPU that computes in it, float16 (with a scaled loss) on an older one, float32 on a CPU."""
    images_at_once: int | None = Field(None, ge=1)
    """Images of a worker in one pass; a step of more adds up the gradients of several passes, which
    gives the same step in less memory; unset: all."""
    recompute_encoder: bool = False
    """Compute the image encoder's trained blocks again in the backward pass instead of keeping
    their activations: the same step in less memory and more time."""
    max_objects: int | None = Field(None, ge=1)
    """Instances of an image to train on in one step, in turn over the epochs, and to validate with,
    the same in every epoch; unset: all."""
    augment: bool = True
    """Flip, turn and recolour the images anew in each epoch, where all blocks of the image encoder
    learn; else see `cached_views`."""
    cached_views: int = Field(1, ge=1, le=64)
    """Views of a training image in the cache, where one is used: the image as it is, and others
    flipped, turned and recoloured, which epochs take in turn. Each is encoded once and takes as
    much of the disk as the image."""
    max_prompts: int = Field(64, ge=1)
    """Instances decoded at once, at most; a step with more is computed in parts, to save memory.
    A CPU takes as many as its cache holds: 2 with a ViT, 64 with tiny."""
    seed: int = Field(0, ge=0)
    """Random seed of the image order, the prompts and any random weights."""
    instances: Literal["auto"] | bool = "auto"
    """Train a decoder beside the model that finds every object of an image, with its label; auto:
    yes. The model's own weights are the same with it as without."""
    checkpoint_minutes: float | None = Field(10.0, gt=0)
    """Write a checkpoint within an epoch, too, after so many minutes without one; `resume` goes on
    from it. Unset (null): only at the end of each epoch."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many epochs in a row without a new best; unset: train all epochs."""
    dry_run: bool = False
    """Print what would be trained and what it needs (steps, cache, memory, seconds), and stop."""
    mlflow_uri: MlflowUri | None = None
    """MLflow server, database or folder to log the run to, beside RUN/tensorboard; mlflow must be
    installed."""
    resume: bool = False
    """Resume the run in `output_dir`; only the numbers of epochs and workers, patience, and what
    limits memory (max_prompts, images_at_once, recompute_encoder), may have changed."""


class ScalingConfig(Section):
    """What a run uses of the cluster; named after Ray Train's ScalingConfig."""

    num_workers: NumberOrRange = 1
    """Number of DDP processes, at least 1; or MIN..MAX, such as 2..8: as many of them as the
    cluster has room for, looked at each minute; `train` only."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to compute on; auto uses GPUs if the Ray cluster (not this machine) has enough."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """CPUs and threads per worker; unset: an equal share of a single node's CPUs, else 1."""
    gpus_per_worker: float = Field(1.0, gt=0, le=1)
    """Share of a GPU per worker, if GPUs are used; 0.25 lets four trials share one GPU."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of a run's workers in a row, without a new checkpoint in between, after one of them
    died or hung; then, or with 0, the run ends, and `train.resume` continues it."""
    hang_minutes: float = Field(10.0, gt=0)
    """Minutes that workers wait for one that does nothing, before they are restarted; more than
    rank 0 takes to write a checkpoint."""

    @property
    def min_workers(self) -> int:
        """Lowest number of workers."""
        return int(str(self.num_workers).partition("..")[0])

    @property
    def max_workers(self) -> int:
        """Highest number of workers."""
        return int(str(self.num_workers).rpartition("..")[2])


class EmbeddingsConfig(Section):
    """The cache of what the frozen blocks of the image encoder make of each image."""

    cache_dir: str | None = None
    """Folder of the cache, shared by all nodes; unset: `embeddings` inside the prepared dataset."""
    reserve_gb: float = Field(1.0, ge=0)
    """Disk space that filling the cache must leave free, in GB."""
    precision: Literal["auto", "float32"] = "auto"
    """Of encoding for the cache and for `evaluate`. auto: float16 on a GPU, for images whose values
    it can hold; float32 for others and on a CPU. Embeddings of both kinds are kept apart in the
    cache."""
    compile: bool = False
    """Compile the image encoder with torch.compile before filling the cache on a GPU, which takes
    half a minute in each process: it was 1.5 times as fast on one H200. Each node needs a C
    compiler. No effect on a CPU."""


class PretrainConfig(Section):
    """`samray pretrain`: train `tiny` from random weights on drawn scenes; see also `train`."""

    scenes_per_epoch: int = Field(4000, ge=1)
    """Scenes per epoch; no scene is drawn twice."""
    regions_per_scene: int = Field(4, ge=1, le=40)
    """Regions of each scene to train on."""
    val_scenes: int = Field(64, ge=1)
    """Scenes, never trained on, that select the best checkpoint."""
    max_minutes: float | None = Field(None, gt=0)
    """Time limit in minutes; no epoch that would exceed it is started; `resume` continues."""
    export_dir: str | None = None
    """Folder to write the best weights to, in the form that the package ships."""


class TuneConfig(Section):
    """`samray tune`: a sweep over settings; each trial is a `samray train`."""

    data_dir: str | None = None
    """Folder of the prepared dataset."""
    output_dir: str | None = None
    """SWEEP folder to write; if it holds an interrupted sweep, the same command continues it."""
    search_space: dict[str, Any] = {}
    """Settings to search: dotted path -> one of Ray Tune's search space functions with its
    arguments, such as {loguniform: [1e-5, 1e-2]}, {choice: [center, bbox]}, {grid_search: [1, 2]};
    unset: the learning rate within a factor of 10, and the prompt strategy."""
    num_trials: int | None = Field(None, ge=1)
    """Number of trials; unset: 16, or each point of a grid once."""
    search: Literal["random", "optuna"] = "random"
    """Search algorithm; optuna (to be installed separately) learns from finished trials. Grids are
    always searched completely."""
    try_default: bool = True
    """Use the config as it is for the first trial, if it lies in the search space."""
    scheduler: Literal["asha", "none"] = "asha"
    """Early stopping: asha stops trials that lag behind at the same epoch, none stops no trial."""
    grace_epochs: int = Field(2, ge=1)
    """Epochs that asha lets every trial train."""
    reduction_factor: float = Field(3.0, gt=1)
    """Reduction factor of asha: the best 1 / reduction_factor continue at each rung."""
    metric: str = "val_iou"
    """Metric to compare trials by: val_iou, the mean over the prompt matrix; val_dice; a row such
    as val_iou_clicks; val_msa, how well all objects are found (needs `train.instances`)."""
    max_failures: int = Field(1, ge=0)
    """Retries of a trial that crashed."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Maximum number of trials at the same time; unset: as many as fit the cluster."""
    mlflow_uri: MlflowUri | None = None
    """MLflow server, database or folder to log every trial to; mlflow must be installed."""
    seed: int = Field(0, ge=0)
    """Random seed of the trials' settings; the trials themselves train with train.seed."""


class PromoteConfig(Section):
    """`samray promote` and `samray models`: the store of models to serve."""

    checkpoint: str | None = None
    """RUN folder or one of its checkpoints to promote, or a SWEEP folder, whose best trial is
    promoted."""
    store: str | None = None
    """Folder or s3:// prefix of the store."""
    name: str | None = None
    """Name of the model in the store."""
    data_dir: str | None = None
    """Prepared dataset whose test split the guard scores; unset: the dataset trained on."""
    max_forgetting: float = Field(0.02, ge=0, le=1)
    """Largest loss of mIoU against the base for a kind of prompt that was not trained with; with
    fewer than five test photos, the largest loss of any score."""
    force: bool = False
    """Promote even if the guard refuses; the version's record notes it."""
    rollback: bool = False
    """Make the version before the current one current again, instead of promoting."""
    version: str | None = None
    """With `rollback`: the version to make current; unset: the one before."""

    @model_validator(mode="after")
    def _version_needs_rollback(self) -> Self:
        if self.version and not self.rollback:
            raise ValueError("version is the one to roll back to; add rollback (--rollback)")
        return self


class ServeConfig(Section):
    """`samray serve`: the endpoint; also the arguments in `configs/serve.yaml`."""

    checkpoint: str | None = None
    """Model to serve: a RUN, SWEEP or checkpoint folder or a ViT weights file; unset, without a
    store: `tiny`."""
    store: str | None = None
    """Store of models to serve the current versions of, following new promotions."""
    model: str | None = None
    """Name of the only model of the store to serve; unset: all."""
    host: str = "127.0.0.1"
    """Address to listen on; any address that other machines can reach needs a token."""
    port: int = Field(8000, ge=1, le=65535)
    """TCP port to listen on."""
    token_file: str | None = None
    """File with the token that clients must send; unset: $SAMRAY_TOKEN, else no token."""
    cors_origins: tuple[str, ...] = ()
    """Origin whose pages may send requests, such as https://annotate.example.org; repeatable."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may address, for example behind a reverse proxy; unset: any with a
    token, only this machine's without one."""
    label_studio_url: LabelStudioUrl | None = None
    """Address of Label Studio, the only one that /compat/labelstudio fetches images from."""
    label_studio_key_file: str | None = None
    """File with your personal access token of Label Studio, or a legacy one; unset:
    $LABEL_STUDIO_API_KEY, else none."""
    label_studio_timeout_seconds: float = Field(20.0, gt=0)
    """Time limit for fetching an image from Label Studio, in seconds."""
    decoder_replicas: int = Field(1, ge=1)
    """Decoder processes, which answer prompts; each pair of image and model is sent to one."""
    encoder_replicas: int = Field(1, ge=1)
    """Maximum number of encoder processes, which encode images."""
    encode_batch: int | None = Field(None, ge=1)
    """Maximum number of images encoded together; unset: 4 on a GPU, else 1, as batches save
    nothing on a CPU."""
    cpus_per_replica: float = Field(0.5, gt=0)
    """CPUs that Ray reserves for each decoder and encoder process."""
    gpus_per_replica: float = Field(0.0, ge=0, le=1)
    """Share of a GPU for each decoder and encoder process."""
    threads: int = Field(1, ge=1)
    """Threads of torch in each decoder and encoder process."""
    embedding_cache_mb: int = Field(512, ge=1)
    """Size of a decoder's cache of embeddings, in MiB; an image needs 1/16 for `tiny`, 2 for ViTs.
    """
    logits_cache_mb: int = Field(128, ge=1)
    """Size of a decoder's cache of predicted logits, for correction clicks, in MiB."""
    image_cache_mb: int = Field(1024, ge=1)
    """Size of the cache of image files, in MiB."""
    max_body_mb: float = Field(64.0, gt=0)
    """Largest request body, in MiB; larger ones are rejected while they arrive."""
    max_megapixels: float = Field(100.0, gt=0, le=170)
    """Largest image, in megapixels; checked in the file's header, before decoding."""
    max_in_flight: int = Field(64, ge=1)
    """Maximum number of requests waiting for masks; more are answered with status 429."""
    max_mask_megapixels: float = Field(2000.0, gt=0)
    """Maximum size of all masks of one request in megapixels: prompts x masks per prompt x image;
    more is answered with status 413."""
    max_answer_mb: float = Field(32.0, gt=0)
    """Largest answer with masks, in MiB; of all objects of an image the least sure ones are left
    out, more masks for prompts are answered with status 413."""
    timeout_seconds: float = Field(60.0, gt=0)
    """Time limit for an answer, in seconds."""
    grace_seconds: float = Field(30.0, ge=0)
    """Time that requests in progress get after SIGTERM, in seconds."""


class LabelmeConfig(Section):
    """`samray labelme`: labelme with an endpoint behind its AI tools."""

    url: EndpointUrl = "http://127.0.0.1:8000"
    """Address of the endpoint that `samray serve` started."""
    token_file: str | None = None
    """File with the endpoint's token; unset: $SAMRAY_TOKEN, else no token."""
    arguments: tuple[str, ...] = ()
    """Arguments for labelme's own command line."""


class EvaluateConfig(Section):
    """`samray evaluate`: compare the base weights with the tuned ones."""

    data_dir: str | None = None
    """Folder of the prepared dataset."""
    checkpoint: str | None = None
    """RUN folder to evaluate, at its best checkpoint; one of its checkpoints, as RUN/latest; or
    weights of no run: a file, or tiny, vit_b, vit_l or vit_h as published."""
    output_dir: str | None = None
    """Folder to write evaluation.json and report.html to."""
    other_data_dir: str | None = None
    """A second prepared dataset to score as well, to see what tuning forgot; its test split, or all
    of its images if that has no object."""
    split: Split = "test"
    """Split to score."""
    seed: int = Field(0, ge=0)
    """Random seed of the evaluation prompts; keep it the same to compare runs."""
    noc_objects: int = Field(50, ge=0)
    """Number of objects, chosen by `seed`, on which to count the clicks that 85 and 90 % IoU take,
    up to 20 each; 0 counts none, which saves much of the time."""
    num_overlays: int = Field(6, ge=0, le=50)
    """Number of worst and of best instances shown in the report."""


class PredictConfig(Section):
    """`samray predict`: the mask of one prompt in an image, or all objects of many images."""

    checkpoint: str | None = None
    """Model: a RUN folder, a checkpoint folder or a ViT weights file; unset: `tiny` as shipped."""
    image_path: str | None = None
    """Image; or folder of images, in any layout, to segment all objects in them."""
    prompts: str | None = None
    """Prompts of many images: JSON {"images/a.jpg": [{"point_coords": [[X, Y]], "box": [X1, Y1, X2,
    Y2]}, ...], ...}; unset, without points and box: segment everything. Prompts are the endpoint's,
    image names relative to `image_path`."""
    points: tuple[tuple[float, float], ...] = ()
    """Foreground point (x, y) in pixels of the image as shown (EXIF applied); repeatable."""
    negative_points: tuple[tuple[float, float], ...] = ()
    """Background point (x, y) in pixels of the image as shown (EXIF applied); repeatable."""
    box: tuple[float, float, float, float] | None = None
    """Box (x1, y1, x2, y2) in pixels of the image as shown (EXIF applied)."""
    tile: int | None = Field(None, ge=MIN_TILE)
    """In a larger image, use only a tile of this side around the prompt, in pixels, as
    `prepare.tile`; of all objects, those of overlapping tiles are joined; unset: the whole image.
    """
    label: str | None = None
    """Label of the shapes in the LabelMe JSON; unset: those that a model has learnt which finds
    every object, else `object`."""
    output_dir: str | None = None
    """Folder to write results to. For one prompt: mask, overlay and LabelMe JSON. For many images:
    label maps, CSV and LabelMe JSON, in the same subfolders as the images."""
    coco: bool = False
    """Of many images: also write all objects into one COCO file, coco.json, masks as RLE."""
    points_per_side: int = Field(32, ge=1, le=256)
    """Without prompts: points per side of the grid of point prompts."""
    pred_iou_thresh: float | None = Field(None, ge=0, le=1)
    """Without prompts: lowest predicted IoU of a mask; unset: SAM's 0.88, but 0.4 for `tiny`,
    whose predictions are too low."""
    stability_score_thresh: float | None = Field(None, ge=0, le=1)
    """Without prompts: lowest stability of a mask when the cutoff of its logits is shifted; unset:
    SAM's 0.95, but 0.9 for `tiny`."""
    min_mask_region_area: int = Field(0, ge=0)
    """Without prompts: smallest area of separate parts and holes of a mask, in pixels; smaller ones
    are removed."""


class BenchmarkConfig(Section):
    """`samray benchmark`: how fast this machine is, and what a run would take on it."""

    output: str = "benchmark.json"
    """JSON file to write."""
    storage: str | None = None
    """Folder, which must exist, or s3://bucket/prefix to measure, where the data would be; unset: a
    temporary folder."""
    num_images: int = Field(1000, ge=1)
    """Images of the run that is forecast."""


class Config(Section):
    """The settings of a whole run; each stage reads the sections it needs."""

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
    benchmark: BenchmarkConfig = BenchmarkConfig()


def load_config(
    path: str | Place | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Merge a YAML file, ``section.key=value`` words and options into one checked config.

    Args:
        path: YAML file; None: only the defaults.
        overrides: words such as ``train.learning_rate=1e-5``; values are parsed as YAML.
        options: dotted path -> value, from the command line's options; they win.

    Raises:
        ConfigError: one error that lists every mistake with its dotted path.
    """
    values: dict[str, Any] = {}
    if path is not None:
        if isinstance(path, str):  # a relative one is meant to lie in a Ray job's own folder
            path = resolve(path, "--config") if "://" in path else Path(path)
        values = _read_yaml(path)
    mistakes: list[str] = []
    changes: list[tuple[str, Any]] = []
    for word in overrides:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            mistakes.append(f"'{word}' is not of the form section.key=value")
            continue
        try:
            changes.append((dotted, yaml.load(text, _EachOnce)))
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            mistakes.append(f"{dotted}: {' '.join(str(exc).split())}")
    changes += (options or {}).items()
    return _checked(values, changes, mistakes, str(path) if path is not None else "config")


def with_settings(config: Config, settings: Mapping[str, Any], what: str) -> Config:
    """Return the config with some settings changed.

    Args:
        settings: dotted path -> value.
        what: beginning of the error message.

    Raises:
        ConfigError: one error that lists every mistake with its dotted path.
    """
    return _checked(config.model_dump(), settings.items(), [], what)


def save_config(config: Config, path: Place) -> None:
    """Write the resolved config as YAML for `load_config`."""
    content = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_bytes(path, content.encode(), sync=True)


def resolve_model(config: Config, weights_given: bool) -> Config:
    """Return the config with the defaults that depend on whether weights are given.

    Raises:
        ConfigError: all three parts are frozen, or the image encoder cannot learn in this way.
    """
    config = with_learning_rate(config)
    model = _resolve_adaptation(config.model, weights_given)
    if model.freeze_image_encoder and model.freeze_prompt_encoder and model.freeze_mask_decoder:
        raise ConfigError("all three parts of the model are frozen; leave one to train")
    focal = config.loss.focal_weight
    if focal is None:
        focal = FOCAL_WEIGHT_TUNING if weights_given else FOCAL_WEIGHT_SCRATCH
    balanced = config.loss.balanced_weight
    if balanced is None:
        balanced = 0.0 if weights_given else 1.0
    return config.model_copy(
        update={
            "model": model,
            "loss": config.loss.model_copy(
                update={"focal_weight": focal, "balanced_weight": balanced}
            ),
        }
    )


def with_learning_rate(config: Config) -> Config:
    """Return the config with the model type's learning rate, unless one is set."""
    if config.train.learning_rate is not None:
        return config
    rate = LEARNING_RATE_TINY if config.model.type == "tiny" else LEARNING_RATE_VIT
    return config.model_copy(
        update={"train": config.train.model_copy(update={"learning_rate": rate})}
    )


def _resolve_adaptation(model: ModelConfig, weights_given: bool) -> ModelConfig:
    """Choose how the image encoder learns, so that the settings about it agree."""
    there = ENCODER_BLOCKS[model.type]
    whole = model.type == "tiny" or not weights_given
    adapt, blocks = model.adapt, model.adapt_blocks
    if adapt is None and model.freeze_image_encoder is not None:
        adapt = "none" if model.freeze_image_encoder else "full"
        blocks = "all" if blocks is None and adapt == "full" else blocks
    if adapt is None:
        adapt = "full" if whole else "lora"
    if adapt == "none" and blocks not in (None, 0):
        raise ConfigError(
            f"model.adapt_blocks: {blocks}, but with model.adapt=none no block learns; set one of "
            "them"
        )
    if adapt == "none" or blocks == 0:
        adapt, blocks = "none", 0
    elif blocks is None:
        blocks = "all" if whole else there // 4
    if model.freeze_image_encoder is not None and model.freeze_image_encoder != (adapt == "none"):
        raise ConfigError(
            f"model.freeze_image_encoder: is {str(model.freeze_image_encoder).lower()}, but "
            f"model.adapt is {model.adapt}; set one of them"
        )
    if adapt == "lora" and model.type == "tiny":
        raise ConfigError(
            "model.adapt: lora is for attention, which the image encoder of tiny does not have; "
            "use model.adapt=full"
        )
    if isinstance(blocks, int) and blocks > there:
        raise ConfigError(
            f"model.adapt_blocks: {blocks}, but the image encoder of {model.type} has {there} "
            f"blocks; give at most {there}, or all"
        )
    update = {"adapt": adapt, "adapt_blocks": blocks, "freeze_image_encoder": adapt == "none"}
    return model.model_copy(update=update)


def setting(dotted: str) -> FieldInfo:
    """Return the field of a setting: its type, default and description.

    Raises:
        KeyError: there is no such setting.
    """
    model: Any = Config
    for section in dotted.split(".")[:-1]:
        model = model.model_fields[section].annotation
    field: FieldInfo = model.model_fields[dotted.rpartition(".")[2]]
    return field


def required(config: Config, *dotted_paths: str) -> list[str]:
    """Return the values of settings that a stage requires.

    Raises:
        ConfigError: naming each missing one, as option and as setting.
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


class _EachOnce(yaml.SafeLoader):
    """Refuses a key that a mapping has twice, of which YAML's loader would keep only the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return the mapping.

        Raises:
            yaml.YAMLError: a key is there twice.
        """
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"line {line}: {key.value} is there twice; join the two")
                keys.add(key.value)
        return node


def _read_yaml(path: Place) -> dict[str, Any]:
    try:
        values = yaml.load(read_bytes(path), _EachOnce)
    except StorageError:
        raise
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror}); check --config") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: no such date
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(exc).split())}") from exc
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold sections such as `train:`, not a {type(values).__name__}"
        )
    # A section with every line commented out reads as null.
    return {section: {} if content is None else content for section, content in values.items()}


def _checked(
    values: dict[str, Any],
    changes: Iterable[tuple[str, Any]],
    mistakes: list[str],
    source: str,
) -> Config:
    """Apply changes (dotted path, value) in their order and validate; report all mistakes."""
    for dotted, value in changes:
        try:
            _set(values, dotted, value)
        except ValueError as exc:
            mistakes.append(f"{dotted}: {exc}")
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        mistakes += [_explain(error) for error in exc.errors()]
    if mistakes:
        raise ConfigError(f"{source}: " + "; ".join(mistakes))
    return config


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
    kind, message, given = error["type"], error["msg"], error["input"]
    if kind == "tuple_type":
        message = "should be a list" + (f", such as [{given}]" if isinstance(given, str) else "")
    elif kind in ("model_type", "dict_type"):
        message = "should be settings by name"
    elif kind == "value_error":  # of several settings of a section, which is too long to show
        return f"{where}: {message.removeprefix('Value error, ')}"
    if kind == "secret":
        return f"{where}: {message}"
    if kind != "extra_forbidden":
        return f"{where}: {message} (got {given!r})"
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
