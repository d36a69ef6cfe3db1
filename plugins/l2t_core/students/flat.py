"""A module's parameters as one contiguous vector.

Parameters are re-pointed or overwritten in place rather than swapped through ``functional_call``:
that call unties shared embeddings and corrupts the module afterwards.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError

# Numbers that a row is padded to: every row then begins at a multiple of 64 bytes. Matrix
# products may round differently for memory that is aligned differently.
_ALIGNMENT = 16
# Bytes from which memory is asked for in big pages.
_BIG = 2**23


def as_vector(
    parts: Sequence[Tensor | None], like: Sequence[Tensor], out: Tensor | None = None
) -> Tensor:
    """Return ``parts`` as one vector [sum of sizes of ``like``]; None counts as zeros."""
    pieces = [
        (torch.zeros_like(p) if part is None else part).reshape(-1)
        for part, p in zip(parts, like, strict=True)
    ]
    return torch.cat(pieces, out=out)


def pieces_of(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of ``vector``, as :func:`as_vector` makes it, in the shapes of ``like``."""
    split = vector.split([p.numel() for p in like])
    return [piece.view_as(p) for piece, p in zip(split, like, strict=True)]


def overwrite(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Overwrite ``parameters`` by the pieces of ``vector``, as :func:`as_vector` makes it.

    In place, for products of matrices may round differently where memory is aligned differently,
    and a resumed run has the bits of one that was not interrupted.
    """
    with torch.no_grad():
        for parameter, piece in zip(parameters, pieces_of(vector, parameters), strict=True):
            parameter.copy_(piece)


class FlatParameters:
    """Makes all trainable parameters of ``module`` views of one vector omega [P].

    Tied parameters appear once. No graph may be alive across a change of omega.

    Raises:
        UserError: if the module has no trainable parameters, mixes dtypes or devices, or has some
            that are no real numbers of a known shape or lie in each other's memory, or asks for
            sparse gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        _refuse_odd(module)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise UserError("the student has no trainable parameters; unfreeze some of them")
        first = self.parameters[0]
        for p in self.parameters:
            if p.dtype != first.dtype or p.device != first.device:
                raise UserError(
                    f"the student mixes {first.dtype} on {first.device} with {p.dtype} on "
                    f"{p.device}; keep all its parameters in one dtype on one device"
                )
        self.size = sum(p.numel() for p in self.parameters)
        self.vector = self.empty(1)[0]
        torch.cat([p.detach().reshape(-1) for p in self.parameters], out=self.vector)
        self.show(self.vector)

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised [*shape, P] whose every row is aligned like any other."""
        return aligned((*shape, self.size), self.parameters[0])

    def show(self, vector: Tensor) -> None:
        """Make the module's parameters views of ``vector`` [P], without copying."""
        for p, piece in zip(self.parameters, self.split(vector), strict=True):
            p.data = piece

    def check(self, module: nn.Module) -> None:
        """Check that the parameters of ``module`` are still those, and views of the vector.

        Raises:
            UserError: naming one that is not: what trains it would train nothing.
        """
        mine = {
            id(p): piece for p, piece in zip(self.parameters, self.split(self.vector), strict=True)
        }
        for name, p in module.named_parameters():
            if p.requires_grad:
                piece = mine.pop(id(p), None)
                if piece is None or not (p.is_meta or p.is_set_to(piece)):
                    raise _replaced(f"a new parameter {name!r}")
        if mine:
            raise _replaced("fewer parameters")

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of ``vector`` [P] in the parameters' shapes."""
        return pieces_of(vector, self.parameters)

    def gather(self, gradients: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Return gradients, one per parameter, as one vector [P]; None counts as zero."""
        return as_vector(gradients, self.parameters, out)

    def add(self, vector: Tensor, parts: Sequence[Tensor | None]) -> None:
        """Add ``parts``, one per parameter, to ``vector`` [P] in place; None counts as zero."""
        pairs = [
            (piece, part)
            for piece, part in zip(self.split(vector), parts, strict=True)
            if part is not None
        ]
        if pairs:
            torch._foreach_add_([a for a, _ in pairs], [b for _, b in pairs])


def _replaced(what: str) -> UserError:
    return UserError(
        f"the student's reset puts {what} in its module; fill those that are there in place "
        "(l2t_core.students.flat.refill does)"
    )


def _refuse_odd(module: nn.Module) -> None:
    """Raise UserError for what cannot be part of one vector, naming it."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.sparse:
            raise UserError(
                f"the student's {type(layer).__name__} {name!r} has sparse=True; leave that out: "
                "gradients are one dense vector here"
            )
    places = []
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UserError(
                f"the student's parameter {name!r} has no shape yet (a lazy layer); pass a batch "
                "through the module before it becomes a student's"
            )
        if p.requires_grad and not p.is_floating_point():
            raise UserError(
                f"the student's parameter {name!r} is {p.dtype}; keep its real and its imaginary "
                "part as two parameters"
            )
        # Those with gaps may interleave.
        if p.numel() and p.device.type != "meta" and p.untyped_storage().nbytes() and _dense(p):
            size = p.numel() * p.element_size()
            places.append((str(p.device), p.data_ptr(), p.data_ptr() + size, name))
    for (device, _, end, name), (other_device, start, _, other) in pairwise(sorted(places)):
        if device == other_device and start < end:
            raise UserError(
                f"the student's parameters {name!r} and {other!r} share memory and would be parted "
                "here; to tie them, give both layers the same nn.Parameter"
            )


def _dense(p: Tensor) -> bool:
    """Tell whether ``p`` fills its stretch of memory without gaps."""
    last = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True))
    return last + 1 == p.numel()


def aligned(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor, ``like`` another, whose every row is aligned like any other.

    And like a tensor of its own: a product has the same bits with either.
    """
    *rows, size = shape
    padded = -(-size // _ALIGNMENT) * _ALIGNMENT
    return _allocate((*rows, padded), like)[..., :size]


def _allocate(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor in big memory pages where the system has them.

    The first touch of a page costs a fault: in pages of 4 KiB, those of a trajectory took more
    time than the steps that filled it.
    """
    size = math.prod(shape) * like.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if like.device.type != "cpu" or advice is None or size < _BIG:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    memory = mmap.mmap(-1, size)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def refill(module: nn.Module, fresh: nn.Module) -> None:
    """Copy ``fresh``'s parameters and buffers into those of ``module``, in place.

    In place because parameters may be views of one vector; ``fresh`` must be of the same make.
    """
    mine = [*module.parameters(), *module.buffers()]
    theirs = [*fresh.parameters(), *fresh.buffers()]
    with torch.no_grad():
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
