"""The updates of a teacher's student are those of fairseq-train: batches, order and rates."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_fairseq import TINY_MODEL

pytest.importorskip("fairseq")

import l2t_fairseq

l2t_fairseq.register()

from fairseq import options  # noqa: E402
from fairseq.dataclass.configs import DatasetConfig  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.tasks.translation import TranslationTask  # noqa: E402
from fairseq_cli.train import main  # noqa: E402

from l2t_fairseq.recipe import NmtSpec  # noqa: E402
from l2t_fairseq.students.nmt import build_student  # noqa: E402

STEPS = 14
# Each over more than two epochs.
RUNS = {
    "tokens and groups that change": "--max-tokens 60 --update-freq 2,1,3 --optimizer adam --lr "
    "0.01 --lr-scheduler inverse_sqrt --warmup-updates 4",
    "curriculum, in multiples": "--max-tokens 150 --required-batch-size-multiple 4 --curriculum 1 "
    "--optimizer sgd --lr 0.1 --lr-scheduler cosine --lr-period-updates 10",
    "rates by epoch, a remainder left out": "--batch-size 10 --update-freq 2 --optimizer sgd "
    "--skip-remainder-batch --lr 0.1,0.05 --lr-scheduler fixed --force-anneal 3 --lr-shrink 0.5",
    "an order by epoch": "--batch-size 9 --max-tokens 80 --update-ordered-indices-seed "
    "--optimizer adam --lr 0.01 --lr-scheduler polynomial_decay --total-num-update 12",
    "too long for a batch": "--max-tokens 12 --max-tokens-valid 200 --optimizer adam --lr 0.01 "
    "--required-batch-size-multiple 1 --lr-scheduler tri_stage --phase-ratio [0.2,0.3,0.5] "
    "--max-update 14",
}


@pytest.fixture(autouse=True)
def _clean_metrics() -> Iterator[None]:
    yield
    metrics.reset()


def trained(data: Path, folder: Path, flags: list[str], monkeypatch: Any) -> list[Any]:
    """Return each update's sentences and rate in a run of fairseq-train."""
    updates: list[Any] = []
    own = TranslationTask.train_step

    def watched(self, sample, model, criterion, optimizer, update_num, *rest, **named) -> Any:
        if len(updates) == update_num:
            updates.append(([], optimizer.get_lr()))
        updates[update_num][0].append(sample["id"].tolist())
        return own(self, sample, model, criterion, optimizer, update_num, *rest, **named)

    arguments = [str(data), *flags, "--cpu", "--seed", "3", "--max-update", str(STEPS), "--no-save",
                 "--disable-validation", "--num-workers", "0"]  # fmt: skip
    parsed = options.parse_args_and_arch(options.get_training_parser(), arguments)
    with monkeypatch.context() as patch:
        patch.setattr(TranslationTask, "train_step", watched)
        main(convert_namespace_to_omegaconf(parsed))
    return updates


@pytest.mark.parametrize("name", RUNS)
def test_batches_and_rates_are_those_of_fairseq_train(
    prepared_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if "indices-seed" in RUNS[name] and not hasattr(DatasetConfig, "update_ordered_indices_seed"):
        pytest.skip("this fairseq has no such flag")
    flags = [*TINY_MODEL, *shlex.split(RUNS[name])]
    updates = trained(prepared_toy / "data-bin", tmp_path, flags, monkeypatch)
    student = build_student(NmtSpec(data=str(prepared_toy), train=shlex.join(flags), steps=STEPS))
    student.reset(3)
    ours = [
        ([part["id"].tolist() for part in student.batch(step)], student.learning_rate(step))
        for step in range(STEPS)
    ]
    assert len(updates) == STEPS
    assert [ids for ids, _ in ours] == [ids for ids, _ in updates]
    assert [rate for _, rate in ours] == pytest.approx([rate for _, rate in updates])
    rates = {rate for _, rate in updates}
    assert len(rates) > 2  # a constant one would tell nothing
