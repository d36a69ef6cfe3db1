"""Toy students whose hypergradients can be checked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_core.students.flat import refill
from l2t_core.students.measures import log_likelihood
from l2t_core.students.optimisers import build_optimiser
from l2t_core.students.schedules import learning_rate
from l2t_core.students.state import DevStatistics, dev_statistics


class Mlp(nn.Module):
    """6 -> 5 -> 3 with dropout."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ConvNet(nn.Module):
    """A small convolutional net with batch norm."""

    input_shape = (1, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransformerNet(nn.Module):
    """One encoder layer with dropout, its output tied to the token embedding."""

    input_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, 2, dim_feedforward=6, dropout=0.2, batch_first=True, activation="gelu"
        )
        self.out = nn.Linear(4, 3, bias=False)
        self.out.weight = self.embed.weight  # tied, as NMT students do

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.embed((x.abs() * 7).long() % 3)).mean(1))


class LstmNet(nn.Module):
    """A two-layer LSTM with dropout between the layers."""

    input_shape = (4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 4, num_layers=2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class _Opaque(torch.autograd.Function):
    """x w, with a backward by a kernel that autograd does not see, as an extension's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        seen = gradient.detach()
        return seen * w.detach(), (seen * x.detach()).sum(0)


class OpaqueLayer(nn.Module):
    """A layer without a second derivative, which says nothing of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return _Opaque.apply(x, self.scale)


class OpaqueNet(nn.Module):
    """6 -> 5 -> 3 with such a layer between."""

    input_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), OpaqueLayer(5), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class ToyStudent:
    """A student on random data: 3 classes, batches of 6 out of 24 training examples."""

    num_classes = 3
    default_features = ("progress", "train_nll", "dev_accuracy", "class_accuracy")
    measure_name = "accuracy"

    def __init__(
        self,
        make: Callable[[], nn.Module],
        optimiser: OptimiserSpec,
        steps: int = 4,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.make, self.spec, self.total_steps, self.dtype = make, optimiser, steps, dtype
        self.module = make().to(dtype)
        self.optimiser = build_optimiser(optimiser)
        generator = torch.Generator().manual_seed(5)
        shape = self.module.input_shape
        self.x = torch.randn(24, *shape, generator=generator, dtype=dtype)
        self.y = torch.randint(0, 3, (24,), generator=generator)
        self.dev_x = torch.randn(12, *shape, generator=generator, dtype=dtype)
        self.dev_y = torch.randint(0, 3, (12,), generator=generator)
        self.frozen_buffers: list[Tensor] | None = None

    def reset(self, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        refill(self.module, self.make().to(self.dtype))

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        return torch.randperm(24, generator=generator)[:6]

    def step_seed(self, step: int) -> int:
        return 77 + step

    def predict(self, batch: Any) -> tuple[Tensor, Tensor]:
        self.module.train()
        return torch.log_softmax(self.module(self.x[batch]), 1), self.y[batch]

    def learning_rate(self, step: int) -> float:
        return learning_rate(ScheduleSpec("linear"), self.spec.lr, step, self.total_steps)

    def _dev(self) -> Tensor:
        self.module.eval()
        return torch.log_softmax(self.module(self.dev_x), 1)

    def dev_statistics(self, step: int) -> DevStatistics | None:
        if (step + 1) % 2:
            return None
        with torch.no_grad():
            return dev_statistics(self._dev(), self.dev_y, 3)

    def dev_interval(self) -> int:
        return 2

    def smoothed_measure(self, seed: int) -> Tensor:
        if self.frozen_buffers is not None:
            for buffer, value in zip(self.module.buffers(), self.frozen_buffers, strict=True):
                buffer.copy_(value)
        return log_likelihood(self._dev(), self.dev_y)

    def true_measure(self) -> float:
        with torch.no_grad():
            return float((self._dev().argmax(1) == self.dev_y).double().mean())

    def fingerprint(self) -> dict[str, str | int]:
        return {"kind": "classes", "num_classes": 3}


STUDENTS = {"mlp": Mlp, "conv_bn": ConvNet, "transformer": TransformerNet, "lstm": LstmNet}


def knows_autocast(low: torch.dtype) -> bool:
    """Tell whether this torch's CPU has autocast to ``low``: float16 not before torch 2.4 or so."""
    try:
        with torch.autocast("cpu", low):
            return True
    except RuntimeError:
        return False
