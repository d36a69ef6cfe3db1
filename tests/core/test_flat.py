"""What cannot be part of one vector of parameters is refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from l2t_core.errors import UserError
from l2t_core.specs import OptimiserSpec
from l2t_core.students.flat import FlatParameters
from l2t_core.students.life import Life


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(3, 2, sparse=True), "Embedding 'part' has sparse=True"),
        (lambda: nn.LazyLinear(2), "'part.weight' has no shape yet"),
        (
            lambda: nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]),
            "'part.0' is torch.complex64",
        ),
    ],
    ids=["sparse", "lazy", "complex"],
)
def test_what_cannot_be_part_of_one_vector_is_named(make, message):
    module = nn.Linear(2, 2)
    module.part = make()
    with pytest.raises(UserError, match=message):
        FlatParameters(module)


def test_parameters_that_share_memory_are_not_parted_without_a_word():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data = module[0].weight.data.t()
    with pytest.raises(UserError, match=r"'0.weight' and '1.weight' share memory"):
        FlatParameters(module)
    module[1].weight = module[0].weight
    FlatParameters(module)
    FlatParameters(module)  # whose parameters are views of one vector now
    block = torch.randn(3, 6)  # interleaved, but apart
    module[1].weight = nn.Parameter(block[:, :3])
    module[0].weight = nn.Parameter(block[:, 3:])
    FlatParameters(module)
    row = torch.randn(16)  # the last two of one are the first of the other
    module[0].weight = nn.Parameter(row[:9].view(3, 3))
    module[1].weight = nn.Parameter(row[7:].view(3, 3))
    with pytest.raises(UserError, match=r"'0.weight' and '1.weight' share memory"):
        FlatParameters(module)


@pytest.mark.parametrize("how", ["module", "layer", "data", "fewer"])
def test_a_reset_that_replaces_parameters_is_told(make_student, how):
    """What then was trained was no longer the module."""
    student = make_student("mlp", OptimiserSpec("sgd", 0.1))
    reset = student.reset

    def replacing(seed):
        reset(seed)
        if how == "module":
            student.module = student.make().double()
        elif how == "layer":
            student.module.layers[0] = nn.Linear(6, 5).double()
        elif how == "data":
            student.module.layers[0].weight.data = torch.ones(5, 6, dtype=torch.float64)
        else:
            student.module.layers[0].weight.requires_grad_(False)

    life = Life(student)
    life.begin(1)
    life.begin(2)
    student.reset = replacing
    name = "fewer parameters" if how == "fewer" else "a new parameter 'layers.0.weight'"
    with pytest.raises(UserError, match=f"reset puts {name} in its module; fill those"):
        life.begin(3)
