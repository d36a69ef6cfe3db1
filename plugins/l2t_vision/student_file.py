"""A trained image student as plain data: its module's tensors and all that it takes to use them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from l2t_core.user_code import is_import_path
from l2t_vision.student import ImageStudent

# What models are built from; a function of the user's own gets none of it.
_ARGUMENTS = ("hidden", "depth", "width", "dropout")


def student_content(student: ImageStudent) -> dict[str, Any]:
    """Return what ``torch.load(weights_only=True)`` can read back, all of it on the CPU.

    ``model`` holds arguments of :class:`~l2t_vision.recipe.ImageSpec`, ``shape`` (C, H, W) and
    ``num_classes`` the rest of what :func:`~l2t_vision.models.architectures.build_model` takes,
    ``state`` the module's state_dict. ``mean`` and ``deviation`` [C, 1, 1] standardise images [N,
    C, H, W] of the data's own pixel values.
    """
    spec, data = student.spec, student.data
    own = is_import_path(spec.model)
    arguments = {} if own else {name: getattr(spec, name) for name in _ARGUMENTS}
    dtype = next(student.module.parameters()).dtype

    def column(values: Tensor) -> Tensor:
        return values.detach().to("cpu", dtype).view(-1, 1, 1).clone()

    return {
        "model": {"model": spec.model, **arguments},
        "shape": tuple(data.train_x.shape[1:]),
        "num_classes": data.num_classes,
        "mean": column(data.mean),
        "deviation": column(data.deviation),
        # Parameters are views of one vector in training: a file of views holds all of it each time.
        "state": {k: v.detach().cpu().clone() for k, v in student.module.state_dict().items()},
    }
