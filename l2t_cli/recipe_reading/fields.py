"""The fields that a recipe can be about. A new field is its package and one entry here.

Everything is named, not imported: fairseq is loaded for a translation recipe only, and torch for
none of the commands that merely list or explain.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from l2t_core.errors import UserError
from l2t_core.losses.baselines import BASELINES
from l2t_core.registry import Registry


def import_quietly(package: str) -> Any:
    """Import ``package`` without what it says on the way, and return it.

    Raises:
        ModuleNotFoundError: if it is not installed.
        ImportError: with the reason in one line, if it is and does not import.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # fairseq advertises optional packages as it is imported
    try:
        return importlib.import_module(package)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise
        # fairseq 0.12.2 on Python 3.11 dies of a ValueError about dataclasses, for example.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(reason) from error
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class Field:
    """Where a field's parts are, as ``module:attribute``.

    ``spec`` is the dataclass of the recipe's section, ``student`` builds a student from it,
    ``application`` applies a teacher to a recipe (see
    :class:`l2t_cli.applying.students.Application`), ``trials`` trains the students of a
    comparison (see :class:`l2t_cli.comparing.trials.FieldTrials`), on those ``losses`` and, where
    ``own_losses`` says so, on such by import path. ``datasets`` is the registry behind ``l2t data
    prepare``. ``check``, where there is one, lists what is wrong with a section, before any data is
    read; ``classes`` returns K where files alone tell it. ``places`` are the section's keys that
    say where data lie and nothing of what comes out. ``extra`` is what to install where ``needs``
    cannot be imported.
    """

    name: str
    spec: str
    student: str
    application: str
    trials: str
    losses: tuple[str, ...]
    own_losses: bool
    datasets: str
    places: tuple[str, ...] = ()
    check: str = ""
    classes: str = ""
    needs: str = ""
    extra: str = ""

    def load(self, part: str) -> Any:
        """Import and return what ``part`` (one of the attributes above) names."""
        module, attribute = getattr(self, part).split(":")
        return getattr(importlib.import_module(module), attribute)

    def require(self) -> None:
        """Import the package that the field needs, if any.

        Raises:
            UserError: if it is not installed or does not work here.
        """
        if not self.needs:
            return
        mend = f'pip install "l2t[{self.extra}]"'
        try:
            import_quietly(self.needs)
        except ModuleNotFoundError:
            raise UserError(
                f"{self.name} recipes need {self.needs}, which is not installed; {mend}"
            ) from None
        except ImportError as error:
            raise UserError(
                f"the installed {self.needs} does not import here ({error}); {mend}"
            ) from error

    def problems(self, spec: Any) -> list[str]:
        """Return a line for everything that is wrong with ``spec`` on its own.

        Raises:
            UserError: if that takes a package that is missing.
        """
        if not self.check:
            return []
        try:
            check = self.load("check")
        except ImportError:
            self.require()
            raise
        return list(check(spec))

    def known_classes(self, spec: Any) -> int | None:
        """Return the student's number of classes, None where building it alone would tell."""
        return self.load("classes")(spec) if self.classes else None

    def build_student(self, spec: Any) -> Any:
        """Return the student that ``spec`` describes; its ``reset`` takes the seed.

        Raises:
            UserError: if it cannot be built, for want of data or of a package.
        """
        self.require()
        builder: Callable[[Any], Any] = self.load("student")
        return builder(spec)


FIELDS: Registry[Field] = Registry("field")
FIELDS.register("image")(
    Field(
        name="image",
        spec="l2t_vision.recipe:ImageSpec",
        student="l2t_vision.student:build_student",
        application="l2t_cli.applying.image:ImageApplication",
        trials="l2t_cli.comparing.image:ImageTrials",
        losses=tuple(name for name in BASELINES.names() if BASELINES.get(name).function),
        own_losses=True,
        datasets="l2t_vision.data.prepare:DATASETS",
        places=("folder",),
        check="l2t_vision.checks:problems",
    )
)
FIELDS.register("nmt")(
    Field(
        name="nmt",
        spec="l2t_fairseq.recipe:NmtSpec",
        student="l2t_fairseq.students.nmt:build_student",
        application="l2t_cli.applying.fairseq:RecipeApplication",
        trials="l2t_cli.comparing.fairseq:FairseqTrials",
        losses=("cross_entropy", "label_smoothing", "mrt"),
        own_losses=False,
        datasets="l2t_fairseq.corpora.prepare:DATASETS",
        places=("data",),
        check="l2t_fairseq.checks:problems",
        classes="l2t_fairseq.corpora.folder:known_entries",
        needs="fairseq",
        extra="nmt",
    )
)
