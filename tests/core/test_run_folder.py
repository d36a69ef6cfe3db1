"""A run's folder: what a refusal shows of two long settings."""

import errno
import fcntl
import json
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l2t_core.errors import UserError
from l2t_core.runs import folder as run_folder
from l2t_core.runs.files import atomic_write, claim, with_usual_permissions
from l2t_core.runs.folder import load_tensors_and_record, open_run, save_tensors_and_record
from l2t_core.runs.tensor_digest import tensor_digest


def test_of_two_long_commands_the_place_where_they_differ_is_shown(tmp_path):
    command = "fairseq-train data " + "--flag value " * 30
    open_run(tmp_path / "run", {"command": f"{command}--lr 0.1 {command}"})
    with pytest.raises(UserError) as refused:
        open_run(tmp_path / "run", {"command": f"{command}--lr 0.2 {command}"})
    line = str(refused.value)
    assert "--lr 0.1 " in line and "--lr 0.2 " in line and len(line) < len(command)


def test_short_settings_are_shown_whole(tmp_path):
    open_run(tmp_path / "run", {"lr": 0.1})
    with pytest.raises(UserError, match=r"lr is 0\.1 there, 0\.5 here"):
        open_run(tmp_path / "run", {"lr": 0.5})


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("data_sha256", "the data are others"), ("code_sha256", "your own code is another"),
        ("start_sha256", "the checkpoint that students start from is another"),
        ("reference_sha256", "the reference text is another"),
    ],
)
def test_other_data_are_told_in_words_and_after_settings(tmp_path, key, said):
    """The hash of data comes first in the alphabet, but what was asked for tells more."""
    open_run(tmp_path / "run", {"content": {key: "a" * 64}, "image": {"data": "digits"}})
    with pytest.raises(UserError) as refused:
        open_run(tmp_path / "run", {"content": {key: "b" * 64}, "image": {"data": "digits"}})
    assert f"holds another run ({said} now than when it began); choose" in str(refused.value)
    with pytest.raises(UserError, match=r"image\.data is 'digits' there, 'images' here"):
        open_run(tmp_path / "run", {"content": {key: "b" * 64}, "image": {"data": "images"}})


def test_what_is_wrong_with_a_state_is_said_in_plain_words(tmp_path):
    path, tensors = tmp_path / "state.safetensors", {"theta": torch.ones(3)}
    save_tensors_and_record(path, tensors, {"step": 1})
    whole = path.read_bytes()
    assert load_tensors_and_record(path)[1] == {"step": 1}

    def refused() -> str:
        with pytest.raises(UserError) as error:
            load_tensors_and_record(path)
        line = str(error.value)
        assert line.endswith("; delete it to start this run afresh")
        return line.removeprefix(f"{path} ").partition(";")[0]

    no_json = whole.replace(b'{\\"step', b'<\\"step')
    for content in (b"", whole[:4], whole[:-2], b"x" * 500, no_json):
        path.write_bytes(content)
        assert refused() == "is damaged"
    key = whole.index(b'"sha256"')  # without which it is one of an earlier version
    for place in set(range(8, len(whole))) - set(range(key, key + 8)):  # where a bit is flipped
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert refused() in ("is damaged", "holds no state that a run has kept")
    save_file(tensors, path, {"record": json.dumps({"step": 2})})  # by an earlier version
    assert load_tensors_and_record(path)[1] == {"step": 2}
    for metadata in (None, {"l2t": "{}"}):  # as a teacher file has it
        save_file(tensors, path, metadata)
        assert refused() == "holds no state that a run has kept"
    path.unlink()
    path.mkdir()
    assert refused() == "is a folder, where a run keeps its state"


def test_a_name_that_is_not_utf8_is_written_in_escapes(tmp_path):
    atomic_write(tmp_path / "report.md", f"dü {os.fsdecode(bytes([0xE4]))}")
    assert (tmp_path / "report.md").read_text("utf-8") == "dü \\udce4"


def test_files_have_the_permissions_of_any_other(tmp_path):
    """Their temporary ones are for their owner alone: nobody else could read a teacher."""
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "ours", "")
    plain, ours = ((tmp_path / name).stat().st_mode for name in ("plain", "ours"))
    assert ours == plain
    before = os.umask(0o027)  # a group's server
    try:
        (tmp_path / "folder").mkdir()
        made = with_usual_permissions(Path(tempfile.mkdtemp(dir=tmp_path)))
    finally:
        os.umask(before)
    assert made.stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_a_digest_is_of_names_kinds_shapes_bytes_and_text():
    tensor = torch.arange(6.0)
    whole = {"a": tensor, "b": tensor + 1}
    others = [
        {"a": tensor, "c": tensor + 1}, {"a": tensor.view(2, 3), "b": tensor + 1},
        {"a": tensor.view(torch.int32), "b": tensor + 1}, {"a": tensor, "b": tensor + 2},
    ]
    digests = [tensor_digest(tensors, "text") for tensors in (whole, *others)]
    assert len({*digests, tensor_digest(whole, "another")}) == 6
    assert tensor_digest(dict(reversed(whole.items())), "text") == digests[0]


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    """The second comes while the first, which has found the folder empty, writes its name there."""
    write = run_folder._write_config
    refusals = []

    def interrupted(folder, config):
        monkeypatch.undo()
        with pytest.raises(UserError) as refused:
            open_run(tmp_path / "run", {"run": "second"})
        refusals.append(str(refused.value))
        write(folder, config)

    monkeypatch.setattr(run_folder, "_write_config", interrupted)
    first = open_run(tmp_path / "run", {"run": "first"})
    assert "another command is at work" in refusals[0]
    assert json.loads(first.config.read_text()) == {"run": "first"}


def test_a_refusal_gives_the_claim_back(tmp_path):
    open_run(tmp_path / "run", {"lr": 0.1})
    with pytest.raises(UserError, match="holds another run") as kept:  # with all its frames
        open_run(tmp_path / "run", {"lr": 0.5})
    assert open_run(tmp_path / "run", {"lr": 0.1}).config.exists() and kept


@pytest.mark.parametrize("when", ["open", "flock"])
def test_a_folder_that_is_taken_back_while_it_is_claimed(tmp_path, monkeypatch, when):
    """The one who had it removes it before it is opened, or before what was opened is locked."""
    folder = tmp_path / "runs/run"
    owner = os if when == "open" else fcntl
    action = getattr(owner, when)

    def late(*arguments):
        monkeypatch.undo()
        folder.rmdir()
        folder.parent.rmdir()
        return action(*arguments)

    monkeypatch.setattr(owner, when, late)
    handle = claim(folder)
    with pytest.raises(UserError, match="another command is at work"):
        claim(folder)  # it is locked under its name
    os.close(handle)
    os.close(claim(folder))


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    os.close(claim(tmp_path / "run"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place without folders")
def test_a_folder_that_can_never_be_made_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to /proc/none/run: No such file"):
        claim(Path("/proc/none/run"))


def test_a_limit_on_files_is_told_as_that(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(UserError, match=r"allow larger files \(`ulimit -f`\) or "):
            atomic_write(tmp_path / "large", b"more than ten bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_no_mapping_is_unreadable(tmp_path):
    (tmp_path / "config.yaml").write_text("[1]")
    with pytest.raises(UserError, match=r"config.yaml is unreadable \(its content is no mapping\)"):
        open_run(tmp_path, {"lr": 0.1})
