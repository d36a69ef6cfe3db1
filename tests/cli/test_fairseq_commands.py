"""A teacher applied to fairseq commands as people write them, with the real fairseq."""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from in_process import Run  # type: ignore[import-not-found]

pytest.importorskip("fairseq")

from l2t_core.errors import UserError

WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five"}
TRAIN = (
    "--arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 "
    "--decoder-embed-dim 16 --encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 "
    "--encoder-attention-heads 2 --decoder-attention-heads 2 --optimizer adam --lr 0.01 "
    "--max-tokens 200 --max-update 12 --cpu --no-epoch-checkpoints"
)


@pytest.fixture(scope="module")
def data_bin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a preprocessed corpus of numbers with its raw text beside it."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(1)
    for split, size in (("train", 100), ("valid", 10), ("test", 10)):
        lines = [draw.choices(list(WORDS), k=draw.randint(2, 6)) for _ in range(size)]
        source = "".join(" ".join(line) + "\n" for line in lines)
        target = "".join(" ".join(WORDS[w] for w in line) + "\n" for line in lines)
        (folder / f"{split}.de").write_text(source, encoding="utf-8")
        (folder / f"{split}.en").write_text(target, encoding="utf-8")
    preprocess = "-s de -t en --joined-dictionary --trainpref train --validpref valid "
    preprocess += "--testpref test --destdir data-bin"
    subprocess.run(
        [sys.executable, "-m", "fairseq_cli.preprocess", *shlex.split(preprocess)],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder / "data-bin"


def make_teacher(path: Path, data_bin: Path, drop: int = 0) -> Path:
    """Write a teacher for the corpus's dictionary, or for one that is ``drop`` entries smaller."""
    from fairseq.data import Dictionary

    from l2t_core.specs import LossSpec, TeacherSpec
    from l2t_core.students.state import NMT_FEATURES, feature_count
    from l2t_core.teachers.architectures import build_teacher
    from l2t_core.teachers.file import TeacherHeader, save_teacher
    from l2t_fairseq.fingerprint import dictionary_fingerprint

    dictionary = Dictionary.load(str(data_bin / "dict.en.txt"))
    size = len(dictionary) - drop
    fingerprint = {**dictionary_fingerprint(dictionary), "num_classes": size}
    spec = TeacherSpec(slots=2, features=list(NMT_FEATURES))
    loss = LossSpec(form="diagonal", sigma="softplus")
    teacher = build_teacher(spec, loss, size, feature_count(NMT_FEATURES, size), seed=1)
    save_teacher(path, teacher, TeacherHeader(spec, loss, size, 12, 4, fingerprint))
    return path


def test_command_trained_scored_and_compared(l2t: Run, data_bin: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--save-dir", "mine"]
    command += ["--l2t-warmup-steps", "2", "--l2t-debug"]
    arguments = ["apply-teacher", teacher, "--baseline", "--out", "out"]
    arguments += ["--reference", str(data_bin.parent / "test.en"), "--", *command]
    outcome = l2t(*arguments)
    assert outcome.code == 0, outcome.err
    printed = [line for line in outcome.out.splitlines() if line.startswith("$ ")]
    assert len(printed) == 2
    taught, baseline = (shlex.split(line[2:]) for line in printed)
    assert taught[: len(command)] == command  # untouched, ours come after
    assert taught[taught.index("--criterion") + 1] == "l2t_dynamic"
    assert baseline[baseline.index("--criterion") + 1] == "cross_entropy"
    assert baseline[baseline.index("--task") + 1] == "l2t_translation"  # so that it resumes
    assert not [word for word in baseline if word.startswith("--l2t-")]
    # The student asked for lands where its command says, the one to compare with elsewhere.
    assert Path("mine/checkpoint_best.pt").exists()
    assert Path("out/cross_entropy/seed-1/checkpoints/checkpoint_best.pt").exists()
    result = json.loads(Path("out/result.json").read_text())
    assert result["signature"].startswith("nrefs:1|") and "ref:" not in result["signature"]
    hypotheses = Path("out/taught/seed-1/test.hyp.en").read_text().splitlines()
    assert len(hypotheses) == 10
    from sacrebleu.metrics import BLEU

    references = (data_bin.parent / "test.en").read_text().splitlines()
    assert result["scores"]["taught"][0]["value"] == pytest.approx(
        BLEU().corpus_score(hypotheses, [references]).score
    )
    log = Path("out/taught/seed-1/train.log").read_text()
    assert "num_updates" in log
    again = l2t(*arguments)
    assert again.out.count("(finished before)") == 2
    # Killed while it was scored, a student is trained no further: fairseq would make an update
    # more.
    last = Path("mine/checkpoint_last.pt").read_bytes()
    Path("out/taught/seed-1/score.json").unlink()
    again = l2t(*arguments)
    assert again.code == 0 and again.out.count("(finished before)") == 1, again.err
    assert Path("out/taught/seed-1/train.log").read_text() == log
    assert Path("mine/checkpoint_last.pt").read_bytes() == last


def test_script_dry_run_prints_the_command_only(l2t: Run, data_bin: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    script = tmp_path / "fairseq-train.sh"  # no command, for all that its name begins like one
    script.write_text(
        f"#!/bin/bash\nDATA={data_bin}\nfairseq-train $DATA \\\n  --criterion=label_smoothed_"
        f"cross_entropy --label-smoothing 0.1 \\\n  {TRAIN} --seed 5\n"
    )
    before = set(tmp_path.iterdir())
    outcome = l2t("apply-teacher", teacher, script, "--dry-run", "--baseline")
    assert set(tmp_path.iterdir()) == before
    note, comment, taught, _, baseline = outcome.out.splitlines()
    assert "label_smoothed_cross_entropy -> l2t_dynamic" in note
    assert "--label-smoothing removed" in note
    assert comment == "# taught, seed 5"
    assert "--criterion=l2t_dynamic" in taught and "--label-smoothing" not in taught
    assert "--criterion=cross_entropy" in baseline and "--label-smoothing" not in baseline
    assert taught.count("--seed 5") == 1
    script.write_text(script.read_text().replace("--seed 5", "--best-checkpoint-metric bleu"))
    outcome = l2t("apply-teacher", teacher, script, "--dry-run")
    assert outcome.code == 0 and set(tmp_path.iterdir()) == before
    warning = outcome.out.splitlines()[1]
    assert warning.startswith("# warning: with --best-checkpoint-metric bleu alone fairseq keeps")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--task", "language_modeling"], "cannot be taught"),
        (["--seed", "x"], "--seed x"),
        (["--max-update", "many"], "--max-update many"),
        (["--user-dir", "elsewhere"], "--user-dir elsewhere"),
        (["--no-save"], "--no-save leaves no checkpoint_best.pt"),
        (["--checkpoint-suffix", "-1"], "--checkpoint-suffix leaves no checkpoint_best.pt"),
        (["--no-save-optimizer-state"], "--no-save-optimizer-state leaves out the update's"),
        (["--reset-optimizer"], "--reset-optimizer acts when fairseq goes on from a checkpoint"),
        (["--reset-meters", "--restore-file", "checkpoint_last.pt"], "--reset-meters acts when"),
        (["--reset-optimizer", "--restore-file", "x.pt"], "no checkpoint x.pt to go on from"),
    ],
)
def test_what_cannot_be_taught(
    l2t: Run, data_bin: Path, tmp_path: Path, change: list[str], expected: str
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), *change]
    assert expected in l2t("apply-teacher", teacher, "--", *command).error()
    assert not Path("runs").exists()


