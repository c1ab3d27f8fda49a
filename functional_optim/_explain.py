"""What a pipeline does to a model, as a table that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from functional_optim._chain import Chain, chain, checked_transform
from functional_optim._cost import Cost, Pass, cost, size
from functional_optim._structure import check_parameters
from functional_optim._types import Transform, inner_transforms
from functional_optim._value import shown_value, written

if TYPE_CHECKING:
    from functional_optim._parts import Stage
    from functional_optim._types import TensorMap

_WIDTH = 100
_MOST_STAGE = 60
_MOST_RULE = 40
_MOST_LINES = 12
_COUNTED = [
    "  counted   in place, in a step that emits, elementwise tensors: a total reads",
    "            gradients and the state in front of it, the update reads gradients,",
    "            parameters and state, and writes the last two",
]


def explain(tx: Transform, params: TensorMap) -> str:
    """Say what a transform does to these parameters, as a table to print.

    A line for each stage: the transform as written, its scope, the bytes of its state.
    Below, what a step costs: the bytes of all state, the passes over memory (one for
    each call of `context.reduce`, and the update), and the bytes that they move where
    they run in place. Below, what every mask, rule and label selects, and what is left:
    a rule that fits nothing, or an earlier rule that takes everything, shows here.

    Nothing is computed and no memory is taken: `init` and `update` run on the meta
    device. A transform of your own that cannot run there is tried on the parameters as
    they are, and the table says so. It tells what it selects by a method
    `selections(params)` that returns (rule as text, list of names) pairs.

    Args:
        tx: Any transform.
        params: Parameters by name; only names, shapes and dtypes are looked at.

    Returns:
        Some lines of text, about as many for a large model as for a small one.

    Raises:
        TypeError: `tx` is no transform, `params` no map from name to tensor.
        ValueError: `tx` does not fit the parameters: a rule matches nothing.

    Example:
        >>> import torch
        >>> import functional_optim as fo
        >>> params = {"weight": torch.zeros(256, 256), "bias": torch.zeros(256)}
        >>> print(explain(fo.adamw(mask=fo.exclude("bias")), params))
        stage                                          scope            state
        ScaleByAdam()                                  elementwise  514.0 KiB
        AddDecayedWeights(0.01, mask=exclude('bias'))  elementwise          -
        ScaleByLearningRate(0.001)                     elementwise          -
        <BLANKLINE>
        parameters  2 tensors, 65,792 numbers, 257.0 KiB
        state       514.0 KiB, 2.00 x the parameters
        step        1 pass over memory, 1.8 MiB moved
          pass 1    reads 1.0 MiB, writes 771.0 KiB: the update
          counted   in place, in a step that emits, elementwise tensors: a total reads
                    gradients and the state in front of it, the update reads gradients,
                    parameters and state, and writes the last two
        <BLANKLINE>
        AddDecayedWeights(0.01, mask=exclude('bias'))
          exclude('bias') -> 1 of 2 tensors, 65,536 numbers: weight
          the rest        -> 1 of 2 tensors,    256 numbers: bias
    """
    checked_transform("tx", tx)
    check_parameters(params)
    found = cost(chain(tx), params)
    blocks = [_stages(found), _summary(found, params), *_all_selections(found)]
    if found.remarks:
        blocks.append([f"remark: {remark}" for remark in found.remarks])
    return "\n\n".join("\n".join(line.rstrip() for line in b) for b in blocks if b)


# -- text --------------------------------------------------------------------------


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:,.1f} {unit}"


def _count(number: int, what: str) -> str:
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural}"


def _columns(rows: list[tuple[str, ...]], align: str) -> list[str]:
    """Lay rows out in columns, "<" to the left and ">" to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    ]


def _written(transform: Transform) -> str:
    """Return a transform as one writes it, with dots for what stands inside it."""
    text = repr(transform)
    if text.startswith("<"):  # A plain class without a repr of its own.
        return type(transform).__qualname__
    return written(transform, _shown_argument) if inner_transforms(transform) else text


def _shown_argument(value: Any) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    if isinstance(value, Mapping):
        parts = tuple(value.values())
    inside = parts and all(isinstance(part, Transform) for part in parts)
    return "..." if inside else shown_value(value)


# -- blocks ------------------------------------------------------------------------


