"""Laws that every transform obeys, and the tools to try them on your own.

Needs hypothesis: `pip install 'functional_optim[testing]'`.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("hypothesis") is None:
    raise ModuleNotFoundError(
        "functional_optim.testing needs hypothesis: pip install "
        "'functional_optim[testing]'",
        name="hypothesis",
    )

from functional_optim._messages import no_attribute
from functional_optim.testing import laws, strategies
from functional_optim.testing._check import check_transform
from functional_optim.testing._equivalent import (
    NotEquivalentError,
    backward,
    check_equivalent,
)
from functional_optim.testing._examples import Example
from functional_optim.testing._law import BrokenLawError, Law

__all__ = [
    "BrokenLawError",
    "Example",
    "Law",
    "NotEquivalentError",
    "backward",
    "check_equivalent",
    "check_transform",
    "laws",
    "strategies",
]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)
