"""Where the translation student lives: nmt.device, everything in one place, low precision."""

from __future__ import annotations

import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import DIFFERENTIATIONS
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher
from l2t_core.teachers.file import load_teacher
from l2t_core.training.episodes import train_teacher

pytest.importorskip("fairseq")
from elsewhere import ELSEWHERE, Mixed, elsewhere  # type: ignore[import-not-found]
from test_student import FCONV, LSTM, RUN, TRANSFORMER, make_spec  # type: ignore[import-not-found]

from l2t_fairseq.checks import problems
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.students import nmt
from l2t_fairseq.students.nmt import build_student

LOSS = LossSpec("lowrank", "softplus", rank=2, warmup_steps=1, ce_mix=0.1)
TEACHER = TeacherSpec(slots=3, init_scale=0.3)
# What the pretended device rests on is torch's own, and young.
needs_new_torch = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6), reason="older torch"
)


def estimate(spec, **training):
    """Return the hypergradient and the measures of one student, and where it lived."""
    student = build_student(spec)
    life = Life(student, training.get("precision", "float32"))
    device = life.flat.vector.device
    count = feature_count(student.default_features, student.num_classes)
    teacher = build_teacher(TEACHER, LOSS, student.num_classes, count, 1).to(device)
    engine = Engine(life, LOSS, TrainingSpec(**training))
    episode = Episode(engine, student.default_features, 3, 0)
    way = DIFFERENTIATIONS.get(engine.spec.differentiation)
    *_, outcome = way(episode, teacher, lambda p, s: None)
    return outcome.estimates[0].cpu(), outcome.smoothed, outcome.true, device.type


@pytest.fixture
def go_elsewhere(monkeypatch):
    """Return a context in which students live on another device than the CPU."""
    def context():
        monkeypatch.setattr(nmt, "find_device", lambda setting, name: ELSEWHERE)
        return elsewhere()

    return context


def test_what_pretends_to_be_a_device_refuses_the_cpu():
    with elsewhere():
        there, here = torch.ones(2, 2).to(ELSEWHERE), torch.ones(2, 2)
        table = torch.nn.Embedding(3, 2).to(ELSEWHERE)
        assert there.device == (there @ there).device == ELSEWHERE
        assert (there * torch.tensor(3.0)).sum().item() == 12.0
        assert here.copy_(2 * there).tolist() == [[2.0, 2.0], [2.0, 2.0]]
        for wrong in (
            lambda: there + here, lambda: there @ here, lambda: torch.cat([there, here]),
            lambda: table(torch.tensor([1])), lambda: here + there.sum(),
            lambda: there.gather(0, torch.zeros(1, 2, dtype=torch.long)),
        ):
            with pytest.raises(Mixed):
                wrong()


@needs_new_torch
@pytest.mark.parametrize(
    ("arch", "settings", "training"),
    [
        (TRANSFORMER, {}, {"memory": "170KB", "spill": "none"}),
        (TRANSFORMER, {"candidates": "beam", "estimator": "mrt"}, {"hvp": "finite-difference"}),
        (TRANSFORMER, {"estimator": "reinforce"}, {"differentiation": "windows", "window": 2}),
        (LSTM, {"candidates": "top-k", "top_k": 4, "temperature": 0.9}, {}),
        (FCONV, {"candidates": "nucleus", "top_p": 0.9}, {}),
    ],
    ids=["recomputed", "beam", "reinforce", "lstm", "fconv"],
)
def test_a_student_elsewhere_mixes_nothing(prepared_toy, go_elsewhere, arch, settings, training):
    """Forward, back, dev and candidates on one device, with the CPU's numbers."""
    spec = make_spec(prepared_toy, train=arch + RUN, **settings)
    *here, home = estimate(spec, **training)
    with go_elsewhere():
        *there, place = estimate(spec, **training)
    assert (home, place) == ("cpu", "meta")
    # Elsewhere the LSTM is made of other kernels than oneDNN's.
    torch.testing.assert_close(there[0], here[0], rtol=1e-4, atol=1e-10)
    assert there[1:] == pytest.approx(here[1:], rel=1e-5)


