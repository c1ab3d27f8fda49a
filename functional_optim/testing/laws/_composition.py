"""Chaining and plain data: what a transform is part of, and how it is stored."""

from __future__ import annotations

import io

import torch

from functional_optim.core._chain import Chain, as_chain, chain
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Transform
from functional_optim.testing._compare import difference
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law, require
from functional_optim.testing.laws._purity import run
from functional_optim.transforms import Identity

_GRAD_MODE = (
    "the result depends on torch.is_grad_enabled(): a chain records no graph unless "
    "Context(differentiable=True) asks for it, and torch.autograd.grad needs one"
)
_NOT_DATA = (
    "the state holds what no file can: use tensors, and Static with int, float, bool, "
    "str or tuples of these"
)


@law(hint="chain refused what update returned, or autograd ran without grad mode")
def chaining(transform: Transform, example: Example) -> None:
    """A chain of one, with Identity or in chains of chains, is the transform itself."""
    plain = list(run(transform, example))
    # An Identity after a guard is refused, as anything would be.
    for chained in (
        chain(transform),
        chain(Identity(), transform),
        chain(chain(), chain(Identity(), chain(transform))),
    ):
        for step, (out, state) in enumerate(run(chained, example)):
            at = f"step {step} of {_written(chained)}"
            gap = difference(out, plain[step][0])
            require(not gap, f"{at}: updates{gap}", _GRAD_MODE)
            # A chain is flattened into its parent.
            own = state if as_chain(transform) is transform else state[-1]
            own = own[len(own) - len(plain[step][1]) :] if own is state else own
            gap = difference(own, plain[step][1])
            require(not gap, f"{at}: state{gap}", _GRAD_MODE)


def _written(chained: Chain) -> str:
    ours = len(chained) > 1
    return "chain(Identity(), transform)" if ours else "chain(transform)"


@law(drawn=False, hint=_NOT_DATA)
def plain_data(transform: Transform, example: Example) -> None:
    """A state survives plain data on disk, and training goes on with the same bits."""
    state = transform.init(example.params)
    for step, (updates, context) in enumerate(example.steps):
        file = io.BytesIO()
        torch.save(state_dict(state), file)
        file.seek(0)
        data = torch.load(file, weights_only=True)
        loaded = load_state_dict(transform.init(example.params), data)
        gap = difference(loaded, state)
        require(not gap, f"the loaded state differs: state{gap}", _NOT_DATA)
        kept = transform.update(updates, state, example.params, context=context)
        resumed = transform.update(updates, loaded, example.params, context=context)
        gap = difference(resumed, kept)
        require(not gap, f"step {step} after loading differs at {gap}", _NOT_DATA)
        state = kept[1]
