"""Candidates from a fairseq encoder-decoder, and their log-probabilities.

The law of the sampler is the law that scores: padding is impossible in both, sentences may be
empty, and an end that is forced by the length limit is certain and so counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Candidates decoded together when scoring; chunks of one length waste less on padding.
_CHUNK = 64
# Finished sentences are dropped once they are this share of the rows: dropping copies the caches.
_DROP_SHARE = 0.25
# Where padding has all but this share of the mass, float32 no longer tells what is left.
_LEAST_REST = 1e-6

# From the next symbols' log-probabilities [R, V] to those of another law, up to a constant a row.
Law = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A sentence as token ids without the end symbol; ``ended`` if it drew that symbol itself."""

    tokens: tuple[int, ...]
    ended: bool


def length_limit(model: Any, net_input: dict[str, Tensor]) -> int:
    """Return how many symbols a candidate may have: 1.5 times the longest source's and 10 more.

    Never more than the model's decoder has positions for.
    """
    positions = int(model.max_decoder_positions()) - 1  # one position is the start symbol's
    return min(int(1.5 * net_input["src_tokens"].shape[1]) + 10, positions)


def encode(model: Any, net_input: dict[str, Tensor]) -> Any:
    """Return the encoder's output for ``src_tokens`` [B, S] and ``src_lengths`` [B]."""
    return model.encoder(net_input["src_tokens"], src_lengths=net_input["src_lengths"])


def decode(
    model: Any,
    net_input: dict[str, Tensor],
    copies: int,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
    *,
    eos: int,
    pad: int,
) -> list[list[Candidate]]:
    """Decode ``copies`` sentences per source, one symbol at a time.

    ``choose`` maps log-probabilities [R, V], minus infinity at padding and right up to a constant
    a row, to symbols [R]. The model must be in evaluation mode. Returns one list of candidates per
    source.
    """
    batch = net_input["src_tokens"].shape[0]
    device = net_input["src_tokens"].device
    rows = torch.arange(batch, device=device).repeat_interleave(copies)
    with torch.no_grad():
        encoder_out = model.encoder.reorder_encoder_out(encode(model, net_input), rows)
        owner = torch.arange(len(rows), device=device)
        previous = torch.full((len(rows), 1), eos, device=device)
        written: list[list[int]] = [[] for _ in range(len(rows))]
        ended = [False] * len(rows)
        cache: dict[str, Any] = {}
        for _ in range(max_length):
            output = model.decoder(previous, encoder_out=encoder_out, incremental_state=cache)
            log_probs = model.get_normalized_probs(output, log_probs=True)[:, -1]
            log_probs[:, pad] = -torch.inf
            symbols = choose(log_probs)
            for row, symbol in zip(owner.tolist(), symbols.tolist(), strict=True):
                if symbol == eos:
                    ended[row] = True
                elif not ended[row]:
                    written[row].append(symbol)
            previous = torch.cat([previous, symbols.unsqueeze(1)], 1)
            open_rows = torch.tensor([not ended[row] for row in owner.tolist()], device=device)
            if not bool(open_rows.any()):
                break
            if float((~open_rows).float().mean()) >= _DROP_SHARE:
                keep = open_rows.nonzero().squeeze(1)
                model.decoder.reorder_incremental_state_scripting(cache, keep)
                encoder_out = model.encoder.reorder_encoder_out(encoder_out, keep)
                owner, previous = owner[keep], previous[keep]
    found = [Candidate(tuple(w), e) for w, e in zip(written, ended, strict=True)]
    return [found[i * copies : (i + 1) * copies] for i in range(batch)]


