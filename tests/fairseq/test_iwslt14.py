"""IWSLT 2014 as fairseq's script prepares it, from an archive of the same form made here."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from checkout import LIMIT, ROOT, end_of, start_python  # type: ignore[import-not-found]
from iwslt_files import official_files, pack

from l2t_core.errors import UserError
from l2t_fairseq.corpora import iwslt14
from l2t_fairseq.corpora.iwslt14 import (
    TESTS,
    TRAIN,
    moses_tokeniser,
    parse,
    prepare,
    read_iwslt14,
    segments,
    splits,
    tokenised,
    training_lines,
    usable,
)
from l2t_fairseq.corpora.prepare import PreparedCorpus, read_lines
from l2t_fairseq.corpora.segmentation import subword_nmt_merges


def quiet(event: dict[str, Any]) -> None:
    """Show nothing."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(official_files(), tmp_path_factory.mktemp("official") / "de-en.tgz")


@pytest.fixture(scope="module")
def prepared(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    pytest.importorskip("fairseq")
    return prepare(tmp_path_factory.mktemp("prepared") / "iwslt14", archive, quiet)


# -- what the script does, step by step


def test_tags_about_a_talk_go_and_titles_stay() -> None:
    text = (
        "<url>http://x</url>\n<keywords>a</keywords>\n<talkid>7</talkid>\n"
        "<title>Ein Titel</title>\n<description>Worum</description>\n Ein Satz.\nb <url> c\n\n"
    )
    assert training_lines(text) == ["Ein Titel", "Worum", " Ein Satz.", ""]


def test_segments_of_the_official_xml() -> None:
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<mteval><doc><title>No & one</title>\n'
        '<seg id="1"> It’s R&D, &quot;yes&quot; &amp; no. </seg>\n<seg id="2">Two\nlines</seg>\n'
    )
    assert segments(text, "x") == ["It's R&D, \"yes\" & no.", "Two\nlines"]
    with pytest.raises(ValueError, match="x is damaged: sentence 2 does not end"):
        segments('<seg id="1">a</seg>\n<seg id="2">b\n', "x")


def test_line_ends_of_another_system_and_stray_controls_change_nothing() -> None:
    files = official_files()
    training, dev = (name.format("de") for name in (TRAIN, TESTS[0]))
    dirty = {name: text.replace("\n", "\r\n") for name, text in files.items()}
    dirty[training] = dirty[training].replace("Eins zwei", "Ei\0ns\tzwei\x0b")
    dirty[dev] = dirty[dev].replace("Eins", "E\0ins\r")
    assert dirty[training].count("\0") > 3 and "\0" in dirty[dev]
    clean, other = (
        splits(tokenised(parse(texts, Path("a.tgz")), quiet)) for texts in (files, dirty)
    )
    assert clean == other


@pytest.mark.parametrize(
    ("language", "line", "expected"),
    [
        # What tokenizer.perl -l and lowercase.perl print, of Moses's master in 2025.
        ("en", "It's Dr. No's  idea, isn't it?",
         "it &apos;s dr. no &apos;s idea , isn &apos;t it ?"),
        ("en", '"Well ..." [sic] Q&A', "&quot; well ... &quot; &#91; sic &#93; q &amp; a"),
        ("en", "<b> a|b", "&lt; b &gt; a &#124; b"),
        ("en", "He left at 3 p.m.", "he left at 3 p.m ."),
        ("en", "$5,000.50 and 1,2 or a,b", "$ 5,000.50 and 1,2 or a , b"),
        ("de", "Das war's, z.B. am 3. Mai usw.", "das war &apos; s , z.b. am 3. mai usw ."),
        ("de", "„Ja“ – 12 Std.", "„ ja “ – 12 std ."),
        ("de", "Wohin geht es ...", "wohin geht es ..."),
        ("de", "  ", ""),
    ],
)  # fmt: skip
def test_tokens_are_those_of_moses(language: str, line: str, expected: str) -> None:
    assert moses_tokeniser(language)(line) == expected


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a b", "a b c", True),  # the ratio 1.5 itself is kept
        ("a b c d", "a b c d e f g", False),
        ("a b c d e f g", "a b c d", False),
        ("", "a", False),
        ("a", "", False),
        ("a " * 175, "b " * 175, True),
        ("a " * 176, "b " * 175, False),
        ("x" * 1000, "b", True),
        ("x" * 1001, "b", False),
    ],
)
def test_which_pairs_are_kept(source: str, target: str, expected: bool) -> None:
    assert usable(source, target) is expected


