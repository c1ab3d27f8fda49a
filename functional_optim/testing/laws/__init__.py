"""Laws that a transform must obey, each callable on a transform.

`laws.purity(transform)` tries examples; `laws.purity(transform, example)` tries one.
Only `init`, `update` and `scope` are used.
"""

from functional_optim.testing.laws._composition import chaining, plain_data
from functional_optim.testing.laws._execution import in_place
from functional_optim.testing.laws._purity import determinism, purity
from functional_optim.testing.laws._scope import scope
from functional_optim.testing.laws._structure import hold, omitted_names, structure
from functional_optim.testing.laws._torch import (
    compiled,
    differentiable,
    no_graph,
    vmapped,
)

__all__ = [
    "ALL",
    "chaining",
    "compiled",
    "determinism",
    "differentiable",
    "hold",
    "in_place",
    "no_graph",
    "omitted_names",
    "plain_data",
    "purity",
    "scope",
    "structure",
    "vmapped",
]

ALL = (
    structure,
    purity,
    determinism,
    omitted_names,
    hold,
    scope,
    in_place,
    vmapped,
    plain_data,
    chaining,
    no_graph,
    compiled,
    differentiable,
)
"""All laws, the basic ones first: the later ones say little about what breaks them."""
