"""A digest of tensors and the text that is kept with them: safetensors itself has no checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return the sha256, in hexadecimal, of ``text`` and of names, types, shapes and bytes.

    It does not depend on the order of ``tensors`` or on the device that they are on.
    """
    digest = hashlib.sha256(text.encode("utf-8"))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes: numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
