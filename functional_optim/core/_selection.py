r"""Select parameters by globs, regexes, predicates, masks and rules.

A *selection* picks parameters. It is one of

- a glob over the whole name, `"*.bias"` (an exact name is a glob too),
- a compiled regex that is searched in the name, `re.compile(r"layers\.\d+\.")`,
- a predicate on name and tensor, `lambda name, p: p.ndim >= 2`,
- `exclude(...)`: everything that the selections in it do not pick,
- a tuple or list of selections: whatever any of them picks,
- a map from every name to bool, at least of the parameters at hand, or one bool.

A predicate must depend on the name, shape and dtype alone: it is asked at every step.

*Rules* give each parameter a value: a map from selection (or name) to value, or a list
of (selection, value) pairs. The first rule that fits wins.
"""

from __future__ import annotations

import fnmatch
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, Union, final

import torch
from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap, lookup
from functional_optim.algebra._torch_modes import constant_when_compiled
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._validation import check_by_name, model_parameters
from functional_optim.core._value_class import format_value

V = TypeVar("V")

Predicate: TypeAlias = Callable[[str, Tensor], bool]

Selection: TypeAlias = Union[
    str,
    "re.Pattern[str]",
    Predicate,
    "Exclude",
    Sequence["Selection"],
    Mapping[str, bool],
    bool,
]


def validate_selection(name: str, selection: Any) -> Any:
    """Validate a selection, and copy what the caller could still change."""
    if isinstance(selection, Mapping):
        for key, value in selection.items():
            if not isinstance(key, str) or not isinstance(value, bool):
                raise TypeError(
                    f"{name} as a map must give a bool for every parameter name, got "
                    f"{key!r}: {value!r}"
                )
        return dict(selection)
    if isinstance(selection, (str, re.Pattern, bool, Exclude)):
        return selection
    if isinstance(selection, Sequence):
        return tuple(validate_selection(name, part) for part in selection)
    if callable(selection) and not isinstance(selection, type):
        return selection
    raise TypeError(
        f"{name} must be a glob, a compiled regex, a predicate on name and tensor, "
        "exclude(...), a tuple of these, or a map from every name to bool, got "
        f"{selection!r}"
    )


def matches(selection: Any, name: str, param: Tensor) -> bool:
    """Whether a selection matches a parameter.

    Example:
        >>> import torch
        >>> matches(("*.bias", lambda name, p: p.ndim == 0), "head.bias", torch.ones(3))
        True
    """
    if isinstance(selection, bool):
        return selection
    if isinstance(selection, str):
        return _glob_matches(selection, name)
    if isinstance(selection, re.Pattern):
        return selection.search(name) is not None
    if isinstance(selection, Exclude):
        return not matches(selection.selections, name, param)
    if isinstance(selection, Mapping):
        return bool(lookup(selection, [name])[0])
    if isinstance(selection, tuple):
        return any(matches(part, name, param) for part in selection)
    return bool(selection(name, param))


@constant_when_compiled  # It cannot trace the building of a regex.
def _glob_matches(pattern: str, name: str) -> bool:
    # A name may have the characters of globs in it, and is still its own name.
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def substrings_of(name: str, keys: Iterable[str]) -> list[str]:
    """Return the keys that a name contains, the longest first, ties by alphabet.

    A name at the top of the model counts as ".name": elsewhere it has a dot, too.

    Example:
        >>> substrings_of("layer0.bias", ["layer", ".bias", "layer0.bias", "head"])
        ['layer0.bias', '.bias', 'layer']
    """
    dotted = name if "." in name else f".{name}"
    return sorted([k for k in keys if k in dotted], key=lambda key: (-len(key), key))


@final
@value_class
class Exclude:
    """The selection of everything that the given selections do not pick.

    Made by `exclude`.
    """

    selections: tuple[Selection, ...] = checked(check=validate_selection)

    def __repr__(self) -> str:
        return f"exclude({', '.join(map(format_value, self.selections))})"


def exclude(*selections: Selection) -> Exclude:
    """Return the selection of everything that none of the given selections picks.

    Args:
        selections: Globs, compiled regexes, predicates on name and tensor.

    Raises:
        TypeError: one is no selection.

    Example:
        >>> import functional_optim as fo
        >>> fo.adamw(1e-3, mask=fo.exclude("*.bias", "*norm*"))[1]
        Masked(AddDecayedWeights(0.01), exclude('*.bias', '*norm*'))
    """
    return Exclude(selections)


