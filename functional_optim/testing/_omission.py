"""Names without updates, and maps without names: what is not given stays."""

from __future__ import annotations

import itertools

from functional_optim.core._transform import Transform
from functional_optim.testing._broken import require
from functional_optim.testing._compare import difference, same_bits, tensors
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law
from functional_optim.testing.laws._purity import run
from functional_optim.testing.laws._structure import has_static

_AS_ZERO = (
    "a missing update was taken for zero. Loop over the updates, not over the "
    "parameters, and keep the entries of the other names: {**state.field, **new}"
)
_NOT_A_HOLD = (
    "an empty map means hold: an accumulation window is open. Return {} and the state "
    "as it was"
)


@law(hint="a lookup, such as updates[name], for every parameter; loop over the updates")
def omitted_names(transform: Transform, example: Example) -> None:
    """A name without an update keeps its state, and gets no update."""
    start = transform.init(example.params)
    used = [state for _, state in run(transform, example)][-1]
    # An open window still holds what a name got before, and passes it on.
    befores = (start,) if has_static(start) else (start, used)
    for missing, before in itertools.product(example.params, befores):
        now = before
        for updates, context in example.steps:
            rest = {name: u for name, u in updates.items() if name != missing}
            if not rest:  # That is a hold.
                continue
            out, now = transform.update(rest, now, example.params, context=context)
            what = f"{missing!r} got an update without a gradient"
            require(missing not in out, what, _AS_ZERO)
        new = dict(tensors(now))
        for place, old in tensors(before):
            if place.endswith(f"[{missing!r}]"):
                kept = place in new and same_bits(old, new[place])
                require(kept, f"state{place} changed without a gradient", _AS_ZERO)


@law(
    omit=False, hint="an operation that needs at least one tensor, such as torch.stack"
)
def hold(transform: Transform, example: Example) -> None:
    """An empty map in is an empty map out, and the state stays."""
    results = zip(run(transform, example), example.steps, strict=True)
    for (_, state), (_, context) in results:
        out, after = transform.update({}, state, example.params, context=context)
        require(out == {}, f"an empty map gave updates for {list(out)}", _NOT_A_HOLD)
        gap = difference(after, state)
        require(not gap, f"an empty map changed state{gap}", _NOT_A_HOLD)
