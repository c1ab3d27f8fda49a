"""The stateful part: transforms as optimizers that drop into existing loops."""

from functional_optim.facade._explaining import explain
from functional_optim.facade._optimizer import TransformOptimizer

__all__ = ["TransformOptimizer", "explain"]
