"""``image.precision``: the student's own arithmetic, wherever it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from l2t_cli.recipe_reading.loading import load_recipe
from l2t_cli.recipe_reading.values import problems
from l2t_core.errors import UserError
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.train import train_student
from l2t_core.teachers.file import load_teacher
from l2t_core.training.episodes import train_teacher
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import ImageStudent, build_student

SIZE = {"hidden": 16, "batch_size": 40, "dev_size": 400, "train_size": 600}


def student_in(precision: str, steps: int = 20) -> ImageStudent:
    spec = ImageSpec(dev_interval=1, optimiser=OptimiserSpec("momentum", 0.1), **SIZE)
    return build_student(replace(spec, precision=precision, steps=steps))


def trained(precision: str, steps: int = 20) -> ImageStudent:
    student = student_in(precision, steps)
    train_student(student, 3)
    return student


def by_hand(student: ImageStudent, dtype: torch.dtype, scale: float) -> list[torch.Tensor]:
    """Return the parameters after cross-entropy as torch's own loop has them under autocast."""
    student.reset(3)
    parameters = [p.detach().clone().requires_grad_() for p in student.module.parameters()]
    names = [name for name, _ in student.module.named_parameters()]
    optimiser = torch.optim.SGD(parameters, lr=student.learning_rate(0), momentum=0.9)
    for step in range(student.total_steps):
        for group in optimiser.param_groups:
            group["lr"] = student.learning_rate(step)
        images, labels = student.batch(step)
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            logits = torch.func.functional_call(
                student.module, dict(zip(names, parameters, strict=True)), images
            )
        (F.cross_entropy(logits.float(), labels) * scale).backward()
        for parameter in parameters:
            parameter.grad /= scale
        optimiser.step()
    return parameters


@pytest.mark.parametrize(
    ("precision", "dtype", "scale"),
    [("bfloat16", torch.bfloat16, 1.0), ("float16", torch.float16, 1024.0)],
)
def test_a_student_has_the_steps_of_torchs_autocast(
    precision: str, dtype: torch.dtype, scale: float
) -> None:
    steps = 3  # of more the roundings part: one that falls otherwise is 1/256 of a weight
    student = trained(precision, steps)
    found = [p.detach().clone() for p in student.module.parameters()]
    assert {p.dtype for p in found} == {torch.float32}
    expected = by_hand(student, dtype, scale)
    whole = trained("float32", steps).module.parameters()
    for here, there, full in zip(found, expected, whole, strict=True):
        assert (here - there).norm() < 0.05 * (here - full).norm()


def test_dev_is_looked_at_in_full_precision() -> None:
    student = trained("bfloat16")
    again = student_in("float32")
    again.module.load_state_dict(student.module.state_dict())
    assert student.dev_statistics(9) == again.dev_statistics(9)


def test_a_teacher_learns_on_such_students_too(tmp_path: Path) -> None:
    """As with training.precision, which is for teacher training alone."""
    made = []
    for name, own, asked in (
        ("own", "bfloat16", "float32"), ("asked", "float32", "bfloat16"),
        ("full", "float32", "float32"),
    ):
        spec = TrainingSpec(episodes=2, precision=asked)
        folder = open_run(tmp_path / name, {})
        loss = LossSpec("shared", "identity")
        train_teacher(student_in(own), loss, TeacherSpec(), spec, folder, record={})
        teacher, _ = load_teacher(folder.teacher_last)
        made.append(torch.cat([p.detach().flatten() for p in teacher.parameters()]))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_differences_are_refused_with_it(tmp_path: Path) -> None:
    spec = TrainingSpec(hvp="finite-difference")
    with pytest.raises(UserError, match=r"training\.hvp=finite-difference .*precision=bfloat16"):
        folder = open_run(tmp_path / "r", {})
        train_teacher(student_in("bfloat16"), LossSpec(), TeacherSpec(), spec, folder, record={})


def test_an_unknown_one_is_refused_under_its_own_key() -> None:
    recipe = load_recipe("digits", ["image.precision=bfloat61"])
    (problem,) = problems(recipe)
    assert problem.startswith("the command line: image.precision is 'bfloat61'")


def test_an_unknown_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"image\.precision.*'bfloat61'.*bfloat16"):
        student_in("bfloat61")
