"""Two real processes over gloo against one: shared batches, shared students, lost peers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import signal
import socket
import tempfile
import time
import types
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from checkout import end_of, reserved_port, start_python  # type: ignore[import-not-found]
from torch import nn
from toy_students import STUDENTS, ToyStudent  # type: ignore[import-not-found]

from l2t_core import TaughtLoss
from l2t_core.errors import PeerLost, UserError
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.second_derivatives import SECOND
from l2t_core.hypergradients.ways import exact
from l2t_core.runs.folder import RunFolder
from l2t_core.runs.processes import (
    ALONE,
    is_first_to_tell_a_loss,
    join_processes,
    tell_the_others,
    wait_until_told,
)
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life, shard_rows
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import TeacherHeader, save_teacher
from l2t_core.training.checks import check_processes
from l2t_core.training.episodes import train_teacher

LOSS = LossSpec("dense", "sigmoid", warmup_steps=1, ce_mix=0.2)
CASES = [
    ("mlp", OptimiserSpec("momentum", 0.3, clip_norm=0.05), {}, False),
    ("mlp", OptimiserSpec("adam", 0.05, eps=1e-3), {"memory": "4KB", "spill": "none"}, True),
    ("mlp", OptimiserSpec("adam", 0.05, eps=1e-3), {"discount": 0.9}, True, "lstm"),
    ("transformer", OptimiserSpec("adam", 0.05, eps=1e-3), {}, False),
    ("mlp", OptimiserSpec("momentum", 0.3), {"hvp": "finite-difference"}, False, "lstm"),
    ("mlp", OptimiserSpec("momentum", 0.3), {"hvp": "one-sided-difference"}, False),
]


def estimate(case, processes):
    name, optimiser, settings, fixed_shapes, *kind = case
    student = ToyStudent(STUDENTS[name], optimiser, steps=7)
    student.fixed_shapes = fixed_shapes
    for module in student.module.modules():  # masks are each process's own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.TransformerEncoderLayer):
            module.self_attn.dropout = 0.0
    names = student.default_features
    spec = TeacherSpec(*kind, slots=3, init_scale=0.3, hidden=4)
    teacher = build_teacher(spec, LOSS, 3, feature_count(names, 3), seed=1).double()
    engine = Engine(Life(student, processes=processes), LOSS, TrainingSpec(**settings))
    outcome = exact(Episode(engine, names, 3, 0), teacher, lambda phase, step: None)
    return outcome.estimates[0], outcome.smoothed, engine.plan.recomputed


def together(rank, port, folder, work):
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }
    torch.set_num_threads(1)
    processes = join_processes()
    torch.save(work(processes), folder / f"{rank}.pt")
    processes.close()
    # A thread of gloo's that outlives the group may abort the process while Python ends. One that
    # has been waited for is listed for a moment more: until the system has cleared it away.
    for _ in range(600):
        if not (left := [name for name in thread_names() if "gloo" in name]):
            break
        time.sleep(0.05)
    assert not left


def thread_names():
    """Return the names of this process's threads; none where the system doesn't list them."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended since it was listed
            names.append(path.read_text())
    return names


