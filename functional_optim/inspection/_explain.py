"""Print the stages of a transform on some parameters, and the plan of an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from functional_optim._messages import (
    first_line,
    format_bytes,
    format_columns,
    pluralize,
)
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.algebra._torch_modes import untraced
from functional_optim.core._chain import chain, validate_transform
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import Node, Path, children_of, routes, walk
from functional_optim.core._validation import check_parameters
from functional_optim.core._value_class import format_call, format_value
from functional_optim.execution._plan import Bucket
from functional_optim.execution._state_tree import tensors_of
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._engine import Engine
from functional_optim.torch_optimizer._group_keys import parts_of
from functional_optim.torch_optimizer._optimizer import TransformOptimizer

_LINE_WIDTH = 100
_STAGE_WIDTH = 60
_RULE_WIDTH = 40
_MAX_LINES = 12


@untraced
def explain(
    tx: Transform | TransformOptimizer | OptimWrapper, params: TensorMap | None = None
) -> str:
    """Describe what a transform does to these parameters, as a table to print.

    A line for each stage: the transform as written, its scope, the bytes of its state.
    Below, the bytes of all state, and the parameters that every mask, rule and label
    selects, and those left: a rule that fits nothing can be seen here, and an earlier
    rule that takes everything.

    Nothing is computed and no memory is taken: `init` runs on the meta device. If that
    of your own transform cannot run there, it runs on the parameters as they are, and a
    remark says so. A transform of your own has its selections listed if it has a method
    `selections(params)` that returns (rule as text, list of names) pairs.

    For an optimizer the table has the number of frozen parameters without state, and
    the plan: which tensors are updated together (a bucket), cut into how many units
    (slices of one tensor, pools of small tensors, groups of whole tensors), whether
    they are compiled, and if not, why.

    Args:
        tx: Any transform, a `TransformOptimizer`, or an `OptimWrapper` around one.
        params: Parameters by name; only names, shapes and dtypes are used. None
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
        stage                         scope            state
        ScaleByAdam()                 elementwise  514.0 KiB
        Masked(..., exclude('bias'))  elementwise          -
          AddDecayedWeights(0.01)     elementwise          -
        ScaleByLearningRate(0.001)    elementwise          -
        <BLANKLINE>
        parameters  2 tensors, 65,792 numbers, 257.0 KiB
        state       514.0 KiB, 2.00 x the parameters
        <BLANKLINE>
        Masked(..., exclude('bias'))
          exclude('bias') -> 1 of 2 tensors, 65,536 numbers: weight
          the rest        -> 1 of 2 tensors,    256 numbers: bias
    """
    if isinstance(tx, OptimWrapper):
        inner: Any = tx.optimizer
        return explain(inner, params)
    if isinstance(tx, TransformOptimizer):
        if params is not None:
            raise TypeError("params must be left out for an optimizer: it has its own")
        with torch.no_grad():
            engine = tx._synced_engine()
            blocks = _transform_blocks(engine.transform, engine.all_params())
            blocks.insert(2, _plan_lines(tx, engine))
    elif params is None:
        raise TypeError(
            "params must be given with a transform, as in explain(tx, params); only a "
            f"TransformOptimizer has its own, got {type(tx).__name__}"
        )
    else:
        blocks = _transform_blocks(tx, params)
    return "\n\n".join("\n".join(line.rstrip() for line in b) for b in blocks)


def _transform_blocks(tx: Transform, params: TensorMap) -> list[list[str]]:
    """Return the stages, totals, selections and remarks, each as a block of lines."""
    validate_transform("tx", tx)
    check_parameters(params)
    pipeline = chain(tx)
    remarks = []
    on_meta = {name: torch.empty_like(p, device="meta") for name, p in params.items()}
    try:
        state = pipeline.init(on_meta)
    except ValueError:
        raise
    except Exception as error:  # A user's transform may do anything here.
        why = first_line(error)
        remarks.append([f"remark: init was run on the parameters as they are, {why}"])
        state = pipeline.init(params)
    stages = list(walk(pipeline, state, params))
    sizes = [_own_bytes(stage) for stage in stages]
    own = _num_bytes(params.values())
    times = f", {sum(sizes) / own:.2f} x the parameters" if own else ""
    totals = [
        f"parameters  {_format_count(params.values())}, {format_bytes(own)}",
        f"state       {format_bytes(sum(sizes))}{times}",
    ]
    return [_stage_lines(stages, sizes), totals, *_selection_blocks(stages), *remarks]


# -- stages ------------------------------------------------------------------------
def _stage_lines(stages: list[Node], sizes: list[int]) -> list[str]:
    """Return a line for each stage, indented; members of a chain replace the chain."""
    rows: list[tuple[str, ...]] = [("stage", "scope", "state")]
    depths: dict[Path, int] = {}
    routers = {stage.path for stage in stages if routes(stage.transform)}
    for stage, size in zip(stages, sizes, strict=True):
        depth = depths.get(stage.path[:-1], 0)
        is_branch = bool(stage.path) and stage.path[:-1] in routers
        label = f"{stage.path[-1]}:" if is_branch and stage.path[-1] != 0 else ""
        is_chain = hasattr(stage.transform, "stands_for") and not any(
            isinstance(label, str) for label in children_of(stage.transform)
        )
        depths[stage.path] = depth + (bool(label) or not is_chain)
        if is_chain and not label:
            continue
        text = label if is_chain else f"{label} {_format(stage.transform)}".strip()
        rows.append(
            (
                "  " * depth + _shorten(text, _STAGE_WIDTH - 2 * depth),
                stage.transform.scope.name.lower().replace("_", " "),
                format_bytes(size) if size else "-",
            )
        )
    return format_columns(rows, "<<>")


def _format(transform: Transform) -> str:
    """Format a transform as written, with dots for the transforms inside it."""
    text = repr(transform)
    if text.startswith("<"):  # A plain class without a repr of its own.
        return type(transform).__qualname__
    return format_call(transform, _format_argument) if children_of(transform) else text


def _format_argument(value: Any) -> str:
    parts = tuple(value.values()) if isinstance(value, Mapping) else parts_of(value)
    inside = parts and all(isinstance(part, Transform) for part in parts)
    return "..." if inside else format_value(value)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


# -- sizes -------------------------------------------------------------------------
def _own_bytes(stage: Node) -> int:
    """Return the bytes of the state of a stage without those of its children."""
    combinator: Any = stage.transform
    inner: list[Any] = []
    if children_of(combinator):
        inner = list(combinator.split_state(stage.state).values())
    tensors = _own_tensors(stage.state, inner)
    return _num_bytes({id(tensor): tensor for tensor in tensors}.values())


def _own_tensors(state: Any, inner: list[Any]) -> Iterator[Tensor]:
    """Yield the tensors of a state that are in none of the inner states."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, tuple)) and all(state is not part for part in inner):
        for entry in state.values() if isinstance(state, dict) else state:
            yield from _own_tensors(entry, inner)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _format_count(tensors: Collection[Tensor]) -> str:
    """Format how many tensors there are, and how many numbers in them."""
    numbers = sum(tensor.numel() for tensor in tensors)
    return f"{pluralize(len(tensors), 'tensor')}, {pluralize(numbers, 'number')}"


