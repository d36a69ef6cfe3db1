"""Measures of sentences and sets against sacreBLEU's own, by hand, and of the user's own."""

from __future__ import annotations

import math

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF, TER

from l2t_core.errors import UserError
from l2t_core.students.measures import corpus_bleu
from l2t_fairseq.measures.sentence_scores import build_measure, check_measure_name, measure_names

REFERENCES = ["The cat sat on the mat.", "It's 3.50 €, isn't it?", "Größe: 5 m² - \"ja\"", "a"]
HYPOTHESES = [
    ["The cat sat on the mat.", "the cat sat on a mat", "", "mat", "the cat sat on a mat"],
    ["It 's 3.50 € , is n't it ?", "it is", "It's 3.50 €, isn't it?", "x", "€"],
    ["Größe: 5 m2 - ja", "Größe", "Grosse : 5 m²", "- - -", ""],
    ["a", "b", "a b c d e f", "A", ""],
]


def sentence_bleu(hypothesis: str, reference: str) -> float:
    return build_measure("expected_bleu").scores([[hypothesis]], [reference])[0][0]


def test_bleu_by_hand():
    """Hypothesis of 5 words, 4 right: precisions 4/5, (2+1)/(4+1), (1+1)/(3+1), (0+1)/(2+1)."""
    found = sentence_bleu("the cat sat on mats", "the cat sat in mats")
    expected = math.exp(sum(map(math.log, (4 / 5, 3 / 5, 2 / 4, 1 / 3))) / 4)
    assert found == pytest.approx(expected, rel=1e-6)


