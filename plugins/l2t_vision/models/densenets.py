"""DenseNet-BC for small images (Huang et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2t_core.errors import UserError
from l2t_vision.models.resnets import Shape, convolution, initialise


class DenseNet(nn.Module):
    """DenseNet-BC of ``depth`` = 6n + 4 layers and growth rate k (Huang et al. 2017, section 3).

    A 3 x 3 convolution to 2k channels, three dense blocks of n layers, each a 1 x 1 convolution to
    4k channels (bottleneck) and a 3 x 3 one to k, and between the blocks a 1 x 1 convolution that
    halves the channels (compression 0.5) and average pooling that halves the image. ``dropout``
    follows each convolution of the blocks (section 4.2).

    Raises:
        UserError: if ``depth`` is not 6n + 4 or ``growth`` below 1.
    """

    def __init__(
        self, shape: Shape, num_classes: int, depth: int, growth: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers, rest = divmod(depth - 4, 6)
        if layers < 1 or rest or growth < 1:
            raise UserError(
                f"a DenseNet-BC has 6n + 4 layers (10, 16, 22, ...) and a growth rate of at least "
                f"1, not {depth} and {growth}"
            )
        channels = 2 * growth
        self.stem = convolution(shape[0], channels)
        blocks: list[nn.Module] = []
        for block in range(3):
            for _ in range(layers):
                blocks.append(_DenseLayer(channels, growth, dropout))
                channels += growth
            if block < 2:
                blocks.append(_Transition(channels, channels // 2, dropout))
                channels //= 2
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W]."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _DenseLayer(nn.Module):
    """k new channels, computed from all before them and put beside them."""

    def __init__(self, inputs: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = convolution(4 * growth, growth)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, inputs + k, H, W] of [N, inputs, H, W]."""
        y = self.dropout(self.conv1(F.relu(self.norm1(x))))
        y = self.dropout(self.conv2(F.relu(self.norm2(y))))
        return torch.cat([x, y], 1)


class _Transition(nn.Module):
    """Fewer channels and half the image."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outputs, H / 2, W / 2] of [N, inputs, H, W]."""
        return F.avg_pool2d(self.dropout(self.conv(F.relu(self.norm(x)))), 2)
