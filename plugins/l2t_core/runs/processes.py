"""The processes of one run: what they share, and what is said when one of them ends.

Under ``torchrun`` every process runs the same program. They share the students of an update or
the batch of a step (``training.parallel``); process 0 alone writes files and reports.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from l2t_core.errors import PeerLost, ToldByTheFirst, UserError
from l2t_core.runs.heartbeat import EVERY, MOST_MISSED, Heartbeat

T = TypeVar("T")
# A student may take days longer than another; a process that ends is noticed at once, and one
# that vanishes without a word by its heartbeat.
_PATIENCE = timedelta(days=30)
# But all begin alike: one that has not come by then is lost, or was never started.
_MEETING = timedelta(minutes=5)
_GOES_ON = "the same command continues from the last finished episode"
# A mistake that all make is told by the first, which may be later by so many seconds.
_TELLING = 60.0
_TOLD, _LOST = "l2t/told", "l2t/lost"


@dataclass(frozen=True)
class Processes:
    """``world`` processes, of which this is number ``rank``. One process needs no group."""

    rank: int = 0
    world: int = 1
    heartbeat: Heartbeat | None = None

    def share(self, count: int) -> range:
        """Return which of ``count`` students are this process's."""
        return range(self.rank, count, self.world)

    def gather(self, mine: list[Any]) -> list[Any]:
        """Return the items of all processes, ordered as :meth:`share` deals them out.

        Raises:
            PeerLost: if another process has ended.
        """
        if self.world == 1:
            return mine
        parts: list[Any] = [None] * self.world
        self._meet(lambda: dist.all_gather_object(parts, mine))
        longest = max(len(part) for part in parts)
        return [part[i] for i in range(longest) for part in parts if i < len(part)]

    def from_first(self, item: Any) -> Any:
        """Return process 0's ``item``.

        Raises:
            PeerLost: if another process has ended.
        """
        if self.world == 1:
            return item
        box = [item]
        self._meet(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]

    def agree(self, action: Callable[[], T]) -> T:
        """Return what ``action`` returns; where it is refused in one process, stop in all.

        Raises:
            UserError: in the first process, with the first refusal.
            ToldByTheFirst: in the others, so that one mistake is told once.
            PeerLost: if another process has ended.
        """
        if self.world == 1:
            return action()
        refusal, result = "", None
        try:
            result = action()
        except UserError as error:
            refusal = str(error)
        refusals = [r for r in self.gather([refusal]) if r]
        if refusals:
            raise self.told_once(UserError(refusals[0]))
        return cast(T, result)

    def told_once(self, error: UserError) -> UserError:
        """Return what to raise for ``error``, which all processes meet: the first tells it."""
        return ToldByTheFirst(str(error)) if self.rank else error

    def add_up(self, tensor: Tensor) -> Tensor:
        """Add ``tensor`` up over the processes, in place, and return it.

        Raises:
            PeerLost: if another process has ended.
        """
        if self.world > 1:
            self._meet(lambda: dist.all_reduce(tensor))
        return tensor

    def close(self) -> None:
        """Leave the group."""
        if self.heartbeat:
            self.heartbeat.stop()
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _meet(self, collective: Any) -> None:
        try:
            collective()
        except RuntimeError as error:  # what gloo and NCCL raise once a connection is gone
            raise PeerLost(
                f"process {self.rank} of {self.world} lost another one "
                f"({str(error).splitlines()[0][:120]}); see that one's message"
            ) from error


ALONE = Processes()


