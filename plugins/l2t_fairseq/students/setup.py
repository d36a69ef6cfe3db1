"""fairseq's own model, batches, schedule and optimiser, out of the flags that people write."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from fairseq import optim, options, tasks, utils
from fairseq.data import iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim import lr_scheduler
from torch import nn

from l2t_core.errors import UserError, suggestion
from l2t_core.specs import OptimiserSpec
from l2t_core.students.optimisers import Optimiser, build_optimiser
from l2t_fairseq import register
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.commands.taught import refuse_unteachable
from l2t_fairseq.commands.train import FairseqCommand, value_of
from l2t_fairseq.compat import newer_settings, quiet_fairseq
from l2t_fairseq.predictions import refuse_other_model
from l2t_fairseq.scoring import refuse_several_pairs
from l2t_fairseq.students.start import fill, starting_parameters

# What a command may do that is taught, and a student whose life is differentiated may not.
_REFUSED = {
    "checkpoint_activations": "--checkpoint-activations recomputes outside the second derivative",
    "fp16": "--fp16 is for the application; the hypergradient is in float32",
    "restore_file": "--restore-file goes on with a run, and the teacher's students begin one: "
    "--finetune-from-model starts from a checkpoint's parameters",
    "sentence_avg": "--sentence-avg scales the loss by sentences; teachers work per token",
}

_NOT_GIVEN = {"restore_file": "checkpoint_last.pt"}  # fairseq's default where it is not false


def parse_flags(data_bin: Path, flags: str) -> Any:
    """Return fairseq's configuration for ``fairseq-train data_bin flags``.

    Raises:
        UserError: in one line, where fairseq's own parser refuses the flags or the student they
            describe cannot be taught.
    """
    register()
    arguments = [str(data_bin), *split_flags(flags, "nmt.train")]
    try:  # before fairseq looks for another task's data
        command = FairseqCommand({}, ["fairseq-train"], arguments)
        refuse_unteachable(command, _own_tasks(command))
    except UserError as error:
        raise UserError(f"nmt.train: {error}") from None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser = options.get_training_parser(default_task="translation")
            namespace = options.parse_args_and_arch(parser, input_args=arguments)
            config = convert_namespace_to_omegaconf(namespace)
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        reason = _shortened(lines[-1].split("error:", 1)[-1].strip()) if lines else "refused"
        raise UserError(
            f"nmt.train: fairseq does not accept the flags ({reason}); mend the recipe"
        ) from None
    except Exception as error:  # fairseq and omegaconf raise all kinds on a user's mistake
        if isinstance(error, RuntimeError) and not str(error):  # fairseq has no word for this one
            raise UserError("nmt.train: give --arch, such as --arch transformer") from error
        raise UserError(
            f"nmt.train: fairseq does not accept the flags ({_one_line(error)}); mend the recipe"
        ) from error
    _refuse(namespace, config)
    return config


def _own_tasks(command: FairseqCommand) -> list[str]:
    """Import the command's own ``--user-dir``; return the tasks that build on ours."""
    from l2t_fairseq.task import registered_tasks

    folder = value_of(command, "--user-dir")
    try:
        utils.import_user_module(argparse.Namespace(user_dir=folder))
    except Exception as error:  # it is the user's own code
        raise UserError(
            f"--user-dir {folder} cannot be imported by fairseq ({_one_line(error)}); mend it"
        ) from error
    return registered_tasks()


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _shortened(reason: str) -> str:
    """Return argparse's reason with a long list of choices as the nearest ones."""
    found = re.match(r"(.*invalid choice: '([^']*)') \(choose from (.*)\)$", reason)
    if not found:
        return reason
    return found.group(1) + suggestion(found.group(2), re.findall(r"[\w.]+", found.group(3)))


def _refuse(namespace: Any, config: Any) -> None:
    for key, reason in _REFUSED.items():
        if getattr(namespace, key, None) not in (None, False, _NOT_GIVEN.get(key)):
            raise UserError(f"nmt.train: {reason}; leave it out in teacher training")
    if getattr(namespace, "quant_noise_pq", 0) or getattr(namespace, "quant_noise_scalar", 0):
        raise UserError("nmt.train: --quant-noise-* cannot be differentiated twice; leave it out")
    if config.dataset.max_tokens is None and config.dataset.batch_size is None:
        raise UserError("nmt.train: give --max-tokens or --batch-size")
    if config.optimizer is None:
        raise UserError("nmt.train: give --optimizer, such as --optimizer adam")


def refuse_empty_split(
    data_bin: Path, split: str, name: str = "the dev set", flag: str = "a --validpref"
) -> None:
    """Refuse a split without sentences; fairseq would die on it without saying so.

    Raises:
        UserError: if a binary file of the split is empty.
    """
    for path in sorted(data_bin.glob(f"{split}.*.bin")):
        if path.stat().st_size == 0:
            raise UserError(
                f"{name} is empty ({path}), and the teacher learns from it; run "
                f"fairseq-preprocess with {flag} that has sentences"
            )


