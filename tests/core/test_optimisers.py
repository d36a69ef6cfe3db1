"""The functional optimisers and schedules against torch.optim, step by step."""

from __future__ import annotations

import math

import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_core.students.optimisers import build_optimiser, clip_by_norm, pull_back_clip
from l2t_core.students.schedules import learning_rate

SPECS = [
    OptimiserSpec("sgd", 0.1, weight_decay=0.02),
    OptimiserSpec("momentum", 0.1, weight_decay=0.02, clip_norm=0.3),
    OptimiserSpec("nesterov", 0.1, momentum=0.8, weight_decay=0.02),
    OptimiserSpec("adam", 0.05, weight_decay=0.02, clip_norm=0.3),
    OptimiserSpec("adamw", 0.05, beta1=0.8, beta2=0.98, weight_decay=0.1),
]


def torch_optimiser(spec, parameter):
    decay = spec.weight_decay
    if spec.name in ("adam", "adamw"):
        kind = torch.optim.Adam if spec.name == "adam" else torch.optim.AdamW
        betas = (spec.beta1, spec.beta2)
        return kind([parameter], lr=spec.lr, betas=betas, eps=spec.eps, weight_decay=decay)
    momentum = 0.0 if spec.name == "sgd" else spec.momentum
    return torch.optim.SGD(
        [parameter], lr=spec.lr, momentum=momentum, weight_decay=decay,
        nesterov=spec.name == "nesterov",
    )


