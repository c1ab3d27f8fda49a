"""A step that changes nothing, to see what memory it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from functional_optim.algebra._buffers import Donated, Workspace
from functional_optim.core._context import Context
from functional_optim.execution._memoized import num_remembered
from functional_optim.execution._reductions import Recorded
from functional_optim.execution._state_tree import nodes_of, rebuilt
from functional_optim.inspection._cost import size

if TYPE_CHECKING:
    from functional_optim.execution._buckets import Bucket
    from functional_optim.execution._reductions import Call
    from functional_optim.execution._state_tree import Field, Node
    from functional_optim.execution._units import Unit

_TRIED_BYTES = 32 * 2**20
"""Parameters of a unit up to this size are tried in memory, others without any."""


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live.

    Args:
        given: What was there before; it does not count.

    Attributes:
        most: The most bytes at one time.
    """

    def __init__(self, given: Any) -> None:
        TorchDispatchMode.__init__(self)
        self.most = 0
        leaves = [x for x in _pytree.tree_leaves(given) if isinstance(x, Tensor)]
        self._given = [StorageWeakRef(x.untyped_storage()) for x in leaves]
        self._known = {weak.cdata for weak in self._given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for cdata in [c for c, (weak, _) in self._live.items() if weak.expired()]:
            del self._live[cdata]
        for made in _pytree.tree_leaves(result):
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                weak = StorageWeakRef(storage)
                if weak.cdata not in self._known:
                    self._live.setdefault(weak.cdata, (weak, storage.nbytes()))
        self.most = max(self.most, sum(count for _, count in self._live.values()))
        return result


def temporary_bytes(bucket: Bucket, fields: list[Field]) -> int | None:
    """Return the bytes that an update of a unit takes for a while.

    Args:
        bucket: The bucket; its largest unit is tried, on zeros.
        fields: What is known about the nodes of the state.

    Returns:
        Bytes beside parameters, gradients and state; None if the transform cannot be
        tried out.
    """
    unit = max(bucket.units, key=lambda unit: size(unit.params.values()))
    device = "meta" if size(unit.params.values()) > _TRIED_BYTES else None
    params = {n: torch.zeros_like(p, device=device) for n, p in unit.params.items()}
    grads = {name: torch.zeros_like(param) for name, param in params.items()}
    state = _zeros(unit, fields, device)
    peak = Peak([params, grads, [n for n in nodes_of(state) if not _is_static(n)]])
    calls: list[Call] = []
    context = Context(last=True, reducer=Recorded(calls))  # Closes a window.
    try:
        with Workspace(), peak:
            bucket.transform.update(grads, state, params, context=context)
    except Exception:  # A user's transform may do anything here.
        return None
    if not calls:
        return peak.most
    # What looks at whole tensors is remembered, for all units, from pass to pass.
    everything = sum(size(unit.params.values()) for unit in bucket.units)
    return peak.most + num_remembered(bucket.transform) * everything


def _is_static(node: Node) -> bool:
    return not isinstance(node, (dict, Tensor))


def _zeros(unit: Unit, fields: list[Field], device: str | None) -> Any:
    """Return a state of zeros, to be written over where that of the unit would be."""
    nodes: list[Node] = []
    for node, field in zip(nodes_of(unit.state), fields, strict=True):
        if isinstance(node, dict):
            zeros = {n: torch.zeros_like(x, device=device) for n, x in node.items()}
            nodes.append(Donated(zeros) if field.donated else zeros)
        elif isinstance(node, Tensor):
            nodes.append(torch.zeros_like(node, device=device))
        else:
            nodes.append(node)
    return rebuilt(unit.state, iter(nodes))
