"""The sections of a recipe that belong to the core, as plain dataclasses with defaults.

They hold numbers and names only, so that a recipe file, a teacher file and a run folder can all
carry them, and nothing in them can execute.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

# Ways to differentiate (training.differentiation) that update theta within a student's life, those
# that take no derivatives of the student, and those that train each student twice.
WITHIN_A_LIFE = ("windows", "persistent-es")
WITHOUT_DERIVATIVES = ("antithetic-es", "persistent-es")
OF_TWO_LIVES = ("antithetic-es", "persistent-es", "mixed")
# Rules of update (training.update_rule) that learn from what their updates lead to.
LEARNED_RULES = ("lstm", "cold-lstm")


@dataclass
class LossSpec:
    """Which loss family the teacher writes (L2T-DLF section 3.1) and how it is eased in.

    ``form``: dense, diagonal, lowrank (diagonal + rank r), banded (three numbers for each range of
    frequencies in a sorted vocabulary), shared (three numbers for all classes), network (a small
    one for all classes), pairwise (one that sees pairs of them) or confusion (forward correction).
    ``sigma``: sigmoid (the paper's), softplus or identity. The defaults start at cross-entropy and
    are those that won (docs/stability.md); the paper's own are dense, sigmoid, L2T-DLN's the
    teacher lstm with the form pairwise. ``warmup_steps``: first steps on
    cross-entropy, with label smoothing ``warmup_smoothing`` (0: plain). ``ce_mix``: weight alpha of
    cross-entropy in alpha*CE + (1-alpha)*l_phi.
    """

    form: str = "shared"
    sigma: str = "identity"
    rank: int = 1
    warmup_steps: int = 0
    ce_mix: float = 0.0
    warmup_smoothing: float = 0.0


@dataclass
class TeacherSpec:
    """The teacher mu_theta.

    ``name``: attention (over ``slots`` memory slots), lstm (the same, with ``hidden`` units that
    remember the states before), affine (``slots`` units), static, or timed (one phi for each of
    ``slots`` stretches of a life).
    ``features`` names the parts of the state s_t that it sees; empty means the field's default.
    ``init_scale`` is the deviation of the slots from the neutral coefficients at the start.
    """

    name: str = "attention"
    slots: int = 10
    hidden: int = 16
    init_scale: float = 0.01
    features: list[str] = field(default_factory=list)


@dataclass
class OptimiserSpec:
    """The student's optimiser. ``lr`` is the peak rate, ``clip_norm`` 0 means no clipping."""

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0


@dataclass
class ScheduleSpec:
    """The learning-rate schedule: constant, linear (to zero), cosine (to zero), inverse_sqrt."""

    name: str = "constant"
    warmup_steps: int = 0


@dataclass
class TrainingSpec:
    """Teacher training (Algorithm 1). ``lr`` and ``clip_norm`` are those of theta's updates.

    ``update_rule`` makes them: adam, or lstm or cold-lstm, after L2T-DLN, an optimiser that learns
    at ``rule_lr`` while it is used (in windows).

    ``bounded`` keeps theta, at its start and after each update, where no part of W is below zero
    if sigma is the identity, so that its loss does not reward certainty without bound. Lives
    under the noise of evolutionary ways may lie beyond.

    ``students`` live for each update of theta, their hypergradients averaged; ``parallel`` says
    what several processes share: ``students`` (each process has its own) or ``data`` (each step's
    batch). ``student_seeds`` is how many students take turns: 0, the paper's way, makes fresh
    ones each episode, and then the best of a few episodes is as much the best student as the best
    teacher; 1 keeps the student the same and compares teachers only. ``patience`` stops after so
    many episodes without a better dev measure (0: never). ``finalists``, above 1, is how many of
    the best teachers by their own students teach, at the end, the same ``final_students`` fresh
    ones, whose mean dev measure then says which is the best.

    ``differentiation`` names the way to differentiate: exact, windows, antithetic-es,
    persistent-es or mixed. ``discount`` (gamma) multiplies the cotangent at each step back in
    time; ``truncate`` keeps the last K steps (0: all); ``cotangent_cap`` bounds the cotangent's
    norm at so many times its first (0: no bound); ``max_growth`` leaves out students whose
    cotangent grew more than that (0: none); ``average_last`` reads M-tilde at the mean of
    the last so many states; ``measure_points`` averages it over so many points of the life;
    ``phi_penalty`` weighs the mean square of phi's way from neutral, to be subtracted from
    M-tilde. ``window`` is the steps between updates of the ways that update within a life;
    ``perturbation`` is the standard deviation of theta's noise in the evolutionary ones.

    ``memory`` bounds the stored trajectory; where it is too small, states are recomputed or
    spilled as ``spill`` says (auto, none, host, file). ``hvp`` is exact, finite-difference or
    one-sided-difference, ``trace`` allows recorded derivatives, ``precision`` (float32, bfloat16,
    float16) is the student's own arithmetic.
    """

    episodes: int = 20
    lr: float = 0.01
    update_rule: str = "adam"
    rule_lr: float = 0.001
    clip_norm: float = 1.0
    bounded: bool = True
    patience: int = 0
    students: int = 1
    parallel: str = "students"
    student_seeds: int = 0
    finalists: int = 1
    final_students: int = 3
    differentiation: str = "exact"
    discount: float = 1.0
    truncate: int = 0
    cotangent_cap: float = 0.0
    max_growth: float = 1000.0
    average_last: int = 1
    measure_points: int = 1
    phi_penalty: float = 0.0
    window: int = 0
    perturbation: float = 0.01
    memory: str = "1GiB"
    spill: str = "auto"
    hvp: str = "exact"
    trace: bool = True
    precision: str = "float32"
    seed: int = 1


def defaults_of(spec: type) -> dict[str, Any]:
    """Return the defaults of the dataclass ``spec`` as plain values, less what has none."""
    found: dict[str, Any] = {}
    for item in fields(spec):
        value = item.default if item.default_factory is MISSING else item.default_factory()
        if value is not MISSING:
            found[item.name] = defaults_of(type(value)) if is_dataclass(value) else value
    return found
