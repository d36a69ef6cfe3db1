"""TaughtLoss in an ordinary loop."""

from __future__ import annotations

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from l2t_core import TaughtLoss
from l2t_core.errors import UserError
from l2t_core.losses.forms import FORMS
from l2t_core.losses.taught import step_loss
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.state import StudentState, train_statistics
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import TeacherHeader, load_teacher, save_teacher


@pytest.fixture(params=["attention", "lstm"])
def teacher_path(tmp_path, request):
    features = ["progress", "train_nll", "dev_nll", "log_learning_rate"]
    spec = TeacherSpec(request.param, slots=3, init_scale=0.5, features=features)
    loss = LossSpec("dense", "softplus", warmup_steps=2)
    header = TeacherHeader(spec, loss, 4, 10, 2, {"kind": "classes", "num_classes": 4})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 4, 4, seed=2), header)
    return path


def loop(criterion, model, optimizer, steps):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
    y = torch.arange(16) % 4
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        criterion.step()
        criterion.observe_dev(model(x), y)
        values.append(float(loss.detach()))
    return values


def fresh():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.5)


def test_drop_in_loop_and_resume(teacher_path):
    model, optimizer = fresh()
    criterion = TaughtLoss(teacher_path, 10, optimizer)
    whole = loop(criterion, model, optimizer, 10)
    model, optimizer = fresh()
    first = TaughtLoss(teacher_path, 10, optimizer)
    values = loop(first, model, optimizer, 4)
    second = TaughtLoss(teacher_path, 10, optimizer)
    second.load_state_dict(first.state_dict())
    values += loop(second, model, optimizer, 6)
    assert values == whole
    assert list(criterion.parameters()) == []


def test_a_teacher_that_takes_over_has_nothing_to_remember(teacher_path):
    """As where the state is one of another teacher, or of an earlier version."""
    first = TaughtLoss(teacher_path, 10, fresh()[1])
    loop(first, *fresh(), 4)
    state = first.get_extra_state()
    first.set_extra_state(state)
    assert bool(first.applied.memory.any()) == bool(first.applied.teacher.memory)
    with torch.no_grad():
        next(first.applied.teacher.parameters()).add_(0.1)
    first.set_extra_state(state)
    assert first.applied.step == 4 and not bool(first.applied.memory.any())
    state.pop("memory", None)
    first.set_extra_state(state)
    assert first.applied.step == 4 and not bool(first.applied.memory.any())


def test_warmup_is_cross_entropy_and_evaluation_too(teacher_path):
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, 1, 2, 3, 0])
    plain = nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(criterion(logits, targets), plain)
    for _ in range(2):
        criterion(logits, targets)
        criterion.step()
    assert abs(float(criterion(logits, targets)) - float(plain)) > 1e-3
    torch.testing.assert_close(criterion.eval()(logits, targets), plain)


def test_validation_is_cross_entropy_and_changes_nothing(teacher_path):
    """The usual pass over dev, with model.eval() and no_grad: no one tells the criterion."""
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    logits = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(8) % 4
    for _ in range(3):
        criterion(logits, targets)
        criterion.step()
    with torch.no_grad():
        found = criterion(-logits, targets)
    torch.testing.assert_close(found, nn.functional.cross_entropy(-logits, targets))
    criterion(logits, targets)
    criterion.step()
    nll = float(nn.functional.cross_entropy(logits, targets))
    assert criterion.applied.state_dict()["state"]["train"]["nll"] == pytest.approx(nll)


def test_the_teacher_sees_the_rate_of_the_step_that_comes(teacher_path):
    """Two half batches make one step, with the rate that the scheduler set for it."""
    model, optimizer = fresh()
    criterion = TaughtLoss(teacher_path, 10, optimizer)
    expected = StudentState(10, 4, criterion.applied.state.feature_names)
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    for step, rate in enumerate((0.5, 0.1, 0.02)):
        optimizer.param_groups[0]["lr"] = rate
        for half in (slice(0, 2), slice(2, 8)):
            criterion(model(x[half]), y[half]).backward()
        assert torch.equal(criterion.applied.features[:4], expected.features(step, rate))
        whole = train_statistics(torch.log_softmax(model(x), 1), y)
        optimizer.step()
        criterion.step()
        expected.observe_train(whole)
        torch.testing.assert_close(
            criterion.applied.state.features(step, rate), expected.features(step, rate)
        )
        criterion.applied.state.load_state_dict(expected.state_dict())


