"""The NMT student under the engine: hypergradients in float64, and what is refused."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.unroll import run_forward
from l2t_core.hypergradients.ways import exact
from l2t_core.runs.folder import open_run
from l2t_core.specs import LossSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.students.train import train_student
from l2t_core.teachers.architectures import build_teacher
from l2t_core.training.episodes import train_teacher

pytest.importorskip("fairseq")
from fairseq import utils

from l2t_fairseq.measures.sampling import Candidate
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.students.batches import pack, unpack
from l2t_fairseq.students.nmt import build_student

TRANSFORMER = (
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 8 "
    "--decoder-embed-dim 8 --encoder-ffn-embed-dim 8 --decoder-ffn-embed-dim 8 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --share-all-embeddings"
)
LSTM = (
    "--arch lstm --encoder-embed-dim 8 --decoder-embed-dim 8 --encoder-hidden-size 8 "
    "--decoder-hidden-size 8 --decoder-out-embed-dim 8 --encoder-layers 1 --decoder-layers 1"
)
FCONV = (
    "--arch fconv --encoder-embed-dim 8 --decoder-embed-dim 8 --decoder-out-embed-dim 8 "
    "--encoder-layers [(8,3)] --decoder-layers [(8,3)]"
)
RUN = (
    " --dropout 0.1 --optimizer adam --adam-eps 1e-3 --lr 0.02 --clip-norm 0.5 "
    "--lr-scheduler inverse_sqrt --warmup-updates 2 --batch-size 6 --update-freq 2"
)

ADAM = " --optimizer adam --lr 0.1 --batch-size 6"


def make_spec(prepared_toy, **changes):
    defaults = {"data": str(prepared_toy), "train": TRANSFORMER + RUN, "steps": 4,
                "dev_interval": 2, "dev_sentences": 6}
    if changes.get("measure") != "log_likelihood":  # which has no candidates
        defaults["samples"] = 4
    return NmtSpec(**{**defaults, **changes})


def test_reset_and_batches_repeat_themselves(prepared_toy):
    student = build_student(make_spec(prepared_toy))
    life = Life(student)
    first = life.begin(5)
    ids = [[m["id"].tolist() for m in student.batch(step)] for step in range(9)]
    rates = [student.learning_rate(step) for step in range(9)]
    other = life.begin(6)
    assert not torch.equal(first, other)
    assert ids != [[m["id"].tolist() for m in student.batch(step)] for step in range(9)]
    assert torch.equal(first, life.begin(5))
    assert ids == [[m["id"].tolist() for m in student.batch(step)] for step in range(9)]
    # inverse_sqrt by hand: from 0 to the peak in two updates, then as 1/sqrt.
    assert rates[:4] == pytest.approx([0.0, 0.01, 0.02, 0.02 * (2 / 3) ** 0.5])


def test_batches_are_kept_small_and_come_back_whole(prepared_toy):
    student = build_student(make_spec(prepared_toy))
    student.reset(3)
    fresh, _ = next(student.setup.updates(student.module, 3))
    student.reset(3)
    for ours, theirs in zip(student.batch(0), fresh, strict=True):
        for name in ("src_tokens", "src_lengths", "prev_output_tokens"):
            a, b = ours["net_input"][name], theirs["net_input"][name]
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        assert torch.equal(ours["target"], theirs["target"])
        assert ours["ntokens"] == theirs["ntokens"]
    kept = student._batches[0][0]["target"].tensor
    assert kept.element_size() < 8
    big = torch.tensor([-1, 2**40])
    assert torch.equal(unpack(pack({"x": [big]}))["x"][0], big)


@pytest.mark.parametrize("world", [2, 40])
def test_processes_share_an_updates_sentences(prepared_toy, world):
    """The shares' weighted means are the mean over the update's tokens."""
    student = build_student(make_spec(prepared_toy, train=TRANSFORMER + RUN + " --dropout 0"))
    student.reset(3)
    batch = student.batch(0)

    def nll(part):
        log_probs, targets = student.predict(part)
        return float(-log_probs.gather(1, targets[:, None]).mean().detach())

    parts = [student.shard(batch, rank, world) for rank in range(world)]
    assert sum(share for _, share in parts) == pytest.approx(1.0)
    shared = sum(share * nll(part) for part, share in parts)
    assert shared == pytest.approx(nll(batch), rel=1e-5)
    assert any(share == 0.0 for _, share in parts) == (world == 40)


def test_making_batches_leaves_the_random_numbers_alone(prepared_toy):
    """A step draws the same dropout masks whether its batch is made or was there."""
    student = build_student(make_spec(prepared_toy))
    student.reset(1)
    drawn = []
    for _ in range(2):  # over several epochs, each of which starts a data loader
        torch.manual_seed(3)
        for step in range(12):
            student.batch(step)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1]


def test_measures_are_measures(prepared_toy):
    for estimator in ("mrt", "reinforce"):
        student = build_student(make_spec(prepared_toy, estimator=estimator, steps=30, samples=16))
        train_student(student, 1, None)
        value = student.smoothed_measure(3)
        assert 0.0 <= float(value.detach()) <= 1.0
        assert float(value.detach()) == float(student.smoothed_measure(3).detach())
        grads = torch.autograd.grad(value, list(student.module.parameters()), allow_unused=True)
        assert any(g is not None and float(g.abs().max()) > 0 for g in grads)
    assert 0.0 <= student.true_measure() <= 1.0
    statistics = student.dev_statistics(1)
    assert statistics is not None
    assert student.dev_statistics(0) is None
    uniform = torch.log(torch.tensor(float(student.num_classes)))
    assert 0.0 < statistics.nll < float(uniform)


@pytest.mark.parametrize(("subset", "steps"), [("train", 2), ("train", 30), ("test", 2)])
def test_the_measures_sentences_may_come_from_another_split(prepared_toy, subset, steps):
    """From train they are those that the life leaves out, as long as there are any."""
    student = build_student(
        make_spec(prepared_toy, measure_subset=subset, steps=steps, measure="log_likelihood")
    )
    drawn = []
    student.measured.collate = lambda chosen, collate=student.measured.collate: (
        drawn.append(chosen) or collate(chosen)
    )
    train_student(student, 1, None)
    before = student.smoothed_measure(3)
    assert float(before.detach()) == float(student.smoothed_measure(3).detach())
    student.smoothed_measure(4)
    assert drawn[0] == drawn[1] != drawn[2]
    learnt_from = {
        i for step in range(steps) for part in student.batch(step) for i in part["id"].tolist()
    }
    everything = set(range(len(student.measured)))
    if subset == "train":
        left = everything - learnt_from
        assert (len(left) < 6) == (steps == 30)
        assert all(len(left & set(chosen)) == min(6, len(left)) for chosen in drawn)
    assert all(len(set(chosen)) == 6 and set(chosen) <= everything for chosen in drawn)
    sample = student.measured.collate(drawn[0])
    student.module.eval()
    log_probs, targets = student._tokens(sample)
    assert float(before.detach()) == pytest.approx(
        float(log_probs.gather(1, targets.unsqueeze(1)).mean().detach()), rel=1e-6
    )
    references = student.measured.references(sample)
    assert references == [
        student.text(Candidate(tuple(t for t in row.tolist()[:-1] if t > 3), True))
        for row in sample["target"]
    ]


def test_text_is_detokenised(prepared_toy):
    """References decoded from their own token ids are the raw references."""
    student = build_student(make_spec(prepared_toy))
    for i in range(len(student.dev)):
        tokens = tuple(student.dev.dataset[i]["target"].tolist()[:-1])
        assert student.text(Candidate(tokens, True)) == student.dev.reference(i)


@pytest.mark.parametrize(
    ("arch", "h"), [(TRANSFORMER, 1e-5), (LSTM, 1e-5), (FCONV, 1e-4)],
    ids=["transformer", "lstm", "fconv"],
)  # fmt: skip
def test_hypergradient_equals_central_differences(prepared_toy, monkeypatch, arch, h):
    # fairseq forces float32 there; the check is in float64.
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))
    monkeypatch.setattr(utils, "log_softmax", lambda x, dim, onnx_trace=False: x.log_softmax(dim))
    student = build_student(
        make_spec(prepared_toy, train=arch + RUN, measure="log_likelihood")
    )
    student.module.double()
    loss = LossSpec(
        "lowrank", "softplus", rank=2, warmup_steps=1, ce_mix=0.1, warmup_smoothing=0.1
    )
    features = student.default_features
    count = feature_count(features, student.num_classes)
    spec = TeacherSpec(slots=3, init_scale=0.3)
    teacher = build_teacher(spec, loss, student.num_classes, count, 1).double()
    episode = Episode(Engine(Life(student), loss, TrainingSpec()), features, 3, 0)

    def measure_at(recorded=None):
        applied = episode.follow(teacher)
        if recorded is not None:
            applied.state.features = lambda step, rate: recorded[step]
        state = episode.life.begin(3)
        trajectory = episode.engine.trajectory()
        run_forward(episode.life, applied, state, trajectory, lambda p, s: None)
        return float(student.smoothed_measure(0).detach()), trajectory.features

    _, recorded = measure_at()
    outcome = exact(episode, teacher, lambda p, s: None)
    generator = torch.Generator().manual_seed(2)
    direction = [
        torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in teacher.parameters()
    ]
    found = float(outcome.estimates[0] @ torch.cat([d.reshape(-1) for d in direction]))
    values = []
    for sign in (1.0, -2.0):  # forward by h, then back by 2h
        with torch.no_grad():
            for p, d in zip(teacher.parameters(), direction, strict=True):
                p.add_(sign * h * d)
        values.append(measure_at(recorded)[0])
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(found) > 1e-7
    assert found == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TRANSFORMER + RUN + " --lerning-rate 3"}, "lerning-rate"),
        ({"train": RUN + " --arch transformr"}, "transformr"),
        ({"train": TRANSFORMER + RUN + " --checkpoint-activations"}, "checkpoint-activations"),
        ({"train": TRANSFORMER + RUN + " --sentence-avg"}, "sentence-avg"),
        ({"train": TRANSFORMER + RUN + " --restore-file old.pt"}, "--finetune-from-model starts"),
        ({"train": TRANSFORMER + RUN + " --finetune-from-model old.pt"}, "no checkpoint old.pt"),
        ({"train": "--arch lightconv_lm" + RUN}, "nmt.train: --arch lightconv_lm is a language"),
        ({"train": TRANSFORMER + RUN + " --criterion adaptive_loss"}, "cannot be replaced"),
        ({"train": TRANSFORMER.replace("--share-all-embeddings", "") + RUN
          + " --adaptive-softmax-cutoff 9,12"}, "leave the flag out"),
        ({"train": TRANSFORMER + RUN + " --arch nonautoregressive_transformer"},
         "NATransformerModel does not translate word by word"),
        ({"train": TRANSFORMER.replace("--share-all-embeddings", "") + RUN
          + " --arch lightconv --encoder-kernel-size-list [3] --decoder-kernel-size-list [3]"
          " --adaptive-softmax-cutoff 9,12"}, "cannot build the model: "),
        ({"train": TRANSFORMER + " --optimizer adagrad --lr 0.1 --batch-size 6"},
         "adagrad has no differentiable"),
        ({"train": TRANSFORMER + RUN + " --lr-scheduler reduce_lr_on_plateau"}, "plateau"),
        ({"train": TRANSFORMER + RUN + " --lr 0.1,0.05"}, "settings of --lr-scheduler inverse"),
        ({"train": TRANSFORMER + RUN + " --lr-scheduler cosine"}, "settings of --lr-sch.* cosine"),
        ({"train": TRANSFORMER + ADAM + " --lr-scheduler tri_stage"}, "--lr-scheduler tri_stage"),
        ({"train": TRANSFORMER + RUN + " --update-freq 64 --skip-remainder-batch"},
         "batches, too few for one update; lower --update-freq"),
        ({"train": TRANSFORMER + RUN + " --user-dir 'x"}, "close the quotes"),
        ({"train": "--task language_modeling --arch transformer_lm"}, "cannot be taught"),
        ({"train": RUN}, "give --arch, such as"),
        ({"train": TRANSFORMER + " --batch-size 6"}, "give --optimizer, such as"),
        ({"train": TRANSFORMER + RUN + " --max-tokens 1"}, "cannot make batches"),
        ({"measure": "expected_blue"}, "did you mean 'expected_bleu'"),
        ({"estimator": "x"}, "known: mrt, reinforce"),
        ({"steps": 0}, "nmt.steps"),
        ({"samples": 1}, "at least 2"),
        ({"candidates": "beam", "beam": 600}, "a beam of 600 is too wide"),
        ({"data": "nowhere"}, "no data folder nowhere"),
        ({"measure_subset": "valid1"}, "no split 'valid1' in .*use one of test, train, valid or"),
    ],
)
def test_refusals_are_one_line(prepared_toy, changes, message):
    with pytest.raises(UserError, match=message) as error:
        student = build_student(make_spec(prepared_toy, **changes))
        student.reset(1)
        student.batch(0)
    assert "\n" not in str(error.value)


def test_an_architecture_and_a_task_of_the_users_own(prepared_toy, tmp_path):
    folder = tmp_path / "own_of_a_student"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import l2t_fairseq\n"
        "from fairseq.models import register_model_architecture\n"
        "from fairseq.models.transformer.transformer_legacy import base_architecture\n"
        "from fairseq.tasks import register_task\n"
        "from l2t_fairseq.task import L2TTranslationConfig, L2TTranslationTask\n"
        "register_model_architecture('transformer', 'own_of_a_student')(base_architecture)\n"
        "@register_task('task_of_a_student', dataclass=L2TTranslationConfig)\n"
        "class Own(L2TTranslationTask):\n"
        "    pass\n"
    )
    own = f" --user-dir {folder} --arch own_of_a_student --task task_of_a_student"
    student = build_student(make_spec(prepared_toy, train=TRANSFORMER + RUN + own))
    assert type(student.setup.task).__name__ == "Own"
    assert student.setup.config.model.arch == "own_of_a_student"
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/__init__.py").write_text("import no_such_package\n")
    own = f" --user-dir {tmp_path / 'torn'}"
    with pytest.raises(UserError, match=r"nmt.train: --user-dir .*torn cannot be imported .*no_su"):
        build_student(make_spec(prepared_toy, train=TRANSFORMER + RUN + own))


def test_dev_sentences_that_the_model_cannot_hold_are_not_decoded(prepared_toy):
    """A learned position beyond the last would be an IndexError after a whole life."""
    flags = " --encoder-learned-pos --max-source-positions 12 --skip-invalid-size-inputs-valid-test"
    student = build_student(make_spec(prepared_toy, train=TRANSFORMER + RUN + flags))
    assert 0 < len(student.dev.usable) < len(student.dev)
    student.reset(1)
    assert 0.0 <= student.true_measure() <= 1.0


def test_training_data_in_several_parts_is_learnt_from_whole(prepared_toy, tmp_path):
    import shutil

    from l2t_fairseq.students.setup import FairseqSetup

    folder = tmp_path / "data-bin"
    shutil.copytree(prepared_toy / "data-bin", folder)
    alone = FairseqSetup(folder, TRANSFORMER + RUN)
    for path in list(folder.glob("train.de-en.*")):
        shutil.copy(path, folder / path.name.replace("train.", "train1."))
    both = FairseqSetup(folder, TRANSFORMER + RUN + " --upsample-primary 2")
    assert len(both.dataset("train")) == 3 * len(alone.dataset("train"))


def test_one_of_several_pairs_of_languages_has_to_be_named(prepared_toy, tmp_path):
    """fairseq takes the first that it meets, in the order of the file system."""
    import shutil

    from l2t_fairseq.students.setup import FairseqSetup

    folder = tmp_path / "data-bin"
    shutil.copytree(prepared_toy / "data-bin", folder)
    for path in list(folder.glob("*.de-en.*")):
        other = path.name.replace("de-en.de", "fr-en.fr").replace("de-en", "fr-en")
        shutil.copy(path, folder / other)
    shutil.copy(folder / "dict.de.txt", folder / "dict.fr.txt")
    with pytest.raises(UserError, match=r"several pairs .*\(de-en, fr-en\); say which by --source"):
        FairseqSetup(folder, TRANSFORMER + RUN)
    named = FairseqSetup(folder, TRANSFORMER + RUN + " -s fr -t en")
    assert named.task.source_dictionary is not None and named.config.task.source_lang == "fr"


def test_an_empty_dev_set_is_one_line(prepared_toy, tmp_path):
    import shutil

    from l2t_fairseq.students.setup import FairseqSetup

    copy = tmp_path / "data-bin"
    shutil.copytree(prepared_toy / "data-bin", copy)
    (copy / "valid.de-en.de.bin").write_bytes(b"")
    with pytest.raises(UserError, match="the dev set is empty"):
        FairseqSetup(copy, TRANSFORMER + RUN)


def test_a_measures_own_code_and_the_data_identify_a_run(prepared_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = tmp_path / "own_bench_measure.py"
    code.write_text("def share(hypothesis, reference):\n    return 0.5\n")
    plain = build_student(make_spec(prepared_toy)).content()
    assert set(plain) == {"data_sha256"}
    student = build_student(make_spec(prepared_toy, measure="own_bench_measure:share"))
    before = student.content()
    assert before["data_sha256"] == plain["data_sha256"]
    code.write_text("def share(hypothesis, reference):\n    return 0.6\n")
    assert student.content()["code_sha256"] != before["code_sha256"]


def test_a_flat_measure_is_mended_by_what_helps_in_translation(prepared_toy, tmp_path, monkeypatch):
    """Not by image.measure, nor by a lower rate: most often such a student has learnt too little.

    The settings that are named exist.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_flat_measure.py").write_text("def flat(hypothesis, reference): return 0.7\n")
    student = build_student(make_spec(prepared_toy, measure="own_flat_measure:flat", steps=1))
    with pytest.raises(UserError, match="gave a usable hypergradient") as told:
        train_teacher(
            student, LossSpec("shared", "identity"), TeacherSpec(), TrainingSpec(episodes=9),
            open_run(tmp_path / "run", {}), record={},
        )
    said = str(told.value)
    assert "measure is flat there; all candidates" in said
    assert "image." not in said and "lower" not in said
    assert "nmt.measure=log_likelihood" in said
    named = re.findall(r"nmt\.(\w+)", said)
    assert "train" in named and set(named) <= {field.name for field in fields(NmtSpec)}


def test_a_start_is_read_belongs_to_the_run_and_fits(prepared_toy, tmp_path):
    start = tmp_path / "start.pt"
    student = build_student(make_spec(prepared_toy))
    student.reset(9)
    before = {k: v.clone() for k, v in student.module.state_dict().items()}
    torch.save({"model": before, "cfg": {"model": {"_name": "transformer"}}}, start)
    train = f"{TRANSFORMER}{RUN} --finetune-from-model {start}"
    tuned = build_student(make_spec(prepared_toy, train=train))
    tuned.reset(1)
    for name, value in tuned.module.state_dict().items():
        if not name.endswith("_float_tensor"):  # one of 0.12.2's that nothing ever writes
            assert torch.equal(value, before[name]), name
    digest = tuned.content()["start_sha256"]
    torch.save({"model": before, "cfg": {"model": {"_name": "lstm"}}}, start)
    assert tuned.content()["start_sha256"] != digest
    with pytest.raises(UserError, match="the checkpoint of another model") as error:
        build_student(make_spec(prepared_toy, train=train + " --decoder-layers 3"))
    assert "\n" not in str(error.value)
