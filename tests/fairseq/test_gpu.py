"""Teacher training on a GPU beside the CPU's. Needs a GPU: run it where there is one."""

from __future__ import annotations

import pytest
import torch

from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.ways import exact
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher
from l2t_core.training.episodes import train_teacher

pytest.importorskip("fairseq")
from fairseq import utils
from test_student import LSTM, RUN, TRANSFORMER, make_spec  # type: ignore[import-not-found]

from l2t_fairseq.students.nmt import build_student as build_translator
from l2t_vision.recipe import ImageSpec
from l2t_vision.student import build_student as build_classifier

GPU = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

TEACHER = TeacherSpec(slots=3, init_scale=0.3)
# Dropout draws other masks on a GPU.
PLAIN = RUN.replace("--dropout 0.1", "--dropout 0")
STUDENTS = ["mlp", "convnet", "transformer", "lstm"]


@pytest.fixture
def make(prepared_toy, monkeypatch):
    """Return a function (student's name, device, **settings) -> student."""
    # fairseq forces float32 there; some checks are in float64.
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))
    monkeypatch.setattr(utils, "log_softmax", lambda x, dim, onnx_trace=False: x.log_softmax(dim))

    def student(name, device, **settings):
        if name in ("mlp", "convnet"):
            spec = ImageSpec(
                dev_size=300, hidden=8, model=name, batch_size=32, steps=6, dev_interval=2,
                optimiser=OptimiserSpec("momentum", 0.1), device=device,
            )  # fmt: skip
            return build_classifier(spec)
        flags = {"transformer": TRANSFORMER, "lstm": LSTM}[name] + PLAIN
        spec = make_spec(prepared_toy, **{"train": flags, "steps": 6, "device": device, **settings})
        return build_translator(spec)

    return student


def estimate(student, double=False, **training):
    """Return the hypergradient of one life, on the CPU, and the plan that it took."""
    if double:
        student.module.double()
    life = Life(student, training.get("precision", "float32"))
    form = "lowrank" if student.num_classes > 10 else "dense"
    loss = LossSpec(form, "softplus", rank=2, warmup_steps=1, ce_mix=0.1)
    features = student.default_features
    count = feature_count(features, student.num_classes)
    teacher = build_teacher(TEACHER, loss, student.num_classes, count, 1)
    teacher = teacher.to(life.flat.vector.device, life.flat.vector.dtype)
    engine = Engine(life, loss, TrainingSpec(**training))
    outcome = exact(Episode(engine, features, 3, 0), teacher, lambda phase, step: None)
    assert outcome.estimates[0].device.type == life.flat.vector.device.type
    return outcome.estimates[0].cpu(), engine.plan


@pytest.mark.parametrize("name", STUDENTS)
def test_the_hypergradient_is_the_cpus(make, name):
    here, _ = estimate(make(name, "cpu", measure="log_likelihood"), double=True)
    there, _ = estimate(make(name, GPU, measure="log_likelihood"), double=True)
    assert float(here.norm()) > 0.0
    torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-9 * float(here.abs().max()))


@pytest.mark.parametrize("candidates", ["ancestral", "beam"])
def test_the_expected_measures_hypergradient_is_the_cpus(make, candidates):
    here, there = (
        estimate(make("transformer", device, candidates=candidates), double=True)[0]
        for device in ("cpu", GPU)
    )
    torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", STUDENTS)
def test_every_plan_gives_the_same_bits(make, name):
    """Kept, recomputed, in the host's memory and in a file."""
    student = make(name, GPU, measure="log_likelihood")
    reference, plan = estimate(student)
    assert plan.recomputed == plan.spilled == 0
    few = f"{int(2.5 * plan.point_bytes)}B"
    found = {s: estimate(student, memory=few, spill=s) for s in ("none", "host", "file")}
    assert found["none"][1].recomputed > 0
    assert (found["host"][1].where, found["file"][1].where) == ("host", "file")
    for spill, (value, _) in found.items():
        assert torch.equal(value, reference), spill


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", STUDENTS)
def test_low_precision_is_finite_and_close(make, name, precision):
    student = make(name, GPU, measure="log_likelihood")
    full, _ = estimate(student)
    low, _ = estimate(student, precision=precision)
    assert bool(low.isfinite().all())
    assert float(torch.cosine_similarity(full, low, dim=0)) > 0.9


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_teachers_are_trained_there(make, name, tmp_path):
    """Two episodes; the run's folder is read again on the GPU and says the same."""
    def train():
        form = "dense" if name == "mlp" else "lowrank"
        student = make(name, GPU)
        run = open_run(tmp_path / name, {"run": 1})
        return train_teacher(
            student, LossSpec(form, "softplus"), TEACHER, TrainingSpec(episodes=1), run, record={}
        )

    result, again = train(), train()
    assert len(result.history) == 2 and result.skipped == 0
    assert again.history == result.history
