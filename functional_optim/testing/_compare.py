"""Comparing trees of tensors: bit for bit, or to a bound; with the place of a gap."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves of a state or map with their places."""
    found, _ = _pytree.tree_flatten_with_path(tree)
    return [(_pytree.keystr(path), leaf) for path, leaf in found]


def tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a state or map with their places."""
    return [(place, x) for place, x in leaves(tree) if isinstance(x, Tensor)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and every bit."""
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    if a.is_meta:  # It has no numbers.
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Cloned, because a single number may have a stride of 0, which has no bytes.
    flat = [x.detach().reshape(-1).clone().view(torch.uint8) for x in (a, b)]
    return torch.equal(*flat)


def difference(a: Any, b: Any, rtol: float | None = None) -> str | None:
    """Return where two trees part, or None if they agree."""
    forms = _pytree.tree_structure(a), _pytree.tree_structure(b)
    if forms[0] != forms[1]:  # The structure holds the names, and what is Static.
        return _difference_of_form(a, b)
    for (place, x), (_, y) in zip(leaves(a), leaves(b), strict=True):
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            if type(x) is not type(y) or x != y:
                return f"{place}: {x!r} instead of {y!r}"
            continue
        for what in ("shape", "dtype", "device"):
            one, other = getattr(x, what), getattr(y, what)
            if one != other:
                return f"{place}: {what} {_plain(one)} instead of {_plain(other)}"
        exact = rtol is None or not x.is_floating_point()
        if not (same_bits(x, y) if exact else close(x, y, rtol or 0.0)):
            return place + _numbers_that_differ(x, y)
    return None


def close(x: Tensor, y: Tensor, rtol: float) -> bool:
    """Whether two tensors agree relative to their largest number; NaN equals NaN."""
    # Some results are narrower than what they are compared in: float32 moments.
    rtol = min(rtol * torch.finfo(x.dtype).eps / torch.finfo(torch.float64).eps, 0.05)
    x, y = x.detach().double(), y.detach().double()
    finite = torch.where(x.isfinite(), x, 0.0).abs()
    scale = float(finite.max()) if x.numel() else 0.0
    return torch.allclose(x, y, rtol, rtol * scale, equal_nan=True)


def _difference_of_form(a: Any, b: Any) -> str:
    """Say how two trees differ in their names, lengths or Static values."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() != b.keys():
        return f": names {list(a)} instead of {list(b)}"
    if isinstance(a, (tuple, dict)) and type(a) is type(b) and len(a) == len(b):
        keys: Any = a if isinstance(a, dict) else range(len(a))
        for key in keys:
            if _pytree.tree_structure(a[key]) != _pytree.tree_structure(b[key]):
                fields = getattr(a, "_fields", None)
                step = f".{fields[key]}" if fields else f"[{key!r}]"
                return step + _difference_of_form(a[key], b[key])
    return f": {a!r} instead of {b!r}"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _numbers_that_differ(x: Tensor, y: Tensor) -> str:
    """Show two tensors, or the numbers that are farthest apart if there are many."""
    if x.numel() <= 8:
        return f": {x.detach().tolist()} instead of {y.detach().tolist()}"
    gaps = (x.detach().double() - y.detach().double()).abs().reshape(-1)
    at = int(gaps.nan_to_num(math.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(at), x.shape)]
    one, other = x.reshape(-1)[at].item(), y.reshape(-1)[at].item()
    return f"{index}: {one} instead of {other}"


def storages(tree: Any) -> set[int]:
    """Return where the numbers of a tree lie in memory."""
    return {
        leaf.untyped_storage().data_ptr() for _, leaf in tensors(tree) if leaf.numel()
    }


def largest_gap(
    ours: Tensor, theirs: Tensor, before: Tensor
) -> tuple[float, tuple[int, ...]]:
    """Return how far two results are apart in ulp, and at which element.

    An ulp is that of the largest of |before|, |theirs| and |theirs - before|, in the
    dtype of `theirs`: an ulp of the result alone means nothing near zero.
    """
    if not ours.numel():
        return 0.0, ()
    x, y, p = (t.detach().reshape(-1).double() for t in (ours, theirs, before))
    size = torch.stack([p.abs(), y.abs(), (y - p).abs()]).amax(0)
    # At most half of the largest number, whose ulp is finite.
    most = torch.finfo(theirs.dtype).max / 2
    size = torch.where(size.isnan(), 0.0, size).clamp(max=most).to(theirs.dtype)
    ulp = torch.nextafter(size, torch.full_like(size, math.inf)).double() - size
    same = (x == y) | (x.isnan() & y.isnan())
    # Unequal infinities and NaN are infinitely far apart.
    gaps = torch.where(same, 0.0, ((x - y).abs() / ulp).nan_to_num(math.inf, math.inf))
    at = int(gaps.argmax())
    index = torch.unravel_index(torch.tensor(at), theirs.shape)
    return float(gaps[at]), tuple(int(i) for i in index)
