"""The parameter shapes of models that benchmarks stand on; nothing is downloaded."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Shapes: TypeAlias = list[tuple[int, ...]]


def resnet50_shapes() -> Shapes:
    """Return the parameter shapes of torchvision's ResNet-50, in order."""
    return [*_convolutions((3, 4, 6, 3), 64), (1000, 2048), (1000,)]


def resnet152_shapes(width: int = 64) -> Shapes:
    """Return those of a ResNet-152 without its head: 465 parameters.

    Args:
        width: How many channels the first convolution has.
    """
    return _convolutions((3, 8, 36, 3), width)


def _convolutions(blocks: tuple[int, ...], width: int) -> Shapes:
    shapes: Shapes = [(width, 3, 7, 7), (width,), (width,)]
    inputs = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for block in range(count):
            for shape in (
                (inner, inputs, 1, 1),
                (inner, inner, 3, 3),
                (4 * inner, inner, 1, 1),
            ):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                downsample = (4 * inner, inputs, 1, 1)
                shapes += [downsample, downsample[:1], downsample[:1]]
            inputs = 4 * inner
    return shapes


def gpt2_shapes() -> Shapes:
    """Return the parameter shapes of GPT-2 124M in order; the tied head stands once."""
    width = 768
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [*norm]
    block += [(width, 3 * width), (3 * width,), (width, width), (width,)]
    block += norm
    block += [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *block * 12, *norm]


def vit_shapes() -> Shapes:
    """Return the parameter shapes of torchvision's ViT-B/16 in order: 152 of them."""
    width, inner = 768, 3072
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [*norm]
    block += [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += norm
    block += [(inner, width), (inner,), (width, inner), (width,)]
    patches: Shapes = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*patches, *block * 12, *norm, (1000, width), (1000,)]


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
