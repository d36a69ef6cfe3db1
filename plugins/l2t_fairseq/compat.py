"""What differs between versions of torch and numpy, kept in one place."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import torch


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


def register_safe_globals() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read checkpoints.

    fairseq writes its model configuration as an ``argparse.Namespace`` and the meters of
    ``--eval-bleu`` as numpy values. All of these are plain data; nothing else is let in.
    """
    add: Any = getattr(torch.serialization, "add_safe_globals", None)
    if add is None:  # torch before 2.5 has no such list, and no such default
        return
    add([Namespace, *_numpy_globals()])
    reconstruct, scalar = _numpy_globals()[2:4]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        try:  # pairs (object, name) are understood since torch 2.6
            add([(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")])
        except (AttributeError, TypeError, ValueError):
            return


def avoid_fused_encoder() -> None:
    """Keep fairseq 0.12.2 from torch's fused encoder layer, which torch 2 calls differently.

    Its post-norm Transformers take that path in evaluation once weights were loaded, and die of
    "Mask Type should be defined". Later versions have no such path, and this does nothing there.
    """
    from fairseq.modules import transformer_layer

    layer: Any = transformer_layer.TransformerEncoderLayerBase
    if "load_to_BT" in layer.__init__.__code__.co_names:
        # The layer sets this to True as its weights are loaded; a property stays False.
        layer.load_to_BT = property(lambda self: False, lambda self, value: None)
