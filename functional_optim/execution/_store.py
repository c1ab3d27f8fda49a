"""The state of an executor: one set of tensors, by name and as a list of nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from functional_optim.execution._state_tree import (
    fields_of,
    mapped,
    nodes_of,
    rebuilt,
    tensors_of,
)
from functional_optim.execution._tensor_memory import apart, memory_of

if TYPE_CHECKING:
    from functional_optim.core._transform import Static, TensorMap, Transform
    from functional_optim.execution._state_tree import Node


class Store:
    """A state whose tensors stay the same from step to step.

    Its tensors share no memory with each other or with the parameters. A rule may start
    from one zero for all, or from the parameters: where each step makes new tensors
    nobody can tell.

    Args:
        transform: The transform.
        state: A state of it, over all parameters. Its tensors are taken where they lie
            alone.
        params: All parameters.

    Attributes:
        state: The state in the form of the transform.
        nodes: Its nodes. Whoever plans may put other tensors into them.
        fields: What is known about the nodes.
        replaced: Whether tensors were replaced since somebody set this to False.
    """

    def __init__(self, transform: Transform, state: Any, params: TensorMap) -> None:
        self.replaced = True
        self.fields = fields_of(transform, state, params)
        own = iter(apart(list(tensors_of(state)), params.values()))
        self._take(mapped(state, lambda _: next(own)))

    def _take(self, state: Any) -> None:
        self.nodes: list[Node] = [
            dict(node) if isinstance(node, dict) else node for node in nodes_of(state)
        ]
        self.state = rebuilt(state, iter(self.nodes))

    def replace(self, state: Any) -> None:
        """Go on from another state, whose tensors are taken as they are."""
        self._take(state)
        self.replaced = True

    def load(self, nodes: list[Node]) -> None:
        """Take over the numbers of other nodes; tensors stay where dtypes agree."""
        # Ours may come back in another order: all is read before one is written.
        mine = {memory_of(entry) for entry in tensors_of(self.state)}
        nodes = nodes_of(mapped(tuple(nodes), lambda new: free(new, mine)))
        for index, (old, new) in enumerate(zip(self.nodes, nodes, strict=True)):
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                old.copy_(new)
            elif isinstance(old, dict) and isinstance(new, dict):
                for name, entry in old.items():
                    if new[name].dtype == entry.dtype:
                        entry.copy_(new[name])
                    else:
                        old[name] = new[name].to(entry.device, copy=True)
            else:
                self.nodes[index] = new
        self._take(rebuilt(self.state, iter(self.nodes)))

    def set_statics(self, statics: dict[int, Static[Any]]) -> bool:
        """Go on with other values that are known on the host.

        Args:
            statics: The values, by index of the node.

        Returns:
            Whether one is another than before.
        """
        if all(self.nodes[index] == node for index, node in statics.items()):
            return False
        for index, node in statics.items():
            self.nodes[index] = node
        self.state = rebuilt(self.state, iter(self.nodes))
        return True


def free(new: Tensor, homes: set[int]) -> Tensor:
    """Return a tensor that stays as it is while others are written.

    Args:
        new: The tensor.
        homes: Where the others lie, as `memory_of` tells.
    """
    return new.clone() if memory_of(new) in homes else new
