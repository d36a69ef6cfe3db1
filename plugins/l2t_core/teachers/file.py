"""The teacher file: theta as safetensors, and a JSON header that says what it fits.

Loading reads numbers and JSON only: nothing in the file can execute.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.losses.forms import FORMS
from l2t_core.losses.taught import SIGMAS
from l2t_core.runs.files import atomic_write
from l2t_core.runs.tensor_digest import tensor_digest
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.state import FEATURES, feature_count
from l2t_core.teachers.architectures import TEACHERS, Teacher, build_teacher

FORMAT = "l2t-teacher"
VERSION = 1
_KINDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # of theta's numbers


@dataclass
class TeacherHeader:
    """What a teacher file says of its teacher.

    ``teacher.features`` is filled in. ``total_steps`` (T) and ``dev_interval`` are those of the
    students it was trained on, in steps; ``fingerprint`` is what a student must match;
    ``record`` tells how the teacher came about.
    """

    teacher: TeacherSpec
    loss: LossSpec
    num_classes: int
    total_steps: int
    dev_interval: int
    fingerprint: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def sees(self) -> list[str]:
        """The features of s_t that phi_t depends on: none of a static teacher's."""
        return self.teacher.features if TEACHERS.get(self.teacher.name).sees else []

    @property
    def reads_dev(self) -> bool:
        """Whether the teacher looks at what is seen on the dev set."""
        return any(name.startswith("dev_") or name == "class_accuracy" for name in self.sees)

    @property
    def fits_any_size(self) -> bool:
        """Whether no part of phi_t, and none of s_t that it depends on, is a single class's."""
        return not FORMS.get(self.loss.form).per_class and "class_accuracy" not in self.sees

    def loss_for(self, total_steps: int, warmup_steps: int | None = None) -> LossSpec:
        """Return the loss for a student of ``total_steps``, its warm-up scaled by T'/T."""
        if warmup_steps is None:
            warmup_steps = round(self.loss.warmup_steps * total_steps / self.total_steps)
            if self.loss.warmup_steps < self.total_steps:  # nor is it all of a short life
                warmup_steps = min(warmup_steps, total_steps - 1)
        return dataclasses.replace(self.loss, warmup_steps=warmup_steps)

    def dev_interval_for(self, total_steps: int) -> int:
        """Return the steps between dev refreshes for a student of ``total_steps``."""
        return max(1, round(self.dev_interval * total_steps / self.total_steps))


def save_teacher(path: Path, teacher: Teacher, header: TeacherHeader) -> None:
    """Write ``teacher`` and ``header`` to ``path``, whole or not at all.

    Raises:
        UserError: if the file cannot be written.
    """
    tensors = {k: v.detach().cpu().contiguous() for k, v in teacher.state_dict().items()}
    known = dataclasses.asdict(header)
    content = {
        "format": FORMAT, "version": VERSION, "header": known, "sha256": _digest(tensors, known)
    }
    # One metadata entry: safetensors writes several in random order, and equal teachers should
    # be equal files.
    metadata = {"l2t": json.dumps(content, sort_keys=True)}
    atomic_write(path, safetensors.torch.save(tensors, metadata))


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    return tensor_digest(tensors, json.dumps(header, sort_keys=True))


