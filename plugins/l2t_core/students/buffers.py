"""A module's buffers, whether its steps write into them or bind their names to new tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LARGE = 1 << 16  # bytes


class Buffers:
    """Copies the buffers of ``module`` and puts them back.

    They are looked up by name each time: a step may write into a buffer, as batch norm does, or
    bind its name to another tensor, as ``self.mean = 0.9 * self.mean + ...`` does.
    """

    def __init__(self, module: nn.Module) -> None:
        found: dict[int, tuple[nn.Module, str]] = {}  # by identity: shared ones count once
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (part, name))
        self._places = list(found.values())
        self._copies: list[Tensor | None] = [None] * len(found)  # the latest ones

    def tensors(self) -> list[Tensor]:
        """Return the buffers themselves, in the order of ``module.buffers()``."""
        return [getattr(part, name) for part, name in self._places]

    def copy(self) -> list[Tensor]:
        """Return copies; a large one that is as it was is not copied anew.

        Tables and masks would take their size at every step otherwise.
        """
        copies = []
        for buffer, latest in zip(self.tensors(), self._copies, strict=True):
            # Small ones always: to compare costs more, and on a GPU waits for it.
            large = buffer.numel() * buffer.element_size() >= _LARGE
            same = large and latest is not None and torch.equal(buffer, latest)
            copies.append(latest if same and latest is not None else buffer.detach().clone())
        self._copies = [*copies]
        return copies

    def load(self, values: list[Tensor]) -> None:
        """Make the buffers what ``values``, as :meth:`copy` returns them, are: in place if it can.

        Raises:
            ValueError: if they are another number.
        """
        with torch.no_grad():
            for (part, name), value in zip(self._places, values, strict=True):
                buffer = getattr(part, name)
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                else:  # such as a table that has grown since
                    setattr(part, name, value.clone())
