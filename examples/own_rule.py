"""LaProp as a rule of your own: its formula on one parameter, checked and run.

    python examples/own_rule.py

LaProp (Ziyin et al. 2020, arXiv:2002.04839) is Adam with the momentum taken of the
normalized updates:

    v <- b2 * v + (1 - b2) * u^2
    m <- b1 * m + (1 - b1) * u / (sqrt(v / (1 - b2^t)) + eps)
    u <- m / (1 - b1^t)
"""

from __future__ import annotations

from dataclasses import KW_ONLY
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, zeros_like

import functional_optim as fo
from functional_optim import Pair, Scalar, flag, hyperparameter, number


class LaPropState(NamedTuple):
    """The state of one parameter."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@final
class LaProp(fo.Rule, scope=fo.Scope.ELEMENTWISE, role=fo.Role.MOMENT):
    """Take the running mean of normalized updates."""

    betas: Pair = hyperparameter(default=(0.9, 0.999), ge=0.0, lt=1.0)
    _: KW_ONLY
    eps: Scalar = hyperparameter(default=1e-15, ge=0.0)
    signed: bool = flag(default=False)

    def init_param(self, p: Tensor) -> LaPropState:
        """Return means of zero."""
        return LaPropState(number(0.0), zeros_like(p), zeros_like(p))

    def update_param(
        self, u: Tensor, s: LaPropState, p: Tensor
    ) -> tuple[Tensor, LaPropState]:
        """Return the corrected mean of normalized updates, or its sign."""
        b1, b2 = self.betas
        t = s.step + 1
        v = fo.addcmul(s.exp_avg_sq * b2, u, u, 1 - b2)
        normalized = u / ((v / (1 - b2**t)).sqrt() + self.eps)
        m = fo.lerp(s.exp_avg, normalized, 1 - b1)
        direction = m.sign() if self.signed else m / (1 - b1**t)
        return direction, LaPropState(t, m, v)


class Halve:
    """A plain class is a transform, too."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(
        self,
        updates: fo.TensorMap,
        state: tuple[()],
        params: fo.TensorMap,
        *,
        context: fo.Context | None = None,
    ) -> tuple[fo.TensorMap, tuple[()]]:
        """Return u / 2."""
        return {name: u / 2 for name, u in updates.items()}, state


def pipeline(lr: fo.Hyperparameter) -> fo.Chain:
    """Return clip, LaProp, decoupled weight decay, learning rate."""
    return fo.chain(
        fo.ClipByGlobalNorm(1.0),
        LaProp((0.9, 0.99), eps=1e-8),
        fo.AddDecayedWeights(0.01),
        Halve(),
        fo.ScaleByLearningRate(lr),
    )


def main(steps: int = 200) -> float:
    """Fit a line; return the last loss."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x = torch.randn(64, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
    schedule = fo.schedules.cosine_decay(0.2, steps)
    optimizer = fo.TransformOptimizer(model.named_parameters(), pipeline(schedule))
    loss: Any = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


if __name__ == "__main__":
    print(f"loss {main():.2e}")
