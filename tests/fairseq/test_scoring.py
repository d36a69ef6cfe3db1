"""From fairseq-generate's output to a score that can be repeated."""

from __future__ import annotations

from pathlib import Path
from subprocess import CompletedProcess
from typing import BinaryIO

import pytest
import sacrebleu
import torch
from toy_fairseq import TINY_MODEL, TINY_RUN, run_module

from l2t_core.errors import UserError
from l2t_fairseq.corpora.folder import open_data
from l2t_fairseq.measures.sentence_scores import build_measure
from l2t_fairseq.scoring import (
    SYMBOLS,
    TARGETS,
    TEXT,
    ScoredOutput,
    generate,
    in_order,
    language_pair,
    read_lines,
    read_output,
    score_checkpoint,
)

BLEU = build_measure("expected_bleu")


def test_hypotheses_are_the_best_detokenised_lines_by_id(tmp_path: Path) -> None:
    log = tmp_path / "generate.log"
    log.write_text(
        "2026-01-01 | INFO | noise\nS-2\tx\nT-2\ty\nH-2\t-0.5\t▁a ▁b\nD-2\t-0.5\ta b\n"
        "D-2\t-0.9\tsecond best\nP-2\t-0.1\nD-0\t-0.25\tline\u2028separator, tab\there\n"
        "D-1\t-0.1\t\nGenerate test with beam=2: BLEU4 = 0.00\n",
        encoding="utf-8",
        newline="\n",
    )
    found = read_output(log, TEXT)
    assert found == {0: "line\u2028separator, tab\there", 1: "", 2: "a b"}
    assert read_output(log, SYMBOLS) == {2: "▁a ▁b"}
    assert read_output(log, TARGETS) == {2: "y"}
    assert in_order(found, 3, log) == ["line\u2028separator, tab\there", "", "a b"]


@pytest.mark.parametrize("found", [{0: "a", 2: "c"}, {0: "a"}, {}, {0: "", 1: "", 2: "", 3: ""}])
def test_missing_or_foreign_sentences_are_refused(found: dict[int, str]) -> None:
    with pytest.raises(UserError, match="3 sentences of the reference"):
        in_order(found, 3, Path("generate.log"))


def test_the_score_is_sacrebleus_own() -> None:
    hypotheses = ["The cat sat on the mat .", "there is a dog in the garden"]
    references = ["The cat sat on the mat.", "There is a dog in the garden."]
    bleu, signature = BLEU.judge(hypotheses, references)
    assert bleu == sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert f"version:{sacrebleu.__version__}" in signature
    assert "tok:13a" in signature
    assert BLEU.judge(references, references)[0] == pytest.approx(100)
    with pytest.raises(UserError, match="reference is empty"):
        BLEU.judge([], [])


def test_a_generation_that_outlived_its_run_writes_into_no_other_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL, we leave fairseq-generate running; the next run has a log of its own."""
    log, checkpoint = tmp_path / "generate.log", tmp_path / "student.pt"
    torch.save({}, checkpoint)
    log.write_text("H-0\t-0.1\tfirst\n")
    with log.open("r+b") as outlived:

        def run(command: list[str], stdout: BinaryIO, **_: object) -> CompletedProcess[bytes]:
            stdout.write(b"H-0\t-0.25\tthe second run\n")
            stdout.flush()
            outlived.write(b"H-0\t-0.1\tfirst\n")
            outlived.flush()
            return CompletedProcess(command, 0)

        monkeypatch.setattr("subprocess.run", run)
        generate(tmp_path, checkpoint, [], log)
    assert read_output(log, SYMBOLS) == {0: "the second run"}


@pytest.fixture(scope="module")
def prepared(prepared_toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a prepared data folder and the checkpoint of a hardly trained student."""
    save = tmp_path_factory.mktemp("student")
    data = str(prepared_toy / "data-bin")
    done = run_module("fairseq_cli.train", [data, *TINY_MODEL, *TINY_RUN, "--save-dir", str(save)])
    assert done.returncode == 0, done.stderr[-2000:]
    return prepared_toy, save / "checkpoint_last.pt"


