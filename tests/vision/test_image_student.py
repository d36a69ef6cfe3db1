"""The image student as the teacher core uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from l2t_core.errors import UserError
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import exact
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, ScheduleSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.students.train import train_student
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import build_teacher
from l2t_core.training.episodes import train_teacher
from l2t_vision.data.notes import copies, notes
from l2t_vision.data.sets import load_data
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import ImageStudent, build_student

Make = Callable[..., ImageStudent]


def snapshot(student: ImageStudent) -> list[torch.Tensor]:
    return [t.detach().clone() for t in student.module.state_dict().values()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def digits_student(**settings: Any) -> ImageStudent:
    spec = ImageSpec(
        **{"hidden": 16, "batch_size": 40, "dev_size": 400, "train_size": 600, "steps": 60,
           "dev_interval": 15, "optimiser": OptimiserSpec("momentum", 0.1),
           "schedule": ScheduleSpec("linear"), **settings}
    )
    return build_student(spec)


OWN_MEASURES = """
import torch

def some(log_probs, targets):  # a third of the examples, drawn anew each time
    drawn = torch.rand(len(targets)) < 1 / 3
    return log_probs.gather(1, targets[:, None])[drawn].mean()

def never(log_probs, targets):
    return log_probs.mean() * float("nan")

def constant(log_probs, targets):
    return 0.5 + 0.0 * log_probs.mean()
"""


@pytest.fixture
def own_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measures_of_chance.py").write_text(OWN_MEASURES)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_measures")
def test_an_own_measure_draws_by_the_seed_of_its_measurement() -> None:
    student = digits_student(measure="measures_of_chance:some")
    student.reset(1)
    torch.manual_seed(1)
    first = float(student.smoothed_measure(7).detach())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert float(student.smoothed_measure(7).detach()) == first
    assert float(student.smoothed_measure(8).detach()) != first
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("own_measures")
@pytest.mark.parametrize("name", ["never", "constant"])
def test_a_measure_that_says_nothing_is_named_before_the_rates(name: str, tmp_path: Path) -> None:
    student = digits_student(measure=f"measures_of_chance:{name}", steps=2, dev_interval=2)
    with pytest.raises(UserError, match=r"look at the measure first \(image.measure.*rate, or"):
        train_teacher(
            student, LossSpec(), TeacherSpec(), TrainingSpec(episodes=9),
            open_run(tmp_path / "run", {}), record={},
        )


def test_classes_that_a_split_lacks_are_told(make_student: Make) -> None:
    student = make_student()
    assert student.notes() == []
    data, k = student.data, student.num_classes
    lacking = replace(data, test_y=data.test_y.clamp(max=k - 3), dev_y=torch.zeros_like(data.dev_y))
    dev, test = ImageStudent(student.spec, lacking).notes()
    assert dev.startswith(f"there are no dev images of {k - 1} (1, 2, 3")
    assert test == (
        f"there are no test images of 2 ({k - 2}, {k - 1}) of {k} classes, counted from 0"
    )


def test_images_of_ones_own_that_are_in_two_splits_are_told(make_student: Make) -> None:
    student = make_student()
    data = student.data
    test_x = torch.cat([data.train_x[:2], 255 - data.train_x[2:5]])
    shared = replace(data, test_x=test_x, test_y=torch.arange(5) % student.num_classes)
    assert copies(test_x, data.train_x) == 2
    own = [line for line in notes(shared, own=True) if "training images, too" in line]
    assert [line.split(":")[0] for line in own] == [
        "2 of 5 test images are training images, too"
    ]
    assert not any("too" in line for line in notes(shared, own=False))


def test_each_epoch_is_a_permutation_and_a_step_always_has_its_batch(make_student: Make) -> None:
    student = make_student()
    student.reset(5)
    epochs = [[student.indices(e * 5 + i) for i in range(5)] for e in range(3)]
    for batches in epochs:
        assert sorted(torch.cat(batches).tolist()) == list(range(40))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    backwards = [student.indices(step) for step in reversed(range(15))]
    for step, batch in zip(reversed(range(15)), backwards, strict=True):
        assert torch.equal(batch, epochs[step // 5][step % 5])
    student.reset(6)
    assert not torch.equal(student.indices(0), epochs[0][0])


def test_the_rest_of_an_epoch_is_dropped(make_student: Make) -> None:
    student = make_student(batch_size=16)  # 40 = 2 * 16 + 8
    student.reset(1)
    assert [len(student.indices(step)) for step in range(5)] == [16] * 5
    assert len(torch.cat([student.indices(0), student.indices(1)]).unique()) == 32


@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_reset_depends_on_the_seed_alone_and_keeps_the_tensors(
    make_student: Make, model: str
) -> None:
    student = make_student(model=model, dropout=0.5)
    student.reset(3)
    first = snapshot(student)
    train_student(student, 9, None)
    assert not equal(first, snapshot(student))
    student = make_student(model=model, dropout=0.5)
    before = torch.random.get_rng_state()
    places = [t.data_ptr() for t in student.module.state_dict().values()]
    student.reset(3)
    assert equal(first, snapshot(student))
    assert torch.equal(before, torch.random.get_rng_state())
    student.reset(4)
    assert not equal(first, snapshot(student))
    assert [t.data_ptr() for t in student.module.state_dict().values()] == places


def test_large_seeds_stay_within_torchs_64_bits(make_student: Make) -> None:
    student = make_student()
    student.reset(20_271_120 * 1_000_003 + 7)
    torch.manual_seed(student.step_seed(9))
    assert len(student.indices(9)) == len(student.batch(9)[0]) == 8
    assert student.step_seed(3) != student.step_seed(4)


def test_students_of_neighbouring_seeds_share_no_masks(make_student: Make) -> None:
    """Those of an episode, and of the next: their steps' seeds would be the same, moved by one."""
    student, seeds = make_student(), []
    for seed in range(1_000_003, 1_000_008):
        student.reset(seed)
        seeds += [student.step_seed(step) for step in range(5000)]
    assert len(set(seeds)) == 5 * 5000