def _store() -> Any:
    """Return what the processes of the run share besides collectives, None before they meet."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()


def tell_the_others() -> None:
    """Let the others end: the first process, if this is it, has told what they all found wrong."""
    store = _store()
    if store is not None and dist.get_rank() == 0:
        with suppress(RuntimeError):  # nobody is left to be told
            store.set(_TOLD, "")


def wait_until_told() -> bool:
    """Wait for the first process to tell the mistake that all have made; False if it does not.

    torchrun and the like end all processes as soon as one has ended. If this one were the quicker,
    the first might be ended before it has told; processes that have not met wait to be ended.
    """
    store, deadline = _store(), time.monotonic() + _TELLING
    while time.monotonic() < deadline:
        try:
            if store is not None and store.check([_TOLD]):
                return True
        except RuntimeError:  # the first process kept the store, and has ended
            return True
        time.sleep(0.05)
    return False


def is_first_to_tell_a_loss() -> bool:
    """Tell, at the first call in each process, whether no other survivor tells of a lost one."""
    store = _store()
    try:
        return store is None or store.add(_LOST, 1) == 1
    except RuntimeError:  # the lost one kept the store
        return True


def processes_here() -> int:
    """Return how many processes of the run share this machine's disk and memory."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"{name}={text} in the environment is no whole number; start the processes with "
            "torchrun, or unset it"
        ) from None


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process without a word while it waits for others to come.

    Python would hear of them when torch has stopped waiting, after minutes; nothing is begun yet.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may change them
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for held, handler in before.items():
            signal.signal(held, handler)


def _form_group(backend: str) -> None:
    """Meet the others soon, to wait for them as long as it takes from then on."""
    # Its functions keep the group that there is at import as a default. Were it imported later,
    # as optimisers do, leaving the group would leave gloo's threads, and one that lets go of a
    # tensor while Python ends aborts the process (exit code 134).
    import torch.distributed.nn.functional  # noqa: F401

    store, rank, world = next(dist.rendezvous("env://", timeout=_MEETING))
    here = dist.PrefixStore("here", store)
    here.set(str(rank), "")
    here.wait([str(other) for other in range(world)], _MEETING)
    store.set_timeout(_PATIENCE)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)


def _start_heartbeat(rank: int, world: int, on_silence: Callable[[str], None]) -> Heartbeat:
    """Watch the others; ``on_silence`` is told, in a line, that one has vanished."""

    def tell(silent: list[int]) -> None:
        minutes = round(EVERY * MOST_MISSED / 60)
        on_silence(
            f"process {rank} of {world} has not heard from process {silent[0]} for {minutes} "
            f"minutes: its machine or its network is gone, or it was stopped; {_GOES_ON}"
        )

    # A connection of its own: on the group's a thread would wait for another's collective.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=False, timeout=_MEETING)
    # torchrun may start all processes anew, in the same store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    heartbeat = Heartbeat(dist.PrefixStore(f"heartbeat/{attempt}", store), rank, world, tell)
    heartbeat.start()
    return heartbeat


def join_processes(on_silence: Callable[[str], None] | None = None) -> Processes:
    """Join the group that ``torchrun`` describes in the environment; without it, run alone.

    A process that vanishes without closing its connections is told of to ``on_silence``, in a line
    and in a thread of its own: the main one waits for the lost one in torch, where nothing can
    interrupt it, so that there is nothing left but to end the process. None: nobody watches.

    Raises:
        UserError: if the environment is incomplete or the group cannot be formed, as where one
            of the processes does not come within minutes.
    """
    world = _number("WORLD_SIZE", 1)
    if world <= 1 or "RANK" not in os.environ:
        return ALONE
    missing = [n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={world} asks for several processes, but {missing[0]} is not set; start "
            "them with torchrun --nproc-per-node N -m l2t_cli train-teacher ..."
        )
    backend = "gloo"
    if torch.cuda.is_available():
        # Where GPUs are fewer than processes, these share them; NCCL has one GPU a process.
        local, gpus = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        torch.cuda.set_device(local % gpus)
        shared = _number("LOCAL_WORLD_SIZE", world) > gpus
        backend = f"cpu:gloo,cuda:{'gloo' if shared else 'nccl'}"
    try:
        with _ended_at_once():
            _form_group(backend)
            rank, world = dist.get_rank(), dist.get_world_size()
            heartbeat = _start_heartbeat(rank, world, on_silence) if on_silence else None
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {world} processes could not meet ({str(error).splitlines()[0][:120]}); "
            "start all of them with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    return Processes(rank, world, heartbeat)
