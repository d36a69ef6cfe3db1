"""Functions of the user's own on a student's predictions: a measure to climb, a loss to descend.

Both are called with log-probabilities [N, K] and targets [N], and both are held to the same: what
a function makes of them is looked at each time, and a mistake in it is told in one line. Of random
numbers they may draw torch's alone, which are those of a step or of a measurement.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.user_code import FAILURES, imported

Function = Callable[[Tensor, Tensor], Tensor]
_TRIED = 4  # examples; more would not find more
# What tosses a coin of its own comes up the same so often once in 128 times.
_CALLS = 8


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
        except FAILURES as error:
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


def try_out(
    function: Function, num_classes: int, name: str, device: torch.device | str = "cpu"
) -> None:
    """Call ``function``, which messages call ``name``, on a few predictions, on ``device``.

    First on those of a student that knows nothing, [4, K] alike, then often on some that differ.

    Raises:
        UserError: as what :func:`own_function` returns, or if it does not come to the same when it
            is called again after ``torch.manual_seed``, or draws from other random numbers.
    """
    targets = torch.arange(_TRIED, device=device) % num_classes
    logits = torch.zeros(_TRIED, num_classes, device=device)
    with torch.random.fork_rng(devices=[]):
        function(logits.log_softmax(1).requires_grad_(), targets)
    spread = torch.linspace(-1.0, 1.0, logits.numel(), device=device).cos().view_as(logits)

    def value_and_gradient() -> Tensor:
        log_probs = spread.log_softmax(1).requires_grad_()
        found = function(log_probs, targets)
        (gradient,) = torch.autograd.grad(found.sum(), log_probs)
        return torch.cat([found.detach().flatten(), gradient.flatten()])

    before = _other_random_numbers()
    if not comes_to_the_same(value_and_gradient, device) or _other_random_numbers() != before:
        raise UserError(
            f"{name} is not the same for the same predictions and torch.manual_seed, or draws from "
            "random or numpy.random, which no run repeats; draw from torch.rand and the like"
        )


def comes_to_the_same(call: Callable[[], Tensor], device: torch.device | str = "cpu") -> bool:
    """Tell whether ``call`` returns the same bits each of eight times after torch.manual_seed.

    ``device`` is where it draws, beside the CPU. Torch's random numbers stay as they were.
    """
    at = torch.device(device)
    found = []
    for _ in range(_CALLS):
        with torch.random.fork_rng(devices=[at] if at.type == "cuda" else []):
            torch.manual_seed(1)
            found.append(call())
    # Two that are not a number are alike here: that is told elsewhere.
    return all(torch.allclose(found[0], x, rtol=0, atol=0, equal_nan=True) for x in found[1:])


def _other_random_numbers() -> tuple[Any, ...]:
    """Return the states of the global random numbers of Python and NumPy, to be compared."""
    name, key, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(key).tobytes(), *rest)
