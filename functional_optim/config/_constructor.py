"""The constructor of optimizer wrappers: a group for each parameter."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from functional_optim.config._paramwise import (
    ParamwiseRules,
    Place,
    Verdict,
    children_of,
    is_norm,
    seen_name,
)
from functional_optim.config._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PresetOptimizer,
)
from functional_optim.config._registry import RegistryError
from functional_optim.config._validation import (
    check_number,
    check_places,
    copied,
    first_argument_of,
    unwrapped,
)
from functional_optim.optim_wrapper._errors import ConfigValueError
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._params import (
    check_no_duplicates,
    pairs_of,
    read_once,
)

_logger = logging.getLogger("functional_optim")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DefaultOptimWrapperConstructor:
    """Builds an optimizer wrapper for a model, with settings parameter by parameter.

    Without `paramwise_cfg` all parameters stand in one group. With it each one has its
    own, whose `lr` and `weight_decay` are those of the optimizer's config, times what
    the rules say. In `paramwise_cfg` may stand:

    - `custom_keys`: a dict from a piece of a name to `lr_mult`, `decay_mult` or both.
      The longest key that a name contains counts, ties by alphabet, and none of the
      rules below. Keys other than these two go into the group as they are; one that is
      spelt nearly so warns.
    - `lr_mult`, `decay_mult`: for all parameters, times what else applies below.
    - `bias_lr_mult`: biases, but not of norm layers, and not in deformable
      convolutions.
    - `dcn_offset_lr_mult`: the `conv_offset` inside deformable convolutions.
    - `norm_decay_mult`: norm layers, RMS norms as well.
    - `bias_decay_mult`: biases, but not in deformable convolutions. In norm layers it
      counts only if `norm_decay_mult` is not given.
    - `dwconv_decay_mult`: `nn.Conv2d` with `in_channels == groups`.
    - `flat_decay_mult`: other parameters of one dimension, but not in deformable
      convolutions. Of these four the first that applies wins.
    - `bypass_duplicate`: whether a parameter that comes again is skipped.
    - `compose`: whether rules multiply instead of replacing each other: all custom keys
      that a name contains, and what the kind of its layer asks for.

    To add rules of your own, derive from this class and override `add_params`. Rules
    that this class does not know are then yours to read.

    Args:
        optim_wrapper_cfg: The config of the wrapper; in it `optimizer`, the config of
            the optimizer: its `type` and its arguments. It is not changed.
        paramwise_cfg: The rules. Multipliers are finite numbers >= 0.

    Attributes:
        optim_wrapper_cfg: A copy of the config, without `optimizer`.
        optimizer_cfg: The config of the optimizer.
        paramwise_cfg: The rules, {} if there are none.
        base_lr: The `lr` in the config of the optimizer, or None.
        base_wd: The `weight_decay` there, or None.

    Raises:
        TypeError: a part of a config has a type that means nothing there.
        ValueError: a rule is misspelt or out of range, there is no `optimizer`, or a
            rule multiplies what the config of the optimizer lacks.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> constructor = DefaultOptimWrapperConstructor(
        ...     dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=0.01)),
        ...     paramwise_cfg=dict(norm_decay_mult=0.0),
        ... )
        >>> groups = constructor(model).optimizer.param_groups
        >>> [group["weight_decay"] for group in groups]
        [0.01, 0.01, 0.0, 0.0]

    Source:
        mmengine.optim.DefaultOptimWrapperConstructor 0.10.
    """

    def __init__(
        self,
        optim_wrapper_cfg: Mapping[str, Any],
        paramwise_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(optim_wrapper_cfg, Mapping):
            raise TypeError(
                f"optim_wrapper_cfg should be a dict, but got {optim_wrapper_cfg!r}"
            )
        if "optimizer" not in optim_wrapper_cfg:
            raise ConfigValueError(
                '`optim_wrapper_cfg` must contain "optimizer" config, such as '
                f"optimizer=dict(type='SGD', lr=0.01), got {dict(optim_wrapper_cfg)!r}"
            )
        self.optim_wrapper_cfg: dict[str, Any] = copied(optim_wrapper_cfg)
        self.optimizer_cfg: dict[str, Any] = self.optim_wrapper_cfg.pop("optimizer")
        if not isinstance(self.optimizer_cfg, Mapping):
            raise TypeError(
                "optimizer must be a config such as dict(type='SGD', lr=0.01), got "
                f"{self.optimizer_cfg!r}; give an optimizer that is built already to "
                "OptimWrapper"
            )
        self.paramwise_cfg: dict[str, Any] = (
            {} if paramwise_cfg is None else copied(paramwise_cfg)
        )
        self.base_lr = self.optimizer_cfg.get("lr")
        self.base_wd = self.optimizer_cfg.get("weight_decay")
        self._verdicts: dict[str, Verdict] = {}
        self._checked_rules: ParamwiseRules | None = None
        self._validate_cfg()

    def _validate_cfg(self) -> None:
        rules = self._rules()
        rules.warn_of_unread()
        needed = (("lr", "lr", self.base_lr), ("decay", "weight_decay", self.base_wd))
        for kind, key, base in needed:
            multiplying = rules.of(kind)
            if base is None and multiplying:
                raise ValueError(
                    f"base_{'lr' if kind == 'lr' else 'wd'} should not be None: "
                    f"{multiplying[0]} in paramwise_cfg multiplies {key}, which the "
                    f"config of the optimizer lacks; write {key}=... into it"
                )
            check_number(key, base, multiplied=bool(self.paramwise_cfg))

    def _rules(self) -> ParamwiseRules:
        # Derived classes may change the config, and have keys of their own in it.
        strict = type(self) is DefaultOptimWrapperConstructor
        return ParamwiseRules(self.paramwise_cfg, strict=strict)

    def _is_in(
        self, param_group: dict[str, Any], param_group_list: list[dict[str, Any]]
    ) -> bool:
        """Tell whether a parameter of a group is in a list of groups."""
        groups = map(pairs_of, param_group_list)
        present = {id(param) for members in groups for _, param in members}
        return any(id(param) in present for _, param in pairs_of(param_group))

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: float | None = None,
    ) -> None:
        """Add a group for each parameter of a module, and of the modules in it.

        Args:
            params: The groups so far; new ones come behind.
            module: The module.
            prefix: Its name in the model.
            is_dcn_module: Whether it is a child of a deformable convolution.

        Raises:
            ValueError: a setting becomes infinite.
        """
        rules = self._checked_rules or self._rules()
        if rules.bypass_duplicate:
            for given in params:  # An override may have put iterators there.
                given.update(read_once(given))
        for name, param in module.named_parameters(recurse=False):
            place = Place(module, name, prefix, bool(is_dcn_module))
            group: dict[str, Any] = {"params": [param]}
            if rules.bypass_duplicate and self._is_in(group, params):
                _logger.warning(
                    "%s is duplicate. It is skipped since bypass_duplicate=True "
                    "(parameter %s)",
                    prefix or place.full_name,
                    place.full_name,
                )
                continue
            if not param.requires_grad:
                _logger.warning(
                    "%s is skipped since its requires_grad=False", place.full_name
                )
                continue
            verdict = rules.judge(place, param.ndim)
            self._verdicts[place.full_name] = verdict
            settings = self._settings_of(verdict, place.full_name)
            params.append(group | settings)
            self._log(place, settings)
        children = children_of(module, prefix, in_deformable=bool(is_dcn_module))
        for child, child_prefix, in_deformable in children:
            self.add_params(
                params, child, prefix=child_prefix, is_dcn_module=in_deformable
            )

    def _settings_of(self, verdict: Verdict, name: str) -> dict[str, Any]:
        settings = {}
        for key, base, multiplier in (
            ("lr", self.base_lr, verdict.lr),
            ("weight_decay", self.base_wd, verdict.weight_decay),
        ):
            if base is None or multiplier is None:
                continue
            settings[key] = base * multiplier
            if isinstance(settings[key], float) and not math.isfinite(settings[key]):
                raise ValueError(
                    f"{key} of {name} would be {base} * {multiplier}, not finite"
                )
        return settings | verdict.options

    def _log(self, place: Place, settings: dict[str, Any]) -> None:
        shown: dict[str, Any] = {}
        if place.name == "bias" and not (place.in_deformable or is_norm(place.module)):
            # As in MMEngine's guide, whose rules for biases are 1 if not given.
            base = {"lr": self.base_lr, "weight_decay": self.base_wd}
            shown = {key: value for key, value in base.items() if value is not None}
        for key, value in (shown | settings).items():
            _logger.info("paramwise_options -- %s:%s=%s", place.full_name, key, value)

    def _added(self, model: nn.Module) -> list[Any]:
        """Return what `add_params` makes of a model, read once and checked."""
        added: list[Any] = []
        self._checked_rules = self._rules()  # Once, not for each module.
        try:
            self.add_params(added, model)
        finally:
            self._checked_rules = None
        groups = as_groups(added)
        names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        check_no_duplicates(
            [pairs_of(group, index, names) for index, group in enumerate(groups)],
            names=names,
            remedy="add it once, or let bypass_duplicate=True in paramwise_cfg keep "
            "the first",
        )
        if self._verdicts:
            self._rules().warn_of_idle(self._verdicts.values())
        return groups if added and isinstance(added[0], Mapping) else added

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper for a model.

        A parallel wrapper around the model, such as DDP, is looked through.

        Args:
            model: The model.

        Raises:
            TypeError: it is no module, or an argument in a config is unknown.
            ValueError: a parameter would get into the optimizer twice.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got a {type(model).__name__}"
            )
        model = unwrapped(model)
        wrapper_cfg = {"type": OptimWrapper.__name__, **self.optim_wrapper_cfg}
        if "type" not in self.optimizer_cfg:
            raise RegistryError(
                f'optimizer must have a "type", such as "SGD", got {self.optimizer_cfg}'
            )
        kind = OPTIMIZERS.resolve(self.optimizer_cfg["type"])
        first = first_argument_of(kind)
        if first in self.optimizer_cfg:
            raise ValueError(
                f"leave {first} out of optimizer: the parameters are those of the model"
            )
        check_places(
            wrapper_cfg,
            OPTIM_WRAPPERS.resolve(wrapper_cfg["type"]),
            self.optimizer_cfg,
            kind,
        )
        names = {id(p): seen_name(name) for name, p in model.named_parameters()}
        params: list[Any] = list(model.parameters())
        self._verdicts = {}
        if self.paramwise_cfg:
            params = self._added(model)
        if params and _goes_by_names(kind):
            params = with_names(as_groups(params), names)
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, first: params})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            wrapper_cfg, default_args={"optimizer": optimizer}
        )
        if hasattr(wrapper, "parameter_names"):
            wrapper.parameter_names = names
        if hasattr(wrapper, "paramwise_sources"):
            wrapper.paramwise_sources = {
                name: ", ".join(self._verdicts[name].rules)
                if name in self._verdicts
                else ""
                for name in names.values()
            }
        return wrapper


def _goes_by_names(kind: Any) -> bool:
    """Whether an optimizer is one of this library, or derived from it."""
    is_ours = isinstance(kind, type) and issubclass(kind, TransformOptimizer)
    return is_ours or isinstance(kind, PresetOptimizer)


def as_groups(added: list[Any]) -> list[dict[str, Any]]:
    """Return groups that may be read again; parameters alone are one group."""
    if not (added and isinstance(added[0], Mapping)):
        return [{"params": added}]
    return [read_once(group, index) for index, group in enumerate(added)]


def with_names(
    groups: list[dict[str, Any]], names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return groups with a name for each parameter: given, the model's, or a number."""
    found, count = [], 0
    taken = set(names.values())
    for index, group in enumerate(groups):
        members = pairs_of(group, index)
        own: list[str] = []
        for given, param in members:
            name = given or names.get(id(param))
            if name is None:
                name = str(count)
                while name in taken:
                    name = f"_{name}"
            own.append(name)
            count += 1
        params = [param for _, param in members]
        found.append({**group, "params": params, "param_names": own})
    return found
