"""Collect gradients, and the `grad_scale` and `found_inf` of a gradient scaler."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim._messages import user_stacklevel
from functional_optim.algebra._tensor_map import are_plain
from functional_optim.core._validation import check_updates
from functional_optim.execution._grad_scaling import Scaling
from functional_optim.execution._native import GradientScan, loaded_operators
from functional_optim.execution._tensor_memory import storage_ptr

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._native import ParameterGradients


def gradients_of(names: Mapping[Tensor, str]) -> TensorMap:
    """Return the gradients that are not None, by name."""
    found: list[Any] = [param.grad for param in names]
    given: Iterable[Tensor] = names
    grads: TensorMap = dict(zip(names.values(), found, strict=True))
    # At every step, for every parameter: by functions in C.
    if type(None) in set(map(type, found)):
        given = [p for p, g in zip(names, found, strict=True) if g is not None]
        grads = {name: grad for name, grad in grads.items() if grad is not None}
    alike = list(map(_dtype, given)) == list(map(_dtype, grads.values()))
    if not alike or not set(map(_layout, grads.values())) <= {torch.strided}:
        check_updates(grads, {name: param.detach() for param, name in names.items()})
    return grads


_dtype, _layout = operator.attrgetter("dtype"), operator.attrgetter("layout")


def warn_of_no_gradient() -> None:
    """Warn that a step had no gradient."""
    warnings.warn(
        "no parameter of this optimizer has a gradient, so step() did nothing; if the "
        "model's parameters were replaced after it was built, by "
        "load_state_dict(assign=True) or a new model, build the optimizer anew",
        stacklevel=user_stacklevel(),
    )


def scaling_of(optimizer: object) -> Scaling | None:
    """Return the scale and the flag that a gradient scaler has set on an optimizer."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        if grad_scale is None:
            return None
        found_inf = torch.zeros_like(grad_scale)
    return Scaling(grad_scale, found_inf)


class GradientCollector:
    """The gradients of parameters, and whether the parameters have moved.

    Read by few calls of functions in C: each from Python costs more than the
    arithmetic on a small tensor.
    """

    def __init__(self, names: Mapping[Tensor, str], *, compiles: bool = False) -> None:
        self._names = names
        self._strided = [param for param in names if not param.is_contiguous()]
        self._geometry = self._current_geometry()
        self._native_scan: GradientScan | None = None
        self.failure = ""
        """Why no operators are used with `compile=True`."""
        if compiles and are_plain(names):
            loaded = loaded_operators()
            if isinstance(loaded, str):
                self.failure = loaded
            else:
                params = {name: param for param, name in names.items()}
                self._native_scan = GradientScan(params)
        self._grads: ParameterGradients | None = None
        self._moved = False
        self.scan()  # The first one to compare with.
        self._moved = False

    def _current_geometry(self) -> list[Any]:
        return [
            list(map(Tensor.data_ptr, self._names)),
            list(map(Tensor.numel, self._names)),
            list(map(_dtype, self._names)),
            list(map(Tensor.is_contiguous, self._names)),
            [param.stride() for param in self._strided],
        ]

    def scan(self) -> bool:
        """Read gradients; return whether a parameter has other memory than at first."""
        found = self._native_scan.scan() if self._native_scan else None
        if found is None:
            self._grads = None
            return self._moved or self._current_geometry() != self._geometry
        moved, self._grads = found
        self._moved = self._moved or moved  # The next scan compares with this one.
        return self._moved

    def gradients(self) -> Mapping[str, Tensor]:
        """Return the gradients that are not None, by name, as of the last scan."""
        return gradients_of(self._names) if self._grads is None else self._grads


class StateSnapshot:
    """The entries of an optimizer's state, and where their memory is."""

    def __init__(self, state: Mapping[Tensor, Any], entries: list[Tensor]) -> None:
        self._all = list(_entries_in(state))
        self._entries = entries if are_plain(entries) else []
        self._layouts = list(map(_layout_of, self._entries))
        # To check each costs as much as the arithmetic on a small one: one entry of
        # each memory is checked, and how many tensors share the memory.
        first = {storage_ptr(entry): entry for entry in reversed(self._entries)}
        self._first = list(first.values())
        self._storages = [entry.untyped_storage() for entry in self._first]
        self._summary = self._current_summary()

    def _current_summary(self) -> list[Any]:
        return [
            *map(Tensor.data_ptr, self._first),
            *map(Tensor.stride, self._first),
            *[torch._C._storage_Use_Count(memory._cdata) for memory in self._storages],
        ]

    def is_in(self, state: Mapping[Tensor, Any]) -> bool:
        """Whether a state has these entries and no others, in this order."""
        return all(map(operator.is_, _entries_in(state), self._all))

    def has_moved(self, *, each: bool) -> bool:
        """Whether `.data = ...` gave an entry other memory; `each` finds swaps, too."""
        summary = self._current_summary()
        if each or summary != self._summary:
            if list(map(_layout_of, self._entries)) != self._layouts:
                return True
            self._summary = summary
        return False


def _layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the memory of a tensor, the same if it moves as a whole to be shared."""
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.storage_offset(), tensor.shape, tensor.stride()


_END = object()


def _entries_in(state: Mapping[Tensor, Any]) -> Iterator[Any]:
    """Return the entries of a state by parameter, in order, and a mark of the end."""
    views: Iterable[Iterable[Any]] = map(dict.values, state.values())
    if not set(map(type, state.values())) <= {dict}:
        views = (own.values() for own in state.values() if isinstance(own, Mapping))
    return itertools.chain(itertools.chain.from_iterable(views), [_END])