def test_predict_is_in_train_mode_and_dev_in_eval_mode(make_student: Make) -> None:
    student = make_student(model="convnet", dropout=0.3)
    student.reset(1)
    log_probs, targets = student.predict(student.batch(0))
    assert log_probs.shape == (8, 4) and targets.shape == (8,)
    assert torch.allclose(log_probs.exp().sum(1), torch.ones(8))
    buffers = [b.clone() for b in student.module.buffers()]
    assert float(buffers[0].abs().sum()) > 0  # batch norm has moved
    assert torch.equal(student.smoothed_measure(1), student.smoothed_measure(1))
    student.dev_statistics(3), student.true_measure(), student.test_error()
    for buffer, value in zip(student.module.buffers(), buffers, strict=True):
        assert torch.equal(buffer, value)


def test_dev_statistics_on_time_and_by_hand(make_student: Make) -> None:
    student = make_student()
    student.reset(2)
    assert student.dev_interval() == 4
    due = [student.dev_statistics(step) is not None for step in range(10)]
    assert due == [False, False, False, True] * 2 + [False, False]
    found = student.dev_statistics(3)
    assert found is not None
    data = student.data
    with torch.no_grad():
        outputs = student.module(data.standardised(data.dev_x))
    right = outputs.argmax(1) == data.dev_y
    assert found.nll == pytest.approx(float(F.cross_entropy(outputs, data.dev_y)), rel=1e-5)
    assert found.accuracy == pytest.approx(float(right.float().mean()))
    for label in range(4):
        of_class = right[data.dev_y == label].float().mean()
        assert found.class_accuracy[label] == pytest.approx(float(of_class))
    assert student.true_measure() == pytest.approx(found.accuracy)
    with torch.no_grad():
        wrong = student.module(data.standardised(data.test_x)).argmax(1) != data.test_y
    assert student.test_error() == pytest.approx(float(wrong.float().mean()))


