"""Find the multipliers of each parameter by the rules of a `paramwise_cfg`."""

from __future__ import annotations

import difflib
import logging
import math
import numbers
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from functional_optim._messages import close_matches, did_you_mean
from functional_optim.core._selection import substrings_of
from functional_optim.transforms._scaling import Multipliers

_GENERAL_RULES = ("lr_mult", "decay_mult")
_LR_RULES = ("bias_lr_mult", "dcn_offset_lr_mult")
_DECAY_RULES = (
    "norm_decay_mult",
    "bias_decay_mult",
    "dwconv_decay_mult",
    "flat_decay_mult",
)
_RULES = (*_GENERAL_RULES, *_LR_RULES, *_DECAY_RULES)
_SWITCHES = ("bypass_duplicate", "compose")
KEYS = (*_RULES, *_SWITCHES, "custom_keys")
"""The keys of a `paramwise_cfg`."""

_LEFT_OVER = ("_delete_", "_delete")
"""Keys of MMEngine's config files that stay where nothing is inherited."""

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_DEFORMABLE = {"DeformConv2d", "ModulatedDeformConv2d"}
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Where torch.compile, FSDP and activation checkpointing keep a wrapped module."""

_logger = logging.getLogger("functional_optim")


class ModuleParam(NamedTuple):
    """A parameter in the module that has it."""

    module: nn.Module
    name: str
    prefix: str
    in_deformable: bool
    param: nn.Parameter

    @property
    def full_name(self) -> str:
        """Its name in the model."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer; RMS norms of models by their name."""
    return isinstance(module, _NORMS) or any(
        cls.__name__.endswith("RMSNorm") for cls in type(module).__mro__
    )


def is_deformable(module: nn.Module) -> bool:
    """Whether a module is a deformable convolution, by the name of its class."""
    names = {cls.__name__.removesuffix("Pack") for cls in type(module).__mro__}
    return not names.isdisjoint(_DEFORMABLE)