OWN = """\
{first}
from fairseq.models import register_model_architecture
from fairseq.models.transformer.transformer_legacy import base_architecture

@register_model_architecture("transformer", "mine_tiny")
def tiny(args):
    args.encoder_layers = args.decoder_layers = 1
    args.encoder_embed_dim = args.encoder_ffn_embed_dim = 16
    args.encoder_attention_heads = args.decoder_attention_heads = 2
    base_architecture(args)
"""
TASK = """
from fairseq.tasks import register_task
from l2t_fairseq.task import L2TTranslationConfig, L2TTranslationTask

@register_task("mine_translation", dataclass=L2TTranslationConfig)
class Mine(L2TTranslationTask):
    pass
"""


def test_a_user_dir_that_brings_the_plugin_with_it(
    l2t: Run, data_bin: Path, tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    for name, first in (("with_l2t", "import l2t_fairseq"), ("without_l2t", "")):
        (tmp_path / name).mkdir()
        text = OWN.format(first=first) + (TASK if first else "")
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("import no_such_package\n")
    train = TRAIN[TRAIN.index("--optimizer") :]
    command = ["fairseq-train", str(data_bin), "--arch", "mine_tiny", *shlex.split(train)]
    start = ["apply-teacher", teacher, "--out", "out", "--baseline", "--", *command]
    assert "takes only one" in l2t(*start, "--user-dir", "without_l2t").error()
    assert "no_such_package" in l2t(*start, "--user-dir", "broken").error()
    own = ["--user-dir", "with_l2t", "--task"]
    assert "L2TTranslationTask" in l2t(*start, *own, "translation_multi_simple_epoch").error()
    outcome = l2t(*start, *own, "mine_translation")
    assert outcome.code == 0, outcome.err  # an architecture that only this folder knows is scored
    result = json.loads(Path("out/result.json").read_text())
    assert set(result["scores"]) == {"taught", "cross_entropy"}
    for text in Path("out").rglob("train.log"):
        assert "task: Mine" in text.read_text() and "mine_tiny" in text.read_text()


def test_what_a_command_has_in_front_reaches_whatever_is_run_for_it(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its --user-dir is imported, and its student generates, with the same environment."""
    from l2t_cli.applying.fairseq import FairseqApplication
    from l2t_cli.user_dir import plugin_of

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "only_here.py").write_text("")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("import l2t_fairseq, only_here\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "lib"), os.environ.get("PYTHONPATH")]))
    words = [f"PYTHONPATH={path}", "CUDA_VISIBLE_DEVICES=3", "fairseq-train", str(data_bin)]
    words += [*shlex.split(TRAIN), "--user-dir", str(tmp_path / "own")]
    application = FairseqApplication.from_words(words)
    assert plugin_of(application.command).folder == tmp_path / "own"
    (tmp_path / "student.pt").write_bytes(b"\x80")
    seen = {}

    def run(command: list[str], env: dict[str, str], **_: object) -> None:
        seen.update(env)
        raise OSError(5, "enough")

    test_set = application.test_set()
    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(UserError, match="enough"):
        test_set.score(tmp_path / "student.pt", tmp_path)
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["PYTHONPATH"]) == ("3", path)
    assert seen["PATH"] == os.environ["PATH"]


@pytest.mark.parametrize(
    ("asked", "criterion", "reported"),
    [
        ("nll_loss", "cross_entropy", "loss"),
        ("loss", "cross_entropy", "loss"),
        ("ppl", "cross_entropy", "ppl"),
        ("accuracy", "label_smoothed_cross_entropy", "accuracy"),
    ],
)
def test_the_student_beside_is_judged_by_what_its_criterion_reports(
    data_bin: Path, tmp_path: Path, asked: str, criterion: str, reported: str
) -> None:
    from l2t_cli.applying.fairseq import FairseqApplication
    from l2t_fairseq.commands.train import value_of

    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    words = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--best-checkpoint-metric", asked]
    beside = FairseqApplication.from_words(words).baseline(teacher)
    assert value_of(beside, "--criterion") == criterion
    assert value_of(beside, "--best-checkpoint-metric") == reported


def test_a_command_that_leaves_no_checkpoint_has_nothing_to_score(data_bin: Path) -> None:
    from l2t_cli.applying.fairseq_scoring import TestSet
    from l2t_fairseq.commands.train import parse_command

    command = f"fairseq-train {data_bin} {TRAIN} --no-last-checkpoints"
    assert TestSet.of(parse_command(shlex.split(command)))  # the best on dev is there
    with pytest.raises(UserError, match="--no-last-checkpoints leaves no"):
        TestSet.of(parse_command(shlex.split(f"{command} --disable-validation")))


def test_unfit_dictionary_missing_data_and_other_commands(
    l2t: Run, data_bin: Path, tmp_path: Path
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin, drop=3)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN)]
    line = l2t("apply-teacher", teacher, "--", *command).error()
    assert "trained for 13 dictionary entries, the student has 16" in line
    fitting = make_teacher(tmp_path / "t.safetensors", data_bin)
    command[1] = "nowhere"
    assert "nowhere" in l2t("apply-teacher", fitting, "--", *command).error()
    line = l2t("apply-teacher", fitting, "--", "fairseq-generate", str(data_bin)).error()
    assert "no fairseq-train command" in line
    line = l2t("apply-teacher", fitting, "fairseq-train", "data", "--arch", "x").error()
    assert "--" in line
    assert "gone.sh" in l2t("apply-teacher", fitting, "gone.sh").error()
    assert not Path("runs").exists()


def test_a_failing_run_is_told_in_one_line(l2t: Run, data_bin: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--dropuot", "0.1"]
    line = l2t("apply-teacher", teacher, "--out", "out", "--", *command).error()
    assert "--dropuot" in line and "out.failed.log" in line and not Path("out").exists()


def test_a_command_that_loses_its_numbers_is_a_diverged_student(
    l2t: Run, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"1", "2"}

    def training(words: list[str], environment: object, log: Path, on_progress: object) -> None:
        log.write_text("")
        if words[words.index("--seed") + 1] in lost:
            reason = "FloatingPointError: Minimum loss scale reached (0.0001)"
            raise UserError(f"fairseq-train failed ({reason}); its full output is in {log}")

    monkeypatch.setattr("l2t_cli.applying.fairseq_process.run_logged", training)
    monkeypatch.setattr("l2t_cli.applying.fairseq.TestSet.score", lambda *_: (20.0, "nrefs:1"))
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["--out", "out", "--", "fairseq-train", str(data_bin), *shlex.split(TRAIN)]
    line = l2t("apply-teacher", teacher, "--seeds", "2", *command).error()
    assert "all 2 students diverged" in line and "Minimum loss scale" in line
    assert line.endswith("out.failed.log); lower --lr") and not Path("out").exists()
    lost.remove("1")
    outcome = l2t("apply-teacher", teacher, "--seeds", "2", *command)
    assert outcome.code == 0, outcome.err
    assert "1 of 2 students diverged and count as worst (test BLEU 0.00)" in outcome.out
    assert "10.00 ± 14.14" in outcome.out and "signature: nrefs:1" in outcome.out


def test_a_student_that_ends_before_max_update_is_told(
    l2t: Run, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"1": 12, "2": 7}

    def training(words: list[str], environment: object, log: Path, on_progress: object) -> None:
        last = made[words[words.index("--seed") + 1]]
        log.write_text("".join(f"epoch 001 | num_updates={n} | x\n" for n in (3, last)))

    monkeypatch.setattr("l2t_cli.applying.fairseq_process.run_logged", training)
    monkeypatch.setattr("l2t_cli.applying.fairseq.TestSet.score", lambda *_: (20.0, "nrefs:1"))
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["--out", "out", "--", "fairseq-train", str(data_bin), *shlex.split(TRAIN)]
    assert "warning" not in l2t("apply-teacher", teacher, *command).out
    outcome = l2t("apply-teacher", teacher, "--seeds", "2", "--baseline", *command)
    (said,) = json.loads(Path("out/result.json").read_text())["warnings"]  # the teacher's alone
    assert "taught: seed 2 ended at update 7 of 12 by another flag (--max-epoch" in said
    assert outcome.code == 0 and "warning: " in outcome.out and "same steps" not in outcome.out


@pytest.mark.parametrize("script", [False, True])
def test_all_commands_have_the_teacher_that_there_was_at_the_start(
    l2t: Run, data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: bool
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    before, taught_by = teacher.read_bytes(), []

    def training(words: list[str], environment: object, log: Path, *_: object) -> None:
        if "--l2t-teacher" in words:
            taught_by.append(Path(words[words.index("--l2t-teacher") + 1]).read_bytes())
        log.touch()
        teacher.write_bytes(b"")

    monkeypatch.setattr("l2t_cli.applying.fairseq_process.run_logged", training)
    monkeypatch.setattr("l2t_cli.applying.fairseq.TestSet.score", lambda *_: (20.0, "nrefs:1"))
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN)]
    Path("train.sh").write_text(shlex.join(command) + "\n")
    target = ["train.sh"] if script else ["--", *command]
    options = ["--out", "out", "--baseline", "--seeds"]
    for seeds in ("2", "3"):
        outcome = l2t("apply-teacher", teacher, *options, seeds, *target)
        assert outcome.code == 0, outcome.err
    assert taught_by == [before] * 3


def test_a_start_that_stock_fairseq_cannot_read_is_told_with_the_mend(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", "2.6")
    from l2t_fairseq.commands.failure import reason

    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "checkpoint_last.pt")
    read = "import sys, torch; torch.load(sys.argv[1])"
    command = [sys.executable, "-c", read, str(tmp_path / "checkpoint_last.pt")]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "l2t export CHECKPOINT" in reason(failed.stderr, failed.returncode)


@pytest.mark.parametrize(
    ("output", "code", "expected"),
    [
        ("usage: x\nfairseq-train: error: unrecognized arguments: --x\n", 2, "unrecognized arg"),
        ("Traceback\n  File\ntorch.OutOfMemoryError: no\n | INFO | end", 1, "OutOfMemoryError"),
        ("2026 | INFO | train | num_updates=40\n", -9, "ended by SIGKILL, perhaps out of memory"),
        ("2026 | INFO | train | num_updates=40\n", -15, "ended by SIGTERM"),
        (
            "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\n",
            1, "a checkpoint could not be written; is there space left",
        ),
        (
            "RuntimeError: PytorchStreamWriter failed writing file data/3: file write failed\n",
            1, "a checkpoint could not be written; is there space left",
        ),
        ("killed by the scheduler\n2026 | INFO | x | y\n", 1, "killed by the scheduler"),
        ("", 3, "exit code 3"),
    ],
)
def test_why_a_child_failed(output: str, code: int, expected: str) -> None:
    from l2t_fairseq.commands.failure import reason

    assert reason(output, code).startswith(expected)


@pytest.mark.parametrize("name", ["last", "best", "1_500"])
def test_checkpoints_of_another_run_are_not_taken(
    l2t: Run, data_bin: Path, tmp_path: Path, name: str
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    kept = tmp_path / "mine" / f"checkpoint_{name}.pt"
    kept.parent.mkdir()
    kept.write_bytes(b"somebody's")
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--save-dir", "mine"]
    line = l2t("apply-teacher", teacher, "--", *command).error()
    assert f"another run ({kept.name})" in line
    assert kept.read_bytes() == b"somebody's"


def test_a_run_without_validation_is_scored_by_its_last_checkpoint(tmp_path: Path) -> None:
    from l2t_cli.applying.fairseq import checkpoint_of
    from l2t_fairseq.commands.train import parse_command

    for name in ("best", "last"):
        (tmp_path / f"checkpoint_{name}.pt").write_bytes(b"one")
    for flags, name in (([], "best"), (["--disable-validation"], "last")):
        command = parse_command(["fairseq-train", "d", *flags])
        assert checkpoint_of(tmp_path, command).name == f"checkpoint_{name}.pt"


def test_a_command_that_failed_can_be_corrected(l2t: Run, data_bin: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--no-such-flag"]
    line = l2t("apply-teacher", teacher, "--", *command).error()
    name = f"{data_bin.parent.name}-transformer-taught"
    assert "--no-such-flag" in line and f"runs/{name}.failed.log" in line
    assert [path.name for path in Path("runs").iterdir()] == [f"{name}.failed.log"]
    assert l2t("apply-teacher", teacher, "--", *command[:-1]).code == 0


@pytest.mark.parametrize(
    "flags",
    ["--beem 5", "--beam five", "--beam '5", "--help", "--beam 5 --quiet", "--results-path=out"],
)
def test_flags_that_cannot_generate_are_refused_first(
    l2t: Run, data_bin: Path, tmp_path: Path, flags: str
) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    command = ["fairseq-train", str(data_bin), *shlex.split(TRAIN)]
    arguments = ["apply-teacher", teacher, "--generate", flags, "--dry-run", "--", *command]
    assert "--generate" in l2t(*arguments).error()


def test_a_missing_test_set_is_wanted_in_the_first_folder(
    data_bin: Path, tmp_path: Path
) -> None:
    from l2t_cli.applying.fairseq_scoring import TestSet
    from l2t_fairseq.commands.train import parse_command

    first = shutil.copytree(data_bin, tmp_path / "first")
    for file in first.glob("test.*"):
        file.unlink()
    for data, where in ((f"{first}:{data_bin}", "the first has to have it"), (str(first), "on;")):
        command = parse_command(["fairseq-train", data, *shlex.split(TRAIN)])
        with pytest.raises(UserError, match=f"{where}.*--testpref"):
            TestSet.of(command)
    swapped = parse_command(["fairseq-train", f"{data_bin}:{first}", *shlex.split(TRAIN)])
    assert TestSet.of(swapped).data_bin == data_bin


def test_a_restored_checkpoint_may_be_reset_and_belongs_to_the_run(
    data_bin: Path, tmp_path: Path
) -> None:
    """Started again, fairseq begins anew from that file, and comes to the same student."""
    from l2t_cli.applying.fairseq import FairseqApplication

    start = tmp_path / "start.pt"
    start.write_bytes(b"one")
    words = ["fairseq-train", str(data_bin), *shlex.split(TRAIN), "--restore-file", str(start),
             "--reset-optimizer", "--reset-dataloader"]  # fmt: skip
    before = FairseqApplication.from_words(words).config()
    assert "restored_sha256" in before["content"]
    start.write_bytes(b"two")
    assert FairseqApplication.from_words(words).config()["content"] != before["content"]


def test_the_test_set_is_in_the_commands_direction(
    data_bin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l2t_cli.applying import fairseq_scoring
    from l2t_fairseq.commands.train import parse_command

    def test_set(flags: str) -> fairseq_scoring.TestSet:
        command = parse_command(["fairseq-train", str(data_bin), *shlex.split(f"{TRAIN} {flags}")])
        return fairseq_scoring.TestSet.of(command)

    scored = []
    monkeypatch.setattr(
        fairseq_scoring, "score_checkpoint",
        lambda *given: scored.append(given[-2]) or argparse.Namespace(score=1.0, signature="s"),
    )  # fmt: skip
    for flags, target, languages in (
        ("", "en", None),
        ("-s en -t de", "de", ("en", "de")),
        ("--source-lang=en --target-lang=de", "de", ("en", "de")),
        ("-s de -t en", "en", ("de", "en")),
        ("-s en", "en", None),  # fairseq passes over one alone
    ):
        found = test_set(flags)
        assert found.target == target
        found.score(tmp_path / "checkpoint_best.pt", tmp_path)
        assert scored[-1] == languages
    with pytest.raises(UserError, match="'train' in de-en and not in fr-en"):
        test_set("-s fr -t en")


def test_an_empty_dev_set_is_refused(l2t: Run, data_bin: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "t.safetensors", data_bin)
    other = shutil.copytree(data_bin, tmp_path / "other")
    (other / "valid.de-en.en.bin").write_bytes(b"")
    command = ["fairseq-train", str(other), *shlex.split(TRAIN)]
    assert "the dev set (valid)" in l2t("apply-teacher", teacher, "--", *command).error()
