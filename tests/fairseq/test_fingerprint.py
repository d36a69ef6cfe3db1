"""What identifies a data folder, so that no run goes on with another's."""

from __future__ import annotations

from pathlib import Path

from l2t_fairseq.fingerprint import data_digest


def test_a_digest_sees_every_file_of_fairseqs_and_no_other(tmp_path: Path) -> None:
    data_bin = tmp_path / "corpus" / "data-bin"
    data_bin.mkdir(parents=True)
    names = ("dict.de.txt", "dict.en.txt", "train.de-en.de.bin", "train.de-en.de.idx")
    for name in names:
        (data_bin / name).write_bytes(name.encode())
    before = data_digest(data_bin)
    (data_bin / "preprocess.log").write_text("said")
    assert data_digest(data_bin) == before
    for name in names:
        (data_bin / name).write_bytes(name.encode()[:-1] + b"!")
        changed = data_digest(data_bin)
        assert changed != before
        before = changed


def test_what_was_prepared_is_known_by_its_record(tmp_path: Path) -> None:
    data_bin = tmp_path / "data-bin"
    data_bin.mkdir()
    (tmp_path / "prepared.json").write_text('{"files": {"raw/test.en": [3, "ab"]}}')
    before = data_digest(data_bin)
    (tmp_path / "prepared.json").write_text('{"files": {"raw/test.en": [3, "cd"]}}')
    assert data_digest(data_bin) != before
