"""The parameter shapes of models that benchmarks stand on; nothing is downloaded."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Shapes: TypeAlias = list[tuple[int, ...]]


def resnet50_shapes() -> Shapes:
    """Return the parameter shapes of torchvision's ResNet-50, in order."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in (
                (width, inputs, 1, 1),
                (width, width, 3, 3),
                (4 * width, width, 1, 1),
            ):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                downsample = (4 * width, inputs, 1, 1)
                shapes += [downsample, downsample[:1], downsample[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_shapes() -> Shapes:
    """Return the parameter shapes of GPT-2 124M in order; the tied head stands once."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [*norm]
    block += [(width, 3 * width), (3 * width,), (width, width), (width,)]
    block += norm
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * 12, *norm]


def small_shapes() -> Shapes:
    """Return 1000 small parameters, 0.5 M elements: 500 layers Linear(31, 32)."""
    return [(32, 31), (32,)] * 500


def tiny_shapes() -> Shapes:
    """Return the parameters of an MLP of three layers, 32-64-64-10."""
    return [(64, 32), (64,), (64, 64), (64,), (10, 64), (10,)]


def tensors(shapes: Shapes, scale: float, seed: int) -> list[Tensor]:
    """Return random tensors of the given shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator) for shape in shapes]