def test_every_23rd_clean_pair_is_a_dev_pair() -> None:
    german = [f"wort {i}" for i in range(100)]
    german[10] = ""  # dropped before counting
    corpus = splits({"train": (german, [f"word {i}" for i in range(100)]), "test": (["t"], ["u"])})
    assert corpus["valid"] == (
        ["wort 23", "wort 46", "wort 69", "wort 92"], ["word 23", "word 46", "word 69", "word 92"]
    )  # fmt: skip
    assert len(corpus["train"][0]) == 95 and "wort 23" not in corpus["train"][0]
    assert corpus["test"] == (["t"], ["u"])


def test_the_test_sets_follow_each_other_in_the_script_s_order() -> None:
    files = official_files()
    corpus = parse(files, Path("x"))
    in_order = [
        line for name in TESTS for line in segments(files[name.format("en")], name)
    ]
    assert corpus["test"][1] == in_order and len(in_order) == 20
    assert [name[8:].split(".")[1] for name in TESTS] == [
        "dev2010", "dev2012", "tst2010", "tst2011", "tst2012",
    ]  # fmt: skip
    assert len(corpus["train"][0]) == 110 + 2 * 11


def test_merges_are_joint_and_mark_words_that_go_on() -> None:
    corpus = {"train": (["lower low"] * 3, ["newer low"] * 3), "test": (["lowest"], ["slow"])}
    events: list[dict[str, Any]] = []
    code, cut = subword_nmt_merges(corpus, 3, events.append)
    lines = code.decode().splitlines()
    assert lines[0] == "#version: 0.2" and len(lines) == 4
    # l o is there 9 times; of the pairs with 6 the tool takes the last in the alphabet.
    assert lines[1:] == ["l o", "w e", "we r</w>"]
    assert cut["train"][0][0] == "lo@@ wer lo@@ w" and cut["test"][1] == ["s@@ lo@@ w"]
    assert {event.get("stage") for event in events} >= {"apply BPE", "learn BPE"}
    with pytest.raises(UserError, match="no pair of letters"):
        subword_nmt_merges({"train": (["a"], ["b"])}, 3, quiet)


# -- the whole of it


def test_the_prepared_folder(prepared: PreparedCorpus, archive: Path) -> None:
    from fairseq.data import Dictionary, data_utils

    # 132 lines with their titles and descriptions, all of them clean.
    assert prepared.sizes == {"train": 127, "valid": 5, "test": 20}
    expected = splits(tokenised(read_iwslt14(archive, Path("none"), quiet), quiet))
    dictionaries = {}
    for language, side in (("de", 0), ("en", 1)):
        dictionaries[language] = Dictionary.load(
            str(prepared.data_bin / f"dict.{language}.txt")
        )
        for split, lines in expected.items():
            assert read_lines(prepared.raw(split, language)) == lines[side]
            data = data_utils.load_indexed_dataset(
                str(prepared.data_bin / f"{split}.de-en.{language}"), dictionaries[language]
            )
            if split == "train":
                texts = [dictionaries[language].string(row, "@@ ") for row in data]
                assert texts == lines[side]
    # A dictionary for each language, as fairseq's README has it.
    assert "drei" in dictionaries["de"].symbols and "drei" not in dictionaries["en"].symbols
    assert (prepared.path / "code").read_text().startswith("#version: 0.2\n")


