"""What a pipeline does to a model, as a table that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from functional_optim.core._chain import Chain, chain, checked_transform
from functional_optim.core._transform import Transform, inner_transforms
from functional_optim.core._validation import check_parameters
from functional_optim.core._value_class import shown_value, written
from functional_optim.inspection._cost import Cost, Pass, cost, size

if TYPE_CHECKING:
    from functional_optim.core._transform import TensorMap
    from functional_optim.core._traversal import Stage

_WIDTH = 100
_MOST_STAGE = 60
_MOST_RULE = 40
_MOST_LINES = 12
_COUNTED = [
    "  counted   in place, in a step that emits, elementwise tensors: a total reads",
    "            gradients and the state in front of it, the update reads gradients,",
    "            parameters and state, and writes the last two",
]


def table(tx: Transform, params: TensorMap) -> list[list[str]]:
    """Return what `functional_optim.explain` says of a transform, in blocks of lines.

    Args:
        tx: The transform.
        params: Parameters by name.

    Raises:
        TypeError, ValueError: as `explain`.
    """
    checked_transform("tx", tx)
    check_parameters(params)
    found = cost(chain(tx), params)
    blocks = [_stages(found), _summary(found, params), *_all_selections(found)]
    if found.remarks:
        blocks.append([f"remark: {remark}" for remark in found.remarks])
    return blocks


# -- text --------------------------------------------------------------------------


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown_bytes(count: int) -> str:
    """Return bytes as text, such as "1.5 MiB"."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:,.1f} {unit}"


def counted(number: int, what: str) -> str:
    """Return a number with its noun, such as "2 passes"."""
    plural = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number:,} {what}{plural}"


def columns(rows: list[tuple[str, ...]], align: str) -> list[str]:
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
                shown_bytes(own) if own else "-",
            )
        )
    return columns(rows, "<<>")


def _label_of(stage: Stage) -> str:
    """Return the label under which a stage stands beside others, with a colon."""
    # Labels of a Partition are its places; the place inside a name is "inner".
    beside = stage.path and stage.label == stage.path[-1] != "inner"
    return f"{stage.label}:" if beside else ""


def _summary(found: Cost, params: TensorMap) -> list[str]:
    own, state = size(params.values()), sum(found.own)
    times = f", {state / own:.2f} x the parameters" if own else ""
    tensors = counted(len(params), "tensor")
    numbers = counted(sum(p.numel() for p in params.values()), "number")
    lines = [
        f"parameters  {tensors}, {numbers}, {shown_bytes(own)}",
        f"state       {shown_bytes(state)}{times}",
    ]
    if found.passes is None:
        return lines
    count = len(found.passes)
    moved = sum(step.reads + step.writes for step in found.passes)
    over = f"{counted(count, 'pass')} over memory"
    lines.append(f"step        {over}, {shown_bytes(moved)} moved")
    by_path = {stage.path: stage.transform for stage in found.stages}
    for number, step in enumerate(found.passes, start=1):
        if number <= _MOST_LINES or number == count:
            lines.append(f"  pass {number:<3}  {_pass(step, by_path)}")
    return [*lines, *_COUNTED]


def _pass(step: Pass, by_path: dict[tuple[int | str, ...], Transform]) -> str:
    reads = f"reads {shown_bytes(step.reads)}"
    if step.path is None:
        return f"{reads}, writes {shown_bytes(step.writes)}: the update"
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