def test_a_thrown_away_batch_changes_nothing(teacher_path):
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    before = criterion.applied.state_dict()
    criterion(torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]))
    assert criterion.applied.state_dict() == before


def test_a_look_at_dev_counts_from_the_next_batch_on(teacher_path):
    """Of the same step, where gradients are added up over several."""
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    logits, targets = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    criterion(logits, targets % 4)
    before = criterion.applied.features.clone()
    criterion.observe_dev(5.0 * logits, targets % 4)
    criterion(logits, targets % 4)
    assert not torch.equal(criterion.applied.features, before)


def test_dev_logits_of_another_size_are_refused(teacher_path):
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    with pytest.raises(UserError, match="4 classes, the logits have 3"):
        criterion.observe_dev(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_wrong_sizes(teacher_path):
    with pytest.raises(UserError, match="4 classes, the logits have 5"):
        TaughtLoss(teacher_path, 10, fresh()[1])(torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="at least 1"):
        TaughtLoss(teacher_path, total_steps=0)


def test_a_loss_for_any_number_of_classes_is_told_how_many(tmp_path):
    spec = TeacherSpec(slots=3, init_scale=0.5, features=["progress", "train_nll"])
    loss, path = LossSpec("network"), tmp_path / "any.safetensors"
    header = TeacherHeader(spec, loss, 4, 10, 2, {"kind": "classes", "num_classes": 4})
    save_teacher(path, build_teacher(spec, loss, 4, 2, seed=2), header)
    logits, targets = torch.randn(6, 9), torch.arange(6)
    with pytest.raises(UserError, match="4 classes, the logits have 9; give num_classes=9"):
        TaughtLoss(path, 10)(logits, targets)
    criterion = TaughtLoss(path, 10, num_classes=9)
    log_probs = logits.log_softmax(1)
    expected = step_loss(loss, log_probs, targets, criterion.applied.begin_step(0.0), 0)
    assert torch.equal(criterion(logits, targets), expected.mean())
    with pytest.raises(UserError, match="num_classes is 1"):
        TaughtLoss(path, 10, num_classes=1)


def test_another_number_of_classes_does_not_fit_a_loss_with_parts_for_each(teacher_path):
    with pytest.raises(UserError, match="does not fit: it was trained for 4 classes"):
        TaughtLoss(teacher_path, 10, fresh()[1], num_classes=9)


@pytest.mark.parametrize("form", FORMS.names())
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 4, 4, 4)], ids=len)
def test_shapes_of_cross_entropy(tmp_path, form, shape):
    """One example, a batch, and a class for each pixel: K = 4 is every other size there, too."""
    spec = TeacherSpec(slots=3, init_scale=0.5, features=["progress", "train_nll", "dev_nll"])
    loss = LossSpec(form, "softplus")
    header = TeacherHeader(spec, loss, 4, 10, 2, {"kind": "classes", "num_classes": 4})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 4, 3, seed=2), header)
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=draw, requires_grad=True)
    rows = logits.movedim(1, -1).reshape(-1, 4) if len(shape) > 1 else logits.unsqueeze(0)
    labels = torch.arange(len(rows)) % 4
    labels[1::3] = 255
    targets = labels.view([*shape[:-3], *shape[-2:]] if len(shape) > 2 else shape[:-1])
    kept = labels != 255
    whole, flat = (TaughtLoss(path, 10, ignore_index=255) for _ in range(2))
    for criterion in (whole.eval(), nn.CrossEntropyLoss(ignore_index=255)):
        torch.testing.assert_close(
            criterion(logits, targets), nn.functional.cross_entropy(rows[kept], labels[kept])
        )
    whole.train()
    for _ in range(2):
        found = whole(logits, targets.to(torch.uint8))
        torch.testing.assert_close(found, flat(rows[kept], labels[kept]))
        whole.step()
        flat.step()
        whole.observe_dev(logits, targets)
        flat.observe_dev(rows[kept], labels[kept])
    assert whole.applied.state_dict() == flat.applied.state_dict()
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.shape == shape and bool(gradient.any())


def test_the_teacher_writes_the_same_loss_within_autocast(teacher_path):
    model, optimizer = fresh()
    plain, inside = (TaughtLoss(teacher_path, 10, optimizer) for _ in range(2))
    x, y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
    for _ in range(4):
        logits = model(x)
        expected = plain(logits, y)
        with torch.autocast("cpu", torch.bfloat16):
            found = inside(logits, y)
        torch.testing.assert_close(found, expected)
        for name, part in plain.applied.coefficients.items():
            assert torch.equal(inside.applied.coefficients[name], part)
        plain.step()
        inside.step()


