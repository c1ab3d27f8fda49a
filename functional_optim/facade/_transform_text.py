"""A transform among the defaults of an optimizer, as plain data: a text.

Whoever builds an optimizer like another hands over its `defaults`, as trainers do with
torch's. They are saved in checkpoints, too, where no object of ours should be.
"""

from __future__ import annotations

import weakref
from typing import Any

from functional_optim._types import Transform

_living: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def text_of(transform: Transform) -> str:
    """Return a text that says which transform it is as long as the transform lives.

    Example:
        >>> from functional_optim import chain, sgd
        >>> pipeline = chain(sgd(0.1))
        >>> text_of(pipeline), transform_of(text_of(pipeline)) is pipeline
        ('chain(ScaleByLearningRate(0.1))', True)
    """
    text = repr(transform)
    while text in _living and _living[text] is not transform:
        text += "'"  # It prints alike, and may still be another one.
    _living[text] = transform
    return text


def transform_of(given: Any) -> Any:
    """Return the transform that a text says; what is no text is returned as it is.

    Raises:
        TypeError: no living transform has this text.
    """
    if not isinstance(given, str):
        return given
    found = _living.get(given)
    if found is None:
        msg = (
            f"transform must be a transform, got {given!r}, which is how one was "
            "printed; pass the transform itself, such as functional_optim.adamw()"
        )
        raise TypeError(msg)
    return found
