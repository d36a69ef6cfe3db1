"""The cost benchmark measures what it says: both criteria on the same batches."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import torch
from checkout import ROOT  # type: ignore[import-not-found]

pytest.importorskip("fairseq")


def test_both_criteria_see_the_same_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/benchmarks"))
    try:
        import fairseq_cost
    finally:
        logging.disable(logging.NOTSET)
    model = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 --decoder-embed-dim 8"
    args = argparse.Namespace(
        form="lowrank", rank=1, steps=2, tokens=60, arch="transformer_iwslt_de_en",
        model_flags=model, threads=torch.get_num_threads(),
    )  # fmt: skip
    criteria = fairseq_cost.write_folder(tmp_path, 50, args)
    sides = [fairseq_cost.Side(tmp_path, flags, args) for flags in criteria.values()]
    smoothed, taught = (type(side.trainer.get_criterion()).__name__ for side in sides)
    assert (smoothed, taught) == ("LabelSmoothedCrossEntropyCriterion", "L2TDynamicCriterion")
    for one, other in zip(sides[0].batches, sides[1].batches, strict=True):
        assert torch.equal(one["target"], other["target"])
        assert torch.equal(one["net_input"]["src_tokens"], other["net_input"]["src_tokens"])
    assert sides[0].words == sides[1].words == sum(b["ntokens"] for b in sides[0].batches)
    assert all(side.round() > 0 for side in sides)
    assert [side.trainer.get_num_updates() for side in sides] == [2, 2]
