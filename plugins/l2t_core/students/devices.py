"""Where a student lives: on the GPU if there is one, or on the CPU."""

from __future__ import annotations

import torch

from l2t_core.errors import UserError, unknown_choice

DEVICES = ("auto", "cpu", "cuda")


def device_problems(setting: str, name: str) -> list[str]:
    """Return a line if ``name``, the value of the recipe's ``setting``, is no device's."""
    return unknown_choice(setting, name, DEVICES)


def find_device(setting: str, name: str) -> torch.device:
    """Return the device that ``name`` stands for: ``auto`` is the GPU if torch finds one.

    Raises:
        UserError: if ``setting`` asks for a GPU where there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(f"{setting} is cuda, but torch finds no GPU here; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and available else "cpu")
