"""Prepared data: whole and reproducible, or refused with a line and nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official_data import folder_of, needs  # type: ignore[import-not-found]

from l2t_core.errors import UserError
from l2t_core.runs.files import open_locked
from l2t_fairseq.corpora import multi30k, prepare
from l2t_fairseq.corpora.demo import make_demo_corpus
from l2t_fairseq.corpora.folder import data_bin_of, open_data
from l2t_fairseq.corpora.prepare import Corpus, load_prepared, prepare_corpus, read_lines


def small_corpus() -> Corpus:
    made = make_demo_corpus(pairs=500, held_out=40)
    return {
        split: ([german for german, _ in pairs], [english for _, english in pairs])
        for split, pairs in made.items()
    }


def prepare_small(corpus: Corpus, out: Path, **changes: Any) -> prepare.PreparedCorpus:
    settings: dict[str, Any] = {"name": "small", "vocabulary_size": 200, **changes}
    return prepare_corpus(corpus, out, **settings)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> prepare.PreparedCorpus:
    pytest.importorskip("fairseq")
    return prepare_small(small_corpus(), tmp_path_factory.mktemp("prepared") / "small")


@pytest.fixture
def copy(prepared: prepare.PreparedCorpus, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared.path, tmp_path / "copy"))


def test_a_prepared_folder_is_what_fairseq_reads(prepared: prepare.PreparedCorpus) -> None:
    import sentencepiece
    from fairseq.data import Dictionary, data_utils

    corpus = small_corpus()
    assert prepared.sizes == {"train": 420, "valid": 40, "test": 40}
    dictionaries = [(prepared.data_bin / f"dict.{language}.txt") for language in ("de", "en")]
    assert dictionaries[0].read_bytes() == dictionaries[1].read_bytes()
    dictionary = Dictionary.load(str(dictionaries[0]))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(prepared.form.model))
    for split in prepare.SPLITS:
        for language, lines in zip(("de", "en"), corpus[split], strict=True):
            assert read_lines(prepared.raw(split, language)) == lines
            data = data_utils.load_indexed_dataset(
                str(prepared.data_bin / f"{split}.de-en.{language}"), dictionary
            )
            assert len(data) == len(lines)
            if split == "train":  # every piece of the training text is in the dictionary
                decoded = [processor.decode(dictionary.string(row).split()) for row in data]
                assert decoded == lines
    assert not list(prepared.path.glob("encoded*"))
    # mkdtemp makes folders private: others, too, may read this one, as any other.
    plain = prepared.path.with_name("plain")
    plain.mkdir()
    assert prepared.path.stat().st_mode == plain.stat().st_mode


def test_the_same_text_gives_the_same_bytes(
    prepared: prepare.PreparedCorpus, tmp_path: Path
) -> None:
    again = prepare_small(small_corpus(), tmp_path / "with" / "another" / "name")
    records = [(p.path / "prepared.json").read_text() for p in (prepared, again)]
    assert records[0] == records[1]
    for name, (size, digest) in json.loads(records[0])["files"].items():
        content = (again.path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)


def test_what_is_there_is_kept(copy: Path) -> None:
    before = (copy / "prepared.json").stat().st_mtime_ns
    events: list[dict[str, Any]] = []
    found = prepare_small(small_corpus(), copy, on_event=events.append)
    assert found == load_prepared(copy)
    assert [event["stage"] for event in events] == ["already there"]
    assert (copy / "prepared.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary_size": 210}, "vocabulary_size is 200 there, 210 here"),
        ({"name": "other"}, "name is 'small' there, 'other' here"),
    ],
)
def test_other_data_is_not_overwritten(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare_small(small_corpus(), copy, **changes)
    corpus = small_corpus()
    corpus["train"][0][7] += " und mehr"
    with pytest.raises(UserError, match="text_sha256"):
        prepare_small(corpus, copy)
    load_prepared(copy)


def test_a_folder_of_the_users_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="no prepared data folder"):
        prepare_small(small_corpus(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_unusable_training_pairs_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("fairseq")
    corpus = small_corpus()
    train = corpus["train"]
    train[0][3], train[1][5], train[1][8] = " ", "", "word " * 251
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    events: list[dict[str, Any]] = []
    made = prepare_small(corpus, tmp_path / "out", on_event=events.append)
    assert made.sizes == {"train": 417, "valid": 40, "test": 40}
    assert events[0]["stage"] == "3 unusable training pairs left out"
    assert json.loads((made.path / "prepared.json").read_text())["dropped"] == 3
    assert len(read_lines(made.raw("train", "en"))) == 417


def shorten(corpus: Corpus) -> None:
    corpus["valid"][1].pop()


def empty(corpus: Corpus) -> None:
    corpus["valid"] = ([], [])


def blank(corpus: Corpus) -> None:
    corpus["valid"] = ([""], [""])


def unusable(corpus: Corpus) -> None:
    corpus["train"] = (["eins", ""], ["", "two"])


def missing(corpus: Corpus) -> None:
    del corpus["test"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shorten, r"valid\.de has 40 lines, valid\.en has 39"),
        (empty, r"valid\.de is empty"),
        (blank, r"valid\.de is empty"),
        (unusable, "train has no pair"),
        (missing, "no test text"),
    ],
)
def test_a_bad_corpus_is_refused(
    tmp_path: Path, damage: Callable[[Corpus], None], message: str
) -> None:
    corpus = small_corpus()
    damage(corpus)
    with pytest.raises(UserError, match=message):
        prepare_small(corpus, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("vocabulary_size", [20, 100_000])
def test_an_impossible_vocabulary_leaves_nothing(tmp_path: Path, vocabulary_size: int) -> None:
    with pytest.raises(UserError, match=f"cannot make {vocabulary_size} pieces"):
        prepare_small(small_corpus(), tmp_path / "out", vocabulary_size=vocabulary_size)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_preprocess_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fairseq_cli").mkdir()
    (tmp_path / "fairseq_cli" / "__init__.py").write_text("raise OSError('no space left')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UserError, match=r"fairseq-preprocess failed \(OSError: no space left\)"):
        prepare_small(small_corpus(), tmp_path / "work" / "out")
    assert list((tmp_path / "work").iterdir()) == []


def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose --out"):
        prepare_small(small_corpus(), tmp_path / "file" / "out")


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["stage"] == "fairseq-preprocess":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_small(small_corpus(), tmp_path / "out", on_event=stop)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_the_same_at_once_one_is_kept(tmp_path: Path) -> None:
    """The other is as quick as can be: all of it while the first calls fairseq-preprocess."""
    corpus, others = small_corpus(), []

    def overtaken(event: dict[str, Any]) -> None:
        if event["stage"] == "fairseq-preprocess":
            others.append(prepare_small(corpus, tmp_path / "out"))

    made = prepare_small(corpus, tmp_path / "out", on_event=overtaken)
    assert [made] == others and [path.name for path in tmp_path.iterdir()] == ["out"]

    def different(event: dict[str, Any]) -> None:
        if event["stage"] == "fairseq-preprocess":
            prepare_small(corpus, tmp_path / "other", vocabulary_size=180)

    with pytest.raises(UserError, match=r"holds other data \(vocabulary_size is 180 there"):
        prepare_small(corpus, tmp_path / "other", on_event=different)


@pytest.mark.parametrize("locks", [True, False])
def test_a_folder_that_another_sweeps_away_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    made: list[Path] = []

    def swept(folder: Path) -> int:
        made.append(folder)
        if len(made) == 1:
            folder.rmdir()
        return open_locked(folder)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(prepare, "open_locked", swept)
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".out.making-killed").mkdir()
    with prepare._work_folder(tmp_path / "out") as (work, _):
        assert work.is_dir() and made[-1] == work and len(made) == 2
        # Where nobody can tell whose it is, it stays.
        assert (tmp_path / ".out.making-killed").exists() == (not locks)
    assert not work.exists()


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder .*l2t data prepare"):
        load_prepared(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no prepared data folder .*l2t data prepare"):
        load_prepared(tmp_path)


@pytest.mark.parametrize("file", ["spm.model", "data-bin/train.de-en.en.bin", "raw/test.en"])
def test_damaged_files_are_named(copy: Path, file: str) -> None:
    content = (copy / file).read_bytes()
    (copy / file).write_bytes(content[:-5])
    with pytest.raises(UserError, match=f"{file} has {len(content) - 5} bytes") as error:
        load_prepared(copy)
    assert f"l2t data prepare small --out {copy}" in str(error.value)
    (copy / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        load_prepared(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": {"a": 1}}', '{"files": {}, "sizes": {"train": 1}}']
)
def test_a_damaged_record(copy: Path, text: str) -> None:
    (copy / "prepared.json").write_text(text)
    with pytest.raises(UserError, match="no prepared data folder"):
        load_prepared(copy)


def test_reading_text(tmp_path: Path) -> None:
    text = "eins\n\nz\rwei\u2028drei\n"
    (tmp_path / "plain").write_bytes(text.encode())
    packed = gzip.compress(text.encode())
    (tmp_path / "packed.gz").write_bytes(packed)
    expected = ["eins", "", "z\rwei\u2028drei"]
    assert read_lines(tmp_path / "plain") == read_lines(tmp_path / "packed.gz") == expected
    damaged = bytearray(gzip.compress(bytes(range(256)) * 50))
    damaged[40:60] = bytes(20)
    for name, content in (
        ("cut.gz", packed[:-9]),
        ("deflate.gz", bytes(damaged)),
        ("other.gz", b"<html>"),
        ("latin", "für\n".encode("latin-1")),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            read_lines(tmp_path / name)
    with pytest.raises(UserError, match="is missing; check the folder"):
        read_lines(tmp_path / "nothing")


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like Multi30k's, of a few lines that pass for the official ones."""
    folder = tmp_path / "official"
    folder.mkdir()
    digests = {}
    for name in multi30k.SHA256:
        text = "".join(f"{name} {number}\n" for number in range(5)).encode()
        (folder / f"{name}.gz").write_bytes(gzip.compress(text))
        digests[name] = hashlib.sha256(text).hexdigest()
    monkeypatch.setattr(multi30k, "SHA256", digests)
    monkeypatch.setattr(multi30k, "BASE", folder.as_uri())
    return folder


