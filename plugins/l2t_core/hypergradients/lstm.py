"""LSTMs with a first and a second derivative of their own.

torch's fused LSTM kernels have no second derivative, and what it has instead takes each step of a
sequence by dozens of small operations. Here a layer is a few sweeps over its steps, each of one
matrix product and some elementwise operations a step: the values, going forward; the derivative,
going back; and, when that is differentiated, one that goes forward again and one more back. All
that has no recurrence is done for all steps at once. No product of matrices is left that the
derivatives could do without.

Rows are sorted as in a PackedSequence: those of step 0, of step 1, and so on. N is their number,
B that of sequences, H the layer's width. Tensors of states [B + N, H] begin with the initial ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_lstm: Any = torch.lstm  # what torch.nn.LSTM calls


class _Steps:
    """Where the rows of each step are: ``sizes`` sequences a step, never more than before."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.count = list(sizes), sizes[0]
        starts, lengths = [0], list[int]()
        for step, (size, following) in enumerate(zip(sizes, [*sizes[1:], 0], strict=True)):
            starts.append(starts[-1] + size)
            lengths[:0] = [step + 1] * (size - following)  # longer sequences come first
        # The places of each sequence's last state [B] among [B + N].
        last = [self.count + starts[n - 1] + row for row, n in enumerate(lengths)]
        self.last = torch.tensor(last, device=device)
        # The rows [N], with each sequence in reverse. It has the same sizes.
        back = [
            starts[lengths[row] - 1 - step] + row
            for step, size in enumerate(sizes) for row in range(size)
        ]
        self.back = torch.tensor(back, device=device)
        self._before: Tensor | None = None
        if sizes[0] != sizes[-1]:
            places = torch.arange(self.count + starts[-1], device=device)
            self._before = torch.cat(self.states(places)[0])

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each step of x [N, ...]."""
        return x.split(self.sizes)

    def states(self, x: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return the states before and those after each step, of x [B + N, ...]."""
        initial, *after = x.split([self.count, *self.sizes])
        before = [s[:n] for s, n in zip([initial, *after[:-1]], self.sizes, strict=True)]
        return before, tuple(after)

    def before(self, x: Tensor) -> Tensor:
        """Return the states [N, ...] before the steps, of x [B + N, ...]."""
        return x[: -self.count] if self._before is None else x.index_select(0, self._before)

    def add_before(self, x: Tensor, y: Tensor) -> None:
        """Add y [N, ...] to the states before the steps, in x [B + N, ...]."""
        if self._before is None:
            x[: -self.count].add_(y)
        else:
            x.index_add_(0, self._before, y)


def _parts(cells: Tensor, gates: Tensor, steps: _Steps) -> tuple[Tensor, Tensor]:
    """Return what d c (for the output gate, d h) is multiplied by for each gate's derivative, and
    each gate's by its sum, both [N, 4, H].
    """
    i, _, g, _ = gates.unbind(1)
    own = gates * (1.0 - gates)
    own[:, 2] = 1.0 - g * g
    return torch.stack([g, steps.before(cells), i, cells[steps.count :].tanh()], 1), own


