"""The expected measure of a student: its gradient, and one text for every score."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import textwrap

import pytest
import torch
from sacrebleu.metrics import BLEU
from toy_fairseq import TINY_MODEL, TINY_RUN, run_module, toy_corpus

pytest.importorskip("fairseq")
from fairseq import utils

from l2t_cli.recipe_reading.fields import FIELDS
from l2t_core.errors import NoEffect, UserError
from l2t_core.students.measures import corpus_bleu, ranked_by_length
from l2t_core.students.train import train_student
from l2t_fairseq.checks import problems
from l2t_fairseq.corpora.prepare import prepare_corpus, read_lines
from l2t_fairseq.corpora.text_form import TextForm
from l2t_fairseq.measures.sampling import Candidate, candidate_log_probs, length_limit
from l2t_fairseq.measures.sentence_scores import build_measure
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.scoring import SYMBOLS, read_output, score_checkpoint
from l2t_fairseq.students.nmt import build_student

FLAGS = " ".join(TINY_MODEL)
RUN = " --optimizer adam --lr 0.02 --batch-size 8"


def make_student(folder, **changes):
    defaults = {"data": str(folder), "train": FLAGS + RUN, "steps": 4, "dev_interval": 2,
                "dev_sentences": 5, "samples": 5}
    return build_student(NmtSpec(**{**defaults, **changes}))


MEASURES = {
    "ancestral": {},
    "temperature": {"temperature": 0.7, "measure": "expected_chrf", "alpha": 0.5},
    "top-k": {"top_k": 4, "measure": "expected_ter"},
    "nucleus": {"top_p": 0.8, "temperature": 1.5, "measure": "expected_chrf++"},
    "beam": {"beam": 7},
    "ancestral, of the set": {"measure": "expected_corpus_bleu"},
    "beam, as it ranks": {"measure": "expected_corpus_bleu", "lenpen": 1.0},
}


@pytest.mark.parametrize("source", MEASURES)
def test_gradient_equals_central_differences(prepared_toy, monkeypatch, source):
    """In float64, at the candidates that were found: a small step of omega finds the same."""
    monkeypatch.setattr(utils, "softmax", lambda x, dim, onnx_trace=False: x.softmax(dim))
    monkeypatch.setattr(utils, "log_softmax", lambda x, dim, onnx_trace=False: x.log_softmax(dim))
    candidates = source.partition(",")[0]
    student = make_student(prepared_toy, candidates=candidates, steps=25, **MEASURES[source])
    train_student(student, 1, None)
    student.module.double()
    value = student.smoothed_measure(3)
    parameters = list(student.module.parameters())
    gradient = torch.autograd.grad(value, parameters, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    found = sum(float((g * d).sum()) for g, d in zip(gradient, direction, strict=True)
                if g is not None)  # fmt: skip
    values, h = [], 1e-6
    for sign in (1.0, -2.0):  # forward by h, then back by 2h
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * h * d)
        values.append(float(student.smoothed_measure(3).detach()))
    numeric = (values[0] - values[1]) / (2 * h)
    assert abs(found) > 1e-6
    assert found == pytest.approx(numeric, rel=1e-5)


VALUES = {
    "by p": {"alpha": 0.5},
    "by length": {"alpha": 0.7, "lenpen": 1.5, "candidates": "beam"},
    "of the set": {"measure": "expected_corpus_bleu", "alpha": 0.05, "lenpen": 1.0},
    "reinforce": {"estimator": "reinforce"},
}


@pytest.mark.parametrize("name", VALUES)
def test_the_measure_is_what_its_definition_says(prepared_toy, name):
    """Recomputed with numbers of Python's own from the candidates, in evaluation mode."""
    settings = VALUES[name]
    # Three symbols of a word: some candidates come twice, some are of other lengths.
    spread = {"candidates": "top-k", "top_k": 3, "samples": 12} if name == "of the set" else {}
    student = make_student(prepared_toy, steps=25, **{**spread, **settings})
    train_student(student, 1, None)
    drawn = []
    draw = student.source.draw
    student.source = dataclasses.replace(
        student.source, draw=lambda *given: drawn.append(draw(*given)) or drawn[-1]
    )
    student.module.train()  # as it is at the end of a life
    value = float(student.smoothed_measure(3).detach())
    (found,) = drawn
    collated = student.dev.collate(student.dev.draw(5, 3, set()))
    words, references = student.dictionary, student.dev.references(collated)
    student.module.eval()
    with torch.no_grad():
        log_probs = candidate_log_probs(
            student.module, collated["net_input"], found, eos=words.eos(), pad=words.pad()
        ).tolist()
    alpha, lenpen = settings.get("alpha", 1.0), settings.get("lenpen", 0.0)
    expected, sums, repeated = [], [0.0] * 10, 0
    for of, own, reference in zip(found, log_probs, references, strict=True):
        # The end symbol counts, as it does in a search.
        lengths = [len(c.tokens) + 1 for c in of]
        mean = sum(lengths) / len(of)
        weights = {
            c: math.exp(alpha * p * (mean / length) ** lenpen)
            for c, p, length in zip(of, own, lengths, strict=True)
        }
        repeated += len(of) - len(weights)
        for c, weight in weights.items():
            share = weight / sum(weights.values())
            text = student.text(c)
            score = BLEU(smooth_method="add-k", smooth_value=1).sentence_score(text, [reference])
            expected.append(share * score.score / 100 / len(found))
            counts = BLEU(smooth_method="none").corpus_score([text], [[reference]])
            added = [*counts.counts, *counts.totals, counts.sys_len, counts.ref_len]
            sums = [a + share * b for a, b in zip(sums, added, strict=True)]
    if name == "of the set":
        assert repeated
        expected = [float(corpus_bleu(torch.tensor(sums)))]
    if name == "reinforce":
        scores = student.measure.scores([[student.text(c) for c in of] for of in found], references)
        expected = [sum(map(sum, scores)) / 25]
    assert value == pytest.approx(sum(expected), rel=1e-4)
    assert 0.01 < value < 0.99


