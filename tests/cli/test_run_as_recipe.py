"""A run's config.yaml in the place of a recipe: the same students, under the recipe's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Run  # type: ignore[import-not-found]

from l2t_cli.recipe_files import shipped_recipes
from l2t_cli.recipe_loading import load_recipe


@pytest.fixture
def run_folder(l2t: Run, digits: Path) -> Path:
    """Return the folder of a finished tiny run with changes of its own."""
    done = l2t("train-teacher", digits, "image.hidden=12", "--out", "run", "training.episodes=1")
    assert done.code == 0, done.err
    return Path("run")


def test_a_run_is_its_recipe_with_the_changes(l2t: Run, digits: Path, run_folder: Path) -> None:
    """Its students are those of recipe and changes, and its name that of the recipe."""
    config, teacher = run_folder / "config.yaml", run_folder / "teacher_best.safetensors"
    assert l2t("recipes", "validate", config).out == "tiny: ok\n"
    same = load_recipe(str(digits), ["image.hidden=12", "training.episodes=1"])
    assert load_recipe(str(config)).config() == same.config()
    assert l2t("apply-teacher", teacher, config).code == 0
    again = l2t("apply-teacher", teacher, digits, "image.hidden=12")
    assert "(finished before)" in again.out and "runs/tiny-taught" in again.out
    assert "finished already" in l2t("train-teacher", config, "--out", run_folder).out
    quick = ["compare.trials=2", "compare.seeds=2", "compare.lr=[0.05,0.1]"]
    planned = l2t("compare", config, "--teacher", teacher, *quick, "--dry-run")
    assert "taught" in planned.out and "into runs/tiny-compare" in planned.out


def test_a_run_of_a_shipped_recipe_is_compared_as_that(tmp_path: Path) -> None:
    shipped = load_recipe("digits")
    config = tmp_path / "config.yaml"
    made = {"recipe": shipped.name, **shipped.config(), "content": {"data_sha256": "0"}}
    config.write_text(json.dumps(made))
    found = load_recipe(str(config))
    assert found.name in shipped_recipes() and found.short_name == "digits"
    assert found.compare == shipped.compare and found.config() == shipped.config()
    copy = tmp_path / "mine.yaml"
    copy.write_text(json.dumps({**made, "compare": {"seeds": 4}}))
    assert load_recipe(str(copy)).name == "mine"
    assert load_recipe(str(copy)).compare.seeds == 4
    assert load_recipe(str(copy)).compare.losses != shipped.compare.losses


def test_a_recipe_may_still_not_hold_what_is_no_setting(l2t: Run, digits: Path) -> None:
    """The two keys together are a run's; alone they are typing mistakes."""
    digits.write_text(digits.read_text() + "recipe: image/digits\n")
    assert "unknown key 'recipe'" in l2t("recipes", "validate", digits).error()
