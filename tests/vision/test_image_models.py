"""Image models: published sizes, shapes, second derivatives."""

from __future__ import annotations

import pytest
import torch

from l2t_core.errors import UserError
from l2t_vision.models import MODELS
from l2t_vision.recipe import ImageSpec


@pytest.mark.parametrize(
    "name, shape, parameters",
    [
        ("mlp", (1, 28, 28), 397_510),
        ("lenet", (1, 28, 28), 431_080),
        # 9*16 + 2*16 + 9*16*32 + 2*32 + 33*10
        ("convnet", (1, 28, 28), 5_178),
    ],
)
def test_parameter_counts(name: str, shape: tuple[int, int, int], parameters: int) -> None:
    model = MODELS.get(name)(shape, 10, ImageSpec(hidden=500))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "name, shape", [("mlp", (3, 7, 5)), ("lenet", (3, 16, 19)), ("convnet", (1, 8, 8))]
)
def test_models_take_other_images(name: str, shape: tuple[int, int, int]) -> None:
    model = MODELS.get(name)(shape, 7, ImageSpec(hidden=11, dropout=0.5))
    assert model(torch.randn(4, *shape)).shape == (4, 7)


def test_lenet_refuses_images_that_are_too_small() -> None:
    with pytest.raises(UserError, match="at least 16 x 16 pixels, these are 8 x 8"):
        MODELS.get("lenet")((1, 8, 8), 10, ImageSpec())


@pytest.mark.parametrize("name", MODELS.names())
def test_dropout_is_optional_and_only_in_training(name: str) -> None:
    x = torch.randn(2, 1, 20, 20)
    plain = MODELS.get(name)((1, 20, 20), 10, ImageSpec(dropout=0.0))
    assert torch.equal(plain(x), plain(x))
    dropping = MODELS.get(name)((1, 20, 20), 10, ImageSpec(dropout=0.5))
    assert not torch.equal(dropping(x), dropping(x))
    dropping.eval()
    assert torch.equal(dropping(x), dropping(x))
