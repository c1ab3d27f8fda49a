"""Compare trees of tensors, bit for bit or within a bound, and locate differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a state or map with their places."""
    found = _pytree.tree_leaves_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in found]


def tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a state or map with their places."""
    return [(place, x) for place, x in leaves(tree) if isinstance(x, Tensor)]


def nodes(state: Any) -> list[tuple[str, Any]]:
    """Return the maps, tensors and `Static` values of a state with their places."""
    found = _pytree.tree_leaves_with_path(state, is_leaf=_is_node)
    return [(_pytree.keystr(path), node) for path, node in found]


def map_nodes(function: Callable[[Any], Any], state: Any) -> Any:
    """Apply a function to each map, tensor and `Static` value of a state."""
    return _pytree.tree_map(function, state, is_leaf=_is_node)


def _is_node(value: Any) -> bool:
    return not isinstance(value, tuple)


def storages(tree: Any) -> set[int]:
    """Return the addresses of the memory of a tree."""
    return {x.untyped_storage().data_ptr() for _, x in tensors(tree) if x.numel()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and every bit."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    # Cloned, because a single number may have a stride of 0, which has no bytes.
    flat = [x.detach().reshape(-1).clone().view(torch.uint8) for x in (a, b)]
    return a.is_meta or torch.equal(*flat)  # The meta device has no numbers.


def close(x: Tensor, y: Tensor, rtol: float) -> bool:
    """Whether two tensors agree relative to their largest number; NaN equals NaN."""
    # Some results are narrower than what they are compared in: float32 moments.
    rtol = min(rtol * torch.finfo(x.dtype).eps / torch.finfo(torch.float64).eps, 0.05)
    x, y = x.detach().double(), y.detach().double()
    finite = torch.where(x.isfinite(), x, 0.0).abs()
    scale = float(finite.max()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol, rtol * scale, equal_nan=True)


def difference(a: Any, b: Any, rtol: float | None = None) -> str | None:
    """Return the first difference between two trees, or None if they agree."""
    # The structure contains the names and the Static values.
    if _pytree.tree_structure(a) != _pytree.tree_structure(b):
        return _difference_of_structure(a, b)
    for (place, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if type(x) is not type(y) or x != y:
                return f"{place}: {x!r} instead of {y!r}"
            continue
        kinds = [(tuple(t.shape), t.dtype, t.device) for t in (x, y)]
        for what, one, other in zip(("shape", "dtype", "device"), *kinds, strict=True):
            if one != other:
                return f"{place}: {what} {one} instead of {other}"
        exact = rtol is None or not x.is_floating_point()
        if not (same_bits(x, y) if exact else close(x, y, rtol or 0.0)):
            return place + _difference_of_numbers(x, y)
    return None


def _difference_of_structure(a: Any, b: Any) -> str:
    """Return the first difference in names, lengths or `Static` values."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() != b.keys():
        return f": names {list(a)} instead of {list(b)}"
    if isinstance(a, (tuple, dict)) and type(a) is type(b) and len(a) == len(b):
        keys: Any = a if isinstance(a, dict) else range(len(a))
        for key in keys:
            if _pytree.tree_structure(a[key]) != _pytree.tree_structure(b[key]):
                fields = getattr(a, "_fields", None)
                step = f".{fields[key]}" if fields else f"[{key!r}]"
                return step + _difference_of_structure(a[key], b[key])
    return f": {a!r} instead of {b!r}"


def _difference_of_numbers(x: Tensor, y: Tensor) -> str:
    """Return two short tensors, or the elements of long ones that differ most."""
    if x.numel() <= 8:
        return f": {x.detach().tolist()} instead of {y.detach().tolist()}"
    gaps = (x.detach().double() - y.detach().double()).abs()
    index = _argmax(gaps.nan_to_num(math.inf))
    return f"{list(index)}: {x[index].item()} instead of {y[index].item()}"


def largest_gap(
    ours: Tensor, theirs: Tensor, before: Tensor
) -> tuple[float, tuple[int, ...]]:
    """Return the largest difference in ulp, and its index.

    An ulp is that of the largest of |before|, |theirs| and |theirs - before|, in the
    dtype of `theirs`: an ulp of the result alone means nothing near zero.
    """
    if not ours.numel():
        return 0.0, ()
    x, y, p = (t.detach().double() for t in (ours, theirs, before))
    size = torch.stack([p.abs(), y.abs(), (y - p).abs()]).amax(0)
    # At most half of the largest number, whose ulp is finite.
    most = torch.finfo(theirs.dtype).max / 2
    size = torch.where(size.isnan(), 0.0, size).clamp(max=most).to(theirs.dtype)
    ulp = torch.nextafter(size, torch.full_like(size, math.inf)).double() - size
    same = (x == y) | (x.isnan() & y.isnan())
    # Unequal infinities and NaN are infinitely far apart.
    gaps = torch.where(same, 0.0, ((x - y).abs() / ulp).nan_to_num(math.inf, math.inf))
    index = _argmax(gaps)
    return float(gaps[index]), index


def _argmax(x: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(x.argmax(), x.shape))
