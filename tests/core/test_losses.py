"""The loss family against its published forms and torch's own losses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from toy_students import knows_autocast

from l2t_core.errors import UserError
from l2t_core.losses.forms import (
    FORMS,
    bands,
    coefficient_shapes,
    neutral_coefficients,
)
from l2t_core.losses.functions import forward_corrected
from l2t_core.losses.taught import pull_beside_cross_entropy, step_loss, taught_at, taught_loss
from l2t_core.specs import LossSpec


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 5, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.log_softmax(logits, 1), torch.randint(0, 5, (8,), generator=generator)


def doubled(phi):
    return {k: v.double() for k, v in phi.items()}


@pytest.mark.parametrize("form", FORMS.names())
def test_neutral_identity_is_cross_entropy(form, batch):
    _, log_probs, targets = batch
    spec = LossSpec(form, "identity", rank=2)
    loss = taught_loss(spec, log_probs, targets, doubled(neutral_coefficients(spec, 5)))
    torch.testing.assert_close(loss, F.nll_loss(log_probs, targets, reduction="none"))


def label_smoothing_coefficients(form, eps, k=5):
    if form == "dense":
        weight = (1 - eps) * torch.eye(k) + eps / k
        return {"W": weight, "b": torch.zeros(k)}
    if form == "lowrank":
        return {
            "d": torch.full((k,), 1 - eps),
            "U": torch.ones(k, 1),
            "V": torch.full((k, 1), eps),
            "b": torch.zeros(k),
        }
    if form == "banded":
        return {"d": torch.full((3,), 1 - eps), "s": torch.full((3,), eps), "b": torch.zeros(3)}
    return {"d": torch.tensor(1 - eps), "s": torch.tensor(eps), "b": torch.tensor(0.0)}


@pytest.mark.parametrize("form", ["dense", "lowrank", "banded", "shared"])
def test_label_smoothing_comes_out(form, batch):
    logits, log_probs, targets = batch
    phi = {k: v.double() for k, v in label_smoothing_coefficients(form, 0.2).items()}
    loss = taught_loss(LossSpec(form, "identity"), log_probs, targets, phi)
    expected = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)


def test_bands_are_octaves_of_the_classes_order():
    """Bands of 1, 2, 4, 8 ... classes: 0; 1 and 2; 3 to 6; 7 to 14."""
    found = bands(torch.arange(40_000))
    assert found[:16].tolist() == [0, 1, 1, *[2] * 4, *[3] * 8, 4]
    assert torch.bincount(found)[:-1].tolist() == [2**i for i in range(15)]
    for k in (1, 2, 3, 4, 7, 8, 40_000):
        shapes = coefficient_shapes(LossSpec("banded"), k)
        assert shapes["d"] == (int(bands(torch.tensor(k - 1))) + 1,)


def test_banded_is_a_dense_w_of_its_bands(batch):
    """W = diag(d) + 1 s^T / K with every class's coefficients those of its band."""
    _, log_probs, targets = batch
    generator = torch.Generator().manual_seed(2)
    draw = {"dtype": torch.float64, "generator": generator}
    phi = {name: torch.randn(3, **draw) for name in ("d", "s", "b")}
    band = torch.tensor([0, 1, 1, 2, 2])
    weight = phi["d"][band].diag() + phi["s"][band].expand(5, 5) / 5
    dense = {"W": weight, "b": phi["b"][band]}
    torch.testing.assert_close(
        taught_loss(LossSpec("banded", "sigmoid"), log_probs, targets, phi),
        taught_loss(LossSpec("dense", "sigmoid"), log_probs, targets, dense),
    )


def test_bands_fit_other_vocabularies(batch):
    """Classes beyond the last band count as of it, bands beyond the last class are not used."""
    _, log_probs, targets = batch  # 5 classes, 3 bands
    generator = torch.Generator().manual_seed(3)
    phi = {name: torch.randn(6, generator=generator).double() for name in ("d", "s", "b")}
    spec = LossSpec("banded")
    expected = taught_loss(spec, log_probs, targets, {k: v[:3] for k, v in phi.items()})
    assert torch.equal(taught_loss(spec, log_probs, targets, phi), expected)
    few = {name: value[:2] for name, value in phi.items()}
    stretched = {name: value[torch.tensor([0, 1, 1])] for name, value in phi.items()}
    expected = taught_loss(spec, log_probs, targets, stretched)
    assert torch.equal(taught_loss(spec, log_probs, targets, few), expected)