@needs("MULTI30K")
def test_the_official_files_are_known(tmp_path: Path) -> None:
    corpus = multi30k.read_multi30k(folder_of("MULTI30K"), tmp_path / "none", lambda event: None)
    sizes = {split: [len(side) for side in sides] for split, sides in corpus.items()}
    assert sizes == {"train": [29_000] * 2, "valid": [1_014] * 2, "test": [1_000] * 2}
    assert corpus["test"][1][0] == "A man in an orange hat starring at something."


def test_multi30k_from_a_folder(official: Path, tmp_path: Path) -> None:
    corpus = multi30k.read_multi30k(official, tmp_path / "downloads", lambda event: None)
    assert {split: [side[0] for side in sides] for split, sides in corpus.items()} == {
        "train": ["train.de 0", "train.en 0"],
        "valid": ["val.de 0", "val.en 0"],
        "test": ["test_2016_flickr.de 0", "test_2016_flickr.en 0"],
    }
    assert not (tmp_path / "downloads").exists()


def test_multi30k_the_other_way(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(prepare, "prepare_corpus", lambda corpus, out, **how: asked.update(
        corpus=corpus, out=out, **how
    ))
    prepare.DATASETS.get("multi30k-en-de")(tmp_path / "out", official, print)
    assert (asked["source"], asked["target"], asked["vocabulary_size"]) == ("en", "de", 8000)
    assert [side[0] for side in asked["corpus"]["train"]] == ["train.en 0", "train.de 0"]


def test_multi30k_of_other_content_is_refused(official: Path, tmp_path: Path) -> None:
    for path in official.glob("*.gz"):
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    multi30k.read_multi30k(tmp_path, tmp_path / "downloads", lambda event: None)
    lines = (tmp_path / "val.en").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "val.en").write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"val\.en is not Multi30k's val\.en \(4 lines"):
        multi30k.read_multi30k(tmp_path, tmp_path / "downloads", lambda event: None)
    (tmp_path / "train.de").unlink()
    with pytest.raises(UserError, match=r"train\.de\.gz is missing"):
        multi30k.read_multi30k(tmp_path, tmp_path / "downloads", lambda event: None)


