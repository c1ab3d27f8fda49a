"""What a pipeline does to a model, as a table that a person reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from functional_optim._messages import format_bytes, format_columns, pluralize
from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import Chain, chain, checked_transform
from functional_optim.core._transform import Scope, Transform, inner_transforms
from functional_optim.core._validation import check_parameters
from functional_optim.core._value_class import shown_value, written
from functional_optim.execution._state_tree import tensors_of
from functional_optim.inspection._cost import Cost, Pass, cost, size, temporary_bytes
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.core._traversal import Stage
    from functional_optim.execution._bucketing import Bucket
    from functional_optim.torch_optimizer._engine import Engine

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
    """Return the text of `functional_optim.explain`, in blocks of lines."""
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
                format_bytes(own) if own else "-",
            )
        )
    return format_columns(rows, "<<>")


def _label_of(stage: Stage) -> str:
    """Return the label under which a stage stands beside others, with a colon."""
    # Labels of a Partition are its places; the place inside a name is "inner".
    beside = stage.path and stage.label == stage.path[-1] != "inner"
    return f"{stage.label}:" if beside else ""


def _summary(found: Cost, params: TensorMap) -> list[str]:
    own, state = size(params.values()), sum(found.own)
    times = f", {state / own:.2f} x the parameters" if own else ""
    tensors = pluralize(len(params), "tensor")
    numbers = pluralize(sum(p.numel() for p in params.values()), "number")
    lines = [
        f"parameters  {tensors}, {numbers}, {format_bytes(own)}",
        f"state       {format_bytes(state)}{times}",
    ]
    if found.passes is None:
        return lines
    count = len(found.passes)
    moved = sum(step.reads + step.writes for step in found.passes)
    over = f"{pluralize(count, 'pass')} over memory"
    lines.append(f"step        {over}, {format_bytes(moved)} moved")
    by_path = {stage.path: stage.transform for stage in found.stages}
    for number, step in enumerate(found.passes, start=1):
        if number <= _MOST_LINES or number == count:
            lines.append(f"  pass {number:<3}  {_pass(step, by_path)}")
    return [*lines, *_COUNTED]


def _pass(step: Pass, by_path: dict[tuple[int | str, ...], Transform]) -> str:
    reads = f"reads {format_bytes(step.reads)}"
    if step.path is None:
        return f"{reads}, writes {format_bytes(step.writes)}: the update"
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


_MOST_BUCKETS = 12


@untraced
def explain(
    tx: Transform | TransformOptimizer | OptimWrapper, params: TensorMap | None = None
) -> str:
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

    Of an optimizer it also tells what is frozen and has no state yet, and the plan:
    which tensors are updated together (a bucket), cut into how many units (slices of
    one tensor, pools of small tensors, groups of whole tensors), and the temporary
    memory of a step, which is found by trying the largest unit of each bucket on zeros.

    Args:
        tx: Any transform, a `TransformOptimizer`, or an `OptimWrapper` around one.
        params: Parameters by name; only names, shapes and dtypes are looked at. None
            for an optimizer, which has its own.

    Returns:
        Some lines of text, about as many for a large model as for a small one.

    Raises:
        TypeError: `tx` is no transform, `params` no map from name to tensor, or one of
            them too many.
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
    if isinstance(tx, OptimWrapper):
        inner: Any = tx.optimizer
        return explain(inner, params)
    blocks: list[list[str]]
    if isinstance(tx, TransformOptimizer):
        if params is not None:
            raise TypeError("params must be left out for an optimizer: it has its own")
        with torch.no_grad():
            engine = tx._followed()
            blocks = table(engine.transform, engine.everyone())
            blocks.insert(2, _plan(tx, engine))
            if engine.survey.failure:
                blocks[2].append(
                    f"not compiled: the look at gradients ({engine.survey.failure})"
                )
    elif params is None:
        raise TypeError(
            "params must be given with a transform, as in explain(tx, params); only a "
            f"TransformOptimizer has its own, got {type(tx).__name__}"
        )
    else:
        blocks = table(tx, params)
    return "\n\n".join("\n".join(line.rstrip() for line in b) for b in blocks if b)


def _plan(optimizer: TransformOptimizer, engine: Engine) -> list[str]:
    """Return what is updated together, and the memory that it takes."""
    executor = engine.executor
    buckets = executor.buckets
    units = [unit for bucket in buckets for unit in bucket.units]
    most = max([size(unit.params.values()) for unit in units], default=0)
    lines = []
    if engine.frozen:
        numbers = pluralize(sum(param.numel() for param in engine.frozen), "number")
        now = format_bytes(size(tensors_of(engine.state)))
        tensors = pluralize(len(engine.frozen), "tensor")
        lines.append(
            f"frozen      {tensors}, {numbers}: no state before their first gradient; "
            f"the state has {now} now"
        )
    lines.append(
        f"plan        {pluralize(len(units), 'unit')} of at most {format_bytes(most)}"
    )
    lines.extend(
        f"  bucket {number:<3}{_bucket(bucket, optimizer)}"
        for number, bucket in enumerate(buckets[:_MOST_BUCKETS], start=1)
    )
    if len(buckets) > _MOST_BUCKETS:
        lines.append(f"  ... and {len(buckets) - _MOST_BUCKETS:,} more")
    found = [
        0 if _is_compiled(bucket) else temporary_bytes(bucket, executor.store.fields)
        for bucket in buckets
    ]
    known = [count for count in found if count is not None]
    if len(known) < len(found):
        return [
            *lines,
            "temporary   unknown: the transform cannot be tried out on zeros",
        ]
    kept = executor.scratch_bytes
    total = format_bytes(max(known, default=0) + kept)
    lines.append(f"temporary   {total} beside parameters, gradients and state")
    if kept:
        lines.append(f"            {format_bytes(kept)} of it to gather small tensors")
    return lines


def _bucket(bucket: Bucket, optimizer: TransformOptimizer) -> str:
    """Return one line: what is in it, and how it is cut."""
    params = bucket.params
    first = next(iter(params.values()))
    numbers = sum(param.numel() for param in params.values())
    kinds: dict[str, int] = {}
    for unit in bucket.units:
        kinds[unit.kind] = kinds.get(unit.kind, 0) + 1
    cut = ", ".join(pluralize(count, kind) for kind, count in kinds.items())
    laid = sum(getattr(unit, "laid", 0) for unit in bucket.units)
    pooled = sum(len(unit.names) for unit in bucket.units if unit.pooled)
    if pooled and optimizer._layout == "flat":
        cut += f" ({laid:,} of {pluralize(pooled, 'tensor')} side by side)"
    code = _code(bucket) if optimizer._compiles else ""
    return (
        f"{pluralize(len(params), 'tensor')}, {pluralize(numbers, 'number')}, "
        f"{str(first.dtype).removeprefix('torch.')} on {first.device}: {cut}{code}"
    )


def _code(bucket: Bucket) -> str:
    """Return whether it is compiled, and why not."""
    if bucket.codes is None:
        parts = inner_transforms(bucket.transform) or (bucket.transform,)
        widest = max(parts, key=lambda part: part.scope)
        if widest.scope > Scope.ELEMENTWISE:
            return f", not compiled ({widest!r} looks at whole tensors)"
        return ", not compiled (tensors of another class, or numbers as parameters)"
    if bucket.codes.failure:
        return f", not compiled ({bucket.codes.failure})"
    return ", compiled" if bucket.steps else ", to be compiled at the first step"


def _is_compiled(bucket: Bucket) -> bool:
    """Whether its units run as code, which writes where everything lies."""
    return bucket.codes is not None and not bucket.codes.failure
