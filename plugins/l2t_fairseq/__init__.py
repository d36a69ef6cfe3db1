"""The fairseq plugin: criterion ``l2t_dynamic``, task ``l2t_translation`` and the NMT student.

``--user-dir plugins/l2t_fairseq`` in a checkout, ``--user-dir "$(l2t user-dir)"`` installed. The
modules that prepare data or rewrite commands do not need fairseq, and importing them does not load
it: the criterion and the task are registered where fairseq is already running, which is always so
when fairseq imports its user dir. A program that imports this package first calls
:func:`register`.
"""

from __future__ import annotations

import importlib
import sys

__all__ = ["register"]


def register() -> None:
    """Register the criterion and the task with fairseq; a second call does nothing.

    Raises:
        ImportError: fairseq's own, where it is missing or broken.
    """
    # Before anything else: reading a checkpoint may be the first thing that happens next.
    compat = importlib.import_module("l2t_fairseq.compat")
    compat.register_safe_globals()
    compat.avoid_fused_encoder()
    # By name, not by folder: fairseq looks for tasks and models in a user dir, not for criterions.
    importlib.import_module("l2t_fairseq.criterion")
    importlib.import_module("l2t_fairseq.task")


if sys.modules.get("fairseq") is not None:  # None is how Python marks a blocked import
    register()
