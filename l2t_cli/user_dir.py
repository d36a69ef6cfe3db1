"""``l2t user-dir``: where fairseq finds the plugin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from l2t_core.errors import UserError


def plugin_folder() -> Path:
    """Return the folder to give to fairseq as ``--user-dir``, without importing it.

    Raises:
        UserError: if the plugin is not installed.
    """
    found = importlib.util.find_spec("l2t_fairseq")
    if found is None or found.origin is None:
        raise UserError("l2t_fairseq is not installed; install l2t again")
    return Path(found.origin).parent


def command() -> None:
    """Print the plugin's folder: fairseq-train --user-dir "$(l2t user-dir)" ..."""
    print(plugin_folder())
