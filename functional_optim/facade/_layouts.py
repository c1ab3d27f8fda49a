"""Which layouts an optimizer may have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from functional_optim._types import TensorMap

_LAYOUTS = ("leaves", "auto", "flat")


def check_layout(layout: object, *, differentiable: bool) -> None:
    """Refuse a layout that there is not.

    Args:
        layout: What was given.
        differentiable: Whether autograd records the steps.

    Raises:
        ValueError: it is none, or does not go with `differentiable`.
    """
    if layout not in _LAYOUTS:
        names = ", ".join(map(repr, _LAYOUTS))
        msg = f"layout must be one of {names}, got {layout!r}"
        raise ValueError(msg)
    if layout == "flat" and differentiable:
        msg = (
            "layout='flat' moves parameters, which autograd cannot record; leave it "
            "out with differentiable=True"
        )
        raise ValueError(msg)


def check_may_be_flat(params: TensorMap) -> None:
    """Refuse to move what does not lie in the memory of the host.

    Raises:
        ValueError: naming a parameter.
    """
    for name, param in params.items():
        if param.device.type != "cpu":
            msg = (
                f"layout='flat' is for parameters on the CPU, but {name!r} lies on "
                f"{param.device}; use layout='auto', or move the model first"
            )
            raise ValueError(msg)
