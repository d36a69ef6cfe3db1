"""The fairseq plugin: its criterions, the task ``l2t_translation`` and the NMT student.

``l2t_dynamic`` is a teacher's loss, ``l2t_expected_measure`` minimum risk training.

``--user-dir plugins/l2t_fairseq`` in a checkout, ``--user-dir "$(l2t user-dir)"`` installed. The
modules that prepare data or rewrite commands do not need fairseq, and importing them does not load
it: criterions and task are registered where fairseq is already running, which is always so
when fairseq imports its user dir. A program that imports this package first calls
:func:`register`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["register"]

if sys.version_info < (3, 10):  # noqa: UP036 - a user dir is not installed, so pip cannot refuse
    raise SystemExit(
        "l2t: error: the plugin needs Python 3.10 or newer, this is "
        f"{sys.version.split()[0]}; run fairseq under Python 3.10 (fairseq 0.12.2) or "
        "3.11 and 3.12 (fairseq-fixed)"
    )


def register() -> None:
    """Register criterions and task with fairseq; a second call does nothing.

    Raises:
        ImportError: fairseq's own, where it is missing or broken.
        UserError: where fairseq, torch or a package is there in a version that cannot work, or a
            package is missing.
    """
    importlib.import_module("fairseq")
    compat = _import("l2t_fairseq.compat")
    compat.refuse_unusable_versions()
    # Before anything else: reading a checkpoint may be the first thing that happens next.
    compat.register_safe_globals()
    compat.register_broadcast_globals()
    compat.avoid_fused_encoder()
    _import("l2t_fairseq.checkpoints").save_plainly()
    # By name, not by folder: fairseq looks for tasks and models in a user dir, not for criterions.
    _import("l2t_fairseq.criterion")
    _import("l2t_fairseq.expected_measure")
    _import("l2t_fairseq.task")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        from l2t_core.errors import UserError

        missing = str(error.name)
        if missing.split(".")[0] in ("fairseq", "l2t_core", "l2t_fairseq"):
            raise
        raise UserError(
            f"the plugin needs the package {missing}; pip install {missing}, or install l2t "
            "with pip, which brings all that it needs"
        ) from error


def _register_for_fairseq() -> None:
    from l2t_core.errors import UserError

    try:
        register()
    except UserError as error:
        print(f"l2t: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if sys.modules.get("fairseq") is not None:  # None is how Python marks a blocked import
    _register_for_fairseq()