def test_a_checkpoint_is_scored_against_the_raw_reference(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, checkpoint = prepared
    scored = score_checkpoint(
        folder, checkpoint, ["--cpu", "--beam", "2", "--max-len-b", "12", "--nbest", "2"],
        out=tmp_path / "out",
    )
    assert isinstance(scored, ScoredOutput)
    references = read_lines(folder / "raw" / "test.en")
    hypotheses = read_lines(scored.hypotheses)
    assert len(hypotheses) == len(references) == 12
    assert not any("▁" in line for line in hypotheses)
    assert (scored.score, scored.signature) == BLEU.judge(hypotheses, references)


def test_the_score_is_of_the_measure_that_is_asked_for(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, checkpoint = prepared
    scored = score_checkpoint(
        folder, checkpoint, ["--cpu", "--beam", "1", "--max-len-b", "9"], out=tmp_path,
        measure="expected_ter",
    )
    metric = sacrebleu.metrics.TER()
    references = read_lines(folder / "raw" / "test.en")
    wanted = metric.corpus_score(read_lines(scored.hypotheses), [references]).score
    assert scored.score == pytest.approx(100.0 - wanted)
    assert scored.signature == str(metric.get_signature())


def test_a_student_of_the_other_direction_is_scored_on_it(
    prepared_toy: Path, tmp_path: Path
) -> None:
    """fairseq trains either direction on one folder, whose files are named by the first."""
    data = str(prepared_toy / "data-bin")
    turned = ["-s", "en", "-t", "de", "--save-dir", str(tmp_path), "--max-update", "5"]
    done = run_module("fairseq_cli.train", [data, *TINY_MODEL, *TINY_RUN, *turned])
    assert done.returncode == 0, done.stderr[-2000:]
    scored = score_checkpoint(
        prepared_toy, tmp_path / "checkpoint_last.pt",
        ["--cpu", "--beam", "1", "--max-len-b", "9"], out=tmp_path, languages=("en", "de"),
    )  # fmt: skip
    assert scored.hypotheses.name == "test.hyp.de"
    said = scored.log.read_text(encoding="utf-8")
    assert "'source_lang': 'en', 'target_lang': 'de'" in said
    references = read_lines(prepared_toy / "raw" / "test.de")
    hypotheses = read_lines(scored.hypotheses)
    assert (scored.score, scored.signature) == BLEU.judge(hypotheses, references)


def test_the_languages_are_those_of_the_files_or_of_the_command(tmp_path: Path) -> None:
    def add(pair: str) -> None:
        for language in pair.split("-"):
            (tmp_path / f"test.{pair}.{language}.idx").touch()

    add("de-en")
    assert language_pair(tmp_path, "test") == ("de", "en")
    assert language_pair(tmp_path, "test", ("en", "de")) == ("en", "de")
    with pytest.raises(UserError, match="in de-en and not in fr-en; mend --source-lang"):
        language_pair(tmp_path, "test", ("fr", "en"))
    add("fr-en")
    assert language_pair(tmp_path, "test", ("fr", "en")) == ("fr", "en")
    with pytest.raises(UserError, match=r"several pairs .*\(de-en, fr-en\); say which by --source"):
        language_pair(tmp_path, "test")


@pytest.mark.parametrize(
    ("symbols", "subwords"),
    [
        (["▁the", "▁", "ing", "▁house", "s"], "sentencepiece"),
        (["▁我", *map(chr, range(0x4E00, 0x4E30))], "sentencepiece"),  # few begin a word
        (["hel@@", "lo", "world", "h@@"], "subword-nmt"),
        (["hel@@", "▁@@", "lo", "▁▂▃"], "subword-nmt"),
        (["▁▂▃", "a@@", *map(str, range(300))], "words"),
    ],
)
def test_how_a_language_is_cut_is_seen_in_its_own_dictionary(
    tmp_path: Path, symbols: list[str], subwords: str
) -> None:
    lines = [f"{symbol} 1\n" for symbol in symbols]
    (tmp_path / "dict.en.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "dict.de.txt").write_text("▁das 1\n", encoding="utf-8")
    (tmp_path / "dict.fr.txt").write_text("la 1\n", encoding="utf-8")
    folder = open_data(tmp_path)
    assert folder.form_of("en").subwords == subwords
    assert folder.form_of("de").subwords == "sentencepiece"
    assert folder.form_of("fr").subwords == "words"


def test_failures_name_reason_and_log(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = prepared
    with pytest.raises(UserError, match=r"unrecognized arguments: --beem.*generate-test\.log"):
        score_checkpoint(folder, checkpoint, ["--cpu", "--beem", "2"], out=tmp_path)
    with pytest.raises(UserError, match="no checkpoint at"):
        score_checkpoint(folder, tmp_path / "none.pt", out=tmp_path)
    with pytest.raises(UserError, match="holds no split 'tset'"):
        language_pair(folder / "data-bin", "tset")
