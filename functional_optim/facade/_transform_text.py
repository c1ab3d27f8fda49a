"""Name a transform among the defaults of an optimizer by a text: plain data.

Whoever builds an optimizer like another hands over its `defaults`, as trainers do with
torch's. They are saved in checkpoints, too, where no object of ours should be.
"""

from __future__ import annotations

import weakref
from typing import Any

from functional_optim.core._transform import Transform

_living: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def text_of(transform: Transform) -> str:
    """Return a text that names a transform as long as it lives, in this process.

    Example:
        >>> from functional_optim import chain, sgd
        >>> pipeline = chain(sgd(0.1))
        >>> transform_of(text_of(pipeline)) is pipeline
        True
    """
    text = f"<{type(transform).__name__} at {id(transform):#x}>"
    _living[text] = transform
    return text


def transform_of(given: Any) -> Any:
    """Return the transform that a text names; what is no text is returned as it is.

    Raises:
        TypeError: no living transform has this name.
    """
    if not isinstance(given, str):
        return given
    found = _living.get(given)
    if found is None:
        msg = (
            f"transform must be a transform, got the text {given!r}, which names none "
            "that lives in this process; pass one, such as functional_optim.adamw()"
        )
        raise TypeError(msg)
    return found
