"""The benchmark's methods: ways to get d M-tilde / d theta of one student's life.

All differentiate the same quantity: T steps of the same student from the same weights, on the
same batches with the same dropout masks, under the same loss with the phi of the same static
teacher, then the log-likelihood of dev. ``plain`` differentiates nothing: it is T steps of
ordinary training by cross-entropy.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypergradient_students import SEED, SyntheticStudent
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import exact
from l2t_core.losses.taught import step_loss
from l2t_core.specs import OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import Teacher, build_teacher

# Under Adam's root where a gradient is exactly zero, as that of an unseen word is: without it
# its derivative is NaN. Next to nothing beside Adam's eps.
_UNDER_ROOT = 1e-24


@dataclass
class Prepared:
    """An episode that may be run again and again, and a word on how it is run."""

    run: Callable[[], list[Tensor]]
    begin: Callable[[], object] = gc.collect  # before each run, outside its time
    note: str = ""


Method = Callable[[SyntheticStudent, Teacher], Prepared]


def make_teacher(student: SyntheticStudent) -> Teacher:
    """Return the static teacher, in the student's dtype."""
    count = feature_count(student.default_features, student.num_classes)
    spec = TeacherSpec("static", init_scale=0.01)
    teacher = build_teacher(spec, student.loss, student.num_classes, count, SEED)
    return teacher.to(student.dtype)


def _torch_optimiser(spec: OptimiserSpec, module: nn.Module) -> torch.optim.Optimizer:
    if spec.name == "momentum":
        return torch.optim.SGD(module.parameters(), spec.lr, spec.momentum)
    return torch.optim.Adam(module.parameters(), spec.lr, (spec.beta1, spec.beta2), spec.eps)


