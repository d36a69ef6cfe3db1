"""What a run depends on: the target dictionary, which a teacher must fit, and the data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from l2t_core.runs.files import file_digest


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


def data_digest(data_bin: Path) -> str:
    """Return a SHA-256 of fairseq's data folder and of the raw text that it is scored on.

    Where `l2t data prepare` made it, of its record, which holds that of every file.
    """
    record = data_bin.parent / "prepared.json"
    if record.is_file():
        return file_digest(record, "sha256")
    digest = hashlib.sha256()
    for path in sorted(data_bin.glob("*")):
        if path.suffix in (".bin", ".idx", ".txt") and path.is_file():
            digest.update(f"{path.name} {file_digest(path, 'sha256')}\n".encode())
    return digest.hexdigest()
