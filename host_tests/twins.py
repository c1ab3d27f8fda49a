"""The same training with torch's AdamW and with ours, and how far they are apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import functional_optim as fo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

LR = 0.03
DECAY = 0.1
MAX_NORM = 0.05
UPDATES = 8

# In float64 both round differently in the last bits of each update. Where a gradient is
# 0 but for rounding, at most 1e-16, Adam moves by lr * 1e-16 / eps = 3e-10 at most;
# 8 updates of that are 2.4e-9.
FLOAT64 = 3e-9
# With autocast the last bit of a float32 weight can decide how the weight is rounded to
# bfloat16, by 2**-8 of itself. If that moves an update by 2**-8 of its largest value,
# lr, weights part by 0.03 * 2**-8 = 1.2e-4.
BFLOAT16 = 1.2e-4
# What a setting must change to count as having had an effect.
EFFECT = 1e-3


class Trained(NamedTuple):
    """What is left after training.

    Attributes:
        weights: The parameters by name.
        optimizer: The optimizer that was handed to the host.
        loaded: The state of the optimizer after resuming and before the next step.
        rates: The learning rate of the first group in each update.
    """

    weights: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    loaded: list[dict[str, torch.Tensor]]
    rates: list[float]


def theirs(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)


def ours(params: Iterable[Any]) -> torch.optim.Optimizer:
    return fo.TransformOptimizer(params, fo.adamw(LR, weight_decay=DECAY))


def ours_that_clips(params: Iterable[Any]) -> torch.optim.Optimizer:
    rule = fo.chain(fo.ClipByGlobalNorm(MAX_NORM), fo.adamw(LR, weight_decay=DECAY))
    return fo.TransformOptimizer(params, rule)


def network(dtype: torch.dtype = torch.float64) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)]
    return torch.nn.Sequential(*layers).to(dtype)


def examples(
    count: int, dtype: torch.dtype = torch.float64
) -> torch.utils.data.TensorDataset:
    """Return inputs of growing size, so that gradients differ from step to step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator, dtype=dtype)
    x *= torch.linspace(0.3, 3, count, dtype=dtype)[:, None]
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True).sin())


def snapshot(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    """Return a copy of what an optimizer keeps for each parameter, in order."""
    return [
        {key: entry.detach().clone() for key, entry in optimizer.state[p].items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def assert_resumed(resumed: Trained, straight: Trained) -> None:
    """Assert that nothing was lost on the way: bit for bit, moments included."""
    assert resumed.loaded
    for entry in resumed.loaded:
        assert int(entry["step"]) == UPDATES // 2
        assert entry["exp_avg"].any()
        assert entry["exp_avg_sq"].any()
    assert resumed.rates == straight.rates[UPDATES // 2 :]
    assert distance(resumed.weights, straight.weights) == 0.0
    for a, b in zip(
        snapshot(resumed.optimizer), snapshot(straight.optimizer), strict=True
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
