"""What a training step of an image model costs in each of ``image.precision``, on random images.

    taskset -c 0 python tests/benchmarks/image_precision.py --model resnet8

Medians of CPU time, in milliseconds and as a ratio to float32, by the steps of the engine itself.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from l2t_core.losses.steps import FixedLoss
from l2t_core.specs import OptimiserSpec
from l2t_core.students.life import PRECISIONS, Life
from l2t_vision.data.sets import ImageData
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import ImageStudent


def random_images(count: int) -> ImageData:
    """Return ``count`` images like CIFAR's, and as many as dev and test have to have."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    few, mean = (images[:10], labels[:10]), torch.full((3,), 127.5, dtype=torch.float64)
    return ImageData(images, labels, *few, *few, 10, mean, mean / 2, torch.eye(10).double())


def milliseconds(model: str, precision: str, batch: int, steps: int) -> float:
    """Return the median CPU time of a step, the first three left out."""
    spec = ImageSpec(
        model=model, batch_size=batch, steps=steps, dev_interval=steps + 1, precision=precision,
        optimiser=OptimiserSpec("momentum", 0.01),
    )
    student, loss = ImageStudent(spec, random_images(4 * batch)), FixedLoss()
    life, found = Life(student), []
    state = life.begin(1)
    for step in range(steps):
        began = time.process_time()
        state, _, _ = life.step(state, step, loss.loss)
        found.append(1000.0 * (time.process_time() - began))
    return statistics.median(found[3:])


def main() -> None:
    """Print a line for each precision."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet8")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    whole = 0.0
    for precision in PRECISIONS:
        cost = milliseconds(asked.model, precision, asked.batch, asked.steps)
        whole = whole or cost
        print(f"{asked.model} {precision:<9} {cost:7.1f} ms  {cost / whole:.2f}")


if __name__ == "__main__":
    main()
