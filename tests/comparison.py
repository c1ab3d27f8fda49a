"""Asserting that trees of tensors agree."""

from __future__ import annotations

from typing import Any

from functional_optim.testing._compare import difference


def assert_same(a: Any, b: Any, what: str, rtol: float | None = None) -> None:
    """Assert that two trees agree: bit for bit, or relative to their largest number."""
    gap = difference(b, a, rtol)
    assert not gap, f"{what}{gap}"