@pytest.mark.parametrize("form", FORMS.names())
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_taught_in_full(tmp_path, form, low):
    """As autocast, or a model in half, gives them: neither they nor phi are rounded any further."""
    spec = TeacherSpec(slots=3, init_scale=0.5, features=["progress", "train_nll", "dev_nll"])
    header = TeacherHeader(
        spec, LossSpec(form, rank=2), 4, 10, 2, {"kind": "classes", "num_classes": 4}
    )
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, header.loss, 4, 3, seed=2), header)
    halved, full = TaughtLoss(path, 10), TaughtLoss(path, 10)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).to(low).requires_grad_()
    targets = torch.arange(6) % 4
    found, expected = halved(logits, targets), full(logits.float(), targets)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert torch.autograd.grad(found, logits)[0].dtype == low
    for criterion, seen in ((halved, logits), (full, logits.float())):
        criterion.step()
        criterion.observe_dev(seen, targets)
    assert halved.applied.state_dict() == full.applied.state_dict()
    assert torch.equal(halved.eval()(logits, targets), full.eval()(logits.float(), targets))


def test_a_checkpoint_within_an_accumulated_step_goes_on_as_without_it(teacher_path):
    model, optimizer = fresh()
    criterion, again = (TaughtLoss(teacher_path, 10, optimizer) for _ in range(2))
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    for _ in range(2):
        criterion(model(x), y)
        criterion.step()
    criterion(model(x[:2]), y[:2])
    again.load_state_dict(criterion.state_dict())
    for one in (criterion, again):
        one(model(x[2:]), y[2:])
        one.step()
    assert again.state_dict() == criterion.state_dict()
    assert torch.equal(again(model(x), y), criterion(model(x), y))
    criterion.step()
    old = criterion.state_dict()  # a checkpoint from before it held that
    del old["_extra_state"]["waiting"]
    again.load_state_dict(old)
    assert again.state_dict() == criterion.state_dict()


def test_a_copy_of_the_model_follows_the_models_own_rate(teacher_path):
    """As averages of weights copy it, together with its criterion; not its optimiser."""
    model, optimizer = fresh()
    criterion = TaughtLoss(teacher_path, 10, optimizer)
    copied = copy.deepcopy(criterion)
    optimizer.param_groups[0]["lr"] = 1e-4
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    for one in (criterion, copied):
        for _ in range(3):
            one(model(x), y)
            one.step()
    assert torch.equal(copied(model(x), y), criterion(model(x), y))
    both, theirs = copy.deepcopy((optimizer, criterion))
    assert theirs._optimizer is both is not optimizer
    theirs.step()
    assert (theirs.applied.step, criterion.applied.step) == (4, 3)


@pytest.mark.parametrize("target", [-1, 4, 255])
def test_a_target_that_is_no_class_is_named(teacher_path, target):
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    targets = torch.tensor([0, -100, target, 1, 2])
    with pytest.raises(UserError, match=rf"a target is {target}, the logits have 4 classes"):
        criterion(torch.randn(5, 4), targets)


def test_what_is_no_class_is_refused(teacher_path):
    criterion = TaughtLoss(teacher_path, 10, fresh()[1])
    logits = torch.randn(5, 4)
    with pytest.raises(UserError, match=r"probabilities perhaps; .* give class indices"):
        criterion(logits, logits.softmax(1))
    with pytest.raises(UserError, match=r"targets \[5, 1\] do not fit logits \[5, 4\]"):
        criterion(logits, torch.zeros(5, 1, dtype=torch.long))
    with pytest.raises(UserError, match=r"targets \[5\] do not fit logits \[4, 4\]"):
        criterion.observe_dev(logits[:4], torch.zeros(5, dtype=torch.long))


def test_a_teacher_that_looks_at_the_rate_wants_the_optimizer(teacher_path):
    with pytest.raises(UserError, match="looks at the learning rate; give the student's optimizer"):
        TaughtLoss(teacher_path, 10)


