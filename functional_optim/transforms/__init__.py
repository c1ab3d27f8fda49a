"""Transforms, one concept a file."""

from typing import TYPE_CHECKING

from functional_optim._messages import no_attribute
from functional_optim.core._hyperparameters import Scheduled
from functional_optim.transforms._accumulation import Accumulate, AccumulateState
from functional_optim.transforms._adam import ScaleByAdam, ScaleByAdamState
from functional_optim.transforms._centralization import Centralize
from functional_optim.transforms._clipping import (
    ClipByGlobalNorm,
    ClipByGlobalNormState,
    ClipByNorm,
    ClipByValue,
)
from functional_optim.transforms._freezing import SetToZero
from functional_optim.transforms._identity import Identity, Named
from functional_optim.transforms._masking import Masked, Partition
from functional_optim.transforms._momentum import Trace, TraceState
from functional_optim.transforms._monitoring import Observe, ObserveState
from functional_optim.transforms._nonfinite import (
    SkipNonfinite,
    SkipNonfiniteState,
    ZeroNans,
    ZeroNansState,
)
from functional_optim.transforms._scaling import (
    MultiplyParamwise,
    Scale,
    ScaleByLearningRate,
    Unscale,
)
from functional_optim.transforms._weight_decay import AddDecayedWeights

__all__ = [
    "Accumulate",
    "AccumulateState",
    "AddDecayedWeights",
    "Centralize",
    "ClipByGlobalNorm",
    "ClipByGlobalNormState",
    "ClipByNorm",
    "ClipByValue",
    "Identity",
    "Masked",
    "MultiplyParamwise",
    "Named",
    "Observe",
    "ObserveState",
    "Partition",
    "Scale",
    "ScaleByAdam",
    "ScaleByAdamState",
    "ScaleByLearningRate",
    "Scheduled",
    "SetToZero",
    "SkipNonfinite",
    "SkipNonfiniteState",
    "Trace",
    "TraceState",
    "Unscale",
    "ZeroNans",
    "ZeroNansState",
]

if not TYPE_CHECKING:  # Or every wrong name would have a type.
    __getattr__ = no_attribute(__name__, __all__)
