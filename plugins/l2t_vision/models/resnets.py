"""Residual networks for small images: the CIFAR form of He et al. 2016, and wide ones."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from l2t_core.errors import UserError

Shape = tuple[int, int, int]


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers for small images (He et al. 2016, section 4.2).

    A 3 x 3 convolution, three stages of n blocks with 16, 32 and 64 channels, the second and
    third of which halve the image, global average pooling and one linear layer. Shortcuts have no
    parameters (option A). Without dropout it is the published net: 0.27M parameters at depth 20.

    Raises:
        UserError: if ``depth`` is not 6n + 2.
    """

    def __init__(self, shape: Shape, num_classes: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise UserError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, ...), not {depth}")
        self.stem = convolution(shape[0], 16)
        self.norm = nn.BatchNorm2d(16)
        stages: list[nn.Module] = []
        inputs = 16
        for outputs in (16, 32, 64):
            for _ in range(blocks):
                stages.append(_PlainShortcutBlock(inputs, outputs))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W]."""
        x = self.stages(F.relu(self.norm(self.stem(x))))
        return self.head(self.dropout(x.mean((2, 3))))


class _PlainShortcutBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut without parameters.

    Where the channels grow, the shortcut takes every other pixel and pads the new channels with
    zeros (option A).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.padding = (outputs - inputs) // 2
        self.conv1 = convolution(inputs, outputs, self.stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outputs, H / stride, W / stride] of [N, inputs, H, W]."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *2 * [self.padding]))
        return F.relu(x + y)


class WideResNet(nn.Module):
    """A wide ResNet of 6n + 4 layers: WRN-depth-width (Zagoruyko and Komodakis 2016, table 1).

    A 3 x 3 convolution to 16 channels, three groups of n pre-activation blocks with 16, 32 and 64
    times ``width`` channels; where the channels change, the shortcut is a 1 x 1 convolution.
    ``dropout`` sits between the convolutions of a block (section 2.4).

    Raises:
        UserError: if ``depth`` is not 6n + 4 or ``width`` below 1.
    """

    def __init__(
        self, shape: Shape, num_classes: int, depth: int, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest or width < 1:
            raise UserError(
                f"a wide ResNet has 6n + 4 layers (10, 16, 22, ...) and a width of at least 1, not "
                f"{depth} and {width}"
            )
        self.stem = convolution(shape[0], 16)
        groups: list[nn.Module] = []
        inputs = 16
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if group and not block else 1
                groups.append(_WideBlock(inputs, outputs, stride, dropout))
                inputs = outputs
        self.groups = nn.Sequential(*groups)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, K] of images [N, C, H, W]."""
        x = F.relu(self.norm(self.groups(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _WideBlock(nn.Module):
    """Batch norm, ReLU and 3 x 3 convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = convolution(inputs, outputs, stride)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = convolution(outputs, outputs)
        self.shortcut: nn.Module | None = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outputs, H / stride, W / stride] of [N, inputs, H, W]."""
        active = F.relu(self.norm1(x))
        y = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        return y + (x if self.shortcut is None else self.shortcut(active))


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the image's size at stride 1, without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def initialise(module: nn.Module) -> None:
    """Draw convolutions as He et al. 2015 do, by their outputs; set the last layer's bias to 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