def test_weights_by_length_rank_as_search_does(prepared_toy):
    student = make_student(prepared_toy, candidates="beam", steps=25, samples=6)
    train_student(student, 1, None)
    student.module.eval()
    net_input = student.dev.collate(list(student.dev.usable[:8]))["net_input"]
    words = student.dictionary
    with torch.no_grad():
        limit = length_limit(student.module, net_input)
        found = student.source.draw(student.spec, student.module, net_input, limit, 0, words)
        log_probs = candidate_log_probs(
            student.module, net_input, found, eos=words.eos(), pad=words.pad()
        )
    lengths = torch.tensor([[len(c.tokens) + 1.0 for c in of] for of in found])
    whole = torch.tensor([all(c.ended for c in of) for of in found])
    assert bool(whole.any()) and len({*lengths[whole].flatten().tolist()}) > 1
    ranked = ranked_by_length(log_probs, lengths, 1.0)[whole]
    assert bool((ranked.diff(dim=1) <= 1e-5).all())
    by_p = log_probs[whole]
    assert bool((by_p.diff(dim=1) > 0).any())  # p alone prefers other, shorter ones


def test_a_measure_of_the_users_own(prepared_toy, tmp_path, monkeypatch):
    """One that is 1 of everything is 1 in expectation, and no omega changes that."""
    code = """
        def one(hypothesis, reference): return 1.0
        def empty(hypothesis, reference): return float(not hypothesis)
    """
    (tmp_path / "own_measures_here.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    for estimator in ("mrt", "reinforce"):
        student = make_student(prepared_toy, measure="own_measures_here:one", estimator=estimator)
        value = student.smoothed_measure(3)
        gradients = torch.autograd.grad(value, list(student.module.parameters()), allow_unused=True)
        assert float(value.detach()) == pytest.approx(1.0)
        assert max(float(g.abs().max()) for g in gradients if g is not None) < 1e-6
        assert student.true_measure() == 1.0
    student = make_student(prepared_toy, measure="own_measures_here:empty")
    assert student.measure_name == "own_measures_here:empty"
    assert student.measure.corpus(["", "x", "", "y"], ["a"] * 4) == 0.5


def tokenised_corpus():
    """Return the toy corpus as the Moses tokenizer leaves text, escapes and all."""
    generator = random.Random(3)
    marks = [" ,", " .", " ?", " &apos;s", " &quot; x &quot;", " a @-@ b", ""]

    def marked(line):
        words = line.split()
        return "".join(f" {word}{generator.choice(marks)}" for word in words).strip()

    return {
        split: ([marked(line) for line in first], [marked(line) for line in second])
        for split, (first, second) in toy_corpus().items()
    }


@pytest.fixture(scope="module")
def tokenised(tmp_path_factory):
    """Return a prepared folder of tokenised text in subword-nmt's units."""
    folder = tmp_path_factory.mktemp("prepared") / "tokenised"
    prepare_corpus(
        tokenised_corpus(), folder, name="tokenised", vocabulary_size=30, subwords="subword-nmt"
    )
    return folder


MOSES = "--tokenizer moses --moses-no-escape"


@pytest.fixture(scope="module")
def checkpoints(prepared_toy, tokenised, tmp_path_factory):
    """Return both folders, each with the checkpoint of a hardly trained student."""
    found = {}
    for name, data in (("raw", prepared_toy), ("tokenised", tokenised)):
        save = tmp_path_factory.mktemp(name)
        flags = [str(data / "data-bin"), *TINY_MODEL, *TINY_RUN, "--save-dir", str(save)]
        done = run_module("fairseq_cli.train", flags)
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = (data, save / "checkpoint_last.pt")
    return found


def score_dev(checkpoints, name, tokenizer, out):
    data, checkpoint = checkpoints[name]
    flags = f"--cpu --beam 2 --max-len-b 12 {tokenizer}"
    scored = score_checkpoint(data, checkpoint, flags.split(), "valid", out)
    return scored, read_lines(scored.hypotheses), make_student(data, generate=flags)


@pytest.mark.parametrize(
    ("name", "tokenizer", "tokenize"),
    [("raw", "", "13a"), ("tokenised", "", "none"), ("tokenised", MOSES, "13a")],
)
def test_teacher_and_checkpoint_are_scored_on_the_same_text(
    checkpoints, tmp_path, name, tokenizer, tokenize
):
    """The student's text of a checkpoint's symbols is the text that the checkpoint is scored on."""
    scored, hypotheses, student = score_dev(checkpoints, name, tokenizer, tmp_path)
    symbols = read_output(scored.log, SYMBOLS)
    index, start = student.dictionary.index, student.dictionary.bos()
    for number, line in symbols.items():
        tokens = tuple(index(symbol) for symbol in line.split())
        # A start symbol within a sample is no text.
        assert student.text(Candidate((*tokens, start), True)) == hypotheses[number]
    references = [student.dev.reference(i) for i in range(len(student.dev))]
    bleu, signature = build_measure("expected_bleu", tokenize).judge(hypotheses, references)
    assert (scored.score, scored.signature) == (bleu, signature)
    assert student.measure.corpus(hypotheses, references) == scored.score / 100
    if tokenizer:  # where fairseq itself joins the subwords and undoes the tokeniser
        flags = f"{tokenizer} --remove-bpe"
        by_fairseq, texts, _ = score_dev(checkpoints, name, flags, tmp_path / "fairseq")
        assert texts == hypotheses
        assert by_fairseq.score == scored.score


@pytest.mark.parametrize(("language", "text"), [("fr", "l'homme"), ("en", "l' homme")])
def test_text_is_detokenised_by_the_rules_of_its_language(language, text):
    form = TextForm("words").as_generated(["--tokenizer", "moses"], language)
    assert form.detokenised("l' homme") == text


def test_references_lose_what_the_tokenizer_did(tokenised):
    """Of a hypothesis that is the reference: all measures are perfect, detokenised or not."""
    for generate, shown in (("", "&apos;s"), ("--tokenizer moses", "'s")):
        student = make_student(tokenised, generate=generate)
        assert any(shown in student.dev.reference(i) for i in range(len(student.dev)))
        for i in range(len(student.dev)):
            tokens = tuple(student.dev.dataset[i]["target"].tolist()[:-1])
            assert student.text(Candidate(tokens, True)) == student.dev.reference(i)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"candidates": "nucleous"}, "did you mean 'nucleus'"),
        ({"candidates": "top-k"}, "top_k is 0; it must be at least 2 with nmt.candidates=top-k"),
        # One symbol makes one candidate, whose expectation is flat.
        ({"candidates": "top-k", "top_k": 1}, "top_k is 1; it must be at least 2"),
        ({"candidates": "nucleus"}, r"nmt.top_p is 1.0; it must be in \(0, 1\) with nmt.cand"),
        ({"candidates": "nucleus", "top_p": 1.5}, "nmt.top_p is 1.5"),
        ({"candidates": "temperature"}, "set another, or use ancestral"),
        ({"candidates": "temperature", "temperature": 0.0}, "nmt.temperature is 0.0"),
        ({"candidates": "beam", "beam": 3}, "nmt.beam is 3; .*at least nmt.samples, 8"),
        ({"temperature": 0.5}, "nmt.temperature has no effect with nmt.candidates=ancestral; use "
                               "nucleus or temperature or top-k"),
        ({"candidates": "beam", "top_k": 5}, "nmt.top_k has no effect"),
        ({"measure": "log_likelihood", "candidates": "beam"},
         "nmt.candidates has no effect with nmt.measure=log_likelihood; leave it out"),
        ({"measure": "log_likelihood", "lenpen": 1.0}, "nmt.lenpen has no effect with nmt.measure"),
        ({"candidates": "beam", "estimator": "reinforce"},
         "reinforce needs samples from the model's own law.*ancestral, or nmt.estimator=mrt"),
        ({"measure": "expected_blue"}, "did you mean 'expected_bleu'"),
        ({"measure": "gone_away:score"}, "nmt.measure gone_away:score cannot be imported"),
        ({"alpha": 0.0}, "nmt.alpha is 0.0; it must be above 0"),
        ({"generate": "--beam '5"}, "nmt.generate: No closing quotation"),
        ({"samples": 1}, "nmt.samples is 1; it must be at least 2"),
    ],
)  # fmt: skip
def test_impossible_settings_are_one_line_each(changes, says):
    found = problems(NmtSpec(**changes))
    assert len(found) == 1
    assert re.search(says, found[0])
    assert isinstance(found[0], NoEffect) == ("no effect" in says)
    with pytest.raises(UserError, match=says):
        build_student(NmtSpec(**changes))
    assert FIELDS.get("nmt").problems(NmtSpec(**changes)) == found  # what `recipes validate` says
    assert problems(NmtSpec()) == []
