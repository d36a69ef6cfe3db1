"""The commands that list, show and explain."""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from checkout import ROOT, end_of, run_python, start_python  # type: ignore[import-not-found]
from in_process import Run  # type: ignore[import-not-found]

from l2t_cli.doctor import DISTRIBUTIONS
from l2t_cli.main import app
from l2t_cli.recipe_reading.fields import FIELDS, import_quietly
from l2t_cli.screen.console import _console
from l2t_core.errors import UserError

# Told by --help alone.
UNEXPLAINED = {"--help", "--version", "--install-completion", "--show-completion"}
RECIPES = ROOT / "recipes"
SHIPPED = [str(p.relative_to(RECIPES).with_suffix("")) for p in sorted(RECIPES.rglob("*.yaml"))]


def commands(group: Any, *words: str) -> Iterator[list[str]]:
    """Yield the words of ``group`` and of every command in it."""
    yield list(words)
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *words, name)


COMMANDS = list(commands(typer.main.get_command(app)))


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 17 and ["recipes", "cp"] in COMMANDS and ["export"] in COMMANDS


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(l2t: Run, command: list[str]) -> None:
    outcome = l2t(*command, "--help")
    assert outcome.code == 0 and "Usage: l2t" in outcome.out and not outcome.err


@pytest.mark.parametrize("command", [["train-teacher"], ["apply-teacher"], ["data", "prepare"]])
def test_help_tells_the_defaults(l2t: Run, command: list[str]) -> None:
    text = l2t(*command, "--help").out
    assert text.count("[default:") >= 2 and "(rich" in text


