"""Parameters and updates that a law is tried on, and their code."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._context import Context


@dataclasses.dataclass(frozen=True, repr=False)
class Example:
    """Parameters, and the updates of some steps.

    Prints as the code that makes it, so that a failure can be pasted and run.

    Args:
        params: Parameters by name.
        updates: For each step the updates by name; names may be missing.
        contexts: What the loop knows at each step, in turns; nothing if left out.

    Example:
        >>> Example({"w": torch.zeros(2)}, [{"w": torch.ones(2)}])
        Example(
            params={"w": torch.tensor([0.0, 0.0])},
            updates=[{"w": torch.tensor([1.0, 1.0])}],
        )
    """

    params: TensorMap
    updates: Sequence[TensorMap]
    contexts: Sequence[Context] = ()

    @property
    def steps(self) -> list[tuple[TensorMap, Context]]:
        """The updates of each step with its context."""
        turns = self.contexts or (Context(),)
        return [(u, turns[i % len(turns)]) for i, u in enumerate(self.updates)]

    def copied(self) -> Example:
        """Return an example of new tensors with the same numbers."""
        return map_tensors(torch.clone, self)

    def __repr__(self) -> str:
        code = ["Example("]
        code.append(f"    params={_code(self.params)},")
        code.append(f"    updates={_code(list(self.updates))},")
        if self.contexts:
            code.append(f"    contexts={_code(list(self.contexts))},")
        return "\n".join([*code, ")"])


def map_tensors(function: Callable[[Tensor], Tensor], example: Example) -> Example:
    """Apply a function to each parameter and update of an example."""
    params, *updates = [
        {name: function(x) for name, x in tensors.items()}
        for tensors in (example.params, *example.updates)
    ]
    return dataclasses.replace(example, params=params, updates=updates)


def _code(value: Any) -> str:
    """Return the expression that makes a part of an example."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
        if value.numel() == 0:
            return f"torch.zeros({tuple(value.shape)}{dtype})"
        return f"torch.tensor({_code(value.detach().tolist())}{dtype})"
    if isinstance(value, dict):
        pairs = [f'"{name}": {_code(x)}' for name, x in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, Context):
        fields = {f.name: f.default for f in dataclasses.fields(value)}
        given = {name: getattr(value, name) for name in fields}
        changed = [f"{n}={_code(x)}" for n, x in given.items() if x is not fields[n]]
        return f"Context({', '.join(changed)})"
    if isinstance(value, list):
        items = [_code(item) for item in value]
        line = f"[{', '.join(items)}]"
        if len(line) <= 72 or not isinstance(value[0], (dict, Context)):
            return line
        return "\n".join(["[", *(f"        {item}," for item in items), "    ]"])
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)


SHAPES: Mapping[str, tuple[int, ...]] = {
    "a.weight": (3, 2),
    "a.bias": (3,),
    "b.weight": (2, 1, 2),
    "scale": (),
    "empty": (0, 2),
}
"""The parameters that a transform is tried on if its author passes none."""


def default_params() -> TensorMap:
    """Return zeros of `SHAPES`."""
    return {
        name: torch.zeros(shape, dtype=torch.float64, device="cpu")
        for name, shape in SHAPES.items()
    }


def fixed_examples(params: TensorMap | None, *, full: bool = False) -> list[Example]:
    """Return three examples of two to four steps, the same on every machine."""
    params = default_params() if params is None else params
    names = list(params)
    made = []
    for number, count in enumerate((2, 4, 4)):  # The shortest first, to be read.
        steps = [numbers_like(params, 7 * number + step + 1) for step in range(count)]
        if not full and len(names) > 1:
            del steps[1][names[1]]
            steps[2:3] = [{name: x[name] for name in names[-2:]} for x in steps[2:3]]
        last = [Context()] * (count - 1) + [Context(last=True)]
        contexts = last if number == 2 else ()
        made.append(Example(numbers_like(params, 50 + number), steps, contexts))
    return made


def numbers_like(params: TensorMap, key: int) -> TensorMap:
    """Return numbers from 0.1 to 2, of both signs, without a pattern that a law uses.

    Fractions of multiples of the golden ratio: spread evenly, equal on every machine.
    """
    made = {}
    start = 1009.0 * key
    for name, p in params.items():
        index = torch.arange(p.numel(), dtype=torch.float64) + start
        start += p.numel()
        fraction = (index * ((5.0**0.5 - 1) / 2)).frac()
        sign = torch.where((index * 2.0**0.5).frac() < 0.5, -1.0, 1.0)
        # In 64ths, which are short to print and exact in every dtype.
        numbers = sign * (6 + (122 * fraction).floor()) / 64
        made[name] = numbers.to(p.dtype).reshape(p.shape)
    return made
