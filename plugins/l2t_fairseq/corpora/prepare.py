"""Parallel text brought into the form that recipes name: subwords and fairseq-preprocess.

A prepared folder holds raw/{train,valid,test}.{source,target} (the text before it was cut into
subwords), the subword model, data-bin/ and prepared.json, which is written last and says what the
rest is. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2t_core.errors import UserError
from l2t_core.registry import Registry
from l2t_core.runs.download import OnEvent
from l2t_core.runs.files import DAMAGED, file_digest, open_locked, with_usual_permissions
from l2t_fairseq.commands.failure import reason
from l2t_fairseq.corpora.segmentation import MODEL_FILES, SUBWORDS, Corpus
from l2t_fairseq.corpora.text_form import TextForm

SPLITS = ("train", "valid", "test")
# fairseq's own limit on positions is 1,024; lines this long are noise in every corpus here.
LONGEST_TRAINING_LINE = 250

_KEYS = ("name", "source", "target", "sizes", "vocabulary_size", "subwords")
# What older versions did without saying so.
_FORMER = {"subwords": "sentencepiece", "joined_dictionary": True}


@dataclass(frozen=True)
class PreparedCorpus:
    """A prepared folder: where its parts are and how many lines each split has.

    ``vocabulary_size`` counts sentencepiece's pieces, or subword-nmt's merges.
    """

    path: Path
    name: str
    source: str
    target: str
    sizes: dict[str, int]
    vocabulary_size: int
    subwords: str

    @property
    def data_bin(self) -> Path:
        """What fairseq calls DATA."""
        return self.path / "data-bin"

    @property
    def form(self) -> TextForm:
        """How its symbols become text again."""
        return TextForm.of_prepared(self.path, self.subwords)

    def raw(self, split: str, language: str) -> Path:
        """Return the raw text of ``split`` in ``language``."""
        return self.path / "raw" / f"{split}.{language}"


def prepare_corpus(
    corpus: Corpus,
    out: Path,
    *,
    name: str,
    vocabulary_size: int,
    source: str = "de",
    target: str = "en",
    subwords: str = "sentencepiece",
    joined_dictionary: bool = True,
    record: dict[str, str] | None = None,
    on_event: OnEvent = lambda event: None,
) -> PreparedCorpus:
    """Write ``corpus`` to the prepared folder ``out``; return at once if it is there already.

    Training pairs with an empty or overlong side are dropped and counted. Deterministic: the same
    text and settings give the same files. ``record`` is kept in prepared.json with the settings.
    ``on_event`` receives ``{"event": "prepare", "stage": TEXT}`` as each stage begins, and
    ``{"event": "progress", "stage", "done", "of"}`` within the long ones.

    Raises:
        UserError: if a split is empty or its sides differ in length, ``out`` holds something
            else or cannot be written, or a tool fails.
    """
    _check(corpus, name, source, target)
    settings: dict[str, Any] = {
        "name": name,
        "source": source,
        "target": target,
        "vocabulary_size": vocabulary_size,
        "subwords": subwords,
        "joined_dictionary": joined_dictionary,
        **(record or {}),
        "text_sha256": text_digest(corpus),
    }
    if (found := find_prepared(out, settings, on_event)) is not None:
        return found
    kept, dropped = _without_unusable(corpus)
    if not kept["train"][0]:
        raise UserError(f"{name}: train has no pair of which both sides are usable text")
    if dropped:
        on_event({"event": "prepare", "stage": f"{dropped} unusable training pairs left out"})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder(out) as (work, lock):
            _build(work, lock, kept, {**settings, "dropped": dropped}, on_event)
            try:
                with_usual_permissions(work).replace(out)
            except OSError:
                # Another command may have been quicker, and made the same.
                if (found := find_prepared(out, settings, on_event)) is None:
                    raise
                return found
    except OSError as error:
        raise UserError(
            f"cannot prepare {out}: {error.strerror or error}; free some space or choose --out"
        ) from error
    return load_prepared(out)


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[tuple[Path, int]]:
    """Give an empty folder beside ``out``, to be moved there in one rename or else removed.

    With it comes the lock that says it is in use, for those who write there and may live longer
    than this process. Folders that killed runs left are swept away.
    """
    prefix = f".{out.name}.making-"
    for left in out.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            _sweep(left)
    work, lock = _fresh(out.parent, prefix)
    try:
        yield work, lock
    finally:
        os.close(lock)
        shutil.rmtree(work, ignore_errors=True)


def _fresh(parent: Path, prefix: str) -> tuple[Path, int]:
    """Return a new folder and its lock, which ends with the last process that has it open."""
    while True:
        work = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        # Until it is locked, another command takes it for one that a killed run left.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            return work, open_locked(work)


def _sweep(folder: Path) -> None:
    """Remove ``folder`` unless a process is at work in it.

    Raises:
        OSError: if one is, or if the disk knows no locks, so that nobody can tell.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(handle)


