"""Commands that the README and docs print are accepted: names, keys and values, without running."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from checkout import ROOT  # type: ignore[import-not-found]

from l2t_cli.comparing import plan as compare_plan
from l2t_cli.recipe_reading.files import shipped_recipes
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_cli.recipe_reading.values import problems

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {name.rsplit("/", 1)[-1] for name in shipped_recipes()}
COMMAND = re.compile(r"l2t (train-teacher|compare) (.*)")


def code(text: str) -> Iterator[str]:
    """Yield the lines of code blocks and the pieces of inline code, each as one line."""
    for number, part in enumerate(text.split("```")):
        if number % 2:
            joined = re.sub(r"\\\n\s*", " ", part)
            quoted = re.compile(r'"[^"\n]*\n[^"]*"')  # may hold line ends
            yield from quoted.sub(lambda found: " ".join(found[0].split()), joined).split("\n")
        else:
            yield from (" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", part))


def commands() -> Iterator[tuple[str, str, list[str]]]:
    """Yield (page, l2t's command, words after it) of commands on shipped recipes."""
    for page in PAGES:
        for line in code(page.read_text(encoding="utf-8")):
            if found := COMMAND.search(line.split("  #")[0]):
                words = shlex.split(found[2], comments=True)
                own_code = any(re.search(r"[=,[]\w+:\w+", word) for word in words)
                if words and words[0] in NAMES and not own_code and not {"…", "..."} & set(words):
                    yield page.name, found[1], words


@pytest.mark.parametrize(("page", "command", "words"), list(commands()))
def test_a_documented_command_is_accepted(page: str, command: str, words: list[str]) -> None:
    changes = [word for word in words[1:] if "=" in word and not word.startswith("-")]
    recipe = load_recipe(words[0], changes)
    assert not problems(recipe)
    if command == "compare":
        assert not compare_plan.problems(recipe)


def test_there_are_such_commands() -> None:
    assert len(list(commands())) > 50
