"""A student as a pure sequence of steps on flat states, with its module as scratch space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from l2t_core.allocator import keep_freed_memory
from l2t_core.errors import UserError
from l2t_core.hypergradients.double_backward import twice_differentiable
from l2t_core.losses.steps import StepLoss
from l2t_core.runs.processes import ALONE, Processes
from l2t_core.students.buffers import Buffers
from l2t_core.students.flat import FlatParameters
from l2t_core.students.protocol import Student
from l2t_core.students.state import TrainStatistics, train_statistics

PRECISIONS = {
    "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # what a student's own arithmetic may be in; omega and all derivatives stay as they are
# Gradients of a mean loss over thousands of tokens are too small for float16. Times 1,024 a small
# Transformer's were off by 0.5 % instead of 1.9 %, and its H v by 0.9 instead of 29 %. The second
# number is for what is too large with the first.
LOSS_SCALES = (2.0**10, 1.0)


class Life:
    """Runs one student's training steps on flat states. Uses torch's global random numbers.

    The module's parameters are made views of the state that is :meth:`show`-n, so that a step
    reads and writes each state once.
    """

    def __init__(
        self, student: Student, precision: str = "float32", processes: Processes = ALONE
    ) -> None:
        keep_freed_memory()
        self.student = student
        self.processes = processes
        self.share = 1.0  # of the step's examples, this process's
        self.number = 0  # of lives begun
        if processes.world > 1:
            refuse_batch_norm(student.module)
        self.flat = FlatParameters(student.module)
        self.buffers = Buffers(student.module)
        self.shown = self.flat.vector
        self.cast = PRECISIONS[precision_of(student, precision)]
        self.half = self.cast is torch.float16
        self._gradient = self.flat.empty(1)[0]

    def begin(self, seed: int) -> Tensor:
        """Reset the student to ``seed`` and return its initial state [R, P].

        Raises:
            UserError: if that puts other parameters in the place of the module's.
        """
        self.show(self.flat.vector)
        self.student.reset(seed)
        self.flat.check(self.student.module)
        self.number += 1
        self.buffers = Buffers(self.student.module)  # a first step may have made more of them
        return self.student.optimiser.initial(self.flat.vector.clone())

    def show(self, vector: Tensor) -> None:
        """Make the module's parameters views of ``vector`` [P]."""
        self.flat.show(vector)
        self.shown = vector

    def batch(self, step: int) -> Any:
        """Return this process's part of the batch of ``step``, its ``share`` set beside."""
        batch = self.student.batch(step)
        if self.processes.world > 1:
            shard = getattr(self.student, "shard", shard_rows)
            batch, self.share = shard(batch, self.processes.rank, self.processes.world)
        return batch

    def over_processes(self, mean: Tensor) -> Tensor:
        """Make a mean over this process's examples one over the step's, in place."""
        if self.processes.world == 1:
            return mean
        return self.processes.add_up(mean.mul_(self.share))

    def gathered(self, gradients: list[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Return gradients, one per parameter, as one vector [P] over all processes.

        It is written to ``out`` [P], or to memory that the next call uses again.
        """
        into = self._gradient if out is None else out
        return self.over_processes(self.flat.gather(gradients, into))

    def seed(self, step: int) -> None:
        """Set the random numbers of ``step``, as torch.manual_seed does."""
        # Processes that share a batch draw their own masks.
        seed = (self.student.step_seed(step) + self.processes.rank * 7_368_787) % 2**63
        # Where there is no GPU, torch.manual_seed takes a stack trace in case one appears: half a
        # plain step of a small student.
        torch.default_generator.manual_seed(seed)
        if self.shown.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and targets [N] of a batch, in the parameters' dtype.

        Raises:
            UserError: if the CPU lacks the student's low precision for one of its layers.
        """
        if self.cast is None:
            return self.student.predict(batch)
        device = self.shown.device.type
        try:
            with torch.autocast(device, dtype=self.cast):
                log_probs, targets = self.student.predict(batch)
        except RuntimeError as error:
            if device != "cpu":
                raise
            name = str(self.cast).removeprefix("torch.")
            reason = str(error).splitlines()[0].split(". ")[0][:120]
            raise UserError(
                f"precision={name} does not work for this student on this CPU ({reason}); use "
                "float32, or bfloat16 where that works"
            ) from error
        return log_probs.to(self.shown.dtype), targets

    def outputs(self, step: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and targets of ``step``, with the step's random numbers."""
        batch = self.batch(step)  # first: making one may draw random numbers, asking again not
        self.seed(step)
        return self.predict(batch)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Return the loss's gradient, one tensor per parameter, None where unused."""
        if not self.half:
            return self._gradients_of(loss)
        for scale in LOSS_SCALES:
            found = over(self._gradients_of(loss * scale, retain_graph=True), scale)
            if all_finite(found):
                break
        return found

    def finite_everywhere(self, parts: Iterable[Tensor | None]) -> bool:
        """Tell whether ``parts`` are finite in all processes that share the batch.

        They have to go on alike: one that made a step once more would wait for the others.
        """
        lost = torch.tensor([0.0 if all_finite(parts) else 1.0], dtype=torch.float64)
        return float(self.processes.add_up(lost)) == 0.0

    def graph_of_gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Return the loss's gradient as :meth:`gradients`, unscaled, to be differentiated again."""
        return self._gradients_of(loss, create_graph=True)

    def _gradients_of(
        self, loss: Tensor, retain_graph: bool | None = None, create_graph: bool = False
    ) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(
                loss, self.flat.parameters, retain_graph=retain_graph, create_graph=create_graph,
                allow_unused=True,
            )
        )

    def step(
        self,
        state: Tensor,
        step: int,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        out: Tensor | None = None,
        gradient_out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Make one training step; ``loss_of`` maps (log-probs, targets) to losses [N].

        Returns the next state [R, P], written to ``out`` if given, and the log-probabilities
        [N, K] and targets [N] of this process's part of the batch. ``gradient_out`` [P] receives
        the step's gradient. The module must show ``state[0]``; it shows the new parameters
        afterwards.
        """
        with twice_differentiable(self.student.module):
            log_probs, targets = self.outputs(step)
            gradients = self.gradients(loss_of(log_probs, targets).mean())
        with torch.no_grad():
            gradient = self.gathered(gradients, gradient_out)
            rate = self.student.learning_rate(step)
            state = self.student.optimiser.update(state, gradient, step, rate, out)
        self.show(state[0])
        return state, log_probs, targets

    def statistics(self, log_probs: Tensor, targets: Tensor) -> TrainStatistics:
        """Return the statistics of the step that gave these, over all processes."""
        found = train_statistics(log_probs, targets)
        if self.processes.world == 1:
            return found
        parts = torch.tensor([found.nll, found.accuracy], dtype=torch.float64)
        return TrainStatistics(*self.over_processes(parts).tolist())


def precision_of(student: object, asked: str) -> str:
    """Return the name of the arithmetic: the one ``asked`` for, or the student's where it has one.

    ``student`` may be its section of a recipe; an unknown name there is left to who checks that.
    """
    own: str = getattr(student, "precision", "float32")
    return own if asked == "float32" and own in PRECISIONS else asked


def over(parts: Iterable[Tensor | None], power: float) -> list[Tensor | None]:
    """Return ``parts`` divided by a power of two, which costs no bits."""
    return [p if p is None or power == 1.0 else p / power for p in parts]


def all_finite(parts: Iterable[Tensor | None]) -> bool:
    """Tell whether no element of ``parts`` is infinite or NaN."""
    return all(bool(p.isfinite().all()) for p in parts if p is not None)


def shard_rows(batch: Any, rank: int, world: int) -> tuple[Any, float]:
    """Return the rows of every tensor in ``batch`` that are process ``rank``'s, and their share.

    Raises:
        UserError: if the batch is more than tensors of the same number of rows, at least one for
            each process.
    """
    leaves, layout = pytree.tree_flatten(batch)
    rows = {len(x) if isinstance(x, Tensor) and x.ndim else 0 for x in leaves}
    if len(rows) != 1 or min(rows) < world:
        raise UserError(
            f"training.parallel=data cannot share this student's batches among {world} processes; "
            "use larger batches, fewer processes or training.parallel=students"
        )
    count = rows.pop()
    start, stop = count * rank // world, count * (rank + 1) // world
    pieces = [x[start:stop] for x in leaves]
    return pytree.tree_unflatten(pieces, layout), (stop - start) / count


def refuse_batch_norm(module: nn.Module) -> None:
    """Refuse to share the batches of a module that normalises over them.

    Raises:
        UserError: naming the layer.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"training.parallel=data would give layer {name!r} (batch norm) the statistics of "
                "a part of the batch; use training.parallel=students"
            )


def taught_step(
    life: Life,
    applied: StepLoss,
    state: Tensor,
    step: int,
    out: Tensor | None = None,
    gradient_out: Tensor | None = None,
) -> tuple[Tensor, TrainStatistics]:
    """Make one step under a teacher or a fixed loss, s_t included; as :meth:`Life.step`.

    Returns the next state [R, P] and the step's statistics.
    """
    student = life.student
    applied.begin_step(student.learning_rate(step), step)
    state, log_probs, targets = life.step(state, step, applied.loss, out, gradient_out)
    statistics = life.statistics(log_probs, targets)
    del log_probs, targets  # of a large vocabulary they are large, and a pass over dev may follow
    applied.commit(statistics)
    buffers = life.buffers.copy()
    dev = student.dev_statistics(step)
    if dev is not None:
        # A look is no part of the training: a step made again, on the way back, has none before it.
        life.buffers.load(buffers)
        applied.observe_dev(dev)
    return state, statistics


def training_steps(
    life: Life,
    applied: StepLoss,
    state: Tensor,
    span: range,
    places: Callable[[int], tuple[Tensor | None, Tensor | None]],
) -> Iterator[tuple[int, Tensor, TrainStatistics]]:
    """Make the steps of ``span`` from ``state`` [R, P]; yield each with its result, once made.

    ``places(step)`` returns where the state after it and its gradient go, as in :meth:`Life.step`.

    Raises:
        FloatingPointError: if the student diverges. A step's loss tells whether the step before
            it went wrong; after the last one the parameters are looked at.
    """
    for step in span:
        state, statistics = taught_step(life, applied, state, step, *places(step))
        last = step == span[-1]
        if not math.isfinite(statistics.nll) or (last and not bool(state[0].isfinite().all())):
            raise FloatingPointError(f"the student diverged at step {step}")
        yield step, state, statistics
