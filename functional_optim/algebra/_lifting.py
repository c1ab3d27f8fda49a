"""Run a formula on one parameter on all parameters of a map.

Parameters whose tensors have the same dtypes are computed together. What follows from
numbers alone, hyperparameters and counts, is computed once for all that share them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functional_optim.algebra._buffers import Donated
from functional_optim.algebra._norms import norms
from functional_optim.algebra._recording import Program, record
from functional_optim.algebra._running import run_numbers, run_tensors
from functional_optim.algebra._scalars import memoized, shared_rows
from functional_optim.algebra._tensor_map import TensorMap, can_use_foreach, lookup


def lift(
    program: Program,
    inputs: Sequence[Any],
    like: Sequence[Sequence[int]],
    totals: Mapping[int, Tensor] | None = None,
    *,
    apart: bool = False,
) -> list[TensorMap]:
    """Return the results of a program as maps, with the names of its first input.

    Inputs are a map for each tensor, and for each number a float, a 0-dim tensor, or a
    map of these; None for what is not read. `like` has for each result the inputs in
    whose widest dtype it is. `apart` says that numbers differ by name, not by history.
    """
    names = list(inputs[0])
    columns: dict[int, Any] = {}
    owned: set[int] = set()
    for index, given in enumerate(inputs):
        if isinstance(given, dict):
            columns[index] = lookup(given, names)
            if type(given) is Donated:
                owned.add(index)
        elif given is not None:
            columns[index] = given
    groups = _groups(program, columns) if len(names) > 1 else [names]
    if len(groups) == 1:
        results = _run_alike(program, columns, like, totals or {}, owned, apart=apart)
        return [dict(zip(names, result, strict=True)) for result in results]
    merged: list[TensorMap] = [dict.fromkeys(names, columns[0][0]) for _ in like]
    for rows in groups:
        part = {
            index: [column[row] for row in rows] if isinstance(column, list) else column
            for index, column in columns.items()
        }
        new = _run_alike(program, part, like, totals or {}, set(owned), apart=apart)
        for result, entries in zip(merged, new, strict=True):
            result.update(zip([names[row] for row in rows], entries, strict=True))
    return merged


def _groups(program: Program, columns: Mapping[int, Any]) -> Sequence[Any]:
    """Return the rows in groups whose tensors have the same dtypes.

    And the same kinds of numbers: torch rounds x + a * y once if a is a number, and
    twice if it is a tensor. What a name has must not depend on what others have.
    """
    tensors = [c for i, c in columns.items() if not program.is_number[i]]
    numbers = [c for i, c in columns.items() if program.is_number[i]]
    numbers = [column for column in numbers if isinstance(column, list)]
    kinds = [len(set(map(type, column))) for column in numbers]
    if len({x.dtype for x in itertools.chain(*tensors)}) == max(kinds, default=1) == 1:
        return [()]
    keys = [[x.dtype for x in column] for column in tensors]
    keys += [[isinstance(x, Tensor) for x in column] for column in numbers]
    groups: dict[Any, list[int]] = {}
    for row, key in enumerate(zip(*keys, strict=True)):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _run_alike(
    program: Program,
    columns: Mapping[int, Any],
    like: Sequence[Sequence[int]],
    totals: Mapping[int, Tensor],
    owned: set[int],
    *,
    apart: bool,
) -> list[list[Tensor]]:
    """Return the results for columns that are each of one dtype."""
    first, count = columns[0], len(columns[0])
    values = {i: c for i, c in columns.items() if not program.is_number[i]}
    foreach = can_use_foreach(list(itertools.chain(*values.values())))
    dtypes = {index: column[0].dtype for index, column in values.items()}
    wide = dtypes[0]
    are_mixed = len(set(dtypes.values())) > 1
    if are_mixed:
        wide = _widest(list(dtypes.values()))
        for index, dtype in dtypes.items():
            if dtype != wide:
                values[index] = [tensor.to(wide) for tensor in values[index]]
                owned.add(index)
    has_scalars = 0 in map(Tensor.dim, first)
    if has_scalars:
        # torch promotes a 0-dim tensor by a 0-dim number, and rounds otherwise.
        for index, column in values.items():
            values[index] = [x if x.ndim else x.reshape(1) for x in column]
    known = dict(totals)
    for total in program.totals:
        if total.per_tensor:
            part = dict(values)
            _numbers(total.program, columns, known, apart=apart).add_to(part, wide)
            run_tensors(total.program, part, set(), foreach=foreach, count=count)
            known[total.register] = norms(part[total.program.results[0]], total.op)
    numbers = _numbers(program, columns, known, apart=apart)
    numbers.add_to(values, wide)
    run_tensors(program, values, owned, foreach=foreach, count=count)
    if program.counting and (apart or program.has_norms):
        # Counts stay shared where other numbers differ by name.
        numbers = _numbers(program.counting, columns, known, apart=False)
    results: list[list[Tensor]] = []
    for register, sources in zip(program.results, like, strict=True):
        if program.is_number[register]:
            results.append(numbers.entries(register, first))
            continue
        column = values[register]
        if are_mixed:
            dtype = _widest([dtypes[source] for source in sources])
            column = [tensor.to(dtype) for tensor in column]
        if has_scalars:
            pairs = zip(column, first, strict=True)
            column = [tensor.reshape(own.shape) for tensor, own in pairs]
        results.append(column)
    return results


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


class _Numbers(NamedTuple):
    """The numbers of a program: one row for all names with the same history."""

    program: Program
    values: tuple[Any, ...]
    """Those that cross: a float, a 0-dim tensor, or one for each row."""
    rows: Sequence[int]
    """The row of each name, if there are rows."""

    def add_to(self, values: dict[int, Any], wide: torch.dtype) -> None:
        """Add what tensors take: a float, a 0-dim tensor, or one for each name."""
        for register, value in zip(self.program.crossing, self.values, strict=True):
            values[register] = value
            if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
                entries = self._rows_of(value)
                values[register] = [entries[row] for row in self.rows]
            elif isinstance(value, Tensor) and wide == torch.float32:
                # Foreach is faster so, and no bit of a float32 result differs.
                values[register] = memoized(_single, value)

    def entries(self, register: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Return a number as the entry of each name, shared where the history is."""
        value = self.values[self.program.crossing.index(register)]
        if not isinstance(value, Tensor):
            dtype = torch.bool if isinstance(value, bool) else torch.float64
            value = memoized(_filled, value, dtype, like[0].device)
        elif value.dtype != torch.bool:
            value = memoized(Tensor.double, value)
        if not value.ndim:
            return [value] * len(like)
        entries = self._rows_of(value)
        return [entries[row] for row in self.rows]

    def _rows_of(self, value: Any) -> Any:
        return memoized(Tensor.unbind, value) if isinstance(value, Tensor) else value


