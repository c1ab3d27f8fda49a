"""Operators over lists of tensors, compiled from `native.cpp` when first needed."""

from __future__ import annotations

import functools
import hashlib
import importlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functional_optim._messages import first_line

if TYPE_CHECKING:
    from functional_optim.algebra._tensor_map import TensorMap


class Operators(NamedTuple):
    """The operators of `native.cpp`."""

    scan: Callable[[list[Tensor], Tensor], int]
    gather: Callable[[list[Tensor], Tensor, Tensor, Tensor], bool]
    scatter: Callable[[list[Tensor], Tensor, Tensor], bool]


@functools.cache
def loaded_operators() -> Operators | str:
    """Return the operators, or why there are none; tried once in a process."""
    try:
        return _load()
    except Exception as error:
        return first_line(error)


def _load() -> Operators:
    source = pathlib.Path(__file__).with_name("native.cpp").read_text("utf-8")
    # Of several copies of the package in a process each has its own operators.
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    namespace = f"{__name__.partition('.')[0]}_{digest}"
    if not hasattr(getattr(torch.ops, namespace), "scatter"):
        # Imported when it is needed: it takes a second.
        cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
        flags = ("-O1", "-ltorch_cpu", "-lc10")  # -O3 takes 2 s more to compile.
        cache.load(source.replace("NAMESPACE", namespace), extra_flags=flags)
    ops = getattr(torch.ops, namespace)
    return Operators(ops.scan.default, ops.gather.default, ops.scatter.default)


def operators() -> Operators | None:
    """Return the operators if there are any, and no mode such as make_fx is active."""
    found = None if is_in_torch_dispatch_mode() else loaded_operators()
    return found if isinstance(found, Operators) else None


def operator_slices(count: int) -> list[slice]:
    """Return the slices in which operators take a list of tensors."""
    # Of 16 bytes a tensor a longer list takes more than 1 kB: at the first request of
    # that size malloc tidies up what a backward freed (1.3 ms for 1000 parameters).
    return [slice(start, start + 60) for start in range(0, count, 60)]


class ParameterGradients(Mapping[str, Tensor]):
    """The gradients of parameters by name, each read from `.grad` only when used."""

    def __init__(
        self, params: TensorMap, dtypes: Mapping[str, torch.dtype | None]
    ) -> None:
        self.params, self.dtypes = params, dtypes
        self._count = len(dtypes) - list(dtypes.values()).count(None)

    def __getitem__(self, name: str) -> Tensor:
        """Return a gradient."""
        grad = self.params[name].grad
        if grad is not None:
            return grad
        if self.dtypes[name] is not None:
            raise RuntimeError(
                f"the gradient of {name!r} was set to None during the step"
            )
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.dtypes.get(name) is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name, dtype in self.dtypes.items() if dtype is not None)

    def __len__(self) -> int:
        return self._count


def dtype_of(grads: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of a gradient."""
    dtype = grads.dtypes[name] if isinstance(grads, ParameterGradients) else None
    return grads[name].dtype if dtype is None else dtype


_MOVED, _CHANGED, _ODD = 1, 2, 4  # The same numbers are in native.cpp.


class GradientScan:
    """Compares parameters, and which of them have gradients, with the last scan."""

    def __init__(self, params: TensorMap) -> None:
        self._params = params
        self._seen = torch.zeros(len(params), 3, dtype=torch.int64, device="cpu")
        parts = operator_slices(len(params))
        tensors = list(params.values())
        self._parts = [(tensors[part], self._seen[part]) for part in parts]
        self._grads: ParameterGradients | None = None

    def scan(self) -> tuple[bool, ParameterGradients | None] | None:
        """Return whether a parameter moved, and gradients; None without operators."""
        native = operators()
        if native is None:
            return None
        flags = 0
        for tensors, seen in self._parts:
            flags |= native.scan(tensors, seen)
        if flags & _ODD:  # One is sparse, or of another dtype: read from Python.
            self._grads = None
        elif self._grads is None or flags & _CHANGED:
            given = zip(self._params.items(), self._seen[:, 2].tolist(), strict=True)
            dtypes = {name: p.dtype if has else None for (name, p), has in given}
            self._grads = ParameterGradients(self._params, dtypes)
        return bool(flags & _MOVED), self._grads
