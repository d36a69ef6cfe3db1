"""Several processes that train one student: whether its teacher says the same to all of them.

Every process keeps its own s_t and computes its own phi_t. They agree because s_t moves on summed
statistics only; if they ever did not, gradients of different losses would be averaged and nothing
would say so.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
from fairseq.distributed import utils as distributed

from l2t_core.errors import UserError
from l2t_core.runs.processes import tell_the_others, wait_until_told
from l2t_core.teachers.applied import AppliedTeacher


def is_first() -> bool:
    """Tell whether this is the first process of the run, or the only one."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def fingerprint_of(applied: AppliedTeacher) -> int:
    """Return 63 bits of a hash over the step, s_t's statistics and phi_t, bit for bit."""
    digest = hashlib.sha256(json.dumps(applied.state_dict(), sort_keys=True).encode())
    for name, part in sorted(applied.coefficients.items()):
        digest.update(name.encode())
        digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def refuse_differences(fingerprint: int, update: int) -> None:
    """Compare ``fingerprint`` over all processes; a collective call.

    Raises:
        UserError: on every process, naming those that differ from the first.
    """
    group_is_there = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not group_is_there or distributed.get_data_parallel_world_size() < 2:
        return
    group = distributed.get_data_parallel_group()
    device = "cuda" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    mine = torch.tensor([fingerprint], dtype=torch.int64, device=device)
    found = [torch.zeros_like(mine) for _ in range(distributed.get_data_parallel_world_size())]
    torch.distributed.all_gather(found, mine, group=group)
    values = [int(value) for value in found]
    different = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if different:
        raise UserError(
            f"s_t or phi_t of process {', '.join(different)} differs from process 0's at update "
            f"{update}; give all processes the same --l2t-teacher file and the same flags, and "
            "start from one checkpoint"
        )


def end_with(error: UserError, mine: bool = False) -> SystemExit:
    """Say what is wrong in one line; return what ends this process.

    From the first process only, which the others wait for, unless it is about this process's part
    (``mine``) or the first has nothing to tell.
    """
    if mine or is_first() or not wait_until_told():
        print(f"l2t: error: {error}", file=sys.stderr, flush=True)
        tell_the_others()
    return SystemExit(2)
