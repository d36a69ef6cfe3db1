"""What the stability benchmark trains teachers on: a student for each schedule and rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_core.students.protocol import Student
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student as build_image_student

# Where the students of the end of a training begin; stability.py tells how to make it.
START = Path("runs/demo-start/student.pt")


@dataclass(frozen=True)
class StabilityTask:
    """One task: how its student is made, and the grid its cross-entropy rate is chosen from.

    A schedule is constant, linear (to zero) or "warm-up, linear" (up to the rate in the first
    tenth; the demo's always go up first). ``build(data folder, schedule, rate, measure)`` returns
    the student; an empty measure is the task's own, and translation's may end with ", lenpen 1".
    ``score`` says what the tables show, a number that is better when lower.
    """

    build: Callable[[Path, str, float, str], Student]
    rates: tuple[float, ...]
    steps: int
    episodes: int
    score: str


def _mnist(noisy: bool) -> Callable[[Path, str, float, str], Student]:
    """MNIST's MLP 784-500-10, batches of 100; noisy: 10,000 images, 36 % of them mislabelled."""

    def build(data: Path, schedule: str, rate: float, measure: str) -> Student:
        warmup, _, name = schedule.rpartition(", ")
        return build_image_student(
            ImageSpec(
                data="mnist", folder=str(data), model="mlp", hidden=500, dev_size=10000,
                train_size=10000 if noisy else 0, label_noise=0.36 if noisy else 0.0,
                batch_size=100, steps=400, optimiser=OptimiserSpec("momentum", rate),
                schedule=ScheduleSpec(name, 40 if warmup else 0),
                measure=measure or "log_likelihood", dev_interval=100,
            )
        )

    return build


def _demo(
    steps: int, warmup: int, tokens: int, start: str = "", **changes: Any
) -> Callable[[Path, str, float, str], Student]:
    """The student of recipes/nmt/demo-de-en for other ``steps`` and batches of other ``tokens``."""

    def build(data: Path, schedule: str, rate: float, measure: str) -> Student:
        import yaml

        from l2t_cli.recipe_reading.files import shipped_recipes
        from l2t_fairseq.recipe import NmtSpec
        from l2t_fairseq.students.nmt import build_student

        recipe = shipped_recipes()["nmt/demo-de-en"]
        described = yaml.safe_load(recipe.read_text("utf-8"))["nmt"]
        flags = {
            "constant": f"--lr-scheduler fixed --warmup-updates {warmup}",
            "linear": f"--lr-scheduler polynomial_decay --warmup-updates {warmup} "
            f"--total-num-update {steps}",
        }[schedule.rpartition(", ")[2]]
        train = described["train"].replace("--lr-scheduler inverse_sqrt --warmup-updates 60", flags)
        train = train.replace("--lr 3e-3", f"--lr {rate}").replace("--max-update 400", "")
        train = train.replace("--max-tokens 1000", f"--max-tokens {tokens}")
        assert flags in train and f"--lr {rate}" in train and f"--max-tokens {tokens}" in train
        kept = {k: described[k] for k in ("samples", "dev_sentences", "dev_interval")}
        name, _, lenpen = measure.partition(", lenpen ")
        return build_student(
            NmtSpec(
                data=str(data), train=f"{start}{train} --max-update {steps}", steps=steps,
                measure=name or "expected_bleu", lenpen=float(lenpen or 0),
                **{**kept, **changes},
            )
        )

    return build


TASKS = {
    "clean": StabilityTask(_mnist(False), (0.02, 0.05, 0.1, 0.2, 0.4), 400, 15, "dev error %"),
    "noise": StabilityTask(_mnist(True), (0.02, 0.05, 0.1, 0.2, 0.4), 400, 15, "dev error %"),
    "demo": StabilityTask(
        _demo(400, 30, 500), (0.001, 0.002, 0.003, 0.005, 0.008), 400, 8, "100 - greedy dev BLEU"
    ),
    "demo-end": StabilityTask(
        _demo(
            60, 10, 1000, f"--finetune-from-model {START} ", dev_interval=20, dev_sentences=300,
            candidates="beam",
        ),
        (0.0003, 0.001, 0.002, 0.004), 60, 10, "100 - greedy dev BLEU",
    ),
}
