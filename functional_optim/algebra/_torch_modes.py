"""Ask whether a derivative is taken around a call."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from functional_optim._compiling import constant_when_compiled


@constant_when_compiled  # It cannot trace the call, but guards on the stack.
def is_differentiated() -> bool:
    """Return whether torch.func differentiates at some level around this call."""
    kinds = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    return TransformType.Grad in kinds or TransformType.Jvp in kinds


def has_derivative() -> bool:
    """Return whether results may have one: a graph, torch.func, or a forward tangent.

    Forward mode needs no grad mode.
    """
    return torch.is_grad_enabled() or is_differentiated() or has_tangents()


@constant_when_compiled
def has_tangents() -> bool:
    """Return whether a `forward_ad.dual_level` is open, that of `jvp` included."""
    return forward_ad._current_level >= 0
