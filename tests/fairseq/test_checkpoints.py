"""Checkpoints as plain data: what is read safely, and what an export still holds."""

from __future__ import annotations

import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from toy_runs import STEPS, Runs

from l2t_core.errors import UserError
from l2t_fairseq.checkpoints import export_checkpoint, plain, plain_checkpoint, read_checkpoint


def words(value: Any) -> Iterator[str]:
    """Yield every key and every text in a checkpoint."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from words(item)
    elif isinstance(value, str):
        yield value


def test_plain_data_says_the_same() -> None:
    config = OmegaConf.create({"a": {"b": [1, 2]}, "c": "${a.b}"})
    meters = OrderedDict(b=(1, np.array([1.5, 2.5])), a=np.int64(3))
    flags = Namespace(lr=[0.1], sub=Namespace(x=None))
    result = plain({"flags": flags, "cfg": config, "m": meters})
    assert result == {
        "flags": {"lr": [0.1], "sub": {"x": None}},
        "cfg": {"a": {"b": [1, 2]}, "c": [1, 2]},
        "m": {"b": (1, [1.5, 2.5]), "a": 3},
    }
    assert list(result["m"]) == ["b", "a"] and type(result["m"]["a"]) is int
    tensor = torch.ones(2)
    assert plain([tensor])[0] is tensor
    assert plain_checkpoint("not a checkpoint") == "not a checkpoint"


def test_an_export_is_the_student_and_nothing_else(runs: Runs, tmp_path: Path) -> None:
    source = runs.root / "real/checkpoint_last.pt"
    made = export_checkpoint([source], tmp_path / "clean.pt")
    exported = torch.load(tmp_path / "clean.pt", weights_only=True)
    original = runs.checkpoint("real")
    assert exported["model"].keys() == original["model"].keys()
    assert all(torch.equal(t, original["model"][k]) for k, t in exported["model"].items())
    assert exported["cfg"]["task"]["_name"] == "translation"
    assert exported["cfg"]["criterion"] == {"_name": "cross_entropy", "sentence_avg": False}
    assert exported["last_optimizer_state"] is None
    assert exported["cfg"]["model"]["encoder_embed_dim"] == 16
    parameters = sum(t.numel() for t in exported["model"].values())
    assert made == {
        "architecture": "transformer", "task": "translation", "criterion": "cross_entropy",
        "updates": STEPS, "parameters": parameters,
    }  # fmt: skip
    # The folders of this test are the only words that may hold our name.
    said = [w for w in words(exported) if "l2t" in w and not w.startswith(str(runs.root.parent))]
    assert said == []
    assert (tmp_path / "clean.pt").stat().st_size < 0.7 * source.stat().st_size


def test_several_checkpoints_are_averaged(runs: Runs, tmp_path: Path) -> None:
    files = [runs.root / f"real/checkpoint_{name}.pt" for name in ("1_5", "2_10", "3_15")]
    export_checkpoint(files, tmp_path / "mean.pt")
    averaged = torch.load(tmp_path / "mean.pt", weights_only=True)
    models = [torch.load(file, weights_only=True)["model"] for file in files]
    for key, tensor in averaged["model"].items():
        assert torch.equal(tensor, (models[0][key] + models[1][key] + models[2][key]) / 3), key
    assert not torch.equal(models[0]["decoder.output_projection.weight"],
                           averaged["model"]["decoder.output_projection.weight"])  # fmt: skip


def test_halves_are_averaged_in_full_precision(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0009765625)):  # neighbours in float16
        write(tmp_path / name, model={"w": torch.tensor([value]).half(), "n": torch.tensor(7)})
    export_checkpoint([tmp_path / "a", tmp_path / "b"], tmp_path / "mean")
    model = torch.load(tmp_path / "mean", weights_only=True)["model"]
    assert model["w"].dtype == torch.float32 and float(model["w"]) == 1.00048828125
    assert model["n"] == 7
    export_checkpoint([tmp_path / "a"], tmp_path / "one")
    assert torch.load(tmp_path / "one", weights_only=True)["model"]["w"].dtype == torch.float16


def test_running_averages_on_request(tmp_path: Path) -> None:
    averages = {"model": {"w": torch.zeros(1)}, "extra_state": {"ema": {"w": torch.ones(1)}}}
    write(tmp_path / "with", **averages)
    export_checkpoint([tmp_path / "with"], tmp_path / "ema", ema=True)
    assert torch.load(tmp_path / "ema", weights_only=True)["model"]["w"] == 1.0
    write(tmp_path / "without")
    with pytest.raises(UserError, match="--store-ema"):
        export_checkpoint([tmp_path / "without"], tmp_path / "no", ema=True)
    assert not (tmp_path / "no").exists()


def write(path: Path, **changes: Any) -> Path:
    """Write a small checkpoint as stock fairseq writes it."""
    cfg = {"model": Namespace(arch="transformer", task="l2t_translation", l2t_teacher="t"),
           "task": {"_name": "l2t_translation"}, "criterion": {"_name": "l2t_dynamic"}}  # fmt: skip
    torch.save({"model": {"w": torch.zeros(1)}, "cfg": cfg, **changes}, path)
    return path


class Payload:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no checkpoint or is cut short"),
        (b"hello\n", "no checkpoint or is cut short"),
        (pickle.dumps([1, 2]), "holds no fairseq model|no checkpoint"),
        ("cut", "no checkpoint or is cut short"),
        ([1], "holds no fairseq model"),
        ({"model": {"w": 3}, "cfg": {"model": {}}}, "holds no fairseq model"),
        ({"model": {"w": torch.ones(1)}, "cfg": None}, "holds no settings"),
        ("code", "could run code"),
        ("missing", "No such file"),
        ("folder", "Is a directory"),
    ],
)
def test_bad_checkpoints_are_one_line(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut":
        whole = write(tmp_path / "whole").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "code":
        write(path, extra=Payload(tmp_path / "executed"))
    elif content == "folder":
        path.mkdir()
    elif content != "missing":
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        export_checkpoint([path], tmp_path / "out.pt")
    assert "bad.pt" in str(caught.value)
    assert not (tmp_path / "out.pt").exists() and not (tmp_path / "executed").exists()
    assert not list(tmp_path.glob(".out*"))


def test_models_that_do_not_match_and_targets_that_cannot_be(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", model={"w": torch.zeros(2)})
    with pytest.raises(UserError, match="another model"):
        export_checkpoint([one, other], tmp_path / "out")
    with pytest.raises(UserError, match="a checkpoint to read"):
        export_checkpoint([other, one], one)
    with pytest.raises(UserError, match="cannot write"):
        export_checkpoint([one], one / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "other"]
    assert read_checkpoint(one)["cfg"]["model"]["arch"] == "transformer"


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="torch reads anything before 2.6")
def test_settings_as_omegaconf_keeps_them_are_read(tmp_path: Path) -> None:
    cfg = OmegaConf.create({"model": {"_name": "transformer"}, "task": {"_name": "translation"}})
    assert read_checkpoint(write(tmp_path / "old", cfg=cfg))["cfg"] == OmegaConf.to_container(cfg)