def plain(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """T steps of cross-entropy with torch.optim. The fresh weights are not part of its time."""
    parts: list[Any] = []

    def begin() -> None:
        parts.clear()
        gc.collect()
        module = student.fresh().train()
        parts.extend([module, _torch_optimiser(student.task.optimiser, module)])

    def run() -> list[Tensor]:
        module, optimiser = parts
        for step in range(student.total_steps):
            batch = student.batch(step)
            loss = F.cross_entropy(module(student.x[batch]), student.y[batch].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return []

    return Prepared(run, begin)


def _engine(
    student: SyntheticStudent, teacher: Teacher, slots: int, hvp: str = "exact",
    memory: str = "",
) -> Prepared:
    """This project's engine with ``memory``, or where that is empty memory for ``slots`` states."""
    life = Life(student)

    def engine(memory: str) -> Engine:
        return Engine(life, student.loss, TrainingSpec(memory=memory, spill="none", hvp=hvp))

    point = engine("1TiB").plan.point_bytes
    chosen = engine(memory or f"{slots * point}B")
    episode = Episode(chosen, student.default_features, SEED, SEED)
    plan = chosen.plan
    note = f"{plan.recomputed / plan.steps:.2f} recomputed a step" if plan.recomputed else ""
    return Prepared(lambda: exact(episode, teacher, lambda *_: None).estimates, note=note)


def l2t_kept(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """This project's engine, all states kept."""
    return _engine(student, teacher, student.total_steps)


def _few(student: SyntheticStudent) -> int:
    """Return the root of 2 T: with so many states each step is recomputed about once."""
    return math.isqrt(2 * student.total_steps)


def l2t_recomputed(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """This project's engine with memory for the root of 2 T states."""
    return _engine(student, teacher, _few(student))


def l2t_within(memory: str) -> Method:
    """Return this project's engine with so much memory for the trajectory, such as 64MiB."""
    return lambda student, teacher: _engine(student, teacher, 0, memory=memory)


def l2t_differences(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """This project's engine by finite differences, all states kept."""
    return _engine(student, teacher, student.total_steps, "finite-difference")


def l2t_one_sided(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """This project's engine by one-sided differences, all states and gradients kept."""
    return _engine(student, teacher, student.total_steps, "one-sided-difference")


def l2t_one_sided_recomputed(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """The same with memory for the root of 2 T of them."""
    return _engine(student, teacher, _few(student), "one-sided-difference")


def _math_attention() -> contextlib.AbstractContextManager[None]:
    """Choose the attention that has a second derivative, and nothing of this project's own."""
    return sdpa_kernel(SDPBackend.MATH)


def _taught_steps(
    student: SyntheticStudent, teacher: Teacher, net: Any, update: Callable[[Tensor], object]
) -> None:
    """Give ``update`` the taught loss of each step, as a graph down to theta."""
    features = torch.zeros(teacher.num_features + teacher.memory, dtype=student.dtype)
    for step in range(student.total_steps):
        torch.default_generator.manual_seed(student.step_seed(step))
        log_probs, targets = student.outputs(net, student.batch(step))
        update(step_loss(student.loss, log_probs, targets, teacher(features), step).mean())


def _hypergradient(student: SyntheticStudent, teacher: Teacher, net: Any) -> list[Tensor]:
    net.eval()
    return list(torch.autograd.grad(student.measure(net), list(teacher.parameters())))


def higher_(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """``higher``: innerloop_ctx and its differentiable optimiser, the graph of the whole life."""
    import higher

    module = student.module.train()
    optimiser = _torch_optimiser(student.task.optimiser, module)

    def run() -> list[Tensor]:
        student.reset(SEED)
        with _math_attention(), higher.innerloop_ctx(module, optimiser) as (net, inner):
            net.train()
            _taught_steps(student, teacher, net, inner.step)
            return _hypergradient(student, teacher, net)

    return Prepared(run)


def torchopt_(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """TorchOpt: MetaSGD or MetaAdam, the graph of the whole life."""
    import torchopt

    spec = student.task.optimiser

    def run() -> list[Tensor]:
        student.reset(SEED)
        net = copy.deepcopy(student.module).train()
        if spec.name == "momentum":
            inner = torchopt.MetaSGD(net, spec.lr, spec.momentum, moment_requires_grad=False)
        else:
            inner = torchopt.MetaAdam(
                net, spec.lr, (spec.beta1, spec.beta2), spec.eps, eps_root=_UNDER_ROOT,
                moment_requires_grad=False,
            )

        def update(loss: Tensor) -> None:
            inner.step(loss)
            for part in net.modules():
                if isinstance(part, nn.RNNBase):  # keeps a second list, of the old weights
                    part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]

        with _math_attention():
            _taught_steps(student, teacher, net, update)
            return _hypergradient(student, teacher, net)

    return Prepared(run)


class _Functional:
    """A module called with changing parameters, by torch.func.functional_call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = {k: p.detach().requires_grad_() for k, p in module.named_parameters()}
        self.buffers = dict(module.named_buffers())
        self.eval = module.eval

    def __call__(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.module, (self.parameters, self.buffers), (x,))


def _momentum_update(net: _Functional, spec: OptimiserSpec) -> Callable[[list[Tensor]], None]:
    velocity: list[Tensor] = []

    def update(gradients: list[Tensor]) -> None:
        old = velocity or [torch.zeros_like(g) for g in gradients]
        velocity[:] = [spec.momentum * v + g for v, g in zip(old, gradients, strict=True)]
        for (name, p), v in zip(list(net.parameters.items()), velocity, strict=True):
            net.parameters[name] = p - spec.lr * v

    return update


def _adam_update(
    net: _Functional, spec: OptimiserSpec, eps_form: str
) -> Callable[[list[Tensor]], None]:
    first: list[Tensor] = [torch.zeros_like(p) for p in net.parameters.values()]
    second = list(first)
    count = [0]

    def update(gradients: list[Tensor]) -> None:
        count[0] += 1
        rate = spec.lr / (1.0 - spec.beta1 ** count[0])
        correction = math.sqrt(1.0 - spec.beta2 ** count[0])
        for i, (name, g) in enumerate(zip(list(net.parameters), gradients, strict=True)):
            first[i] = spec.beta1 * first[i] + (1.0 - spec.beta1) * g
            second[i] = spec.beta2 * second[i] + (1.0 - spec.beta2) * g * g
            root = (second[i] + _UNDER_ROOT).sqrt()
            below = (
                (root + spec.eps) / correction if eps_form == "higher"
                else root / correction + spec.eps
            )
            net.parameters[name] = net.parameters[name] - rate * first[i] / below

    return update


def torch_func(student: SyntheticStudent, teacher: Teacher) -> Prepared:
    """torch.func.functional_call and a hand-written update, the graph of the whole life."""
    module, spec = student.module.train(), student.task.optimiser

    def run() -> list[Tensor]:
        student.reset(SEED)
        net = _Functional(module.train())
        step = (
            _momentum_update(net, spec) if spec.name == "momentum"
            else _adam_update(net, spec, student.eps_form)
        )

        def update(loss: Tensor) -> None:
            parameters = list(net.parameters.values())
            step(list(torch.autograd.grad(loss, parameters, create_graph=True)))

        with _math_attention():
            _taught_steps(student, teacher, net, update)
            return _hypergradient(student, teacher, net)

    return Prepared(run)


METHODS: dict[str, Method] = {
    "plain": plain,
    "l2t kept": l2t_kept,
    "l2t recomputed": l2t_recomputed,
    "l2t differences": l2t_differences,
    "l2t one-sided": l2t_one_sided,
    "l2t one-sided recomputed": l2t_one_sided_recomputed,
    "higher": higher_,
    "torchopt": torchopt_,
    "torch.func": torch_func,
}
