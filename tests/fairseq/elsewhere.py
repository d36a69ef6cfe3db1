"""A device that is not the CPU, on a machine that has no other.

Its tensors say that they are on ``meta``, hold their values in memory and compute on the CPU.
They refuse to be mixed with the CPU's where a GPU's would, so that a student that runs there has
everything in one place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ELSEWHERE = torch.device("meta")
_aten = torch.ops.aten
# What sees two devices with a GPU, too: copies, tables and the CPU's indices, lengths of sequences.
_MAY_MIX = {
    _aten.copy_, _aten._to_copy, _aten.index, _aten.index_put, _aten.index_put_,
    _aten._index_put_impl_, _aten._pack_padded_sequence, _aten._pack_padded_sequence_backward,
}  # fmt: skip


class Mixed(Exception):
    """Tensors of two devices met in one operation."""


class _There(Tensor):
    """A tensor that says it is on :data:`ELSEWHERE`; ``values`` are the CPU's."""

    @staticmethod
    def __new__(cls, values: Tensor) -> _There:
        return Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=ELSEWHERE,
        )  # fmt: skip

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.tolist:  # which refuses subclasses
            return args[0].values.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func == Tensor.data.__set__:
            args[0].values = args[1].values
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    kind = func.overloadpacket
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [isinstance(x, _There) for x in given]
    # A number of the CPU may go with tensors of a GPU.
    alike = all(is_away or x.ndim == 0 for x, is_away in zip(given, away, strict=True))
    if any(away) and not alike and kind not in _MAY_MIX:
        raise Mixed(f"{func} with tensors of two devices")
    there = any(away)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device) == ELSEWHERE
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = pytree.tree_map_only(_There, lambda x: x.values, (args, kwargs))
    result = func(*args, **kwargs)
    known = {id(x.values if isinstance(x, _There) else x): x for x in given}

    def out(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in known:  # changed in place
            assert known[id(x)].shape == x.shape
            return known[id(x)]
        return _There(x) if there else x

    if kind is _aten._shape_as_tensor:
        return result
    if kind is _aten._pack_padded_sequence:
        return out(result[0]), result[1]
    return pytree.tree_map(out, result)


class _Elsewhere(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """``torch.tensor`` fills its result where no dispatch is seen, and on ``meta`` not at all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) if func is torch.tensor else None
        result = func(*args, **kwargs)
        return result if device is None else result.to(device)


def _moved(module: nn.Module, device: torch.device) -> nn.Module:
    """Do what ``module.to`` does for a GPU: tied parameters stay tied."""
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for name, old in [*part._parameters.items(), *part._buffers.items()]:
            if old is None:
                continue
            if id(old) not in moved:
                new = old.detach().to(device)
                moved[id(old)] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
            setattr(part, name, moved[id(old)])
    return module


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Let tensors and modules be on :data:`ELSEWHERE`; raise :class:`Mixed` where devices meet."""
    before = nn.Module.to
    nn.Module.to = _moved  # type: ignore[assignment, method-assign]
    try:
        with _Elsewhere(), _FromNumbers():
            yield
    finally:
        nn.Module.to = before  # type: ignore[method-assign]