def test_multi30k_by_download(official: Path, tmp_path: Path) -> None:
    """The way without --from, over file:// addresses; damaged downloads are fetched anew."""
    downloads = tmp_path / "downloads"
    events: list[dict[str, Any]] = []
    first = multi30k.read_multi30k(None, downloads, events.append)
    assert first == multi30k.read_multi30k(official, downloads, lambda event: None)
    assert {event["file"] for event in events} == set(multi30k.SHA256)
    (downloads / "val.de.gz").write_bytes(b"<html>log in first</html>")
    with pytest.raises(UserError, match="damaged"):
        multi30k.read_multi30k(None, downloads, lambda event: None)
    assert multi30k.read_multi30k(None, downloads, lambda event: None) == first


def test_multi30k_offline_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi30k, "BASE", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot download .*--from"):
        prepare.DATASETS.get("multi30k")(tmp_path / "out", None, lambda event: None)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_reads_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave --from out"):
        prepare.DATASETS.get("demo")(tmp_path / "out", tmp_path, lambda event: None)
    with pytest.raises(UserError, match="did you mean 'multi30k'"):
        prepare.DATASETS.get("multi3k")


def test_a_folder_at_home_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data_bin = tmp_path / "words" / "data-bin"
    data_bin.mkdir(parents=True)
    (data_bin / "dict.en.txt").write_text("one 1\ntwo@@ 1\n")
    found = open_data(Path("~/words/data-bin"))
    assert found.data_bin == data_bin == data_bin_of(Path("~/words"))
