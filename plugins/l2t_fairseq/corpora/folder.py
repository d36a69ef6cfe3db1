"""What a recipe's ``nmt.data`` names: a folder of ``l2t data prepare``, or fairseq's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l2t_core.errors import UserError
from l2t_core.runs.files import from_home
from l2t_fairseq.corpora.prepare import load_prepared, read_lines
from l2t_fairseq.corpora.text_form import TextForm
from l2t_fairseq.recipe import NmtSpec


@dataclass(frozen=True)
class DataFolder:
    """A corpus to train and score on.

    ``raw`` holds the text before it was cut into subwords, ``SPLIT.LANGUAGE``; None for a folder
    that fairseq-preprocess wrote, whose own target side is then the reference. ``prepared`` is the
    form that ``l2t data prepare`` gave both languages, None in such a folder, too.
    """

    data_bin: Path
    prepared: TextForm | None
    raw: Path | None

    def form_of(self, language: str) -> TextForm:
        """Return how symbols of ``language`` become text; another one's may be cut otherwise.

        Raises:
            UserError: if its dictionary cannot be read.
        """
        if self.prepared is not None:
            return self.prepared
        return TextForm.of_symbols(_symbols(self.data_bin / f"dict.{language}.txt"))

    def raw_lines(self, split: str, language: str) -> list[str] | None:
        """Return the raw text of ``split`` in ``language``, None if there is none."""
        path = self.raw / f"{split}.{language}" if self.raw is not None else None
        return read_lines(path) if path is not None and path.is_file() else None

    def references(self, split: str, language: str, form: TextForm) -> list[str] | None:
        """Return :meth:`raw_lines` as ``form`` has it."""
        lines = self.raw_lines(split, language)
        return None if lines is None else [form.detokenised(line) for line in lines]


def data_bin_of(path: Path) -> Path:
    """Return the folder that fairseq calls DATA for the recipe's ``nmt.data``, there or not."""
    path = from_home(path)
    return path if any(path.glob("dict.*.txt")) else path / "data-bin"


def known_entries(spec: NmtSpec) -> int | None:
    """Return the entries of the smallest dictionary in ``nmt.data``, None if there is no data."""
    files = data_bin_of(Path(spec.data)).glob("dict.*.txt") if spec.data else ()
    # The file leaves out beginning, end, padding and unknown.
    return min((file.read_bytes().count(b"\n") + 4 for file in files), default=None)


def open_data(path: Path) -> DataFolder:
    """Return what ``path`` holds: a prepared folder, checked to be whole, or a data-bin folder.

    Raises:
        UserError: if it is missing, neither of the two, or not whole.
    """
    path = from_home(path)
    data_bin = data_bin_of(path)
    prepared = data_bin.parent
    if data_bin != path or (prepared / "prepared.json").is_file():
        corpus = load_prepared(prepared)
        return DataFolder(corpus.data_bin, corpus.form, corpus.path / "raw")
    if not any(map(_symbols, data_bin.glob("dict.*.txt"))):
        raise UserError(f"the dictionaries in {data_bin} are empty; run fairseq-preprocess again")
    return DataFolder(data_bin, None, None)


def _symbols(dictionary: Path) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in read_lines(dictionary)]
