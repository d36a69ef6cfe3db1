"""``l2t doctor``: what is installed, and what that is good for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

from l2t_cli.recipe_reading.fields import import_quietly
from l2t_cli.screen import console
from l2t_core.errors import UserError

DISTRIBUTIONS = (
    "torch",
    "numpy",
    "safetensors",
    "omegaconf",
    "PyYAML",
    "typer",
    "rich",
    "sacrebleu",
    "sacremoses",
    "sentencepiece",
    "subword-nmt",
    "scikit-learn",
    "scipy",
    "Pillow",
    "matplotlib",
    "tensorboard",
    "Babel",
    "num2words",
)


def command() -> None:
    """Show versions and what works here: torch, fairseq, extras, cores."""
    from l2t_core import __version__

    rows = [
        ("l2t", __version__, ""),
        ("Python", platform.python_version(), sys.executable),
        ("cores", str(cores()), f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}"),
    ]
    rows += [(name, *_version(name, f"pip install {name}")) for name in DISTRIBUTIONS]
    tune = 'compare.search=optuna needs it: pip install "l2t[tune]"'
    rows.append(("optuna", *_version("optuna", tune)))
    rows.append(("fairseq", *_fairseq()))
    rows.append(("devices", *_devices()))
    console.table("l2t doctor", ["", "version", "note"], rows)


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _version(distribution: str, mend: str) -> tuple[str, str]:
    try:
        return importlib.metadata.version(distribution), ""
    except importlib.metadata.PackageNotFoundError:
        return "missing", mend


def _fairseq() -> tuple[str, str]:
    """Return version and note of whichever distribution or checkout gives `import fairseq`."""
    try:
        # Before fairseq: after it, importing the plugin registers it, and ends where that fails.
        compat = import_quietly("l2t_fairseq.compat")
        module = import_quietly("fairseq")
    except ModuleNotFoundError:
        return "missing", 'translation needs it: pip install "l2t[nmt]"'
    except ImportError as error:
        return "broken", f"does not import here: {error}"
    try:
        compat.refuse_unusable_versions()
    except UserError as error:
        return "broken", str(error)
    for name in ("fairseq-fixed", "fairseq"):
        try:
            return importlib.metadata.version(name), f"from the distribution {name}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return getattr(module, "__version__", "unknown"), "from a checkout"


def _devices() -> tuple[str, str]:
    try:
        import torch
    except ImportError:
        return "none", "torch does not import"
    if torch.cuda.is_available():
        return f"cpu, {torch.cuda.device_count()} cuda", torch.cuda.get_device_name(0)
    threads = torch.get_num_threads()
    return "cpu", "1 thread" if threads == 1 else f"{threads} threads"
