"""What differs between versions: safe loading, and what is refused as the plugin is imported."""

from __future__ import annotations

import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from l2t_fairseq.compat import avoid_fused_encoder, register_safe_globals

safe_loading = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason="torch reads anything before 2.6"
)


def contents() -> dict[str, object]:
    """Return what fairseq saves beside tensors: a model's flags and --eval-bleu's meters."""
    return {
        "model": Namespace(arch="transformer", lr=[0.1]),
        "counts": np.array([1, 2, 3], dtype=np.int64),
        "rates": np.array([0.5], dtype=np.float32),
        "score": np.float64(3.5),
    }


@safe_loading
@pytest.mark.parametrize("name", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_checkpoints_of_old_and_new_numpy(tmp_path: Path, name: bytes) -> None:
    register_safe_globals()
    torch.save(contents(), tmp_path / "here.pt")
    # The same file as the other generation of numpy would have written it.
    with (
        zipfile.ZipFile(tmp_path / "here.pt") as old,
        zipfile.ZipFile(tmp_path / "there.pt", "w") as new,
    ):
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(b"numpy.core.multiarray", name)
                assert name in data
            new.writestr(entry, data)
    loaded, expected = torch.load(tmp_path / "there.pt"), contents()
    assert loaded["model"] == expected["model"]
    assert loaded["counts"].tolist() == [1, 2, 3]
    assert loaded["rates"].dtype == np.float32
    assert loaded["score"] == 3.5


class Payload:
    """An object whose unpickling would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


@safe_loading
def test_code_in_a_checkpoint_is_still_refused(tmp_path: Path) -> None:
    register_safe_globals()
    torch.save({"model": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "bad.pt")


class LayerWithCopies(torch.nn.Module):
    """What is different about the encoder layer of fairseq 0.12.2, with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.in_proj_weight = torch.nn.Parameter(torch.zeros(2))
        self.load_to_BT = False

    def _load_from_state_dict(self, state: dict[str, torch.Tensor], prefix: str, *rest: object):
        self.load_to_BT = True
        state[f"{prefix}in_proj_weight"] = state[f"{prefix}weight"]
        super()._load_from_state_dict(state, prefix, *rest)


def test_loading_a_checkpoint_leaves_the_fused_encoders_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = pytest.importorskip("fairseq.modules.transformer_layer")
    monkeypatch.setattr(layers, "TransformerEncoderLayerBase", LayerWithCopies)
    avoid_fused_encoder()
    saved = LayerWithCopies().state_dict()
    again = LayerWithCopies()
    again.load_state_dict({**saved})
    assert not again.load_to_BT
    assert again.in_proj_weight.tolist() == [0.0, 0.0]
    # A checkpoint of a version without them.
    again.load_state_dict({"weight": torch.full((2,), 3.0)})
    assert again.weight.tolist() == again.in_proj_weight.tolist() == [3.0, 3.0]


BROKEN = """
import sys, types
import fairseq, torch
{change}
sys.path.insert(0, {plugins!r})
import l2t_fairseq
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("torch.__version__ = '1.13.1+cu117'", "torch 1.13.1+cu117 is too old"),
        ("import fairseq.tasks.translation as t; del t.TranslationConfig", "install fairseq-fixed"),
        ("sys.modules['safetensors'] = None", "pip install safetensors"),
        (
            "sys.modules['fairseq.data.token_block_utils_fast'] = None",
            "--force-reinstall --no-deps --no-cache-dir fairseq",
        ),
    ],
)
def test_versions_that_cannot_work_are_one_line(
    tmp_path: Path, change: str, message: str
) -> None:
    pytest.importorskip("fairseq")
    from toy_fairseq import PLUGINS, run_module

    (tmp_path / "broken.py").write_text(BROKEN.format(change=change, plugins=str(PLUGINS)))
    code = f"import runpy; runpy.run_path({str(tmp_path / 'broken.py')!r})"
    (tmp_path / "start.py").write_text(code)
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        done = run_module("start", [])
    finally:
        os.chdir(here)
    assert done.returncode == 2, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("l2t: error: ")]
    assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.stderr
