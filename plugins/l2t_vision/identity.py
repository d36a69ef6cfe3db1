"""What an image student is, so that work done on one is never taken for another's."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from l2t_core import __version__
from l2t_core.user_code import is_import_path, source_of
from l2t_vision.data.sets import ImageData
from l2t_vision.recipe import ImageSpec

# Where the data lie is not what they are; where they are computed on changes roundings only.
_PLACES = ("folder", "device")
# Follows from the settings and the labels.
_DERIVED = ("confusion",)
# Shown whatever they are; other settings are where they are not the default.
_ALWAYS = ("data", "model", "steps", "batch_size")


def content(spec: ImageSpec, data: ImageData, module: nn.Module) -> dict[str, str]:
    """Return digests of what a recipe's section names without holding it.

    ``data_sha256`` is over the splits' images and labels, after corruption; ``code_sha256``, for
    a model, an augmentation or a measure of the user's own, over the files that they are in and the
    module's structure.
    """
    found = {"data_sha256": data_digest(data)}
    own = [key for key in ("model", "augment", "measure") if is_import_path(getattr(spec, key))]
    if own:
        code = [source_of(getattr(spec, key), f"image.{key}") for key in own]
        found["code_sha256"] = hashlib.sha256(b"".join([*code, repr(module).encode()])).hexdigest()
    return found


def data_digest(data: ImageData) -> str:
    """Return the SHA-256 of the tensors of ``data``: images, labels, statistics."""
    found = hashlib.sha256(f"{data.num_classes}".encode())
    for item in dataclasses.fields(data):
        value = getattr(data, item.name)
        if isinstance(value, Tensor) and item.name not in _DERIVED:
            found.update(f"{item.name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().cpu().numpy().tobytes())
    return found.hexdigest()


def signature(spec: ImageSpec, digest: str, more: Mapping[str, str]) -> str:
    """Return the line beside a score: every setting that is not the default, and the data's hash.

    ``more`` takes the place of settings of the same name (``optimiser.lr``) or is added; what is
    empty is left out.
    """
    default = dict(_leaves(dataclasses.asdict(ImageSpec())))
    shown = {
        name: _text(value)
        for name, value in _leaves(dataclasses.asdict(spec))
        if name not in _PLACES and (name in _ALWAYS or value != default[name])
    }
    shown |= {"data_sha256": digest[:12], **more, "l2t": __version__}
    return "|".join(f"{name}:{value}" for name, value in shown.items() if value)


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
