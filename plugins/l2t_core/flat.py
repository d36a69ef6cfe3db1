"""A module's parameters as one contiguous vector.

Parameters are overwritten in place rather than swapped through ``functional_call``: that call
unties shared embeddings and corrupts the module afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError


class FlatParameters:
    """Makes all trainable parameters of ``module`` views of one vector omega [P].

    Tied parameters appear once. Loading a vector is one copy; no graph may be alive across it.

    Raises:
        UserError: if the module has no trainable parameters or mixes dtypes or devices.
    """

    def __init__(self, module: nn.Module) -> None:
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
        self.names = {id(p): name for name, p in module.named_parameters()}
        self.sizes = [p.numel() for p in self.parameters]
        self.vector = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        for p, piece in zip(self.parameters, self.split(self.vector), strict=True):
            p.data = piece

    def load(self, vector: Tensor) -> None:
        """Copy ``vector`` [P] into the module's parameters."""
        self.vector.copy_(vector)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of ``vector`` [P] in the parameters' shapes."""
        return [
            piece.view_as(p)
            for piece, p in zip(vector.split(self.sizes), self.parameters, strict=True)
        ]

    def gather(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return gradients, one per parameter, as one vector [P]; None counts as zero."""
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(gradients, self.parameters, strict=True)
            ]
        )


def refill(module: nn.Module, fresh: nn.Module) -> None:
    """Copy ``fresh``'s parameters and buffers into those of ``module``, in place.

    In place because parameters may be views of one vector; ``fresh`` must be of the same make.
    """
    mine = [*module.parameters(), *module.buffers()]
    theirs = [*fresh.parameters(), *fresh.buffers()]
    with torch.no_grad():
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