def _read_content(path: Path | str) -> dict[str, Any]:
    """Return format, version and header as ``path`` holds them, {} if it holds none.

    Raises:
        UserError: if the file is missing, unreadable, cut short or no safetensors file.
    """
    try:
        with Path(path).open("rb") as handle:
            length = struct.unpack("<Q", handle.read(8))[0]
            if length > 100_000_000:
                raise ValueError("header too long")
            metadata = json.loads(handle.read(length)).get("__metadata__", {})
            content = json.loads(metadata.get("l2t", "{}"))
    except FileNotFoundError:
        raise UserError(
            f"no teacher file at {path}; `l2t train-teacher` writes teacher_best.safetensors"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the teacher file {path}: {error.strerror}") from error
    except (ValueError, TypeError, struct.error, AttributeError, RecursionError):
        raise UserError(
            f"{path} is not a teacher file or is cut short; give a file that "
            "`l2t train-teacher` wrote, or copy it again"
        ) from None
    return content if isinstance(content, dict) else {}


def load_teacher(path: Path | str) -> tuple[Teacher, TeacherHeader]:
    """Return the teacher in ``path``, frozen, with its header.

    Raises:
        UserError: if the file is missing, cut short, damaged, of another format or version, or if
            its tensors do not have the shapes that its header says, or are no finite real numbers.
    """
    content = _read_content(path)
    header = _header_in(content, path)
    features = feature_count(header.teacher.features, header.num_classes)
    try:
        tensors = safetensors.torch.load(Path(path).read_bytes())
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); copy it again") from error
    # Without memory until its shapes are known to be those of the file: a header may claim any.
    try:
        with torch.device("meta"):
            teacher = build_teacher(
                header.teacher, header.loss, header.num_classes, features, seed=0
            )
    except (RuntimeError, OverflowError) as error:  # sizes beyond what numbers can count
        raise UserError(f"{path}: damaged header ({error}); train the teacher again") from error
    expected = {k: tuple(v.shape) for k, v in teacher.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if expected != found:
        wrong = sorted(k for k in expected | found if expected.get(k) != found.get(k))[0]
        raise UserError(
            f"{path}: {wrong} has shape {found.get(wrong)}, its header says "
            f"{expected.get(wrong)}; the file is damaged, train the teacher again"
        )
    kinds = sorted({str(v.dtype) for v in tensors.values()})
    if len(kinds) > 1 or next(iter(tensors.values())).dtype not in _KINDS:
        raise UserError(
            f"{path}: its numbers are {' and '.join(kinds)}, a teacher's are of one floating-point "
            "kind; the file is damaged, train the teacher again"
        )
    bad = sorted(k for k, v in tensors.items() if not bool(v.isfinite().all()))
    if bad:
        raise UserError(f"{path}: {bad[0]} holds numbers that are not finite; train again")
    # Files of earlier versions have none.
    if content.get("sha256") not in (None, _digest(tensors, content["header"])):
        raise UserError(f"{path} is damaged (another checksum than when written); copy it again")
    # Copies, aligned alike in every process: products may round otherwise where memory lies
    # otherwise, and a resumed student has the bits of one that was not interrupted.
    teacher.load_state_dict({k: v.clone() for k, v in tensors.items()}, assign=True)
    return teacher.requires_grad_(False), header


def load_header(path: Path | str) -> TeacherHeader:
    """Return the header of the teacher file ``path`` without reading its tensors.

    Raises:
        UserError: as :func:`load_teacher`.
    """
    return _header_in(_read_content(path), path)


def _header_in(content: dict[str, Any], path: Path | str) -> TeacherHeader:
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path} is a safetensors file but holds no l2t teacher; give the "
            "teacher_best.safetensors of a `l2t train-teacher` run"
        )
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} is a teacher file of version {content.get('version')}, this l2t reads "
            f"version {VERSION}; use the l2t that wrote it or train again"
        )
    if younger := _unknown_parts(content.get("header")):
        raise UserError(
            f"{path} was written by a newer l2t ({younger[0]} is not known here); update l2t, or "
            "train a teacher with this one"
        )
    try:
        header = content["header"]
        parts = {"teacher": TeacherSpec(**header["teacher"]), "loss": LossSpec(**header["loss"])}
        found = TeacherHeader(**{**header, **parts})
        _check_values(found)
        return found
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{path}: damaged header ({error}); train the teacher again") from error


def _unknown_parts(header: object) -> list[str]:
    """Return the keys of a header, and the names in it, that this version has not."""
    found: list[str] = []
    if not isinstance(header, dict):
        return found
    teacher, loss = header.get("teacher"), header.get("loss")
    for where, part, spec in (
        ("", header, TeacherHeader), ("teacher.", teacher, TeacherSpec), ("loss.", loss, LossSpec)
    ):
        if isinstance(part, dict):
            known = {item.name for item in dataclasses.fields(spec)}
            found += [f"{where}{key}" for key in part if key not in known]
    for where, part, key, names in (
        ("teacher.", teacher, "name", TEACHERS.names()), ("loss.", loss, "form", FORMS.names()),
        ("loss.", loss, "sigma", SIGMAS.names()), ("teacher.", teacher, "features", FEATURES),
    ):
        value = part.get(key) if isinstance(part, dict) else None
        for name in value if isinstance(value, list) else [value]:
            if isinstance(name, str) and name not in names:
                found.append(f"{where}{key} {name!r}")
    return found