class _Layer(torch.autograd.Function):
    """(inputs' part of the gates' sums [N, 4 H], weight [4 H, H], h0 and c0 [B, H]) -> all values.

    Those are h and c [B + N, H] and the gates [N, 4, H]: input, forget, cell and output gate. All
    are results, so that the second derivative may come back to them, where one sweep takes it on.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, sums: Tensor, weight: Tensor, h0: Tensor, c0: Tensor, steps: _Steps
    ) -> tuple[Tensor, Tensor, Tensor]:
        gates = sums.clone(memory_format=torch.contiguous_format).unflatten(1, (4, -1))
        hidden, cells = (torch.cat([s, s.new_empty(len(sums), s.shape[1])]) for s in (h0, c0))
        across = weight.t()
        for now, h, h_next, c, c_next in zip(
            steps.rows(gates), *steps.states(hidden), *steps.states(cells), strict=True
        ):
            now.flatten(1).addmm_(h, across)
            i, f, g, o = now.unbind(1)
            now[:, :2].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, c, out=c_next).addcmul_(i, g)
            torch.tanh(c_next, out=h_next).mul_(o)
        ctx.save_for_backward(weight, hidden, cells, gates)
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        return hidden, cells, gates

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_hidden: Tensor | None, d_cells: Tensor | None, d_gates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight, hidden, cells, gates = ctx.saved_tensors
        d_sums, d_h0, d_c0 = _Derivative.apply(
            d_hidden, d_cells, d_gates, weight, cells, gates, ctx.steps
        )
        # An operation of its own: a recorded derivative does without its value.
        d_weight = d_sums.t() @ ctx.steps.before(hidden) if ctx.needs_input_grad[1] else None
        return d_sums, d_weight, d_h0, d_c0, None


class _Derivative(torch.autograd.Function):
    """(d h and d c [B + N, H], d gates [N, 4, H]) -> (d sums [N, 4 H], d h0 and d c0 [B, H]).

    With s_t the sums, o the output gate and k the factors of :func:`_parts` times the slopes:
    d c_t += d h_t o (1 - tanh(c_t)^2), d s_t = d c_t k (for the output gate d h_t k) + d gates'
    part, d c_(t-1) += d c_t f, d h_(t-1) += d s_t weight.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, d_hidden: Tensor | None, d_cells: Tensor | None, d_gates: Tensor | None,
        weight: Tensor, cells: Tensor, gates: Tensor, steps: _Steps,
    ) -> tuple[Tensor, Tensor, Tensor]:
        factors, own = _parts(cells, gates, steps)
        through = gates[:, 3] * (1.0 - factors[:, 3].square())
        factors *= own
        dh, dc = (
            torch.zeros_like(cells) if d is None else d.clone(memory_format=torch.contiguous_format)
            for d in (d_hidden, d_cells)
        )
        d_sums = torch.zeros_like(gates) if d_gates is None else d_gates * own
        sweep = zip(
            *map(steps.rows, (d_sums, gates, factors, through)),
            *steps.states(dh), *steps.states(dc), strict=True,
        )
        for now, gate, factor, slope, dh_before, dh_now, dc_before, dc_now in reversed([*sweep]):
            dc_now.addcmul_(dh_now, slope)
            now[:, :3].addcmul_(dc_now.unsqueeze(1), factor[:, :3])
            now[:, 3].addcmul_(dh_now, factor[:, 3])
            dc_before.addcmul_(dc_now, gate[:, 1])
            dh_before.addmm_(now.flatten(1), weight)
        ctx.save_for_backward(weight, cells, gates, d_gates, d_sums, dh, dc, factors, through)
        ctx.steps = steps
        return d_sums.flatten(1), dh[: steps.count].clone(), dc[: steps.count].clone()

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, on_sums: Tensor, on_h0: Tensor, on_c0: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Pull back what weighs the derivatives, by a sweep that goes forward."""
        weight, cells, gates, d_gates, d_sums, dh, dc, factors, through = ctx.saved_tensors
        steps, count = ctx.steps, ctx.steps.count
        on = on_sums.clone(memory_format=torch.contiguous_format).unflatten(1, (4, -1))
        on_dh, on_dc = (torch.cat([s, torch.empty_like(dh[count:])]) for s in (on_h0, on_c0))
        across = weight.t()
        for now, gate, factor, slope, h, h_next, c, c_next in zip(
            *map(steps.rows, (on, gates, factors, through)),
            *steps.states(on_dh), *steps.states(on_dc), strict=True,
        ):
            now.flatten(1).addmm_(h, across)
            torch.sum(now[:, :3] * factor[:, :3], 1, out=c_next).addcmul_(c, gate[:, 1])
            torch.mul(now[:, 3], factor[:, 3], out=h_next).addcmul_(c_next, slope)
        on_weight = d_sums.flatten(1).t() @ steps.before(on_dh)
        dh, dc = dh[count:], dc[count:]
        on_factors = on * torch.stack([dc, dc, dc, dh], 1)
        on_cells, on_gates, own = _by_values(
            on_factors, on_dh.new_zeros(()) if d_gates is None else on * d_gates,
            on_dc[count:] * dh, cells, gates, steps,
        )
        on_gates[:, 1].addcmul_(steps.before(on_dc), dc)
        given = [
            found if asked else None
            for found, asked in zip((on_dh, on_dc, on * own), ctx.needs_input_grad, strict=False)
        ]
        return *given, on_weight, on_cells, on_gates, None


def _by_values(
    on_factors: Tensor, on_own: Tensor, on_through: Tensor, cells: Tensor, gates: Tensor,
    steps: _Steps,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pull back to c [B + N, H] and the gates [N, 4, H] what weighs that which is made of them.

    Also returns the gates' slopes [N, 4, H]. ``on_factors`` [N, 4, H] weighs factors times slopes,
    ``on_own`` the slopes alone, ``on_through`` [N, H] is for o (1 - tanh(c)^2).
    """
    parts, own = _parts(cells, gates, steps)
    squashed, o = parts[:, 3], gates[:, 3]
    falling = 1.0 - squashed.square()
    turn = 1.0 - 2.0 * gates  # of the slopes, by the gates
    turn[:, 2] = -2.0 * gates[:, 2]
    on_gates = (on_factors * parts).add_(on_own).mul_(turn)
    on_parts = on_factors * own
    on_gates[:, 0].add_(on_parts[:, 2])
    on_gates[:, 2].add_(on_parts[:, 0])
    on_gates[:, 3].addcmul_(on_through, falling)
    on_squashed = on_parts[:, 3].addcmul(on_through, o * squashed, value=-2.0)
    on_cells = torch.cat([torch.zeros_like(cells[: steps.count]), on_squashed.mul_(falling)])
    steps.add_before(on_cells, on_parts[:, 1])
    return on_cells, on_gates, own


