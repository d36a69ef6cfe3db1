"""The NMT student: a fairseq run as a pure sequence of steps that can be replayed.

Model, dictionary, batches, schedule and optimiser come from fairseq itself, so that the student
of seed s is the student of ``fairseq-train --seed s`` with the same flags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_core.students.devices import find_device
from l2t_core.students.flat import refill
from l2t_core.students.measures import (
    corpus_bleu,
    distinct_mask,
    log_likelihood,
    mrt_measure,
    ranked_by_length,
    reinforce_measure,
)
from l2t_core.students.state import NMT_FEATURES, DevStatistics
from l2t_fairseq.checks import problems
from l2t_fairseq.commands.shell_script import split_flags
from l2t_fairseq.corpora.folder import DataFolder, open_data
from l2t_fairseq.fingerprint import data_digest, dictionary_fingerprint
from l2t_fairseq.measures.candidates import CANDIDATES, refuse_wide_beam
from l2t_fairseq.measures.sampling import Candidate, candidate_log_probs, greedy, length_limit
from l2t_fairseq.measures.sentence_scores import (
    LIKELIHOOD,
    CorpusBleu,
    build_measure,
    measure_content,
)
from l2t_fairseq.predictions import predictions
from l2t_fairseq.recipe import NmtSpec
from l2t_fairseq.students.batches import pack, shard, unpack
from l2t_fairseq.students.second_order import mend_second_derivatives, true_gradients
from l2t_fairseq.students.setup import FairseqSetup
from l2t_fairseq.students.split import Split
from l2t_fairseq.students.start import start_content

# Sources decoded together by the true measure.
_DECODE_BATCH = 128


class NmtStudent:
    """A fairseq encoder-decoder; implements :class:`l2t_core.students.protocol.Student`.

    Its module lives on ``device``. Batches are kept on the CPU and moved when they are asked for.
    """

    default_features = NMT_FEATURES
    # A lower rate would not help: it is most often a student whose candidates all score 0.
    flat_remedy = (
        "all candidates of a source score alike, or there is one only; let the students learn more "
        "before (nmt.steps, --finetune-from-model in nmt.train), draw more candidates "
        "(nmt.samples, nmt.candidates=ancestral), or climb nmt.measure=log_likelihood, which needs "
        "none"
    )

    def __init__(
        self, spec: NmtSpec, data: DataFolder, setup: FairseqSetup, device: torch.device
    ) -> None:
        self.spec, self.data, self.setup, self.device = spec, data, setup, device
        self.dictionary = setup.task.target_dictionary
        self.num_classes = len(self.dictionary)
        refuse_wide_beam(spec, self.dictionary)
        self.total_steps = spec.steps
        self.optimiser = setup.optimiser()
        self.module: nn.Module = mend_second_derivatives(setup.build_model(1)).to(device)
        flags = split_flags(spec.generate, "nmt.generate")
        target = setup.task.cfg.target_lang
        self.form = data.form_of(target).as_generated(flags, target)
        self.measure = build_measure(spec.measure, self.form.bleu_tokenize)
        self.measure_name = self.measure.name
        self.source = CANDIDATES.get(spec.candidates)
        limits = setup.longest(self.module)
        self.dev = Split(setup.valid_subset, setup, data, self.form, limits, device)
        self.measured = self.dev
        if spec.measure_subset not in ("", setup.valid_subset):
            self.measured = Split(spec.measure_subset, setup, data, self.form, limits, device)
        self._dev_batches = [pack(b) for b in setup.valid_batches(self.module)]
        self._seed = 1
        self._updates: Iterator[tuple[list[Any], bool]] = iter(())
        self._batches: list[list[Any]] = []
        self._schedule = setup.learning_rates()

    # -- a fresh student and its steps

    def reset(self, seed: int) -> None:
        """Fill the module as ``fairseq-train --seed seed`` does, and start its batches."""
        # fairseq adds the update's number to the seed, and numpy wants 32 bits.
        self._seed = seed % 2**31
        with torch.random.fork_rng(devices=[]):
            refill(self.module, self.setup.build_model(self._seed))
        self._updates = self.setup.updates(self.module, self._seed)
        self._batches = []
        self._schedule = self.setup.learning_rates()

    def _reach(self, step: int) -> None:
        # Batches are kept: fairseq's order within one depends on how it was collated.
        while len(self._batches) <= step:
            # An epoch's data loader draws a number; the step's own must be what they are when
            # the step is replayed and its batch is there already.
            with torch.random.fork_rng(devices=[]):
                group, ends_epoch = next(self._updates)
            self._batches.append(pack(group))
            self._schedule.next_update(ends_epoch)

    def batch(self, step: int) -> list[Any]:
        """Return the micro-batches of update ``step``."""
        self._reach(step)
        return list(unpack(self._batches[step], self.device))

    def shard(self, batch: list[Any], rank: int, world: int) -> tuple[list[Any], float]:
        """Return process ``rank``'s sentences of ``batch`` and its share of the tokens."""
        return shard(batch, self.dictionary.pad(), rank, world)

    def step_seed(self, step: int) -> int:
        """Return the seed that fairseq's trainer sets before update ``step``."""
        return self._seed + step

    def learning_rate(self, step: int) -> float:
        """Return the rate of fairseq's scheduler for update ``step``."""
        self._reach(step)
        return self._schedule.rates[step]

    def predict(self, batch: list[Any]) -> tuple[Tensor, Tensor]:
        """Return log-probabilities [N, K] and targets [N] of all tokens, in training mode."""
        self.module.train()
        parts = [self._tokens(sample) for sample in batch]
        return torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts])

    def _tokens(self, sample: Any) -> tuple[Tensor, Tensor]:
        log_probs, targets = predictions(self.module, sample)
        kept = targets != self.dictionary.pad()
        return log_probs[kept], targets[kept]

    # -- measures on dev

    def dev_statistics(self, step: int) -> DevStatistics | None:
        """Return statistics over fairseq's validation batches every ``dev_interval`` updates."""
        if (step + 1) % self.spec.dev_interval:
            return None
        self.module.eval()
        nll = correct = tokens = 0.0
        with torch.no_grad():
            for packed in self._dev_batches:
                log_probs, targets = self._tokens(unpack(packed, self.device))
                nll -= float(log_probs.gather(1, targets.unsqueeze(1)).sum())
                correct += float((log_probs.argmax(1) == targets).sum())
                tokens += len(targets)
        return DevStatistics(nll / tokens, correct / tokens)

    def dev_interval(self) -> int:
        """Return the updates between dev refreshes."""
        return self.spec.dev_interval

    def smoothed_measure(self, seed: int) -> Tensor:
        """Return M-tilde on ``dev_sentences`` sources of ``measure_subset`` drawn by ``seed``."""
        self.module.eval()
        chosen = self.measured.draw(self.spec.dev_sentences, seed, self._learnt_from())
        collated = self.measured.collate(chosen)
        with true_gradients():
            if self.spec.measure == LIKELIHOOD:
                return log_likelihood(*self._tokens(collated))
            return self._expected_measure(collated, seed)

    def _learnt_from(self) -> set[int]:
        """Return the sentences of the measured split that are in the batches of this life."""
        if self.measured.name != self.setup.train_subset:
            return set()
        self._reach(self.total_steps - 1)
        return {
            i for group in self._batches for part in group for i in unpack(part["id"]).tolist()
        }

    def _expected_measure(self, collated: Any, seed: int) -> Tensor:
        net_input, words, spec = collated["net_input"], self.dictionary, self.spec
        candidates = self.source.draw(
            spec, self.module, net_input, length_limit(self.module, net_input), seed, words
        )
        references = self.measured.references(collated)
        texts = [[self.text(c) for c in of] for of in candidates]
        log_probs = candidate_log_probs(
            self.module, net_input, candidates, eos=words.eos(), pad=words.pad()
        )
        expected: Callable[[Tensor], Tensor]
        if spec.estimator == "reinforce":
            expected = partial(reinforce_measure, log_probs)
        else:
            # With the end symbol, as search counts.
            lengths = torch.tensor([[len(c.tokens) + 1.0 for c in of] for of in candidates])
            weights = ranked_by_length(log_probs, lengths.to(log_probs), spec.lenpen)
            mask = distinct_mask(candidates).to(log_probs.device)
            expected = partial(mrt_measure, weights, candidate_mask=mask, alpha=spec.alpha)
        if not isinstance(self.measure, CorpusBleu):
            return expected(torch.tensor(self.measure.scores(texts, references)).to(log_probs))
        counts = torch.tensor(self.measure.statistics(texts, references)).to(log_probs)
        return corpus_bleu(len(texts) * torch.stack([expected(c) for c in counts.unbind(2)]))

    def true_measure(self) -> float:
        """Return the measure of greedy output on dev: BLEU over 100, or what is expected."""
        self.module.eval()
        chosen = self.dev.usable[: self.spec.true_measure_sentences or None]
        ends = {"eos": self.dictionary.eos(), "pad": self.dictionary.pad()}
        # Sorted by length, so that a batch ends together.
        sizes = self.dev.dataset.src_sizes
        order = sorted(chosen, key=lambda i: int(sizes[i]))
        hypotheses, references = [], []
        for start in range(0, len(order), _DECODE_BATCH):
            collated = self.dev.collate(order[start : start + _DECODE_BATCH])
            net_input = collated["net_input"]
            found = greedy(self.module, net_input, length_limit(self.module, net_input), **ends)
            hypotheses += [self.text(c) for c in found]
            references += self.dev.references(collated)
        return self.measure.corpus(hypotheses, references)

    def text(self, candidate: Candidate) -> str:
        """Return a candidate's text, as a checkpoint's output becomes text."""
        return self.form.of_candidate(candidate.tokens, self.dictionary)

    def fingerprint(self) -> dict[str, str | int]:
        """Return what a teacher must fit: the target dictionary."""
        return dictionary_fingerprint(self.dictionary)

    def content(self) -> dict[str, str]:
        """Return digests of what the recipe's section names without holding it."""
        found = {"data_sha256": data_digest(self.data.data_bin)}
        found |= start_content(self.setup.starts_from)
        return found | measure_content(self.spec.measure)


def build_student(spec: NmtSpec) -> NmtStudent:
    """Return the student that a recipe's ``nmt`` section describes; seeds come with ``reset``.

    Raises:
        UserError: if the data or the flags cannot be used.
    """
    for problem in problems(spec):
        raise UserError(problem)
    if not spec.data:
        raise UserError("nmt.data is empty; name a folder made by `l2t data prepare`")
    data = open_data(Path(spec.data))
    device = find_device("nmt.device", spec.device)
    # argparse takes the last of two equal flags.
    setup = FairseqSetup(data.data_bin, f"{spec.train} {spec.teach}")
    if spec.device == "auto" and setup.config.common.cpu:
        device = torch.device("cpu")
    return NmtStudent(spec, data, setup, device)
