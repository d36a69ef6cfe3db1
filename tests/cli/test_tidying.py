"""Taking back what a failed command wrote, also where several processes do so at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from l2t_cli.tidying import FreshFolder


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
