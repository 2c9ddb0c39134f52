"""The feed of a training step: prompts and targets of objects in a large picture, without a model.

    python benchmarks/feed.py [--objects N]

A picture of 12 megapixels with discs of 300 pixels, one process, milliseconds of processor time an
object by way of drawing the prompt. The file of the picture is not read. One JSON line.
"""

import argparse
import json
import statistics
import time

import numpy as np

from samray.config import PromptConfig
from samray.data.dataset import ImageRecord, Instance
from samray.geometry.masks import CroppedMask, encode_rle
from samray.geometry.prompts import STRATEGIES
from samray.sam.embeddings import EmbeddingCache
from samray.training.batches import BatchLoader

SIZE, RADIUS, REPEATS = (3000, 4000), 150, 5


class ZeroCache(EmbeddingCache):
    """Embeddings that cost no reading."""

    def __init__(self) -> None:
        pass

    def load(self, image_digest: str, view: int = 0) -> np.ndarray:
        """Return zeros."""
        return np.zeros((256, 64, 64), np.float16)


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objects", type=int, default=16)
    number = parser.parse_args().objects
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-RADIUS : RADIUS + 1, -RADIUS : RADIUS + 1]
    disc = rows**2 + columns**2 <= RADIUS**2
    instances = []
    for _ in range(number):
        x, y = (int(rng.integers(side - disc.shape[0])) for side in (SIZE[1], SIZE[0]))
        mask = CroppedMask(disc, (x, y))
        instances.append(Instance("disc", mask.box, int(disc.sum()), encode_rle(mask, SIZE)))
    record = ImageRecord("picture", "picture", "0" * 64, SIZE, tuple(instances), 0, 0)
    figures = {}
    for strategy in STRATEGIES:
        prompts = PromptConfig(point_selection=strategy)
        loader = BatchLoader(None, [record], prompts, 0, ZeroCache(), 1024, 256)
        seconds = []
        for epoch in range(REPEATS):
            started = time.process_time()
            loader.load([0], 0, 1, epoch)
            seconds.append(time.process_time() - started)
        figures[f"{strategy}_ms"] = round(1e3 * statistics.median(seconds) / number, 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
