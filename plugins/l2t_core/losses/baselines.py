"""The fixed losses that a taught loss is compared with: one entry holds all that is known of each.

A new baseline is one function, as those of :mod:`l2t_core.losses.functions`, and one entry in
``BASELINES``. Recipes, their checks, grids and tables follow it. Nothing here needs torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from l2t_core.errors import UserError, suggestion
from l2t_core.registry import Registry
from l2t_core.user_code import is_import_path

Settings = Mapping[str, float]
LOSSES_KEY = "compare.losses"


@dataclass(frozen=True)
class Setting:
    """One number of a loss: its default and the range [low, high] in which it has a meaning.

    ``grid`` is what a comparison tries where a recipe does not say otherwise.
    """

    default: float
    grid: tuple[float, ...]
    low: float
    high: float = math.inf
    whole: bool = False


@dataclass(frozen=True)
class Baseline:
    """A fixed loss: its name in tables, its function and settings, and what it needs.

    ``function`` is ``module:function``, of the signature (log-probabilities [N, K], targets [N],
    :data:`Settings`, :class:`l2t_core.losses.functions.Moment`) to losses [N]; empty for a loss of
    whole sequences, which a field trains by means of its own. ``needs_classifier``: it looks at the
    student's last layer; ``asks`` names the student's method whose tensor it finds as
    ``Moment.told``. ``first`` names the fixed loss of the student that has to be trained, from the
    same seed at the same rate, before it is asked. ``own``: it is the user's, of log-probabilities
    and targets alone.
    """

    label: str
    function: str = ""
    settings: dict[str, Setting] = field(default_factory=dict)
    needs_classifier: bool = False
    asks: str = ""
    first: str = ""
    own: bool = False

    def load(self) -> Callable[..., Any]:
        """Import and return the function.

        Raises:
            UserError: if it is the user's and cannot be imported.
        """
        if self.own:
            from l2t_core.own_functions import own_function

            function = own_function(self.function, LOSSES_KEY, each=True)
            return lambda log_probs, targets, settings, at: function(log_probs, targets)
        module, name = self.function.split(":")
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


BASELINES: Registry[Baseline] = Registry("loss")
BASELINES.register("cross_entropy")(
    Baseline("cross-entropy", "l2t_core.losses.functions:cross_entropy_at")
)
BASELINES.register("label_smoothing")(
    Baseline(
        "label smoothing",
        "l2t_core.losses.functions:label_smoothing_at",
        {"eps": Setting(0.1, (0.05, 0.1, 0.2), 0.0, 1.0)},
    )
)
BASELINES.register("large_margin")(
    Baseline(
        "large margin",
        "l2t_core.losses.functions:large_margin_at",
        {
            "margin": Setting(2, (2, 3, 4), 2, 4, whole=True),
            "lambda_min": Setting(0.0, (5.0,), 0.0),
        },
        needs_classifier=True,
    )
)
BASELINES.register("focal")(
    Baseline(
        "focal",
        "l2t_core.losses.functions:focal_at",
        {"gamma": Setting(2.0, (0.5, 1.0, 2.0), 0.0)},
    )
)
BASELINES.register("gce")(
    Baseline(
        "generalised CE",
        "l2t_core.losses.functions:generalised_cross_entropy_at",
        {"q": Setting(0.7, (0.1, 0.4, 0.7), 0.0, 1.0)},
    )
)
BASELINES.register("logit_adjusted")(
    Baseline(
        "logit adjustment",
        "l2t_core.losses.functions:logit_adjusted_at",
        {"tau": Setting(1.0, (0.5, 1.0, 1.5), 0.0)},
        asks="class_shares",
    )
)
BASELINES.register("forward_corrected")(
    Baseline(
        "forward correction",
        "l2t_core.losses.functions:forward_corrected_at",
        asks="label_confusion",
    )
)
# Gold loss correction (Hendrycks et al. 2018): forward correction by what a student of
# cross-entropy takes the dev examples of each class for.
BASELINES.register("gold_corrected")(
    Baseline(
        "gold correction",
        "l2t_core.losses.functions:forward_corrected_at",
        asks="dev_confusion",
        first="cross_entropy",
    )
)
# The paper's form before any teacher has learned anything: sigma = sigmoid, W = I, b = 0, eased in
# as the authors' public MNIST demo does, by a warm-up on cross-entropy (``warmup``, a fraction of
# the training) and the mix alpha CE + (1 - alpha) l_phi (``mix`` = alpha).
BASELINES.register("sigmoid")(
    Baseline(
        "sigmoid form",
        "l2t_core.losses.functions:sigmoid_at",
        {
            "warmup": Setting(0.0, (0.1,), 0.0, 1.0),
            "mix": Setting(0.0, (0.0, 0.2, 0.5), 0.0, 1.0),
        },
    )
)
# Minimum risk training: the last ``share`` of the updates on ``mix`` CE + (1 - ``mix``) risk, the
# risk over ``samples`` candidates, weighed by p^``alpha``.
BASELINES.register("mrt")(
    Baseline(
        "minimum risk",
        settings={
            "share": Setting(0.25, (0.25,), 0.0, 1.0),
            "mix": Setting(0.5, (0.1, 0.5), 0.0, 1.0),
            "samples": Setting(8, (8,), 2, whole=True),
            "alpha": Setting(1.0, (1.0,), 1e-6),
        },
    )
)


def baseline(name: str) -> Baseline:
    """Return the fixed loss called ``name``: an entry of ``BASELINES``, or an import path.

    Raises:
        UserError: if there is none of that name.
    """
    return Baseline(name, name, own=True) if is_import_path(name) else BASELINES.get(name)


def complete_settings(name: str, given: Settings) -> dict[str, float]:
    """Return the settings of the loss ``name`` with its defaults for those not ``given``.

    Raises:
        UserError: if the loss or a setting is unknown, or a value is out of range.
    """
    known = baseline(name).settings
    for key, value in given.items():
        if key not in known:
            hint = suggestion(key, known) or f" (known: {', '.join(sorted(known)) or 'none'})"
            raise UserError(f"the loss {name} has no setting {key!r}{hint}")
        setting = known[key]
        if not setting.low <= value <= setting.high or math.isinf(value):
            limits = f"from {setting.low:g} to {setting.high:g}"
            if math.isinf(setting.high):
                limits = f"{setting.low:g} or more{', but finite' if math.isinf(value) else ''}"
            raise UserError(f"{name}.{key} is {value:g}; it must be {limits}")
        if setting.whole and value != int(value):
            raise UserError(f"{name}.{key} is {value:g}; it must be a whole number")
    return {key: given.get(key, setting.default) for key, setting in known.items()}