def _check_values(header: TeacherHeader) -> None:
    """Raise ValueError where a header's value is not of the kind that its name says."""
    whole = {
        "num_classes": header.num_classes,
        "total_steps": header.total_steps,
        "dev_interval": header.dev_interval,
        "teacher.slots": header.teacher.slots,
        "teacher.hidden": header.teacher.hidden,
        "loss.rank": header.loss.rank,
    }
    for name, value in whole.items():
        # Forms without a part for each class have no tensor that would give a wrong K away.
        least, most = (2, 2**24) if name == "num_classes" else (1, 2**40)
        if type(value) is not int or not least <= value < most:
            raise ValueError(f"{name} is {value!r}")
    warmup = header.loss.warmup_steps
    if type(warmup) is not int or not 0 <= warmup < 2**40:
        raise ValueError(f"loss.warmup_steps is {warmup!r}")
    for name in ("ce_mix", "warmup_smoothing"):
        share = getattr(header.loss, name)
        if not isinstance(share, int | float) or not 0.0 <= share < 1.0:
            raise ValueError(f"loss.{name} is {share!r}")
    scale = header.teacher.init_scale
    if type(scale) not in (int, float) or not 0.0 <= scale < math.inf:
        raise ValueError(f"teacher.init_scale is {scale!r}")
    if not isinstance(header.fingerprint, dict) or not isinstance(header.record, dict):
        raise ValueError("fingerprint or record is no table")
    measured = header.record.get("dev_measure")
    if measured is not None and type(measured) not in (int, float):
        raise ValueError(f"record.dev_measure is {measured!r}")
    if not isinstance(header.teacher.features, list) or not header.teacher.features:
        raise ValueError(f"teacher.features is {header.teacher.features!r}")
    names = [header.teacher.name, header.loss.form, header.loss.sigma, *header.teacher.features]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"names are {names!r}")


def size_of(header: TeacherHeader) -> str:
    """Return what a teacher fits: ``10 classes`` or ``10,152 dictionary entries``."""
    return _size(header.fingerprint.get("kind", "classes"), header.num_classes)


def _size(kind: str, number: int) -> str:
    return f"{number:,} {kind if kind == 'classes' else f'{kind} entries'}"


def check_teacher(path: Path, fingerprint: dict[str, Any]) -> None:
    """Check that ``path`` holds a whole teacher, for a student with ``fingerprint``.

    Raises:
        UserError: as :func:`load_teacher` and :func:`check_fits`.
    """
    _, header = load_teacher(path)
    check_fits(header, fingerprint, path)


def check_fits(header: TeacherHeader, fingerprint: dict[str, Any], path: Path | str) -> None:
    """Check that a student with ``fingerprint`` can be taught by this teacher.

    A loss without a part for each class fits any number of them, unless the teacher looks at each
    class's accuracy.

    Raises:
        UserError: with both sizes side by side where it cannot.
    """
    theirs, ours = header.fingerprint, fingerprint
    if theirs.get("kind") == ours.get("kind") and header.fits_any_size:
        return
    if theirs.get("kind") != ours.get("kind"):
        raise UserError(
            f"teacher {path} was trained for {size_of(header)}, the student has "
            f"{_size(str(ours.get('kind')), ours['num_classes'])}; train a teacher on this task"
        )
    if theirs.get("num_classes") != ours.get("num_classes"):
        mend = "use the data the teacher was trained with, or train a teacher on this data"
        if not FORMS.get(header.loss.form).per_class:
            mend = "it looks at each class's accuracy: train one whose teacher.features lack "
            mend += "class_accuracy"
        raise UserError(
            f"teacher {path} does not fit: it was trained for {size_of(header)}, the student has "
            f"{ours.get('num_classes'):,}; {mend}"
        )
    if FORMS.get(header.loss.form).per_class and theirs.get("sha256") != ours.get("sha256"):
        raise UserError(
            f"teacher {path} does not fit: both have {ours.get('num_classes')} entries but in "
            "another order or with other symbols; use the teacher's own dictionary, or train a "
            "teacher on this data"
        )