def test_another_way_to_the_same_files(
    prepared: PreparedCorpus, archive: Path, tmp_path: Path
) -> None:
    """A folder, the archive in a folder, WIT3's archive of the year: the same bytes."""
    (tmp_path / "orig" / "de-en").mkdir(parents=True)
    for name, text in official_files().items():
        (tmp_path / "orig" / "de-en" / name).write_text(text, encoding="utf-8")
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "de-en.tgz").write_bytes(archive.read_bytes())
    inner = {"de-en.tgz": archive.read_bytes()}
    year = pack(inner, tmp_path / "2014-01.tgz", "2014-01/texts/de/en")
    whole = read_iwslt14(archive, Path("none"), quiet)
    for source in (
        tmp_path / "orig", tmp_path / "orig" / "de-en", tmp_path / "downloads", year
    ):  # fmt: skip
        assert read_iwslt14(source, Path("none"), quiet) == whole
    again = prepare(tmp_path / "again", tmp_path / "orig", quiet)
    assert (again.path / "prepared.json").read_text() == (
        prepared.path / "prepared.json"
    ).read_text()


def test_what_is_there_is_kept_and_other_data_is_refused(
    prepared: PreparedCorpus, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(iwslt14, "tokenised", None)  # nothing is done twice
    for source in (archive, None):
        events: list[dict[str, Any]] = []
        assert prepare(prepared.path, source, events.append) == prepared
        assert [event["stage"] for event in events] == ["already there"]
    other = pack(official_files(pairs=60), tmp_path / "other.tgz")
    with pytest.raises(UserError, match=r"original_sha256 is .* there"):
        prepare(prepared.path, other, quiet)


def test_it_tells_how_far_it_is_and_what_is_not_official(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fairseq")
    events: list[dict[str, Any]] = []

    class Stop(Exception):
        pass

    def receive(event: dict[str, Any]) -> None:
        events.append(event)
        if event["stage"] == "fairseq-preprocess":
            raise Stop

    with pytest.raises(Stop):
        prepare(tmp_path / "out", archive, receive)
    stages = [event["stage"] for event in events if event["event"] == "prepare"]
    assert stages[0] == "132 training pairs, where the official archive has 174,443"
    ends = {e["stage"]: (e["done"], e["of"]) for e in events if e["event"] == "progress"}
    assert ends["tokenise de"] == ends["tokenise en"] == (152, 152)
    assert ends["apply BPE"] == (304, 304)
    assert list(tmp_path.iterdir()) == []


# -- what goes wrong


def damaged(kind: str, tmp_path: Path, archive: Path) -> Path:
    files: dict[str, Any] = official_files()
    path = tmp_path / "de-en.tgz"
    content = archive.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "tail":  # all members are there, the checksum of gzip is not
        path.write_bytes(content[:-6])
    elif kind == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif kind == "page":
        path.write_bytes(b"<html>log in first</html>")
    elif kind == "nothing":
        path.write_bytes(b"")
    elif kind == "member":
        del files["IWSLT14.TED.tst2011.de-en.en.xml"]
    elif kind == "other":
        files = {"train.de": "x\n"}
    elif kind == "lines":
        files["train.tags.de-en.en"] += "One more.\n"
    elif kind == "segments":
        files["IWSLT14.TED.tst2010.de-en.de.xml"] += '<seg id="9">Noch eins.</seg>\n'
    elif kind == "open":
        files["IWSLT14.TED.tst2010.de-en.de.xml"] += '<seg id="5">Noch'
    elif kind == "empty":
        files["IWSLT14.TED.tst2010.de-en.de.xml"] = ""
    elif kind == "latin":
        files["train.tags.de-en.de"] = "fünf\n".encode("latin-1")
    return path if path.exists() else pack(files, path)


DAMAGE = [
    ("cut", "is damaged or no tar archive"),
    ("tail", "is damaged or no tar archive"),
    ("flipped", "is damaged or no tar archive"),
    ("page", "is damaged or no tar archive"),
    ("nothing", "is damaged or no tar archive"),
    ("member", r"holds no IWSLT14\.TED\.tst2011\.de-en\.en\.xml; give the official archive"),
    ("other", r"holds no train\.tags\.de-en\.de \(nor 11 more\)"),
    ("lines", r"train\.tags\.de-en\.de has 132 sentences, train\.tags\.de-en\.en has 133"),
    ("segments", r"tst2010\.de-en\.de\.xml has 5 sentences, .*en\.xml has 4"),
    ("open", r"tst2010\.de-en\.de\.xml is damaged: sentence 5 does not end"),
    ("empty", r"tst2010\.de-en\.de\.xml holds no sentences"),
    ("latin", r"train\.tags\.de-en\.de is no UTF-8 text"),
]


@pytest.mark.parametrize(("kind", "message"), DAMAGE)
def test_a_bad_archive_is_one_line(
    kind: str, message: str, archive: Path, tmp_path: Path
) -> None:
    path = damaged(kind, tmp_path, archive)
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path / "out", path, quiet)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    (tmp_path / "orig").mkdir()
    with pytest.raises(UserError, match=r"orig holds no train\.tags\.de-en\.de \(nor 11 more\)"):
        prepare(tmp_path / "out", tmp_path / "orig", quiet)


def test_by_download(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way without --from, over a file:// address; a damaged download is fetched anew."""
    monkeypatch.setattr(iwslt14, "ADDRESS", archive.as_uri())
    downloads = tmp_path / "downloads"
    events: list[dict[str, Any]] = []
    assert read_iwslt14(None, downloads, events.append) == read_iwslt14(archive, downloads, quiet)
    size = archive.stat().st_size
    assert events[-1] == {"event": "download", "file": "de-en.tgz", "done": size, "of": size}
    (downloads / "de-en.tgz").write_bytes(b"<html>log in first</html>")
    with pytest.raises(UserError, match="is damaged"):
        read_iwslt14(None, downloads, quiet)
    assert list(downloads.iterdir()) == []
    assert len(read_iwslt14(None, downloads, quiet)["test"][0]) == 20


def test_offline_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iwslt14, "ADDRESS", "http://127.0.0.1:1/de-en.tgz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot download .*--from"):
        prepare(tmp_path / "out", None, quiet)
    assert list(tmp_path.iterdir()) == []


# A disk that is full after 100 bytes.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
# A process that dies as soon as it has started fairseq-preprocess.
KILLED = """\
import os, signal, subprocess
from l2t_fairseq.corpora import prepare
def start(command, pass_fds, **options):
    subprocess.Popen(command, stdout=subprocess.DEVNULL, pass_fds=pass_fds)
    os.kill(os.getpid(), signal.SIGKILL)
prepare.subprocess.run = start
"""
COMMAND = """
import sys
from l2t_cli.main import main
main(["data", "prepare", "iwslt14", "--from", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_full_disk_is_one_line(archive: Path, tmp_path: Path) -> None:
    pytest.importorskip("fairseq")
    # Else Python would keep the first 100 bytes of every module that it compiles, for good.
    run = start_python(
        "-c", FULL + COMMAND, archive, tmp_path / "out", PYTHONDONTWRITEBYTECODE="1"
    )
    _, err = end_of(run)
    assert run.returncode == 2 and err.startswith("l2t: error: ") and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
    cut = [p for p in (*ROOT.glob("l2t_cli/**/*.pyc"), *ROOT.glob("plugins/**/*.pyc"))
           if p.stat().st_size <= 100]  # fmt: skip
    assert cut == []


def test_a_killed_run_is_made_good_by_the_same_command(
    prepared: PreparedCorpus, archive: Path, tmp_path: Path
) -> None:
    run = start_python("-c", KILLED + COMMAND, archive, tmp_path / "out")
    run.wait(LIMIT)
    assert run.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".out.making-*/encoded"))
    # fairseq-preprocess lives on for a while, and keeps what it writes; this is nobody's.
    (tmp_path / ".out.making-old").mkdir()
    (tmp_path / ".out.making-old" / "code").write_text("half")
    assert not (tmp_path / "out").exists()
    again = prepare(tmp_path / "out", archive, quiet)
    assert not (tmp_path / ".out.making-old").exists()
    for name, (size, digest) in json.loads(
        (prepared.path / "prepared.json").read_text()
    )["files"].items():
        content = (again.path / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)
    end_of(run)  # of what fairseq-preprocess writes to the same stderr: it has ended, too
