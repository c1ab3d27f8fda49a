"""Check a `paramwise_cfg`: refuse what means nothing, warn of what is not read."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

from functional_optim._messages import did_you_mean

LR_RULES = ("bias_lr_mult", "dcn_offset_lr_mult")
DECAY_RULES = (
    "norm_decay_mult",
    "bias_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
)
FOR_ALL = ("lr_mult", "decay_mult")
_SWITCHES = ("bypass_duplicate", "compose")
RULES = (*FOR_ALL, *LR_RULES, *DECAY_RULES)
RULE_NAMES = (*RULES, *_SWITCHES, "custom_keys")
"""Everything that `paramwise_cfg` may have."""

_LEFT_OVER = ("_delete_", "_delete")
"""What MMEngine's config files write, and leave there where nothing is inherited."""


def check_paramwise_cfg(config: Any, *, strict: bool) -> None:
    """Refuse a `paramwise_cfg` that is no dict, and unknown rules and switches."""
    if not isinstance(config, Mapping):
        raise TypeError(
            "paramwise_cfg should be None or a dict, "
            f"but got {type(config).__name__} {config!r}"
        )
    for key in config:
        if key in RULE_NAMES or key in _LEFT_OVER:
            continue
        near = difflib.get_close_matches(str(key), RULE_NAMES, cutoff=0.9)
        if strict or near:
            hint = did_you_mean(str(key), RULE_NAMES)
            raise ValueError(f"paramwise_cfg has no rule {key!r}; {hint}")
    for key in _SWITCHES:
        if not isinstance(config.get(key, False), bool):
            raise TypeError(
                f"paramwise_cfg[{key!r}] must be a bool, got {config[key]!r}"
            )


def unread_in(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield warnings of keys that MMEngine takes, and does not read."""
    custom_keys = config.get("custom_keys", {})
    for place, keys in (("paramwise_cfg", config), ("custom_keys", custom_keys)):
        for key in filter(_LEFT_OVER.__contains__, keys):
            yield f"{place}[{key!r}] is no rule, it is left over from a config file"
    for key, options in custom_keys.items():
        for name in () if key in _LEFT_OVER else filter(is_near_multiplier, options):
            hint = did_you_mean(str(name), FOR_ALL)
            yield f"{label(key)}[{name!r}] multiplies nothing; {hint}"


def is_near_multiplier(name: Any) -> bool:
    """Whether an option is not one of the multipliers, but is spelt nearly so."""
    near = difflib.get_close_matches(str(name).lower(), FOR_ALL, cutoff=0.8)
    return name not in FOR_ALL and bool(near)


def label(key: str) -> str:
    """Return what a custom key is called in messages."""
    return f"custom_keys[{key!r}]"


def checked_multiplier(name: str, value: Any) -> Any:
    """Return a multiplier as it was given, if it is a finite number >= 0."""
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return value  # As given: an int stays one.


def checked_custom_keys(custom_keys: Any) -> dict[str, dict[str, Any]]:
    """Return a copy of `custom_keys`, if they mean something."""
    if not isinstance(custom_keys, Mapping):
        raise TypeError(
            "If specified, custom_keys must be a dict from a piece of a name to its "
            f"options, but got {type(custom_keys).__name__} {custom_keys!r}"
        )
    return {
        key: _checked_options(key, custom_keys[key])
        for key in custom_keys
        if key not in _LEFT_OVER
    }


def _checked_options(key: Any, options: Any) -> dict[str, Any]:
    if not isinstance(key, str):
        raise TypeError(
            f"custom_keys must have pieces of parameter names as keys, got {key!r}"
        )
    if not isinstance(options, Mapping):
        raise TypeError(
            f"{label(key)} must be a dict such as dict(lr_mult=0.1), got {options!r}"
        )
    for name, value in options.items():
        where = f"{label(key)}[{name!r}]"
        if name in FOR_ALL:
            checked_multiplier(where, value)
        elif name in RULE_NAMES or name in {"params", "param_names"}:
            raise ValueError(
                f"{where} cannot stand in a custom key, only lr_mult and decay_mult"
            )
    return dict(options)