def select_names(selection: Any, params: TensorMap, names: Sequence[str]) -> list[str]:
    """Return the names that a selection matches, in their order."""
    if selection is True:
        return list(names)
    return [name for name in names if matches(selection, name, params[name])]


def check_selection_matches(selection: Any, params: TensorMap, name: str) -> None:
    """Refuse a selection of which some part matches no parameter of the model.

    Only an explicit False, or a map of them, may select nothing.
    """
    if isinstance(selection, Mapping):
        check_by_name(name, selection, params)
        return
    if isinstance(selection, bool) or not params:
        return
    if callable(selection) and not isinstance(selection, Exclude):
        _check_predicate(selection, name)
    parts = selection.selections if isinstance(selection, Exclude) else selection
    for part in parts if isinstance(parts, tuple) else ():
        check_selection_matches(part, params, name)
    known = model_parameters(params)
    if not select_names(selection, known, list(known)):
        raise ValueError(
            f"{name}: {format_value(selection)} matches no parameter; the names are "
            f"{format_names(known)}"
        )


Rules: TypeAlias = Mapping[Selection, V] | Sequence[tuple[Selection, V]]
"""Values by selection, the first that fits wins."""


def _check_predicate(predicate: Predicate, name: str) -> None:
    """Refuse a predicate that does not take a name and a tensor."""
    if torch.compiler.is_compiling():
        return  # It cannot trace a look at a signature; the call itself raises.
    try:
        inspect.signature(predicate).bind("name", "param")
    except TypeError:
        raise TypeError(
            f"{name}: {format_value(predicate)} must take a name and a tensor, such as "
            "lambda name, param: param.ndim >= 2"
        ) from None
    except ValueError:
        return  # Builtins do not tell.


def validate_rules(name: str, rules: Any, check: Callable[[str, Any], Any]) -> Any:
    """Validate rules, and copy what the caller could still change."""
    if isinstance(rules, Mapping):
        pairs = list(rules.items())
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        pairs = list(rules)
    else:
        return check(name, rules)
    checked = []
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or isinstance(pair, str):
            raise TypeError(f"{name} must be (selection, value) pairs, got {pair!r}")
        selection = validate_selection(f"selection in {name}", pair[0])
        value = check(f"{name}[{format_value(selection)}]", pair[1])
        checked.append((selection, value))
    if not isinstance(rules, Mapping):
        return tuple(checked)
    plain = all(isinstance(s, str) and not set(s) & set("*?[") for s, _ in checked)
    return ByName(checked) if plain else dict(checked)


class ByName(dict[Any, Any]):
    """Rules by the names of parameters, which are looked up."""


def first_match(rules: Any, name: str, param: Tensor, default: Any) -> Any:
    """Return the value of the first rule that matches a parameter, else the default."""
    if isinstance(rules, ByName):
        return rules.get(name, default)
    if not isinstance(rules, (dict, tuple)):
        return rules
    for selection, value in _pairs(rules):
        if matches(selection, name, param):
            return value
    return default


def _pairs(rules: Any) -> Iterable[tuple[Any, Any]]:
    return rules.items() if isinstance(rules, dict) else rules


def check_rules_match(rules: Any, params: TensorMap, name: str) -> None:
    """Refuse rules of which one matches no parameter."""
    if isinstance(rules, (dict, tuple)):
        by_name, known = isinstance(rules, ByName), model_parameters(params)
        for selection, _ in _pairs(rules):
            if not by_name or selection not in known:
                check_selection_matches(selection, params, f"rule in {name}")


def names_by_rule(rules: Any, params: TensorMap) -> list[tuple[str, list[str]]]:
    """Return each rule, formatted, with the names that it decides.

    A name belongs to the first rule that fits it.

    Example:
        >>> import torch
        >>> params = {"a.bias": torch.ones(1), "b.bias": torch.ones(1)}
        >>> names_by_rule({"a.*": 2.0, "*": 3.0}, params)
        [("'a.*': 2.0", ['a.bias']), ("'*': 3.0", ['b.bias'])]
    """
    if not isinstance(rules, (dict, tuple)):
        return [(format_value(rules), list(params))]
    left, found = dict(params), []
    for selection, value in _pairs(rules):
        names = select_names(selection, left, list(left))
        found.append((f"{format_value(selection)}: {format_value(value)}", names))
        for name in names:
            del left[name]
    return found
