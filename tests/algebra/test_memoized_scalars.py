"""What is the same in all units of a step is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functional_optim as fo
from functional_optim import schedules
from functional_optim.algebra._scalars import memoize_scalars, memoized
from functional_optim.execution import _units


class CountNumbers(TorchDispatchMode):
    """Counts operations whose results are single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 1:
            self.count += 1
        return result


def _stepped(num_units: int, transform: fo.Transform) -> fo.TransformOptimizer:
    params = [torch.nn.Parameter(torch.ones(100)) for _ in range(num_units)]
    for param in params:
        param.grad = torch.ones(100)
    optimizer = fo.TransformOptimizer(params, transform)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "transform",
    [
        fo.adamw(0.1, amsgrad=True, weight_decay=0.1),
        fo.adam(schedules.cosine_decay(0.1, 10)),
        fo.sgd(0.1, momentum=0.9, dampening=0.1),
        fo.chain(fo.Accumulate(1), fo.adam(0.1)),
        fo.chain(fo.Unscale(torch.tensor(4.0)), fo.sgd(0.1)),
    ],
    ids=str,
)
def test_numbers_are_computed_once_for_all_units(
    transform: fo.Transform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_units.UNIT_BYTES, "cpu", 400)
    counts = []
    for num_units in (2, 8):
        optimizer = _stepped(num_units, transform)
        with CountNumbers() as counted:
            optimizer.step()
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_a_schedule_is_asked_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_units.UNIT_BYTES, "cpu", 400)
    asked: list[float] = []

    def schedule(step: Tensor) -> Tensor:
        asked.append(step.item())
        return 0.1 / (1 + step)

    optimizer = _stepped(5, fo.sgd(schedule))
    asked.clear()
    optimizer.step()
    assert asked == [1.0, 2.0]  # The second is what groups show.


def test_outside_of_a_step_nothing_is_remembered() -> None:
    one = torch.tensor(1.0)
    assert memoized(torch.exp, one) is not memoized(torch.exp, one)
    with memoize_scalars():
        first = memoized(torch.exp, one)
    with memoize_scalars():
        assert memoized(torch.exp, one) is not first


def test_what_is_equal_is_told_from_what_is_the_same() -> None:
    with memoize_scalars():
        one, other = torch.tensor(1.0), torch.tensor(1.0)
        assert memoized(torch.exp, one) is not memoized(torch.exp, other)
        assert memoized(torch.mul, one, 2.0) is memoized(torch.mul, one, 1.0 + 1.0)
        assert memoized(torch.mul, one, 3.0) is not memoized(torch.mul, one, 2.0)


def test_inputs_are_kept_so_that_no_other_takes_their_address() -> None:
    with memoize_scalars():
        found = {memoized(torch.neg, torch.tensor(float(i))).item() for i in range(50)}
    assert found == {-float(i) for i in range(50)}


@pytest.mark.parametrize("pushed", [(0,), (1, 2), (0, 2)])
def test_large_parameters_count_their_own_steps(
    pushed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_units.UNIT_BYTES, "cpu", 400)
    optimizer = _stepped(3, fo.adam(0.1))
    params = optimizer.param_groups[0]["params"]
    for index, param in enumerate(params):
        param.grad = torch.ones(100) if index in pushed else None
    optimizer.step()
    steps = [optimizer.state[param]["step"].item() for param in params]
    assert steps == [2.0 if index in pushed else 1.0 for index in range(3)]
