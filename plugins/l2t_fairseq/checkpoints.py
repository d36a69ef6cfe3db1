"""fairseq's checkpoints as plain data: read safely, written so that everybody can read them.

A checkpoint of ``fairseq-train`` holds its model's flags as an ``argparse.Namespace`` and the
meters of ``--eval-bleu`` as numpy arrays. Since 2.6 torch reads neither unless told to.
Dictionaries and lists say the same, and every command of fairseq takes them.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_file
from l2t_fairseq.compat import ADD_SAFE_GLOBALS, quiet_fairseq, register_safe_globals

# What a trained student is without the way it was trained: fairseq's own names.
_STOCK_TASK, _STOCK_CRITERION, _STOCK_METRIC = "translation", "cross_entropy", "loss"
_OURS = "l2t_"
_PICKLE = b"\x80"


def plain(value: Any) -> Any:
    """Return ``value`` with namespaces, configurations, enums and numpy values as plain Python."""
    if isinstance(value, Namespace):
        value = vars(value)
    elif OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    elif isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        # The same type of dictionary: fairseq's meters come in ordered ones.
        return type(value)((key, plain(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


def plain_checkpoint(state: Any) -> Any:
    """Return a checkpoint whose settings and meters are plain; tensors stay as they are."""
    if not isinstance(state, dict) or "model" not in state:
        return state
    changed = {key: plain(state[key]) for key in ("args", "cfg") if key in state}
    extra = state.get("extra_state")
    if isinstance(extra, dict) and "metrics" in extra:
        changed["extra_state"] = {**extra, "metrics": plain(extra["metrics"])}
    return {**state, **changed}


def save_plainly() -> None:
    """Make fairseq write plain checkpoints from now on, each whole or not at all.

    It writes the first of a save beside its place and copies the others, ``checkpoint_last.pt``
    among them, over what is there: killed in between, it could not go on. A second call does
    nothing.
    """
    from fairseq import checkpoint_utils

    module: Any = checkpoint_utils
    save, manager = module.torch_persistent_save, module.PathManager
    if getattr(save, "l2t_plain", False):
        return

    def torch_persistent_save(obj: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        return save(plain_checkpoint(obj), filename, *args, **kwargs)

    class WholeCopies(manager):  # type: ignore[misc, valid-type]
        @staticmethod
        def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
            if "://" in dst_path:  # a store of its own kind
                return manager.copy(src_path, dst_path, overwrite)
            copied = manager.copy(src_path, f"{dst_path}.tmp", True)
            Path(f"{dst_path}.tmp").replace(dst_path)
            return copied

    torch_persistent_save.l2t_plain = True  # type: ignore[attr-defined]
    module.torch_persistent_save, module.PathManager = torch_persistent_save, WholeCopies


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a fairseq checkpoint holds, without executing anything in it.

    Raises:
        UserError: if it cannot be read, is no fairseq checkpoint, or holds more than plain data.
    """
    register_safe_globals()
    try:
        with path.open("rb") as handle:
            state = _load(handle, path)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict) or not all(isinstance(t, Tensor) for t in model.values()):
        raise UserError(
            f"{path} holds no fairseq model; give a checkpoint_best.pt of fairseq-train"
        )
    settings = plain(state.get("cfg"))
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise UserError(
            f"{path} holds no settings of its model (cfg); fairseq of 2020 and before wrote such "
            "files: load and save it with a newer fairseq first"
        )
    return {**state, "cfg": settings}


