"""All parameters of a model, where a transform is given some of them."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any, TypeVar

from functional_optim._messages import check_same_names, subset

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

V = TypeVar("V")


class _Current(threading.local):
    params: Mapping[str, Any] | None = None


_current = _Current()


@contextlib.contextmanager
def knowing_all(params: Mapping[str, Any]) -> Iterator[None]:
    """Check maps by name against all parameters of the model inside the block.

    So one map by name, or one mask, serves all parts of a pipeline.

    Args:
        params: All parameters; inside another block that has all, some of them.
    """
    before = _current.params
    _current.params = params if before is None else before
    try:
        yield
    finally:
        _current.params = before


def all_params(params: Mapping[str, V]) -> dict[str, V]:
    """Return all parameters of the model, of which `params` may be a subset."""
    return {**(_current.params or {}), **params}


def check_by_name(what: str, given: Mapping[str, Any], params: Mapping[str, V]) -> None:
    """Refuse a map that lacks one of `params`, or has a name that the model lacks.

    Raises:
        ValueError: naming what is missing and what does not exist.
    """
    check_same_names(what, given, {**params, **subset(all_params(params), given)})
