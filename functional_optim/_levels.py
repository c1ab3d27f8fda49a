"""Whom a warning is about: the first caller that is not a library."""

from __future__ import annotations

import pathlib
import sys

import torch

_OURS = tuple(
    f"{pathlib.Path(str(file)).parent}/" for file in (__file__, torch.__file__)
)


def callers_level() -> int:
    """Return the `stacklevel` of the caller outside of this library and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    return level
