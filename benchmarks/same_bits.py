"""Demand that this package computes the same bits as another revision of it.

    python benchmarks/same_bits.py --before REV [--chains 200] [--seed 0] [--compiled]

Both are imported into one process and do the same in turns; after each step updates,
parameters, states and what else is seen must be equal bit for bit: also the sign of a
zero, and which numbers are NaN (not which NaN). Types of states, their fields, names,
dtypes and shapes must be equal, too. Where one refuses what the other takes, that is a
difference, unless a tag of the case stands in `REFUSED`. What both refuse with the same
type of error is counted and passes; messages are not compared.

Checkpoints are written by either and go on in the other, through a file.

The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import itertools
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from revisions import export, imported, resolved
from same_bits_runs import (
    HUGE,
    LARGE,
    Run,
    differentiated,
    in_place,
    mapped,
    numbers,
    pure,
    pure_restored,
    pure_saved,
    recorded,
    restored,
    saved,
    scaled,
    to_torch,
    values,
)
from same_bits_specs import (
    SAY,
    SCHEDULES,
    Case,
    preset_cases,
    random_cases,
    transform_cases,
)
from same_bits_wrappers import (
    WRAPPERS,
    dict_restored,
    dict_saved,
    dict_trained,
    wrapped,
    wrapper_restored,
    wrapper_saved,
)
from torch import Tensor

import functional_optim as fo

_FIRST = "in place a window is the first member of its chain"
REFUSED: dict[str, str] = {
    "layout": "layout= is gone: there is one way to lay out",
    "differentiable": "differentiable= is gone: the pure way differentiates",
    "accumulate-inside": _FIRST,
    "accumulate-wrapped": _FIRST,
}
"""What this package may refuse though the other takes it: tags, with the reason.

Tags are "layout", "differentiable" (both of `TransformOptimizer`), and in place
"accumulate-inside" (`Accumulate` behind something else than `Unscale`) and
"accumulate-wrapped" (`Accumulate` inside a combinator).
"""

LEFT_OUT: dict[str, str] = {
    "differentiable": "no argument of the optimizer any longer",
}
"""Keys of groups and state dicts that only one package may have, with the reason."""

STEPS = 20
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHOWN = 100
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# -- comparing -------------------------------------------------------------------------


@dataclasses.dataclass
class Tally:
    """What was found in one kind of runs.

    Attributes:
        runs: How many runs.
        compared: How many tensors and numbers.
        refused: Runs that both refused.
        planned: Runs that this package refuses, as `REFUSED` says.
        differences: Runs with a difference.
    """

    runs: int = 0
    compared: int = 0
    refused: int = 0
    planned: int = 0
    differences: int = 0


class Refusal(NamedTuple):
    """That a package raised."""

    kind: str
    message: str


def same_bits(some: Tensor, others: Tensor) -> bool:
    """Compare the bits of two tensors of one dtype and shape; one NaN is as another."""
    integers = _INTEGERS[some.dtype.itemsize]
    bits = [x.detach().contiguous().view(integers) for x in (some, others)]
    if torch.equal(*bits):
        return True
    if not some.is_floating_point():
        return False
    nans = some.isnan()
    zero = torch.zeros((), dtype=integers)
    masked = [torch.where(nans, zero, b) for b in bits]
    return torch.equal(nans, others.isnan()) and torch.equal(*masked)


def differences(  # noqa: PLR0912 - a branch for each kind
    some: Any, others: Any, place: str, tally: Tally
) -> Iterator[str]:
    """Yield where two results differ."""
    tally.compared += 1
    some, others = _with_scheduled(some), _with_scheduled(others)
    if isinstance(some, Tensor) and isinstance(others, Tensor):
        kinds = [(x.dtype, tuple(x.shape)) for x in (some, others)]
        if kinds[0] != kinds[1]:
            yield f"{place}: {kinds[0]} became {kinds[1]}"
        elif not same_bits(some, others):
            apart = (some.detach().double() - others.detach().double()).abs()
            yield f"{place}: bits differ, by up to {apart.max().item():.3g}"
    elif type(some).__name__ != type(others).__name__:
        yield f"{place}: a {type(some).__name__} became a {type(others).__name__}"
    elif isinstance(some, dict):
        first, second = (
            [k for k in x if k not in LEFT_OUT or k in (some.keys() & others.keys())]
            for x in (some, others)
        )
        if sorted(map(str, first)) != sorted(map(str, second)):
            yield f"{place}: keys {first} became {second}"
        else:
            for key in first:
                where = f"{place}[{key!r}]"
                yield from differences(some[key], others[key], where, tally)
    elif dataclasses.is_dataclass(some):
        fields = [vars(x) for x in (some, others)]
        yield from differences(*fields, place, tally)
    elif isinstance(some, (tuple, list)):
        names = [getattr(x, "_fields", range(len(x))) for x in (some, others)]
        if [*names[0]] != [*names[1]]:
            yield f"{place}: parts {[*names[0]]} became {[*names[1]]}"
        else:
            for name, a, b in zip(names[0], some, others, strict=True):
                yield from differences(a, b, f"{place}.{name}", tally)
    elif not (some == others or (some != some and others != others)):  # noqa: PLR0124 - NaN
        yield f"{place}: {some!r} became {others!r}"


class Scheduled(NamedTuple):
    """As the package's."""

    state: Any
    num_updates: Any


