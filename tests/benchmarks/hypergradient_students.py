"""The benchmark's students: five nets on synthetic data that one seed makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_core.specs import LossSpec, OptimiserSpec
from l2t_core.students.flat import refill
from l2t_core.students.measures import log_likelihood
from l2t_core.students.optimisers import build_optimiser
from l2t_core.students.state import DevStatistics
from l2t_vision.models.architectures import build_model
from l2t_vision.recipe import ImageSpec

SEED = 7
VOCABULARY = 2000
LENGTH = 20  # tokens of a sentence
WIDTH = 128  # of the Transformer
_TRAIN, _DEV = 1600, 100  # examples

# An eps large beside float32's rounding of small gradients: at 1e-8 the derivative of Adam's
# first steps is up to 1e8 times the rate and no two float32 programs agree on it.
_ADAM = OptimiserSpec("adam", 1e-3, eps=1e-3)
_MOMENTUM = OptimiserSpec("momentum", 0.1)


class Attention(nn.Module):
    """Multi-head attention. nn.MultiheadAttention reads its parts' weights past their forward,
    which ``higher`` cannot follow."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        """Let ``x`` [B, L, D] attend to ``memory`` [B, M, D]."""
        q, k, v = (
            part(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One Transformer layer, normalised before its parts; a decoder's attends to a memory too."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.own, self.norm1 = Attention(), nn.LayerNorm(WIDTH)
        if decoder:
            self.cross, self.norm2 = Attention(), nn.LayerNorm(WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH)
        self.inner = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Map [B, L, D] to [B, L, D]."""
        normed = self.norm1(x)
        x = x + self.dropout(self.own(normed, normed, causal=memory is not None))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm2(x), memory))
        return x + self.dropout(self.inner(self.norm3(x)))


class Transformer(nn.Module):
    """One encoder and one decoder layer over [B, 2, L] tokens: source and shifted target."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.encoder, self.decoder = Layer(False), Layer(True)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B * L, K]."""
        position = self.position(torch.arange(LENGTH))
        memory = self.encoder(self.source(tokens[:, 0]) + position)
        decoded = self.decoder(self.target(tokens[:, 1]) + position, memory)
        return self.out(decoded).flatten(0, 1)


class Lstm(nn.Module):
    """A language model over [B, 2, L] tokens, of which it reads the shifted targets."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B * L, K]."""
        return self.out(self.lstm(self.embed(tokens[:, 1]))[0]).flatten(0, 1)


Data = tuple[Tensor, Tensor]


def _images(*shape: int) -> Callable[[int, torch.Generator], Data]:
    def make(count: int, generator: torch.Generator) -> Data:
        # A third: the norm of MNIST's images.
        x = torch.randn(count, *shape, generator=generator) / 3.0
        rule = torch.randn(x[0].numel(), 10, generator=torch.Generator().manual_seed(SEED))
        return x, (x.flatten(1) @ rule).argmax(1)

    return make


def _sentences(count: int, generator: torch.Generator) -> Data:
    source = torch.randint(1, VOCABULARY, (count, LENGTH), generator=generator)
    dictionary = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(SEED))
    target = dictionary[source]
    shifted = F.pad(target[:, :-1], (1, 0))
    return torch.stack([source, shifted], 1), target


@dataclass(frozen=True)
class Task:
    """What makes one student: its net, data, loss and optimiser."""

    make: Callable[[], nn.Module]
    data: Callable[[int, torch.Generator], Data]
    num_classes: int
    batch_size: int
    optimiser: OptimiserSpec
    loss: LossSpec


_GREY, _COLOUR = (1, 28, 28), (3, 32, 32)


def _image_net(name: str, shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    return lambda: build_model(shape, 10, ImageSpec(model=name, hidden=500))


_DENSE, _DIAGONAL = LossSpec("dense", "sigmoid"), LossSpec("diagonal", "softplus")
TASKS = {
    "mlp": Task(_image_net("mlp", _GREY), _images(*_GREY), 10, 100, _MOMENTUM, _DENSE),
    "lenet": Task(_image_net("lenet", _GREY), _images(*_GREY), 10, 64, _MOMENTUM, _DENSE),
    "resnet8": Task(
        _image_net("resnet8", _COLOUR), _images(*_COLOUR), 10, 32, _MOMENTUM, _DENSE
    ),
    "transformer": Task(Transformer, _sentences, VOCABULARY, 32, _ADAM, _DIAGONAL),
    "lstm": Task(Lstm, _sentences, VOCABULARY, 32, _ADAM, _DIAGONAL),
}


def tiny(task: Task) -> Task:
    """Return a task of a few numbers with the optimiser of ``task``."""
    return Task(lambda: nn.Linear(4, 10), _images(4), 10, 4, task.optimiser, _DENSE)


class SyntheticStudent:
    """A :class:`Task` as a student of ``steps`` steps; every life starts from the same weights."""

    default_features = ("progress",)
    measure_name = "accuracy"
    fixed_shapes = True

    def __init__(
        self, task: Task, steps: int, dtype: torch.dtype = torch.float32, eps_form: str = "torch"
    ) -> None:
        self.task, self.total_steps, self.num_classes = task, steps, task.num_classes
        self.dtype, self.eps_form, self.loss = dtype, eps_form, task.loss
        self.optimiser = build_optimiser(task.optimiser)
        generator = torch.Generator().manual_seed(SEED)
        (self.x, self.y), (self.dev_x, self.dev_y) = (
            (x.to(dtype) if x.is_floating_point() else x, y)
            for x, y in (task.data(count, generator) for count in (_TRAIN, _DEV))
        )
        self.order = torch.randperm(_TRAIN, generator=generator).split(task.batch_size)
        self.initial, self.module = self.fresh(), self.fresh()

    def fresh(self) -> nn.Module:
        """Return a new module with the weights that every life starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return self.task.make().to(self.dtype)

    def reset(self, seed: int) -> None:
        """Fill the module with the first weights, whatever ``seed`` says."""
        refill(self.module, self.initial)

    def batch(self, step: int) -> Tensor:
        """Return the indices [N] of ``step``."""
        return self.order[step % (_TRAIN // self.task.batch_size)]

    def step_seed(self, step: int) -> int:
        """Return the dropout seed of ``step``."""
        return 100 + step

    def outputs(self, net: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and targets [N] of ``net`` on a batch."""
        return torch.log_softmax(net(self.x[batch]), 1), self.y[batch].flatten()

    def measure(self, net: Any) -> Tensor:
        """Return the log-likelihood of dev under ``net``, which must be in evaluation mode."""
        return log_likelihood(torch.log_softmax(net(self.dev_x), 1), self.dev_y.flatten())

    def predict(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and targets [N] in training mode."""
        self.module.train()
        return self.outputs(self.module, batch)

    def learning_rate(self, step: int) -> float:
        """Return the constant rate."""
        return self.task.optimiser.lr

    def dev_statistics(self, step: int) -> DevStatistics | None:
        """Return None: other methods make no passes over dev either."""
        return None

    def dev_interval(self) -> int:
        """Return T: dev is never looked at in between."""
        return self.total_steps

    def smoothed_measure(self, seed: int) -> Tensor:
        """Return the log-likelihood of dev."""
        self.module.eval()
        return self.measure(self.module)

    def true_measure(self) -> float:
        """Return the accuracy on dev."""
        self.module.eval()
        with torch.no_grad():
            guess = self.module(self.dev_x).argmax(1)
        return float((guess == self.dev_y.flatten()).double().mean())

    def fingerprint(self) -> dict[str, str | int]:
        """Return the number of classes."""
        return {"kind": "classes", "num_classes": self.num_classes}