def strip_wrappers(name: str) -> str:
    """Return the name of a parameter without the wrappers inside its model."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def child_modules(
    module: nn.Module, prefix: str, in_deformable: bool
) -> Iterator[tuple[nn.Module, str, bool]]:
    """Yield each child, its prefix, and whether a deformable convolution has it."""
    for name, child in module.named_children():
        if name in _WRAPPERS:
            yield child, prefix, in_deformable
        else:
            yield child, f"{prefix}.{name}" if prefix else name, is_deformable(module)


def _module_params(
    module: nn.Module, prefix: str = "", in_deformable: bool = False
) -> Iterator[ModuleParam]:
    """Yield all parameters of a module, shared ones once for each module."""
    for name, param in module.named_parameters(recurse=False):
        yield ModuleParam(module, name, prefix, in_deformable, param)
    for child, its_prefix, inside in child_modules(module, prefix, in_deformable):
        yield from _module_params(child, its_prefix, inside)


def matching_rules(at: ModuleParam) -> Iterator[str]:
    """Yield the rules for the kind of layer that match a parameter, by precedence."""
    module, is_bias, free = at.module, at.name == "bias", not at.in_deformable
    norm, conv = is_norm(module), isinstance(module, nn.Conv2d)
    if is_bias and free and not norm:
        yield "bias_lr_mult"
    if conv and not free and "conv_offset" in at.prefix:
        yield "dcn_offset_lr_mult"
    if norm:
        yield "norm_decay_mult"
    # Where a rule for the layer is missing, that for its bias counts, as in MMEngine.
    if is_bias and free:
        yield "bias_decay_mult"
    if isinstance(module, nn.Conv2d) and module.in_channels == module.groups:
        yield "dwconv_decay_mult"
    if at.param.ndim == 1 and free:
        yield "flat_decay_mult"


class MatchedRules(NamedTuple):
    """The multipliers and options of one parameter, and the rules that they follow."""

    lr: float | None
    weight_decay: float | None
    options: dict[str, Any]
    applied: list[str]
    matching: list[str]


class ParamwiseRules:
    """The rules of a `paramwise_cfg`, validated."""

    def __init__(self, config: Mapping[str, Any], *, strict: bool = True) -> None:
        _check_keys(config, strict=strict)
        self._multipliers = {
            key: check_nonnegative(f"paramwise_cfg[{key!r}]", config[key])
            for key in _RULES
            # As in MMEngine None is the same as no rule.
            if config.get(key) is not None
        }
        self.bypass_duplicate: bool = config.get("bypass_duplicate", False)
        self._composes: bool = config.get("compose", False)
        self._custom = _checked_custom_keys(config.get("custom_keys", {}))
        self._config = config

    def rules_of(self, kind: str) -> list[str]:
        """Return the rules that multiply a base value: `kind` is "lr" or "decay"."""
        name = f"{kind}_mult"
        custom = [key for key, options in self._custom.items() if name in options]
        return [
            *(rule for rule in self._multipliers if name in rule),
            *(f"{_custom_key(key)}[{name!r}]" for key in custom),
        ]

    def rules_for(self, at: ModuleParam) -> MatchedRules:
        """Return the multipliers of a parameter, and the rules that it matches."""
        general = [rule for rule in _GENERAL_RULES if rule in self._multipliers]
        keys = substrings_of(at.full_name, self._custom)
        kinds = [rule for rule in matching_rules(at) if rule in self._multipliers]
        matching = [*general, *map(_custom_key, keys), *kinds]
        if keys and not self._composes:
            general, keys, kinds = [], keys[:1], []
        options: dict[str, Any] = {}
        for key in reversed(keys):  # The longest has the last word.
            options |= self._custom[key]
        applied = [*general, *map(_custom_key, keys)]
        products: dict[str, float | None] = {}
        for name, rules in (("lr_mult", _LR_RULES), ("decay_mult", _DECAY_RULES)):
            by_key = [self._custom[key].get(name, 1.0) for key in keys]
            if name in options:
                options[name] = _product(by_key)
            kind = [rule for rule in kinds if rule in rules]
            kind = kind if self._composes else kind[:1]
            products[name] = _product(
                [
                    *(self._multipliers[rule] for rule in general if rule == name),
                    *by_key,
                    *(self._multipliers[rule] for rule in kind),
                ]
            )
            applied += kind
        lr, weight_decay = products["lr_mult"], products["decay_mult"]
        return MatchedRules(lr, weight_decay, options, applied, matching)

    def warn_unread(self) -> None:
        """Log a warning for every key that MMEngine allows and does not read."""
        custom_keys = self._config.get("custom_keys", {})
        places = {"paramwise_cfg": self._config, "custom_keys": custom_keys}
        for place, keys in places.items():
            for key in filter(_LEFT_OVER.__contains__, keys):
                _logger.warning(
                    "%s[%r] is no rule, it is left over from a config file", place, key
                )
        for key, options in self._custom.items():
            for name in filter(_resembles_multiplier, options):
                hint = did_you_mean(str(name), _GENERAL_RULES)
                _logger.warning(
                    "%s[%r] multiplies nothing; %s", _custom_key(key), name, hint
                )

    def warn_unused(self, found: Collection[MatchedRules]) -> None:
        """Log a warning for every rule that was not applied to any parameter."""
        applied = {rule for matched in found for rule in matched.applied}
        matching = {rule for matched in found for rule in matched.matching}
        for rule in (*self._multipliers, *map(_custom_key, self._custom)):
            if rule not in matching:
                _logger.warning("paramwise_cfg: %s matches no parameter", rule)
            elif rule not in applied:
                _logger.warning(
                    "paramwise_cfg: %s has no effect, because every parameter that it "
                    "matches is decided by another rule",
                    rule,
                )


def paramwise_multipliers(
    model: nn.Module, paramwise_cfg: Mapping[str, Any]
) -> dict[str, Multipliers]:
    """Return what a `paramwise_cfg` multiplies the settings of each parameter by.

    The same rules as those of `DefaultOptimWrapperConstructor`, for the pure way:

        multipliers = paramwise_multipliers(model, paramwise_cfg)
        decays = {name: 1e-2 * m.weight_decay for name, m in multipliers.items()}
        chain(adamw(1e-3, weight_decay=decays), MultiplyParamwise(multipliers))

    Args:
        model: The model. Its frozen parameters are left out, as by `parameters`.
        paramwise_cfg: The rules: `lr_mult`, `decay_mult`, `bias_lr_mult`,
            `bias_decay_mult`, `norm_decay_mult`, `dwconv_decay_mult`,
            `flat_decay_mult`, `dcn_offset_lr_mult`, `custom_keys`, `compose`; see
            `DefaultOptimWrapperConstructor`. A multiplier is a finite number >= 0.

    Returns:
        The multipliers by the names of `model.named_parameters()`, in their order.

    Raises:
        TypeError: the model is no module, or a part of `paramwise_cfg` means nothing.
        ValueError: a rule is misspelt, a multiplier is negative or not finite.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.LayerNorm(1))
        >>> rules = {"norm_decay_mult": 0.0, "custom_keys": {"0.bias": {"lr_mult": 2}}}
        >>> for name, multipliers in paramwise_multipliers(model, rules).items():
        ...     print(name, tuple(multipliers))
        0.weight (1.0, 1.0)
        0.bias (2.0, 1.0)
        1.weight (1.0, 0.0)
        1.bias (1.0, 0.0)

    Source:
        MMEngine's DefaultOptimWrapperConstructor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}"
        )
    rules = ParamwiseRules(paramwise_cfg)
    rules.warn_unread()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, MatchedRules] = {}
    for at in _module_params(model):
        name = names.get(id(at.param))
        if name is not None and name not in found:
            found[name] = rules.rules_for(at)
    rules.warn_unused(found.values())
    options = {key for matched in found.values() for key in matched.options}
    for key in sorted(options.difference(_GENERAL_RULES)):
        if not _resembles_multiplier(key):
            _logger.warning(
                "paramwise_cfg: %r in custom_keys is no multiplier; only groups of an "
                "optimizer can have it",
                key,
            )
    return {
        name: Multipliers(
            1.0 if matched.lr is None else float(matched.lr),
            1.0 if matched.weight_decay is None else float(matched.weight_decay),
        )
        for name, matched in found.items()
    }


