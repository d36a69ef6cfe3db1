"""Subwords: learning them from the training text, and cutting all splits into them.

Two tools: sentencepiece (BPE over raw text) and subword-nmt (BPE over text that is tokenised
already, Sennrich et al. 2016), which marks with ``@@`` that a word goes on.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.runs.download import OnEvent

Corpus = dict[str, tuple[list[str], list[str]]]  # split -> source lines, target lines
# Learns from ``train`` and cuts every split: (corpus, size, on_event) -> (model file, corpus).
Segment = Callable[[Corpus, int, OnEvent], tuple[bytes, Corpus]]

SUBWORDS: Registry[Segment] = Registry("kind of subwords")
# Under which name a prepared folder keeps the model.
MODEL_FILES = {"sentencepiece": "spm.model", "subword-nmt": "code"}
_LINES_AT_A_TIME = 1000


def map_lines(
    corpus: Corpus, cut: Callable[[str], str], title: str, on_event: OnEvent
) -> Corpus:
    """Return ``corpus`` with ``cut`` applied to every line, telling how far it is."""
    total = sum(len(side) for sides in corpus.values() for side in sides)
    done = 0

    def side(lines: list[str]) -> list[str]:
        nonlocal done
        found: list[str] = []
        for start in range(0, len(lines), _LINES_AT_A_TIME):
            found += map(cut, lines[start : start + _LINES_AT_A_TIME])
            on_event({"event": "progress", "stage": title, "done": done + len(found), "of": total})
        done += len(lines)
        return found

    return {split: (side(first), side(second)) for split, (first, second) in corpus.items()}


@SUBWORDS.register("sentencepiece")
def sentencepiece_pieces(corpus: Corpus, size: int, on_event: OnEvent) -> tuple[bytes, Corpus]:
    """Learn ``size`` pieces, joint BPE of both sides, with sentencepiece.

    Raises:
        UserError: if the text does not give so many.
    """
    import sentencepiece

    on_event({"event": "prepare", "stage": "sentencepiece"})
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Not by file names: the model would record them, and differ from folder to folder.
            sentence_iterator=itertools.chain(*corpus["train"]),
            model_writer=model,
            vocab_size=size,
            model_type="bpe",
            character_coverage=1.0,
            # The default rule would turn m² into m2, which no output could then say.
            normalization_rule_name="identity",
            num_threads=1,  # the only setting whose result does not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot make {size} pieces of this text ({error}); choose another "
            "vocabulary size"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    def pieces(lines: list[str]) -> list[str]:
        # fairseq-preprocess takes a lone carriage return for a line's end; the rest would shift.
        lines = [line.replace("\r", " ") for line in lines]
        return [" ".join(line) for line in processor.encode(lines, out_type=str)]

    return model.getvalue(), {
        split: (pieces(first), pieces(second)) for split, (first, second) in corpus.items()
    }


@SUBWORDS.register("subword-nmt")
def subword_nmt_merges(corpus: Corpus, size: int, on_event: OnEvent) -> tuple[bytes, Corpus]:
    """Learn ``size`` merges, joint BPE of both sides, with subword-nmt.

    A text that runs out of pairs that occur twice gives fewer merges, as with the tool itself.

    Raises:
        UserError: if the text holds no pair of letters.
    """
    from subword_nmt.apply_bpe import BPE
    from subword_nmt.learn_bpe import learn_bpe

    on_event({"event": "prepare", "stage": f"learn {size} BPE merges"})
    codes = _Codes(size, on_event)
    try:
        # It has a bar of its own on stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            learn_bpe(itertools.chain(*corpus["train"]), codes, size)
    except ValueError as error:  # max() of no pairs at all
        raise UserError(
            "subword-nmt finds no pair of letters in the training text; give it more text"
        ) from error
    codes.seek(0)
    segmenter = BPE(codes)
    # process_line keeps the spaces around a line, and there are none in a tokenised one.
    cut = map_lines(corpus, segmenter.segment, "apply BPE", on_event)
    return codes.getvalue().encode("utf-8"), cut


class _Codes(io.StringIO):
    """The file of merges as it is written, a merge a line, which tells how far it is."""

    def __init__(self, size: int, on_event: OnEvent) -> None:
        super().__init__(newline="\n")
        self._size, self._on_event, self._lines = size, on_event, -1  # the first is the version

    def write(self, text: str) -> int:
        self._lines += 1
        if self._lines % 100 == 0:
            event = {"event": "progress", "stage": "learn BPE", "done": self._lines}
            self._on_event({**event, "of": self._size})
        return super().write(text)
