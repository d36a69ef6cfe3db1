"""A user's own ``--user-dir``: whether the teacher's criterion and task come with it.

fairseq takes one such folder. One whose ``__init__.py`` imports ``l2t_fairseq`` beside the user's
own architectures and tasks does for both; only importing it as fairseq does can tell, so that is
done in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2t_core.errors import UserError
from l2t_fairseq.commands.failure import reason

# In fairseq's own order: a folder's __init__ may count on what its commands have imported before.
_PROBE = """
import argparse, json, sys
from fairseq import checkpoint_utils, options, tasks, utils
utils.import_user_module(argparse.Namespace(user_dir=sys.argv[1]))
from fairseq.criterions import CRITERION_REGISTRY
found = None
if "l2t_dynamic" in CRITERION_REGISTRY:
    from l2t_fairseq.task import registered_tasks
    found = registered_tasks()
print()
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Plugin:
    """What fairseq is given as ``--user-dir``; ``tasks`` are those in it that build on ours."""

    folder: Path
    tasks: tuple[str, ...] = ()


def examine(user_dir: Path, environment: Mapping[str, str]) -> Plugin | None:
    """Return the plugin that the folder ``user_dir`` is, None where ours does not come with it.

    Runs the folder's code, as the commands that name it do, with ``environment`` added to ours.

    Raises:
        UserError: if fairseq cannot import it.
    """
    return _examine(user_dir, tuple(environment.items()))


@functools.cache
def _examine(user_dir: Path, environment: tuple[tuple[str, str], ...]) -> Plugin | None:
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(user_dir)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, **dict(environment)},
        check=False,
    )
    if done.returncode:
        why = reason(done.stderr, done.returncode)
        raise UserError(f"--user-dir {user_dir} cannot be imported by fairseq ({why}); mend it")
    tasks = json.loads(done.stdout.splitlines()[-1])
    return None if tasks is None else Plugin(user_dir, tuple(tasks))
