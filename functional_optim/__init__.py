"""Gradient processing for PyTorch as pure functions."""

from typing import TYPE_CHECKING

from functional_optim import schedules, transforms
from functional_optim._messages import no_attribute
from functional_optim.algebra._recording import add, addcmul, lerp, total
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.config._constructor import (
    DefaultOptimWrapperConstructor,
    build_optim_wrapper,
)
from functional_optim.config._paramwise import paramwise_multipliers
from functional_optim.config._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from functional_optim.core._apply import (
    apply_updates,
    gradients,
    load_parameters,
    parameters,
)
from functional_optim.core._chain import Chain, chain
from functional_optim.core._context import Context, Norm, ReduceOp, Reducer
from functional_optim.core._hyperparameters import (
    Hyperparameter,
    Pair,
    Scalar,
    Schedule,
    flag,
    hyperparameter,
    is_zero,
    resolve,
)
from functional_optim.core._readings import fetch, readings, state_of
from functional_optim.core._rule import Rule, global_number, number
from functional_optim.core._selection import Rules, Selection, exclude
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Role, Scope, Static, Transform
from functional_optim.inspection._explain import explain
from functional_optim.optim_wrapper._amp_wrapper import AmpOptimWrapper
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.optim_wrapper._wrapper_dict import OptimWrapperDict
from functional_optim.optimizers import adam, adamw, sgd
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._torch_state_dict import (
    from_torch_state_dict,
    to_torch_state_dict,
)
from functional_optim.transforms import (
    Accumulate,
    AddDecayedWeights,
    Centralize,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Identity,
    Masked,
    MultiplyParamwise,
    Named,
    Observe,
    Partition,
    Scale,
    ScaleByAdam,
    ScaleByLearningRate,
    SetToZero,
    SkipNonfinite,
    Trace,
    Unscale,
    ZeroNans,
)
from functional_optim.transforms._scaling import Multipliers

__version__ = "0.1.0"

__all__ = [
    "OPTIMIZERS",
    "OPTIM_WRAPPERS",
    "OPTIM_WRAPPER_CONSTRUCTORS",
    "Accumulate",
    "AddDecayedWeights",
    "AmpOptimWrapper",
    "Centralize",
    "Chain",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Context",
    "DefaultOptimWrapperConstructor",
    "Hyperparameter",
    "Identity",
    "Masked",
    "Multipliers",
    "MultiplyParamwise",
    "Named",
    "Norm",
    "Observe",
    "OptimWrapper",
    "OptimWrapperDict",
    "Pair",
    "Partition",
    "ReduceOp",
    "Reducer",
    "Role",
    "Rule",
    "Rules",
    "Scalar",
    "Scale",
    "ScaleByAdam",
    "ScaleByLearningRate",
    "Schedule",
    "Scope",
    "Selection",
    "SetToZero",
    "SkipNonfinite",
    "Static",
    "TensorMap",
    "Trace",
    "Transform",
    "TransformOptimizer",
    "Unscale",
    "ZeroNans",
    "adam",
    "adamw",
    "add",
    "addcmul",
    "apply_updates",
    "build_optim_wrapper",
    "chain",
    "exclude",
    "explain",
    "fetch",
    "flag",
    "from_torch_state_dict",
    "global_number",
    "gradients",
    "hyperparameter",
    "is_zero",
    "lerp",
    "load_parameters",
    "load_state_dict",
    "number",
    "parameters",
    "paramwise_multipliers",
    "readings",
    "resolve",
    "schedules",
    "sgd",
    "state_dict",
    "state_of",
    "to_torch_state_dict",
    "total",
    "transforms",
]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)
