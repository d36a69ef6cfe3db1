"""fairseq's task ``l2t_translation``: ``translation`` that tells ``l2t_dynamic`` where it is.

It feeds the criterion each update's number and learning rate, and carries the student's state s_t
and the count for ``--patience`` through checkpoints, so that a resumed run is the run that was
interrupted, to the bit. With any other criterion it is ``translation``, whose resumed runs it makes
exact, too.
"""

# No `from __future__ import annotations`: fairseq reads the types of its configurations.

from dataclasses import dataclass
from typing import Any

from fairseq.tasks import TASK_REGISTRY, register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from l2t_fairseq import patience
from l2t_fairseq.criterion import L2TDynamicCriterion

# The key of s_t in the train iterator's state: of all that fairseq saves, what every version
# restores in mid-epoch.
STATE = "l2t"
PATIENCE = "l2t_patience"  # the key of fairseq's count for --patience, likewise


@dataclass
class L2TTranslationConfig(TranslationConfig):
    """The settings of ``translation``."""


@register_task("l2t_translation", dataclass=L2TTranslationConfig)
class L2TTranslationTask(TranslationTask):
    """Translation with a teacher following the student."""

    _criterion: Any = None

    def build_criterion(self, cfg: Any, **kwargs: Any) -> Any:
        """Build the criterion and keep it, unwrapped: fairseq may wrap what it calls."""
        # Versions after 0.12.2 say that a configuration comes from a checkpoint.
        criterion = super().build_criterion(cfg, **kwargs)
        if isinstance(criterion, L2TDynamicCriterion):
            self._criterion = criterion
            criterion.fed_by_task = True
        return criterion

    def get_batch_iterator(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the iterator; the training set's carries s_t and makes the first run's batches."""
        if dataset is not self.datasets.get(self.cfg.train_subset):
            return super().get_batch_iterator(dataset, *args, **kwargs)
        if self._makes_batches_once(dataset, kwargs):
            # fairseq makes batches in an order that depends on the epoch and keeps them for the
            # epochs to come. A resumed run has to make those of epoch 1, where the first run
            # began, or it goes on with other batches.
            iterator = super().get_batch_iterator(dataset, *args, **{**kwargs, "epoch": 1})
            iterator.epoch = kwargs["epoch"]
            dataset.set_epoch(iterator.epoch)
        else:
            iterator = super().get_batch_iterator(dataset, *args, **kwargs)
        carry_state(iterator, self._criterion)
        return iterator

    def _makes_batches_once(self, dataset: Any, kwargs: dict[str, Any]) -> bool:
        """Tell whether fairseq will now, later than in epoch 1, make the batches of all epochs."""
        return (
            kwargs.get("epoch", 1) > 1
            and not kwargs.get("disable_iterator_cache", False)
            and not kwargs.get("update_epoch_batch_itr", False)
            and self.can_reuse_epoch_itr(dataset)
            and dataset not in self.dataset_to_epoch_iter
        )

    def train_step(
        self,
        sample: Any,
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Announce the update to the criterion, then do what ``translation`` does."""
        if self._criterion is not None:
            self._criterion.begin_update(update_num, optimizer.get_lr())
        return super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad, **kwargs
        )


def registered_tasks() -> list[str]:
    """Return the names of the tasks that build on :class:`L2TTranslationTask`, itself included."""
    return sorted(n for n, kind in TASK_REGISTRY.items() if issubclass(kind, L2TTranslationTask))


def carry_state(iterator: Any, criterion: L2TDynamicCriterion | None) -> None:
    """Make ``iterator`` save and load, with its own position, s_t and the count for --patience.

    fairseq reuses an iterator from epoch to epoch; one that carries already is left alone.
    """
    if getattr(iterator, "l2t_carries", iterator) is criterion:
        return
    own_state, own_load = iterator.state_dict, iterator.load_state_dict

    def state_dict() -> Any:
        carried = {} if criterion is None else {STATE: criterion.teacher_state()}
        if count := patience.waited():
            carried[PATIENCE] = count
        return {**own_state(), **carried}

    def load_state_dict(state: Any) -> None:
        own_load(state)
        if criterion is not None and STATE in state:  # not in another criterion's or task's
            criterion.load_teacher_state(state[STATE])
        if PATIENCE in state:
            patience.go_on_waiting(state[PATIENCE])

    iterator.state_dict = state_dict
    iterator.load_state_dict = load_state_dict
    iterator.l2t_carries = criterion
