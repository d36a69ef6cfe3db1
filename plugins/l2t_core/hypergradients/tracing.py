"""Recording a function of tensors as a flat list of operations, and replaying it.

Recording happens below autograd: forward, backward and double backward become one list, from
which everything that does not reach a result is dropped. Replaying builds no graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from l2t_core.students.buffers import Buffers


class Untraceable(Exception):
    """The function decides by the values of tensors, or does what cannot be recorded."""


class TracedFunction:
    """``function`` recorded at ``inputs``; it must not depend on anything but them, the module's
    parameters and buffers, and torch's random numbers.

    ``trusted`` once replays at two different inputs gave the function's own bits.

    Raises:
        Untraceable: if it cannot be recorded.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        buffers: Buffers,
        seed: Callable[[], None],
    ) -> None:
        before = buffers.copy()
        seed()
        try:
            recorded = make_fx(function)(*inputs)
        except Exception as error:  # whatever a student does that cannot be recorded
            raise Untraceable(str(error)) from error
        finally:
            buffers.load(before)
        _drop_unused(recorded.graph)
        recorded.recompile()
        self._recorded: Callable[..., Any] = recorded
        self.sound = True
        self._checks = 0

    @property
    def trusted(self) -> bool:
        """Whether replays have been compared often enough."""
        return self.sound and self._checks >= 2

    def __call__(self, *inputs: Tensor) -> Any:
        """Replay at ``inputs``."""
        with torch.no_grad():
            return self._recorded(*inputs)

    def check(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        buffers: Buffers,
        seed: Callable[[], None],
    ) -> Any:
        """Return the function's own result; ``sound`` becomes false if a replay differs."""
        before = buffers.copy()
        seed()
        try:
            replayed = self(*inputs)
        except RuntimeError:  # oneDNN's LSTM keeps nothing for its backward when not recorded
            self.sound = False
            buffers.load(before)
            seed()
            return function(*inputs)
        after = buffers.copy()
        buffers.load(before)
        seed()
        expected = function(*inputs)
        self._checks += 1
        pairs = zip(
            [*pytree.tree_flatten(replayed)[0], *after],
            [*pytree.tree_flatten(expected)[0], *buffers.tensors()],
            strict=True,
        )
        self.sound = all(_same(a, b) for a, b in pairs)
        return expected


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:  # a buffer that has grown
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _drop_unused(graph: fx.Graph) -> None:
    """Erase what reaches no result, but nothing that writes or draws random numbers."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op not in ("call_function", "get_attr"):
            continue
        schema = getattr(node.target, "_schema", None)
        tags = getattr(node.target, "tags", ())
        writes = schema is not None and schema.is_mutable
        if not writes and torch.Tag.nondeterministic_seeded not in tags:
            graph.erase_node(node)
