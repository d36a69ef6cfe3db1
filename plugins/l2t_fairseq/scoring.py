"""A checkpoint's score: fairseq-generate in a process of its own, sacreBLEU on its output.

Where the corpus has raw text, the score is of detokenised output against that, so that it compares
with other people's; fairseq-generate's own "BLEU" line does not. Corpora that come tokenised are
scored as they are, as the papers about them do; the signature says so (``tok:none``).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.runs.files import atomic_write
from l2t_fairseq.checkpoints import refuse_cut_short
from l2t_fairseq.commands.failure import reason_in
from l2t_fairseq.corpora.folder import open_data
from l2t_fairseq.corpora.prepare import read_lines
from l2t_fairseq.corpora.text_form import TextForm
from l2t_fairseq.measures.sentence_scores import build_measure

# Symbols as the dictionary has them, the text that fairseq makes of them, and the targets.
SYMBOLS, TEXT, TARGETS = (
    re.compile(pattern)
    for pattern in (r"H-(\d+)\t[^\t]*\t?(.*)", r"D-(\d+)\t[^\t]*\t?(.*)", r"T-(\d+)\t(.*)")
)


@dataclass(frozen=True)
class ScoredOutput:
    """The score out of 100, its signature, and the files written."""

    score: float
    signature: str
    hypotheses: Path
    log: Path


def score_checkpoint(
    data: Path,
    checkpoint: Path,
    generate_flags: Sequence[str] = (),
    split: str = "test",
    out: Path = Path(),
    reference: Path | None = None,
    measure: str = "expected_bleu",
    user_dir: Path | None = None,
    languages: tuple[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> ScoredOutput:
    """Translate ``split`` of a data folder with ``checkpoint`` and score it.

    ``data`` is a prepared folder or fairseq's own (:func:`~l2t_fairseq.corpora.folder.open_data`).
    ``generate_flags`` are fairseq-generate's (``--beam``, ``5``). Its symbols become
    text as the candidates of teacher training do, unless the flags join the subwords themselves
    (``--remove-bpe``, ``--bpe``); ``--tokenizer moses`` undoes that tokeniser. The reference is
    ``reference``, a raw text, if given, else the prepared folder's, else the data's own target
    side with its subwords joined; the signature says so (``ref:data-bin``). ``measure`` is named
    as a teacher's (:mod:`~l2t_fairseq.measures.sentence_scores`) and taken of the whole split.
    ``user_dir`` is the plugin's folder or one that imports it (None: the plugin's). ``languages``
    are the student's source and target (None: those that the data's files are named by).
    ``environment`` is added to ours. Writes ``out/SPLIT.hyp.LANGUAGE``, a line for each sentence,
    and ``out/generate-SPLIT.log``.

    Raises:
        UserError: if something is missing, fairseq-generate fails, or it leaves sentences out.
    """
    folder = open_data(data)
    source, target = language_pair(folder.data_bin, split, languages)
    form = folder.form_of(target).as_generated(list(generate_flags), target)
    flags = [*generate_flags, "--source-lang", source, "--target-lang", target]
    flags += ["--gen-subset", split]
    joins = any(flag.startswith(("--remove-bpe", "--post-process", "--bpe")) for flag in flags)
    flags = _completed(flags, joins)
    log = out / f"generate-{split}.log"
    raw = folder.references(split, target, form) if reference is None else read_lines(reference)
    generate(folder.data_bin, checkpoint, flags, log, user_dir, environment)
    if joins:
        generated, targets = read_output(log, TEXT), read_output(log, TARGETS)
    else:
        generated, targets = _texts(log, SYMBOLS, form), _texts(log, TARGETS, form)
    references = [targets[number] for number in sorted(targets)] if raw is None else raw
    hypotheses = in_order(generated, len(references), log)
    path = out / f"{split}.hyp.{target}"
    atomic_write(path, "".join(f"{line}\n" for line in hypotheses))
    # A text that the user names is raw, whatever the data are.
    tokenize = "13a" if reference is not None else form.bleu_tokenize
    score, signature = build_measure(measure, tokenize).judge(hypotheses, references)
    return ScoredOutput(score, signature + ("|ref:data-bin" if raw is None else ""), path, log)


def _completed(flags: list[str], joins: bool) -> list[str]:
    """Return fairseq-generate's ``flags`` with what is needed; ``joins``: they join subwords."""
    if not any(flag.startswith("--required-batch-size-multiple") for flag in flags):
        # At any other value some builds of fairseq drop the sentences left over at the end.
        flags = [*flags, "--required-batch-size-multiple", "1"]
    if joins:
        return flags
    # None: the tokeniser's work is undone once subwords are joined. Its own flags, which take no
    # values and are about cutting text, go with it.
    return [*(flag for flag in flags if not flag.startswith("--moses-")), "--tokenizer", "space"]


