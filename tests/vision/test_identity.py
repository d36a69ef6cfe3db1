"""An image student's identity: whatever makes another student shows in it."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from torch import nn

from l2t_core.specs import OptimiserSpec, ScheduleSpec
from l2t_vision.data.sets import ImageData, load_data
from l2t_vision.identity import content, data_digest, signature
from l2t_vision.recipe import ImageSpec

# A value that is not the default, for every setting but the two that say where.
OTHER = {
    "data": "mnist", "size": 9, "model": "lenet", "hidden": 3, "depth": 40, "width": 2,
    "dropout": 0.5, "train_size": 7, "dev_size": 8, "data_seed": 1, "label_noise": 0.25,
    "noise": "pair", "imbalance": 10.0, "corrupt_dev": True, "augment": "crop", "batch_size": 9,
    "steps": 99, "optimiser": OptimiserSpec(weight_decay=0.5), "schedule": ScheduleSpec("linear"),
    "measure": "margin", "dev_batch": 5, "dev_interval": 6, "precision": "bfloat16", "trusted": 4,
    "only_trusted": True,
}


@pytest.fixture
def data() -> ImageData:
    """Return the digits, split."""
    return load_data(ImageSpec(dev_size=300))


def test_the_signature_shows_every_setting_that_is_not_the_default() -> None:
    names = {item.name for item in dataclasses.fields(ImageSpec)}
    assert set(OTHER) == names - {"folder", "device"}
    plain = signature(ImageSpec(), "ab" * 32, {})
    assert plain.startswith("data:digits|model:mlp|batch_size:100|steps:1000|data_sha256:abab")
    for name, value in OTHER.items():
        changed = signature(dataclasses.replace(ImageSpec(), **{name: value}), "ab" * 32, {})
        assert changed != plain and f"{name}" in changed
    for name in ("folder", "device"):
        assert signature(dataclasses.replace(ImageSpec(), **{name: "x"}), "ab" * 32, {}) == plain


def test_the_digest_sees_one_pixel_and_one_label(data: ImageData) -> None:
    before = data_digest(data)
    assert before == data_digest(load_data(ImageSpec(dev_size=300)))
    for name in ("train_x", "train_y", "dev_x", "dev_y", "test_x", "test_y"):
        changed = getattr(data, name).clone()
        changed.view(-1)[0] += 1
        assert data_digest(dataclasses.replace(data, **{name: changed})) != before
    # Settings that change what is learnt from change it, too.
    assert data_digest(load_data(ImageSpec(dev_size=300, label_noise=0.1))) != before
    assert data_digest(load_data(ImageSpec(dev_size=300, imbalance=5.0))) != before


def test_a_models_own_code_counts(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec, net = ImageSpec(model="own_net_code:net"), nn.Linear(2, 2)
    code = Path("own_net_code.py")
    code.write_text("def net(num_classes):\n    return None\n")
    try:
        found = content(spec, data, net)
        assert set(found) == {"data_sha256", "code_sha256"}
        # The same file with a part from elsewhere that is another one.
        assert content(spec, data, nn.Linear(3, 2))["code_sha256"] != found["code_sha256"]
        code.write_text("def net(num_classes):\n    return 1.0\n")
        assert content(spec, data, net)["code_sha256"] != found["code_sha256"]
    finally:
        sys.modules.pop("own_net_code", None)
        importlib.invalidate_caches()
    assert set(content(ImageSpec(), data, net)) == {"data_sha256"}
    spec = ImageSpec(augment="torch:flip")  # no file either, and still another student
    assert set(content(spec, data, net)) == {"data_sha256", "code_sha256"}
    # What was compiled has no file, and is no reason to fail.
    assert content(ImageSpec(model="torch:zeros"), data, net)["code_sha256"]
