"""The sections of a recipe that belong to the core, as plain dataclasses with defaults.

They hold numbers and names only, so that a recipe file, a teacher file and a run folder can all
carry them, and nothing in them can execute.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LossSpec:
    """Which loss family the teacher writes (L2T-DLF section 3.1) and how it is eased in.

    ``form``: dense, diagonal, lowrank (diagonal + rank r) or shared (three numbers for all
    classes). ``sigma``: sigmoid, softplus or identity. ``warmup_steps``: first steps on plain
    cross-entropy. ``ce_mix``: weight alpha of cross-entropy in alpha*CE + (1-alpha)*l_phi.
    """

    form: str = "dense"
    sigma: str = "sigmoid"
    rank: int = 1
    warmup_steps: int = 0
    ce_mix: float = 0.0


@dataclass
class TeacherSpec:
    """The teacher mu_theta: ``attention`` over ``slots`` memory slots, or ``static``.

    ``features`` names the parts of the state s_t that it sees; empty means the field's default.
    ``init_scale`` is the standard deviation of the slots around the neutral coefficients.
    """

    name: str = "attention"
    slots: int = 10
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
    """Teacher training (Algorithm 1). ``lr`` and ``clip_norm`` are those of theta's Adam.

    ``differentiation`` names the way to differentiate; ``discount`` (gamma) multiplies the
    cotangent at each step back in time; ``truncate`` keeps the last K steps (0: all);
    ``memory`` bounds the stored trajectory; ``patience`` stops after so many episodes without
    a better dev measure (0: never). ``student_seeds`` is how many students take turns: 0, the
    paper's way, makes a fresh one each episode, and then the best of a few episodes is as much
    the best student as the best teacher; 1 keeps the student the same and compares teachers only.
    """

    episodes: int = 20
    lr: float = 0.003
    clip_norm: float = 1.0
    patience: int = 0
    differentiation: str = "exact"
    discount: float = 1.0
    truncate: int = 0
    memory: str = "1GiB"
    student_seeds: int = 0
    seed: int = 1
