"""Check that a pipeline and a plain PyTorch loop train alike."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._apply import apply_updates
from functional_optim.core._chain import chain
from functional_optim.core._context import Context
from functional_optim.core._transform import Transform
from functional_optim.testing import strategies
from functional_optim.testing._compare import largest_gap, same_bits
from functional_optim.testing._examples import Example
from functional_optim.testing._law import check_protocol
from functional_optim.testing._repro import report
from functional_optim.testing._search import Search, drawn_examples, kinds_of

Loop: TypeAlias = Callable[[torch.nn.Module, Sequence[TensorMap]], Any]
"""A plain PyTorch loop over the gradients of each step; it may yield after each."""


class NotEquivalentError(AssertionError):
    """A pipeline and a loop give different parameters.

    Attributes:
        step: The first step after which they differ; None if the loop does not yield.
        name: The parameter.
        index: The element with the largest difference.
        ulps: The largest difference, in ulp.
        example: The smallest example found.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import check_equivalent
        >>> def plain(model, gradients):
        ...     for step in gradients:
        ...         for name, p in model.named_parameters():
        ...             p.data -= 0.2 * step.get(name, 0.0)
        ...         yield
        >>> try:
        ...     check_equivalent(fo.sgd(0.1), plain)
        ... except NotEquivalentError as error:
        ...     print(error.step, error.name, error.index)
        0 a.weight ()
    """

    def __init__(
        self, gap: Gap, max_ulps: float, transform: Any, loop: Loop, example: Example
    ) -> None:
        self.step, self.name, self.index = gap.step, gap.name, gap.index
        self.ulps, self.example = gap.ulps, example
        called = getattr(loop, "__name__", "torch_loop")
        when = "at the end" if gap.step is None else f"first after step {gap.step}"
        element = f"element {gap.index} of " if gap.index else ""
        bound = f"{max_ulps:g} ulp" if max_ulps else "no difference in any bit"
        what = (
            f"What: {element}{gap.name!r} is {gap.ours!r} in the pipeline and "
            f"{gap.theirs!r} in the loop: {gap.ulps:.3g} ulp apart, allowed: {bound}"
        )
        summary = [f"{transform!r} is not {called}: they part {when}.", "", what]
        option = f", max_ulps={max_ulps:g}" if max_ulps else ""
        call = f"check_equivalent(transform, {called}, example=example{option})"
        super().__init__(report(summary, transform, example, "check_equivalent", call))


@dataclasses.dataclass(frozen=True)
class Gap:
    """The first step and the element in which two runs differ, and by how much."""

    step: int | None
    name: str
    index: tuple[int, ...]
    ulps: float
    ours: float
    theirs: float


def backward(model: torch.nn.Module, gradients: TensorMap) -> None:
    """Add gradients to `.grad`, as `loss.backward()` does.

    Args:
        model: A model with parameters of these names.
        gradients: Gradients by name. Parameters without one keep their `.grad`.

    Raises:
        ValueError: a name that the model does not have.

    Example:
        >>> import functional_optim as fo
        >>> model = torch.nn.Linear(1, 1)
        >>> backward(model, {"bias": torch.ones(1)})
        >>> model.bias.grad, model.weight.grad
        (tensor([1.]), None)
    """
    own = dict(model.named_parameters())
    unknown = [name for name in gradients if name not in own]
    if unknown:
        raise ValueError(f"the model has no parameters {unknown}, only {list(own)}")
    for name, gradient in gradients.items():
        before = own[name].grad
        own[name].grad = gradient.clone() if before is None else before + gradient


def check_equivalent(
    transform: Transform,
    torch_loop: Loop,
    params: TensorMap | None = None,
    *,
    example: Example | None = None,
    max_ulps: float = 0.0,
    dtype: torch.dtype = torch.float32,
    max_steps: int = 4,
    last: bool = False,
    elements: st.SearchStrategy[float] = strategies.ordinary,
    max_examples: int = 100,
    seed: int | None = None,
) -> None:
    """Check that a pipeline gives the parameters of a plain PyTorch loop.

    Random models (scalars, vectors, matrices, empty tensors) get random sequences of
    gradients, zeros and missing names among them. After each step the
    parameters are compared, bit for bit or within `max_ulps`.

    Args:
        transform: The pipeline; its updates are added with `apply_updates`.
        torch_loop: Function of a model and a list with the gradients of each step, that
            trains the model in place. If it yields after each step, the first step that
            differs is found; else only the end is compared. Use
            `backward(model, gradients)` where a loop calls `loss.backward()`.
        params: Parameters that give names, shapes and dtypes; None draws them.
        example: The one example to try; None draws some.
        max_ulps: Largest difference, in ulp of the largest of |p|, |p'| and |p' - p|
            in a step. 0 compares bit for bit. NaN equals NaN. >= 0.
        dtype: Dtype of the parameters, if `params` is None.
        max_steps: Largest number of steps. >= 1.
        last: Whether the last step has `Context(last=True)`, to close a window.
        elements: Strategy of a number: `strategies.finite` has subnormal and huge ones,
            too, `strategies.hostile` also NaN and infinity.
        max_examples: How many examples are drawn. >= 1.
        seed: Draws other examples; None means the same ones every time.

    Raises:
        NotEquivalentError: names the first step, parameter and element where they
            part, with the smallest example found as a program.
        TypeError: `transform` is no transform.
        ValueError: `max_ulps` is negative, or the loop yields now and then.

    Example:
        >>> import functional_optim as fo
        >>> def plain(model, gradients):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     for step in gradients:
        ...         optimizer.zero_grad()
        ...         backward(model, step)
        ...         torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...         yield
        >>> pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
        >>> check_equivalent(pipeline, plain, max_ulps=2)
    """
    check_protocol(transform)
    if not max_ulps >= 0:
        raise ValueError(f"max_ulps must be >= 0, got {max_ulps}")

    def check(example: Example) -> None:
        if last and not example.contexts:
            ends = [Context()] * (len(example.updates) - 1) + [Context(last=True)]
            example = dataclasses.replace(example, contexts=ends)
        gap = _first_gap(transform, torch_loop, example.copied(), max_ulps)
        if gap is not None:
            raise NotEquivalentError(gap, max_ulps, transform, torch_loop, example)

    with torch.enable_grad():
        if example is not None:
            check(example)
            return
        search = Search(
            kinds=kinds_of(params),
            elements=elements,
            dtypes=(dtype,),
            max_steps=max_steps,
            max_examples=max_examples,
            seed=seed,
        )
        try:
            for drawn in drawn_examples(search):
                check(drawn)
        except NotEquivalentError as error:
            found = error
        else:
            return
        # If one of the two is random, the first difference says enough.
        with contextlib.suppress(hypothesis.errors.Flaky):
            found = search.smallest(check, found)
    raise found.with_traceback(None)


def _first_gap(
    transform: Transform, loop: Loop, example: Example, max_ulps: float
) -> Gap | None:
    """Return the largest difference after the first step that has one."""
    theirs, yields = _loop_steps(loop, example)
    ours = _pipeline_steps(transform, example)
    before = example.params
    for step, there in enumerate(theirs):
        here = ours[step] if yields else ours[-1]
        gaps = []
        for name, p in there.items():
            if _same(here[name], p) or not p.numel():
                continue
            ulps, index = largest_gap(here[name], p, before[name])
            if ulps > max_ulps or max_ulps == 0:
                numbers = float(here[name][index]), float(p[index])
                gaps.append(Gap(step if yields else None, name, index, ulps, *numbers))
        if gaps:
            return max(gaps, key=lambda gap: gap.ulps)
        before = there
    return None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two parameters agree bit for bit, but for the payload of NaN."""
    nan = ours.isnan() & theirs.isnan()
    return same_bits(torch.where(nan, 0.0, ours), torch.where(nan, 0.0, theirs))


