"""A process that is stopped for ever is told from one that is slow."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from checkout import LIMIT, reserved_port  # type: ignore[import-not-found]

from l2t_core.runs import heartbeat
from l2t_core.runs.heartbeat import MOST_MISSED, Heartbeat
from l2t_core.runs.processes import join_processes

ENDED = 7
# Seconds between two beats. On a machine so busy that a thread waits seconds for its turn, silence
# says nothing at the first pace; what goes wrong of itself does so at the second, too.
PACES = (0.1, 1.0)


class Shelf(dict):
    """A store that always answers."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.setdefault(key, b"")


def three(store):
    """Return three heartbeats, and the list of what the first one says."""
    said = []
    beats = [Heartbeat(store, rank, 3, said.append if not rank else print) for rank in range(3)]
    for _ in range(2):  # so that the first has heard all
        for one in reversed(beats):
            one.beat()
    return beats, said


def test_only_what_is_silent_for_long_is_told_of():
    (first, second, _), said = three(Shelf())
    for _ in range(3 * MOST_MISSED):  # the second may be as slow as it likes: it beats
        second.beat()
        first.beat()
        if said:
            break
        first.listen()
    assert said == [[2]]


def test_a_beat_in_time_is_enough():
    (first, second, third), said = three(Shelf())
    for turn in range(5 * MOST_MISSED):
        if turn % MOST_MISSED == 0:
            second.beat()
            third.beat()
            first.beat()
        first.listen()
    assert said == []


def test_a_store_that_does_not_answer_is_silence():
    (first, _, _), said = three(Shelf())
    for _ in range(MOST_MISSED):
        first.listen()
    assert said == []
    first.listen()
    assert said == [[1, 2]]


def live(rank, port, folder, every, stopped, slow):
    """Meet another process that is stopped, or ``slow`` seconds late; leave what came of it."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }
    heartbeat.EVERY = every  # 45 of them: 4.5 seconds, or ten times as many

    def end(message):
        (folder / f"{rank}.txt").write_text(message)
        os._exit(ENDED)

    processes = join_processes(end)
    processes.gather([rank])
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1 and slow:
        end_of_step = time.monotonic() + slow
        while time.monotonic() < end_of_step:  # Python that never waits, as a student's may be
            sum(range(1000))
    (folder / f"{rank}.txt").write_text(str(processes.gather([rank])))
    processes.close()


@contextmanager
def two(folder, every, stopped=None, slow=0.0):
    context = mp.get_context("spawn")
    with reserved_port() as port:
        both = [
            context.Process(target=live, args=(rank, port, folder, every, stopped, slow))
            for rank in range(2)
        ]
        for process in both:
            process.start()
        try:
            yield both
        finally:
            for process in both:
                process.kill()
            for process in both:
                process.join()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stands_still_for_ever_ends_the_other(tmp_path: Path, stopped: int) -> None:
    """Also the first, which holds the store that the other would ask."""
    for every in PACES:
        with two(tmp_path, every, stopped) as both:
            other = both[1 - stopped]
            other.join(LIMIT)
            code = other.exitcode
        if code == ENDED:
            break
    assert code == ENDED
    told = (tmp_path / f"{1 - stopped}.txt").read_text()
    assert f"has not heard from process {stopped} for 15 minutes" in told
    assert "the same command continues" in told


def test_a_slow_process_is_waited_for(tmp_path: Path) -> None:
    """Three times as long as the silence that ends a run."""
    for every in PACES:
        with two(tmp_path, every, slow=130.0 * every) as both:
            for process in both:
                process.join(LIMIT)
            codes = [process.exitcode for process in both]
        if codes == [0, 0]:
            break
    assert codes == [0, 0]
    assert (tmp_path / "0.txt").read_text() == "[0, 1]"
