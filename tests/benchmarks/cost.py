"""What the benchmarks measure: seconds, and the memory of a process."""

from __future__ import annotations

import resource
import sys
import time

import torch


def now() -> float:
    """Return seconds: of the processor on one CPU thread, whoever else is using it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def peak_mib() -> float:
    """Return the process's peak resident memory so far in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
