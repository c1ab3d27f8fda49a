"""Mark functions for torch.compile without importing the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch._compile import _disable_dynamo

_F = TypeVar("_F", bound=Callable[..., Any])
_P = ParamSpec("_P")
_R = TypeVar("_R")


def constant_when_compiled(function: _F) -> _F:
    """Let torch.compile call a function while it traces, and keep what it returns.

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
