"""How the symbols of a data folder become text, and how BLEU takes that text for words.

Whatever is scored passes through here: a candidate of the smoothed measure, the dev set in teacher
training, a checkpoint's output on test, and the corpus' own references.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from l2t_core.errors import UserError
from l2t_fairseq.corpora.segmentation import MODEL_FILES

MARK = "▁"  # sentencepiece: here a word begins
GOES_ON = "@@"  # subword-nmt: this word goes on
# Single symbols that look like subwords (▁▂▃) come with any text. Languages without spaces have
# few pieces with a mark, but more than that.
_FEW = 0.01


@dataclass(frozen=True)
class TextForm:
    """The subwords of a corpus: ``sentencepiece``, ``subword-nmt`` or ``words`` (none).

    ``model`` is the sentencepiece model where there is one. subword-nmt works on tokenised text,
    so what comes out of its joining is tokenised, and BLEU must not tokenise it again, unless the
    tokeniser's work is undone: ``tokenizer`` is ``moses`` (by the rules of ``language``) or
    ``none``.
    """

    subwords: str
    model: Path | None = None
    tokenizer: str = "none"
    language: str = ""

    @classmethod
    def of_symbols(cls, symbols: Sequence[str]) -> TextForm:
        """Tell the form by a dictionary's ``symbols``."""
        marked = sum(symbol.startswith(MARK) for symbol in symbols)
        going_on = sum(symbol.endswith(GOES_ON) for symbol in symbols)
        if max(marked, going_on) < _FEW * len(symbols):
            return cls("words")
        return cls("sentencepiece" if marked > going_on else "subword-nmt")

    @classmethod
    def of_prepared(cls, folder: Path, subwords: str) -> TextForm:
        """Return the form of a folder that ``l2t data prepare`` wrote."""
        if subwords == "sentencepiece":
            return cls(subwords, folder / MODEL_FILES[subwords])
        return cls(subwords)

    @property
    def bleu_tokenize(self) -> str:
        """sacreBLEU's ``tokenize``: ``none`` for text that is tokenised already."""
        tokenised = self.subwords == "subword-nmt" and self.tokenizer == "none"
        return "none" if tokenised else "13a"

    def as_generated(self, flags: Sequence[str], language: str) -> TextForm:
        """Return the form of fairseq-generate's output with ``flags`` in ``language``.

        Its ``--tokenizer moses`` undoes the tokeniser's work; its other tokenizers leave text as
        it is.
        """
        pairs = itertools.pairwise([*flags, ""])
        given = [b for a, b in pairs if a == "--tokenizer"]
        given += [flag.partition("=")[2] for flag in flags if flag.startswith("--tokenizer=")]
        tokenizer = "moses" if given[-1:] == ["moses"] else "none"
        return dataclasses.replace(self, tokenizer=tokenizer, language=language)

    def text(self, symbols: Sequence[str]) -> str:
        """Return the text that ``symbols`` spell."""
        return self.detokenised(self.joined(symbols))

    def of_candidate(self, tokens: Sequence[int], dictionary: Any) -> str:
        """Return a candidate's text, as a checkpoint's output becomes text."""
        start = dictionary.bos()  # which fairseq leaves out, too
        return self.text([dictionary[t] for t in tokens if t != start])

    def of_target(self, tokens: Tensor, dictionary: Any) -> str:
        """Return the text of a target side [S], as a reference."""
        # escape_unk: an unknown word must not match the student's own <unk>.
        return self.text(dictionary.string(tokens, escape_unk=True).split(" "))

    def detokenised(self, line: str) -> str:
        """Return ``line``, words before they were cut into subwords, as text.

        Raises:
            UserError: if that needs sacremoses, and it is not installed.
        """
        if self.tokenizer == "none":
            return line
        return str(_moses(self.language).detokenize(line.split()))

    def joined(self, symbols: Sequence[str]) -> str:
        """Return the words, separated by spaces, that ``symbols`` are the subwords of."""
        if self.subwords == "sentencepiece":
            if self.model is None:
                return "".join(symbols).replace(MARK, " ").strip()
            return str(_processor(self.model).decode(list(symbols)))
        line = " ".join(symbols)
        if self.subwords == "subword-nmt":
            line = f"{line} ".replace(f"{GOES_ON} ", "").rstrip()
        return line


@functools.lru_cache(maxsize=8)
def _moses(language: str) -> Any:
    try:
        from sacremoses import MosesDetokenizer
    except ImportError:
        raise UserError("--tokenizer moses needs sacremoses; pip install sacremoses") from None
    return MosesDetokenizer(lang=language)


@functools.lru_cache(maxsize=8)
def _processor(model: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))
