"""A run's config.yaml in the place of a recipe: the same students, under the recipe's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from in_process import Run  # type: ignore[import-not-found]

from l2t_cli.recipe_reading.files import shipped_recipes
from l2t_cli.recipe_reading.loading import load_recipe


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


def test_a_run_is_compared_as_its_own_recipe_was(l2t: Run, digits: Path) -> None:
    """And stays the same run when the section changes: a teacher does not depend on it."""
    written = digits.read_text()
    train = ["train-teacher", digits, "--out", "run", "training.episodes=1", "image.steps=8"]
    digits.write_text(written + "compare: {losses: [cross_entropy, gce], gce: {q: [0.25, 0.3]}}\n")
    assert l2t(*train).code == 0
    config = Path("run/config.yaml")
    assert load_recipe(str(config)).compare == load_recipe(str(digits)).compare
    teacher = "run/teacher_best.safetensors"
    planned = l2t("compare", config, "--teacher", teacher, "--dry-run").out
    assert "q=0.25" in planned and "q=0.3" in planned and "eps" not in planned
    digits.write_text(written + "compare: {gce: {q: [0.5]}}\n")
    assert "finished already" in l2t(*train).out
    assert load_recipe(str(config)).compare == load_recipe(str(digits)).compare


def forget(config: Path, *keys: str) -> None:
    """Take a key out of a stored configuration, as if the run were older than the setting."""
    content = json.loads(config.read_text())
    section = content
    for key in keys[:-1]:
        section = section[key]
    del section[keys[-1]]
    config.write_text(json.dumps(content))


def test_a_run_that_is_older_than_a_setting_had_its_default(
    l2t: Run, digits: Path, run_folder: Path
) -> None:
    """So it goes on, as do applications and comparisons, and is another run with another value."""
    again = ["train-teacher", digits, "image.hidden=12", "--out", "run", "training.episodes=1"]
    apply = ["apply-teacher", run_folder / "teacher_best.safetensors", digits, "--out", "taught"]
    compare = ["compare", digits, "compare.lr=[0.1,0.2]", "compare.seeds=2", "compare.trials=2"]
    compare += ["compare.losses=[cross_entropy]", "--jobs", "1", "--out", "compared"]
    assert l2t(*apply).code == 0 and l2t(*compare).code == 0
    for keys in (("image", "precision"), ("image", "optimiser", "beta2"), ("training", "trace")):
        forget(run_folder / "config.yaml", *keys)
    forget(Path("taught/config.yaml"), "student", "image", "precision")
    forget(Path("compared/config.json"), "image", "precision")
    assert "finished already" in l2t(*again).out
    assert "(finished before)" in l2t(*apply).out
    assert "4 of 4 trials were finished before" in l2t(*compare).out
    for command in (again, apply, compare):
        line = l2t(*command, "image.precision=bfloat16").error()
        assert "image.precision is 'float32' there, 'bfloat16' here); choose another --out" in line
    line = l2t(*again, "training.trace=false").error()
    assert "holds another run (training.trace is True there, False here)" in line


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
