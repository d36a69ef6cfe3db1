"""The sampler's law and the estimators' gradients, on sentences that can all be listed."""

from __future__ import annotations

import itertools
import string
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from l2t_core.errors import UserError
from l2t_core.students.measures import distinct_mask, mrt_measure, reinforce_measure

pytest.importorskip("fairseq")
from fairseq.data import Dictionary
from fairseq.models.lstm import LSTMModel
from fairseq.models.lstm import base_architecture as lstm_architecture
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer.transformer_legacy import base_architecture

from l2t_fairseq.measures.candidates import CANDIDATES, candidate_problems
from l2t_fairseq.measures.sampling import (
    Candidate,
    candidate_log_probs,
    draw,
    encode,
    greedy,
    sample,
)
from l2t_fairseq.recipe import NmtSpec

LONGEST = 2
WIDTHS = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("embed_dim", 8), ("ffn_embed_dim", 8), ("layers", 1),
                       ("attention_heads", 2), ("hidden_size", 8))
}


def make_model(arch: str, words: str = "ab") -> tuple[nn.Module, Dictionary]:
    dictionary = Dictionary()
    for symbol in words:
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
            p.mul_(2.0 if arch == "transformer" else 4.0)
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


def fits(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Return the p-value of ``counts`` under ``law``, rare outcomes taken together (Pearson)."""
    expected = law.double() / law.double().sum() * counts.sum()
    rare = expected < 5.0
    observed = torch.cat([counts[~rare].double(), counts[rare].double().sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    assert float(observed[~kept].sum()) == 0  # nothing where the law says nothing
    return float(chisquare(observed[kept], expected[kept]).pvalue)


def next_probs(setting, source: int, prefix: tuple[int, ...]) -> list[float]:
    """Return the law of the symbol after ``prefix``, decoded whole, by plain arithmetic."""
    model, net_input, _, ends = setting
    previous = torch.tensor([[ends["eos"], *prefix]] * 2)
    with torch.no_grad():
        output = model(**net_input, prev_output_tokens=previous)
        probs = model.get_normalized_probs(output, log_probs=False)[source, -1].double().tolist()
    probs[ends["pad"]] = 0.0
    return [p / sum(probs) for p in probs]


def cut(probs: list[float], temperature: float, k: int, p: float) -> list[float]:
    """Return ``probs`` tempered, and cut to the ``k`` best and to the nucleus of mass ``p``."""
    warm = [q ** (1 / temperature) for q in probs]
    warm = [q / sum(warm) for q in warm]
    ranked = sorted(range(len(warm)), key=lambda i: -warm[i])[: k or None]
    kept, mass = [], 0.0
    for i in ranked:
        if mass < p:
            kept.append(i)
            mass += warm[i]
    return [q / mass if i in kept else 0.0 for i, q in enumerate(warm)]


def exact_law(setting, source: int, **settings: float) -> torch.Tensor:
    """Return the probability of each sentence where every step's law is cut by ``settings``."""
    _, _, sentences, ends = setting
    cache: dict[tuple[int, ...], list[float]] = {}
    law = []
    for sentence in sentences:
        probability = 1.0
        symbols = [*sentence.tokens, *([ends["eos"]] if sentence.ended else [])]
        for i, symbol in enumerate(symbols):
            prefix = sentence.tokens[:i]
            if prefix not in cache:
                cache[prefix] = cut(next_probs(setting, source, prefix), **settings)
            probability *= cache[prefix][symbol]
        law.append(probability)
    assert sum(law) == pytest.approx(1.0)
    return torch.tensor(law, dtype=torch.float64)


SOURCES = {
    "ancestral": ({}, {"temperature": 1.0, "k": 0, "p": 1.0}),
    "temperature": ({"temperature": 2.0}, {"temperature": 2.0, "k": 0, "p": 1.0}),
    "top-k": (
        {"temperature": 3.0, "top_k": 3}, {"temperature": 3.0, "k": 3, "p": 1.0},
    ),
    "nucleus": (
        {"temperature": 4.0, "top_p": 0.7}, {"temperature": 4.0, "k": 0, "p": 0.7},
    ),
}  # fmt: skip


class Words:
    """What a source needs to know of a dictionary."""

    def __init__(self, ends):
        self.ends = ends

    def eos(self):
        return self.ends["eos"]

    def pad(self):
        return self.ends["pad"]


@pytest.mark.parametrize("name", SOURCES)
def test_samples_follow_the_exact_law(setting, name):
    """Ancestral samples the model's own; the others that, cut and renormalised at each step."""
    model, net_input, sentences, ends = setting
    settings, exact = SOURCES[name]
    spec = NmtSpec(candidates=name, samples=6000, **settings)
    assert candidate_problems(spec) == []
    found = CANDIDATES.get(name).draw(spec, model, net_input, LONGEST, 1, Words(ends))
    position = {c: i for i, c in enumerate(sentences)}
    for source in range(2):
        counts = torch.zeros(len(sentences))
        for candidate in found[source]:
            counts[position[candidate]] += 1
        law = exact_law(setting, source, **exact)
        if name == "ancestral":
            own = all_log_probs(setting)[source].exp().detach().double()
            torch.testing.assert_close(own, law, rtol=1e-4, atol=1e-7)
        else:  # the cut law is another one, or this test would tell nothing
            assert fits(counts, all_log_probs(setting)[source].exp().detach()) < 1e-6
        assert fits(counts, law) > 1e-3


def test_a_draw_never_takes_what_has_no_mass_and_does_not_mind_a_constant():
    generator = torch.Generator().manual_seed(5)
    law = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    rows = law.log().expand(20000, 6) + torch.linspace(-300, 300, 20000)[:, None]
    counts = torch.bincount(draw(rows, generator), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0
    assert fits(counts, law) > 1e-3
    assert int(draw(torch.full((1, 6), torch.nan), generator)) < 6  # a dead student ends elsewhere


def all_scores(model, net_input, source, symbols, eos) -> dict[tuple[int, ...], float]:
    """Return the mean log-probability of a symbol, the end included, of every sentence."""
    found = {}
    with torch.no_grad():
        encoded = encode(model, net_input)
        for length in range(LONGEST + 1):
            every = list(itertools.product(symbols, repeat=length))
            previous = torch.tensor([[eos, *tokens] for tokens in every])
            rows = torch.full((len(every),), source)
            chosen = model.encoder.reorder_encoder_out(encoded, rows)
            output = model.decoder(previous, encoder_out=chosen)
            log_probs = model.get_normalized_probs(output, log_probs=True)
            targets = torch.tensor([[*tokens, eos] for tokens in every])
            picked = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2).mean(1)
            found |= dict(zip(every, picked.tolist(), strict=True))
    return found


def test_beam_search_finds_the_best_sentences(setting):
    """Against a list of all 3,193 sentences: the very best first, then what a beam can see."""
    model, net_input, _, ends = setting
    arch = "lstm" if isinstance(model, LSTMModel) else "transformer"
    model, dictionary = make_model(arch, string.ascii_letters)
    spec = NmtSpec(candidates="beam", samples=6, beam=25)
    found = CANDIDATES.get("beam").draw(spec, model, net_input, LONGEST, 1, dictionary)
    symbols = [i for i in range(len(dictionary)) if i not in ends.values()]
    for source in range(2):
        score = all_scores(model, net_input, source, symbols, ends["eos"])
        order = sorted(score, key=lambda tokens: -score[tokens])
        ranks = [order.index(c.tokens) for c in found[source]]
        assert ranks[0] == 0
        assert ranks == sorted(set(ranks))
        assert all(c.ended == (len(c.tokens) < LONGEST) for c in found[source])
        # Of sentences at random, six in order would have ranks of hundreds.
        assert ranks[2] < 10


def test_beam_search_may_find_the_empty_sentence(setting, monkeypatch):
    """As samples may be empty; fairseq's search alone begins with one symbol."""
    model, net_input, _, ends = setting
    arch = "lstm" if isinstance(model, LSTMModel) else "transformer"
    model, dictionary = make_model(arch, string.ascii_letters)
    own = model.get_normalized_probs

    def ending(*given, **named):
        likely = own(*given, **named)
        likely[..., ends["eos"]] += 20.0
        return likely.log_softmax(-1)

    monkeypatch.setattr(model, "get_normalized_probs", ending)
    spec = NmtSpec(candidates="beam", samples=4)
    found = CANDIDATES.get("beam").draw(spec, model, net_input, LONGEST, 1, dictionary)
    assert [of[0] for of in found] == [Candidate((), True)] * 2


def test_beam_search_that_finds_too_few_repeats_the_last(setting):
    model, net_input, _, _ = setting
    dictionary = make_model("lstm")[1]
    spec = NmtSpec(candidates="beam", samples=2)
    # Only the empty sentence is shorter than one symbol.
    found = CANDIDATES.get("beam").draw(spec, model, net_input, 0, 1, dictionary)
    assert found == [[Candidate((), False)] * 2] * 2
    with pytest.raises(UserError, match=r"a beam of 3 is too wide for the 6 symbols.*to 2 or less"):
        wide = NmtSpec(candidates="beam", samples=3)
        CANDIDATES.get("beam").draw(wide, model, net_input, 2, 1, dictionary)


@pytest.mark.parametrize("name", CANDIDATES.names())
def test_a_dead_student_has_no_measure_and_ends_nothing(name):
    """Its candidates are anything and their log-probabilities no numbers: it is skipped."""
    model, dictionary = make_model("transformer")
    ends = {"eos": dictionary.eos(), "pad": dictionary.pad()}
    net_input = {"src_tokens": torch.tensor([[4, 5, 2]]), "src_lengths": torch.tensor([3])}
    with torch.no_grad():
        next(model.decoder.parameters()).fill_(torch.nan)
    settings = {"temperature": {"temperature": 0.5}, "top-k": {"top_k": 2},
                "nucleus": {"top_p": 0.5}}.get(name, {})  # fmt: skip
    spec = NmtSpec(candidates=name, samples=2, **settings)
    found = CANDIDATES.get(name).draw(spec, model, net_input, LONGEST, 1, dictionary)
    assert candidate_log_probs(model, net_input, found, **ends).isnan().all()


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
    mask = distinct_mask([sentences] * 2)
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
