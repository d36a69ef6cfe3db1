"""The teacher file: round trip, safety, and one clear line for everything that does not fit."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import struct

import pytest
import safetensors
import safetensors.torch
import torch

from l2t_core.errors import UserError
from l2t_core.losses.taught import step_loss
from l2t_core.specs import LossSpec, TeacherSpec
from l2t_core.students.state import dev_statistics, feature_count
from l2t_core.teachers.applied import AppliedTeacher
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import (
    TeacherHeader,
    check_fits,
    load_header,
    load_teacher,
    save_teacher,
)


@pytest.fixture
def saved(tmp_path):
    spec = TeacherSpec(slots=3, features=["progress", "class_accuracy"])
    loss = LossSpec("lowrank", "softplus", rank=2, warmup_steps=10)
    teacher = build_teacher(spec, loss, 5, 6, seed=1)
    fingerprint = {"kind": "dictionary", "num_classes": 5, "sha256": "abc"}
    header = TeacherHeader(spec, loss, 5, 100, 10, fingerprint, {"recipe": "toy"})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, teacher, header)
    return path, teacher, header


def test_a_teacher_lies_in_memory_as_a_new_one(saved):
    """Products may round otherwise where it does not, and from one process to the next."""
    loaded, _ = load_teacher(saved[0])
    assert {p.data_ptr() % 64 for p in loaded.parameters()} == {0}


def test_round_trip(saved):
    path, teacher, header = saved
    loaded, found = load_teacher(str(path))
    assert found == header
    features = torch.linspace(-1, 1, 6)
    for name, value in teacher(features).items():
        assert torch.equal(value, loaded(features)[name])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_warmup_and_dev_interval_scale_with_the_steps(saved):
    _, _, header = saved
    assert header.loss_for(1000).warmup_steps == 100
    assert header.loss_for(1000, warmup_steps=7).warmup_steps == 7
    late = dataclasses.replace(header, loss=LossSpec(warmup_steps=99))
    assert late.loss_for(10).warmup_steps == 9  # one step is taught, as there
    assert header.dev_interval_for(1000) == 100
    assert header.dev_interval_for(5) == 1


def test_every_truncation_is_one_clear_line(saved, tmp_path):
    path = saved[0]
    content = path.read_bytes()
    for length in (0, 4, 8, 50, len(content) // 2, len(content) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match="cut short") as error:
            load_teacher(cut)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_is_told_and_a_file_without_a_digest_is_read(saved, tmp_path):
    path = saved[0]
    whole, other = path.read_bytes(), tmp_path / "other.safetensors"
    digits = whole.rindex(b'\\"sha256\\": \\"') + len(b'\\"sha256\\": \\"')
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in (digits, end, (end + len(whole)) // 2, len(whole) - 1):
        other.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"other\.safetensors is damaged \(another checksum"):
            load_teacher(other)
    with safetensors.safe_open(path, "pt") as handle:
        content = json.loads(handle.metadata()["l2t"])
    # A header that reads well, with another number in it.
    tensors = safetensors.torch.load_file(path)
    content["header"]["total_steps"] += 1
    safetensors.torch.save_file(tensors, other, {"l2t": json.dumps(content)})
    with pytest.raises(UserError, match="another checksum"):
        load_teacher(other)
    del content["sha256"]  # as earlier versions wrote them
    safetensors.torch.save_file(tensors, other, {"l2t": json.dumps(content)})
    assert load_teacher(other)[1].total_steps == content["header"]["total_steps"]


def content_of_header(path, text):
    """Write a file of a safetensors header alone, which no library of its would write."""
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())


def test_other_files_are_refused(saved, tmp_path):
    path = saved[0]
    with pytest.raises(UserError, match="no teacher file"):
        load_teacher(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match="cannot read"):
        load_teacher(tmp_path)
    pickled = tmp_path / "model.pt"
    torch.save({"a": torch.ones(2)}, pickled)
    with pytest.raises(UserError, match="not a teacher file"):
        load_teacher(pickled)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, other)
    with pytest.raises(UserError, match="holds no l2t teacher"):
        load_teacher(other)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as handle:
        content = json.loads(handle.metadata()["l2t"])

    def rewrite(**changes):
        metadata = {"l2t": json.dumps({**content, **changes})}
        safetensors.torch.save_file(tensors, other, metadata)

    rewrite(version=99)
    with pytest.raises(UserError, match="version 99"):
        load_teacher(other)
    bad = content["header"]
    bad["teacher"]["slots"] = 4
    rewrite(header=bad)
    with pytest.raises(UserError, match="has shape"):
        load_teacher(other)
    bad["teacher"]["slots"] = 3
    for section, key, value in (
        (None, "num_classes", "five"), (None, "num_classes", 1),
        (None, "num_classes", None), (None, "total_steps", 0),
        (None, "dev_interval", "x"), ("teacher", "slots", -1), ("teacher", "slots", "3"),
        ("teacher", "features", None), ("teacher", "features", [1]), ("loss", "ce_mix", "a"),
        ("loss", "warmup_smoothing", 1.0), ("loss", "warmup_steps", -2), ("loss", "sigma", 1),
        ("loss", "warmup_steps", 10**400),
        ("loss", "form", 3), (None, "fingerprint", None), (None, "teacher", 7),
        ("teacher", "name", None), ("teacher", "init_scale", "x"),
        ("teacher", "init_scale", math.nan), ("record", "dev_measure", "x"),
    ):
        spoilt = copy.deepcopy(bad)
        (spoilt[section] if section else spoilt)[key] = value
        rewrite(header=spoilt)
        with pytest.raises(UserError, match=r"other\.safetensors: damaged header \("):
            load_header(other)
    for form in ("dense", "lowrank"):
        beyond = copy.deepcopy(bad)
        beyond["loss"].update(form=form, rank=2**39)
        rewrite(header={**beyond, "num_classes": 2**39})
        with pytest.raises(UserError, match=r"other\.safetensors: damaged header \("):
            load_teacher(other)
    for metadata in (5, None, [1]):
        content_of_header(other, json.dumps({"__metadata__": {"l2t": metadata}}))
        with pytest.raises(UserError, match=r"other\.safetensors is not a teacher file"):
            load_header(other)
    huge = copy.deepcopy(bad)
    huge["loss"]["form"], huge["num_classes"] = "dense", 10**7
    rewrite(header=huge)
    with pytest.raises(UserError, match="has shape"):
        load_teacher(other)
    content["header"] = bad
    tensors["bias_keys"][0, 0] = float("nan")
    rewrite()
    with pytest.raises(UserError, match="not finite"):
        load_teacher(other)
    for section, key, value, told in (
        ("teacher", "temperature", 2.0, "teacher.temperature"),
        ("loss", "margin", 2.0, "loss.margin"), (None, "surprise", 1, "surprise"),
        ("teacher", "name", "gru", "teacher.name 'gru'"), ("loss", "form", "x", "loss.form 'x'"),
        ("loss", "sigma", "tanh", "loss.sigma 'tanh'"),
        ("teacher", "features", ["progress", "noise"], "teacher.features 'noise'"),
    ):
        younger = copy.deepcopy(bad)
        (younger[section] if section else younger)[key] = value
        rewrite(header=younger)
        with pytest.raises(UserError, match=rf"newer l2t \({told} is not known here\)"):
            load_header(other)
    other.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(UserError, match="not a teacher file"):
        load_teacher(other)


@pytest.mark.parametrize("kind", [torch.int64, torch.complex64, torch.float8_e4m3fn, None], ids=str)
def test_numbers_of_other_kinds_are_refused(saved, tmp_path, kind):
    """None: of two kinds."""
    path, teacher, _ = saved
    tensors = {k: v.to(kind or torch.float32) for k, v in teacher.state_dict().items()}
    if kind is None:
        tensors["weight_keys"] = tensors["weight_keys"].double()
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tensors, other, metadata)
    with pytest.raises(UserError, match=r"its numbers are torch.*; the file is damaged"):
        load_teacher(other)


@pytest.mark.parametrize(
    ("name", "form", "features", "fits"),
    [
        ("attention", "shared", ["progress", "dev_nll"], True),
        ("attention", "banded", ["progress", "dev_nll"], True),
        ("lstm", "network", ["progress"], True),
        ("attention", "pairwise", ["progress"], True),
        ("attention", "shared", ["progress", "class_accuracy"], False),
        # Its phi depends on no feature.
        ("static", "shared", ["progress", "class_accuracy"], True),
        ("static", "diagonal", ["progress"], False),
        ("attention", "confusion", ["progress"], False),
    ],
)
def test_a_loss_without_parts_for_a_class_fits_any_number(tmp_path, name, form, features, fits):
    spec, loss = TeacherSpec(name, slots=3, init_scale=0.3, features=features), LossSpec(form)
    count = feature_count(features, 5)
    header = TeacherHeader(spec, loss, 5, 100, 10, {"kind": "dictionary", "num_classes": 5})
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, build_teacher(spec, loss, 5, count, seed=1), header)
    assert header.fits_any_size is fits
    other = {"kind": "dictionary", "num_classes": 40, "sha256": "x"}
    if not fits:
        mend = "lack class_accuracy" if form == "shared" else "train a teacher on this data"
        sizes = "for 5 dictionary entries, the student has 40"
        with pytest.raises(UserError, match=f"{sizes}; .*{mend}"):
            AppliedTeacher.from_file(path, 100, other)
        return
    applied = AppliedTeacher.from_file(path, 100, other)
    phi = applied.begin_step(0.1)
    log_probs = torch.randn(7, 40).log_softmax(1)
    targets = torch.arange(3, 38, 5)
    applied.observe_dev(dev_statistics(log_probs, targets, 40))
    expected = step_loss(loss, log_probs, targets, phi, 0)
    assert torch.equal(applied.loss(log_probs, targets), expected)
    # s_t measures the loss against a guess among the student's classes, not the teacher's.
    if "dev_nll" in features:
        seen = applied.state.features(0, 0.1)[1]
        assert float(seen) == pytest.approx(
            -float(log_probs[torch.arange(7), targets].mean()) / math.log(40) - 1, abs=1e-6
        )
    with pytest.raises(UserError, match="for 5 dictionary entries, the student has 5 classes"):
        AppliedTeacher.from_file(path, 100, {"kind": "classes", "num_classes": 5})


def test_a_static_teacher_sees_nothing(tmp_path):
    for name in ("static", "attention"):
        features = ["dev_nll", "class_accuracy"]
        header = TeacherHeader(TeacherSpec(name, features=features), LossSpec(), 5, 100, 10, {})
        assert header.reads_dev is (name == "attention")
        assert header.sees == (features if header.reads_dev else [])


def test_fit_names_both_sizes(saved):
    path, _, header = saved
    check_fits(header, dict(header.fingerprint), path)
    with pytest.raises(UserError, match="5 dictionary entries, the student has 7"):
        check_fits(header, {**header.fingerprint, "num_classes": 7}, path)
    with pytest.raises(UserError, match="another order"):
        check_fits(header, {**header.fingerprint, "sha256": "x"}, path)
    with pytest.raises(UserError, match="for 5 dictionary entries, the student has 5 classes"):
        check_fits(header, {"kind": "classes", "num_classes": 5}, path)
    # Three numbers for all entries, or for a range of them, do not know which is which.
    for form in ("shared", "banded"):
        header.loss.form = form
        check_fits(header, {**header.fingerprint, "sha256": "x"}, path)
