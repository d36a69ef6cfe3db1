"""What a field plugs in: a student that can be trained, replayed and measured."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from l2t_core.students.optimisers import Optimiser
from l2t_core.students.state import DevStatistics


class Student(Protocol):
    """One task's student f_omega with its data, optimiser and measures.

    ``module.parameters()`` are omega (tied ones once). The engine turns them into views of one
    vector, so they may be filled in place but never replaced. A student may set ``fixed_shapes``
    to say that every batch is a tensor (or a nest of them) of one shape and that ``predict``
    depends, within a life, on nothing else but parameters, buffers and torch's random numbers; its
    derivatives are then recorded and replayed. Batches that are more than tensors of one number of
    rows need ``shard(batch, rank, world)``, which returns a process's part and its share of the
    examples, where processes share them. Three baselines ask for more: ``logit_adjusted`` for
    ``class_shares()``, the classes' shares of the training data [K], ``forward_corrected`` for
    ``label_confusion()``, the share of training examples of class k labelled j [K, K],
    ``gold_corrected`` for ``dev_confusion()``, :func:`l2t_core.students.state.mean_prediction` on
    dev.
    A student's ``precision`` is the arithmetic of its steps, float32 unless it says bfloat16 or
    float16. It may have ``notes()``, lines on what is odd about its data, which are shown, and a
    ``flat_remedy``, what to set where its M-tilde is flat.
    ``num_classes`` is K, ``total_steps`` T, ``measure_name`` names what :meth:`true_measure`
    returns.
    """

    module: nn.Module
    num_classes: int
    total_steps: int
    optimiser: Optimiser
    default_features: tuple[str, ...]
    measure_name: str

    def reset(self, seed: int) -> None:
        """Fill the module with the fresh parameters and buffers of ``seed``; start its data."""

    def batch(self, step: int) -> Any:
        """Return the batch of 0-based ``step``: the same one whenever asked."""

    def step_seed(self, step: int) -> int:
        """Return the random seed (dropout) of ``step``."""

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and targets [N] in training mode, padding removed."""

    def learning_rate(self, step: int) -> float:
        """Return eta_t of ``step``."""

    def dev_statistics(self, step: int) -> DevStatistics | None:
        """Return dev statistics if they are due once ``step`` is committed, else None."""

    def dev_interval(self) -> int:
        """Return the number of steps from one dev refresh to the next."""

    def smoothed_measure(self, seed: int) -> Tensor:
        """Return M-tilde on dev at the current parameters: a scalar to maximise."""

    def true_measure(self) -> float:
        """Return the measure that counts, on dev: higher is better, 1 is perfect."""

    def fingerprint(self) -> dict[str, str | int]:
        """Return what a teacher must fit: the classes' number or the dictionary's hash."""

    def content(self) -> dict[str, str]:
        """Return digests of what the recipe names without holding it: data, code, a start."""