# -- selections --------------------------------------------------------------------
def _selection_blocks(stages: list[Node]) -> list[list[str]]:
    """Return a block for each stage that selects parameters."""
    blocks = []
    for stage in stages:
        selections = getattr(stage.transform, "selections", None)
        if selections is not None and (rules := selections(stage.params)):
            title = _shorten(_format(stage.transform), _LINE_WIDTH)
            blocks.append([title, *_rule_lines(rules, stage.params)])
    return blocks


def _rule_lines(rules: list[tuple[str, list[str]]], params: TensorMap) -> list[str]:
    """Return a line for each rule: how much it selects, and the first names."""
    selected = {name for _, names in rules for name in names}
    rest = [name for name in params if name not in selected]
    listed = rules[:_MAX_LINES] + ([("the rest", rest)] if rest else [])
    heads = format_columns(
        [
            (
                f"  {_shorten(rule, _RULE_WIDTH)}",
                "->",
                f"{len(names):,}",
                f"of {len(params):,} tensors,",
                f"{sum(params[name].numel() for name in names):,}",
                "numbers",
            )
            for rule, names in listed
        ],
        "<<><><",
        gap=" ",
    )
    lines = [
        f"{head}{_first_names(names, _LINE_WIDTH - len(head))}"
        for head, (_, names) in zip(heads, listed, strict=True)
    ]
    return lines + _omitted(len(rules))


def _omitted(count: int) -> list[str]:
    """Return a line with the number of lines that are left out."""
    left = count - _MAX_LINES
    return [f"  ... and {left:,} more"] if left > 0 else []


def _first_names(names: list[str], width: int) -> str:
    """Return a colon and as many names as fit into a width, but at least one."""
    text = ": " + names[0] if names else ""
    for name in names[1:]:
        if len(text) + len(name) + len(", , ...") > width:
            return f"{text}, ..."
        text += f", {name}"
    return text


# -- plan --------------------------------------------------------------------------
def _plan_lines(optimizer: TransformOptimizer, engine: Engine) -> list[str]:
    """Return the frozen parameters, and a line for each bucket of an optimizer."""
    buckets = engine.executor.buckets
    units = [unit for bucket in buckets for unit in bucket.units]
    most = max((_num_bytes(unit.params.values()) for unit in units), default=0)
    lines = []
    if engine.frozen:
        now = format_bytes(_num_bytes(tensors_of(engine.state)))
        lines.append(
            f"frozen      {_format_count(engine.frozen)}: no state before their first "
            f"gradient; the state has {now} now"
        )
    lines.append(
        f"plan        {pluralize(len(units), 'unit')} of at most {format_bytes(most)}"
    )
    lines.extend(
        f"  bucket {number:<3}{_format_bucket(bucket, optimizer)}"
        for number, bucket in enumerate(buckets[:_MAX_LINES], start=1)
    )
    lines += _omitted(len(buckets))
    if engine.collector.failure:
        lines.append(
            f"not compiled: the look at gradients ({engine.collector.failure})"
        )
    return lines


def _format_bucket(bucket: Bucket, optimizer: TransformOptimizer) -> str:
    """Format a bucket: its tensors, its units by kind, and whether it is compiled."""
    params = list(bucket.params.values())
    kinds = Counter(unit.kind for unit in bucket.units)
    cut = ", ".join(pluralize(count, kind) for kind, count in kinds.items())
    code = _format_code(bucket) if optimizer._compiles else ""
    return (
        f"{_format_count(params)}, {str(params[0].dtype).removeprefix('torch.')} on "
        f"{params[0].device}: {cut}{code}"
    )


def _format_code(bucket: Bucket) -> str:
    """Say whether a bucket is compiled, and if not, why."""
    kernels = bucket.kernels
    if kernels is None:
        parts = [*children_of(bucket.transform).values()] or [bucket.transform]
        widest = max(parts, key=lambda part: part.scope)
        if widest.scope > Scope.ELEMENTWISE:
            return f", not compiled ({widest!r} looks at whole tensors)"
        return ", not compiled (tensors of another class, or numbers as parameters)"
    if kernels.failure:
        return f", not compiled ({kernels.failure})"
    return (
        ", compiled" if bucket.compiled_steps else ", to be compiled at the first step"
    )
