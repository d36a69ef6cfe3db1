"""Parallel text brought into the form that recipes name: sentencepiece and fairseq-preprocess.

A prepared folder holds raw/{train,valid,test}.{source,target} (text as it was), spm.model,
data-bin/ (one joined dictionary) and prepared.json, which is written last and says what the rest
is. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l2t_core.download import file_digest
from l2t_core.errors import UserError
from l2t_core.registry import Registry

SPLITS = ("train", "valid", "test")
# fairseq's own limit on positions is 1,024; lines this long are noise in every corpus here.
LONGEST_TRAINING_LINE = 250

OnEvent = Callable[[dict[str, Any]], None]
Corpus = dict[str, tuple[list[str], list[str]]]  # split -> source lines, target lines


@dataclass(frozen=True)
class PreparedCorpus:
    """A prepared folder: where its parts are and how many lines each split has."""

    path: Path
    name: str
    source: str
    target: str
    sizes: dict[str, int]
    vocabulary_size: int

    @property
    def data_bin(self) -> Path:
        """What fairseq calls DATA."""
        return self.path / "data-bin"

    @property
    def spm_model(self) -> Path:
        """The joint sentencepiece model."""
        return self.path / "spm.model"

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
    on_event: OnEvent = lambda event: None,
) -> PreparedCorpus:
    """Write ``corpus`` to the prepared folder ``out``; return at once if it is there already.

    Training pairs with an empty or overlong side are dropped and counted. Deterministic: the same
    text and settings give the same files.

    Raises:
        UserError: if a split is empty or its sides differ in length, ``out`` holds something
            else or cannot be written, or a tool fails.
    """
    _check(corpus, name, source, target)
    settings = {
        "name": name,
        "source": source,
        "target": target,
        "vocabulary_size": vocabulary_size,
        "text_sha256": _text_digest(corpus),
    }
    if out.exists():
        return _same_or_refuse(out, settings, on_event)
    corpus, dropped = _without_unusable(corpus)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise UserError(f"cannot write to {out.parent}: {error.strerror}; choose --out") from error
    try:
        on_event({"event": "prepare", "stage": "write", "dropped": dropped})
        _write_raw(corpus, work, source, target)
        on_event({"event": "prepare", "stage": "sentencepiece"})
        _encode(work, source, target, vocabulary_size)
        on_event({"event": "prepare", "stage": "fairseq-preprocess"})
        _preprocess(work, source, target)
        shutil.rmtree(work / "encoded")
        sizes = {split: len(corpus[split][0]) for split in SPLITS}
        files = {
            str(p.relative_to(work)): [p.stat().st_size, file_digest(p, "sha256")]
            for p in sorted(work.rglob("*"))
            if p.is_file() and not p.name.endswith(".log")
        }
        record = {**settings, "sizes": sizes, "dropped": dropped, "files": files}
        (work / "prepared.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        work.chmod(0o755)
        work.replace(out)
    except OSError as error:
        raise UserError(
            f"cannot prepare {out}: {error.strerror or error}; free some space or choose --out"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_prepared(out)


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
            raise UserError(f"{path / file} {what}; delete {path} and {mend}")
    keys = ("name", "source", "target", "sizes", "vocabulary_size")
    return PreparedCorpus(path, **{key: record[key] for key in keys})


def _record(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((path / "prepared.json").read_text(encoding="utf-8"))
        return record if isinstance(record["files"], dict) and record["sizes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_or_refuse(out: Path, settings: dict[str, Any], on_event: OnEvent) -> PreparedCorpus:
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
        if not first:
            raise UserError(f"{name}: {split} is empty; give it some lines")


def _text_digest(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
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


def _write_raw(corpus: Corpus, work: Path, source: str, target: str) -> None:
    (work / "raw").mkdir()
    for split in SPLITS:
        for language, lines in zip((source, target), corpus[split], strict=True):
            text = "".join(f"{line}\n" for line in lines)
            (work / "raw" / f"{split}.{language}").write_text(text, encoding="utf-8")


def _encode(work: Path, source: str, target: str, vocabulary_size: int) -> None:
    """Train a joint BPE model on the training text and encode all splits."""
    import sentencepiece

    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(work / "raw" / f"train.{language}") for language in (source, target)],
            model_prefix=str(work / "spm"),
            vocab_size=vocabulary_size,
            model_type="bpe",
            character_coverage=1.0,
            num_threads=1,  # the only setting whose result does not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"sentencepiece cannot make {vocabulary_size} pieces of this text ({error}); choose "
            "another vocabulary size"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_file=str(work / "spm.model"))
    (work / "encoded").mkdir()
    for split in SPLITS:
        for language in (source, target):
            lines = (work / "raw" / f"{split}.{language}").read_text(encoding="utf-8").split("\n")
            encoded = processor.encode(lines[:-1], out_type=str)
            text = "".join(" ".join(pieces) + "\n" for pieces in encoded)
            (work / "encoded" / f"{split}.{language}").write_text(text, encoding="utf-8")


def _preprocess(work: Path, source: str, target: str) -> None:
    prefixes = {
        flag: str(work / "encoded" / split)
        for flag, split in zip(("--trainpref", "--validpref", "--testpref"), SPLITS, strict=True)
    }
    command = [
        sys.executable, "-m", "fairseq_cli.preprocess",
        "--source-lang", source, "--target-lang", target, "--joined-dictionary",
        "--destdir", str(work / "data-bin"), "--workers", "1",
        *(part for pair in prefixes.items() for part in pair),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        mend = '; pip install "l2t[nmt]"' if "No module named" in lines[-1] else ""
        raise UserError(f"fairseq-preprocess failed: {lines[-1]}{mend}")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a plain or gzipped text file, without their ends.

    Raises:
        UserError: if it is missing, cut short or not UTF-8.
    """
    import gzip

    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; check the folder given with --from") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged or no text ({error}); get it again") from error
    return text.split("\n")[:-1] if text.endswith("\n") else text.split("\n")


DatasetFunction = Callable[[Path, "Path | None", OnEvent], PreparedCorpus]
DATASETS: Registry[DatasetFunction] = Registry("data set")


@DATASETS.register("demo")
def prepare_demo(out: Path, source_folder: Path | None, on_event: OnEvent) -> PreparedCorpus:
    """Make and prepare the demo corpus; ``source_folder`` must be None, nothing is read."""
    from l2t_fairseq.demo_corpus import make_demo_corpus

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
    from l2t_fairseq.multi30k import read_multi30k

    corpus = read_multi30k(source_folder, out.parent / f".{out.name}.downloads", on_event)
    return prepare_corpus(
        corpus, out, name="multi30k", vocabulary_size=4000, on_event=on_event
    )
