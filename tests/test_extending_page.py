"""The page on parts of one's own: its code runs, and what it names is where it says."""

import ast
import importlib
import re
import subprocess
import sys

from checkout import ROOT  # type: ignore[import-not-found]

from l2t_core.registry import Registry

PAGE = ROOT / "docs/extending.md"


def test_the_student_of_ones_own_is_taught(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (tmp_path / "segments.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "segments.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pairs = re.findall(r"^taught (0\.\d+), on cross-entropy (0\.\d+)$", done.stdout, re.MULTILINE)
    assert len(pairs) == 3 and all(float(score) > 0.3 for pair in pairs for score in pair)
    assert (tmp_path / "runs/segments/teacher_best.safetensors").is_file()


def test_the_registries_are_where_the_page_says():
    table = PAGE.read_text("utf-8").split("| part | registry | an entry |\n", 1)[1]
    named = set(re.findall(r"`([A-Z_]+)`", table))
    found = {}
    for file in (ROOT / "plugins").glob("l2t_*/**/*.py"):
        for name in re.findall(r"^([A-Z_]+): Registry", file.read_text("utf-8"), re.MULTILINE):
            found.setdefault(name, []).append(file.relative_to(ROOT / "plugins").as_posix())
    for name in named - {"FIELDS"}:
        assert name in found, name
    told = re.findall(r"`([A-Z_]+)`, `(l2t_\w+/[\w/]+\.py)`", table)
    assert {name for name, _ in told} >= named
    for name, place in told:
        assert name == "FIELDS" or place in found[name]
        module = importlib.import_module(place.removesuffix(".py").replace("/", "."))
        assert isinstance(getattr(module, name), Registry)


def test_the_page_names_every_folder_and_no_other():
    table = PAGE.read_text("utf-8").split("| folder | holds |\n", 1)[1].split("\n\n", 1)[0]
    told = set()
    for row in table.splitlines()[1:]:
        first, *others = re.findall(r"`([\w/]+)/`", row.split("|")[1])
        told |= {first, *(f"{first.split('/')[0]}/{other}" for other in others)}
    there = {
        file.parent.relative_to(folder).as_posix()
        for folder in (ROOT, ROOT / "plugins")
        for file in folder.glob("l2t_*/*/__init__.py")
    }
    assert told == there


def test_what_an_update_goes_through_is_where_the_page_says():
    text = PAGE.read_text("utf-8")
    rows = re.findall(r"^\| .* \| (`.*`), `(l2t_\w+/[\w/]+\.py)` \|$", text, re.MULTILINE)
    assert len(rows) >= 13
    for names, place in rows:
        file = ROOT / place if place.startswith("l2t_cli/") else ROOT / "plugins" / place
        there = {getattr(node, "name", "") for node in ast.parse(file.read_text("utf-8")).body}
        assert there.issuperset(re.findall(r"`(\w+)`", names)), place
    for place in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / place).is_file()
