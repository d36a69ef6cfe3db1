"""A measure and a loss of the user's own: what a mistake in them says, first and later."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.own_functions import Function, own_function, try_out

OWN = """
import random
import numpy as np
import torch

def losses(log_probs, targets):
    return -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)

def measure(log_probs, targets):
    return -losses(log_probs, targets).mean()

def fails_later(log_probs, targets):
    if len(targets) > 4:
        raise ValueError("four at most")
    return losses(log_probs, targets)

def mean_later(log_probs, targets):
    found = losses(log_probs, targets)
    return found if len(targets) == 4 else found.mean()

def columns_later(log_probs, targets):
    found = losses(log_probs, targets)
    return found if len(targets) == 4 else found.unsqueeze(1)

def moves_targets(log_probs, targets):
    found = losses(log_probs, targets)
    targets += 1
    return found

def clamps(log_probs, targets):
    if not log_probs.is_leaf:
        log_probs.clamp_(min=-5.0)
    return losses(log_probs, targets)

def decides(log_probs, targets):
    return (log_probs.argmax(1) == targets).double()

def plain(log_probs, targets):
    return losses(log_probs, targets).detach().numpy()

def ends(log_probs, targets):
    raise SystemExit(3)

def pythons(log_probs, targets):
    return random.random() * losses(log_probs, targets)

def numpys(log_probs, targets):
    return losses(log_probs, targets) + np.random.normal()

def numpys_subset(log_probs, targets):  # of four, all four
    chosen = np.sort(np.random.permutation(len(targets))[:4])
    return -losses(log_probs, targets)[chosen].mean()

generator = np.random.default_rng(1)

def its_own(log_probs, targets):
    return losses(log_probs, targets) * (1 + (generator.random() < 0.5))

def torchs(log_probs, targets):
    return -(torch.rand(len(targets)) * losses(log_probs, targets)).mean()

def no_number(log_probs, targets):
    return losses(log_probs, targets) * float("nan")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_functions_of_a_test.py").write_text(OWN)


def tried(function: Function) -> None:
    try_out(function, 3, "the.key name")


def predictions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.linspace(-3.0, 3.0, 3 * count).view(count, 3).requires_grad_()
    return logits.log_softmax(1), torch.arange(count) % 3


@pytest.mark.parametrize(("name", "each"), [("losses", True), ("measure", False)])
def test_what_is_right_comes_through(name: str, each: bool) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=each)
    tried(function)
    log_probs, targets = predictions(6)
    expected = -log_probs[torch.arange(6), targets]
    torch.testing.assert_close(
        function(log_probs, targets), expected if each else -expected.mean()
    )
    with torch.no_grad():  # a measure is read without a gradient, too
        function(log_probs.detach(), targets)


@pytest.mark.parametrize(
    ("name", "each", "says"),
    [
        ("moves_targets", True, "changes what it is given in place; work on a copy"),
        ("decides", True, r"returned \[4\] for 4 examples; .* made of the log-probabilities"),
        ("ends", True, r"SystemExit: 3; it is called with log-probabilities"),
        ("plain", True, "returned ndarray for 4 examples; return a tensor"),
        ("measure", True, r"returned \[\] for 4 examples; return a tensor \[N\] of a loss"),
        ("losses", False, r"returned \[4\] for 4 examples; return a tensor \[\], one number"),
    ],
)
def test_a_mistake_is_told_when_it_is_tried(name: str, each: bool, says: str) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=each)
    with pytest.raises(UserError, match=f"the.key own_functions_of_a_test:{name}:? {says}"):
        tried(function)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails_later", "ValueError: four at most; it is called with log-probabilities"),
        ("mean_later", r"returned \[\] for 6 examples"),
        ("columns_later", r"returned \[6, 1\] for 6 examples"),
        ("clamps", "changes what it is given in place"),
    ],
)
def test_a_mistake_that_only_shows_later_is_told_then(name: str, says: str) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=True)
    tried(function)
    with pytest.raises(UserError, match=says):
        function(*predictions(6))


@pytest.mark.parametrize(
    ("name", "each"),
    [("pythons", True), ("numpys", True), ("numpys_subset", False), ("its_own", True)],
)
def test_what_no_run_repeats_is_refused(name: str, each: bool) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=each)
    with pytest.raises(UserError, match=r"^the.key name is not the same for the same predictions"):
        tried(function)


@pytest.mark.parametrize(("name", "each"), [("torchs", False), ("no_number", True)])
def test_what_torchs_seed_repeats_may_be_drawn(name: str, each: bool) -> None:
    states = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    tried(own_function(f"own_functions_of_a_test:{name}", "the.key", each=each))
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tobytes())
    assert torch.equal(states[2], torch.get_rng_state())
