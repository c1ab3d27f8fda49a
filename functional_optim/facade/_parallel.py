"""What stands around a model to run it in parallel."""

from __future__ import annotations

from torch import nn

_COMPILED = "OptimizedModule"
_AROUND = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_ENGINES = {"DeepSpeedEngine"}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return a model without what runs it in parallel, or compiled.

    That is known by its class: one of torch's, one derived from it, or one whose name
    ends in DataParallel. An attribute `module` alone says nothing, as a model may call
    a part of itself so, and would lose its other parts.

    Example:
        >>> inner = nn.Linear(2, 1)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
        >>> model = nn.ModuleDict({"module": inner, "head": nn.Linear(1, 1)})
        >>> unwrapped(model) is model
        True
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    names = [cls.__name__ for cls in type(model).__mro__]
    if _COMPILED in names:
        inner = getattr(model, "_orig_mod", None)
    elif any(name.endswith(_AROUND) or name in _ENGINES for name in names):
        inner = getattr(model, "module", None)
    else:
        return None
    if not isinstance(inner, nn.Module):
        return None
    # Whatever it is called: nothing may get lost.
    whole = {id(param) for param in model.parameters()}
    return inner if whole == {id(param) for param in inner.parameters()} else None
