"""Teachers that come with l2t, for students of any number of classes, by name."""

from __future__ import annotations

from pathlib import Path

from l2t_core.errors import UserError, suggestion

# A folder each: students are told apart by the folder of their teacher.
_FOLDER = Path(__file__).parent / "ready"


def ready_teachers() -> dict[str, Path]:
    """Return the files of the teachers that come with l2t, by name."""
    paths = sorted(_FOLDER.glob("*/teacher.safetensors"))
    return {path.parent.name: path for path in paths}


def find_teacher(given: str | Path) -> Path:
    """Return the path of a teacher given as a file, or by the name of one that comes with l2t.

    A file of that name comes first. One that is not there is told of by who reads it.

    Raises:
        UserError: if it is neither, and nearly such a name, which is suggested.
    """
    path, name = Path(given), str(given)
    if path.suffix or len(path.parts) != 1 or path.exists():
        return path
    ready = ready_teachers()
    if name in ready or not (hint := suggestion(name, ready)):
        return ready.get(name, path)
    raise UserError(
        f"no teacher file {name}, and none that comes with l2t{hint} (`l2t teachers ls` lists them)"
    )
