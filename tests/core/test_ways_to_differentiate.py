"""Every way to differentiate against what it claims to estimate, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from l2t_core.hypergradients import readout, ways
from l2t_core.hypergradients.diagnostics import WayBack
from l2t_core.hypergradients.engine import Engine, Episode
from l2t_core.hypergradients.unroll import run_forward
from l2t_core.hypergradients.ways import DIFFERENTIATIONS, Outcome, exact, spans
from l2t_core.specs import LossSpec, OptimiserSpec, TeacherSpec, TrainingSpec
from l2t_core.students.life import Life
from l2t_core.students.state import feature_count
from l2t_core.teachers.architectures import build_teacher

LOSS = LossSpec("dense", "sigmoid", warmup_steps=1, ce_mix=0.2)
# A static teacher does not read s_t, so that the whole derivative is the one that is wanted.
STATIC = TeacherSpec("static", init_scale=0.3)
STEPS = 9


def no_step(phase, step):
    pass


def build(make_student, spec, name="mlp", seed=3, noise=1, **options):
    student = make_student(name, OptimiserSpec("momentum", 0.3), steps=STEPS)
    student.learning_rate = lambda step: 0.3  # whatever T
    names = student.default_features
    teacher = build_teacher(STATIC, LOSS, 3, feature_count(names, 3), seed=1).double()
    engine = Engine(Life(student), LOSS, spec)
    return Episode(engine, names, seed, 0, noise), teacher


def numeric(teacher, value, h=1e-5):
    """Central differences of ``value()`` along every coordinate of theta, [D]."""
    theta = parameters_to_vector(teacher.parameters()).detach().clone()
    found = torch.zeros_like(theta)
    for i in range(len(theta)):
        sides = []
        for sign in (1, -1):
            moved = theta.clone()
            moved[i] += sign * h
            vector_to_parameters(moved, teacher.parameters())
            sides.append(value())
        found[i] = (sides[0] - sides[1]) / (2 * h)
    vector_to_parameters(theta, teacher.parameters())
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"average_last": 4},
        {"measure_points": 3},
        {"average_last": 2, "measure_points": 2},
        {"measure_points": STEPS},  # one of them after the warm-up, before theta has a say
    ],
)
def test_calmer_readouts_are_differentiated_exactly(make_student, settings):
    episode, teacher = build(make_student, TrainingSpec(**settings))
    life = episode.life
    points = settings.get("measure_points", 1)
    last = settings.get("average_last", 1)

    def value():
        states = {}
        run_forward(
            life, episode.follow(teacher), life.begin(3), None, no_step,
            lambda step, state: states.__setitem__(step, state[0].clone()),
        )
        at = [round(STEPS * (i + 1) / points) for i in range(points)]
        vectors = [states[s] for s in at[:-1]]
        vectors.append(torch.stack([states[STEPS - i] for i in range(last)]).mean(0))
        total = 0.0
        for vector in vectors:
            life.show(vector)
            total += float(life.student.smoothed_measure(0).detach())
        return total / len(vectors)

    outcome = exact(episode, teacher, no_step)
    assert outcome.smoothed == pytest.approx(value(), rel=1e-12)
    torch.testing.assert_close(
        outcome.estimates[0], numeric(teacher, value), rtol=1e-6, atol=1e-10
    )


def test_the_cap_bounds_the_cotangent(make_student):
    """A cap that never binds changes nothing; one that does shortens what it should."""
    free = exact(*build(make_student, TrainingSpec()), no_step)
    loose = exact(*build(make_student, TrainingSpec(cotangent_cap=1e6)), no_step)
    assert torch.equal(free.estimates[0], loose.estimates[0])
    tight = exact(*build(make_student, TrainingSpec(cotangent_cap=1e-10)), no_step)
    last = exact(*build(make_student, TrainingSpec(truncate=1)), no_step)
    torch.testing.assert_close(tight.estimates[0], last.estimates[0], rtol=1e-4, atol=1e-9)
    assert not torch.allclose(tight.estimates[0], free.estimates[0], rtol=1e-2)


def test_the_cap_goes_by_the_latest_reading_that_has_a_gradient(make_student):
    """Where M-tilde is flat at the end: that of step 6 of 9 stays whole, and no further."""
    episode, teacher = build(make_student, TrainingSpec(measure_points=3, cotangent_cap=1e-10))
    measure, calls = episode.life.student.smoothed_measure, []

    def flat_at_the_end(seed):
        calls.append(seed)
        return measure(seed) * (0.0 if len(calls) == 1 else 1.0)

    episode.life.student.smoothed_measure = flat_at_the_end
    outcome = exact(episode, teacher, no_step)
    assert len(calls) == 3 and outcome.way_back.growth > 0.0
    spec = TrainingSpec(truncate=1)
    short, teacher = build(make_student, spec)
    short.life.student.total_steps = 6
    one = exact(
        Episode(Engine(short.life, LOSS, spec), short.feature_names, 3, 0), teacher, no_step
    )
    torch.testing.assert_close(
        outcome.estimates[0], one.estimates[0] / 3, rtol=1e-4, atol=1e-9
    )
    assert one.estimates[0].norm() > 1e-4


def test_windows_are_truncated_gradients_at_their_ends(make_student):
    """The last window's is the truncated hypergradient; the first one's that of a short life."""
    episode, teacher = build(make_student, TrainingSpec(differentiation="windows", window=4))
    assert episode.engine.plan.steps == 4  # of one window: memory is planned for no more
    outcomes = list(DIFFERENTIATIONS.get("windows")(episode, teacher, no_step))
    assert spans(1, STEPS, 4) == [range(1, 5), range(5, 9)]
    assert len(outcomes) == 2
    assert [o.true is None for o in outcomes] == [True, False]
    reference = exact(*build(make_student, TrainingSpec(truncate=4)), no_step)
    torch.testing.assert_close(outcomes[1].estimates[0], reference.estimates[0])
    assert outcomes[1].smoothed == reference.smoothed
    episode, teacher = build(make_student, TrainingSpec())
    episode.life.student.total_steps = 5
    short = exact(
        Episode(Engine(episode.life, LOSS, TrainingSpec()), episode.feature_names, 3, 0),
        teacher, no_step,
    )
    torch.testing.assert_close(outcomes[0].estimates[0], short.estimates[0])


@pytest.mark.parametrize("way", ["windows", "persistent-es"])
def test_theta_may_change_between_windows(make_student, way):
    """An update within the life changes what follows, and only that."""
    spec = TrainingSpec(differentiation=way, window=4)

    def lived(change):
        episode, teacher = build(make_student, spec)
        values = []
        for outcome in DIFFERENTIATIONS.get(way)(episode, teacher, no_step):
            values.append(outcome.smoothed)
            with torch.no_grad():
                for p in teacher.parameters():
                    p.add_(change)
        return values

    still, moved = lived(0.0), lived(0.5)
    assert still[0] == moved[0]
    assert still[1] != moved[1]


@pytest.mark.parametrize("way", ["windows", "persistent-es"])
def test_a_life_goes_on_from_each_window_with_its_own_buffers(make_student, way):
    """Batch norm's move on the way back, and in the twin that takes turns in the same module."""
    spec = TrainingSpec(differentiation=way, window=4, perturbation=1e-9)
    outcomes = DIFFERENTIATIONS.get(way)(*build(make_student, spec, name="conv_bn"), no_step)
    found = [outcome.smoothed for outcome in outcomes]
    episode, teacher = build(make_student, TrainingSpec(), name="conv_bn")
    life, expected = episode.life, []

    def look(step, state):
        if step in (5, 9):
            expected.append(readout.smoothed_value(life, 0))

    run_forward(life, episode.follow(teacher), life.begin(3), None, no_step, look)
    assert found == pytest.approx(expected, rel=1e-7)