@pytest.mark.parametrize(
    "measure", ["expected_accuracy", "smoothed_accuracy", "log_likelihood", "margin"]
)
def test_smoothed_measures(make_student: Make, measure: str) -> None:
    student = make_student(measure=measure)
    student.reset(2)
    value = student.smoothed_measure(1)
    probs = student.module(student.data.standardised(student.data.dev_x)).softmax(1)
    own = probs.gather(1, student.data.dev_y.unsqueeze(1)).squeeze(1)
    margins = own.log() - probs.scatter(1, student.data.dev_y.unsqueeze(1), 0.0).amax(1).log()
    expected = {
        "expected_accuracy": own.mean(),
        "smoothed_accuracy": torch.sigmoid(5.0 * margins / margins.abs().mean()).mean(),
        "log_likelihood": own.log().mean(),
        "margin": -(2 * torch.sigmoid(50 * (probs.max(1).values - own)) - 1).mean(),
    }[measure]
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = torch.autograd.grad(value, list(student.module.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_the_dev_sample_is_chosen_by_its_seed(make_student: Make) -> None:
    student = make_student(dev_batch=10)
    student.reset(2)
    first, again, other = (float(student.smoothed_measure(seed).detach()) for seed in (1, 1, 2))
    assert first == again and first != other
    whole, capped = make_student(), make_student(dev_batch=30)
    whole.reset(2), capped.reset(2)
    assert torch.equal(whole.smoothed_measure(1), capped.smoothed_measure(2))


def test_cross_entropy_training_equals_torchs_own_loop(make_student: Make) -> None:
    student = make_student(dropout=0.4)
    student.reset(4)
    reference = make_student(dropout=0.4)
    reference.reset(4)
    optimiser = torch.optim.SGD(reference.module.parameters(), lr=0.1, momentum=0.9)
    for step in range(10):
        optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / 10)
        torch.manual_seed(reference.step_seed(step))
        reference.module.train()
        images, labels = reference.batch(step)
        optimiser.zero_grad()
        F.cross_entropy(reference.module(images), labels).backward()
        optimiser.step()
    train_student(student, 4, None)
    for mine, theirs in zip(snapshot(student), snapshot(reference), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_a_student_whose_outputs_are_no_numbers_has_diverged() -> None:
    student = digits_student(model="convnet", steps=4, dev_interval=4)
    train_student(student, 4)
    assert student.at_end() == student.dev_statistics(3)
    norm = next(m for m in student.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert norm.running_mean is not None
    norm.running_mean.fill_(float("nan"))  # the parameters are as good as before
    with pytest.raises(FloatingPointError, match="diverged at its last step"):
        student.at_end()


@pytest.mark.parametrize("model", ["mlp", "convnet", "resnet8"])
def test_hypergradient_equals_central_differences(make_student: Make, model: str) -> None:
    """The mlp with dropout, the others with batch norm, the residual net on moved images too."""
    student = make_student(model=model, steps=3 if model == "resnet8" else 5,
                           dropout=0.2 if model == "mlp" else 0.0,
                           augment="crop-flip" if model == "resnet8" else "none",
                           measure="expected_accuracy")
    student.module.double()
    make, student.make = student.make, lambda: make().double()
    loss = LossSpec("dense", "softplus")
    # The state s_t counts as a constant; a teacher that sees the progress only has no other.
    features = ("progress",)
    teacher = build_teacher(TeacherSpec(slots=2, init_scale=0.3), loss, 4, 1, 1).double()
    engine = Engine(Life(student), loss, TrainingSpec())
    episode = Episode(engine, features, student_seed=1, measure_seed=1)
    if model != "mlp":  # M-tilde sees running statistics, which are not differentiated
        whole = student.smoothed_measure
        frozen: list[torch.Tensor] = []

        def measured(seed: int) -> torch.Tensor:
            now = list(student.module.buffers())
            frozen.extend(b.clone() for b in now) if not frozen else None
            for buffer, value in zip(now, frozen, strict=True):
                buffer.copy_(value)
            return whole(seed)

        student.smoothed_measure = measured  # type: ignore[method-assign]
    outcome = exact(episode, teacher, lambda phase, step: None)
    names, parts = zip(*teacher.named_parameters(), strict=True)
    pieces = outcome.estimates[0].split([p.numel() for p in parts])
    gradient = {n: g.view_as(p) for n, g, p in zip(names, pieces, parts, strict=True)}
    weights = teacher.values["W"]
    indices = ((0, 0, 0), (1, 2, 3), (1, 1, 1))
    for index in indices[:1] if model == "resnet8" else indices:  # a deep net is slow to record
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weights[index] += sign * 1e-5
            values.append(exact(episode, teacher, lambda phase, step: None).smoothed)
            with torch.no_grad():
                weights[index] -= sign * 1e-5
        found = float(gradient["values.W"][index])
        assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5, abs=1e-10)


def test_a_trained_teacher_teaches_fresh_students_better_than_at_its_start(tmp_path: Path) -> None:
    """The whole way on real digits, judged by students that teacher training never saw."""
    student = digits_student()
    loss, spec = LossSpec("dense", "softplus"), TeacherSpec(slots=4)
    training = TrainingSpec(episodes=10, lr=0.01, seed=1)
    result = train_teacher(student, loss, spec, training, open_run(tmp_path, {}), record={})
    assert result.skipped == 0
    features = student.default_features
    count = feature_count(features, 10)
    untrained = build_teacher(spec, loss, 10, count, training.seed)
    climbed = []
    for seed in (71, 72, 73):
        train_student(student, seed, AppliedTeacher(untrained, loss, features, 10, 60))
        before = float(student.smoothed_measure(seed).detach())
        train_student(student, seed, AppliedTeacher.from_file(result.last_path, 60))
        climbed.append(float(student.smoothed_measure(seed).detach()) - before)
        assert student.test_error() < 0.12
    assert min(climbed) > 0.0 and sum(climbed) / 3 > 0.02, climbed
    assert student.fingerprint() == {"kind": "classes", "num_classes": 10}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"model": "lenett"}, "did you mean 'lenet'"),
        ({"model": "lenet"}, "at least 16 x 16"),
        ({"measure": "margn"}, "did you mean 'margin'"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"schedule": ScheduleSpec("lineer")}, "did you mean 'linear'"),
        ({"optimiser": OptimiserSpec("adm")}, "did you mean 'adam'"),
        ({"optimiser": OptimiserSpec(lr=0.0)}, "image.optimiser.lr is 0.0"),
        ({"optimiser": OptimiserSpec(lr=float("nan"))}, "image.optimiser.lr is nan"),
        ({"steps": 0}, "image.steps is 0"),
        ({"batch_size": 601}, "there are only 600 training images"),
        ({"dev_interval": 0}, "image.dev_interval is 0"),
        ({"dev_batch": -1}, "image.dev_batch is -1"),
        ({"dropout": 1.0}, "image.dropout is 1.0"),
        ({"dev_size": 0}, "the dev set is empty"),
        ({"data": "mnist", "folder": "nowhere"}, "l2t data prepare mnist --out nowhere"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as raised:
        digits_student(**settings)
    assert says in str(raised.value)


def test_data_on_another_device_takes_the_student_along() -> None:
    """The meta device stands for an accelerator: shapes and places without numbers."""
    spec = ImageSpec(hidden=8, dev_size=700, augment="crop-flip")
    student = ImageStudent(spec, load_data(spec).to("meta"))
    assert {p.device.type for p in student.module.parameters()} == {"meta"}
    log_probs, labels = student.predict(student.batch(0))
    assert log_probs.is_meta and log_probs.shape == (100, 10)
    assert labels.is_meta and labels.shape == (100,)