def gradient_of(omega, step):
    # A quadratic with a moving minimum, so that the trajectory is not trivial.
    return omega * torch.linspace(0.5, 2.0, 7, dtype=omega.dtype) - float(step % 3)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_equals_torch_optim_with_schedule(spec):
    start = torch.linspace(-1, 1, 7, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    reference = torch_optimiser(spec, parameter)
    schedule = ScheduleSpec("cosine", warmup_steps=4)
    optimiser = build_optimiser(spec)
    state = optimiser.initial(start.clone())
    assert state.shape == (optimiser.rows, 7)
    for step in range(30):
        rate = learning_rate(schedule, spec.lr, step, 30)
        for group in reference.param_groups:
            group["lr"] = rate
        parameter.grad = gradient_of(parameter.detach(), step)
        if spec.clip_norm:
            torch.nn.utils.clip_grad_norm_([parameter], spec.clip_norm)
        reference.step()
        state = optimiser.update(state, gradient_of(state[0], step), step, rate)
        torch.testing.assert_close(state[0], parameter.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_update_is_differentiable(spec):
    optimiser = build_optimiser(spec)
    generator = torch.Generator().manual_seed(0)
    state = torch.rand(optimiser.rows, 4, generator=generator, dtype=torch.float64) + 0.1
    gradient = torch.randn(4, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, g: optimiser.update(s, g, 3, 0.1),
        (state.requires_grad_(), gradient.requires_grad_()),
    )


def test_fairseqs_adam_is_that_of_its_code():
    """fairseq/optim/adam.py: eps beside the uncorrected root, and weight decay on its own."""
    spec = OptimiserSpec("adam", 0.05, beta1=0.8, beta2=0.9, eps=0.1, weight_decay=0.2)
    optimiser = build_optimiser(spec, "fairseq")
    omega, gradients = torch.tensor([1.0, -2.0]).double(), torch.tensor([[0.5, 3.0], [1.0, -1.0]])
    state, m, v = optimiser.initial(omega), torch.zeros(2).double(), torch.zeros(2).double()
    for step, g in enumerate(gradients.double()):
        state = optimiser.update(state, g, step, 0.05)
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        size = 0.05 * (1 - 0.9 ** (step + 1)) ** 0.5 / (1 - 0.8 ** (step + 1))
        omega = omega - 0.05 * 0.2 * omega
        omega = omega - size * m / (v.sqrt() + 0.1)
        torch.testing.assert_close(state, torch.stack([omega, m, v]))


def test_eps_root_is_added_under_the_root():
    g = torch.tensor([0.0, 2.0]).double()
    spec = OptimiserSpec("adam", 0.1, beta1=0.5, beta2=0.75, eps=0.3, eps_root=3.0)
    optimiser = build_optimiser(spec)
    state = optimiser.update(optimiser.initial(torch.zeros(2).double()), g, 0, 0.1)
    # First moment 1, corrected 2; second 1, so that its root is 2, corrected 4.
    torch.testing.assert_close(state[0], torch.tensor([0.0, -0.1 * 2.0 / 4.3]).double())


@pytest.mark.parametrize("eps_form", ["torch", "fairseq"])
@pytest.mark.parametrize(
    "spec", [*SPECS, OptimiserSpec("adam", 0.05, eps_root=0.3)], ids=lambda s: s.name
)
def test_the_written_vjp_is_autograds(spec, eps_form):
    optimiser = build_optimiser(spec, eps_form)
    generator = torch.Generator().manual_seed(1)
    state = torch.rand(optimiser.rows, 5, generator=generator, dtype=torch.float64)
    if optimiser.rows == 3:
        state[2, 0] = 0.0  # a second moment of zero, which the gradient below keeps there
    for scale in (1.0, 0.05):  # clipped, and within the norm
        gradient = scale * torch.randn(5, generator=generator, dtype=torch.float64)
        gradient[0] = -0.02 * state[0, 0] if spec.name == "adam" else 0.0
        cotangent = torch.randn(state.shape, generator=generator, dtype=torch.float64)
        s, g = state.clone().requires_grad_(), gradient.clone().requires_grad_()
        after = optimiser.update(s, g, 3, 0.1)
        d_state, d_gradient = torch.autograd.grad(after, (s, g), cotangent)
        pulled = cotangent.clone()
        found = optimiser.pull_back(
            state, gradient if optimiser.needs_gradient else None, pulled, 3, 0.1
        )
        torch.testing.assert_close(found, d_gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pulled, d_state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_writing_into_a_given_tensor_changes_nothing(spec):
    optimiser = build_optimiser(spec)
    state = torch.rand(optimiser.rows, 5)
    gradient, out = torch.rand(5), torch.empty(optimiser.rows, 5)
    before = state.clone()
    assert optimiser.update(state, gradient, 2, 0.1, out) is out
    assert torch.equal(out, optimiser.update(state, gradient, 2, 0.1))
    assert torch.equal(state, before)


def test_adam_at_zero_moments_has_a_finite_derivative():
    """The root of a zero second moment has an infinite derivative; times zero that is NaN."""
    optimiser = build_optimiser(OptimiserSpec("adam", 0.1))
    state = optimiser.initial(torch.ones(3)).requires_grad_()
    gradient = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    after = optimiser.update(state, gradient, 0, 0.1)
    pulled = torch.autograd.grad(after, (state, gradient), torch.ones_like(after))
    assert all(torch.isfinite(p).all() for p in pulled)


@pytest.mark.parametrize("eps", [1e-15, 1e-30])
def test_adams_vjp_is_finite_where_there_never_was_a_gradient(eps):
    """A unit of ReLU that is dead from the start; in float32 eps^2 may be 0."""
    optimiser = build_optimiser(OptimiserSpec("adam", 0.1, eps=eps))
    start, gradient = optimiser.initial(torch.ones(2)), torch.tensor([0.0, 1.0])
    pulled = optimiser.pull_back(start, gradient, torch.ones(3, 2), 0, 0.1)
    assert bool(pulled.isfinite().all())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1 - 4 / 9, 1 - 8 / 9]),
        ("inverse_sqrt", [0.5, 1.0, (1 / 5) ** 0.5, (1 / 9) ** 0.5]),
        ("cosine", [0.5, 1.0, *((1 + math.cos(math.pi * k / 9)) / 2 for k in (4, 8))]),
    ],
)
def test_schedules_by_hand(name, expected):
    spec = ScheduleSpec(name, warmup_steps=1)
    rates = [learning_rate(spec, 1.0, step, 10) for step in (0, 1, 5, 9)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "spec", [OptimiserSpec("momentum", momentum=2.0), OptimiserSpec("adam", beta1=1.5),
             OptimiserSpec("sgd", float("nan")), OptimiserSpec("adam", eps=-1.0)],
)
def test_impossible_settings_are_refused(spec):
    with pytest.raises(UserError, match=r"optimiser\.\w+ is .*; it must"):
        build_optimiser(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OptimiserSpec("sgd", momentum=0.95), "momentum has no .*=sgd; use momentum or nesterov"),
        (OptimiserSpec("adam", momentum=0.5), "momentum has no effect"),
        (OptimiserSpec("momentum", beta2=0.98), "beta2 has no .*=momentum; use adam or adamw"),
        (OptimiserSpec("nesterov", eps=1e-3), "eps has no effect"),
    ],
)
def test_settings_of_another_optimiser_are_refused(spec, message):
    """A momentum that plain SGD would pass over makes another student than was asked for."""
    with pytest.raises(UserError, match=message):
        build_optimiser(spec)
    build_optimiser(OptimiserSpec("sgd", momentum=0.0))


@pytest.mark.parametrize(
    ("gradient", "max_norm"),
    [
        ([3.0, 4.0], 5.0 + 1e-6),  # at the norm: the scale is one
        ([3.0, 4.0], 5.0),
        ([0.0, 0.0], 1.0),
        ([0.0, 0.0], 1e-8),  # scaled down although it is zero, as torch does it
    ],
)
def test_clipping_is_autograds_at_its_corners(gradient, max_norm):
    g = torch.tensor(gradient, dtype=torch.float64, requires_grad=True)
    cotangent = torch.tensor([0.5, -2.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(clip_by_norm(g, max_norm), g, cotangent)
    found = pull_back_clip(g.detach(), max_norm, cotangent)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