def _build(
    work: Path, lock: int, corpus: Corpus, settings: dict[str, Any], on_event: OnEvent
) -> None:
    """Fill the folder ``work``; prepared.json comes last and names every other file."""
    source, target, subwords = (settings[key] for key in ("source", "target", "subwords"))
    _write_text(corpus, work / "raw", source, target)
    model, encoded = SUBWORDS.get(subwords)(corpus, settings["vocabulary_size"], on_event)
    (work / MODEL_FILES[subwords]).write_bytes(model)
    _write_text(encoded, work / "encoded", source, target)
    on_event({"event": "prepare", "stage": "fairseq-preprocess"})
    _preprocess(work, lock, source, target, settings["joined_dictionary"])
    shutil.rmtree(work / "encoded")
    files = {
        str(path.relative_to(work)): [path.stat().st_size, file_digest(path, "sha256")]
        for path in sorted(work.rglob("*"))
        if path.is_file() and path.suffix != ".log"
    }
    sizes = {split: len(corpus[split][0]) for split in SPLITS}
    record = {**settings, "sizes": sizes, "files": files}
    (work / "prepared.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


def load_prepared(path: Path) -> PreparedCorpus:
    """Return what the prepared folder ``path`` holds, after checking that it is whole.

    Raises:
        UserError: if it is missing, was not prepared, or a file is missing or cut short.
    """
    mend = "prepare it with `l2t data prepare NAME --out FOLDER`"
    if not path.is_dir():
        raise UserError(f"no data folder {path}; {mend}")
    record = _record(path)
    if record is None:
        raise UserError(f"{path} is no prepared data folder (no usable prepared.json); {mend}")
    for file, (size, _) in record["files"].items():
        found = (path / file).stat().st_size if (path / file).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            again = f"`l2t data prepare {record['name']} --out {path}`"
            raise UserError(f"{path / file} {what}; delete {path} and run {again}")
    return PreparedCorpus(path, **{key: record[key] for key in _KEYS})


def _record(path: Path) -> dict[str, Any] | None:
    try:
        text = (path / "prepared.json").read_text(encoding="utf-8")
        record: dict[str, Any] = {**_FORMER, **json.loads(text)}
        # Taken apart here, so that a file of another make is refused and not met half-way.
        _ = [(file, int(size), digest) for file, (size, digest) in record["files"].items()]
        _ = [(int(record["sizes"][split]), record[key]) for split in SPLITS for key in _KEYS]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


def find_prepared(
    out: Path, settings: dict[str, Any], on_event: OnEvent = lambda event: None
) -> PreparedCorpus | None:
    """Return what ``out`` holds if it was prepared with ``settings``; None if nothing is there.

    Raises:
        UserError: if it holds other data, or something else.
    """
    if not out.exists() or _is_empty_folder(out):
        return None
    record = _record(out)
    if record is None:
        raise UserError(f"{out} exists and is no prepared data folder; choose another --out")
    for key, value in settings.items():
        if record.get(key) != value:
            raise UserError(
                f"{out} holds other data ({key} is {record.get(key)!r} there, {value!r} here); "
                "choose another --out or delete it"
            )
    found = load_prepared(out)
    on_event({"event": "prepare", "stage": "already there"})
    return found


def _check(corpus: Corpus, name: str, source: str, target: str) -> None:
    for split in SPLITS:
        if split not in corpus:
            raise UserError(f"{name}: no {split} text")
        first, second = corpus[split]
        if len(first) != len(second):
            raise UserError(
                f"{name}: {split}.{source} has {len(first)} lines, {split}.{target} has "
                f"{len(second)}; the two must match line by line"
            )
        for language, lines in ((source, first), (target, second)):
            if not any(line.strip() for line in lines):
                raise UserError(f"{name}: {split}.{language} is empty; give it some lines")


def text_digest(corpus: Corpus) -> str:
    """Return the sha256 over all lines of the splits that ``corpus`` has."""
    digest = hashlib.sha256()
    for split in (split for split in SPLITS if split in corpus):
        for side in corpus[split]:
            digest.update("\n".join(side).encode("utf-8") + b"\0")
    return digest.hexdigest()


def _without_unusable(corpus: Corpus) -> tuple[Corpus, int]:
    """Drop training pairs with an empty or overlong side; valid and test stay as they are."""
    kept = [
        (s, t)
        for s, t in zip(*corpus["train"], strict=True)
        if s.strip() and t.strip()
        and max(len(s.split()), len(t.split())) <= LONGEST_TRAINING_LINE
    ]
    train = ([s for s, _ in kept], [t for _, t in kept])
    return {**corpus, "train": train}, len(corpus["train"][0]) - len(kept)


def _write_text(corpus: Corpus, folder: Path, source: str, target: str) -> None:
    folder.mkdir()
    for split in SPLITS:
        for language, lines in zip((source, target), corpus[split], strict=True):
            text = "".join(f"{line}\n" for line in lines)
            (folder / f"{split}.{language}").write_text(text, encoding="utf-8")


def _preprocess(work: Path, lock: int, source: str, target: str, joined: bool) -> None:
    prefixes = {
        flag: str(work / "encoded" / split)
        for flag, split in zip(("--trainpref", "--validpref", "--testpref"), SPLITS, strict=True)
    }
    command = [
        sys.executable, "-m", "fairseq_cli.preprocess",
        "--source-lang", source, "--target-lang", target,
        *(["--joined-dictionary"] if joined else []),
        "--destdir", str(work / "data-bin"), "--workers", "1",
        *(part for pair in prefixes.items() for part in pair),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, pass_fds=(lock,)
    )
    if done.returncode != 0:
        why, mend = reason(done.stderr, done.returncode), ""
        if "No module named" in why:
            mend = '; pip install "l2t[nmt]"'
        elif "No space left" in why:
            mend = "; free some space or choose --out"
        raise UserError(f"fairseq-preprocess failed ({why}){mend}")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a plain or gzipped text file, without their ends.

    Raises:
        UserError: if it is missing, cut short or not UTF-8.
    """
    try:
        # Bytes, not read_text: it would take a lone carriage return for a line's end.
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; check the folder that should hold it") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged or no text ({error}); get it again") from error
    return text.removesuffix("\n").split("\n") if text else []


DatasetFunction = Callable[[Path, "Path | None", OnEvent], PreparedCorpus]
DATASETS: Registry[DatasetFunction] = Registry("data set")


@DATASETS.register("demo")
def prepare_demo(out: Path, source_folder: Path | None, on_event: OnEvent) -> PreparedCorpus:
    """Make and prepare the demo corpus; ``source_folder`` must be None, nothing is read."""
    from l2t_fairseq.corpora.demo import make_demo_corpus

    if source_folder is not None:
        raise UserError("the demo corpus is made on the spot; leave --from out")
    on_event({"event": "prepare", "stage": "make the corpus"})
    corpus: Corpus = {
        split: ([german for german, _ in pairs], [english for _, english in pairs])
        for split, pairs in make_demo_corpus().items()
    }
    return prepare_corpus(
        corpus, out, name="demo", vocabulary_size=1000, on_event=on_event
    )


@DATASETS.register("multi30k")
def prepare_multi30k(out: Path, source_folder: Path | None, on_event: OnEvent) -> PreparedCorpus:
    """Prepare Multi30k task 1, German to English (Elliott et al. 2016)."""
    from l2t_fairseq.corpora.multi30k import read_multi30k

    corpus = read_multi30k(source_folder, out.parent / f".{out.name}.downloads", on_event)
    return prepare_corpus(
        corpus, out, name="multi30k", vocabulary_size=4000, on_event=on_event
    )


@DATASETS.register("multi30k-en-de")
def prepare_english_to_german(
    out: Path, source_folder: Path | None, on_event: OnEvent
) -> PreparedCorpus:
    """Prepare Multi30k the other way, with twice as many subwords: another dictionary."""
    from l2t_fairseq.corpora.multi30k import read_multi30k

    corpus = read_multi30k(source_folder, out.parent / f".{out.name}.downloads", on_event)
    return prepare_corpus(
        {split: (english, german) for split, (german, english) in corpus.items()}, out,
        name="multi30k-en-de", vocabulary_size=8000, source="en", target="de", on_event=on_event,
    )


@DATASETS.register("iwslt14")
def prepare_iwslt14(out: Path, source: Path | None, on_event: OnEvent) -> PreparedCorpus:
    """Prepare IWSLT 2014, German to English, as fairseq's own script does."""
    from l2t_fairseq.corpora.iwslt14 import prepare

    return prepare(out, source, on_event)
