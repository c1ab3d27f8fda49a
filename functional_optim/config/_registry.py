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

    def __str__(self) -> str:
        """Return the message, which a KeyError would put into quotes."""
        return str(self.args[0])


class Registry:
    """Classes and functions by name, that configs choose and give their arguments.

    A name with dots that nobody registered is imported: "torch.optim.SGD".

    Args:
        name: What the registry is called in messages.
        find: Looks up a name that nobody registered; returns None if it finds nothing.
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
        self,
        name: str,
        *,
        find: Callable[[str], Any] | None = None,
        replace: Callable[[Any], Any] | None = None,
    ) -> None:
        self._name = name
        self._finds = [] if find is None else [find]
        self._replace = replace
        self._module_dict: dict[str, Callable[..., Any]] = {}

    @property
    def name(self) -> str:
        """What the registry is called."""
        return self._name

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """What was registered, by name."""
        return self._module_dict

    def __len__(self) -> int:
        return len(self._module_dict)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._found(key) is not None

    def __repr__(self) -> str:
        return f"Registry({self._name!r}, {sorted(self._module_dict)})"

    def get(self, key: str) -> Any:
        """Return what stands under a name, None if nothing does.

        Args:
            key: The name, or where to import from: "torch.optim.SGD".

        Raises:
            TypeError: the name is no string.
        """
        if not isinstance(key, str):
            raise TypeError(
                f"a name in the {self._name} registry is a string, got {key!r}"
            )
        found = self._found(key)
        if found is None:
            imported = _imported(key)
            found = self._in_place_of(imported) if callable(imported) else None
        if found is None and "." in key:
            # MMEngine's configs may put the name of a package in front.
            found = self._found(key.partition(".")[2])
        return found

    def _found(self, key: str) -> Any:
        found = self._module_dict.get(_name_here(key))
        for find in self._finds:
            if found is None:
                found = find(key)
        return found

    def resolve(self, kind: Any) -> Callable[..., Any]:
        """Return what a config's `type` stands for: a name, a class, a function.

        Args:
            kind: The `type`.

        Raises:
            KeyError: nobody registered the name; a ValueError, too.
            TypeError: it is neither a name nor can it be called.
        """
        if isinstance(kind, str):
            found: Callable[..., Any] | None = self.get(kind)
            if found is None:
                raise RegistryError(
                    f"{kind!r} is not in the {self._name} registry; "
                    f"{did_you_mean(kind, self._module_dict)}"
                )
            return found
        if not callable(kind):
            raise TypeError(
                f"type must be a name in the {self._name} registry, a class or a "
                f"function, got {kind!r}"
            )
        return self._in_place_of(kind)

    @contextlib.contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Return a context that has the registry itself, whatever the scope.

        Constructors that are written for MMEngine look names up in it.

        Args:
            scope: The scope of MMEngine that is asked for.
        """
        yield self

    def look_also(self, find: Callable[[str], Any]) -> None:
        """Look a name up elsewhere, too, where it is not found before.

        Args:
            find: Returns what stands under a name, None if nothing does.
        """
        self._finds.append(find)

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
        """Build what a config describes.

        Args:
            cfg: `type`, which is a name, a class or a function, and its arguments. It
                is not changed.
            default_args: Arguments that count where `cfg` lacks them.

        Raises:
            KeyError: `type` is missing, or nobody registered it; a ValueError, too.
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
        # Where a name is to be looked for, as MMEngine's runner writes into configs.
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

    def _in_place_of(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is built instead of a class or function, most often itself."""
        path = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
        replaced: Callable[..., Any] | None = self._module_dict.get(_name_here(path))
        if replaced is None and self._replace is not None:
            replaced = self._replace(kind)
        return kind if replaced is None else replaced


def arguments_of(kind: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that a class or function takes.

    Where a class passes on what it does not know, those of its bases come behind.
    """
    chain: list[Any] = [kind]
    if isinstance(kind, type):
        chain = [vars(c)["__init__"] for c in kind.__mro__ if "__init__" in vars(c)]
    names: dict[str, None] = {}
    for function in chain:
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError:  # Builtins do not tell.
            break
        plain = [
            p for p in parameters if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}
        ]
        names.update(dict.fromkeys(p.name for p in plain if p.name != "self"))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def _name_here(key: str) -> str:
    """Return what a class of MMEngine's is called here, if a key is its dotted path.

    Configs that are dumped have such paths, such as
    "mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper".
    """
    package, _, path = key.partition(".")
    return path.rpartition(".")[2] if package == "mmengine" else key


def _imported(path: str) -> Any:
    """Return what a dotted path names, None if there is no such thing."""
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
