"""samray fine-tunes Segment Anything on your polygons, across a Ray cluster.

The command line, the jobs and your own scripts call the same functions:

    from samray.config import load_config
    from samray.prepare import prepare
    from samray.train import fit
    from samray.evaluate import evaluate
    from samray.predictor import Predictor
"""

__version__ = "0.1.0"