def _numbers(
    program: Program,
    columns: Mapping[int, Any],
    totals: Mapping[int, Tensor],
    *,
    apart: bool,
) -> _Numbers:
    """Return the numbers of a program."""
    inputs: list[Any] = []
    by_name: list[int] = []
    for place, register in enumerate(program.given):
        given = totals[register] if register in totals else columns[register]
        if isinstance(given, list):
            by_name.append(place)
        elif isinstance(given, Tensor) and given.dtype not in _NUMBERS:
            # A hyperparameter is the number that it holds; a total rounds as torch's.
            given = given if register in totals else memoized(Tensor.double, given)
        inputs.append(given)
    rows: Sequence[int] = ()
    if program.has_norms or (apart and by_name):
        rows = range(len(columns[0]))
        for place in by_name:
            inputs[place] = _as_rows(inputs[place])
    elif by_name:
        rows, distinct = _distinct([inputs[place] for place in by_name])
        for place, column in zip(by_name, distinct, strict=True):
            inputs[place] = _as_rows(column)
    return _Numbers(program, memoized(run_numbers, program, *inputs), rows)


_NUMBERS = {torch.float64, torch.bool}


def _distinct(columns: list[list[Any]]) -> tuple[Sequence[int], list[list[Any]]]:
    """Return the row of each name among distinct histories, and these by column."""
    if len(columns) == 1:
        rows, distinct = shared_rows(columns[0])
        return rows, [distinct]
    marks = [shared_rows(column)[0] for column in columns]
    keys: dict[Any, int] = {}
    rows = [keys.setdefault(key, len(keys)) for key in zip(*marks, strict=True)]
    firsts = [rows.index(row) for row in range(len(keys))]
    return rows, [[column[first] for first in firsts] for column in columns]


def _as_rows(values: list[Any]) -> Any:
    """Return numbers as a tensor, or as a list if they are floats; one as it is."""
    if not isinstance(values[0], Tensor):
        return values[0] if len(values) == 1 else values
    if len(values) == 1 and values[0].dtype in _NUMBERS:
        return values[0]
    return memoized(_stack, *values)


def _stack(*values: Tensor) -> Tensor:
    if len(values) == 1:
        return values[0].double()
    device = values[0].device
    stacked = torch.stack([value.to(device) for value in values])
    return stacked if stacked.dtype == torch.bool else stacked.double()


def _filled(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def _single(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float64 else value


def lifted(formula: Callable[..., Tensor]) -> Callable[..., TensorMap]:
    """Return a function on maps of a function on one tensor of each, as `tree_map`.

    Positional arguments are tensors, and become maps. Keyword-only ones are numbers: a
    float, a 0-dim tensor, or a map of these. The result has the names and dtypes of the
    first argument.

    Example:
        >>> @lifted
        ... def scaled(u, *, factor):
        ...     return u * factor
        >>> scaled({"w": torch.ones(2), "b": torch.ones(1)}, factor=2.0)
        {'w': tensor([2., 2.]), 'b': tensor([2.])}
    """
    kinds = list(inspect.signature(formula).parameters.values())
    names = [kind.name for kind in kinds if kind.kind is kind.KEYWORD_ONLY]
    num_tensors = len(kinds) - len(names)

    def one(*inputs: Any) -> list[Tensor]:
        numbers = dict(zip(names, inputs[num_tensors:], strict=True))
        return [formula(*inputs[:num_tensors], **numbers)]

    program = record(one, [False] * num_tensors + [True] * len(names))

    @functools.wraps(formula)
    def on_maps(*maps: TensorMap, **numbers: Any) -> TensorMap:
        inputs = [*maps, *(numbers[name] for name in names)]
        if not maps[0]:
            return {}
        apart = dict in map(type, inputs[num_tensors:])
        return lift(program, inputs, [[0]], apart=apart)[0]

    return on_maps