def generate(
    data_bin: Path,
    checkpoint: Path,
    flags: Sequence[str],
    log: Path,
    user_dir: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run fairseq-generate with the plugin (or ``user_dir``); what it prints goes to ``log``.

    ``environment`` is added to ours.

    Raises:
        UserError: if the checkpoint is missing or cut short, or fairseq-generate fails.
    """
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}; train the student first")
    refuse_cut_short(checkpoint, "copy it again, or train the student again")
    user_dir = user_dir or Path(__file__).resolve().parent
    # The plugin first of all lets torch read the checkpoint, whatever criterion wrote it.
    command = [sys.executable, "-m", "fairseq_cli.generate", str(data_bin), *flags]
    command += ["--path", str(checkpoint), "--user-dir", str(user_dir)]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        # A new file: a child that outlived a killed run of ours may still write into the old one.
        log.unlink(missing_ok=True)
        with log.open("wb") as handle:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {}), "PYTHONUTF8": "1"},
                check=False,
            ).returncode
    except OSError as error:
        raise UserError(f"cannot write {log}: {error.strerror}; choose another folder") from error
    if code != 0:
        raise UserError(f"fairseq-generate failed ({reason_in(log, code)}); its output is in {log}")


def read_output(log: Path, kind: re.Pattern[str]) -> dict[int, str]:
    """Return the lines of one kind in fairseq-generate's output by sentence id.

    With ``--nbest`` the first of a sentence, which is its best, counts.
    """
    found: dict[int, str] = {}
    # Split at newlines only: a translation may hold other characters that end a line for Python.
    for line in log.read_bytes().decode("utf-8", errors="replace").split("\n"):
        if match := kind.fullmatch(line):
            found.setdefault(int(match[1]), match[2])
    return found


def _texts(log: Path, kind: re.Pattern[str], form: TextForm) -> dict[int, str]:
    """Return the texts of lines of symbols; only a space parts two symbols."""
    lines = read_output(log, kind)
    return {number: form.text([s for s in lines[number].split(" ") if s]) for number in lines}


def in_order(generated: dict[int, str], count: int, log: Path) -> list[str]:
    """Return ``count`` hypotheses in the order of the data.

    Raises:
        UserError: if fairseq-generate left sentences out, or has more than the reference.
    """
    missing = [number for number in range(count) if number not in generated]
    if missing or len(generated) != count:
        what = (
            f"sentence {missing[0] + 1} and {len(missing) - 1} more are missing"
            if missing
            else f"it has {len(generated)}"
        )
        raise UserError(
            f"fairseq-generate did not translate just the {count} sentences of the reference: "
            f"{what}; see {log}, and generate without --skip-invalid-size-inputs-valid-test"
        )
    return [generated[number] for number in range(count)]


def language_pairs(data_bin: Path, split: str) -> list[str]:
    """Return the pairs of languages, as ``de-en``, that a folder has ``split`` in."""
    names = [index.name[len(split) + 1 :] for index in data_bin.glob(f"{split}.*-*.*.idx")]
    return sorted({name.split(".")[0] for name in names})


def refuse_several_pairs(data_bin: Path, split: str) -> None:
    """Refuse a folder of several pairs of languages where nobody says which is meant.

    Raises:
        UserError: if ``split`` is there in more than one pair.
    """
    pairs = language_pairs(data_bin, split)
    if len(pairs) > 1:
        raise UserError(
            f"{data_bin} holds the split {split!r} in several pairs of languages "
            f"({', '.join(pairs)}); say which by --source-lang and --target-lang"
        )


def language_pair(
    data_bin: Path, split: str, wanted: tuple[str, str] | None = None
) -> tuple[str, str]:
    """Return source and target language of ``split`` in a fairseq-preprocess folder.

    A student may be ``wanted`` for either direction of a pair, as fairseq takes it.

    Raises:
        UserError: if the split is not there, not in the languages that are wanted, or in several
            pairs of which none is.
    """
    pairs = language_pairs(data_bin, split)
    if not pairs:
        raise UserError(f"{data_bin} holds no split {split!r}; prepare the data again")
    if wanted is not None:
        if not {"-".join(wanted), "-".join(reversed(wanted))} & {*pairs}:
            raise UserError(
                f"{data_bin} holds the split {split!r} in {', '.join(pairs)} and not in "
                f"{'-'.join(wanted)}; mend --source-lang and --target-lang, or prepare that pair"
            )
        return wanted
    refuse_several_pairs(data_bin, split)
    source, _, target = pairs[0].partition("-")
    return source, target
