"""What differs between versions of torch, numpy and fairseq, kept in one place."""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.metadata
import json
import logging
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np
import omegaconf
import omegaconf.base
import torch

from l2t_core.errors import UserError

# What the plugin stands on in fairseq; 0.12.2, main and fairseq-fixed have it all.
_NEEDED = {
    "fairseq.checkpoint_utils": "torch_persistent_save",
    "fairseq.dataclass": "FairseqDataclass",
    "fairseq.logging.metrics": "get_active_aggregators",
    "fairseq.tasks.translation": "TranslationConfig",
}
_OLDEST_TORCH = (2, 1)
# fairseq's own extensions, made when it was installed, for the numpy of that day.
_COMPILED = ("fairseq.data.data_utils_fast", "fairseq.data.token_block_utils_fast")


def refuse_unusable_versions() -> None:
    """Refuse a torch or a fairseq that the plugin cannot work with.

    Raises:
        UserError: naming the version found and one that works.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _OLDEST_TORCH:
        raise UserError(
            f"torch {torch.__version__} is too old for the plugin; install torch "
            f"{'.'.join(map(str, _OLDEST_TORCH))} or newer"
        )
    import fairseq

    for module, name in _NEEDED.items():
        try:
            there = hasattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            there = False
        if not there:
            raise UserError(
                f"fairseq {getattr(fairseq, '__version__', 'of unknown version')} has no "
                f"{module}.{name}, which the plugin needs; install fairseq-fixed 0.12.3.1 "
                "(Python 3.11 and 3.12) or fairseq 0.12.2 (Python 3.10)"
            )
    _refuse_unusable_extensions()


def _refuse_unusable_extensions() -> None:
    """Refuse extensions that were made for another numpy, as pip's cache of wheels may have them.

    fairseq itself says then, in the middle of a run, that they were never compiled.
    """
    for module in _COMPILED:
        try:
            importlib.import_module(module)
        except (ImportError, ValueError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"fairseq's compiled part {module} does not load with numpy {np.__version__} "
                f"({reason}); compile it anew, with this torch in PIP_CONSTRAINT and "
                "PIP_BUILD_CONSTRAINT: pip install --force-reinstall --no-deps --no-cache-dir "
                f"{_distribution()}"
            ) from error


def _distribution() -> str:
    """Return what pip made the installed fairseq from: a fork has a folder or an address."""
    for name in ("fairseq-fixed", "fairseq"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name)
            origin = json.loads(found.read_text("direct_url.json") or "{}")
            return str(origin.get("url") or f"{name}=={found.version}")
    return "FOLDER_OF_FAIRSEQ"


def newer_settings(config: Any, *names: str) -> dict[str, Any]:
    """Return those of the settings ``names`` that this fairseq knows: 0.12.2 has fewer."""
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def _numpy_globals() -> list[Any]:
    """Return the numpy types and functions that occur in fairseq's checkpoints.

    Numpy 2 moved ``numpy.core`` to ``numpy._core`` and pickles its functions under the new name,
    numpy 1 under the old one; a checkpoint may come from either.
    """
    reconstruct: Any = np.empty(0).__reduce__()[0]  # numpy.*.multiarray._reconstruct
    scalar: Any = np.float64(0).__reduce__()[0]  # numpy.*.multiarray.scalar
    found: list[Any] = [np.ndarray, np.dtype, reconstruct, scalar]
    found += [type(np.dtype(code)) for code in ("i4", "i8", "f4", "f8")]
    return found


def _omegaconf_globals() -> list[Any]:
    """Return the types of a pickled configuration.

    fairseq of early 2021 saved its settings so, and several processes that resume send each other
    one now.
    """
    base = omegaconf.base
    found: list[Any] = [omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.AnyNode]
    found += [base.Metadata, base.ContainerMetadata, collections.defaultdict, dict, list, int]
    return found


# How torch is told which plain data it may read; None before 2.4, which has no such list.
ADD_SAFE_GLOBALS: Any = getattr(torch.serialization, "add_safe_globals", None)


def register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read checkpoints.

    fairseq writes its model configuration as an ``argparse.Namespace``, the meters of
    ``--eval-bleu`` as numpy values and sometimes its settings as they are in memory. All of these
    are plain data; nothing else is let in.
    """
    if ADD_SAFE_GLOBALS is None:
        return
    ADD_SAFE_GLOBALS([Namespace, *_numpy_globals(), *_omegaconf_globals()])
    reconstruct, scalar = _numpy_globals()[2:4]
    named = [(Any, "typing.Any")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        ADD_SAFE_GLOBALS(named)  # pairs (object, name) are understood since torch 2.6


def register_broadcast_globals() -> None:
    """Let processes that resume together read the checkpoint that the first one sends them.

    fairseq sends tensors apart from the rest, and its placeholders for them go through
    ``torch.load``, too.
    """
    from fairseq.distributed import utils

    placeholder: Any = getattr(utils, "_TensorPlaceholder", None)
    if ADD_SAFE_GLOBALS is not None and placeholder is not None:
        ADD_SAFE_GLOBALS([placeholder])


def avoid_fused_encoder() -> None:
    """Keep fairseq 0.12.2 from torch's fused encoder layer, which torch 2 calls differently.

    Its post-norm Transformers take that path in evaluation once weights were loaded, and die of
    "Mask Type should be defined". Later versions have no such path, and this does nothing there.

    For that path every encoder layer keeps a second copy of its parameters, which no gradient
    reaches: zeros until a checkpoint is loaded, then the loaded parameters. Here the copies stay
    as they were saved, so that a resumed run's checkpoints are those of a run that was not killed.
    """
    from fairseq.modules import transformer_layer

    layer: Any = transformer_layer.TransformerEncoderLayerBase
    if "load_to_BT" not in layer.__init__.__code__.co_names:
        return
    # The layer sets this to True as its weights are loaded; a property stays False.
    layer.load_to_BT = property(lambda self: False, lambda self, value: None)
    own_load = layer._load_from_state_dict

    def load(self: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        # Without them, as in a checkpoint of another version, the layer's own loading adds them.
        saved = f"{prefix}in_proj_weight" in state
        loads = torch.nn.Module._load_from_state_dict if saved else own_load
        loads(self, state, prefix, *rest)

    layer._load_from_state_dict = load


@contextlib.contextmanager
def quiet_fairseq() -> Iterator[None]:
    """Silence fairseq's information lines, which would break a progress display."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