class FairseqSetup:
    """fairseq's task, configuration and data for one recipe.

    Raises:
        UserError: if the data cannot be loaded or the model cannot be built.
    """

    def __init__(self, data_bin: Path, flags: str) -> None:
        self.config = parse_flags(data_bin, flags)
        self._start = starting_parameters(self.starts_from)
        refuse_empty_split(data_bin, self.valid_subset)
        self._data_bin = data_bin
        task = self.config.task
        if not (task.source_lang and task.target_lang):
            refuse_several_pairs(data_bin, self.valid_subset)  # of which fairseq would take any
        with self._loading():
            self.task = tasks.setup_task(self.config.task)
            # With its further parts (train1, ...), as fairseq-train does.
            self.task.load_dataset(self.train_subset, combine=True)
            self.task.load_dataset(self.valid_subset)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            with quiet_fairseq():
                yield
        except (OSError, FileNotFoundError, AssertionError, ValueError) as error:
            raise UserError(
                f"fairseq cannot load the data in {self._data_bin}: {error}"
            ) from error

    def dataset(self, split: str) -> Any:
        """Return fairseq's dataset of ``split``.

        Raises:
            UserError: if there is none, or it is empty.
        """
        if split not in self.task.datasets:
            found = sorted({path.name.split(".")[0] for path in self._data_bin.glob("*.idx")})
            if split not in found:
                raise UserError(
                    f"there is no split {split!r} in {self._data_bin}; use one of "
                    f"{', '.join(found)} or run fairseq-preprocess with a further --validpref"
                )
            refuse_empty_split(self._data_bin, split, f"the split {split!r}", "text for it")
            with self._loading():
                self.task.load_dataset(split)
        return self.task.dataset(split)

    @property
    def train_subset(self) -> str:
        """The split that students learn from."""
        return str(self.config.dataset.train_subset)

    @property
    def starts_from(self) -> str | None:
        """The checkpoint that the student is fine-tuned from, if it is."""
        return self.config.checkpoint.finetune_from_model or None

    @property
    def valid_subset(self) -> str:
        """The first validation subset, the dev set."""
        return str(self.config.dataset.valid_subset).split(",")[0]

    def build_model(self, seed: int) -> nn.Module:
        """Return the model as ``fairseq-train --seed seed`` begins with it.

        Raises:
            UserError: if fairseq refuses the model's settings, or it cannot be taught.
        """
        with quiet_fairseq():
            utils.set_torch_seed(seed)
            try:
                model = self.task.build_model(copy.deepcopy(self.config.model))
                refuse_other_model(model)
            except UserError as error:
                raise UserError(f"nmt.train: {error}") from None
            except Exception as error:  # fairseq's models raise all kinds on a user's mistake
                reason = _one_line(error)
                raise UserError(f"nmt.train: fairseq cannot build the model: {reason}") from error
        return model if self._start is None else fill(model, self._start, self.config.model)

    def updates(self, model: Any, seed: int) -> Iterator[tuple[list[Any], bool]]:
        """Yield each update's micro-batches, and whether it ends an epoch, for ever.

        The same batches in the same order as ``fairseq-train --seed seed`` on one process.
        """
        config = self.config
        self.task.dataset_to_epoch_iter.clear()
        epoch = 1
        while True:
            with quiet_fairseq():
                iterator = self._epoch(model, seed, epoch)
                batches = iterator.next_epoch_itr(
                    fix_batches_to_gpus=config.distributed_training.fix_batches_to_gpus,
                    shuffle=epoch > config.dataset.curriculum,
                )
            frequencies = config.optimization.update_freq
            updates = iterators.GroupedIterator(
                batches,
                frequencies[min(epoch, len(frequencies)) - 1],
                skip_remainder_batch=config.optimization.skip_remainder_batch,
            )
            if not len(updates):
                raise UserError(
                    f"nmt.train: an epoch has {len(batches)} batches, too few for one update; "
                    "lower --update-freq, or leave out --skip-remainder-batch"
                )
            # One at a time: collating a whole epoch may take longer than the student's life.
            for index, group in enumerate(updates):
                yield group, index == len(updates) - 1
            epoch += 1

    def _epoch(self, model: Any, seed: int, epoch: int) -> Any:
        data, config = self.config.dataset, self.config
        newer = newer_settings(data, "grouped_shuffling", "update_epoch_batch_itr")
        by_epoch = any(newer_settings(data, "update_ordered_indices_seed").values())
        return self._batches(
            dataset=self.task.dataset(self.train_subset),
            max_tokens=data.max_tokens,
            max_sentences=data.batch_size,
            max_positions=self.longest(model, data.max_tokens),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=data.required_batch_size_multiple,
            seed=seed + epoch if by_epoch else seed,
            num_workers=0,
            epoch=epoch,
            data_buffer_size=0,
            skip_remainder_batch=config.optimization.skip_remainder_batch,
            **newer,
        )

    def longest(self, model: Any, *limits: Any) -> Any:
        """Return fairseq's greatest lengths for task and ``model``, and for ``limits`` if given."""
        return utils.resolve_max_positions(
            self.task.max_positions(), model.max_positions(), *limits
        )

    def _batches(self, **settings: Any) -> Any:
        try:
            return self.task.get_batch_iterator(**settings)
        except Exception as error:  # a sentence too long for the model is a bare Exception there
            raise UserError(
                f"nmt.train: fairseq cannot make batches ({_one_line(error)})"
            ) from error

    def valid_batches(self, model: Any) -> list[Any]:
        """Return the dev set in fairseq's own validation batches.

        Raises:
            UserError: if none is full: fairseq-fixed drops what is beyond the last multiple.
        """
        data = self.config.dataset
        with quiet_fairseq():
            iterator = self._batches(
                dataset=self.task.dataset(self.valid_subset),
                max_tokens=data.max_tokens_valid,
                max_sentences=data.batch_size_valid,
                max_positions=self.longest(model),
                ignore_invalid_inputs=data.skip_invalid_size_inputs_valid_test,
                required_batch_size_multiple=data.required_batch_size_multiple,
                seed=1,
                num_workers=0,
                data_buffer_size=0,
            )
            batches = list(iterator.next_epoch_itr(shuffle=False, set_dataset_epoch=False))
        if not batches:
            raise UserError(
                f"the dev set has {len(self.task.dataset(self.valid_subset))} sentences, and "
                f"fairseq leaves out what does not fill {data.required_batch_size_multiple}; give "
                "a larger one, or add --required-batch-size-multiple 1 to nmt.train"
            )
        return batches

    def learning_rates(self) -> RateSchedule:
        """Return fairseq's schedule, to be driven from update to update."""
        return RateSchedule(self.config)

    def optimiser(self) -> Optimiser:
        """Return the functional twin of fairseq's optimiser.

        Raises:
            UserError: if there is none.
        """
        config = self.config
        name = str(config.optimizer._name)
        wanted = _dummy_optimizer(config).optimizer_config
        common = {
            "lr": float(wanted["lr"]),
            "weight_decay": float(wanted.get("weight_decay", 0.0)),
            "clip_norm": float(config.optimization.clip_norm),
        }
        if name == "adam":
            betas = [float(b) for b in wanted["betas"]]
            spec = OptimiserSpec(
                "adam", beta1=betas[0], beta2=betas[1], eps=float(wanted["eps"]), **common
            )
            return build_optimiser(spec, eps_form="fairseq")
        if name == "sgd":
            momentum = float(wanted.get("momentum", 0.0))
            kind = "momentum" if momentum else "sgd"
            return build_optimiser(OptimiserSpec(kind, momentum=momentum, **common))
        raise UserError(
            f"nmt.train: --optimizer {name} has no differentiable twin; use adam or sgd"
        )


