"""Gradient processing for PyTorch as pure functions."""

from typing import TYPE_CHECKING

from functional_optim import schedules, transforms
from functional_optim._resolving import resolve
from functional_optim._spelling import no_attribute
from functional_optim.config._paramwise import Multipliers, paramwise_multipliers
from functional_optim.core._apply import (
    apply_updates,
    gradients,
    load_parameters,
    parameters,
)
from functional_optim.core._chain import Chain, chain
from functional_optim.core._context import Context, Norm, ReduceOp, Reducer
from functional_optim.core._hyperparameters import Hyperparameter, Schedule
from functional_optim.core._readings import fetch, readings, state_of
from functional_optim.core._selection import Rules, Selection, exclude
from functional_optim.core._state_dict import load_state_dict, state_dict
from functional_optim.core._transform import Role, Scope, Static, TensorMap, Transform
from functional_optim.core._traversal import Part
from functional_optim.facade import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    AmpOptimWrapper,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    TransformOptimizer,
    build_optim_wrapper,
    explain,
    from_torch_state_dict,
    to_torch_state_dict,
)
from functional_optim.optimizers import adam, adamw, sgd
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
    "Part",
    "Partition",
    "ReduceOp",
    "Reducer",
    "Role",
    "Rules",
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
    "apply_updates",
    "build_optim_wrapper",
    "chain",
    "exclude",
    "explain",
    "fetch",
    "from_torch_state_dict",
    "gradients",
    "load_parameters",
    "load_state_dict",
    "parameters",
    "paramwise_multipliers",
    "readings",
    "resolve",
    "schedules",
    "sgd",
    "state_dict",
    "state_of",
    "to_torch_state_dict",
    "transforms",
]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)