def _pipeline_steps(transform: Transform, example: Example) -> list[TensorMap]:
    """Return the parameters after each step of the pipeline."""
    chained = chain(transform)
    params, made = example.params, []
    state = chained.init(params)
    for given, context in example.steps:
        updates, state = chained.update(given, state, params, context=context)
        params = apply_updates(params, updates)
        made.append(params)
    return made


def _loop_steps(loop: Loop, example: Example) -> tuple[list[TensorMap], bool]:
    """Return the parameters after each step or at the end, and whether it yielded."""
    model = _model(example.params)
    names = list(example.params)

    def now() -> TensorMap:
        own = dict(model.named_parameters())  # The loop may have replaced them.
        return {name: own[name].detach().clone() for name in names}

    running = loop(model, example.copied().updates)
    if not inspect.isgenerator(running):
        return [now()], False
    made = [now() for _ in running]
    if len(made) != len(example.updates):
        raise ValueError(
            f"torch_loop yielded {len(made)} times in {len(example.updates)} steps; "
            "yield once after each step, also where nothing was updated"
        )
    made[-1] = now()  # What comes after the last yield counts, too.
    return made, True


def _model(params: TensorMap) -> torch.nn.Module:
    """Return a module whose parameters have these names and numbers."""
    model = torch.nn.Module()
    for name, p in params.items():
        *path, last = name.split(".")
        module = model
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, torch.nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, torch.nn.Parameter(p.clone()))
    return model
