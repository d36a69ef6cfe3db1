"""Smoothed measures: closed forms, and estimators against exact enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from l2t_core.students.measures import (
    corpus_bleu,
    distinct_mask,
    expected_accuracy,
    log_likelihood,
    margin_surrogate,
    mrt_expectations,
    mrt_measure,
    ranked_by_length,
    reinforce_measure,
    smoothed_accuracy,
)


def test_classification_measures_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    assert float(expected_accuracy(probs.log(), targets)) == pytest.approx(0.35)
    expected = (torch.tensor([0.5, 0.2]).log().mean()).item()
    assert float(log_likelihood(probs.log(), targets)) == pytest.approx(expected, rel=1e-6)
    wrong = 2 / (1 + torch.exp(torch.tensor(-50 * 0.5)).item()) - 1
    assert float(margin_surrogate(probs.log(), targets)) == pytest.approx(-wrong / 2)


def test_smoothed_accuracy_sees_margins_and_no_scale():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (200,), generator=generator)

    def value(scale, width=0.2):
        return smoothed_accuracy((scale * logits).log_softmax(1), targets, width)

    torch.testing.assert_close(value(1.0), value(30.0))
    accuracy = (logits.argmax(1) == targets).double().mean()
    torch.testing.assert_close(value(1.0, 1e-6), accuracy)
    # Margins 1 and -3 of mean size 2, by hand.
    pair = torch.tensor([[2.0, 1.0, 0.0], [4.0, 1.0, 0.0]], dtype=torch.float64).log_softmax(1)
    found = smoothed_accuracy(pair, torch.tensor([0, 1]), 0.5)
    assert float(found) == pytest.approx((torch.sigmoid(torch.tensor([1.0, -3.0])).mean()).item())


def test_smoothed_accuracy_of_a_student_that_knows_nothing_is_a_half():
    """With a derivative by which it may begin: that of margins as they are."""
    logits = torch.zeros(4, 3, requires_grad=True)
    value = smoothed_accuracy(logits.log_softmax(1), torch.tensor([0, 1, 2, 0]), 0.5)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(value) == 0.5
    assert float(gradient[1, 1]) == pytest.approx(0.25 / 0.5 / 4)


@pytest.mark.parametrize(
    "measure", [expected_accuracy, log_likelihood, margin_surrogate, smoothed_accuracy]
)
def test_measures_gradients_equal_central_differences(measure):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 5, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(5, (12,), generator=generator)
    assert torch.autograd.gradcheck(lambda x: measure(x.log_softmax(1), targets), (logits,))


def test_candidates_that_score_alike_have_no_gradient():
    """Exactly: of noise of 1e-8 Adam would make steps as large as any."""
    generator = torch.Generator().manual_seed(4)
    log_probs = torch.randn(64, 8, generator=generator).requires_grad_()
    scores = torch.full((64, 8), 0.7)
    scores[::2, :4] = 0.1  # every other row tells candidates apart
    found = mrt_expectations(log_probs, scores, torch.ones(64, 8, dtype=torch.bool))
    assert torch.equal(found[1::2], scores[1::2, 0])
    (gradient,) = torch.autograd.grad(found.sum(), log_probs)
    assert not gradient[1::2].any() and gradient[::2].all()


# A toy language: all sentences of two words over three words, one position at a time.
SENTENCES = list(itertools.product(range(3), repeat=2))
SCORES = torch.linspace(0, 1, 9, dtype=torch.float64)[torch.randperm(
    9, generator=torch.Generator().manual_seed(4))]


def log_prob(logits, sentence):
    first = torch.log_softmax(logits[0], 0)[sentence[0]]
    return first + torch.log_softmax(logits[1 + sentence[0]], 0)[sentence[1]]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(6)
    return torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_()


def exact_gradient(logits):
    every = torch.stack([log_prob(logits, s) for s in SENTENCES])
    return torch.autograd.grad((every.exp() * SCORES).sum(), logits)[0]


def test_mrt_over_all_sentences_is_the_exact_expectation(logits):
    every = torch.stack([log_prob(logits, s) for s in SENTENCES])
    # One sentence twice: the copy must not count.
    log_probs = torch.cat([every, every[:1]]).unsqueeze(0)
    scores = torch.cat([SCORES, SCORES[:1]]).unsqueeze(0)
    mask = distinct_mask([[*SENTENCES, SENTENCES[0]]])
    value = mrt_measure(log_probs, scores, mask)
    assert float(value.detach()) == pytest.approx(float((every.exp() * SCORES).sum().detach()))
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], exact_gradient(logits))


def test_mrt_alpha_flattens(logits):
    every = torch.stack([log_prob(logits, s) for s in SENTENCES]).unsqueeze(0)
    mask = torch.ones(1, 9, dtype=torch.bool)
    value = mrt_measure(every, SCORES.unsqueeze(0), mask, alpha=0.0)
    assert float(value.detach()) == pytest.approx(float(SCORES.mean()))


def test_reinforce_is_unbiased_by_exact_enumeration(logits):
    """The expectation over every pair of samples, each weighted by its probability."""
    every = torch.stack([log_prob(logits, s) for s in SENTENCES])
    weights = every.exp().detach()
    total = torch.zeros_like(logits)
    mean_value = 0.0
    for i, j in itertools.product(range(9), repeat=2):
        pair = torch.stack([every[i], every[j]]).unsqueeze(0)
        value = reinforce_measure(pair, SCORES[[i, j]].unsqueeze(0))
        weight = float(weights[i] * weights[j])
        total += weight * torch.autograd.grad(value, logits, retain_graph=True)[0]
        mean_value += weight * float(value.detach())
    torch.testing.assert_close(total, exact_gradient(logits))
    assert mean_value == pytest.approx(float((weights * SCORES).sum()))


def test_reinforce_needs_two_samples(logits):
    with pytest.raises(ValueError, match="two samples"):
        reinforce_measure(torch.zeros(1, 1), torch.zeros(1, 1))


def test_bleu_of_a_set_by_hand() -> None:
    """Two of four words right, nothing longer but one of two pairs; four words for six."""
    sums = torch.tensor([2.0, 1.0, 0.0, 0.0, 4.0, 2.0, 1.0, 0.0, 4.0, 6.0], dtype=torch.float64)
    precision = (math.log(2 / 4) + math.log(2 / 3) + math.log(1 / 2) + math.log(1 / 1)) / 4
    assert float(corpus_bleu(sums)) == pytest.approx(math.exp(precision + 1 - 6 / 4))
    longer = sums.clone()
    longer[8] = 7.0
    assert float(corpus_bleu(longer)) == pytest.approx(math.exp(precision))


@pytest.mark.parametrize("length", [5.5, 6.5])
def test_bleu_of_a_set_has_the_gradient_of_finite_differences(length: float) -> None:
    sums = torch.tensor(
        [4.5, 2.5, 1.25, 0.0, 5.5, 4.5, 3.5, 2.5, length, 6.0], dtype=torch.float64,
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(corpus_bleu, (sums,))


def test_a_set_without_a_matched_word_is_flat() -> None:
    sums = torch.tensor([0.0] * 8 + [0.0, 6.0], requires_grad=True)
    value = corpus_bleu(sums)
    value.backward()
    assert float(value.detach()) == 0.0 and sums.grad is not None and not bool(sums.grad.any())


def test_weights_by_length_by_hand() -> None:
    log_probs = torch.tensor([[-2.0, -6.0], [-3.0, -5.0]], dtype=torch.float64)
    lengths = torch.tensor([[2.0, 6.0], [4.0, 4.0]], dtype=torch.float64)
    found = ranked_by_length(log_probs, lengths, 1.0)
    # One nat a symbol either way, four symbols on average; equal lengths stay as they are.
    torch.testing.assert_close(found, torch.tensor([[-4.0, -4.0], [-3.0, -5.0]]).double())
    assert torch.equal(ranked_by_length(log_probs, lengths, 0.0), log_probs)
