"""What a step finds: gradients, and the wishes of a gradient scaler."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_optim.algebra._tensor_map import are_plain
from functional_optim.core._validation import check_updates
from functional_optim.execution._grad_scaling import Scaling
from functional_optim.execution._native import GradientScan, Native, native
from functional_optim.execution._tensor_memory import storage_ptr

if TYPE_CHECKING:
    from collections.abc import Iterable

    from functional_optim.algebra._tensor_map import TensorMap
    from functional_optim.execution._native import Gradients


def gradients_of(names: Mapping[Tensor, str]) -> TensorMap:
    """Return the gradients that there are, by name."""
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
    """Warn that a step did nothing."""
    warnings.warn(
        "no parameter of this optimizer has a gradient, so step() did nothing; if the "
        "model's parameters were replaced after it was built, by "
        "load_state_dict(assign=True) or a new model, build the optimizer anew",
        stacklevel=4,
    )


def scaling_of(optimizer: object) -> Scaling | None:
    """Return what a gradient scaler asks of this step; it sets two attributes."""
    found_inf = getattr(optimizer, "found_inf", None)
    grad_scale = getattr(optimizer, "grad_scale", None)
    if found_inf is None:
        if grad_scale is None:
            return None
        found_inf = torch.zeros_like(grad_scale)
    return Scaling(grad_scale, found_inf)


_dtype_of = operator.attrgetter("dtype")


class GradientCollector:
    """Looks at parameters, gradients and state.

    All is asked by functions in C, and few of them, because it is asked at every step:
    by those that Python has, or by our own where they can be compiled.
    """

    def __init__(self, names: Mapping[Tensor, str], *, compiles: bool = False) -> None:
        self._names = names
        self._strided = [param for param in names if not param.is_contiguous()]
        self._native: Native | None = None
        self._scan: GradientScan | None = None
        self.failure = ""
        """Why nothing is compiled although it should be."""
        if compiles and are_plain(names):
            self._compile()
        self._found: Gradients | None = None
        self._moved = False
        self.restart()

    def _compile(self) -> None:
        found = native()
        if isinstance(found, str):
            self.failure = found
            return
        self._native = found
        try:
            params = {name: param for param, name in self._names.items()}
            self._scan = GradientScan(params, found)
        except RuntimeError as error:  # As on the meta device.
            self.failure = str(error)

    @property
    def compiled(self) -> bool:
        """Whether our own functions look."""
        return self._scan is not None

    def restart(self) -> None:
        """Take the parameters to be where they should be now."""
        self._geometry = self._found_geometry()
        self._moved = False
        if self._scan is not None:
            self._scan.scan()

    def _found_geometry(self) -> list[Any]:
        strides = [param.stride() for param in self._strided]
        if self._scan is not None:
            return strides
        return [
            list(map(Tensor.data_ptr, self._names)),
            list(map(Tensor.numel, self._names)),
            list(map(_dtype_of, self._names)),
            list(map(Tensor.is_contiguous, self._names)),
            strides,
        ]

    def scan(self) -> bool:
        """Look at everything."""
        if self._scan is not None:
            self._found = self._scan.scan()
            # The next look compares with this one.
            self._moved = self._moved or self._scan.moved
        return self._moved or self._found_geometry() != self._geometry

    def gradients(self) -> Mapping[str, Tensor]:
        """Return the gradients that there are, by name, as of the last look."""
        return gradients_of(self._names) if self._found is None else self._found

    def shows(self, state: Mapping[Tensor, Any], entries: list[Any]) -> bool:
        """Whether a state by parameter has these entries, in this order."""
        if self._native is not None and self._native.has_values(state, entries):
            return True
        found = entries_in(state)
        same = len(found) == len(entries)
        return same and all(map(operator.is_, found, entries))


class StateSnapshot:
    """Record the entries that a state shows, and their memory."""

    def __init__(self, state: Mapping[Tensor, Any], entries: list[Tensor]) -> None:
        self.everything = entries_in(state)
        self._entries = entries if are_plain(entries) else []
        self._places = list(map(_place, self._entries))
        # A look at each costs as much as the arithmetic on a small one: one of each
        # memory is looked at, and how many tensors share the memory.
        first = {storage_ptr(entry): entry for entry in reversed(self._entries)}
        self._first = list(first.values())
        self._memories = [entry.untyped_storage() for entry in self._first]
        self._seen = self._look()

    def _look(self) -> list[Any]:
        return [
            *map(Tensor.data_ptr, self._first),
            *map(Tensor.stride, self._first),
            *[torch._C._storage_Use_Count(memory._cdata) for memory in self._memories],
        ]

    def have_moved(self, *, each: bool) -> bool:
        """Whether `.data = ...` gave an entry other memory since it was shown."""
        seen = self._look()
        if each or seen != self._seen:
            if list(map(_place, self._entries)) != self._places:
                return True
            self._seen = seen
        return False


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return the memory of a tensor, the same if it moves as a whole to be shared."""
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.storage_offset(), tensor.shape, tensor.stride()


def entries_in(state: Mapping[Tensor, Any]) -> list[Any]:
    """Return the entries of a state by parameter, in order."""
    shown = [own.values() for own in state.values() if isinstance(own, Mapping)]
    return list(itertools.chain.from_iterable(shown))
