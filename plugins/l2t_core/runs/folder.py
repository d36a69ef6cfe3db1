"""A run's folder: its configuration, its log, its state and what it made.

=========================  =======================================================================
config.yaml                the configuration as resolved (JSON is YAML)
metrics.jsonl              one JSON object per finished episode or event
state.safetensors          everything needed to go on, replaced whole after every episode
teacher_best.safetensors   the teacher with the best true dev measure
teacher_last.safetensors   the teacher after the last episode
teacher_lived.safetensors  the losses of the best life whose loss changed within it
=========================  =======================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write, claim, is_unfinished, sweep
from l2t_core.runs.tensor_digest import tensor_digest

# Keys, by their last part, whose values are hashes; a reader is told what has changed in words.
_HASHED = {
    "data_sha256": "the data are others",
    "code_sha256": "your own code is another",
    "start_sha256": "the checkpoint that students start from is another",
    "reference_sha256": "the reference text is another",
    "teacher": "the teacher is another",
}


class RunFolder:
    """Paths and atomic writes of one run's folder; open it with :func:`open_run`.

    ``grown`` tells whether more is asked of the run now than before. ``asked`` is a configuration
    that says so, or how the run is made now, until :meth:`adopt` has written it down.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.grown = False
        self.asked: dict[str, Any] | None = None
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.state = path / "state.safetensors"
        self.teacher_best = path / "teacher_best.safetensors"
        self.teacher_last = path / "teacher_last.safetensors"
        self.teacher_lived = path / "teacher_lived.safetensors"

    def files(self) -> list[Path]:
        """Return the files that a run writes, there or not."""
        return [
            self.config, self.metrics, self.state, self.teacher_best, self.teacher_last,
            self.teacher_lived,
        ]

    def adopt(self) -> None:
        """Write down the configuration that is asked for now, once the run can go on with it."""
        if self.asked is not None:
            _write_config(self, self.asked)
            self.asked = None

    def save_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Replace the run's state by ``tensors`` and the JSON-compatible ``record``."""
        save_tensors_and_record(self.state, tensors, record)

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what :meth:`save_state` kept, or None if the run has not got that far.

        Raises:
            UserError: if the state is damaged.
        """
        return load_tensors_and_record(self.state)

    def write_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Replace the log by ``rows``: after a kill it again says what the state says."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        atomic_write(self.metrics, text)


def save_tensors_and_record(
    path: Path, tensors: dict[str, Tensor], record: dict[str, Any]
) -> None:
    """Replace the file ``path`` by ``tensors`` and the JSON-compatible ``record``, whole."""
    content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(record)
    kept = {"record": text, "sha256": tensor_digest(content, text)}
    atomic_write(path, safetensors.torch.save(content, kept))


def load_tensors_and_record(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return tensors and record of a state file, or None if there is none.

    Raises:
        UserError: if it is damaged, something else, or cannot be read.
    """
    if not path.exists():
        return None
    wrong = "is damaged"
    try:
        with path.open("rb"):  # safetensors words what the system refuses in its own way
            pass
        with safetensors.safe_open(path, framework="pt") as handle:
            kept = handle.metadata() or {}
            if "record" in kept:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
                # One flipped bit would go on to another result. Older files have no digest.
                if kept.get("sha256") not in (None, tensor_digest(tensors, kept["record"])):
                    raise ValueError
                return tensors, json.loads(kept["record"])
            wrong = "holds no state that a run has kept"
    except IsADirectoryError:
        wrong = "is a folder, where a run keeps its state"
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; change its permissions") from error
    except (SafetensorError, ValueError, OSError):
        pass
    raise UserError(f"{path} {wrong}; delete it to start this run afresh")


def open_run(
    path: Path, config: dict[str, Any], resume: bool = True, may_grow: str = "",
    may_change: Collection[str] = (), defaults: Mapping[str, Any] | None = None,
) -> RunFolder:
    """Open ``path`` for the run that ``config`` describes, new or to be resumed.

    The number at the dotted key ``may_grow`` may be greater than it was: the run then goes on.
    The keys and sections in ``may_change`` do not decide what comes out; they may differ. A
    setting that is younger than a stored run had there what it has in ``defaults``, which are laid
    out as ``config``. What differs is written by :meth:`RunFolder.adopt`, for a run that cannot go
    on has to stay as it is.

    Raises:
        UserError: if the folder holds another run or other files, if it holds this run and
            ``resume`` is false, if another command is at work in it, or if it cannot be written.
    """
    folder = RunFolder(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder")
    with contextlib.ExitStack() as held:
        # Before it is looked at: of two that begin at once, each would find it empty.
        held.callback(os.close, claim(path))
        if folder.config.exists():
            changed = _check_same_run(folder, config, may_grow, may_change, defaults or {})
            folder.grown, folder.asked = may_grow in changed, config if changed else None
            if not resume and folder.state.exists():
                raise UserError(
                    f"{path} already holds this run; drop --no-resume to continue it, or choose "
                    "another --out"
                )
        elif not all(is_unfinished(p, folder.config) for p in path.iterdir()):
            raise UserError(f"{path} is not empty and holds no run of ours; choose another --out")
        else:
            _write_config(folder, config)
        if not os.access(path, os.W_OK):
            raise UserError(f"cannot write to {path}; choose another --out")
        sweep(path, folder.files())
        weakref.finalize(folder, held.pop_all().close)  # claimed as long as ``folder`` lives
    return folder


def _write_config(folder: RunFolder, config: dict[str, Any]) -> None:
    atomic_write(folder.config, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_same_run(
    folder: RunFolder, config: dict[str, Any], may_grow: str, may_change: Collection[str],
    defaults: Mapping[str, Any],
) -> set[str]:
    """Return the keys in which ``config`` differs from the stored one, if it may."""
    try:
        stored = json.loads(folder.config.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("its content is no mapping")
    except (ValueError, OSError) as error:
        raise UserError(f"{folder.config} is unreadable ({error}); choose another --out") from error
    now = flattened(json.loads(json.dumps(config)))
    before = {k: v for k, v in flattened(defaults).items() if k in now} | flattened(stored)
    changed = set()
    # Hashes last: a setting that differs says more, and may be why they do.
    for key in sorted(before.keys() | now.keys(), key=lambda k: (_last(k) in _HASHED, k)):
        if key == may_grow and before.get(key, 0) < now.get(key, 0):
            changed.add(key)
        elif key == may_grow and before.get(key, 0) > now.get(key, 0):
            raise UserError(
                f"{folder.path} holds this run with {key}={before[key]}, which may only grow; "
                f"ask for {before[key]} or more, or choose another --out"
            )
        elif before.get(key) != now.get(key) and any(
            f"{key}.".startswith(f"{free}.") for free in may_change
        ):
            changed.add(key)
        elif before.get(key) != now.get(key):
            there, here = _where_they_part(repr(before.get(key)), repr(now.get(key)))
            said = f"{key} is {there} there, {here} here"
            if _last(key) in _HASHED:
                said = f"{_HASHED[_last(key)]} now than when it began"
            raise UserError(f"{folder.path} holds another run ({said}); choose another --out")
    return changed


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _where_they_part(first: str, second: str) -> tuple[str, str]:
    """Return two different texts, of long ones (a command) the stretch where they first differ."""
    pairs = enumerate(zip(first, second, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    start = max(0, same - 30)

    def stretch(text: str) -> str:
        if len(text) <= 120:
            return text
        end = same + 60
        return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")

    return stretch(first), stretch(second)


def flattened(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dotted keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flattened(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat
