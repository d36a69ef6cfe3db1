"""Fixed losses against torch, closed forms and the published formulas written out anew."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_core.comparing.specs import GRIDS, CompareSection
from l2t_core.errors import UserError
from l2t_core.losses.baselines import BASELINES, complete_settings
from l2t_core.losses.functions import (
    Moment,
    annealing,
    focal,
    forward_corrected,
    generalised_cross_entropy,
    label_smoothing,
    large_margin,
    logit_adjusted,
    margin_cosine,
)
from l2t_core.losses.steps import FixedLoss, LastLayer, Recorded, fixed_loss
from l2t_core.losses.taught import cross_entropy
from l2t_core.students.state import DevStatistics, TrainStatistics


@pytest.fixture
def logits() -> Tensor:
    torch.manual_seed(3)
    return 3.0 * torch.randn(7, 5, dtype=torch.float64)


TARGETS = torch.tensor([0, 1, 2, 3, 4, 0, 2])
SHARES = torch.tensor([0.6, 0.2, 0.1, 0.07, 0.03], dtype=torch.float64)
# T, row by true class, column by label; some labels are never given to some classes.
CONFUSION = torch.tensor(
    [
        [0.9, 0.1, 0.0, 0.0, 0.0],
        [0.1, 0.6, 0.1, 0.1, 0.1],
        [0.1, 0.1, 0.5, 0.2, 0.1],
        [0.0, 0.0, 0.4, 0.6, 0.0],
        [0.1, 0.1, 0.1, 0.1, 0.6],
    ],
    dtype=torch.float64,
)


def log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, 1)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.7, 1.0])
def test_label_smoothing_is_torchs(logits: Tensor, eps: float) -> None:
    expected = F.cross_entropy(logits, TARGETS, label_smoothing=eps, reduction="none")
    torch.testing.assert_close(label_smoothing(log_probs(logits), TARGETS, eps), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_published_formula(logits: Tensor, gamma: float) -> None:
    p = torch.softmax(logits, 1)[torch.arange(7), TARGETS]
    expected = -((1 - p) ** gamma) * torch.log(p)
    torch.testing.assert_close(focal(log_probs(logits), TARGETS, gamma), expected)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.7])
def test_generalised_cross_entropy_is_the_published_formula(logits: Tensor, q: float) -> None:
    p = torch.softmax(logits, 1)[torch.arange(7), TARGETS]
    expected = (1 - p**q) / q
    torch.testing.assert_close(generalised_cross_entropy(log_probs(logits), TARGETS, q), expected)


def test_limits_are_cross_entropy_and_one_minus_p(logits: Tensor) -> None:
    lp = log_probs(logits)
    ce = F.cross_entropy(logits, TARGETS, reduction="none")
    p = lp.exp()[torch.arange(7), TARGETS]
    torch.testing.assert_close(focal(lp, TARGETS, 0.0), ce)
    torch.testing.assert_close(generalised_cross_entropy(lp, TARGETS, 0.0), ce)
    near = generalised_cross_entropy(lp, TARGETS, 1e-7)
    torch.testing.assert_close(near, ce, rtol=1e-5, atol=1e-6)
    # With one-hot targets the mean absolute error over classes is 2 (1 - p).
    one_hot = F.one_hot(TARGETS, 5).double()
    mae = (lp.exp() - one_hot).abs().sum(1)
    torch.testing.assert_close(2 * generalised_cross_entropy(lp, TARGETS, 1.0), mae)
    torch.testing.assert_close(generalised_cross_entropy(lp, TARGETS, 1.0), 1 - p)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment_is_the_published_formula(logits: Tensor, tau: float) -> None:
    # log(1 + sum_{k != y} (pi_k / pi_y)^tau exp(z_k - z_y))
    of_target = logits.gather(1, TARGETS.unsqueeze(1))
    terms = (SHARES / SHARES[TARGETS].unsqueeze(1)) ** tau * torch.exp(logits - of_target)
    found = logit_adjusted(log_probs(logits), TARGETS, SHARES, tau)
    torch.testing.assert_close(found, torch.log(terms.sum(1)))  # its own term is the 1
    if tau == 0.0:
        expected = F.cross_entropy(logits, TARGETS, reduction="none")
        torch.testing.assert_close(found, expected)


def test_a_class_without_examples_does_not_break_logit_adjustment() -> None:
    torch.manual_seed(4)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    shares = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64)
    loss = logit_adjusted(log_probs(logits), torch.tensor([0, 1, 0]), shares, 1.0)
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(logits.grad.isfinite().all())  # type: ignore[union-attr]
    single = logit_adjusted(log_probs(logits.float()), torch.tensor([0, 1, 0]), shares, 1.0)
    assert single.dtype == torch.float32  # whatever the shares are given in
    two = torch.log_softmax(logits[:, :2], 1)  # equal shares of the two that are there
    torch.testing.assert_close(loss, F.nll_loss(two, torch.tensor([0, 1, 0]), reduction="none"))


def test_forward_correction_is_the_published_formula(logits: Tensor) -> None:
    # -log of the y-th entry of T' p, T' the transpose
    noisy = torch.softmax(logits, 1) @ CONFUSION
    expected = F.nll_loss(torch.log(noisy), TARGETS, reduction="none")
    torch.testing.assert_close(forward_corrected(log_probs(logits), TARGETS, CONFUSION), expected)
    right = forward_corrected(log_probs(logits), TARGETS, torch.eye(5))
    torch.testing.assert_close(right, F.cross_entropy(logits, TARGETS, reduction="none"))


def test_forward_correction_is_least_at_the_true_classes() -> None:
    """Labels drawn by T from the class 2: its expected loss is least where p says so."""
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def expected() -> Tensor:
        optimiser.zero_grad()
        every = forward_corrected(log_probs(logits.expand(5, 5)), torch.arange(5), CONFUSION)
        loss = (CONFUSION[2] * every).sum()
        loss.backward()
        return loss.detach()

    optimiser.step(expected)
    assert float(torch.softmax(logits.detach(), 1)[0, 2]) > 0.99


def psi(theta: Tensor, margin: int) -> Tensor:
    """Return (-1)^k cos(m theta) - 2k by its definition, interval by interval."""
    k = torch.floor(theta * margin / math.pi).clamp(max=margin - 1)
    return (-1.0) ** k * torch.cos(margin * theta) - 2 * k


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
def test_margin_cosine_is_psi_of_the_angle(margin: int) -> None:
    theta = torch.linspace(0.001, math.pi - 0.001, 997, dtype=torch.float64)
    value = margin_cosine(torch.cos(theta), margin)
    torch.testing.assert_close(value, psi(theta, margin))
    assert bool((value.diff() < 0).all())  # falls all the way, from 1 to 1 - 2m
    ends = margin_cosine(torch.tensor([1.0, -1.0]), margin)
    torch.testing.assert_close(ends, torch.tensor([1.0, 1.0 - 2 * margin]))


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
@pytest.mark.parametrize("annealed", [0.0, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_large_margin_is_the_published_formula(margin: int, annealed: float, bias: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(7, 6, dtype=torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64) * bias
    plain = x @ weight.t()
    f = plain + b
    for n, y in enumerate(TARGETS.tolist()):
        norm = weight[y].norm() * x[n].norm()
        theta = torch.arccos(plain[n, y] / norm)
        wanted = (annealed * plain[n, y] + norm * psi(theta, margin)) / (1 + annealed)
        f[n, y] = wanted + b[y]
    expected = F.cross_entropy(f, TARGETS, reduction="none")
    found = large_margin(log_probs(plain + b), TARGETS, x, weight, margin, annealed)
    torch.testing.assert_close(found, expected)
    if margin == 1:
        torch.testing.assert_close(found, F.cross_entropy(plain + b, TARGETS, reduction="none"))


def test_annealing_is_the_published_one_stretched() -> None:
    for t in (0, 100, 7_500, 29_999):  # the authors' 30,000 iterations
        assert annealing(t, 30_000, 0.0) == pytest.approx(1000 * (1 + 2.5e-5 * t) ** -35)
    assert annealing(50, 100, 0.0) == annealing(15_000, 30_000, 0.0)
    assert annealing(99, 100, 5.0) == 5.0


@pytest.mark.parametrize("name", [n for n in BASELINES.names() if BASELINES.get(n).function])
def test_gradients_are_the_finite_differences(name: str, logits: Tensor) -> None:
    baseline = BASELINES.get(name)
    function = baseline.load()
    settings = complete_settings(name, {})
    if baseline.needs_classifier:
        torch.manual_seed(2)
        x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

        def loss(x: Tensor, weight: Tensor) -> Tensor:
            at = Moment(50, 100, x, weight)
            return function(log_probs(x @ weight.t()), TARGETS, settings, at)

        for margin in (2.0, 3.0, 4.0):
            settings["margin"] = margin
            assert torch.autograd.gradcheck(loss, (x, weight))
        return
    told = {"class_shares": SHARES, "label_confusion": CONFUSION, "dev_confusion": CONFUSION}
    free, at = logits.requires_grad_(), Moment(5, 10, told=told.get(baseline.asks))
    assert torch.autograd.gradcheck(
        lambda z: function(log_probs(z), TARGETS, settings, at), (free,)
    )


@pytest.mark.parametrize(("name", "settings"), [("focal", {"gamma": 0.5}), ("gce", {"q": 0.5})])
def test_certain_and_hopeless_answers_have_finite_gradients(
    name: str, settings: dict[str, float]
) -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = FixedLoss(name, settings).loss(log_probs(logits), torch.tensor([0, 0]))
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(loss.isfinite().all()) and bool(logits.grad.isfinite().all())


def test_no_feature_at_all_has_a_finite_gradient() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    weight = torch.ones(2, 3, requires_grad=True)
    large_margin(log_probs(x @ weight.t()), torch.tensor([0]), x, weight, 4).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_sigmoid_form_by_hand(logits: Tensor) -> None:
    lp = log_probs(logits)
    p = lp.exp()[torch.arange(7), TARGETS]
    loss = FixedLoss("sigmoid", {"warmup": 0.25, "mix": 0.0}, total_steps=8)
    loss.begin_step(0.1, 1)
    torch.testing.assert_close(loss.loss(lp, TARGETS), cross_entropy(lp, TARGETS))
    loss.begin_step(0.1, 2)
    torch.testing.assert_close(loss.loss(lp, TARGETS), 1 / (1 + p))  # sigmoid(-log p) at W = I
    mixed = FixedLoss("sigmoid", {"mix": 0.25}).loss(lp, TARGETS)
    torch.testing.assert_close(mixed, -0.25 * torch.log(p) + 0.75 / (1 + p))


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("focall", {}, "did you mean 'focal'?"),
        ("mrt", {"share": 1.5}, "mrt.share is 1.5; it must be from 0 to 1"),
        ("mrt", {"samples": 1.0}, "mrt.samples is 1; it must be 2 or more"),
        ("focal", {"gama": 1.0}, "did you mean 'gamma'?"),
        ("cross_entropy", {"eps": 1.0}, "known: none"),
        ("gce", {"q": 1.5}, "gce.q is 1.5; it must be from 0 to 1"),
        ("focal", {"gamma": -1.0}, "it must be 0 or more$"),
        ("focal", {"gamma": math.inf}, "focal.gamma is inf; it must be 0 or more, but finite"),
        ("large_margin", {"margin": 2.5}, "a whole number"),
    ],
)
def test_impossible_settings_are_refused(name: str, settings: dict, expected: str) -> None:
    with pytest.raises(UserError, match=expected.replace("?", r"\?")):
        complete_settings(name, settings)


def test_a_recipe_can_give_a_grid_for_every_setting() -> None:
    spec = CompareSection(trials=3)
    assert pickle.loads(pickle.dumps(spec)) == spec  # as processes are sent it
    assert spec.trials == 3 and vars(spec.large_margin)["margin"] == [2, 3, 4]  # type: ignore[attr-defined]
    for name in BASELINES.names():
        grid = vars(getattr(spec, name)) if name in GRIDS else {}
        assert set(grid) == set(BASELINES.get(name).settings)
        for key, values in grid.items():
            for value in values:
                complete_settings(name, {key: value})


class Toy:
    """A student of one fixed batch."""

    num_classes, total_steps = 5, 10

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.x = torch.randn(7, 4)

    def batch(self, step: int) -> Tensor:
        return self.x

    def predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self.module.train()
        return torch.log_softmax(self.module(batch), 1), TARGETS


def test_the_last_layer_is_found_and_used() -> None:
    student = Toy(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)))
    loss = fixed_loss("large_margin", {"margin": 2, "lambda_min": 1.0}, student)  # type: ignore[arg-type]
    loss.begin_step(0.1, 9)
    lp, targets = student.predict(student.batch(9))
    hidden = torch.relu(student.module[0](student.x))  # type: ignore[index]
    weight = student.module[2].weight  # type: ignore[index]
    expected = large_margin(lp, targets, hidden, weight, 2, 1.0)
    torch.testing.assert_close(loss.loss(lp, targets), expected)
    with pytest.raises(UserError, match="took no part"):
        loss.loss(lp, targets)  # the features of a step serve once
    student.module.eval()
    student.module(student.x)
    with pytest.raises(UserError, match="took no part"):
        loss.loss(lp, targets)  # a pass over dev is no step


def test_a_named_classifier_comes_first() -> None:
    module = nn.Module()
    module.classifier = nn.Linear(4, 5)
    module.head = nn.Linear(4, 5)
    assert LastLayer(module, 5).layer is module.classifier


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(4, 5, 1),
        nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5)),
    ],
    ids=["no linear layer", "something follows", "norm follows"],
)
def test_students_without_a_linear_last_layer_are_refused(module: nn.Module) -> None:
    with pytest.raises(UserError, match="large_margin needs a student"):
        fixed_loss("large_margin", {}, Toy(module))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["logit_adjusted", "forward_corrected", "gold_corrected"])
def test_students_that_do_not_tell_what_a_loss_asks_are_refused(name: str) -> None:
    asked = BASELINES.get(name).asks
    with pytest.raises(UserError, match=rf"{name} needs a student that has a method {asked}\(\)"):
        fixed_loss(name, {}, Toy(nn.Linear(4, 5)))  # type: ignore[arg-type]


def test_the_record_keeps_curve_and_state() -> None:
    recorded = Recorded(FixedLoss("sigmoid", {"warmup": 0.5}, total_steps=4))
    for step in range(3):
        recorded.begin_step(0.1, step)
        recorded.commit(TrainStatistics(1.0, 0.5))
    recorded.observe_dev(DevStatistics(0.25, 0.75))
    assert recorded.curve == [[3, 0.25, 0.75]]
    other = Recorded(FixedLoss("sigmoid", {"warmup": 0.5}, total_steps=4))
    other.load_state_dict({**recorded.state_dict(), "seconds": 100.0})
    assert other.step == 3 and other.curve == recorded.curve
    assert other.seconds() >= 100.0 and other.state_dict()["seconds"] >= 100.0
