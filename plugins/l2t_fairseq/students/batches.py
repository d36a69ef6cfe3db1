"""fairseq's batches as a long run keeps them, and as several processes share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_NARROW = (torch.uint8, torch.int16, torch.int32)


def pack(batch: Any) -> Any:
    """Return ``batch`` with every long tensor in the narrowest type that holds its numbers.

    A run keeps all its batches, for fairseq's order within one depends on how it was collated:
    tokens then take two bytes instead of eight.
    """
    return pytree.tree_map(_narrowed, batch)


def unpack(batch: Any, device: torch.device | str = "cpu") -> Any:
    """Return what :func:`pack` was given, or a batch as it is, on ``device``."""

    def unpacked(x: Any) -> Any:
        if isinstance(x, _Packed):
            return x.tensor.to(device).long()  # the narrow one travels
        return x.to(device) if isinstance(x, Tensor) else x

    return pytree.tree_map(unpacked, batch)  # a _Packed is a leaf: torch does not know the class


class _Packed:
    """A tensor that was long."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _narrowed(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype != torch.int64 or not x.numel():
        return x
    least, most = int(x.min()), int(x.max())
    for dtype in _NARROW:
        limits = torch.iinfo(dtype)
        if limits.min <= least and most <= limits.max:
            return _Packed(x.to(dtype))
    return x


def shard(micro_batches: list[Any], padding: int, rank: int, world: int) -> tuple[list[Any], float]:
    """Return process ``rank``'s sentences of an update's micro-batches, and its share of tokens.

    A process without a sentence gets one that does not count.
    """
    mine, tokens, all_tokens = [], 0, 0
    for sample in micro_batches:
        count = len(sample["id"])
        all_tokens += int((sample["target"] != padding).sum())
        start, stop = count * rank // world, count * (rank + 1) // world
        if stop > start:
            mine.append(_rows(sample, start, stop))
            tokens += int((mine[-1]["target"] != padding).sum())
    return mine or [_rows(micro_batches[0], 0, 1)], tokens / all_tokens


def _rows(sample: Any, start: int, stop: int) -> Any:
    count = len(sample["id"])

    def cut(x: Any) -> Any:
        of_sentences = isinstance(x, Tensor) and x.ndim > 0 and len(x) == count
        return x[start:stop] if of_sentences else x

    return pytree.tree_map(cut, sample)
