"""What can be said against an ``image`` section before any data is read."""

from __future__ import annotations

import math

from l2t_core.errors import Limit, NoEffect, out_of_range, unknown_choice
from l2t_core.registry import Registry, unknown_names
from l2t_core.students.devices import device_problems
from l2t_core.students.life import PRECISIONS
from l2t_core.students.optimisers import OPTIMISERS
from l2t_core.students.optimisers import problems as optimiser_problems
from l2t_core.students.schedules import SCHEDULES
from l2t_core.user_code import import_problems, is_import_path
from l2t_vision.data.augmentation import AUGMENTATIONS
from l2t_vision.data.corruption import NOISES
from l2t_vision.data.sets import LOADERS
from l2t_vision.measures import MEASURES
from l2t_vision.models.architectures import MODELS, SCALABLE
from l2t_vision.recipe import ImageSpec


def problems(spec: ImageSpec) -> list[str]:
    """Return a line for every unknown name and impossible number, none if there is none."""
    found = [*_unknown_names(spec), *_impossible_numbers(spec), *_idle(spec)]
    return found or optimiser_problems(spec.optimiser, "image.optimiser")


def _idle(spec: ImageSpec) -> list[NoEffect]:
    """Return a line for each setting that another one leaves nothing to do."""
    scaled = spec.model in SCALABLE or is_import_path(spec.model)
    found = [
        NoEffect(
            f"image.{name}", "image.model", spec.model,
            f"use {' or '.join(SCALABLE)}, or leave it out",
        )
        for name in ("depth", "width")
        if getattr(spec, name) > 0 and not scaled
    ]
    if spec.size > 0 and spec.data != "images":
        found.append(
            NoEffect("image.size", "image.data", spec.data, "use images, or leave it out")
        )
    return found


def _unknown_names(spec: ImageSpec) -> list[str]:
    # Of these there may be the user's own, by import path.
    own: list[tuple[str, Registry, str]] = [
        ("image.data", LOADERS, spec.data),
        ("image.model", MODELS, spec.model),
        ("image.augment", AUGMENTATIONS, spec.augment),
        ("image.measure", MEASURES, spec.measure),
    ]
    known: list[tuple[str, Registry, str]] = [
        ("image.noise", NOISES, spec.noise),
        ("image.optimiser.name", OPTIMISERS, spec.optimiser.name),
        ("image.schedule.name", SCHEDULES, spec.schedule.name),
    ]
    used = [*(entry for entry in own if not is_import_path(entry[2])), *known]
    return [
        *unknown_names(used),
        *import_problems((key, name) for key, _, name in own),
        *device_problems("image.device", spec.device),
        *unknown_choice("image.precision", spec.precision, tuple(PRECISIONS)),
    ]


def _impossible_numbers(spec: ImageSpec) -> list[str]:
    rate, looked_at = spec.optimiser.lr, spec.dev_size - spec.trusted
    limits: list[Limit] = [
        ("optimiser.lr", rate, 0.0 < rate < math.inf, "above 0"),
        ("steps", spec.steps, spec.steps >= 1, "at least 1"),
        ("batch_size", spec.batch_size, spec.batch_size >= 1, "at least 1"),
        (
            "dev_interval", spec.dev_interval,
            spec.dev_interval >= 1 and (spec.dev_interval <= spec.steps or spec.steps < 1),
            f"between 1 and image.steps, {spec.steps}, or dev is never looked at",
        ),
        ("hidden", spec.hidden, spec.hidden >= 1, "at least 1"),
        (
            "depth", spec.depth, 0 <= spec.depth <= 10_000,
            "between 0 (the paper's largest) and 10,000",
        ),
        (
            "width", spec.width, 0 <= spec.width <= 100_000,
            "between 0 (the paper's largest) and 100,000",
        ),
        (
            "schedule.warmup_steps", spec.schedule.warmup_steps,
            0 <= spec.schedule.warmup_steps < max(1, spec.steps), "0 or more and below image.steps",
        ),
        ("dropout", spec.dropout, 0.0 <= spec.dropout < 1.0, "in [0, 1)"),
        ("size", spec.size, spec.size >= 0, "0 (as they are) or more"),
        ("train_size", spec.train_size, spec.train_size >= 0, "0 (all that dev leaves) or more"),
        (
            "dev_size", spec.dev_size, spec.dev_size >= 1,
            "some hundreds: without it the dev set is empty, and the teacher learns from it",
        ),
        (
            "dev_batch", spec.dev_batch,
            spec.dev_batch >= 0 and (spec.dev_batch <= looked_at or looked_at < 1),
            f"between 0 (the whole dev set) and its size, {looked_at}",
        ),
        (
            "trusted", spec.trusted, 0 <= spec.trusted < max(1, spec.dev_size),
            f"0 or more and below image.dev_size, {spec.dev_size}: the rest of dev chooses",
        ),
        (
            "only_trusted", spec.only_trusted, spec.trusted > 0 or not spec.only_trusted,
            "false without image.trusted: nothing would be left to learn from",
        ),
        ("data_seed", spec.data_seed, 0 <= spec.data_seed < 2**31, "in [0, 2^31)"),
        ("label_noise", spec.label_noise, 0.0 <= spec.label_noise <= 1.0, "in [0, 1]"),
        ("imbalance", spec.imbalance, 1.0 <= spec.imbalance < math.inf, "1 (none) or more"),
    ]
    return out_of_range("image", limits)
