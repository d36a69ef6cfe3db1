"""A run's folder: what a refusal shows of two long settings."""

import pytest

from l2t_core.errors import UserError
from l2t_core.run_folder import open_run


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