def _with_scheduled(state: Any) -> Any:
    """Return a state with the count of its schedules around it, not in it."""
    if isinstance(state, dict) and set(state) == {"type", "fields"}:
        fields = dict(state["fields"])
        if state["type"] == "ScheduleState":
            fields = {"state": [], **fields}
            return {"type": "Scheduled", "fields": fields}
        schedule = fields.pop("schedule", [])
        inner = {"type": state["type"], "fields": fields}
        if not schedule:
            return inner
        return {"type": "Scheduled", "fields": {"state": inner, **schedule["fields"]}}
    fields = getattr(state, "_fields", ())
    if type(state).__name__ == "ScheduleState":
        return Scheduled((), state.num_updates)
    if "schedule" not in fields:
        return state
    parts = {name: getattr(state, name) for name in fields if name != "schedule"}
    inner = collections.namedtuple(type(state).__name__, parts)(**parts)
    return Scheduled(inner, state.schedule.num_updates) if state.schedule else inner


def guarded(run: Run) -> Run:
    """Yield what a run yields, and in the end the error that it raised."""
    try:
        yield from run
    except Exception as error:
        yield "raised", Refusal(type(error).__name__, str(error).splitlines()[0])


class Comparison:
    """Compares runs and counts.

    Args:
        before: The other package.
        only: The kinds to run; all if empty.
    """

    def __init__(self, before: Any, only: list[str]) -> None:
        self._before = before
        self._only = only
        self.tallies: dict[str, Tally] = collections.defaultdict(Tally)
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.found: list[str] = []
        self.refusals: collections.Counter[str] = collections.Counter()

    def wants(self, kind: str) -> bool:
        """Whether runs of a kind were asked for."""
        return not self._only or kind in self._only

    def same(
        self, kind: str, label: str, run: Any, tags: frozenset[str] = frozenset()
    ) -> None:
        """Let both packages do one thing in turns, and compare after each step."""
        if not self.wants(kind):
            return
        start = time.perf_counter()
        tally = self.tallies[kind]
        tally.runs += 1
        pair = guarded(run(self._before)), guarded(run(fo))
        nothing = ("nothing", None)
        for (place, a), (other, b) in itertools.zip_longest(*pair, fillvalue=nothing):
            if isinstance(a, Refusal) or isinstance(b, Refusal):
                self._refused(kind, label, a, b, tags)
                break
            if place != other:
                self._note(kind, f"{label}: {place!r} became {other!r}")
                break
            found = next(differences(a, b, place, tally), None)
            if found is not None:
                self._note(kind, f"{label}: {found}")
                break
        self.seconds[kind] += time.perf_counter() - start

    def continued(
        self,
        kind: str,
        label: str,
        save: Any,
        load: Any,
        tags: frozenset[str] = frozenset(),
    ) -> None:
        """Compare the checkpoints of both packages, and how both go on from each."""
        if not self.wants(kind):
            return
        boxes: dict[str, Any] = {}

        def keeping(package: Any) -> Run:
            side = "after" if package is fo else "before"
            boxes[side] = save(package)
            yield "checkpoint", boxes[side]

        self.same(kind, f"{label}, saved", keeping, tags)
        for side, box in boxes.items():

            def going_on(package: Any, box: Any = box) -> Run:
                # What is new need not load in what is old.
                mine = box if package is fo else boxes["before"]
                # torch's own optimizers go on in the tensors that they load.
                return load(package, box=copy.deepcopy(mine))

            # No tags: what one package saved must load, whatever it was made with.
            self.same(kind, f"{label}, loaded from {side}", going_on)

    def _refused(
        self, kind: str, label: str, before: Any, after: Any, tags: frozenset[str]
    ) -> None:
        before, after = (x if isinstance(x, Refusal) else None for x in (before, after))
        tally = self.tallies[kind]
        if before is not None and after is not None:
            if before.kind == after.kind:
                tally.refused += 1
                self.refusals[f"{kind}: {before.message}"] += 1
            else:
                self._note(kind, f"{label}: raises {before}, now {after}")
        elif before is None and tags & REFUSED.keys():
            tally.planned += 1
        else:
            side = "before" if before is not None else "after"
            self._note(kind, f"{label}: only {side} raises {before or after}")

    def _note(self, kind: str, text: str) -> None:
        self.tallies[kind].differences += 1
        self.found.append(f"{kind}: {text}")