def draw(log_probs: Tensor, generator: torch.Generator) -> Tensor:
    """Return one symbol [R] per row of log-probabilities [R, V], right up to a constant a row.

    The inverse of the distribution function at one uniform number a row: torch.multinomial draws
    V numbers a row, which takes a quarter of all the time. A symbol of no mass is never drawn.
    ``generator`` is the CPU's, so that the numbers are the same on every device.
    """
    # A constant a row is free, and with this one no row vanishes.
    shifted = log_probs - log_probs.amax(1, keepdim=True)
    mass = shifted.exp().cumsum(1, dtype=torch.float64)
    point = torch.rand(len(mass), 1, generator=generator, dtype=mass.dtype).to(mass.device)
    # The first symbol whose mass reaches beyond the point: one of no mass adds none and is passed.
    drawn = torch.searchsorted(mass, point * mass[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=mass.shape[1] - 1)  # beyond the last where nothing is finite


def sample(
    model: Any,
    net_input: dict[str, Tensor],
    copies: int,
    max_length: int,
    seed: int,
    *,
    eos: int,
    pad: int,
    law: Law | None = None,
) -> list[list[Candidate]]:
    """Draw ``copies`` independent sentences per source, each symbol from ``law`` of the model's.

    Without a ``law`` they follow the model's own distribution.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(log_probs: Tensor) -> Tensor:
        return draw(law(log_probs) if law else log_probs, generator)

    return decode(model, net_input, copies, max_length, choose, eos=eos, pad=pad)


def greedy(
    model: Any, net_input: dict[str, Tensor], max_length: int, *, eos: int, pad: int
) -> list[Candidate]:
    """Return each source's most probable continuation, symbol by symbol."""
    found = decode(
        model, net_input, 1, max_length, lambda log_probs: log_probs.argmax(1), eos=eos, pad=pad
    )
    return [candidates[0] for candidates in found]


def candidate_log_probs(
    model: Any,
    net_input: dict[str, Tensor],
    candidates: list[list[Candidate]],
    *,
    eos: int,
    pad: int,
) -> Tensor:
    """Return log p(y'|x) [B, n] of n candidates per source, differentiable in the parameters.

    A candidate that a source has more than once is computed once.
    """
    encoder_out = encode(model, net_input)
    asked = [(source, c) for source, of in enumerate(candidates) for c in of]
    order = sorted(dict.fromkeys(asked), key=lambda pair: len(pair[1].tokens))
    pieces = [
        _chunk_log_probs(model, encoder_out, order[start : start + _CHUNK], eos, pad)
        for start in range(0, len(order), _CHUNK)
    ]
    position = {pair: i for i, pair in enumerate(order)}
    computed = torch.cat(pieces)
    index = torch.tensor([position[pair] for pair in asked], device=computed.device)
    return computed[index].view(len(candidates), -1)


def _copied(encoder_out: Any) -> Any:
    """Return the same tensors in dictionaries of their own: fconv's encoders reorder in place."""
    if not isinstance(encoder_out, dict):
        return encoder_out
    return {key: _copied(value) for key, value in encoder_out.items()}


def _chunk_log_probs(
    model: Any, encoder_out: Any, chunk: list[tuple[int, Candidate]], eos: int, pad: int
) -> Tensor:
    """Return log-probabilities [C] of a chunk of (source index, candidate)."""
    device = next(model.parameters()).device
    length = max(len(c.tokens) for _, c in chunk) + 1
    inputs = torch.full((len(chunk), length), pad)
    targets = torch.full((len(chunk), length), pad)
    for row, (_, c) in enumerate(chunk):
        inputs[row, : len(c.tokens) + 1] = torch.tensor([eos, *c.tokens])
        # A forced end stays padding in the targets: it was certain.
        spelled = (*c.tokens, eos) if c.ended else c.tokens
        targets[row, : len(spelled)] = torch.tensor(spelled, dtype=torch.long)
    inputs, targets = inputs.to(device), targets.to(device)
    sources = torch.tensor([source for source, _ in chunk], device=device)
    output = model.decoder(
        inputs, encoder_out=model.encoder.reorder_encoder_out(_copied(encoder_out), sources)
    )
    log_probs = model.get_normalized_probs(output, log_probs=True)
    picked = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2)
    # Without padding the mass of the rest is 1 - p(pad). Dividing two numbers is a fraction of the
    # work of a second softmax over the vocabulary.
    rest = torch.log(-torch.expm1(log_probs[:, :, pad].clamp(max=-_LEAST_REST)))
    return (picked - rest).masked_fill(targets == pad, 0.0).sum(1)