def test_dense_equals_the_papers_formula(batch):
    """sigma(-log(p)^T W y + b^T y) with y one-hot, written out."""
    _, log_probs, targets = batch
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    y = F.one_hot(targets, 5).double()
    z = torch.einsum("nk,kj,nj->n", -log_probs, weight, y) + y @ bias
    loss = taught_loss(LossSpec("dense", "sigmoid"), log_probs, targets, {"W": weight, "b": bias})
    torch.testing.assert_close(loss, torch.sigmoid(z))


def test_dense_equals_the_demos_form_up_to_a_constant(batch):
    """The authors' demo minimises -mean sigmoid(((log p)^T W + b)_y): 1 - ours at -b."""
    _, log_probs, targets = batch
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    demo = -torch.sigmoid((log_probs @ weight + bias)[torch.arange(8), targets]).mean()
    phi = {"W": weight, "b": -bias}
    ours = taught_loss(LossSpec("dense", "sigmoid"), log_probs, targets, phi).mean()
    torch.testing.assert_close(ours, 1.0 + demo)


@pytest.mark.parametrize("rank", [1, 3])
def test_structured_forms_equal_the_dense_matrix(rank, batch):
    _, log_probs, targets = batch
    generator = torch.Generator().manual_seed(2)
    spec = LossSpec("lowrank", "softplus", rank=rank)
    phi = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in coefficient_shapes(spec, 5).items()
    }
    dense = {"W": torch.diag(phi["d"]) + phi["U"] @ phi["V"].t() / 5, "b": phi["b"]}
    torch.testing.assert_close(
        taught_loss(spec, log_probs, targets, phi),
        taught_loss(LossSpec("dense", "softplus"), log_probs, targets, dense),
    )
    diagonal = {"d": phi["d"], "b": phi["b"]}
    torch.testing.assert_close(
        taught_loss(LossSpec("diagonal", "sigmoid"), log_probs, targets, diagonal),
        taught_loss(
            LossSpec("dense", "sigmoid"), log_probs, targets,
            {"W": torch.diag(phi["d"]), "b": phi["b"]},
        ),
    )


def test_the_confusion_form_is_the_forward_correction_by_its_matrix(batch):
    """Patrini et al. 2017: -log of the label's probability, sum_k P(label y | class k) p_k."""
    _, log_probs, targets = batch
    generator = torch.Generator().manual_seed(2)
    confusion = torch.rand(5, 5, generator=generator, dtype=torch.float64).softmax(1)
    expected = forward_corrected(log_probs, targets, confusion)
    signs = 1 - 2 * torch.eye(5, dtype=torch.float64)  # which do not matter
    phi = {"C": signs * confusion.sqrt(), "d": torch.ones(5, dtype=torch.float64)}
    loss = taught_loss(LossSpec("confusion"), log_probs, targets, phi)
    torch.testing.assert_close(loss, expected)
    weighted = phi | {"d": torch.tensor([2.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64)}
    loss = taught_loss(LossSpec("confusion"), log_probs, targets, weighted)
    torch.testing.assert_close(loss, weighted["d"][targets] * expected)


def test_the_confusion_form_where_a_label_is_impossible():
    """Finite, with finite derivatives, though C or the student gives it no probability."""
    log_probs = torch.tensor([[-1e4, 0.0]]).log_softmax(1).requires_grad_()
    phi = {"C": torch.eye(2).requires_grad_(), "d": torch.ones(2)}
    loss = taught_loss(LossSpec("confusion"), log_probs, torch.tensor([0]), phi)
    assert loss.item() == pytest.approx(-math.log(1e-8))
    for gradient in torch.autograd.grad(loss, (log_probs, phi["C"])):
        assert bool(gradient.isfinite().all())


def any_coefficients(spec):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in coefficient_shapes(spec, 5).items()
    }


def check_names_do_not_matter(spec, log_probs, targets, phi):
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = taught_loss(spec, log_probs[:, order], order.argsort()[targets], phi)
    torch.testing.assert_close(renamed, taught_loss(spec, log_probs, targets, phi))