def _layers(
    x: Tensor, hx: Sequence[Tensor], weights: Sequence[Tensor], steps: _Steps,
    dropout: float, ways: int, per_layer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all layers over the rows x [N, I]; return the last one's rows, and last h and c."""
    ends: tuple[list[Tensor], list[Tensor]] = ([], [])
    count = len(weights) // per_layer
    for k in range(0, count, ways):
        if k and dropout:
            x = F.dropout(x, dropout)
        found = []
        for way in range(ways):
            into, across, *biases = weights[(k + way) * per_layer : (k + way + 1) * per_layer]
            rows = x.index_select(0, steps.back) if way else x
            sums = F.linear(rows, into, biases[0] + biases[1] if biases else None)
            hidden, cells, _ = _Layer.apply(sums, across, hx[0][k + way], hx[1][k + way], steps)
            y = hidden[steps.count :]
            found.append(y.index_select(0, steps.back) if way else y)
            for end, states in zip(ends, (hidden, cells), strict=True):
                end.append(states.index_select(0, steps.last))
        x = torch.cat(found, 1) if ways > 1 else found[0]
    return x, torch.stack(ends[0]), torch.stack(ends[1])


def _run(
    x: Tensor, sizes: Tensor | None, hx: Sequence[Tensor], weights: Sequence[Tensor],
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what torch.lstm does; ``sizes`` are a PackedSequence's, whose rows are x [N, I]."""
    rest = dropout if train else 0.0, 2 if bidirectional else 1, 4 if has_biases else 2
    if sizes is not None:
        return _layers(x, hx, weights, _Steps(sizes.tolist(), x.device), *rest)
    if batch_first:
        x = x.transpose(0, 1)
    shape = x.shape[:2]
    steps = _Steps([shape[1]] * shape[0], x.device)
    y, h, c = _layers(x.flatten(0, 1), hx, weights, steps, *rest)
    y = y.unflatten(0, shape)
    return y.transpose(0, 1) if batch_first else y, h, c


class TwiceDifferentiable(TorchFunctionMode):
    """Within it ``torch.nn.LSTM`` has the derivatives of this module, projections aside."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type],
        args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not _lstm:
            return func(*args, **(kwargs or {}))
        packed = isinstance(args[1], Tensor)
        x, sizes, hx, *rest = args if packed else (args[0], None, *args[1:])
        if hx[0].shape[-1] != hx[1].shape[-1]:  # h is projected
            return func(*args)
        return _run(x, sizes, hx, *rest)
