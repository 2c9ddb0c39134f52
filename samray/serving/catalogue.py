"""The models that the endpoint serves: a checkpoint and its base, a store's, or `tiny`.

What loads weights is imported where it is used: the Ingress reads a store, and does it without
torch, which takes 400 MB in each process.
"""

import contextlib
import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samray import __version__
from samray.config import ServeConfig
from samray.errors import ConfigError, SamrayError, StoreError
from samray.prediction.requests import PredictRequest, SegmentRequest
from samray.sam.store import ModelStore
from samray.storage import Place, resolve

if TYPE_CHECKING:
    from samray.sam.checkpoint import Checkpoint

LOG = logging.getLogger("samray.access")  # what the endpoint's operator reads


@dataclass(frozen=True)
class ModelRef:
    """A model that requests may name; small enough to be sent with each request.

    Attributes:
        folder: its checkpoint folder; None is `tiny` as it ships.
        digest: of its weights.
    """

    name: str
    version: str
    folder: Place | None
    digest: str
    model_type: str

    def load(self) -> "Checkpoint":
        """Load its weights."""
        from samray.sam.checkpoint import load_checkpoint
        from samray.sam.shipped import load_shipped

        return load_shipped() if self.folder is None else load_checkpoint(self.folder)


@dataclass(frozen=True)
class Call:
    """A request as the Ingress passes it to a Decoder."""

    image_id: str
    model: ModelRef
    request: PredictRequest | SegmentRequest | None  # None: encode only


def read_catalogue(settings: ServeConfig, known: dict[str, ModelRef]) -> dict[str, ModelRef]:
    """Return the models that the settings name, the default one first.

    Args:
        known: the catalogue read before; a version's digest never changes.

    Raises:
        SamrayError: a checkpoint or the store cannot be used.
    """
    if settings.store is not None:
        store = ModelStore(resolve(settings.store, "--store"))
        names = [settings.model] if settings.model else store.names()
        found = {}
        for name in names:
            try:
                # Polled every second, so the record of a version is read once.
                if name in known and known[name].version == store.current_version(name):
                    found[name] = known[name]
                    continue
                current = store.current(name)
            except StoreError as exc:
                if settings.model:
                    raise
                if name in known:  # else requests without `model` would reach another one
                    found[name] = known[name]
                outcome = "the one before stays" if name in known else "not served"
                _tell_once(name, outcome, str(exc))
                continue
            if current is None:
                raise ConfigError(f"--model: {store.folder} has no model {name!r}")
            digest, model_type = (
                current.record[key] for key in ("checkpoint_digest", "model_type")
            )
            found[name] = ModelRef(name, current.version, current.folder, digest, model_type)
        if not found:
            raise ConfigError(f"--store: {store.folder} has no models; promote one")
        return found
    if known:
        return known  # a checkpoint is read once
    return _read_checkpoints(settings)


@functools.cache
def _tell_once(name: str, outcome: str, reason: str) -> None:
    LOG.error("%s cannot be read (%s): %s", name, outcome, reason)


def _read_checkpoints(settings: ServeConfig) -> dict[str, ModelRef]:
    from samray.sam.checkpoint import find_checkpoint, find_run, load_checkpoint
    from samray.sam.shipped import load_shipped
    from samray.sam.weights import digest_of

    if settings.checkpoint is None:
        shipped = load_shipped()
        digest = digest_of(shipped.weights)
        return {"tiny": ModelRef("tiny", f"shipped-{__version__}", None, digest, "tiny")}
    path = resolve(settings.checkpoint, "--checkpoint")
    folders = {settings.model or "tuned": find_checkpoint(path)}
    with contextlib.suppress(SamrayError):  # a bare weights file has no base
        folders["base"] = find_run(path) / "base"
    refs = {}
    for name, folder in folders.items():
        checkpoint = load_checkpoint(folder)
        digest = digest_of(checkpoint.weights)
        version = f"{folder.name}-{digest[:8]}"
        refs[name] = ModelRef(name, version, folder, digest, checkpoint.model_type)
    return refs