def _load(handle: BinaryIO, path: Path) -> Any:
    try:
        return torch.load(handle, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names what it refused: "Unsupported global: GLOBAL posix.system was not an ...".
        # Before torch 2.4: "Unsupported class argparse.Namespace"; it cannot be told to allow it.
        named = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
        if named is None:
            raise UserError(_damaged(path)) from None
        newer = "" if ADD_SAFE_GLOBALS else ", or read it with torch 2.4 or later"
        raise UserError(
            f"{path} holds {named.group(1)}, and loading that could run code; only plain data "
            f"is read. If you made the file yourself, save it again with the plugin loaded{newer}"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, TypeError):
        raise UserError(_damaged(path)) from None


def _damaged(path: Path) -> str:
    return f"{path} is no checkpoint or is cut short; copy it again"


def refuse_cut_short(path: Path, mend: str) -> None:
    """Refuse a checkpoint without its end, which fairseq does not name when it meets it.

    Cheap: the tensors are not read.

    Raises:
        UserError: with ``mend``, if the file is there and cut short, empty or something else.
    """
    if not path.is_file() or zipfile.is_zipfile(path):
        return
    with path.open("rb") as handle:
        if handle.read(1) != _PICKLE:  # as torch before 1.6 wrote it, which has no such end
            raise UserError(f"{path} is no checkpoint or is cut short; {mend}")


def export_checkpoint(
    sources: Sequence[Path], target: Path, *, ema: bool = False
) -> dict[str, int | str]:
    """Write the student in ``sources`` as a checkpoint that knows nothing of its teacher.

    The plugin's task and criterion become fairseq's ``translation`` and ``cross_entropy``; the
    optimiser, the meters, s_t and our own settings are left out. Of several checkpoints the
    parameters are averaged, and everything else is the first one's. With ``ema`` the parameters
    are the running averages of ``--store-ema``. Returns the architecture, task, criterion, updates
    and number of parameters.

    Raises:
        UserError: if a source is no checkpoint that can be read safely, holds no running averages
            that were asked for or another model than the first, or if ``target`` cannot be
            written.
    """
    for source in sources:
        if target.exists() and source.exists() and target.samefile(source):
            raise UserError(f"--to {target} is a checkpoint to read; choose another file")
    exported: dict[str, Any] = {}
    for source in sources:
        state = clean_state(read_checkpoint(source), source, ema=ema)
        if exported:
            _add(exported["model"], state["model"], source)
        else:
            exported = state
            if len(sources) > 1:
                exported["model"] = {k: _full(t) for k, t in state["model"].items()}
    if len(sources) > 1:
        exported["model"] = {
            k: t / len(sources) if t.is_floating_point() else t
            for k, t in exported["model"].items()
        }
    try:
        with atomic_file(target) as handle:
            torch.save(exported, handle)
    except RuntimeError as error:  # torch's own writer has no OSError
        raise UserError(f"cannot write {target}: {str(error).splitlines()[0]}") from None
    settings = exported["cfg"]["model"]
    return {
        "architecture": str(settings.get("arch") or _name(settings)),
        "updates": exported["optimizer_history"][-1]["num_updates"],
        "parameters": sum(t.numel() for t in exported["model"].values()),
        **{k: _name(exported["cfg"].get(k)) for k in ("task", "criterion")},
    }


def unknown_to_fairseq(architecture: str, task: str) -> list[str]:
    """Return those of a checkpoint's parts, as flags, that fairseq has only from a --user-dir."""
    with quiet_fairseq():  # it advertises optional packages as it is imported
        from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
        from fairseq.tasks import TASK_REGISTRY
    there = {"--arch": {*ARCH_MODEL_REGISTRY, *MODEL_REGISTRY}, "--task": {*TASK_REGISTRY}}
    given = {"--arch": architecture, "--task": task}
    return [f"{flag} {name}" for flag, name in given.items() if name not in there[flag]]


def _full(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in its own precision, but not in less than float32, to be summed into."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _add(total: dict[str, Tensor], other: dict[str, Tensor], source: Path) -> None:
    """Add the parameters of ``source`` in place, in the order and precision of fairseq's script."""
    if {k: t.shape for k, t in total.items()} != {k: t.shape for k, t in other.items()}:
        raise UserError(
            f"{source} holds another model than the first checkpoint; average those of one run"
        )
    for key, tensor in total.items():
        if tensor.is_floating_point():
            total[key] = tensor + other[key].to(tensor.dtype)


def clean_state(state: dict[str, Any], source: Path, *, ema: bool = False) -> dict[str, Any]:
    """Return the checkpoint that :func:`export_checkpoint` writes of one source.

    Raises:
        UserError: if there are no running averages and ``ema`` asks for them.
    """
    extra = state.get("extra_state") or {}
    model = extra.get("ema") if ema else state["model"]
    if not model:
        raise UserError(f"{source} holds no running averages; train with --store-ema, or no --ema")
    history = (state.get("optimizer_history") or [{}])[-1]
    return {
        "args": None,
        "cfg": _stock_settings(state["cfg"]),
        "model": model,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": str(history.get("optimizer_name", "FairseqAdam")),
                "lr_scheduler_state": {},
                "num_updates": int(history.get("num_updates", 0)),
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "last_optimizer_state": None,
    }


def _stock_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return fairseq's settings with ours left out or replaced by fairseq's own."""
    cfg = _without_ours(settings)
    criterion = settings.get("criterion")
    averaged = bool(criterion.get("sentence_avg")) if isinstance(criterion, dict) else False
    if _name(criterion).startswith(_OURS):
        cfg["criterion"] = {"_name": _STOCK_CRITERION, "sentence_avg": averaged}
    if _name(settings.get("task")).startswith(_OURS):
        cfg["task"]["_name"] = _STOCK_TASK
    # Under argparse a model's settings are all flags of the command.
    stock = {
        "task": _STOCK_TASK,
        "criterion": _STOCK_CRITERION,
        "best_checkpoint_metric": _STOCK_METRIC,
    }
    for part in (cfg["model"], cfg["task"], cfg.get("checkpoint") or {}):
        for flag, value in stock.items():
            if str(part.get(flag)).startswith(_OURS):
                part[flag] = value
        if "user_dir" in part:
            part["user_dir"] = None
    cfg.setdefault("common", {})["user_dir"] = None
    return cfg


def _without_ours(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_ours(item)
            for key, item in value.items()
            if not str(key).startswith(_OURS)
        }
    return value


def _name(section: Any) -> str:
    name = section.get("_name") if isinstance(section, dict) else section
    return str(name or "")
