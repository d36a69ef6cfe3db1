"""Smoothed measures M-tilde: the expected measure under the student's own distribution.

L2T-DLF section 3.3: M-tilde(f(x), y) = sum_y' M(y', y) p(y'|x). All return a scalar to maximise.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from l2t_core.losses.products import target_log_probs


def expected_accuracy(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of p(y|x) over log-probabilities [N, K] and targets [N]."""
    return target_log_probs(log_probs, targets).exp().mean()


def log_likelihood(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of log p(y|x), in nats."""
    return target_log_probs(log_probs, targets).mean()


def margin_surrogate(log_probs: Tensor, targets: Tensor, k: float = 50.0) -> Tensor:
    """Return minus the mean of 2*sigmoid(k (max_i p_i - p_y)) - 1, the authors' demo's measure.

    Zero where the true class leads, towards -1 where another leads by more than a few 1/k.
    """
    probs = log_probs.exp()
    gap = probs.max(1).values - target_log_probs(log_probs, targets).exp()
    return -(2.0 * torch.sigmoid(k * gap) - 1.0).mean()


def smoothed_accuracy(log_probs: Tensor, targets: Tensor, width: float = 0.2) -> Tensor:
    """Return the mean of sigmoid(m / (width * s)), with margins m and their mean size s.

    m = log p_y - max_{i != y} log p_i over log-probabilities [N, K] and targets [N]; s, the mean
    of |m|, is differentiated too. So it does not change when all logits are scaled, as accuracy
    does not: a student cannot gain by certainty alone, and where its probabilities are 0 and 1
    the derivative does not vanish. It tends to the accuracy as ``width`` tends to 0.
    """
    others = log_probs.scatter(1, targets.unsqueeze(1), -torch.inf).amax(1)
    margins = target_log_probs(log_probs, targets) - others
    size = margins.abs().mean()
    # A last layer may begin at zero, and all margins with it: each counts half.
    size = torch.where(size > 0.0, size, torch.ones_like(size))
    return torch.sigmoid(margins / (width * size)).mean()


def ranked_by_length(log_probs: Tensor, lengths: Tensor, penalty: float) -> Tensor:
    """Return log p (L / l)^penalty [B, n], L being the mean of each source's lengths l [B, n].

    Beam search ranks candidates by log p / l^penalty (Wu et al. 2016, section 7, with the plain
    length), not by log p, which prefers short ones. L only keeps the scale, so that candidates of
    equal length weigh what they weigh by log p, as all do with a ``penalty`` of 0.
    """
    return log_probs * (lengths.mean(1, keepdim=True) / lengths) ** penalty


def mrt_expectations(
    log_probs: Tensor, scores: Tensor, candidate_mask: Tensor, alpha: float = 1.0
) -> Tensor:
    """Return each source's expected score [B] under q(y') ~ p(y'|x)^alpha, distinct candidates.

    Minimum risk training (Shen et al. 2016, equation 9): the distribution renormalised over a
    sample's distinct candidates.

    Args:
        log_probs: [B, n] log p(y'|x) of each candidate.
        scores: [B, n] measure of each candidate, constant.
        candidate_mask: [B, n] true for the first copy of each distinct candidate.
        alpha: sharpness; 1 with all sentences listed is the exact expectation.
    """
    weights = torch.softmax((alpha * log_probs).masked_fill(~candidate_mask, -torch.inf), 1)
    # Where all score alike, weights that add up to 1 but for rounding would have a gradient: noise,
    # of which Adam makes steps as large as any.
    alike = (scores == scores[:, :1]).all(1, keepdim=True)
    expected = (weights * scores.masked_fill(alike, 0.0)).sum(1)
    return torch.where(alike.squeeze(1), scores[:, 0], expected)


def mrt_measure(
    log_probs: Tensor, scores: Tensor, candidate_mask: Tensor, alpha: float = 1.0
) -> Tensor:
    """Return the mean over sources of :func:`mrt_expectations`."""
    return mrt_expectations(log_probs, scores, candidate_mask, alpha).mean()


def reinforce_measure(log_probs: Tensor, scores: Tensor) -> Tensor:
    """Return the mean sampled score, with the score-function gradient.

    Each sample's baseline is the mean score of its source's other samples (leave one out), which
    keeps the gradient unbiased for independent samples.

    Args:
        log_probs: [B, n] log p(y'|x) of n >= 2 independent samples per source.
        scores: [B, n] measure of each sample, constant.
    """
    n = log_probs.shape[1]
    if n < 2:
        raise ValueError("a leave-one-out baseline needs at least two samples per source")
    baseline = (scores.sum(1, keepdim=True) - scores) / (n - 1)
    surrogate = ((scores - baseline) * log_probs).mean()
    # The value is the mean score; only the gradient comes from the surrogate.
    return scores.mean() + surrogate - surrogate.detach()


def corpus_bleu(sums: Tensor) -> Tensor:
    """Return BLEU in [0, 1] of a set of translations from its ``sums`` [10], differentiable.

    They are the matched n-grams and all n-grams, orders 1 to 4 each, then the lengths of
    hypotheses and references (Papineni et al. 2002, section 2.3). Orders n >= 2 are smoothed by
    one. Sums may be expectations: to first order it is then the expected BLEU of a set (Rosti et
    al. 2011, equation 5). Without a matched word it is 0, and flat.
    """
    matched, every, (length, wanted) = sums[:4], sums[4:8], sums[8:].unbind()
    if float(matched[0].detach()) <= 0.0:
        return 0.0 * sums.sum()
    one = torch.ones_like(matched)
    one[0] = 0.0
    precision = ((matched + one).log() - (every + one).log()).mean()
    brevity = (1.0 - wanted / length).clamp(max=0.0)
    return (precision + brevity).exp()


def distinct_mask(candidates: Sequence[Sequence[Hashable]]) -> Tensor:
    """Return [B, n], true for the first occurrence of each candidate among its source's."""
    rows = []
    for of in candidates:
        seen: set[Hashable] = set()
        row = []
        for candidate in of:
            row.append(candidate not in seen)
            seen.add(candidate)
        rows.append(row)
    return torch.tensor(rows)