class RateSchedule:
    """fairseq's learning-rate scheduler, driven over an optimiser of one dummy parameter."""

    def __init__(self, config: Any) -> None:
        if config.lr_scheduler._name == "reduce_lr_on_plateau":
            raise UserError(
                "nmt.train: --lr-scheduler reduce_lr_on_plateau depends on validation; use "
                "inverse_sqrt, cosine, polynomial_decay, tri_stage or fixed"
            )
        self.optimizer = _dummy_optimizer(config)
        self.rates: list[float] = []
        self._epoch = 1
        try:
            self.scheduler = lr_scheduler.build_lr_scheduler(
                config.lr_scheduler, self.optimizer
            )
            self.scheduler.step_update(0)
            self._begin_epoch()
        except (ValueError, AssertionError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"nmt.train: fairseq refuses the settings of --lr-scheduler "
                f"{config.lr_scheduler._name} ({_one_line(error)})"
            ) from error

    def _begin_epoch(self) -> None:
        self.scheduler.step_begin_epoch(self._epoch)
        self.scheduler.step_update(len(self.rates))

    def next_update(self, ends_epoch: bool) -> float:
        """Return the rate of the next update and move on, as fairseq's trainer does."""
        rate = float(self.optimizer.get_lr())
        self.rates.append(rate)
        self.scheduler.step_update(len(self.rates))
        if ends_epoch:
            self.scheduler.step(self._epoch, None)
            self._epoch += 1
            self._begin_epoch()
        return rate


def _dummy_optimizer(config: Any) -> Any:
    return optim.build_optimizer(config.optimizer, [nn.Parameter(torch.zeros(1))])
