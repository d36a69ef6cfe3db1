"""A measure and a loss of the user's own: what a mistake in them says, first and later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from l2t_core.errors import UserError
from l2t_core.own_functions import own_function, try_on_nothing_known

OWN = """
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
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_functions_of_a_test.py").write_text(OWN)


def predictions(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.linspace(-3.0, 3.0, 3 * count).view(count, 3).requires_grad_()
    return logits.log_softmax(1), torch.arange(count) % 3


@pytest.mark.parametrize(("name", "each"), [("losses", True), ("measure", False)])
def test_what_is_right_comes_through(name: str, each: bool) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=each)
    try_on_nothing_known(function, 3)
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
        ("plain", True, "returned ndarray for 4 examples; return a tensor"),
        ("measure", True, r"returned \[\] for 4 examples; return a tensor \[N\] of a loss"),
        ("losses", False, r"returned \[4\] for 4 examples; return a tensor \[\], one number"),
    ],
)
def test_a_mistake_is_told_when_it_is_tried(name: str, each: bool, says: str) -> None:
    function = own_function(f"own_functions_of_a_test:{name}", "the.key", each=each)
    with pytest.raises(UserError, match=f"the.key own_functions_of_a_test:{name} {says}"):
        try_on_nothing_known(function, 3)


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
    try_on_nothing_known(function, 3)
    with pytest.raises(UserError, match=says):
        function(*predictions(6))
