"""What learning rate and weight decay of each parameter are multiplied by.

`paramwise_cfg` speaks of kinds of layers, and of pieces of names. Here stands what each
of its rules means, for whoever asks: the constructor of optimizer wrappers, and the
pure way.

For one parameter the rules come in this order; those not given are passed over.

- The longest key of `custom_keys` that the name contains decides alone: none of the
  rules below counts for this parameter.
- `lr_mult` and `decay_mult` multiply all others, whatever else decides.
- Learning rate: `bias_lr_mult`, `dcn_offset_lr_mult`, which exclude each other.
- Weight decay: `norm_decay_mult`, `bias_decay_mult`, `dwconv_decay_mult`,
  `flat_decay_mult`; the first that fits the parameter wins.

With `compose=True` nothing switches anything off: every rule that fits multiplies.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from functional_optim.config._paramwise_cfg import (
    DECAY_RULES,
    FOR_ALL,
    LR_RULES,
    RULES,
    check_paramwise_cfg,
    checked_custom_keys,
    checked_multiplier,
    is_near_multiplier,
    label,
    unread_in,
)
from functional_optim.core._selection import substrings_of
from functional_optim.transforms._scaling import Multipliers

if TYPE_CHECKING:
    from collections.abc import Iterator

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


_DEFORMABLE = {"DeformConv2d", "ModulatedDeformConv2d"}


_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Place(NamedTuple):
    """Where a parameter stands in a model."""

    module: nn.Module
    name: str
    prefix: str
    in_deformable: bool

    @property
    def full_name(self) -> str:
        """Its name in the model."""
        return f"{self.prefix}.{self.name}" if self.prefix else self.name


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is a normalization layer.

    Models bring RMS norms of their own, so those are known by the name of the class.
    """
    return isinstance(module, _NORMS) or any(
        cls.__name__.endswith("RMSNorm") for cls in type(module).__mro__
    )


def is_deformable(module: nn.Module) -> bool:
    """Tell whether a module is a deformable convolution, whoever's it is."""
    names = {cls.__name__.removesuffix("Pack") for cls in type(module).__mro__}
    return not names.isdisjoint(_DEFORMABLE)


def children_of(
    module: nn.Module, prefix: str, *, in_deformable: bool
) -> Iterator[tuple[nn.Module, str, bool]]:
    """Return the children of a module, their prefixes, and what they are children of.

    What `torch.compile`, FSDP and activation checkpointing put between a module and its
    own name does not show.
    """
    for name, child in module.named_children():
        if name in _TRANSPARENT:
            yield child, prefix, in_deformable
        else:
            yield child, f"{prefix}.{name}" if prefix else name, is_deformable(module)


