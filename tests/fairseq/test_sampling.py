"""The sampler's law and the estimators' gradients, on sentences that can all be listed."""

from __future__ import annotations

import itertools
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from l2t_core.measures import distinct_mask, mrt_measure, reinforce_measure

pytest.importorskip("fairseq")
from fairseq.data import Dictionary
from fairseq.models.lstm import LSTMModel
from fairseq.models.lstm import base_architecture as lstm_architecture
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture

from l2t_fairseq.sampling import Candidate, candidate_log_probs, greedy, sample

LONGEST = 2
WIDTHS = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("embed_dim", 8), ("ffn_embed_dim", 8), ("layers", 1),
                       ("attention_heads", 2), ("hidden_size", 8))
}


def make_model(arch: str) -> tuple[nn.Module, Dictionary]:
    dictionary = Dictionary()
    for symbol in ("a", "b"):
        dictionary.add_symbol(symbol)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    torch.manual_seed(3)
    args = Namespace(**WIDTHS, dropout=0.1, decoder_out_embed_dim=8, criterion="cross_entropy",
                     max_source_positions=16, max_target_positions=16)
    if arch == "transformer":
        base_architecture(args)
        model = TransformerModel.build_model(args, task)
    else:
        lstm_architecture(args)
        model = LSTMModel.build_model(args, task)
    with torch.no_grad():  # a peaked law tells mistakes from noise
        for p in model.parameters():
            p.mul_(2.0)
    return model.eval(), dictionary


@pytest.fixture(scope="module", params=["transformer", "lstm"])
def setting(request):
    model, dictionary = make_model(request.param)
    a, b, eos = dictionary.index("a"), dictionary.index("b"), dictionary.eos()
    net_input = {
        "src_tokens": torch.tensor([[dictionary.pad(), a, eos], [a, b, eos]]),
        "src_lengths": torch.tensor([2, 3]),
    }
    if request.param == "lstm":  # it wants its sources sorted by length
        net_input = {k: v.flip(0) for k, v in net_input.items()}
    ends = {"eos": eos, "pad": dictionary.pad()}
    symbols = [i for i in range(len(dictionary)) if i not in ends.values()]
    sentences = [
        Candidate(tokens, len(tokens) < LONGEST)
        for length in range(LONGEST + 1)
        for tokens in itertools.product(symbols, repeat=length)
    ]
    return model, net_input, sentences, ends


def all_log_probs(setting):
    model, net_input, sentences, ends = setting
    return candidate_log_probs(model, net_input, [sentences] * 2, **ends)


def test_probabilities_of_all_sentences_sum_to_one(setting):
    total = all_log_probs(setting).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)


def test_samples_follow_the_models_law(setting):
    model, net_input, sentences, ends = setting
    law = all_log_probs(setting).exp().detach()
    draws = 4000
    found = sample(model, net_input, draws, LONGEST, 1, **ends)
    position = {c: i for i, c in enumerate(sentences)}
    for source in range(2):
        counts = torch.zeros(len(sentences))
        for candidate in found[source]:
            counts[position[candidate]] += 1
        expected = law[source] * draws
        # Five standard deviations of each count, and nothing where the law says nothing.
        assert ((counts - expected).abs() <= 5 * expected.sqrt() + 1e-3).all()


def test_sampling_repeats_itself_and_greedy_is_the_most_probable_path(setting):
    model, net_input, _, ends = setting
    first = sample(model, net_input, 5, LONGEST, 7, **ends)
    assert first == sample(model, net_input, 5, LONGEST, 7, **ends)
    assert first != sample(model, net_input, 5, LONGEST, 8, **ends)
    best = greedy(model, net_input, LONGEST, **ends)
    assert best == greedy(model, net_input, LONGEST, **ends)
    assert len(best) == 2


def score_of(candidate: Candidate) -> float:
    return (sum(candidate.tokens) * 0.37 + len(candidate.tokens)) % 1.0


def flat_gradient(value, model):
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    return torch.cat([
        (torch.zeros_like(p) if g is None else g).reshape(-1)
        for p, g in zip(parameters, found, strict=True)
    ])


def test_mrt_over_all_sentences_is_the_exact_gradient(setting):
    model, _, sentences, _ = setting
    log_probs = all_log_probs(setting)
    scores = torch.tensor([[score_of(c) for c in sentences]] * 2)
    exact = flat_gradient((log_probs.exp() * scores).sum(1).mean(), model)
    mask = distinct_mask([[(*c.tokens, int(c.ended)) for c in sentences]] * 2)
    estimate = flat_gradient(mrt_measure(log_probs, scores, mask), model)
    torch.testing.assert_close(estimate, exact, rtol=1e-3, atol=1e-6)


def test_reinforce_samples_average_to_the_exact_gradient(setting):
    model, net_input, sentences, ends = setting
    scores = torch.tensor([[score_of(c) for c in sentences]] * 2)
    exact = flat_gradient((all_log_probs(setting).exp() * scores).sum(1).mean(), model)
    draws = []
    for seed in range(150):
        found = sample(model, net_input, 16, LONGEST, seed, **ends)
        log_probs = candidate_log_probs(model, net_input, found, **ends)
        sampled = torch.tensor([[score_of(c) for c in of] for of in found])
        draws.append(flat_gradient(reinforce_measure(log_probs, sampled), model))
    stacked = torch.stack(draws)
    error = stacked.mean(0) - exact
    # Projected on the exact gradient: one number with its own standard error.
    along = (stacked @ exact) / exact.norm() ** 2
    standard_error = float(along.std() / len(draws) ** 0.5)
    assert abs(float(along.mean()) - 1.0) < 4 * standard_error
    assert standard_error < 0.1
    assert float(error.norm()) < 4 * float(stacked.std(0).norm()) / len(draws) ** 0.5
