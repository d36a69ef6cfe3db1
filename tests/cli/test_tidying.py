"""Taking back what a failed command wrote, also where several processes do so at once."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from checkout import end_of, start_python  # type: ignore[import-not-found]

from l2t_cli.errors import exit_code_of
from l2t_cli.tidying import FreshFolder
from l2t_cli.train_teacher import _tidy
from l2t_core.errors import PeerLost, ToldByTheFirst, UserError
from l2t_core.runs.folder import open_run
from l2t_core.runs.processes import Processes


def written(folder: Path) -> None:
    (folder / "inner").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "inner/part"):
        (folder / name).write_text("")


def test_a_folder_that_was_not_there_goes_with_those_above_it(tmp_path: Path) -> None:
    before = FreshFolder.before(tmp_path / "runs/tiny")
    written(tmp_path / "runs/tiny")
    before.take_back()
    assert not list(tmp_path.iterdir())


def test_what_was_there_stays(tmp_path: Path) -> None:
    written(tmp_path / "runs/other")
    before = FreshFolder.before(tmp_path / "runs/tiny")
    written(tmp_path / "runs/tiny")
    before.take_back()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    FreshFolder.before(tmp_path / "runs/other").take_back()
    assert (tmp_path / "runs/other/inner/part").exists()


@pytest.mark.parametrize("taken", ["unlink", "rmtree", "rmdir", "iterdir"])
def test_another_process_takes_it_back_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """Whatever is about to be done, the other one has just done all of it."""
    before = FreshFolder.before(tmp_path / "runs/tiny")
    written(tmp_path / "runs/tiny")
    other = FreshFolder(before.path, before.fresh, before.missing)
    owner = __import__("shutil") if taken == "rmtree" else Path
    action = getattr(owner, taken)

    def beaten(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        other.take_back()
        return action(*arguments, **options)

    monkeypatch.setattr(owner, taken, beaten)
    before.take_back()
    assert not list(tmp_path.iterdir())


def test_many_at_once(tmp_path: Path) -> None:
    failures: list[Exception] = []

    def take_back(before: FreshFolder, start: threading.Barrier) -> None:
        start.wait()
        try:
            before.take_back()
        except Exception as error:
            failures.append(error)

    for _ in range(50):
        before, start = FreshFolder.before(tmp_path / "runs/tiny"), threading.Barrier(4)
        written(tmp_path / "runs/tiny")
        threads = [threading.Thread(target=take_back, args=(before, start)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not list(tmp_path.iterdir())
    assert not failures


@pytest.mark.parametrize("thread", ["this one", "another"])
def test_a_signal_comes_after_all_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thread: str
) -> None:
    """Ctrl-C once more, while the first one's clean-up is at its first file.

    The system hands it to any thread that takes it, and torch has some.
    """
    begin = threading.Event()

    def interrupt() -> None:
        begin.wait()
        signal.raise_signal(signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    before = FreshFolder.before(tmp_path / "runs/tiny")
    written(tmp_path / "runs/tiny")
    unlink = Path.unlink

    def interrupted(path: Path, missing_ok: bool = False) -> None:
        if thread == "this one":
            signal.raise_signal(signal.SIGINT)
        else:
            begin.set()
            other.join()
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", interrupted)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            before.take_back()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        begin.set()
        other.join()
        signal.signal(signal.SIGINT, usual)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "left"), [(0, False), (1, True)])
def test_only_the_first_process_takes_a_run_back(tmp_path: Path, rank: int, left: bool) -> None:
    """Another, a little ahead, may fail while the first is about to write its first state."""
    before = FreshFolder.before(tmp_path / "run")
    opened = open_run(tmp_path / "run", {})
    usual = signal.getsignal(signal.SIGTERM)
    try:
        with (
            pytest.raises(PeerLost, match=r"gone; no episode was finished"),
            _tidy(opened, before, Processes(rank, 2)),
        ):
            raise PeerLost("gone")
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert (tmp_path / "run").exists() == left


# torchrun ends all others as soon as a process has died, whatever they are about to say.
SURVIVOR = """\
import os, signal
from pathlib import Path
from types import SimpleNamespace
from l2t_cli import train_teacher
from l2t_cli.__main__ import main
from l2t_cli.tidying import FreshFolder
from l2t_core.errors import PeerLost
from l2t_core.runs import processes
def ended(place):
    if os.environ["PLACE"] == place:
        os.kill(os.getpid(), signal.SIGTERM)
    return True
def run(*given, **named):
    state = SimpleNamespace(exists=lambda: ended("tidied"))
    both = processes.Processes(1, 2)
    with train_teacher._tidy(SimpleNamespace(state=state), FreshFolder.before(Path("run")), both):
        raise PeerLost("another one was lost")
processes.is_first_to_tell_a_loss = lambda: ended("told")
train_teacher.run = run
main()
"""


@pytest.mark.parametrize("place", ["tidied", "told"])
def test_a_survivor_tells_of_the_lost_one_before_it_is_ended(tmp_path: Path, place: str) -> None:
    child = start_python("-c", SURVIVOR, "train-teacher", "digits", cwd=tmp_path, PLACE=place)
    _, err = end_of(child)
    said = "another one was lost; the finished episodes are kept; the same command continues"
    assert (child.returncode, err) == (3, f"l2t: error: {said}\n")



@pytest.mark.parametrize("first", [True, False])
def test_one_survivor_tells_of_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    monkeypatch.setattr("l2t_core.runs.processes.is_first_to_tell_a_loss", lambda: first)
    assert exit_code_of(PeerLost("process 0 of 3 lost another one")) == 3
    said = "l2t: error: process 0 of 3 lost another one\n"
    assert capsys.readouterr().err == (said if first else "")


@pytest.mark.parametrize(
    ("found", "said"),
    [(True, ""), (False, "l2t: error: no such file\n"), (KeyboardInterrupt(), "")],
)
@pytest.mark.parametrize("where", ["before they meet", "since"])
def test_a_mistake_of_all_is_left_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str,
    found: bool | KeyboardInterrupt, said: str,
) -> None:
    """It tells it, or has not met it, or has told it and ended, for which all are ended."""

    def wait() -> bool:
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("l2t_core.runs.processes.wait_until_told", wait)
    error = ToldByTheFirst("no such file") if where == "since" else UserError("no such file")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_code_of(error) == 2
    assert capsys.readouterr().err == said
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code_of(UserError("no such file")) == 2
    assert capsys.readouterr().err == "l2t: error: no such file\n"
