"""``l2t user-dir``: where fairseq finds the plugin."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from l2t_core.errors import UserError
from l2t_fairseq.commands.own_plugin import Plugin, examine
from l2t_fairseq.commands.train import FairseqCommand, value_of


def plugin_folder() -> Path:
    """Return the folder to give to fairseq as ``--user-dir``, without importing it.

    Raises:
        UserError: if the plugin is not installed.
    """
    found = importlib.util.find_spec("l2t_fairseq")
    if found is None or found.origin is None:
        raise UserError("l2t_fairseq is not installed; install l2t again")
    return Path(found.origin).parent


def plugin_of(command: FairseqCommand) -> Plugin:
    """Return the plugin to run ``command`` with: in its own ``--user-dir``, or ours alone.

    Raises:
        UserError: if its ``--user-dir`` cannot be imported.
    """
    ours, given = plugin_folder(), value_of(command, "--user-dir")
    # One that is not there may be fairseq's own, which has nothing of ours.
    if given is None or not Path(given).is_dir() or Path(given).resolve() == ours.resolve():
        return Plugin(ours)
    return examine(Path(given).resolve(), command.environment) or Plugin(ours)


def command() -> None:
    """Print the plugin's folder: fairseq-train --user-dir "$(l2t user-dir)" ..."""
    print(plugin_folder())
