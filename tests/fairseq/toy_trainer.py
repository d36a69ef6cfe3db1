"""fairseq's own trainer on the toy corpus, in the process of the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_fairseq import TINY_MODEL, TINY_RUN

pytest.importorskip("fairseq")

import l2t_fairseq

l2t_fairseq.register()

from fairseq import options, tasks  # noqa: E402
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # noqa: E402
from fairseq.logging import metrics  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402
from fairseq_cli.train import validate  # noqa: E402


class Bench:
    """fairseq's trainer with the criterion of ``flags``, and the batches of its first epoch."""

    def __init__(self, data: Path, save_dir: Path, *flags: str) -> None:
        metrics.reset()
        parser = options.get_training_parser()
        arguments = [str(data), *TINY_MODEL, *TINY_RUN, "--save-dir", str(save_dir), *flags]
        self.config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
        torch.manual_seed(1)
        self.task = tasks.setup_task(self.config.task)
        self.model = self.task.build_model(self.config.model)
        self.criterion: Any = self.task.build_criterion(self.config.criterion)
        for split in ("train", "valid", "test"):
            self.task.load_dataset(split)
        self.trainer = Trainer(self.config, self.task, self.model, self.criterion)
        self.iterator = self.trainer.get_train_iterator(1, load_dataset=False)
        self.batches = list(self.iterator.next_epoch_itr(shuffle=False))
        self.trainer.begin_epoch(1)

    def state(self) -> dict[str, Any]:
        """Return what ``l2t_dynamic`` keeps of its student."""
        state: dict[str, Any] = self.criterion.teacher_state()
        return state

    def validate(self, *subsets: str) -> None:
        """Validate on ``subsets`` as fairseq-train does."""
        validate(self.config, self.trainer, self.task, self.iterator, list(subsets))


def taught_bench(data: Path, teacher: Path, save_dir: Path, *flags: str) -> Bench:
    """Return a trainer under the teacher in the file ``teacher``."""
    criterion = ["--criterion", "l2t_dynamic", "--l2t-teacher", str(teacher)]
    return Bench(data, save_dir, *criterion, *flags)