def test_what_is_told_of_the_way_back_by_definition(make_student, monkeypatch):
    """Norms go by that of M-tilde's whole derivative at the end, however it is shared out."""
    episode, teacher = build(make_student, TrainingSpec(average_last=2, measure_points=2))
    life, second = episode.life, episode.engine.second
    at, measure, ends, curvatures = second.at, readout.smoothed_measure, [], []

    def measured(*arguments):
        value, gradient = measure(*arguments)
        ends.append(float(gradient.norm()))
        return value, gradient

    def noted(step, phi, direction, gradient=None):
        used = []
        found = at(step, phi, lambda get: used.append(direction(get)) or used[0], gradient)
        v, curved = used[0], life.flat.gather(found[0])
        curvatures.append(0.3 * abs(float(v @ curved)) / float(v @ v))
        return found

    monkeypatch.setattr(readout, "smoothed_measure", measured)
    monkeypatch.setattr(second, "at", noted)
    told = exact(episode, teacher, no_step).way_back
    assert [step for step, _ in told.norms] == list(reversed(range(1, STEPS)))
    norms = [norm / ends[0] for _, norm in told.norms]
    assert told.growth == pytest.approx(norms[-1]) and told.largest == pytest.approx(max(norms))
    assert told.sharpness == pytest.approx(max(curvatures))


def test_antithetic_estimates_are_directional_derivatives(make_student):
    """For small noise e the estimate is (gradient . e) e / sigma^2."""
    sigma = 1e-4
    spec = TrainingSpec(differentiation="antithetic-es", perturbation=sigma)
    gradient = exact(*build(make_student, TrainingSpec()), no_step).estimates[0]
    for seed in (1, 2):
        episode, teacher = build(make_student, spec, noise=seed)
        theta, moves = parameters_to_vector(teacher.parameters()).detach(), []

        def look(phase, step, teacher=teacher, theta=theta, moves=moves):
            moves.append(parameters_to_vector(teacher.parameters()).detach() - theta)

        outcome = next(DIFFERENTIATIONS.get("antithetic-es")(episode, teacher, look))
        noise = moves[0]
        torch.testing.assert_close(moves[-1], -noise)
        torch.testing.assert_close(
            outcome.estimates[0], (gradient @ noise) / sigma**2 * noise, rtol=1e-4, atol=1e-9
        )
        # Normal noise of D coordinates has a length of about sigma sqrt(D).
        assert float(noise.norm()) == pytest.approx(sigma * math.sqrt(len(noise)), rel=0.6)


