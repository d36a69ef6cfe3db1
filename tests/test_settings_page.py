"""The page of settings names every key of a recipe, with its default, and no other."""

import dataclasses
import re

import pytest
import yaml
from checkout import ROOT  # type: ignore[import-not-found]

from l2t_core.comparing.specs import GRIDS, CompareSpec
from l2t_core.specs import LossSpec, OptimiserSpec, ScheduleSpec, TeacherSpec, TrainingSpec
from l2t_fairseq.recipe import NmtSpec
from l2t_vision.recipe import ImageSpec

PAGE = ROOT / "docs/settings.md"
SECTIONS = {
    "loss": LossSpec,
    "teacher": TeacherSpec,
    "training": TrainingSpec,
    "image": ImageSpec,
    "image.optimiser": OptimiserSpec,
    "image.schedule": ScheduleSpec,
    "nmt": NmtSpec,
    "compare": CompareSpec,
}


def told(section: str) -> dict[str, str]:
    """Return the page's keys of ``section`` with their defaults, as they are written."""
    text = PAGE.read_text("utf-8").split(f"### `{section}`\n", 1)[1].split("\n### ", 1)[0]
    table = text.split("| key | default | meaning |\n", 1)[1].split("\n\n", 1)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (?:`(.*?)` )?\|", table, re.MULTILINE))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_is_on_the_page_with_its_default(section):
    plain = {
        name: str(value)
        for name, value in vars(SECTIONS[section]()).items()
        if not dataclasses.is_dataclass(value)
    }
    assert told(section) == plain


def test_every_grid_is_on_the_page_about_comparing():
    text = PAGE.with_name("compare.md").read_text("utf-8")
    section = yaml.safe_load(text.split("```yaml\n", 1)[1].split("```", 1)[0])["compare"]
    grids = {name: vars(grid()) for name, grid in GRIDS.items()}
    assert {key: section[key] for key in grids} == grids
