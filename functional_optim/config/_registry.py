"""Registries: classes and functions by name, built from configs."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from functional_optim._messages import did_you_mean

T = TypeVar("T", bound=Callable[..., Any])


class RegistryError(KeyError, ValueError):
    """A name is not in a registry, or is in it already."""

    __str__ = Exception.__str__  # A KeyError would put the message into quotes.


class Registry:
    """Classes and functions by name, that configs choose and give their arguments.

    A name with dots that is not registered is imported: "torch.optim.SGD".

    Args:
        name: What the registry is called in messages.
        replace: Returns what is built instead of a class or function that a config
            has as its type; None builds that itself.

    Example:
        >>> CLIPPERS = Registry("clipper")
        >>> @CLIPPERS.register_module()
        ... class Clipper:
        ...     def __init__(self, max_norm):
        ...         self.max_norm = max_norm
        >>> CLIPPERS.build(dict(type="Clipper", max_norm=1.0)).max_norm
        1.0
        >>> "Clipper" in CLIPPERS, len(CLIPPERS)
        (True, 1)

    Source:
        mmengine.registry.Registry.
    """

    def __init__(
        self, name: str, *, replace: Callable[[Any], Any] | None = None
    ) -> None:
        self._name = name
        self._lookups: list[Callable[[str], Any]] = []
        self._replace = replace
        self._module_dict: dict[str, Callable[..., Any]] = {}

    @property
    def name(self) -> str:
        """The name of the registry in messages."""
        return self._name

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """The registered classes and functions, by name."""
        return self._module_dict

    def __len__(self) -> int:
        return len(self._module_dict)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._find(key) is not None

    def __repr__(self) -> str:
        return f"Registry({self._name!r}, {sorted(self._module_dict)})"

    def get(self, key: str) -> Any:
        """Return the class or function of a name, None if there is none.

        Args:
            key: The name, or where to import from: "torch.optim.SGD".
        """
        if not isinstance(key, str):
            raise TypeError(
                f"a name in the {self._name} registry is a string, got {key!r}"
            )
        found = self._find(key)
        if found is None:
            imported = _import(key)
            found = self._replacement(imported) if callable(imported) else None
        if found is None and "." in key and not key.startswith("fo."):
            # MMEngine's configs may put the name of a package in front.
            found = self._find(key.partition(".")[2])
        return found

    def _find(self, key: str) -> Any:
        found = self._module_dict.get(_own_name(key))
        for lookup in self._lookups:
            if found is None:
                found = lookup(key)
        return found

    def resolve(self, kind: Any) -> Callable[..., Any]:
        """Return the class or function of a config's `type`, which may be a name."""
        if not isinstance(kind, str):
            if not callable(kind):
                raise TypeError(
                    f"type must be a name in the {self._name} registry, a class or a "
                    f"function, got {kind!r}"
                )
            return self._replacement(kind)
        found: Callable[..., Any] | None = self.get(kind)
        if found is None:
            raise RegistryError(
                f"{kind!r} is not in the {self._name} registry; "
                f"{did_you_mean(kind, self._module_dict)}"
            )
        return found

    @contextlib.contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Return a context that has this registry, whatever MMEngine's scope.

        Constructors that are written for MMEngine look names up in it.
        """
        yield self

    def add_lookup(self, lookup: Callable[[str], Any]) -> None:
        """Add a function that looks a name up, and returns None if it has none."""
        self._lookups.append(lookup)

    def register_module(
        self,
        name: str | Sequence[str] | None = None,
        force: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> Any:
        """Register a class or a function; as a decorator, or as a call with `module`.

        Args:
            name: Its name, or several; None takes the name that it has.
            force: Whether it may replace what has that name.
            module: The class or function; None returns a decorator.

        Raises:
            KeyError: the name is taken, and `force` is False; a ValueError, too.
            TypeError: a name is no string, `module` cannot be called.
        """
        if not isinstance(force, bool):
            raise TypeError(f"force must be True or False, got {force!r}")
        names = [name] if isinstance(name, str) else name
        if names is not None and not (
            isinstance(names, Sequence) and all(isinstance(n, str) for n in names)
        ):
            raise TypeError(
                "name must be None, a string or a sequence of strings, got "
                f"{name!r}; write register_module() with parentheses"
            )

        def register(module: T) -> T:
            if not callable(module):
                raise TypeError(f"module must be a class or a function, got {module!r}")
            chosen = [module.__name__] if names is None else list(names)
            for key in chosen:
                if key in self._module_dict and not force:
                    raise RegistryError(
                        f"{key} is already registered in the {self._name} registry, as "
                        f"{self._module_dict[key]!r}; force=True replaces it"
                    )
            self._module_dict.update(dict.fromkeys(chosen, module))
            return module

        return register if module is None else register(module)

    def build(
        self, cfg: Mapping[str, Any], default_args: Mapping[str, Any] | None = None
    ) -> Any:
        """Build an object from a config.

        Args:
            cfg: `type`, which is a name, a class or a function, and its arguments. It
                is not changed.
            default_args: Arguments that count where `cfg` lacks them.

        Raises:
            KeyError: `type` is missing, or not registered; a ValueError, too.
            TypeError: an argument is unknown, or `cfg` is no dict.
        """
        for what, given in (("cfg", cfg), ("default_args", default_args or {})):
            if not isinstance(given, Mapping):
                raise TypeError(f"{what} should be a dict, but got {given!r}")
        args = {**(default_args or {}), **cfg}
        if "type" not in args:
            raise RegistryError(
                f'`cfg` or `default_args` must contain the key "type", a name in the '
                f"{self._name} registry or a class, but got {dict(cfg)!r}"
            )
        # MMEngine's runner writes the scope for names into configs.
        args.pop("_scope_", None)
        kind = self.resolve(args.pop("type"))
        try:
            return kind(**args)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None or unknown[1] not in args:
                raise
            hint = did_you_mean(unknown[1], arguments_of(kind))
            label = getattr(kind, "__name__", repr(kind))
            raise TypeError(
                f"{label} takes no {unknown[1]}={args[unknown[1]]!r}; {hint}"
            ) from error

    def _replacement(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Return what replaces a class or function, most often itself."""
        path = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
        replaced: Callable[..., Any] | None = self._module_dict.get(_own_name(path))
        if replaced is None and self._replace is not None:
            replaced = self._replace(kind)
        return kind if replaced is None else replaced


def arguments_of(kind: Callable[..., Any]) -> list[str]:
    """Return the arguments of a class or function, with those of bases behind `**`."""
    chain: list[Any] = [kind]
    if isinstance(kind, type):
        chain = [vars(c)["__init__"] for c in kind.__mro__ if "__init__" in vars(c)]
    names: dict[str, None] = {}
    for function in chain:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # Builtins have no signature.
            break
        for p in parameters:
            if p.name != "self" and p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}:
                names[p.name] = None
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _own_name(key: str) -> str:
    """Return the last part of a dotted path in MMEngine, as dumped configs have."""
    package, _, path = key.partition(".")
    return path.rpartition(".")[2] if package == "mmengine" else key


def _import(path: str) -> Any:
    """Import the object at a dotted path, None if there is none."""
    module, _, name = path.rpartition(".")
    if not module:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None
        raise  # It is there, and lacks something itself.
    except (TypeError, ValueError):  # Dots in front.
        return None
