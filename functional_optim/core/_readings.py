"""Read logged numbers and named parts out of a state.

A transform may have a method `readings(state)`: a map from a short name to a 0-dim
tensor or a number. It reads nothing on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap
from functional_optim.core._transform import Transform
from functional_optim.core._traversal import walk


def readings(tx: Transform, state: Any) -> TensorMap:
    """Return the numbers that the transforms of a pipeline report, by name.

    `Observe` reports its own name; `ClipByGlobalNorm` `"norm"`, before clipping;
    `SkipNonfinite` `"skipped"` and `"consecutive"`; `ScaleByLearningRate` `"lr"`, the
    rate of the *next* update, unless it differs by name. The names of `Named` and the
    labels of `Partition` come before, joined by ".": `"matrix.lr"`. A transform of
    your own has a method `readings(state)` that returns such a map.

    Args:
        tx: Any transform.
        state: A state of it, as `init` or `update` returned it.

    Returns:
        0-dim tensors on the device of the state. `fetch` makes floats of them.

    Raises:
        ValueError: two readings have one name; the state is of another transform; a
            transform reports a tensor that is not 0-dim.
        TypeError: a transform reports something that is no tensor and no number.

    Example:
        >>> import functional_optim as fo
        >>> pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> _, state = pipeline.update(params, pipeline.init(params), params)
        >>> list(readings(pipeline, state))
        ['norm', 'lr']
    """
    device = _device_of(state)
    found: TensorMap = {}
    owners: dict[str, Transform] = {}
    for node in walk(tx, state):
        own = getattr(node.transform, "readings", None)
        if own is None:
            continue
        for name, value in _checked_readings(node.transform, own(node.state)):
            key = ".".join([*node.names, name])
            if key in owners:
                raise ValueError(_same_name(key, owners[key], node.transform))
            owners[key] = node.transform
            found[key] = _on(device, value)
    return found


def _same_name(key: str, first: Transform, second: Transform) -> str:
    return (
        f"two readings have the name {key!r}, of {first!r} and of {second!r}; give one "
        f'another name, such as Named("...", {second!r})'
    )


def _checked_readings(
    transform: Transform, told: Any
) -> list[tuple[str, float | Tensor]]:
    """Validate the readings of a transform, which may be a user's."""
    if not isinstance(told, Mapping):
        raise TypeError(
            f"{transform!r}.readings must return a dict by name, got {told!r}"
        )
    for name, value in told.items():
        if isinstance(value, Tensor):
            if value.ndim:
                raise ValueError(
                    f"reading {name!r} of {transform!r} must be a 0-dim tensor, got "
                    f"shape {tuple(value.shape)}; for stacked states use "
                    "torch.func.vmap(lambda state: readings(tx, state))"
                )
        elif not isinstance(value, (int, float)):
            raise TypeError(
                f"reading {name!r} of {transform!r} must be a 0-dim tensor or a "
                f"number, got {value!r}"
            )
    return list(told.items())


def _device_of(state: Any) -> torch.device:
    for leaf in _pytree.tree_leaves(state):
        if isinstance(leaf, Tensor):
            return leaf.device
    return torch.device("cpu")


def _on(device: torch.device, value: float | Tensor) -> Tensor:
    """Return a reading on a device, without a sync."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def fetch(readings: Mapping[str, Tensor]) -> dict[str, float]:
    """Read numbers on the host, all of them in one transfer.

    The only call here that waits for the device: make it when you log, not at every
    step.

    Args:
        readings: 0-dim tensors by name, such as `readings` returns; your own may be
            among them. Integers beyond 2**53 are rounded.

    Returns:
        Python floats under the same names.

    Raises:
        TypeError: not a map from name to real tensor.
        ValueError: a tensor is not 0-dim.

    Example:
        >>> fetch({"loss": torch.tensor(0.5), "skipped": torch.tensor(2)})
        {'loss': 0.5, 'skipped': 2.0}
    """
    if not isinstance(readings, Mapping):
        raise TypeError(f"readings must be a map from name to tensor, got {readings!r}")
    for name, value in readings.items():
        if not isinstance(value, Tensor) or value.is_complex():
            got = value.dtype if isinstance(value, Tensor) else repr(value)
            raise TypeError(
                f"readings[{name!r}] must be a real 0-dim tensor, got {got}"
            )
        if value.ndim:
            raise ValueError(
                f"readings[{name!r}] must be a 0-dim tensor, got shape "
                f"{tuple(value.shape)}; reduce it first, such as by .mean()"
            )
    if not readings:
        return {}
    # To the accelerator if there is one: from there everything comes back together.
    devices = [value.device for value in readings.values()]
    device = next((d for d in devices if d.type != "cpu"), devices[0])
    column = [
        v.to(device=device, dtype=torch.float64, non_blocking=True)
        for v in readings.values()
    ]
    return dict(zip(readings, torch.stack(column).tolist(), strict=True))


def state_of(tx: Transform, state: Any, name: str) -> Any:
    """Return the state of the part of a pipeline that has a name.

    Names are those of `Named` and the labels of `Partition`. Where one stands in
    several places, write the names on the way, joined by ".": `"matrix.clip"`.

    Args:
        tx: Any transform.
        state: A state of it.
        name: The name of the part.

    Returns:
        The state of that part; it is not copied.

    Raises:
        ValueError: no part has this name, or several have; the state is of another
            transform.

    Example:
        >>> import functional_optim as fo
        >>> params = {"w": torch.zeros(2)}
        >>> pipeline = fo.chain(fo.Named("slow", fo.Trace(0.9)), fo.Scale(-0.1))
        >>> state_of(pipeline, pipeline.init(params), "slow").momentum_buffer
        {'w': tensor([0., 0.])}
    """
    named = [
        (".".join(node.names), node.state)
        for node in walk(tx, state)
        if node.path and isinstance(node.path[-1], str)
    ]
    found = [s for path, s in named if path == name or path.endswith(f".{name}")]
    if len(found) == 1:
        return found[0]
    known = format_names((path for path, _ in named), most=20)
    if not found:
        raise ValueError(
            f"no part has the name {name!r}; the names are {known}. Give one with "
            f"Named({name!r}, ...)"
        )
    raise ValueError(
        f"{len(found)} parts have the name {name!r}; the names are {known}. Write the "
        "names on the way too, or give one of them another name"
    )
