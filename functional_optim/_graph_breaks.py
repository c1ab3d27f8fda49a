"""What runs as it is where `torch.compile` traces the code around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let a compiled function call this one instead of tracing it.

    Not by `torch.compiler.disable`, which imports the compiler at once: as torch's
    optimizers have it, whose first use imports it.

    Args:
        function: The function.
    """
    return _disable_dynamo(function)