def test_mixed_estimates_come_from_the_same_lives(make_student):
    spec = TrainingSpec(differentiation="mixed", perturbation=1e-4, students=2)
    outcome = next(DIFFERENTIATIONS.get("mixed")(*build(make_student, spec), no_step))
    assert len(outcome.estimates) == 2
    reference = exact(*build(make_student, TrainingSpec()), no_step)
    torch.testing.assert_close(
        outcome.estimates[0], reference.estimates[0], rtol=1e-4, atol=1e-7
    )
    es = TrainingSpec(differentiation="antithetic-es", perturbation=1e-4)
    alone = next(DIFFERENTIATIONS.get("antithetic-es")(*build(make_student, es), no_step))
    torch.testing.assert_close(outcome.estimates[1], alone.estimates[0])
    # phi_penalty sees the s_t of both lives.
    assert len(outcome.features) == len(alone.features) == 2 * (STEPS - LOSS.warmup_steps)
    torch.testing.assert_close(torch.stack(outcome.features), torch.stack(alone.features))


@pytest.mark.parametrize("grew", [(3.0, 7.0), (7.0, 3.0)])
def test_a_mix_tells_of_the_way_back_that_grew_most(make_student, monkeypatch, grew):
    """``max_growth`` goes by it."""
    found = iter(grew)

    def exact(episode, teacher, on_step):
        return Outcome([torch.ones(12)], 0.5, 0.5, [], WayBack(largest=next(found)))

    monkeypatch.setattr(ways, "exact", exact)
    spec = TrainingSpec(differentiation="mixed", students=2)
    outcome = next(DIFFERENTIATIONS.get("mixed")(*build(make_student, spec), no_step))
    assert outcome.way_back.largest == 7.0


def test_persistent_estimates_add_up_to_the_gradient_of_the_mean_measure(make_student):
    """Averaged over much noise, the windows' estimates are the exact gradients of M-tilde at
    their ends: not those of the windows alone."""
    window, first = 4, LOSS.warmup_steps
    spec = TrainingSpec(differentiation="persistent-es", window=window, perturbation=1e-3)
    way = DIFFERENTIATIONS.get("persistent-es")
    draws = []
    for noise in range(120):
        outcomes = list(way(*build(make_student, spec, noise=noise), no_step))
        assert len(outcomes) == len(spans(first, STEPS, window))
        draws.append(torch.stack([o.estimates[0] for o in outcomes]))
    means = torch.stack(draws).mean(0)
    errors = torch.stack(draws).std(0) / math.sqrt(len(draws))
    whole = exact(*build(make_student, TrainingSpec()), no_step).estimates[0]
    alone = exact(*build(make_student, TrainingSpec(truncate=window)), no_step).estimates[0]
    # The last window's estimate is of the whole life's gradient.
    distance = ((means[-1] - whole) / errors[-1]).square().mean().sqrt()
    biased = ((means[-1] - alone) / errors[-1]).square().mean().sqrt()
    assert float(distance) < 1.5 < float(biased)


def test_a_student_that_dies_in_a_window_says_so(make_student):
    spec = TrainingSpec(differentiation="windows", window=4)
    episode, teacher = build(make_student, spec)
    episode.life.student.learning_rate = lambda step: float("inf") if step == 6 else 0.1
    outcomes = DIFFERENTIATIONS.get("windows")(episode, teacher, no_step)
    next(outcomes)
    with pytest.raises(FloatingPointError, match="step"):
        next(outcomes)


@pytest.mark.parametrize("way", ["antithetic-es", "persistent-es"])
def test_ways_without_derivatives_need_no_memory_for_states(make_student, way):
    """A budget that holds none is no reason to refuse them."""
    window = 4 if way == "persistent-es" else 0
    spec = TrainingSpec(differentiation=way, window=window, memory="1B")
    episode, teacher = build(make_student, spec)
    assert episode.engine.plan.steps == 0
    for outcome in DIFFERENTIATIONS.get(way)(episode, teacher, no_step):
        assert outcome.estimates[0].isfinite().all()


def test_noise_is_taken_back_in_place(make_student):
    """A matrix elsewhere in memory may give other last bits, and a resumed run has its own."""
    spec = TrainingSpec(differentiation="antithetic-es")
    episode, teacher = build(make_student, spec)
    before = [(p.data_ptr(), p.detach().clone()) for p in teacher.parameters()]
    next(DIFFERENTIATIONS.get("antithetic-es")(episode, teacher, no_step))
    for (place, value), p in zip(before, teacher.parameters(), strict=True):
        assert p.data_ptr() == place and torch.equal(p, value)