def _stages(found: Cost) -> list[str]:
    rows: list[tuple[str, ...]] = [("stage", "scope", "state")]
    depths: dict[tuple[int | str, ...], int] = {}
    for stage, own in zip(found.stages, found.own, strict=True):
        depth = depths.get(stage.path[:-1], 0)
        label = _label_of(stage)
        is_chain = isinstance(stage.transform, Chain)
        # A chain has no line of its own: its members stand in its place.
        depths[stage.path] = depth + (bool(label) or not is_chain)
        if is_chain and not label:
            continue
        text = label if is_chain else f"{label} {_written(stage.transform)}".strip()
        rows.append(
            (
                "  " * depth + _short(text, _MOST_STAGE - 2 * depth),
                stage.transform.scope.name.lower().replace("_", " "),
                _bytes(own) if own else "-",
            )
        )
    return _columns(rows, "<<>")


def _label_of(stage: Stage) -> str:
    """Return the label under which a stage stands beside others, with a colon."""
    # Labels of a Partition are its places; the place inside a name is "inner".
    beside = stage.path and stage.label == stage.path[-1] != "inner"
    return f"{stage.label}:" if beside else ""


def _summary(found: Cost, params: TensorMap) -> list[str]:
    own, state = size(params.values()), sum(found.own)
    times = f", {state / own:.2f} x the parameters" if own else ""
    tensors = _count(len(params), "tensor")
    numbers = _count(sum(p.numel() for p in params.values()), "number")
    lines = [
        f"parameters  {tensors}, {numbers}, {_bytes(own)}",
        f"state       {_bytes(state)}{times}",
    ]
    if found.passes is None:
        return lines
    count = len(found.passes)
    moved = sum(step.reads + step.writes for step in found.passes)
    over = f"{_count(count, 'pass')} over memory"
    lines.append(f"step        {over}, {_bytes(moved)} moved")
    by_path = {stage.path: stage.transform for stage in found.stages}
    for number, step in enumerate(found.passes, start=1):
        if number <= _MOST_LINES or number == count:
            lines.append(f"  pass {number:<3}  {_pass(step, by_path)}")
    return [*lines, *_COUNTED]


def _pass(step: Pass, by_path: dict[tuple[int | str, ...], Transform]) -> str:
    reads = f"reads {_bytes(step.reads)}"
    if step.path is None:
        return f"{reads}, writes {_bytes(step.writes)}: the update"
    path = step.path
    while path not in by_path:
        path = path[:-1]
    return f"{reads}: total for {_short(_written(by_path[path]), 48)}"


def _all_selections(found: Cost) -> list[list[str]]:
    blocks = []
    for stage in found.stages:
        tell = getattr(stage.transform, "selections", None)
        rules = [] if tell is None else tell(stage.params)
        if rules:
            title = _short(_written(stage.transform), _WIDTH)
            blocks.append([title, *_selection_lines(rules, stage.params)])
    return blocks


def _selection_lines(
    rules: list[tuple[str, list[str]]], params: TensorMap
) -> list[str]:
    taken = {name for _, names in rules for name in names}
    rest = [name for name in params if name not in taken]
    shown = rules[:_MOST_LINES] + ([("the rest", rest)] if rest else [])
    lines = []
    widths = [
        max(len(cell) for cell in column)
        for column in zip(*(_cells(*row, params) for row in shown), strict=True)
    ]
    for rule, names in shown:
        text, count, numbers = (
            f"{cell:{side}{width}}"
            for cell, side, width in zip(
                _cells(rule, names, params), "<>>", widths, strict=True
            )
        )
        head = f"  {text} -> {count} of {len(params):,} tensors, {numbers} numbers"
        lines.append(f"{head}{_first(names, _WIDTH - len(head))}")
    if len(rules) > _MOST_LINES:
        lines.append(f"  ... and {len(rules) - _MOST_LINES:,} more")
    return lines


def _cells(rule: str, names: list[str], params: TensorMap) -> tuple[str, str, str]:
    numbers = sum(params[name].numel() for name in names)
    return _short(rule, _MOST_RULE), f"{len(names):,}", f"{numbers:,}"


def _first(names: list[str], room: int) -> str:
    """Return a colon and as many names as there is room for, but at least one."""
    text = ": " + names[0] if names else ""
    for name in names[1:]:
        if len(text) + len(name) + len(", , ...") > room:
            return f"{text}, ..."
        text += f", {name}"
    return text
