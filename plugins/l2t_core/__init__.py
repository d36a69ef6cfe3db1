"""The teacher core: losses, teachers, functional optimisers and hypergradients in pure PyTorch.

``from l2t_core import TaughtLoss`` is the drop-in for ``nn.CrossEntropyLoss`` in anyone's loop.
"""

from __future__ import annotations

__all__ = ["TaughtLoss", "UserError", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Lazily, so that the command line can use the error type without paying for torch's import.
    if name == "TaughtLoss":
        from l2t_core.teachers.taught_loss import TaughtLoss

        return TaughtLoss
    if name == "UserError":
        from l2t_core.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
