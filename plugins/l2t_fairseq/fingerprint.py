"""What a teacher must fit on the student's side: the target dictionary."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol


class Dictionary(Protocol):
    """The two things needed of ``fairseq.data.Dictionary``."""

    symbols: list[str]

    def __len__(self) -> int: ...


def dictionary_fingerprint(dictionary: Dictionary) -> dict[str, str | int]:
    """Return kind, size K and sha256 over the symbols of ``dictionary`` in order.

    The loss's coefficients belong to entries by position, so the order is part of it; the counts
    that the dictionary file also holds are not.
    """
    digest = hashlib.sha256()
    for symbol in dictionary.symbols:
        digest.update(symbol.encode("utf-8"))
        digest.update(b"\n")
    return {
        "kind": "dictionary",
        "num_classes": len(dictionary),
        "sha256": digest.hexdigest(),
    }


def data_fingerprint(data_bin: Path, language: str) -> dict[str, str | int]:
    """Return :func:`dictionary_fingerprint` of ``data_bin/dict.LANGUAGE.txt``, read by fairseq."""
    from fairseq.data import Dictionary as FairseqDictionary

    return dictionary_fingerprint(FairseqDictionary.load(str(data_bin / f"dict.{language}.txt")))