def _product(factors: list[float]) -> float | None:
    """Return the product, None of nothing; one factor keeps its type."""
    return math.prod(factors[1:], start=factors[0]) if factors else None


# -- validation --------------------------------------------------------------------
def _check_keys(config: Any, *, strict: bool) -> None:
    """Validate the keys of a `paramwise_cfg`, and its switches."""
    if not isinstance(config, Mapping):
        raise TypeError(
            "paramwise_cfg should be None or a dict, "
            f"but got {type(config).__name__} {config!r}"
        )
    for key in config:
        if key in KEYS or key in _LEFT_OVER:
            continue
        if strict or difflib.get_close_matches(str(key), KEYS, cutoff=0.9):
            hint = did_you_mean(str(key), KEYS)
            raise ValueError(f"paramwise_cfg has no rule {key!r}; {hint}")
    for key in _SWITCHES:
        if not isinstance(config.get(key, False), bool):
            raise TypeError(
                f"paramwise_cfg[{key!r}] must be a bool, got {config[key]!r}"
            )


def check_nonnegative(name: str, value: Any) -> Any:
    """Return a finite number >= 0 as it was given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and >= 0, got {value!r}")
    return value


def _checked_custom_keys(custom_keys: Any) -> dict[str, dict[str, Any]]:
    """Return a copy of valid `custom_keys`."""
    if not isinstance(custom_keys, Mapping):
        raise TypeError(
            "If specified, custom_keys must be a dict from a piece of a name to its "
            f"options, but got {type(custom_keys).__name__} {custom_keys!r}"
        )
    found = {key: custom_keys[key] for key in custom_keys if key not in _LEFT_OVER}
    for key, options in found.items():
        if not isinstance(key, str):
            raise TypeError(
                f"custom_keys must have pieces of parameter names as keys, got {key!r}"
            )
        if not isinstance(options, Mapping):
            raise TypeError(
                f"{_custom_key(key)} must be a dict such as dict(lr_mult=0.1), got "
                f"{options!r}"
            )
        for name, value in options.items():
            place = f"{_custom_key(key)}[{name!r}]"
            if name in _GENERAL_RULES:
                check_nonnegative(place, value)
            elif name in KEYS or name in {"params", "param_names"}:
                raise ValueError(
                    f"{place} cannot stand in a custom key, only lr_mult and decay_mult"
                )
    return {key: dict(options) for key, options in found.items()}


def _resembles_multiplier(name: Any) -> bool:
    """Whether an option is spelled like `lr_mult` or `decay_mult`, and is neither."""
    similar = close_matches(str(name), _GENERAL_RULES, cutoff=0.8)
    return name not in _GENERAL_RULES and bool(similar)


def _custom_key(key: str) -> str:
    """Return the name of a custom key in messages."""
    return f"custom_keys[{key!r}]"