def test_the_network_form_is_the_shared_one_and_a_small_network(batch):
    """Written out example by example; and the same whatever the classes are called."""
    log_probs, targets = batch[1].detach(), batch[2]
    spec = LossSpec("network", "sigmoid")
    phi = any_coefficients(spec)
    loss = taught_loss(spec, log_probs, targets, phi)
    for row, target, found in zip(log_probs, targets, loss, strict=True):
        log_p, mean, unit = float(row[target]), float(row.mean()), 4.0 * math.log(5)
        inputs = [math.tanh(log_p / unit), math.tanh(mean / unit), math.exp(log_p), 1.0]
        hidden = torch.tensor(inputs, dtype=torch.float64)
        for layer in ("A", "B"):
            hidden = torch.log(1.0 + torch.exp(hidden @ phi[layer])) - math.log(2.0)
        z = hidden @ phi["c"] - phi["d"] * log_p - phi["s"] * mean
        torch.testing.assert_close(found, torch.sigmoid(z))
    check_names_do_not_matter(spec, log_probs, targets, phi)


def test_the_pairwise_form_is_the_shared_one_and_l2t_dlns_network(batch):
    """Written out pair by pair; and the same whatever the classes are called."""
    log_probs, targets = batch[1].detach(), batch[2]
    spec = LossSpec("pairwise", "softplus")
    phi = any_coefficients(spec)
    # The authors' four hidden layers of 40; their fourth input is always nothing.
    network = [phi[name] for name in phi if name not in "ds"]
    assert sum(weight.numel() for weight in network) == 5_000 - 40
    loss = taught_loss(spec, log_probs, targets, phi)
    for row, target, found in zip(log_probs, targets, loss, strict=True):
        q = torch.sigmoid(row - row.mean())
        values = []
        for other in set(range(5)) - {int(target)}:
            hidden = torch.stack([q[target], q[other], torch.ones_like(q[0])])
            for weight in network[:-1]:
                hidden = torch.log(1.0 + torch.exp(hidden @ weight)) - math.log(2.0)
            values.append(hidden @ network[-1])
        z = torch.stack(values).mean() - phi["d"] * row[target] - phi["s"] * row.mean()
        torch.testing.assert_close(found, torch.log1p(torch.exp(z)))
    check_names_do_not_matter(spec, log_probs, targets, phi)


def test_neutral_sigmoid_scales_cross_entropys_gradient(batch):
    """At W = I, b = 0 the gradient is cross-entropy's times p_y / (1 + p_y)^2."""
    logits, log_probs, targets = batch
    spec = LossSpec("dense", "sigmoid")
    loss = taught_loss(spec, log_probs, targets, doubled(neutral_coefficients(spec, 5)))
    taught = torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
    plain = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)[0]
    p = log_probs.exp().gather(1, targets.unsqueeze(1)).detach()
    torch.testing.assert_close(taught, plain * p / (1 + p) ** 2)


def test_warmup_and_mix(batch):
    _, log_probs, targets = batch
    spec = LossSpec("dense", "sigmoid", warmup_steps=3, ce_mix=0.25)
    phi = doubled(neutral_coefficients(spec, 5))
    plain = F.nll_loss(log_probs, targets, reduction="none")
    taught = taught_loss(spec, log_probs, targets, phi)
    torch.testing.assert_close(step_loss(spec, log_probs, targets, phi, 2), plain)
    torch.testing.assert_close(
        step_loss(spec, log_probs, targets, phi, 3), 0.25 * plain + 0.75 * taught
    )
    assert not taught_at(spec, 2)
    assert taught_at(spec, 3)


def test_a_smoothed_warmup(batch):
    logits, log_probs, targets = batch
    spec = LossSpec("dense", "sigmoid", warmup_steps=3, ce_mix=0.25, warmup_smoothing=0.2)
    phi = doubled(neutral_coefficients(spec, 5))
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(step_loss(spec, log_probs, targets, phi, 2), smoothed)
    plain = dataclasses.replace(spec, warmup_smoothing=0.0)
    after = [step_loss(s, log_probs, targets, phi, 3) for s in (spec, plain)]
    assert torch.equal(*after)


def test_unknown_names_are_user_errors(batch):
    _, log_probs, targets = batch
    with pytest.raises(UserError, match="did you mean 'dense'"):
        coefficient_shapes(LossSpec("dens"), 5)
    with pytest.raises(UserError, match="did you mean 'sigmoid'"):
        spec = LossSpec("dense", "sigmoyd")
        taught_loss(spec, log_probs, targets, doubled(neutral_coefficients(spec, 5)))


