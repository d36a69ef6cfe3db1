"""Recipes: found by name or path, checked key by key against the specs, with overrides.

Works with omegaconf 2.0 and 2.3, which the fairseq releases pin.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from l2t_cli.recipe_reading.fields import FIELDS, Field
from l2t_cli.recipe_reading.files import first_line, kind_of, read_recipe
from l2t_core.comparing.specs import CompareSection, CompareSpec
from l2t_core.errors import UserError, suggestion
from l2t_core.specs import LossSpec, TeacherSpec, TrainingSpec, defaults_of

CORE_SECTIONS: dict[str, type] = {
    "loss": LossSpec,
    "teacher": TeacherSpec,
    "training": TrainingSpec,
}
# Read by `l2t compare` alone: a teacher does not depend on it.
COMPARE = "compare"

COMMAND_LINE = "the command line"
# torch raises on a number beyond single precision, 3.4e38; what is made of one has room left.
_TOO_LARGE = 1e31
_LIST: Any = typing.List  # noqa: UP006 - omegaconf 2.0 knows this spelling only


@dataclass(frozen=True)
class Recipe:
    """A recipe as resolved. ``student`` is the field's section (e.g. ``ImageSpec``)."""

    name: str
    source: Path
    description: str
    field: Field
    student: Any
    loss: LossSpec
    teacher: TeacherSpec
    training: TrainingSpec
    compare: CompareSpec
    overridden: frozenset[str] = frozenset()

    @property
    def short_name(self) -> str:
        """``demo-de-en`` of ``nmt/demo-de-en``."""
        return self.name.rsplit("/", 1)[-1]

    def config(self) -> dict[str, Any]:
        """Return what a teacher depends on as plain values, in the layout of the recipe file."""
        return {
            "field": self.field.name,
            "description": self.description,
            self.field.name: dataclasses.asdict(self.student),
            "loss": dataclasses.asdict(self.loss),
            "teacher": dataclasses.asdict(self.teacher),
            "training": dataclasses.asdict(self.training),
        }

    def defaults(self) -> dict[str, Any]:
        """Return what :meth:`config` has where nothing is set: what older runs had."""
        sections = {self.field.name: type(self.student), **CORE_SECTIONS}
        return {key: defaults_of(spec) for key, spec in sections.items()}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe ``name`` with ``key.sub=value`` overrides.

    Raises:
        UserError: at the first thing wrong with it; :func:`check_recipe` lists all.
    """
    recipe, problems = check_recipe(name, overrides)
    if recipe is None:
        raise UserError(problems[0])
    return recipe


def refuse_sections(changes: Sequence[str], sections: Sequence[str], reason: str) -> None:
    """Refuse overrides of ``sections``, which would have no effect.

    Raises:
        UserError: naming the first of them and the ``reason``.
    """
    for change in changes:
        if change.split("=")[0].split(".")[0] in sections:
            raise UserError(f"{change} {reason}")


def check_recipe(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe | None, list[str]]:
    """Return the recipe, or None and every problem with it, one line each.

    Raises:
        UserError: if there is no such recipe, or it cannot be read as YAML.
    """
    full_name, path, content = read_recipe(name)
    problems: list[str] = []
    field = _field_of(content, path)
    sections = {field.name: field.load("spec"), **CORE_SECTIONS, COMPARE: CompareSection}
    built: dict[str, Any] = {}
    trees = {key: OmegaConf.structured(_schema(spec)) for key, spec in sections.items()}
    changes = [(key, value, str(path)) for key, value in _leaves(content)]
    for override in overrides:
        key, value = _parse_override(override)
        # A section in braces, as people write it in the file: compare.gce={q: [0.4]}.
        inside = _leaves({key: value}) if isinstance(value, dict) else [(key, value)]
        changes += [(leaf, found, COMMAND_LINE) for leaf, found in inside]
    texts = {"field": field.name, "description": ""}
    for key, value, where in changes:
        problem = _apply(key, value, trees, sections, texts)
        if problem:
            problems.append(f"{where}: {problem}")
    if not problems:
        for key, spec in sections.items():
            try:
                built[key] = _instantiate(spec, OmegaConf.to_container(trees[key], resolve=True))
            except _Missing as error:
                problems.append(f"{path}: {key}.{error} is missing; add it to the {key} section")
            except OmegaConfBaseException as error:
                problems.append(f"{path}: {first_line(error)}")
    if problems:
        return None, problems
    recipe = Recipe(
        name=full_name,
        source=path,
        description=texts["description"],
        field=field,
        student=built[field.name],
        **{key: built[key] for key in (*CORE_SECTIONS, COMPARE)},
        overridden=frozenset(key for key, _, where in changes if where == COMMAND_LINE),
    )
    return recipe, []


def _field_of(content: dict[str, Any], path: Path) -> Field:
    name = content.get("field")
    if name is None:
        raise UserError(f"{path}: no `field`; add one of: {', '.join(FIELDS.names())}")
    try:
        return FIELDS.get(str(name))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _leaves(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; an empty section has no leaves."""
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{dotted}.") if value else ((dotted, value),)
        elif value is None and not prefix and key in (*CORE_SECTIONS, COMPARE, *FIELDS.names()):
            continue
        else:
            yield dotted, value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"cannot read {text!r} as an override; write key.sub=value")
    try:
        container = OmegaConf.to_container(OmegaConf.create(f"value: {value or repr('')}"))
    except (yaml.YAMLError, OmegaConfBaseException):
        return key, value
    return key, container["value"] if isinstance(container, dict) else value


