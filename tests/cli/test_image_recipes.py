"""Image recipes: validated as a run would check them, of published size, and run end to end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from in_process import Run  # type: ignore[import-not-found]
from PIL import Image

from l2t_cli.recipe_reading.files import read_yaml, shipped_recipes
from l2t_cli.recipe_reading.loading import load_recipe
from l2t_core.losses.steps import LastLayer

GREY, COLOUR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    "name, shape, classes, parameters",
    [
        ("mnist-mlp", GREY, 10, 397_510),
        ("mnist-lenet", GREY, 10, 431_080),
        ("mnist-mlp-noise40", GREY, 10, 397_510),
        ("mnist-mlp-noise40-dln", GREY, 10, 397_510),
        ("mnist-long-tail", GREY, 10, 397_510),
        ("fashion-lenet", GREY, 10, 431_080),
        ("cifar10-resnet8", COLOUR, 10, 75_290),
        ("cifar10-resnet20", COLOUR, 10, 269_722),
        ("cifar10-resnet32", COLOUR, 10, 464_154),
        ("cifar10-wide-resnet", COLOUR, 10, 55_841_754),
        ("cifar10-densenet", COLOUR, 10, 25_624_430),
        ("cifar100-resnet8", COLOUR, 100, 81_140),
        ("cifar100-resnet20", COLOUR, 100, 275_572),
        ("cifar100-resnet32", COLOUR, 100, 470_004),
    ],
)
def test_each_recipe_validates_and_has_the_model_that_it_promises(
    l2t: Run, name: str, shape: tuple[int, int, int], classes: int, parameters: int
) -> None:
    from l2t_vision.models.architectures import build_model

    outcome = l2t("recipes", "validate", name)
    assert outcome.code == 0 and outcome.out == f"image/{name}: ok\n" and not outcome.err
    recipe = load_recipe(name)
    model = build_model(shape, classes, recipe.student)
    assert sum(p.numel() for p in model.parameters()) == parameters
    if f"{parameters:,}" not in recipe.source.read_text():
        assert "noise" in name or "long-tail" in name
    assert recipe.student.data == name.split("-")[0].replace("fashion", "fashion-mnist")
    assert recipe.student.folder == f"data/{recipe.student.data}"
    LastLayer(model, classes)  # which the large margin needs


IMAGE_RECIPES = sorted(name for name in shipped_recipes() if name.startswith("image/"))


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_each_recipe_can_be_compared_as_it_is(name: str) -> None:
    """Every recipe says what it is to be compared with, on grids around its own rate."""
    recipe = load_recipe(name)
    content = read_yaml(recipe.source)
    assert "compare" in content
    spec = recipe.compare
    assert {"cross_entropy", "label_smoothing", "large_margin"} <= set(spec.losses)
    assert {"gce", "forward_corrected"} <= set(spec.losses) or not recipe.student.label_noise
    assert {"focal", "logit_adjusted"} <= set(spec.losses) or recipe.student.imbalance == 1
    assert sorted(set(spec.lr)) == spec.lr and len(spec.lr) >= 4
    assert spec.lr[0] < recipe.student.optimiser.lr < spec.lr[-1]
    assert spec.seeds >= 5 and spec.large_margin.margin == [2, 3, 4]
    for loss in spec.losses:  # each of a loss's own values meets each rate
        own = vars(getattr(spec, loss)) if hasattr(spec, loss) else {}
        assert math.prod(map(len, own.values())) * len(spec.lr) <= spec.trials, loss
    assert f"l2t compare {recipe.short_name}" in recipe.source.read_text()


@pytest.mark.parametrize(
    "change",
    [
        "batch_size=-4",
        "dev_size=0",
        "label_noise=1.5",
        "imbalance=0",
        "augment=crops",
        "model=resnet9",
        "depth=20",
        "device=tpu",
        "data=mnits",
        "optimiser.momentum=2",
    ],
)
def test_validate_refuses_what_a_dry_run_refuses(
    l2t: Run, digits: Path, tmp_path: Path, change: str
) -> None:
    refused = l2t("train-teacher", digits, f"image.{change}", "--dry-run").error()
    key, _, value = change.partition("=")
    old = {"batch_size": "batch_size: 32", "dev_size": "dev_size: 300", "model": "model: mlp",
           "data": "data: digits", "optimiser.momentum": "momentum: 0.9"}
    text, own = digits.read_text(), f"{key.rsplit('.', 1)[-1]}: {value}"
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace(old[key], own) if key in old else
                   text.replace("image:\n", f"image:\n  {own}\n"))
    said = l2t("recipes", "validate", bad).error()
    assert f"image.{key}" in said
    assert refused.removeprefix("l2t: error: the command line: ") in said


def test_validate_lists_names_and_numbers_together(
    l2t: Run, digits: Path, tmp_path: Path
) -> None:
    text = digits.read_text().replace("model: mlp", "model: mpl").replace("steps: 24", "steps: 0")
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace("name: linear", "name: lineer"))
    lines = l2t("recipes", "validate", bad).err.splitlines()
    assert len(lines) == 3 and all("bad.yaml: image." in line for line in lines)


def test_images_need_no_preparing(l2t: Run) -> None:
    assert "image.data=images" in l2t("data", "prepare", "images").error()
    assert "did you mean 'cifar10'" in l2t("data", "prepare", "cifar-10").error()


def test_a_teacher_for_ones_own_pictures(
    l2t: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures in folders, crops, noise and a long tail, taught and applied."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw = np.random.default_rng(5)
    for split, count in (("train", 30), ("test", 8)):
        for name, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.normal(level, 30, (8, 8, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    changes = ["image.data=images", "image.folder=photos", "image.model=convnet",
               "image.augment=crop-flip", "image.dev_size=20", "image.batch_size=8",
               "image.steps=6", "image.dev_interval=3", "image.label_noise=0.2",
               "image.imbalance=2", "image.dev_batch=0", "image.optimiser.lr=0.02"]
    trained = l2t("train-teacher", digits, *changes, "--out", "run")
    assert trained.code == 0, trained.err
    teacher = tmp_path / "run" / "teacher_best.safetensors"
    applied = l2t("apply-teacher", teacher, digits, *changes, "--out", "applied")
    assert applied.code == 0, applied.err
    assert "note:" not in trained.out + applied.out
    text = applied.out + "".join(p.read_text() for p in (tmp_path / "applied").rglob("*.json"))
    assert "label_noise:0.2|imbalance:2|augment:crop-flip" in text.replace("\n", "")


def test_a_class_without_test_images_is_told(l2t: Run, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "own_lacking.py").write_text(
        "import numpy as np\n"
        "def made(folder, train):\n"
        "    labels = np.arange(60) % (3 if train else 2)\n"
        "    return np.repeat(labels, 64).reshape(60, 8, 8).astype(np.uint8), labels\n"
    )
    changes = ["image.data=own_lacking:made", "image.dev_size=20", "image.batch_size=8",
               "image.dev_batch=0", "training.episodes=1"]
    note = "there are no test images of 1 (2) of 3 classes, counted from 0"
    assert f"note: {note}" in l2t("train-teacher", digits, *changes, "--out", "run").out
    teacher = "run/teacher_best.safetensors"
    apply = ("apply-teacher", teacher, digits, *changes[:-1], "--out", "used")
    assert f"# note: {note}" in l2t(*apply, "--dry-run").out
    assert f"note: {note}" in l2t(*apply).out
    compare = ("compare.losses=[]", "compare.seeds=2", "compare.trials=2", "compare.lr=[0.1,0.2]")
    found = l2t("compare", digits, *changes[:-1], *compare, "--jobs", "1").out
    assert f"warning: {note}" in found.replace("\n", " ")


@pytest.mark.parametrize("command", ["train-teacher", "apply-teacher"])
def test_a_run_does_not_go_on_with_other_images(
    l2t: Run, digits: Path, tmp_path: Path, command: str
) -> None:
    """The folder has the same name and other images in it: the old run is not theirs."""
    code = (
        "import numpy as np\n"
        "def made(folder, train):\n"
        "    labels = np.arange(60) % 2\n"
        "    images = np.full((60, 8, 8), 7, np.uint8)\n"
        "    images[labels == 1, :, ::2] += np.load('level.npy')\n"
        "    return images, labels\n"
    )
    (tmp_path / "own_images.py").write_text(code)
    changes = ["image.data=own_images:made", "image.dev_size=20", "image.batch_size=8",
               "image.dev_batch=0", "training.episodes=1"]
    np.save(tmp_path / "level.npy", np.uint8(30))
    train = ("train-teacher", digits, *changes, "--out", "run")
    assert l2t(*train).code == 0
    teacher = "run/teacher_best.safetensors"
    apply = ("apply-teacher", teacher, digits, *changes[:-1], "--out", "used")
    assert l2t(*apply).code == 0
    again = train if command == "train-teacher" else apply
    assert "finished" in l2t(*again).out
    np.save(tmp_path / "level.npy", np.uint8(31))
    assert "the data are others now than when it began" in l2t(*again).error()


def test_a_section_in_braces_is_the_same_as_its_keys():
    braces = load_recipe("digits", ["compare.gce={q: [0.3, 0.5]}", "loss={form: banded}"])
    keys = load_recipe("digits", ["compare.gce.q=[0.3, 0.5]", "loss.form=banded"])
    assert braces.config() == keys.config()
    assert braces.config() != load_recipe("digits").config()
