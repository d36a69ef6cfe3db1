"""IWSLT 2014, German to English: talks, prepared as fairseq's prepare-iwslt14.sh does.

Cettolo et al. 2014, "Report on the 11th IWSLT Evaluation Campaign"; the corpus is WIT3's (Cettolo
et al. 2012). The script's Perl tools are replaced by sacremoses and subword-nmt; docs/fairseq.md
says where they differ. Training text is tokenised by Moses's rules, kept from 1 to 175 words and
up to a ratio of 1.5, lowercased; every 23rd pair is a dev pair; the test set joins five official
sets; one BPE of 10,000 merges for both languages, and a dictionary for each.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.runs.download import OnEvent, fetch
from l2t_fairseq.corpora.archive import read_texts
from l2t_fairseq.corpora.prepare import PreparedCorpus, find_prepared, prepare_corpus, text_digest
from l2t_fairseq.corpora.segmentation import Corpus, map_lines

# The copy that fairseq's script fetches. No checksum of it is published.
ADDRESS = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
# Inside WIT3's archive of the whole year, which the organisers hand out.
INNER_ARCHIVE = "de/en/de-en.tgz"
LANGUAGES = ("de", "en")
TRAIN = "train.tags.de-en.{}"
TESTS = tuple(
    f"IWSLT14.{name}.de-en.{{}}.xml"
    for name in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
)
OFFICIAL_PAIRS = 174_443

MERGES = 10_000
LONGEST_LINE, LARGEST_RATIO = 175, 1.5  # in words
LONGEST_WORD = 1000  # clean-corpus-n.perl's limit, in characters
VALID_EVERY = 23

# Lines about a talk that are no sentences, and the marks of two kinds that are.
_ABOUT = ("<url>", "<talkid>", "<keywords>")
_MARKS = re.compile(r"</?(?:title|description)>")


def prepare(out: Path, source: Path | None, on_event: OnEvent) -> PreparedCorpus:
    """Prepare the corpus in ``out``, from ``source`` or downloaded.

    ``source`` is the archive, or a folder that holds it or what it unpacks to.

    Raises:
        UserError: if a file is missing, damaged or does not match its other side, nothing can be
            fetched, or ``out`` holds something else or cannot be written.
    """
    settings = {"name": "iwslt14", "vocabulary_size": MERGES, "subwords": "subword-nmt"}
    if source is None and (found := find_prepared(out, settings, on_event)) is not None:
        return found
    original = read_iwslt14(source, out.parent / f".{out.name}.downloads", on_event)
    record = {"original_sha256": text_digest(original)}
    if (found := find_prepared(out, {**settings, **record}, on_event)) is not None:
        return found
    pairs = len(original["train"][0])
    if pairs != OFFICIAL_PAIRS:
        stage = f"{pairs:,} training pairs, where the official archive has {OFFICIAL_PAIRS:,}"
        on_event({"event": "prepare", "stage": stage})
    return prepare_corpus(
        splits(tokenised(original, on_event)),
        out,
        name="iwslt14",
        vocabulary_size=MERGES,
        subwords="subword-nmt",
        joined_dictionary=False,
        record=record,
        on_event=on_event,
    )


def read_iwslt14(source: Path | None, downloads: Path, on_event: OnEvent) -> Corpus:
    """Return ``train`` and ``test`` as they were published, without tags.

    Raises:
        UserError: as :func:`prepare`.
    """
    if source is not None:
        return parse(read_texts(source, _members(), INNER_ARCHIVE), source)
    archive = fetch([ADDRESS], downloads / "de-en.tgz", on_event)
    try:
        return parse(read_texts(archive, _members(), INNER_ARCHIVE), archive)
    except UserError:
        archive.unlink(missing_ok=True)  # or the next run would find the same damaged file
        raise


def _members() -> list[str]:
    return [name.format(language) for name in (TRAIN, *TESTS) for language in LANGUAGES]


def parse(texts: dict[str, str], origin: Path) -> Corpus:
    """Return ``train`` and ``test`` out of the official files' ``texts``.

    Raises:
        UserError: if a file has no sentences, or two sides differ in their number.
    """
    german, english = _sides(texts, TRAIN, origin, lambda text, name: training_lines(text))
    corpus: Corpus = {"train": (german, english), "test": ([], [])}
    for name in TESTS:
        for side, lines in zip(
            corpus["test"], _sides(texts, name, origin, segments), strict=True
        ):
            side += lines
    return corpus


def _sides(
    texts: dict[str, str], name: str, origin: Path, read: Callable[[str, str], list[str]]
) -> tuple[list[str], list[str]]:
    """Return the lines of both sides of one official pair of files."""
    german, english = (name.format(language) for language in LANGUAGES)
    try:
        first, second = (read(texts[member], member) for member in (german, english))
    except ValueError as error:
        raise UserError(f"{origin}: {error}; get the archive again") from None
    for member, lines in ((german, first), (english, second)):
        if not any(line.strip() for line in lines):
            raise UserError(f"{origin}: {member} holds no sentences; get the archive again")
    if len(first) != len(second):
        raise UserError(
            f"{origin}: {german} has {len(first)} sentences, {english} has {len(second)}; the two "
            "must match line by line; get the archive again"
        )
    return first, second


def training_lines(text: str) -> list[str]:
    """Return the sentences of a ``train.tags`` file: titles and descriptions are some, too."""
    lines = text.removesuffix("\n").split("\n")
    return [
        _MARKS.sub("", line) for line in lines if not any(about in line for about in _ABOUT)
    ]


def segments(text: str, name: str) -> list[str]:
    """Return what stands in the ``<seg>`` elements, with plain apostrophes.

    Raises:
        ValueError: if an element is left open.
    """
    reader = _Segments()
    reader.feed(text)
    reader.close()
    if reader.open is not None:
        raise ValueError(f"{name} is damaged: sentence {len(reader.found) + 1} does not end")
    return [line.strip().replace("’", "'") for line in reader.found]


class _Segments(HTMLParser):
    """Collects segments. Unlike an XML parser it takes a bare ``&`` for what it is."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.open: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "seg" and self.open is None:
            self.open = []

    def handle_endtag(self, tag: str) -> None:
        if tag == "seg" and self.open is not None:
            self.found.append("".join(self.open))
            self.open = None

    def handle_data(self, data: str) -> None:
        if self.open is not None:
            self.open.append(data)


