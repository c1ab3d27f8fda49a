"""Real models for whole training steps, in torch alone and with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, BLOCKS, WORDS, CONTEXT = 768, 12, 12, 50257, 1024


class Deep(nn.Sequential):
    """500 layers Linear(32, 32) with tanh: all overhead, no work."""

    def __init__(self, layers: int = 500) -> None:
        pairs = [(nn.Linear(32, 32), nn.Tanh()) for _ in range(layers)]
        super().__init__(*(layer for pair in pairs for layer in pair))

    def loss(self, batch: Tensor) -> Tensor:
        """Return a loss."""
        result: Tensor = self(batch).square().mean()
        return result


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut.

    Args:
        inputs: Channels that come in; four times `inner` go out.
        inner: Channels in between.
        stride: Of the middle convolution.
    """

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *convolution(inputs, inner, 1),
            nn.ReLU(inplace=True),
            *convolution(inner, inner, 3, stride),
            nn.ReLU(inplace=True),
            *convolution(inner, 4 * inner, 1),
        )
        is_same = stride == 1 and inputs == 4 * inner
        self.shortcut = nn.Sequential(
            *(() if is_same else convolution(inputs, 4 * inner, 1, stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes on."""
        return functional.relu(self.body(x) + self.shortcut(x))


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Return a convolution and its batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class ResNet50(nn.Module):
    """ResNet-50, with the parameters of torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [*convolution(3, 64, 7, 2), nn.ReLU(inplace=True)]
        layers.append(nn.MaxPool2d(3, 2, 1))
        inputs = 64
        for stage, count in enumerate((3, 4, 6, 3)):
            inner = 64 * 2**stage
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                layers.append(Bottleneck(inputs, inner, stride))
                inputs = 4 * inner
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
        self.layers = nn.Sequential(*layers)

    def loss(self, batch: Tensor) -> Tensor:
        """Return a loss."""
        labels = torch.arange(len(batch), device=batch.device)
        return functional.cross_entropy(self.layers(batch), labels)


class Block(nn.Module):
    """Attention and a layer of neurons, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.neurons = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what goes on."""
        given = self.queries_keys_values(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in given)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(-3, -2).flatten(-2))
        moved: Tensor = x + self.neurons(self.norm_2(x))
        return moved


class GPT2(nn.Module):
    """GPT-2 124M; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def loss(self, batch: Tensor) -> Tensor:
        """Return the loss of the next token."""
        x = self.words(batch) + self.places.weight[: batch.shape[-1]]
        logits = self.norm(self.blocks(x)) @ self.words.weight.T
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        )


def deep_batch() -> Tensor:
    """Return 8 inputs of `Deep`."""
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(2))


def image_batch() -> Tensor:
    """Return 2 small images."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def token_batch() -> Tensor:
    """Return a text of 64 tokens."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(WORDS, (1, 64), generator=generator)
