"""Our registries as MMEngine's: what its functions and child registries ask for."""

from __future__ import annotations

from typing import Any

from functional_optim.facade._registry import Registry


def become_registry(own: Registry, theirs: Any) -> None:
    """Let a registry of ours be one of MMEngine's as well; it stays the same object.

    `mmengine.registry.build_from_cfg` takes it then, and it can be a parent.

    Args:
        own: The registry.
        theirs: `mmengine.registry`.
    """

    def add_child(self: Any, child: Any) -> None:
        theirs.Registry._add_child(self, child)

        def find(key: str) -> Any:
            scope, _, name = key.partition(".")
            try:
                return child.get(name) if scope == child.scope else None
            except RuntimeError:  # It tried to import what it did not find.
                return None

        self.look_also(find)

    # What MMEngine's `__init__` sets; what it asks by methods, ours come first.
    also = {
        "_add_child": add_child,
        "_children": {},
        "_imported": True,
        "_locations": [],
        "_scope": "functional_optim",
        "build_func": staticmethod(theirs.build_from_cfg),
        "parent": None,
    }
    kind: Any = type("Registry", (type(own), theirs.Registry), also)
    own.__class__ = kind
