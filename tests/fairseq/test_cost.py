"""What makes the taught loss as fast as label smoothing, counted; and the benchmark that times it.

No test can hold the words per second of a machine at work. They rest on how often an update walks
over the output layer's [N, K] numbers, and on how many such tensors it makes and keeps.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkout import ROOT  # type: ignore[import-not-found]
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("fairseq")

MODEL = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 --decoder-embed-dim 8"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return the benchmark's module."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    try:
        import fairseq_cost
    finally:
        logging.disable(logging.NOTSET)
    yield fairseq_cost


def settings(form: str, flags: str = "") -> argparse.Namespace:
    return argparse.Namespace(
        form=form, rank=1, steps=2, tokens=60, arch="transformer_iwslt_de_en",
        model_flags=f"{MODEL} {flags}", threads=torch.get_num_threads(),
    )  # fmt: skip


def test_both_criteria_see_the_same_batches(tmp_path: Path, benchmark: Any) -> None:
    args = settings("lowrank")
    criteria = benchmark.write_folder(tmp_path, 50, args)
    sides = [benchmark.Side(tmp_path, flags, args) for flags in criteria.values()]
    smoothed, taught = (type(side.trainer.get_criterion()).__name__ for side in sides)
    assert (smoothed, taught) == ("LabelSmoothedCrossEntropyCriterion", "L2TDynamicCriterion")
    for one, other in zip(sides[0].batches, sides[1].batches, strict=True):
        assert torch.equal(one["target"], other["target"])
        assert torch.equal(one["net_input"]["src_tokens"], other["net_input"]["src_tokens"])
    assert sides[0].words == sides[1].words == sum(b["ntokens"] for b in sides[0].batches)
    assert all(side.round() > 0 for side in sides)
    assert [side.trainer.get_num_updates() for side in sides] == [2, 2]


class LargePasses(TorchDispatchMode):
    """Notes the operations that walk over ``size`` numbers or more, and how many tensors of that
    size they make.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aliases = [found.alias_info for found in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view
        if self._large(out) + self._large((args, kwargs)):
            self.names.append(func.overloadpacket.__name__)
            if not any(aliases):  # what works in place makes nothing
                self.made += self._large(out)
        return out

    def _large(self, values: Any) -> int:
        return sum(isinstance(x, Tensor) and x.numel() >= self.size for x in tree_leaves(values))


def cost(side: Any) -> tuple[LargePasses, int]:
    """Return the large passes of an update, and the bytes that it keeps for its gradient."""
    batch, classes = side.batches[0], len(side.task.target_dictionary)
    side.trainer.train_step([batch])  # what is made once is made
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        LargePasses(batch["target"].numel() * classes) as passes,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        side.trainer.train_step([batch])
    return passes, sum(kept.values())


@pytest.mark.parametrize("form", ["diagonal", "lowrank", "shared", "banded"])
def test_an_update_makes_and_keeps_no_more_than_under_label_smoothing(
    tmp_path: Path, benchmark: Any, form: str
) -> None:
    args = settings(form)
    criteria = benchmark.write_folder(tmp_path, 3000, args)
    (smoothed, kept), (taught, taught_kept) = (
        cost(benchmark.Side(tmp_path, flags, args)) for flags in criteria.values()
    )
    assert smoothed.names.count("_log_softmax") == taught.names.count("_log_softmax") == 1
    # Label smoothing makes a gradient each for the target's log p and for the mean, and their
    # sum. The taught one is written once.
    assert taught.made < smoothed.made
    assert taught_kept <= 1.02 * kept
    # Accuracy costs one pass, by the maximum: an argmax takes five times as long.
    assert taught.names.count("amax") == 1 and "argmax" not in taught.names
