"""Names: of parameters, to look entries up by, and of parts of a pipeline."""

from __future__ import annotations

import contextlib
import difflib
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

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


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of an error message: what a wrong name may have meant.

    Args:
        name: The wrong name.
        known: The right ones.
        cutoff: How similar, from 0 to 1, what is suggested must be; nothing that is
            similar enough, and all names are listed.

    Example:
        >>> did_you_mean("norm_decay_mul", ["lr_mult", "norm_decay_mult"])
        "did you mean 'norm_decay_mult'?"
        >>> did_you_mean("x", ["lr_mult", "norm_decay_mult"])
        "the names are ['lr_mult', 'norm_decay_mult']"
    """
    known = list(known)
    near = _near(name, known, cutoff)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"the names are {shown(sorted(known), most=40)}"


def _near(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """Return the names that are written nearly like a wrong one, the nearest first."""
    folded: dict[str, list[str]] = {}
    for right in known:
        folded.setdefault(right.lower(), []).append(right)
    near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=cutoff)
    return [right for one in near for right in folded[one]]


def no_attribute(module: str, names: Iterable[str]) -> Callable[[str], NoReturn]:
    """Return the `__getattr__` of a module: it says what a wrong name may mean.

    Args:
        module: Name of the module.
        names: Its public names.

    Example:
        >>> no_attribute("fo", ["adamw", "sgd"])("AdamW")
        Traceback (most recent call last):
        AttributeError: module 'fo' has no attribute 'AdamW'; did you mean 'adamw'?
    """

    def refuse(name: str) -> NoReturn:
        msg = f"module {module!r} has no attribute {name!r}"
        # Python itself asks for names like __wrapped__, and expects nothing.
        near = [] if name.startswith("_") else _near(name, names, 0.6)
        if near:
            msg += f"; did you mean {' or '.join(map(repr, near))}?"
        raise AttributeError(msg)

    return refuse


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


class _Current(threading.local):
    whole: Mapping[str, Any] | None = None


_current = _Current()


@contextlib.contextmanager
def part_of(params: Mapping[str, Any]) -> Iterator[None]:
    """Let what is started in the block see some of these parameters, and know of all.

    So one map by name, or one mask, serves all parts of a pipeline.

    Args:
        params: All parameters; inside another block they are a part themselves.
    """
    before = _current.whole
    _current.whole = params if before is None else before
    try:
        yield
    finally:
        _current.whole = before


def whole(params: Mapping[str, V]) -> dict[str, V]:
    """Return all parameters of which some are seen; outside of `part_of` these."""
    return {**(_current.whole or {}), **params}


def check_by_name(what: str, given: Mapping[str, Any], params: Mapping[str, V]) -> None:
    """Refuse a map that lacks a parameter, or has a name that not even the whole has.

    Raises:
        ValueError: naming what is missing and what does not exist.
    """
    check_same_names(what, given, {**params, **subset(whole(params), given)})


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
