"""Functions of the user's own on a student's predictions: a measure to climb, a loss to descend.

Both are called with log-probabilities [N, K] and targets [N], and both are held to the same: what
a function makes of them is looked at each time, and a mistake in it is told in one line.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.user_code import imported

Function = Callable[[Tensor, Tensor], Tensor]
_TRIED = 4  # examples; more would not find more


def own_function(path: str, key: str, *, each: bool) -> Function:
    """Return what ``path``, the value of the recipe's ``key``, names, with its results checked.

    With ``each`` it is a loss, a number for each example [N]; else a measure, one number []. Both
    have to be made of the log-probabilities where those ask for a gradient. The targets are the
    data's own and log-probabilities are differentiated: neither may be changed in place.

    Raises:
        UserError: if it cannot be imported; what is returned raises it if the function fails,
            changes what it is given or returns something else.
    """
    function = imported(path, key)
    wanted = "a tensor [N] of a loss for each" if each else "a tensor [], one number to maximise"

    def checked(log_probs: Tensor, targets: Tensor) -> Tensor:
        versions = log_probs._version, targets._version
        try:
            found = function(log_probs, targets)
        except Exception as error:  # whatever the user's function does
            raise UserError(
                f"{key} {path}: {type(error).__name__}: {error}; it is called with "
                "log-probabilities [N, K] and targets [N]"
            ) from error
        if versions != (log_probs._version, targets._version):
            raise UserError(f"{key} {path} changes what it is given in place; work on a copy")
        fits = isinstance(found, Tensor) and found.shape == (targets.shape if each else ())
        if not fits or (log_probs.requires_grad and not found.requires_grad):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"{key} {path} returned {shape} for {len(targets)} examples; return {wanted}, "
                "made of the log-probabilities"
            )
        return found

    return checked


def try_on_nothing_known(
    function: Function, num_classes: int, device: torch.device | str = "cpu"
) -> None:
    """Call ``function`` on a few predictions of a student that knows nothing, on ``device``.

    Raises:
        UserError: as what :func:`own_function` returns.
    """
    nothing = torch.zeros(_TRIED, num_classes, device=device).log_softmax(1).requires_grad_()
    function(nothing, torch.arange(_TRIED, device=device) % num_classes)
