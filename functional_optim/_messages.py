"""Names: of parameters, to look entries up by, and of parts of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

V = TypeVar("V")


def lookup(values: Mapping[str, V], names: Iterable[str]) -> list[V]:
    """Return the entries of a map at some names, in the order of the names.

    Raises:
        ValueError: a name is missing.
    """
    try:
        return [values[name] for name in names]
    except KeyError as error:
        msg = (
            f"no entry for {error.args[0]!r}, only for {shown(values)}; call init "
            "again after adding parameters, and give a value for every name in a map"
        )
        raise ValueError(msg) from None


def shown(names: Iterable[str], most: int = 5) -> str:
    """Return a list of names short enough for an error message."""
    names = list(names)
    text = ", ".join(repr(name) for name in names[:most])
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return f"[{text}{more}]"


def subset(tensors: Mapping[str, V], names: Iterable[str]) -> dict[str, V]:
    """Return the entries at some names, as far as they are there, in their order."""
    return {name: tensors[name] for name in names if name in tensors}


def check_same_names(
    what: str, given: Iterable[str], wanted: Iterable[str], kind: str = "parameter"
) -> None:
    """Refuse a map that does not have a value for every name, and for no other.

    Args:
        what: How to call the map in an error.
        given: Its names.
        wanted: The names it must have.
        kind: What the names are names of.

    Raises:
        ValueError: naming what is missing and what does not exist.
    """
    given, wanted = dict.fromkeys(given), dict.fromkeys(wanted)
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        msg = (
            f"{what} must have a value for every {kind} and no other: missing "
            f"{shown(missing)}, unknown {shown(unknown)}"
        )
        raise ValueError(msg)


def checked_name(what: str, name: Any) -> str:
    """Refuse what cannot name a part of a pipeline.

    Args:
        what: How to call the name in an error.
        name: What the caller gave.

    Raises:
        TypeError: it is no string.
        ValueError: it is empty, or has the "." that joins names.
    """
    if not isinstance(name, str):
        msg = f"{what} must be a string, got {name!r}"
        raise TypeError(msg)
    if not name or "." in name:
        msg = (
            f'{what} must not be empty and not contain ".", which joins names, got '
            f"{name!r}"
        )
        raise ValueError(msg)
    return name


def first_line(error: Exception) -> str:
    """Return what an error says, on one line.

    Example:
        >>> first_line(ValueError("too long"))
        'ValueError: too long'
    """
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