def test_help_keeps_paragraphs_and_options_whole_at_80_characters(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "--tensorboard-logdir" in l2t("train-teacher", "--help").out
    lines = [line.strip() for line in l2t("demo", "--help").out.splitlines()]
    assert "demo that was stopped goes on where it was." in lines


def test_ctrl_c_before_a_run_is_told(l2t: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("l2t_cli.doctor.cores", interrupted)
    outcome = l2t("doctor")
    assert (outcome.code, outcome.err) == (130, "l2t: interrupted\n")


@pytest.mark.parametrize("how", ["module", "script"])
def test_ctrl_c_while_the_command_is_imported_is_one_line(tmp_path: Path, how: str) -> None:
    # It comes in the middle of an import that takes every exception for its own failure.
    (tmp_path / "typer.py").write_text(
        "import os, signal\n"
        "try: os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException: pass\n"
    )
    start = ["-m", "l2t_cli"]
    if how == "script":
        scripts = re.search(r'^l2t = "(.+):(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
        assert scripts
        start = ["-c", f"from {scripts[1]} import {scripts[2]}; {scripts[2]}()"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "plugins"), str(ROOT)])
    child = start_python(*start, "recipes", "ls", cwd=tmp_path, PYTHONPATH=paths)
    out, err = end_of(child)
    assert (child.returncode, out, err) == (130, "", "l2t: interrupted\n")


def test_ctrl_c_before_the_command_is_put_together(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(app: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.main.get_command", interrupted)
    outcome = l2t("recipes", "ls")
    assert (outcome.code, outcome.err) == (130, "l2t: interrupted\n")


def test_a_signal_that_ends_the_tests_is_not_taken_for_the_commands(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []

    def terminated() -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("os.kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr("l2t_cli.doctor.cores", terminated)
    l2t("doctor")
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_while_python_ends_shows_no_trace(tmp_path: Path) -> None:
    """torchrun sends one to the others of a process that has ended; they may be ending, too."""
    code = (
        "import atexit, os, signal\nfrom l2t_cli.main import main\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\nmain(['recipes', 'ls'])"
    )
    child = start_python("-c", code, cwd=tmp_path)
    assert end_of(child)[1] == ""


def test_help_and_errors_do_not_pay_for_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom l2t_cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'fairseq' in sys.modules)"
    )
    for arguments in (["--help"], ["train-teacher", "--hlp"], ["recipes", "ls"]):
        run = run_python("-c", code, *arguments, cwd=tmp_path)
        assert run.stdout.splitlines()[-1] == "False False"


def test_a_quiet_import_leaves_logging_as_it_was() -> None:
    logging.disable(logging.WARNING)
    try:
        import_quietly("json")
        assert logging.root.manager.disable == logging.WARNING
    finally:
        logging.disable(logging.NOTSET)


def test_module_and_command_are_the_same(tmp_path: Path) -> None:
    run = run_python("-m", "l2t_cli", "--version", cwd=tmp_path)
    from l2t_core import __version__

    assert run.stdout == f"l2t {__version__}\n"


def test_user_dir_is_the_plugin(l2t: Run) -> None:
    folder = Path(l2t("user-dir").out.strip())
    assert folder.name == "l2t_fairseq" and (folder / "criterion.py").exists()


def test_recipes_are_listed_and_valid(l2t: Run) -> None:
    assert len(SHIPPED) >= 25
    listed = l2t("recipes", "ls").out
    assert all(name in listed for name in SHIPPED)
    assert listed.index("image/mnist-mlp ") < listed.index("image/mnist-mlp-noise40 ")
    outcome = l2t("recipes", "validate", *SHIPPED)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [f"{name}: ok" for name in SHIPPED]


@pytest.mark.parametrize("columns", ["", "wide", "0", "60"])
def test_any_width_will_do(l2t: Run, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    _console.cache_clear()
    outcome = l2t("recipes", "ls")
    _console.cache_clear()
    assert outcome.code == 0 and not outcome.err
    widest = max(map(len, outcome.out.splitlines()))
    assert widest == 60 if columns == "60" else 100 < widest <= 120


def test_recipe_copied_and_used_by_path(l2t: Run, tmp_path: Path) -> None:
    assert l2t("recipes", "cp", "digits", "mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").read_text().rstrip() == l2t(
        "recipes", "show", "digits"
    ).out.rstrip()
    assert l2t("train-teacher", "mine.yaml", "--dry-run").code == 0
    (tmp_path / "mine.yaml").write_text("changed")
    assert "--force" in l2t("recipes", "cp", "digits", "mine.yaml").error()
    assert l2t("recipes", "cp", "digits", "mine.yaml", "--no-clobber").code == 0
    assert (tmp_path / "mine.yaml").read_text() == "changed"
    assert l2t("recipes", "cp", "digits", "mine.yaml", "--force").code == 0
    assert (tmp_path / "mine.yaml").read_text() != "changed"


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(l2t: Run, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    outcome = l2t("train-teacher", "digits", "image.optimiser.lr=3e-2", "--seed", "7", "--dry-run")
    config, plan = outcome.out.split("\nplan: ")
    assert re.match(r"\d+ updates? of the teacher, \d+ students of \d+ steps each, into", plan)
    resolved = yaml.safe_load(config)
    assert resolved["image"]["optimiser"]["lr"] == 0.03
    assert resolved["training"]["seed"] == 7
    assert "runs/digits" in plan
    assert set(tmp_path.iterdir()) == before


def test_doctor_reports_versions(l2t: Run) -> None:
    outcome = l2t("doctor")
    assert outcome.code == 0 and version("torch") in outcome.out and "fairseq" in outcome.out


def test_doctor_knows_every_package_that_is_needed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)
    assert listed
    assert sorted(re.findall(r'^ +"([\w-]+)', listed[1], re.M)) == sorted(DISTRIBUTIONS)


def test_doctor_says_what_a_missing_package_is_for(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> str:
        if name in ("optuna", "Pillow"):
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", found)
    lines = {line.split("│")[1].strip(): line for line in l2t("doctor").out.splitlines()
             if line.startswith("│")}
    assert 'pip install "l2t[tune]"' in lines["optuna"] and "missing" in lines["optuna"]
    assert "pip install Pillow" in lines["Pillow"]


def test_every_option_is_in_the_documentation(l2t: Run) -> None:
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
    for command in COMMANDS:
        said = l2t(*command, "--help").out
        for option in set(re.findall(r"--[a-z][a-z-]+", said)) - UNEXPLAINED:
            assert re.search(rf"{option}(?![\w-])", pages), (command, option)


def test_doctor_calls_broken_what_the_plugin_refuses(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fairseq")

    def refuse() -> None:
        raise UserError("compile it anew")

    monkeypatch.setattr("l2t_fairseq.compat.refuse_unusable_versions", refuse)
    outcome = l2t("doctor")
    assert outcome.code == 0 and "broken" in outcome.out and "compile it anew" in outcome.out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_dependency", "No module named 'no_such_dependency'"),
        ("import half_there.gone", "No module named 'half_there.gone'"),
        ("raise ValueError('mutable default')", "mutable default"),
    ],
)
def test_a_package_that_does_not_import_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    """As a fairseq whose own requirements are not there."""
    (tmp_path / "half_there.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    field = replace(FIELDS.get("nmt"), needs="half_there")
    with pytest.raises(UserError, match="does not import here") as refused:
        field.require()
    assert reason in str(refused.value) and "pip install" in str(refused.value)


def test_a_recipe_without_its_package_says_what_to_install(tmp_path: Path) -> None:
    code = """
import importlib.abc, sys

class NoFairseq(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fairseq", "sacrebleu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoFairseq())
from l2t_cli.main import main
main(sys.argv[1:])
"""
    for arguments in (
        ["train-teacher", "demo-de-en"],
        ["train-teacher", "demo-de-en", "nmt.candidates=ancestral"],
        ["recipes", "validate", "demo-de-en"],
        ["apply-teacher", "t.safetensors", "--", "fairseq-train", "data"],
    ):
        run = run_python("-c", code, *arguments, cwd=tmp_path)
        assert run.returncode == 2
        assert run.stderr.splitlines() == [
            'l2t: error: nmt recipes need fairseq, which is not installed; pip install "l2t[nmt]"'
        ]


class Breaking:
    """An answer of which ten bytes arrive before Ctrl-C."""

    def __init__(self) -> None:
        self.status, self.headers = 200, {"Content-Length": "100"}
        self.chunks = iter([b"0123456789"])

    def __enter__(self) -> Breaking:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        for chunk in self.chunks:
            return chunk
        raise KeyboardInterrupt


def test_an_interrupted_download_says_what_is_kept(
    l2t: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Breaking())
    outcome = l2t("data", "prepare", "mnist", "--log-format", "none")
    assert outcome.code == 130
    kept = "what was downloaded is kept, an unfinished file as .part; the same command continues"
    assert outcome.err == f"l2t: interrupted: {kept}\n"
    part = Path("data/mnist/train-images-idx3-ubyte.gz.part")
    assert part.read_bytes() == b"0123456789"
