"""The stateful part: transforms as optimizers that drop into existing loops."""

from functional_optim.facade._explaining import explain
from functional_optim.facade._interchange import (
    from_torch_state_dict,
    to_torch_state_dict,
)
from functional_optim.facade._optimizer import TransformOptimizer

__all__ = [
    "TransformOptimizer",
    "explain",
    "from_torch_state_dict",
    "to_torch_state_dict",
]
