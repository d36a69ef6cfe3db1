"""Named parts: a new loss, teacher, measure or way to differentiate is one file and one entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from l2t_core.errors import UserError, suggestion

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from names to parts of one kind, whose failed look-ups name the nearest entry."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that enters its argument under ``name``.

        Raises:
            ValueError: if the name is taken (a programming mistake, not a user's).
        """

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            UserError: if there is none; the message names the nearest and lists all.
        """
        if name not in self._entries:
            hint = suggestion(name, self._entries)
            raise UserError(
                f"unknown {self.kind} {name!r}{hint} (known: {', '.join(self.names())})"
            )
        return self._entries[name]

    def names(self) -> list[str]:
        """Return all names in alphabetical order."""
        return sorted(self._entries)


def unknown_names(used: Iterable[tuple[str, Registry[Any], str]]) -> list[str]:
    """Return a line for each (key of a recipe, registry, name) whose registry has no such name."""
    found = []
    for key, registry, name in used:
        try:
            registry.get(name)
        except UserError as error:
            found.append(f"{key}: {error}")
    return found
