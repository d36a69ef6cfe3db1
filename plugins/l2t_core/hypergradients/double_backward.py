"""Differentiating twice, safely: kernels that have second derivatives, and a probe before a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.hypergradients import batch_norm, weight_norm

try:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def _math_attention() -> contextlib.AbstractContextManager[None]:
        return sdpa_kernel([SDPBackend.MATH])

except ImportError:  # torch below 2.3

    def _math_attention() -> contextlib.AbstractContextManager[None]:
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)


_CUDNN: Any = torch.backends.cudnn


@contextlib.contextmanager
def twice_differentiable(module: nn.Module) -> Iterator[None]:
    """Choose kernels with second derivatives: math attention, and no cuDNN for recurrent nets.

    Fused attention has no second derivative on any device; cuDNN's recurrent kernels neither.
    cuDNN stays on for modules without recurrence, where it is only faster. Batch norm gets the
    second derivative of :mod:`l2t_core.hypergradients.batch_norm`, weight norm that of
    :mod:`l2t_core.hypergradients.weight_norm`. cuDNN's convolutions add in a fixed order, so that a
    replayed step has the bits of the first one.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, _CUDNN, "deterministic", _CUDNN.deterministic)
        _CUDNN.deterministic = True
        stack.enter_context(_math_attention())
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            stack.enter_context(batch_norm.TwiceDifferentiable())
        if weight_norm.has_weight_norm(module):
            stack.enter_context(weight_norm.TwiceDifferentiable())
        if torch.backends.cudnn.is_available() and any(
            isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in module.modules()
        ):
            stack.enter_context(_CUDNN.flags(enabled=False, deterministic=True))
        yield


def refuse_untrue_gradients(module: nn.Module) -> None:
    """Refuse layers whose gradient is not the derivative of what they do, for torch says nothing.

    Raises:
        UserError: naming the layer.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            continue
        odd = "max_norm" if layer.max_norm is not None else "scale_grad_by_freq"
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            raise UserError(
                f"the student's {type(layer).__name__} {name!r} has {odd}, which torch leaves out "
                "of derivatives; train the teacher on a student without it, or with "
                "training.differentiation=antithetic-es"
            )


def probe(module: nn.Module, scalar_loss: Any) -> None:
    """Differentiate ``scalar_loss()`` twice with respect to ``module`` once, before a long run.

    Raises:
        UserError: naming the module that has no second derivative.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]] = []
    handles = [
        m.register_forward_hook(
            lambda m, inputs, output, name=name: calls.append((name, m, inputs, output))
        )
        for name, m in module.named_modules()
        if name
    ]
    try:
        with twice_differentiable(module):
            loss = scalar_loss()
            try:
                _differentiate_twice([loss], parameters)
            except RuntimeError as error:
                culprit = _culprit(calls) or type(module).__name__
                raise UserError(
                    f"the student's {culprit} cannot be differentiated twice "
                    f"({str(error).splitlines()[0][:120]}); train the teacher on a student "
                    "without it, or with training.hvp=finite-difference"
                ) from error
    finally:
        for handle in handles:
            handle.remove()


def _differentiate_twice(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    with _watched_for_cuts(outputs) as cuts:
        first = torch.autograd.grad(
            outputs,
            inputs,
            # Inside a model the incoming gradient depends on parameters too; so must these.
            [torch.ones_like(o).requires_grad_() for o in outputs],
            create_graph=True,
            retain_graph=True,
            allow_unused=True,
        )
    if cuts:
        raise RuntimeError("it contains a function whose gradient is a constant to autograd")
    live = [g for g in first if g is not None and g.requires_grad]
    _refuse_dead_ends(live)
    if live:
        torch.autograd.grad(
            live, inputs, [torch.ones_like(g) for g in live], retain_graph=True, allow_unused=True
        )


@contextlib.contextmanager
def _watched_for_cuts(outputs: Sequence[Tensor]) -> Iterator[list[str]]:
    """Yield a list that gets the functions on the way back from ``outputs`` that cut the graph.

    A gradient is linear in what comes in: one that does not depend on it was cut off from it, as
    by kernels of an extension that are no operations to autograd. It is looked for function by
    function, for beside a residual connection, or under a weight, the sum depends on it all the
    same.
    """
    cuts: list[str] = []

    def watch(node: Any) -> Any:
        def look(found: Sequence[Tensor | None], came: Sequence[Tensor | None]) -> None:
            depends = any(g is not None and g.requires_grad for g in came)
            lost = any(g is not None and not g.requires_grad and bool(g.any()) for g in found)
            if depends and lost:
                cuts.append(node.name())

        return node.register_hook(look)

    handles = [watch(node) for node in _graph([o.grad_fn for o in outputs])]
    try:
        yield cuts
    finally:
        for handle in handles:
            handle.remove()


def _graph(roots: Sequence[Any]) -> list[Any]:
    """Return the functions of the graph that leads to ``roots``."""
    queue, seen = list(roots), dict[Any, None]()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen[node] = None
        queue.extend(following for following, _ in node.next_functions)
    return list(seen)


def _refuse_dead_ends(gradients: list[Tensor]) -> None:
    """Raise RuntimeError where a once-differentiable function cut the graph of ``gradients``.

    Such a function leaves an error node without inputs; a second derivative that asks for named
    tensors never reaches it and is silently wrong.
    """
    for node in _graph([g.grad_fn for g in gradients]):
        if "Error" in node.name() or "NotImplemented" in node.name():
            raise RuntimeError("it contains a function that is marked as once differentiable")


def _culprit(calls: list[tuple[str, nn.Module, tuple[Any, ...], Any]]) -> str | None:
    """Return the innermost module whose own outputs cannot be differentiated twice."""
    # Forward hooks fire innermost first, so the first failure is the most precise name.
    for name, module, inputs, output in calls:
        outputs = [o for o in _tensors(output) if o.requires_grad]
        sources = [i for i in _tensors(inputs) if i.requires_grad]
        sources += [p for p in module.parameters() if p.requires_grad]
        if not outputs or not sources:
            continue
        try:
            _differentiate_twice(outputs, sources)
        except RuntimeError:
            return f"{type(module).__name__} {name!r}"
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for item in value for t in _tensors(item)]
    return []
