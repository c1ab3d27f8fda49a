"""Check a transform in chains, and its state in a file."""

from __future__ import annotations

import io

import torch

from functional_optim.core._chain import as_chain, chain
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Transform
from functional_optim.testing._examples import Example
from functional_optim.testing._law import law, require_equal, run
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
        is_longer = len(chained) > 1
        name = "chain(Identity(), transform)" if is_longer else "chain(transform)"
        for step, (out, state) in enumerate(run(chained, example)):
            at = f"step {step} of {name}"
            plain_out, plain_state = plain[step]
            require_equal(f"{at}: updates", out, plain_out, _GRAD_MODE)
            # A chain is flattened into its parent.
            if as_chain(transform) is transform:
                own = state[len(state) - len(plain_state) :]
            else:
                own = state[-1]
            require_equal(f"{at}: state", own, plain_state, _GRAD_MODE)


@law(drawn=False, hint=_NOT_DATA)
def plain_data(transform: Transform, example: Example) -> None:
    """A state survives plain data on disk, and training goes on with the same bits."""
    params = example.params
    state = transform.init(params)
    for step, (updates, context) in enumerate(example.steps):
        file = io.BytesIO()
        torch.save(state_dict(state), file)
        file.seek(0)
        data = torch.load(file, weights_only=True)
        loaded = load_state_dict(transform.init(params), data)
        require_equal("the loaded state differs: state", loaded, state, _NOT_DATA)
        kept = transform.update(updates, state, params, context=context)
        resumed = transform.update(updates, loaded, params, context=context)
        require_equal(
            f"step {step} after loading differs at ", resumed, kept, _NOT_DATA
        )
        state = kept[1]