def _apply(
    key: str, value: Any, trees: dict[str, Any], sections: dict[str, type], texts: dict[str, str]
) -> str:
    """Set one dotted key; return what is wrong with it, or an empty string."""
    if key in texts:
        if not isinstance(value, str):
            return f"{key} = {value!r} is a {kind_of(value)}, expected text"
        if key == "field" and value != texts["field"]:
            return f"field = {value!r} cannot be changed; use a recipe of that field"
        texts[key] = value
        return ""
    known = [*texts, *sections, *_known_keys(sections)]
    section, _, rest = key.partition(".")
    expected = _type_at(sections, key)
    if expected is None:
        return f"unknown key {key!r}{suggestion(key, known)}"
    if dataclasses.is_dataclass(expected):
        if value == {}:
            return ""
        return f"{key} = {value!r} is a {kind_of(value)}, expected a section"
    if isinstance(value, dict):
        return f"{key} is a section here, expected {_type_name(expected)}"
    if "${" in str(value):  # omegaconf's, of which 2.0 and 2.3 make different things
        return f"{key} = {value!r} refers by ${{...}} to something else; write the value itself"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"{key} = {value} is too large; whole numbers lie below 2^63"
    try:
        OmegaConf.update(trees[section], rest, value, merge=False)
        taken = OmegaConf.select(trees[section], rest)
        if OmegaConf.is_list(taken):
            taken = OmegaConf.to_container(taken, resolve=True)
        # omegaconf 2.0 turns 0.5 into 0 and true into 1 without a word.
        changed = not isinstance(taken, str) and not isinstance(value, str) and taken != value
    except (OmegaConfBaseException, ValueError, TypeError, RecursionError):
        return f"{key} = {value!r} {_mismatch(value, expected)}"
    if _is_nan(taken):
        return f"{key} = {value!r} is not a finite number"
    numbers = taken if isinstance(taken, list) else [taken]
    if any(isinstance(n, float) and _TOO_LARGE <= abs(n) < math.inf for n in numbers):
        return f"{key} = {value!r} is too large for single precision; numbers lie below 1e31"
    nan_inside = isinstance(taken, list) and any(map(_is_nan, taken))
    if changed or nan_inside or (isinstance(value, bool) and not isinstance(taken, bool)):
        return f"{key} = {value!r} {_mismatch(value, expected)}"
    return ""


def _known_keys(sections: dict[str, type]) -> list[str]:
    found: list[str] = []
    for name, spec in sections.items():
        for key, kind in _types(spec).items():
            found.append(f"{name}.{key}")
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                found += [f"{name}.{inner}" for inner in _known_keys({key: kind})]
    return found


def _types(spec: type) -> dict[str, Any]:
    hints = typing.get_type_hints(spec)
    return {item.name: hints[item.name] for item in dataclasses.fields(spec)}


def _schema(spec: type, example: Any = None) -> type:
    """Return a copy of the dataclass ``spec`` that omegaconf 2.0 understands.

    It reads neither postponed annotations nor ``list[str]``. Defaults are those of ``example``,
    an instance of ``spec``, if given.
    """
    copies: list[tuple[str, Any, Any]] = []
    kinds = _types(spec)
    for item in dataclasses.fields(spec):
        kind, default = kinds[item.name], item.default
        if example is not None:
            default = getattr(example, item.name)
        elif item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            kind = _schema(kind, None if default is dataclasses.MISSING else default)
            entry = dataclasses.field(default_factory=kind)
        elif typing.get_origin(kind) is list:
            kind = _LIST[typing.get_args(kind)[0]]
            values = [] if default is dataclasses.MISSING else list(default)
            entry = dataclasses.field(default_factory=partial(list, values))
        else:
            entry = dataclasses.field(default="???" if default is dataclasses.MISSING else default)
        copies.append((item.name, kind, entry))
    return dataclasses.make_dataclass(spec.__name__, copies)


def _type_at(sections: dict[str, type], key: str) -> Any:
    """Return the declared type of a dotted key, or None if there is no such key."""
    kind: Any = None
    level: dict[str, Any] = dict(sections)
    for part in key.split("."):
        if part not in level:
            return None
        kind = level[part]
        is_section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        level = _types(kind) if is_section else {}
    return kind


class _Missing(Exception):
    """A key without a default that the recipe does not set."""


def _instantiate(spec: type, values: Any) -> Any:
    arguments: dict[str, Any] = {}
    for name, kind in _types(spec).items():
        value = values[name]
        if value == "???":
            raise _Missing(name)
        nested = dataclasses.is_dataclass(kind) and isinstance(kind, type)
        arguments[name] = _instantiate(kind, value) if nested else value
    return spec(**arguments)


def _type_name(kind: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if typing.get_origin(kind) is list:
        (element,) = typing.get_args(kind)
        return f"a list of {names[element].removeprefix('a ')}{'' if element is str else 's'}"
    return names.get(kind, str(kind))


def _mismatch(value: Any, expected: Any) -> str:
    """Say why ``value`` is not what is ``expected``, of a list by its first wrong element."""
    if isinstance(value, list) and typing.get_origin(expected) is list:
        (kind,) = typing.get_args(expected)
        takes = (int, float) if kind is float else (kind,)
        for item in value:
            if type(item) not in takes or _is_nan(item):
                what = "no finite number" if _is_nan(item) else f"a {kind_of(item)}"
                return f"holds {item!r}, {what}; expected {_type_name(expected)}"
    return f"is a {kind_of(value)}, expected {_type_name(expected)}"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
