"""Small parameters moved side by side, so that they need not be gathered.

Each keeps a storage of its own, of just its elements: whoever saves or copies one saves
or copies no other. Only memory that nobody else looks at is left for another, so that
what others see of a parameter stays what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.execution._tensor_memory import ALIGNMENT, joint

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from functional_optim.algebra._tensor_map import TensorMap


_LAYOUTS = ("leaves", "auto", "flat")


class Laying:
    """Moves the parameters of an executor."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._params = params
        self._ours: dict[int, set[int]] = {}
        self._has_moved = False

    def disregard(self, views: Iterable[Tensor]) -> None:
        """Let views of ours not count as somebody who looks at a parameter."""
        for view in views:
            self._ours.setdefault(_storage(view), set()).add(id(view))

    def finish(self) -> bool:
        """Let all views count from now on."""
        moved, self._has_moved = self._has_moved, False
        self._ours = {}
        return moved

    def lay(self, views: TensorMap) -> tuple[Tensor | None, TensorMap]:
        """Move what may be moved side by side."""
        chosen = [name for name, view in views.items() if self._may_move(name, view)]
        if not chosen:
            return None, views
        order = dict.fromkeys([*chosen, *views])
        first = views[chosen[0]]
        shapes = [views[name].shape for name in order]
        memory, pieces = joint(shapes, first.dtype, first.device)
        found: TensorMap = {}
        for name, piece in zip(order, pieces, strict=True):
            found[name] = views[name]
            if name in chosen:
                param = self._params[name]
                piece.copy_(views[name])
                param.data = piece
                _homes[param] = piece.data_ptr()
                found[name] = param.detach()
                self._has_moved = True
        return memory, found

    def _may_move(self, name: str, view: Tensor) -> bool:
        """Whether a parameter fills whole lines of memory that nobody else looks at."""
        param = self._params[name]
        size = param.numel() * param.itemsize
        if (
            not size
            or size % ALIGNMENT
            or not are_plain([param])
            or not param.is_contiguous()
            or param.is_neg()
            or param.is_shared()
            or not _is_torchs(param)
        ):
            return False
        ours = {*self._ours.get(_storage(param), ()), id(view)}
        return _holders(param) == 1 + len(ours)


_homes = WeakTensorKeyDictionary()
"""Where each parameter was moved to."""


def _is_torchs(param: Tensor) -> bool:
    """Whether torch gave the memory, or we did; an array elsewhere is not counted."""
    home: int | None = _homes.get(param)
    return param.untyped_storage().resizable() or home == param.data_ptr()


def _storage(tensor: Tensor) -> int:
    """Return which storage it is; pieces of one memory have several."""
    return int(tensor.untyped_storage()._cdata)


def _holders(tensor: Tensor) -> int:
    """Return how many tensors have this storage."""
    storage = tensor.untyped_storage()  # It is a holder, too.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1


def check_options(*, layout: object, compiles: object, differentiable: bool) -> None:
    """Refuse options that there are not, or that do not go together."""
    if layout not in _LAYOUTS:
        names = ", ".join(map(repr, _LAYOUTS))
        raise ValueError(f"layout must be one of {names}, got {layout!r}")
    if not isinstance(compiles, bool):
        raise ValueError(f"compile must be True or False, got {compiles!r}")
    given = {"layout='flat'": layout == "flat", "compile=True": compiles}
    for text, is_given in given.items():
        if is_given and differentiable:
            raise ValueError(
                f"{text} works in place, which autograd cannot record; leave it out "
                "with differentiable=True"
            )


def check_may_be_flat(params: TensorMap) -> None:
    """Refuse to move what does not lie in the memory of the host."""
    for name, param in params.items():
        if param.device.type != "cpu":
            raise ValueError(
                f"layout='flat' is for parameters on the CPU, but {name!r} lies on "
                f"{param.device}; use layout='auto', or move the model first"
            )
