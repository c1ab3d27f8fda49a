"""Users' mistakes, as the errors they are and as what MMEngine raises for them.

MMEngine fails with AssertionError where a user passes something wrong, and code that
catches that must keep working.
"""

from __future__ import annotations


class MistakenValueError(ValueError, AssertionError):
    """An argument has a value that cannot be used."""


class MistakenTypeError(TypeError, AssertionError):
    """An argument is of a type that cannot be used."""