def seen_name(name: str) -> str:
    """Return the name of a parameter as the rules see it; see `children_of`."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def places(
    module: nn.Module, prefix: str = "", *, in_deformable: bool = False
) -> Iterator[tuple[Place, nn.Parameter]]:
    """Return all parameters and where they stand, shared ones wherever they do."""
    for name, param in module.named_parameters(recurse=False):
        yield Place(module, name, prefix, in_deformable), param
    for child in children_of(module, prefix, in_deformable=in_deformable):
        yield from places(child[0], child[1], in_deformable=child[2])


def kinds_of(place: Place, ndim: int) -> Iterator[str]:
    """Return the rules for the kind of layer that fit a parameter, by precedence."""
    module, is_bias, free = place.module, place.name == "bias", not place.in_deformable
    norm, conv = is_norm(module), isinstance(module, nn.Conv2d)
    if is_bias and free and not norm:
        yield "bias_lr_mult"
    if conv and not free and "conv_offset" in place.prefix:
        yield "dcn_offset_lr_mult"
    if norm:
        yield "norm_decay_mult"
    # Where a rule for the layer is missing, that for its bias counts, as in MMEngine.
    if is_bias and free:
        yield "bias_decay_mult"
    if isinstance(module, nn.Conv2d) and module.in_channels == module.groups:
        yield "dwconv_decay_mult"
    if ndim == 1 and free:
        yield "flat_decay_mult"


logger = logging.getLogger("functional_optim")


class Verdict(NamedTuple):
    """What the rules say about one parameter."""

    lr: float | None
    weight_decay: float | None
    options: dict[str, Any]
    rules: tuple[str, ...]
    fitting: tuple[str, ...]


class ParamwiseRules:
    """The rules of a `paramwise_cfg`, checked."""

    def __init__(self, config: Mapping[str, Any], *, strict: bool = True) -> None:
        check_paramwise_cfg(config, strict=strict)
        self._multipliers = {
            key: checked_multiplier(f"paramwise_cfg[{key!r}]", config[key])
            for key in RULES
            # As in MMEngine None is the same as no rule.
            if config.get(key) is not None
        }
        self.bypass_duplicate: bool = config.get("bypass_duplicate", False)
        self._composes: bool = config.get("compose", False)
        self._custom = checked_custom_keys(config.get("custom_keys", {}))
        self._unread = list(unread_in(config))

    @property
    def names(self) -> list[str]:
        """All rules that multiply something, by name."""
        return [*self._multipliers, *map(label, self._custom)]

    def of(self, kind: str) -> list[str]:
        """Return the rules that need a base value: `kind` is "lr" or "decay"."""
        found = [key for key in self._multipliers if f"{kind}_mult" in key]
        for key, options in self._custom.items():
            if f"{kind}_mult" in options:
                found.append(f"{label(key)}[{f'{kind}_mult'!r}]")
        return found

    def judge(self, place: Place, ndim: int) -> Verdict:
        """Return what the rules say about a parameter at a place, of so many dims."""
        keys = substrings_of(place.full_name, self._custom)
        kinds = [rule for rule in kinds_of(place, ndim) if rule in self._multipliers]
        everywhere = [rule for rule in FOR_ALL if rule in self._multipliers]
        fitting = (*everywhere, *map(label, keys), *kinds)
        if not self._composes:
            keys = keys[:1]
            kinds = [] if keys else kinds
            everywhere = [] if keys else everywhere
        options: dict[str, Any] = {}
        for key in reversed(keys):  # The longest has the last word.
            options |= self._custom[key]
        deciding = [*everywhere, *map(label, keys)]
        products: dict[str, float | None] = {}
        for name, rules in (("lr_mult", LR_RULES), ("decay_mult", DECAY_RULES)):
            if name in options:
                given = [self._custom[key].get(name, 1.0) for key in keys]
                options[name] = _product(given)
            kind = [rule for rule in kinds if rule in rules]
            kind = kind if self._composes else kind[:1]
            products[name] = _product(
                [
                    *(self._multipliers[rule] for rule in everywhere if rule == name),
                    *(self._custom[key].get(name, 1.0) for key in keys),
                    *(self._multipliers[rule] for rule in kind),
                ]
            )
            deciding += kind
        return Verdict(
            lr=products["lr_mult"],
            weight_decay=products["decay_mult"],
            options=options,
            rules=tuple(deciding),
            fitting=fitting,
        )

    def warn_of_unread(self) -> None:
        """Log a warning for every key that MMEngine does not read either."""
        for warning in self._unread:
            logger.warning("%s", warning)

    def warn_of_idle(self, verdicts: Iterable[Verdict]) -> None:
        """Log a warning for every rule that decided nothing."""
        deciding: set[str] = set()
        fitting: set[str] = set()
        for verdict in verdicts:
            deciding.update(verdict.rules)
            fitting.update(verdict.fitting)
        for rule in self.names:
            if rule not in fitting:
                logger.warning("paramwise_cfg: %s matches no parameter", rule)
            elif rule not in deciding:
                logger.warning(
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
    rules.warn_of_unread()
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    verdicts: dict[str, Verdict] = {}
    for place, param in places(model):
        name = names.get(id(param))
        if name is not None and name not in verdicts:
            verdicts[name] = rules.judge(place, param.ndim)
    rules.warn_of_idle(verdicts.values())
    extra = {key for verdict in verdicts.values() for key in verdict.options}
    extra = {key for key in extra if not is_near_multiplier(key)}
    for key in sorted(extra - set(FOR_ALL)):
        logger.warning(
            "paramwise_cfg: %r in custom_keys is no multiplier; only groups of an "
            "optimizer can have it",
            key,
        )
    return {
        name: Multipliers(
            1.0 if verdict.lr is None else float(verdict.lr),
            1.0 if verdict.weight_decay is None else float(verdict.weight_decay),
        )
        for name, verdict in verdicts.items()
    }


def _product(factors: list[float]) -> float | None:
    """Return the product, None of nothing; one factor stays what it is."""
    return math.prod(factors[1:], start=factors[0]) if factors else None