# -- what is compared ------------------------------------------------------------------


def _named(dtype: torch.dtype | None) -> str:
    return "mixed" if dtype is None else str(dtype).removeprefix("torch.")


def compare_cases(
    comparison: Comparison,
    name: str,
    cases: list[Case],
    dtypes: Callable[[int], Sequence[torch.dtype | None]],
) -> None:
    """Compare transforms, pure and in place, in dtypes by index."""
    every = ((i, case, dtype) for i, case in enumerate(cases) for dtype in dtypes(i))
    for index, case, dtype in every:
        seed = 31 * index
        given = numbers(case, dtype, seed, STEPS)
        label = f"{case.transform} in {_named(dtype)}, seed {seed}"
        run = functools.partial(pure, case=case, given=given)
        comparison.same(f"{name}, pure", label, run)
        groups = (index + index // 4 + DTYPES.index(dtype or DTYPES[0])) % 4
        run = functools.partial(in_place, case=case, given=given, groups=groups)
        label = f"{label}, groups {groups}"
        comparison.same(f"{name}, in place", label, run, case.tags)


def compare_large(comparison: Comparison, cases: list[Case]) -> None:
    """Compare with tensors that are not gathered, or cut into units."""
    for index, case in enumerate(cases):
        dtype = DTYPES[index % 3]
        larger, steps = (HUGE, 4) if index % 4 == 0 else (LARGE, 8)
        given = numbers(case, dtype, index, steps, larger)
        label = f"{case.transform} in {_named(dtype)}, {larger}"
        run = functools.partial(pure, case=case, given=given)
        comparison.same("large, pure", label, run)
        run = functools.partial(in_place, case=case, given=given, groups=index % 2)
        comparison.same("large, in place", label, run, case.tags)


def compare_others(comparison: Comparison, cases: list[Case], few: list[Case]) -> None:
    """Compare schedules, vmap, derivatives, and options of optimizers."""
    for schedule in SCHEDULES:
        run = functools.partial(_values_of, schedule=schedule)
        comparison.same("schedules", repr(schedule), run)
    for index, case in enumerate(cases):
        given = numbers(case, torch.float64, 2 * index + 1, 4)
        for name, run in {"vmap": mapped, "derivatives": differentiated}.items():
            one = functools.partial(run, case=case, given=given)
            comparison.same(name, repr(case.transform), one)
    for index, case in enumerate(few):
        given = numbers(case, DTYPES[index % 3], index, 7, LARGE)
        for layout in ("auto", "leaves", "flat"):
            options = {"layout": layout}
            run = functools.partial(in_place, case=case, given=given, options=options)
            label = f"{case.transform}, {layout}"
            tags = case.tags | {"layout"}
            comparison.same("layouts", label, run, tags)
        for hands_over in (False, True):
            run = functools.partial(
                scaled, case=case, given=given, hands_over=hands_over
            )
            comparison.same("GradScaler", repr(case.transform), run, case.tags)
        given = numbers(case, torch.float64, index, 4)
        run = functools.partial(recorded, case=case, given=given)
        tags = case.tags | {"differentiable"}
        comparison.same("differentiable", repr(case.transform), run, tags)


def _values_of(package: Any, schedule: Any) -> Run:
    return values(schedule, package)


def compare_checkpoints(comparison: Comparison, cases: list[Case]) -> None:
    """Let both packages go on from checkpoints of either."""
    for index, case in enumerate(cases):
        given = numbers(case, None if index % 2 else DTYPES[0], index, 12 + index % 3)
        common = {"case": case, "given": given}
        groups = 3 if index % 7 == 6 else index % 2
        save = functools.partial(saved, **common, groups=groups)
        load = functools.partial(restored, **common)
        label = f"{case.transform}, groups {groups}"
        # Without its tags, a load of what is not there any more would be a difference.
        if not case.tags & REFUSED.keys():
            comparison.continued("checkpoints", label, save, load)
        save = functools.partial(pure_saved, **common)
        load = functools.partial(pure_restored, **common)
        comparison.continued("checkpoints, pure", repr(case.transform), save, load)
    for case in cases[:12]:
        common = {"case": case, "given": numbers(case, DTYPES[0], 5, 12, LARGE)}
        load = functools.partial(restored, **common)
        save = functools.partial(saved, **common, options={"layout": "flat"})
        tags = frozenset({"layout"})
        if not case.tags & REFUSED.keys():
            label = repr(case.transform)
            comparison.continued("checkpoints, flat", label, save, load, tags)
    for call, kind in (
        (SAY.sgd(0.1, momentum=0.9), torch.optim.SGD),
        (SAY.adam(0.1, weight_decay=0.1, amsgrad=True), torch.optim.Adam),
        (SAY.adamw(0.1, weight_decay=0.1), torch.optim.AdamW),
    ):
        case = Case(call)
        given = numbers(case, torch.float64, 3, 14)
        run = functools.partial(to_torch, case=case, given=given, kind=kind)
        comparison.same("torch's state dicts", repr(call), run)


def compare_wrappers(comparison: Comparison) -> None:
    """Compare wrappers, and let both go on from checkpoints of either."""
    for label, make in WRAPPERS.items():
        for dtype, ends in itertools.product((torch.float32, torch.float64), (0, 1)):
            run = functools.partial(
                wrapped, make=make, dtype=dtype, ends=bool(ends), overflows=bool(ends)
            )
            comparison.same("wrappers", f"{label} in {_named(dtype)}", run)
        for steps in (6, 7, 8):  # Outside and inside of windows of 2, 3 and 4.
            save = functools.partial(wrapper_saved, make=make, steps=steps)
            load = functools.partial(wrapper_restored, make=make)
            text = f"{label}, after {steps}"
            comparison.continued("wrapper checkpoints", text, save, load)
    comparison.same("wrapper dicts", "several", dict_trained)
    for steps in (6, 7):
        save = functools.partial(dict_saved, steps=steps)
        comparison.continued("wrapper dicts", f"after {steps}", save, dict_restored)


def compare_compiled(comparison: Comparison) -> None:
    """Compare compiled steps."""
    for index, call in enumerate(
        (
            SAY.sgd(0.1, momentum=0.9, weight_decay=0.1),
            SAY.chain(SAY.ClipByGlobalNorm(0.5), SAY.adamw(0.01)),
            SAY.chain(SAY.Accumulate(2), SAY.adam(SAY.schedules.linear(0.1, 0.2, 9))),
            SAY.SkipNonfinite(SAY.adamw(0.01, amsgrad=True, mask="*.weight")),
        )
    ):
        case = Case(call)
        given = numbers(case, DTYPES[index % 2], index, STEPS, LARGE)
        options = {"compile": True}
        run = functools.partial(in_place, case=case, given=given, options=options)
        comparison.same("compiled", repr(call), run)


def run_all(comparison: Comparison, options: argparse.Namespace) -> None:
    """Compare everything."""
    table, presets = transform_cases(), preset_cases()
    chains = random_cases(options.chains, options.seed)
    compare_cases(comparison, "transforms", table, lambda _: DTYPES)
    compare_cases(comparison, "presets", presets, lambda _: DTYPES)
    in_turn = (*DTYPES, None)
    compare_cases(comparison, "chains", chains, lambda i: [in_turn[i % 4]])
    few = [*presets[::17], *table[-10:]]
    compare_large(comparison, [*few, *chains[::10]])
    compare_others(comparison, [*table, *presets[::4]], few)
    compare_checkpoints(comparison, [*few, *table[::5], *chains[::4]])
    compare_wrappers(comparison)
    if options.compiled:
        compare_compiled(comparison)


def report(comparison: Comparison) -> None:
    """Print the table, and the first differences."""
    width = max(map(len, comparison.tallies), default=0)
    head = f"{'':{width}}{'runs':>8}{'compared':>11}{'both refuse':>13}"
    print(f"{head}{'planned':>9}{'differ':>8}{'seconds':>9}")
    rows = [*comparison.tallies.items()]
    counts = zip(*(dataclasses.astuple(tally) for _, tally in rows), strict=True)
    total = Tally(*map(sum, counts))
    seconds = {**comparison.seconds, "all": sum(comparison.seconds.values())}
    for name, tally in [*rows, ("all", total)]:
        print(
            f"{name:{width}}{tally.runs:8}{tally.compared:11}{tally.refused:13}"
            f"{tally.planned:9}{tally.differences:8}{seconds[name]:9.1f}"
        )
    for text in comparison.found[:SHOWN]:
        print(f"\n{text}")
    if len(comparison.found) > SHOWN:
        print(f"\nand {len(comparison.found) - SHOWN} more")


def main() -> int:
    """Compare, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, metavar="REV")
    parser.add_argument("--chains", type=int, default=200, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the chains")
    parser.add_argument("--compiled", action="store_true", help="compiled steps, too")
    parser.add_argument("--only", nargs="+", default=[], help="kinds, as in the table")
    parser.add_argument(
        "--refusals", action="store_true", help="print what both refuse, and how often"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        place = export(options.before, pathlib.Path(folder))
        before = imported(place)
        print(f"before: {resolved(options.before)}\nafter: {fo.__file__}\n")
        comparison = Comparison(before, options.only)
        run_all(comparison, options)
    report(comparison)
    if options.refusals:
        for text, count in comparison.refusals.most_common():
            print(f"\n{count} x {text}")
    return 1 if comparison.found else 0


if __name__ == "__main__":
    sys.exit(main())
