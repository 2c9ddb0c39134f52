"""Is drawing the bottleneck of pre-training? Seconds per scene to draw and to train on it.

Both on one core.

    python benchmarks/pretraining.py [--config configs/pretrain_tiny.yaml] [--steps 8]

`samray pretrain` draws the next step's scenes on another core while it trains on the last; it
waits for the drawing only if the first figure is larger than the second.
"""

import argparse
import statistics
import time

import torch

from samray.config import load_config, resolve_model
from samray.sam.model import build_model
from samray.training.loop import Worker, train_step
from samray.training.pretraining import DrawnScenes
from samray.training.step import PromptedSam


def main() -> None:
    """Print the two times and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/pretrain_tiny.yaml")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = resolve_model(load_config(arguments.config), weights_given=False)
    sam = build_model("tiny")
    source, module = DrawnScenes(config, sam), PromptedSam(sam, (1.0, 1.0, 1.0), 64)
    optimizer = torch.optim.AdamW(sam.parameters(), lr=1e-4)
    worker = Worker(0, 1, torch.device("cpu"))
    drawing, training = [], []
    for step in source.steps(0)[: arguments.steps]:
        started = time.perf_counter()
        batch, num_instances = source.load(step, 0, 1, epoch=0)
        drawn = time.perf_counter()
        train_step(module, optimizer, batch, num_instances, worker, config.train)
        drawing.append((drawn - started) / len(step))
        training.append((time.perf_counter() - drawn) / len(step))
    draw, train = statistics.mean(drawing), statistics.mean(training)
    print(f"draw  {draw:.3f} s per scene")
    print(f"train {train:.3f} s per scene, {config.train.precision}")
    print(f"drawing takes {draw / train:.2f} of the time of training")
    with torch.inference_mode():
        image = torch.randn(1, 3, *[sam.image_encoder.img_size] * 2)
        seconds = []
        for _ in range(10):
            started = time.perf_counter()
            sam.image_encoder(image)
            seconds.append(time.perf_counter() - started)
    print(f"encode {statistics.median(seconds):.3f} s per image, float32, one core")


if __name__ == "__main__":
    main()