def in_two_processes(folder, work):
    with reserved_port() as port:
        mp.spawn(together, (port, folder, work), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def taught_loop(path, processes):
    """Six steps of data-parallel training under TaughtLoss; the first process looks at dev."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    criterion = TaughtLoss(path, 6, optimizer)
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).double()
    y = torch.arange(16) % 4
    mine = slice(processes.rank, None, processes.world)
    written, look = [], None
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for step in range(6):
        optimizer.zero_grad(set_to_none=False)
        # At first the second process has no batch, and the first one's is the whole.
        without = processes.world > 1 and step == 0
        if not without:
            criterion(model(x[mine]), y[mine]).backward()
        elif processes.rank == 0:
            criterion(model(x), y).backward()
        for parameter in model.parameters():
            processes.add_up(parameter.grad).div_(1 if without else processes.world)
        optimizer.step()
        criterion.step()
        if look is not None:
            criterion.observe_dev(*look)
            look = None
        if step in (1, 3) and processes.rank == 0:
            seen = model(x).detach(), y
            # Of several processes all see it after the step that comes.
            if processes.world > 1:
                criterion.observe_dev(*seen)
            else:
                look = seen
        written.append(criterion.applied.begin_step(0.5)["W"])
    return torch.stack(written), criterion.applied.state_dict()


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_taught_loss_writes_one_loss_for_all_processes(tmp_path, name):
    features = ["progress", "train_nll", "dev_nll"]
    spec = TeacherSpec(name, slots=3, init_scale=0.5, features=features)
    loss = LossSpec("dense", "softplus")
    header = TeacherHeader(spec, loss, 4, 6, 2, {"kind": "classes", "num_classes": 4})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 4, 3, seed=2), header)
    (first, state), (second, other) = in_two_processes(
        tmp_path, functools.partial(taught_loop, path)
    )
    assert torch.equal(first, second) and state == other
    alone, expected = taught_loop(path, ALONE)
    torch.testing.assert_close(first, alone)
    assert state["state"]["dev"]["nll"] == pytest.approx(expected["state"]["dev"]["nll"])
    assert float((first[-1] - first[1]).abs().max()) > 1e-3


def kept_look(path, processes):
    """A look at dev, a checkpoint of the first process, and three losses from there."""
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 4), torch.arange(8) % 4
    criterion = TaughtLoss(path, 10)
    for _ in range(3):
        criterion(logits, targets)
        criterion.step()
    if processes.rank == 0:
        criterion.observe_dev(10.0 * torch.eye(4), torch.arange(4))
    kept = processes.from_first(criterion.state_dict())
    again = TaughtLoss(path, 10)
    again.load_state_dict(kept)
    losses = []
    for one in (criterion, again):
        for _ in range(3):
            losses.append(float(one(logits, targets)))
            one.step()
    return losses


def test_a_checkpoint_keeps_a_look_at_dev_that_no_step_has_shared(tmp_path):
    spec, loss = TeacherSpec(slots=3, init_scale=0.9, features=["dev_nll"]), LossSpec("dense")
    header = TeacherHeader(spec, loss, 4, 10, 2, {"kind": "classes", "num_classes": 4})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 4, 1, seed=2), header)
    for losses in in_two_processes(tmp_path, functools.partial(kept_look, path)):
        assert losses[:3] == losses[3:] and losses[1] != losses[0]


def dev_warnings(path, processes):
    """Return how many warnings a process gives if none of them looks at dev, or the second."""
    logits, targets, counts = torch.zeros(4, 4), torch.arange(4), []
    for looks in (False, True):
        criterion = TaughtLoss(path, 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(6):
                criterion(logits, targets)
                criterion.step()
                if looks and step == 0 and processes.rank == 1:
                    criterion.observe_dev(logits, targets)
        counts.append(sum("TaughtLoss" in str(w.message) for w in caught))
    return counts


def test_the_first_process_alone_tells_that_dev_is_missed(tmp_path):
    spec = TeacherSpec(slots=3, features=["progress", "dev_nll"])
    loss = LossSpec("dense", "softplus")
    header = TeacherHeader(spec, loss, 4, 6, 2, {"kind": "classes", "num_classes": 4})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 4, 2, seed=2), header)
    counts = in_two_processes(tmp_path, functools.partial(dev_warnings, path))
    assert counts == [[1, 0], [0, 0]]


def share_batches(processes):
    return [estimate(case, processes) for case in CASES]


class Skipping(nn.Module):
    """A layer for rows that begin with a positive number only: shares of a batch may lack them."""

    input_shape = (6,)

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        marked = (x[:, 0] > 0.0).nonzero().flatten()
        if len(marked):
            hidden = hidden.index_add(0, marked, torch.tanh(self.layer(hidden[marked])))
        return self.last(hidden)


def skipping_estimate(hvp, processes):
    student = ToyStudent(Skipping, OptimiserSpec("momentum", 0.3), steps=4)
    # Sorted, so that as a rule only the second of two processes sees a marked row.
    plain = student.batch
    student.batch = lambda step: plain(step).sort()[0]
    student.x[:, 0] = torch.linspace(-3.0, 1.0, len(student.x), dtype=student.x.dtype)
    names = student.default_features
    teacher = build_teacher(
        TeacherSpec(slots=3, init_scale=0.3), LOSS, 3, feature_count(names, 3), seed=1
    ).double()
    engine = Engine(Life(student, processes=processes), LOSS, TrainingSpec(hvp=hvp))
    return exact(Episode(engine, names, 3, 0), teacher, lambda phase, step: None).estimates[0]


def skipping_estimates(processes):
    return [skipping_estimate(hvp, processes) for hvp in SECOND.names()]


def test_parameters_that_one_share_of_a_batch_does_not_use(tmp_path):
    both = in_two_processes(tmp_path, skipping_estimates)
    for first, second, alone in zip(*both, skipping_estimates(ALONE), strict=True):
        torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(second, alone, rtol=1e-5, atol=1e-8)


def test_shared_batches_give_one_processs_hypergradient(tmp_path):
    both = in_two_processes(tmp_path, share_batches)
    for case, first, second in zip(CASES, *both, strict=True):
        alone, smoothed, recomputed = estimate(case, ALONE)
        assert (recomputed > 0) == ("memory" in case[2])
        for found in (first, second):
            tolerance = 1e-5 if case[2].get("hvp") else 1e-9  # differences divide rounding by h
            torch.testing.assert_close(found[0], alone, rtol=tolerance, atol=tolerance * 1e-3)
            assert found[1] == pytest.approx(smoothed, rel=1e-12)
        assert torch.equal(first[0], second[0])


def choose(processes):
    """Train a teacher, its students and the final ones dealt out; return what says it all."""
    student = ToyStudent(STUDENTS["mlp"], OptimiserSpec("momentum", 0.3), steps=5)
    spec = TrainingSpec(episodes=2, students=2, finalists=2, final_students=3, lr=0.02)
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        result = train_teacher(
            student, LOSS, TeacherSpec(slots=2), spec, folder, record={}, processes=processes
        )
        kept = folder.teacher_best
        digest = hashlib.sha256(kept.read_bytes()).hexdigest() if kept.exists() else ""
    return result.best_measure, result.best_episode, digest


def test_final_students_are_dealt_out_and_choose_the_same_teacher(tmp_path):
    first, second = in_two_processes(tmp_path, choose)
    assert first == choose(ALONE) and first[2]
    assert second == (*first[:2], "")  # the first process alone writes


def deal(processes):
    mine = [10 * i for i in processes.share(5)]
    refusals = []

    def refused():
        if processes.rank == 1:
            raise UserError("only here")

    try:
        processes.agree(refused)
    except UserError as error:
        refusals.append((type(error).__name__, str(error)))
    agreed = processes.agree(lambda: processes.rank)
    return processes.gather(mine), processes.from_first(processes.rank), refusals, agreed


def test_students_are_dealt_out_and_gathered_in_order(tmp_path):
    first, second = in_two_processes(tmp_path, deal)
    assert first == ([0, 10, 20, 30, 40], 0, [("UserError", "only here")], 0)
    assert second == ([0, 10, 20, 30, 40], 0, [("ToldByTheFirst", "only here")], 1)


def tell(processes):
    if processes.rank == 0:
        tell_the_others()
        return True
    return wait_until_told()


def test_the_others_wait_until_the_first_has_told(tmp_path):
    assert in_two_processes(tmp_path, tell) == [True, True]


def test_how_long_the_others_wait(monkeypatch):
    """Until they know: not less where the first is slow, no longer where it has ended."""
    answers = iter([False, False, False, True])
    store = types.SimpleNamespace(check=lambda keys: next(answers))
    monkeypatch.setattr("l2t_core.runs.processes._store", lambda: store)
    assert wait_until_told() and next(answers, "all asked") == "all asked"

    def gone(keys):
        raise RuntimeError("Connection reset by peer")

    store.check = gone
    assert wait_until_told()
    monkeypatch.setattr("l2t_core.runs.processes._TELLING", 0.1)
    store.check = lambda keys: False
    assert not wait_until_told()
    monkeypatch.setattr("l2t_core.runs.processes._store", lambda: None)  # they have not met
    assert not wait_until_told()


def lose_one(processes):
    if processes.rank == 1:
        return "gone"
    try:
        for _ in range(50):
            processes.gather([0])
    except PeerLost as error:
        return str(error)
    return "not noticed"


def test_a_lost_process_is_noticed(tmp_path):
    first, _ = in_two_processes(tmp_path, lose_one)
    assert "process 0 of 2 lost another one" in first
    assert first.endswith("see that one's message")


def tell_a_loss(processes):
    processes.gather([0])
    return is_first_to_tell_a_loss()


def test_one_of_the_survivors_tells_of_a_loss(tmp_path, monkeypatch):
    assert sorted(in_two_processes(tmp_path, tell_a_loss)) == [False, True]
    assert is_first_to_tell_a_loss()  # of no group: left by now, or never met

    def gone(key, amount):
        raise RuntimeError("Connection reset by peer")

    store = types.SimpleNamespace(add=gone)
    monkeypatch.setattr("l2t_core.runs.processes._store", lambda: store)
    assert is_first_to_tell_a_loss()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes_is_not_waited_for(monkeypatch, rank):
    """Started by hand, nobody else would tell: the first hosts the meeting, the others go there."""
    monkeypatch.setattr("l2t_core.runs.processes._MEETING", timedelta(seconds=2))
    with reserved_port() as port:
        for name, value in {
            "RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=r"2 processes could not meet .*start all of them"):
            join_processes()


ALONE_AT_THE_MEETING = """
import signal, sys
from l2t_core.runs.processes import join_processes
def told(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGINT, told), signal.signal(signal.SIGTERM, told)
join_processes()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_can_be_ended(tmp_path, number):
    with reserved_port() as port:
        child = start_python(
            "-c", ALONE_AT_THE_MEETING, cwd=tmp_path,
            RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
        while child.poll() is None:  # until it keeps the store, which waits for the other's
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
    child.send_signal(number)
    _, err = end_of(child)
    assert child.returncode == -number, err


def test_rows_are_shared_without_rest():
    batch = {"x": torch.arange(14).view(7, 2), "y": torch.arange(7)}
    pieces = [shard_rows(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([p["x"] for p, _ in pieces]), batch["x"])
    assert sum(share for _, share in pieces) == pytest.approx(1.0)
    for unfit in (torch.arange(2), [torch.arange(4), torch.arange(5)], torch.tensor(3)):
        with pytest.raises(UserError, match="cannot share"):
            shard_rows(unfit, 0, 3)


def test_what_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="some of 4 processes without one"):
        check_processes(TrainingSpec(students=3), 4)
    check_processes(TrainingSpec(students=3, parallel="data"), 4)
    check_processes(TrainingSpec(students=4, differentiation="windows", window=2), 4)
    from l2t_core.runs.processes import Processes

    student = ToyStudent(STUDENTS["conv_bn"], OptimiserSpec("sgd", 0.1))
    with pytest.raises(UserError, match=r"layer 'layers\.1' \(batch norm\)"):
        Life(student, processes=Processes(0, 2))


@pytest.mark.parametrize(
    ("local", "gpus", "takes", "backend"),
    [(1, 2, 1, "cpu:gloo,cuda:nccl"), (3, 2, 1, "cpu:gloo,cuda:gloo")],
)
def test_processes_share_gpus_that_are_too_few(monkeypatch, local, gpus, takes, backend):
    world = local + 1
    for name, value in {"RANK": local, "WORLD_SIZE": world, "LOCAL_RANK": local,
                        "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    dist = torch.distributed
    monkeypatch.setattr("l2t_core.runs.processes._form_group", seen.append)
    monkeypatch.setattr(dist, "get_rank", lambda: local)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    assert join_processes().rank == local
    assert seen == [takes, backend]