def tokenised(corpus: Corpus, on_event: OnEvent) -> Corpus:
    """Return ``corpus`` tokenised and lowercased, each side by its language's rules."""
    on_event({"event": "prepare", "stage": "tokenise"})
    sides: list[dict[str, list[str]]] = []
    for index, language in enumerate(LANGUAGES):
        one: Corpus = {split: (lines[index], []) for split, lines in corpus.items()}
        cut = map_lines(one, moses_tokeniser(language), f"tokenise {language}", on_event)
        sides.append({split: lines for split, (lines, _) in cut.items()})
    return {split: (sides[0][split], sides[1][split]) for split in corpus}


def moses_tokeniser(language: str) -> Callable[[str], str]:
    """Return a function that does what tokenizer.perl and lowercase.perl do to a line."""
    from sacremoses import MosesTokenizer

    moses = MosesTokenizer(lang=language)

    def tokenise(line: str) -> str:
        words = moses.tokenize(line)
        # tokenizer.perl takes the full stop off the last word whatever it is; sacremoses keeps
        # to its older rule, which left abbreviations whole.
        if words and len(words[-1]) > 1 and words[-1].endswith(".") and words[-1][-2] != ".":
            words[-1:] = [words[-1][:-1], "."]
        # Letter by letter, as Perl: str.lower() of a word knows Greek's final sigma.
        return "".join(map(str.lower, " ".join(words)))

    return tokenise


def splits(corpus: Corpus) -> Corpus:
    """Return ``train``, ``valid`` and ``test``: clean pairs, of which every 23rd is a dev pair."""
    kept = [pair for pair in zip(*corpus["train"], strict=True) if usable(*pair)]
    train = [pair for number, pair in enumerate(kept, start=1) if number % VALID_EVERY]
    valid = kept[VALID_EVERY - 1 :: VALID_EVERY]
    return {
        "train": ([pair[0] for pair in train], [pair[1] for pair in train]),
        "valid": ([pair[0] for pair in valid], [pair[1] for pair in valid]),
        "test": corpus["test"],
    }


def usable(source: str, target: str) -> bool:
    """Tell whether clean-corpus-n.perl would keep a pair of tokenised lines."""
    first, second = source.split(), target.split()
    shorter, longer = sorted((len(first), len(second)))
    return (
        shorter > 0
        and longer <= LONGEST_LINE
        and longer <= LARGEST_RATIO * shorter
        and all(len(word) <= LONGEST_WORD for word in (*first, *second))
    )