def test_a_static_teacher_wants_neither_optimizer_nor_dev(tmp_path):
    spec = TeacherSpec("static", features=["dev_nll", "log_learning_rate"])
    header = TeacherHeader(spec, LossSpec("shared"), 4, 10, 2, {"num_classes": 4})
    save_teacher(tmp_path / "t.safetensors", build_teacher(spec, header.loss, 4, 2, 1), header)
    assert step_through(TaughtLoss(tmp_path / "t.safetensors", 30), 40) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion = TaughtLoss(tmp_path / "t.safetensors", 30)
        for _ in range(150):  # nor to be told of its steps
            criterion(torch.zeros(4, 4), torch.arange(4))


def test_ignored_targets_are_left_out_as_in_cross_entropy(teacher_path):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([0, -100, 2, 3, -100, 0])
    criterion, kept = (TaughtLoss(teacher_path, 10, fresh()[1]) for _ in range(2))
    plain = nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(criterion(logits, targets), plain)  # in its warm-up
    torch.testing.assert_close(criterion.eval()(logits, targets), plain)
    criterion.train()
    rows = targets >= 0
    for _ in range(4):
        taught = criterion(logits, targets)
        torch.testing.assert_close(taught, kept(logits[rows], targets[rows]))
        criterion.step()
        kept.step()
        criterion.observe_dev(logits, targets)
        kept.observe_dev(logits[rows], targets[rows])
    assert criterion.applied.state_dict() == kept.applied.state_dict()
    assert abs(float(taught) - float(plain)) > 1e-3
    criterion(logits, torch.full_like(targets, -100))
    criterion.step()
    assert criterion.applied.state_dict()["state"] == kept.applied.state_dict()["state"]


def test_classes_may_be_bytes(teacher_path):
    """In which -100, that of the targets that are none, is 156."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([156, 3, 199])
    found = TaughtLoss(teacher_path, 10, fresh()[1]).eval()(logits, targets.to(torch.uint8))
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, targets))


def step_through(criterion, steps, look_at=()):
    """Make ``steps`` steps with a validation after each; return the texts of the warnings."""
    logits, targets = torch.zeros(4, 4), torch.arange(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            criterion(logits, targets)
            criterion.step()
            with torch.no_grad():
                criterion(logits, targets)
            if step in look_at:
                criterion.observe_dev(logits, targets)
    return caught


def test_a_teacher_that_misses_dev_says_so_once(teacher_path):
    """It saw dev every 2 of 10 steps: of 30 every 6, and from the 13th on it is overdue."""
    criterion = TaughtLoss(teacher_path, 30, fresh()[1])
    assert step_through(criterion, 12) == []
    found, *more = step_through(criterion, 18)
    assert not more and found.filename == __file__
    assert re.search(r"in 13 steps: .* criterion.observe_dev\(.*\) every 6 s", str(found.message))


def test_more_steps_than_were_said_are_told_once(teacher_path):
    criterion = TaughtLoss(teacher_path, 6, fresh()[1])  # as where epochs were forgotten
    assert step_through(criterion, 6, look_at=[0]) == []
    found, *more = step_through(criterion, 3)
    assert not more and found.filename == __file__
    assert re.search(r"more than the 6 steps .* len\(loader\) \* epochs", str(found.message))


@pytest.mark.parametrize("accumulated", [100, 101])
def test_a_loop_without_step_is_told_once(teacher_path, accumulated):
    criterion = TaughtLoss(teacher_path, 30, fresh()[1])
    logits = torch.zeros(4, 4, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(accumulated):
            criterion(logits, torch.arange(4))
        criterion.step()
        for _ in range(2 * accumulated):
            criterion(logits, torch.arange(4))
    told = [str(w.message) for w in caught]
    assert len(told) == (accumulated > 100)
    assert all("100 batches without criterion.step()" in text for text in told)


@pytest.mark.parametrize("look_at", [0, 11])
def test_a_teacher_that_saw_dev_says_nothing(teacher_path, look_at):
    criterion = TaughtLoss(teacher_path, 30, fresh()[1])
    assert step_through(criterion, 29, [look_at]) == []
    resumed = TaughtLoss(teacher_path, 30, fresh()[1])
    resumed.load_state_dict(criterion.state_dict())
    assert step_through(resumed, 1) == []


def test_a_teacher_that_needs_no_dev_says_nothing(teacher_path):
    teacher, header = load_teacher(teacher_path)
    header.teacher.features = ["progress", "train_nll", "train_accuracy", "log_learning_rate"]
    save_teacher(teacher_path, teacher, header)
    assert step_through(TaughtLoss(teacher_path, 30, fresh()[1]), 30) == []
