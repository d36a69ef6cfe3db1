"""How the symbols of a data folder become text, and how BLEU takes that text for words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2t_fairseq.segmentation import MODEL_FILES

MARK = "▁"  # sentencepiece: here a word begins
GOES_ON = "@@"  # subword-nmt: this word goes on


@dataclass(frozen=True)
class TextForm:
    """The subwords of a corpus: ``sentencepiece``, ``subword-nmt`` or ``words`` (none).

    ``model`` is the sentencepiece model where there is one. subword-nmt works on tokenised text,
    so what comes out of its joining is tokenised, and BLEU must not tokenise it again.
    """

    subwords: str
    model: Path | None = None

    @classmethod
    def of_symbols(cls, symbols: Sequence[str]) -> TextForm:
        """Tell the form by a dictionary's ``symbols``."""
        if any(symbol.startswith(MARK) for symbol in symbols):
            return cls("sentencepiece")
        if any(symbol.endswith(GOES_ON) for symbol in symbols):
            return cls("subword-nmt")
        return cls("words")

    @classmethod
    def of_prepared(cls, folder: Path, subwords: str) -> TextForm:
        """Return the form of a folder that ``l2t data prepare`` wrote."""
        if subwords == "sentencepiece":
            return cls(subwords, folder / MODEL_FILES[subwords])
        return cls(subwords)

    @property
    def bleu_tokenize(self) -> str:
        """sacreBLEU's ``tokenize``: ``none`` for text that is tokenised already."""
        return "none" if self.subwords == "subword-nmt" else "13a"

    def text(self, symbols: Sequence[str]) -> str:
        """Return the text that ``symbols`` spell."""
        if self.subwords == "sentencepiece":
            if self.model is None:
                return "".join(symbols).replace(MARK, " ").strip()
            return str(_processor(self.model).decode(list(symbols)))
        line = " ".join(symbols)
        if self.subwords == "subword-nmt":
            line = f"{line} ".replace(f"{GOES_ON} ", "").rstrip()
        return line

    def generate_flags(self) -> list[str]:
        """Return fairseq-generate's flags that join the subwords in the same way."""
        if self.subwords == "sentencepiece":
            if self.model is None:
                return ["--remove-bpe", "sentencepiece"]
            return ["--bpe", "sentencepiece", "--sentencepiece-model", str(self.model)]
        return ["--remove-bpe"] if self.subwords == "subword-nmt" else []


@functools.lru_cache(maxsize=8)
def _processor(model: Path) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))
