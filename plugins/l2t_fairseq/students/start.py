"""The parameters that a fine-tuned student starts from: ``--finetune-from-model``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2t_core.errors import UserError
from l2t_core.runs.files import file_digest

if TYPE_CHECKING:  # reading a command should not wait for torch
    from torch import Tensor, nn

FINETUNE_FLAG = "--finetune-from-model"


def start_content(path: str | None) -> dict[str, str]:
    """Return the digest of the checkpoint that a command starts from, nothing if it names none.

    Raises:
        UserError: if the file cannot be read.
    """
    if not path:
        return {}
    _refuse_missing(path)
    return {"start_sha256": file_digest(Path(path), "sha256")}


def restored_content(path: str | None) -> dict[str, str]:
    """Return the digest of the checkpoint of ``--restore-file``, nothing if it names none.

    Raises:
        UserError: if it is not there: fairseq itself would train from scratch.
    """
    if not path:
        return {}
    if not Path(path).is_file():
        raise UserError(
            f"there is no checkpoint {path} to go on from (--restore-file), and fairseq would "
            "train from scratch without it; name another, or remove the flag"
        )
    return {"restored_sha256": file_digest(Path(path), "sha256")}


def starting_parameters(path: str | None) -> dict[str, Tensor] | None:
    """Return the parameters of the checkpoint ``path``, or None for a student from scratch.

    Raises:
        UserError: if it cannot be read, or holds more than plain data.
    """
    from l2t_fairseq.checkpoints import read_checkpoint

    if not path:
        return None
    _refuse_missing(path)
    return dict(read_checkpoint(Path(path))["model"])


def _refuse_missing(path: str) -> None:
    if not Path(path).is_file():
        raise UserError(
            f"there is no checkpoint {path} to start from ({FINETUNE_FLAG}); train that student "
            "first (a recipe's first lines say how), or name another"
        )


def fill(model: Any, parameters: dict[str, Tensor], config: Any) -> nn.Module:
    """Give ``model`` the ``parameters`` as fairseq's trainer does; return it.

    Raises:
        UserError: if they are another model's.
    """
    try:
        model.load_state_dict(dict(parameters), strict=True, model_cfg=config)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"nmt.train: {FINETUNE_FLAG} names the checkpoint of another model "
            f"({lines[-1][:200]}); give the flags that it was trained with"
        ) from None
    return model  # type: ignore[no-any-return]