@pytest.mark.parametrize("form", FORMS.names())
@pytest.mark.parametrize("constant", [False, True], ids=["phi learns", "phi is constant"])
def test_every_form_is_twice_differentiable(form, constant):
    """In the logits and in phi together, as the hypergradient needs them."""
    spec = LossSpec(form, "softplus", rank=2)
    generator = torch.Generator().manual_seed(3)
    draw = {"dtype": torch.float64, "generator": generator}
    logits = torch.randn(3, 5, **draw).requires_grad_()
    targets = torch.tensor([0, 2, 2])
    shapes = coefficient_shapes(spec, 5)
    phi = [torch.rand(shape, **draw).requires_grad_(not constant) for shape in shapes.values()]

    def losses(logits, *parts):
        named = dict(zip(shapes, parts, strict=True))
        return step_loss(spec, logits.log_softmax(1), targets, named, 0)

    assert torch.autograd.gradcheck(losses, (logits, *phi))
    # Along random directions where phi has thousands of numbers: one by one takes minutes.
    many = not constant and sum(part.numel() for part in phi) > 1000
    assert torch.autograd.gradgradcheck(losses, (logits, *phi), fast_mode=many)


@pytest.mark.parametrize("form", FORMS.names())
@pytest.mark.parametrize("low", [d for d in (torch.bfloat16, torch.float16) if knows_autocast(d)])
def test_autocast_does_not_touch_the_loss(form, low):
    """fairseq's --amp and torch's loops compute the loss inside autocast, from float32."""
    spec = LossSpec(form, "identity", rank=2)
    classes = 50 if FORMS.get(form).for_pairs else 20_000
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, classes, generator=generator)
    targets = torch.randint(classes, (4,), generator=generator)
    direction = torch.randn(4, classes, generator=generator)
    phi = {
        name: part + 0.1 * torch.randn(part.shape, generator=generator)
        for name, part in neutral_coefficients(spec, classes).items()
    }

    def loss_and_gradients():
        log_probs = torch.log_softmax(logits.float(), 1).requires_grad_()
        named = {name: part.clone().requires_grad_() for name, part in phi.items()}
        loss = taught_loss(spec, log_probs, targets, named).mean()
        (gradient,) = torch.autograd.grad(loss, log_probs, create_graph=True)
        inputs = [log_probs, *named.values()]
        second = torch.autograd.grad((gradient * direction).sum(), inputs, materialize_grads=True)
        return loss, gradient, *second

    plain = loss_and_gradients()
    with torch.autocast("cpu", low):
        cast = loss_and_gradients()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)
    halved = taught_loss(spec, torch.log_softmax(logits, 1).to(low), targets, phi)
    assert bool(halved.isfinite().all()) and halved.dtype == torch.float32


@pytest.mark.parametrize("p_y", [0.1, 0.5, 0.99])
def test_the_pull_at_an_example(p_y):
    """1 for cross-entropy; label smoothing's, and the sigmoid's at its start, by hand."""
    for form in FORMS.names():
        phi = neutral_coefficients(LossSpec(form), 5)
        pull = pull_beside_cross_entropy(LossSpec(form), phi, 5, p_y)
        targets = 3 if form == "banded" else 5  # one of each band
        assert pull.tolist() == pytest.approx([1.0] * targets)
    smooth = label_smoothing_coefficients("shared", 0.2)
    pull = pull_beside_cross_entropy(LossSpec("shared"), smooth, 5, p_y)
    by_hand = (p_y - 0.84) / (p_y - 1.0)  # the target's label is 0.8 + 0.2 / 5
    assert pull.tolist() == pytest.approx([by_hand] * 5)
    spec = LossSpec("dense", "sigmoid", warmup_steps=7)
    pull = pull_beside_cross_entropy(spec, neutral_coefficients(spec, 5), 5, p_y, most=2)
    assert pull.tolist() == pytest.approx([p_y / (1.0 + p_y) ** 2] * 2)
    phi = neutral_coefficients(LossSpec("network"), 5)
    many = pull_beside_cross_entropy(LossSpec("network"), phi, 1_000_000, p_y, most=1)
    assert many.tolist() == pytest.approx([1.0])
