"""samray fine-tunes Segment Anything on your polygons, across a Ray cluster, and serves the result.

The command line, the jobs and your own scripts call the same functions:

    import samray

    config = samray.load_config(options={"train.data_dir": "prepared", "train.output_dir": "run"})
    samray.fit(config)
    predictor = samray.Predictor.from_checkpoint("run")

`docs/python-api.md` describes each name. A name is imported when it is first used, so that
`import samray` loads neither torch nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The Python API: name -> the module that defines it.
_MODULES = {
    "Config": "config",
    "ModelStore": "sam.store",
    "Predictor": "prediction.predictor",
    "PreparedDataset": "data.dataset",
    "Prompt": "geometry.prompts",
    "SamrayError": "errors",
    "evaluate": "evaluation.evaluate",
    "export": "data.export",
    "fit": "training.train",
    "inspect": "inspection.preview",
    "load_checkpoint": "sam.checkpoint",
    "load_config": "config",
    "predict": "prediction.predictor",
    "predict_images": "prediction.batch",
    "prepare": "data.prepare",
    "pretrain": "training.pretraining",
    "promote": "evaluation.promote",
    "report": "inspection.report",
    "roll_back": "evaluation.promote",
    "sweep": "training.tune",
}
__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from samray.config import Config as Config
    from samray.config import load_config as load_config
    from samray.data.dataset import PreparedDataset as PreparedDataset
    from samray.data.export import export as export
    from samray.data.prepare import prepare as prepare
    from samray.errors import SamrayError as SamrayError
    from samray.evaluation.evaluate import evaluate as evaluate
    from samray.evaluation.promote import promote as promote
    from samray.evaluation.promote import roll_back as roll_back
    from samray.geometry.prompts import Prompt as Prompt
    from samray.inspection.preview import inspect as inspect
    from samray.inspection.report import report as report
    from samray.prediction.batch import predict_images as predict_images
    from samray.prediction.predictor import Predictor as Predictor
    from samray.prediction.predictor import predict as predict
    from samray.sam.checkpoint import load_checkpoint as load_checkpoint
    from samray.sam.store import ModelStore as ModelStore
    from samray.training.pretraining import pretrain as pretrain
    from samray.training.train import fit as fit
    from samray.training.tune import sweep as sweep


def __getattr__(name: str) -> Any:
    """Import a name of the API when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'samray' has no attribute {name!r}")
    value = getattr(import_module(f"samray.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
