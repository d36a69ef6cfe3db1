"""A small archive of IWSLT 2014's form, for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from l2t_fairseq.corpora.iwslt14 import LANGUAGES, TESTS, TRAIN

WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five"}
SEGMENTS = 4


def sentences(count: int) -> list[tuple[str, str]]:
    """Return different pairs of three words each."""
    german = list(WORDS)
    picked = [[german[(i // 5**k) % 5] for k in range(3)] for i in range(count)]
    return [
        (" ".join(line).capitalize() + ".", " ".join(WORDS[w] for w in line).capitalize() + ".")
        for line in picked
    ]


def official_files(pairs: int = 110) -> dict[str, str]:
    """Return the texts of the official files by name: talks of ten sentences and their tags."""
    files: dict[str, str] = {}
    made = sentences(pairs + SEGMENTS * len(TESTS))
    for side, language in enumerate(LANGUAGES):
        lines: list[str] = []
        for number in range(pairs):
            if number % 10 == 0:
                lines += [
                    f"<url>http://www.ted.com/talks/{number}</url>",
                    "<keywords>talks, numbers</keywords>",
                    f"<talkid>{number}</talkid>",
                    f"<title>{made[number][side]}</title>",
                    f"<description>TED Talk: {made[number][side]}</description>",
                ]
            lines.append(made[number][side])
        files[TRAIN.format(language)] = "\n".join(lines) + "\n"
        for index, name in enumerate(TESTS):
            start = pairs + SEGMENTS * index
            segments = "".join(
                f'<seg id="{i + 1}"> {made[start + i][side]} </seg>\n' for i in range(SEGMENTS)
            )
            files[name.format(language)] = (
                '<?xml version="1.0" encoding="UTF-8"?>\n<mteval>\n<srcset setid="iwslt2014">\n'
                '<doc docid="1" genre="lectures">\n<title>Numbers & more</title>\n'
                f"{segments}</doc>\n</srcset>\n</mteval>\n"
            )
    return files


def pack(files: dict[str, str] | dict[str, bytes], path: Path, folder: str = "de-en") -> Path:
    """Write ``files`` to a gzipped tar archive and return its path."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode("utf-8") if isinstance(text, str) else text
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
