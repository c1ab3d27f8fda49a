"""The stateful part: transforms as optimizers that drop into existing loops."""

from functional_optim.config._build import build_optim_wrapper
from functional_optim.config._constructor import DefaultOptimWrapperConstructor
from functional_optim.config._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from functional_optim.facade._explaining import explain
from functional_optim.optim_wrapper._amp_wrapper import AmpOptimWrapper
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.optim_wrapper._wrapper_dict import OptimWrapperDict
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._torch_state_dict import (
    from_torch_state_dict,
    to_torch_state_dict,
)

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
