"""Query the derivative modes of torch, and mark functions for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

_F = TypeVar("_F", bound=Callable[..., Any])

_P = ParamSpec("_P")

_R = TypeVar("_R")


def constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call a function while tracing, and keep the result.

    This is `torch.compiler.assume_constant_result`, which imports the whole compiler
    (1.2 s, measured) to set one attribute.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let a compiled function call this one instead of tracing it.

    This is `torch.compiler.disable`, which imports the compiler at once; this way,
    which is that of torch's optimizers, imports it when the function is first called.
    """
    return _disable_dynamo(function)


@constant_when_compiled  # It cannot trace the call, but guards on the stack.
def is_differentiated() -> bool:
    """Whether a `grad` or `jvp` level of torch.func is active."""
    kinds = [interpreter.key() for interpreter in get_interpreter_stack() or ()]
    return TransformType.Grad in kinds or TransformType.Jvp in kinds


def has_derivative() -> bool:
    """Whether results may have a derivative: a graph, torch.func, or a tangent.

    Forward mode needs no grad mode.
    """
    return torch.is_grad_enabled() or is_differentiated() or has_tangents()


@constant_when_compiled
def has_tangents() -> bool:
    """Whether a `forward_ad.dual_level` is active, that of `jvp` included."""
    return forward_ad._current_level >= 0
