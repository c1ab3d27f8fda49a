"""The stateful part: transforms as optimizers that drop into existing loops."""

from functional_optim.facade._amp_wrapper import AmpOptimWrapper
from functional_optim.facade._building import build_optim_wrapper
from functional_optim.facade._constructor import DefaultOptimWrapperConstructor
from functional_optim.facade._explaining import explain
from functional_optim.facade._interchange import (
    from_torch_state_dict,
    to_torch_state_dict,
)
from functional_optim.facade._optimizer import TransformOptimizer
from functional_optim.facade._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from functional_optim.facade._wrapper import OptimWrapper
from functional_optim.facade._wrapper_dict import OptimWrapperDict

__all__ = [
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "AmpOptimWrapper",
    "DefaultOptimWrapperConstructor",
    "OptimWrapper",
    "OptimWrapperDict",
    "TransformOptimizer",
    "build_optim_wrapper",
    "explain",
    "from_torch_state_dict",
    "to_torch_state_dict",
]
