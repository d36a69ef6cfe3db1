"""A Python that has imported fairseq and runs commands in forks of itself.

Importing torch and fairseq takes seconds, most commands on a toy corpus less than one. Each
command is a process of its own, as ``python -m`` would start it; only the imports are shared, and
nothing of this project is among them. Started by ``toy_fairseq``; reads one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

SHARED = ("torch", "numpy", "fairseq", "fairseq.tasks.translation", "fairseq.trainer",
          "fairseq.models.transformer", "fairseq.models.lstm", "fairseq.sequence_generator",
          "sacrebleu", "hydra", "torch._dynamo")  # fmt: skip


def run(request: dict[str, Any]) -> int:
    """Run a request's module as ``__main__`` and return the process's exit code."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    logging.root.handlers.clear()  # fairseq's commands set these up before they import it
    os.chdir(request["cwd"])
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    sys.path[0] = request["cwd"]  # as `python -m` has it
    code = 0
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve() -> None:
    """Run requests until the input ends; a fork waits for each and writes its exit code."""
    for name in SHARED:
        __import__(name)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        with contextlib.suppress(ChildProcessError):  # those that have ended since
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        watcher = os.fork()
        if watcher:
            continue
        worker = os.fork()
        if not worker:
            os.setsid()
            Path(request["pid"]).write_text(str(os.getpid()))  # before it prints anything
            os._exit(run(request))
        _, status = os.waitpid(worker, 0)
        done = Path(request["code"])
        done.with_suffix(".tmp").write_text(str(os.waitstatus_to_exitcode(status)))
        done.with_suffix(".tmp").rename(done)
        os._exit(0)


if __name__ == "__main__":
    serve()