@needs_new_torch
def test_a_teacher_is_trained_elsewhere(prepared_toy, go_elsewhere, tmp_path):
    """Probe, episodes, finals, the run's folder read again; the teacher has the same numbers."""
    spec = make_spec(prepared_toy, measure="log_likelihood", steps=2, true_measure_sentences=2)

    def train(path):
        student = build_student(spec)
        settings = TrainingSpec(episodes=1, finalists=2, final_students=1)
        run = open_run(path, {"run": 1})
        return train_teacher(student, LOSS, TEACHER, settings, run, record={})

    reference = train(tmp_path / "here")
    with go_elsewhere():
        train(tmp_path / "there")
        result = train(tmp_path / "there")
    assert result.history[-1]["hypergradient_norm"] == pytest.approx(
        reference.history[-1]["hypergradient_norm"], rel=1e-4
    )
    ours, theirs = (load_teacher(x.last_path)[0].state_dict() for x in (result, reference))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_device_is_chosen_as_for_images(prepared_toy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("auto", "cpu"):
        student = build_student(make_spec(prepared_toy, device=name))
        assert {p.device.type for p in student.module.parameters()} == {"cpu"}
    with pytest.raises(UserError, match=r"nmt\.device is cuda, but torch finds no GPU here"):
        build_student(make_spec(prepared_toy, device="cuda"))
    assert problems(NmtSpec(device="gpu")) == [
        "nmt.device is 'gpu'; did you mean 'cpu'? (known: auto, cpu, cuda)"
    ]


def test_auto_follows_the_commands_own_cpu_flag(prepared_toy, monkeypatch):
    monkeypatch.setattr(nmt, "find_device", lambda setting, name: torch.device("meta"))
    monkeypatch.setattr(nmt, "NmtStudent", lambda spec, data, setup, device: device.type)
    flags = TRANSFORMER + RUN
    assert build_student(make_spec(prepared_toy, train=flags)) == "meta"
    assert build_student(make_spec(prepared_toy, train=flags + " --cpu")) == "cpu"
    assert build_student(make_spec(prepared_toy, train=flags + " --cpu", device="cuda")) == "meta"


def has_bfloat16_lstm():
    """Tell whether this CPU does: oneDNN has kernels for those with AVX-512 and the like only."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


BFLOAT16_LSTM = pytest.param(
    LSTM, "bfloat16",
    marks=pytest.mark.skipif(not has_bfloat16_lstm(), reason="no bfloat16 LSTM on this CPU"),
)


@pytest.mark.parametrize(
    ("arch", "precision"),
    [(TRANSFORMER, "bfloat16"), (TRANSFORMER, "float16"), BFLOAT16_LSTM, (FCONV, "bfloat16")],
    ids=["transformer", "transformer-half", "lstm", "fconv"],
)
def test_low_precision_students_have_close_hypergradients(prepared_toy, arch, precision):
    spec = make_spec(prepared_toy, train=arch + RUN, measure="log_likelihood")
    full, *_ = estimate(spec)
    low, smoothed, _, _ = estimate(spec, precision=precision)
    assert low.dtype == torch.float32
    assert smoothed < 0.0
    assert not torch.equal(full, low)
    assert float(torch.cosine_similarity(full, low, dim=0)) > 0.95


def test_a_precision_that_the_cpu_lacks_is_one_line(prepared_toy, monkeypatch):
    """oneDNN has no LSTM in float16 on most CPUs, nor in bfloat16 on many."""
    student = build_student(make_spec(prepared_toy))
    life = Life(student, "float16")
    life.begin(1)

    def refuse(batch):
        raise RuntimeError("could not create a primitive descriptor\nand more")

    monkeypatch.setattr(student, "predict", refuse)
    with pytest.raises(UserError, match=r"precision=float16 .*primitive descriptor\); "):
        life.outputs(0)
