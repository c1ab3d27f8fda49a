"""Errors that are an AssertionError as well, which MMEngine raises in their place."""

from __future__ import annotations


class ConfigValueError(ValueError, AssertionError):
    """An argument has a value that cannot be used."""


class ConfigTypeError(TypeError, AssertionError):
    """An argument has a type that cannot be used."""


class ConfigKeyError(KeyError, AssertionError):
    """A name is unknown."""

    __str__ = Exception.__str__  # A KeyError would put the message into quotes.