def test_bleus_brevity_and_edges():
    # Two of four words, all right: precisions 2/2, (1+1)/(1+1), (0+1)/(0+1) twice.
    assert sentence_bleu("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)
    assert sentence_bleu("", "a b") == 0.0
    assert sentence_bleu("March 3, 2015", "March 3, 2015") == pytest.approx(1.0)
    assert sentence_bleu("x y", "a b c") == 0.0


def test_ter_by_hand():
    """One substitution in six words; ten words for one are ten edits, so 1 - 10."""
    measure = build_measure("expected_ter")
    assert measure.name == "1-ter"
    found = measure.scores([["a b c x e f", "a b c d e f"]], ["a b c d e f"])
    assert found == [[pytest.approx(1 - 1 / 6), 1.0]]
    assert measure.scores([["b b b b b b b b b b"]], ["a"]) == [[pytest.approx(1 - 10)]]


OURS = {
    "expected_bleu": (
        lambda: BLEU(smooth_method="add-k", smooth_value=1, effective_order=True), BLEU, 0, 1),
    "expected_corpus_bleu": (
        lambda: BLEU(smooth_method="add-k", smooth_value=1, effective_order=True), BLEU, 0, 1),
    "expected_chrf": (CHRF, CHRF, 0, 1),
    "expected_chrf++": (lambda: CHRF(word_order=2), lambda: CHRF(word_order=2), 0, 1),
    "expected_ter": (TER, TER, 1, -1),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_scores_are_sacrebleus_own(name):
    """Of sentences, whatever was scored before them, and of a set."""
    sentence, corpus, base, sign = OURS[name]
    measure = build_measure(name)
    for _ in range(2):  # the second time out of the cache
        found = measure.scores(HYPOTHESES, REFERENCES)
        for of, texts, reference in zip(found, HYPOTHESES, REFERENCES, strict=True):
            for value, text in zip(of, texts, strict=True):
                score = sentence().sentence_score(text, [reference]).score
                assert value == pytest.approx(base + sign * score / 100, abs=1e-12)
    first = [texts[0] for texts in HYPOTHESES]
    metric = corpus()
    score = metric.corpus_score(first, [REFERENCES]).score
    assert measure.corpus(first, REFERENCES) == pytest.approx(base + sign * score / 100)
    judged, signature = measure.judge(first, REFERENCES)
    assert judged == 100 * base + sign * score
    assert signature == str(metric.get_signature())


@pytest.mark.parametrize("chosen", [(0, 0, 0, 0), (1, 0, 1, 2), (3, 4, 4, 1)])
def test_bleu_of_a_set_from_what_is_added_up_is_sacrebleus_own(chosen):
    statistics = torch.tensor(
        build_measure("expected_corpus_bleu").statistics(HYPOTHESES, REFERENCES),
        dtype=torch.float64,
    )
    sums = sum(of[i] for of, i in zip(statistics, chosen, strict=True))
    texts = [of[i] for of, i in zip(HYPOTHESES, chosen, strict=True)]
    expected = BLEU(smooth_method="add-k", smooth_value=1).corpus_score(texts, [REFERENCES]).score
    assert float(corpus_bleu(sums)) == pytest.approx(expected / 100, abs=1e-12)


def test_tokenised_text_is_not_tokenised_again():
    hypothesis, reference = "on the mat.", "on the mat ."
    found = build_measure("expected_bleu", "none").scores([[hypothesis]], [reference])[0][0]
    smoothed = BLEU(smooth_method="add-k", smooth_value=1, effective_order=True, tokenize="none")
    assert found == pytest.approx(smoothed.sentence_score(hypothesis, [reference]).score / 100)
    assert found != sentence_bleu(hypothesis, reference)
    # What it adds to a set's: of three words two are right, and of two pairs one is.
    for tokenize, counts in (("none", [2, 1, 0, 0, 3, 2, 1, 0, 3, 4]),
                             ("13a", [4, 3, 2, 1, 4, 3, 2, 1, 4, 4])):  # fmt: skip
        of_the_set = build_measure("expected_corpus_bleu", tokenize)
        assert of_the_set.statistics([[hypothesis]], [reference]) == [[counts]]


OWN = """
calls = []
def same_words(hypothesis, reference):
    calls.append(hypothesis)
    a, b = set(hypothesis.split()), set(reference.split())
    return len(a & b) / len(a | b)
def percent(hypothesis, reference):
    return 37.0
def ends(hypothesis, reference):
    raise SystemExit(3)
def nothing(hypothesis, reference):
    return None
def not_a_number(hypothesis, reference):
    return float("nan")
def one_text(hypothesis):
    return 1.0
"""


@pytest.fixture
def own_scores(tmp_path, monkeypatch):
    (tmp_path / "own_scores_here.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("own_scores")
def test_a_measure_of_the_users_own():
    measure = build_measure("own_scores_here:same_words")
    found = measure.scores([["a b", "a b", "b c"], ["x", "y", "y"]], ["a b", "y"])
    assert found == [[1.0, 1.0, pytest.approx(1 / 3)], [0.0, 1.0, 1.0]]
    import own_scores_here

    assert own_scores_here.calls == ["a b", "b c", "x", "y"]  # a text is scored once
    assert measure.name == "own_scores_here:same_words"
    # A set's score is the mean of its sentences'.
    assert measure.corpus(["b c", "y"], ["a b", "y"]) == pytest.approx((1 / 3 + 1) / 2)
    judged, signature = measure.judge(["b c", "y"], ["a b", "y"])
    assert judged == pytest.approx(200 / 3) and signature == "mean:own_scores_here:same_words"


@pytest.mark.usefixtures("own_scores")
@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("percent", r"returned 37.0 for 'a' against 'b'; it must return a number in \[0, 1\]"),
        ("nothing", "fails on 'a' against 'b' .TypeError"),
        ("ends", "fails on 'a' against 'b' .SystemExit: 3"),
        ("not_a_number", "returned nan"),
        ("one_text", "takes two texts and returns a number"),
        ("sameword", "nmt.measure own_scores_here:sameword cannot be imported"),
    ],
)
def test_own_measures_that_do_not_fit(function, says):
    with pytest.raises(UserError, match=says) as error:
        build_measure(f"own_scores_here:{function}").scores([["a"]], ["b"])
    assert "\n" not in str(error.value)


def test_unknown_names_come_with_the_nearest():
    for name in measure_names():
        check_measure_name(name)
    with pytest.raises(UserError, match=r"did you mean 'expected_chrf'.*module:function"):
        build_measure("expected_chfr")
    # A likelihood is what the teacher climbs; dev is still scored by BLEU.
    assert build_measure("log_likelihood").name == "bleu"
