"""Users' mistakes, as the errors they are and as what MMEngine raises for them.

MMEngine fails with AssertionError where a user passes something wrong, and code that
catches that must keep working.
"""

from __future__ import annotations


class MistakenValueError(ValueError, AssertionError):
    """An argument has a value that cannot be used."""


class MissingError(KeyError, AssertionError):
    """A name that is not there."""

    def __str__(self) -> str:
        """Return the message, which a KeyError would put into quotes."""
        return str(self.args[0])


class MistakenTypeError(TypeError, AssertionError):
    """An argument is of a type that cannot be used."""
