"""Build optimizer wrappers from configs, by default with a group for each parameter."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from functional_optim.algebra._torch_modes import untraced
from functional_optim.config._configs import (
    check_base_value,
    check_misplaced_keys,
    copy_config,
    first_argument,
    unwrap_model,
)
from functional_optim.config._paramwise import (
    MatchedRules,
    ModuleParam,
    ParamwiseRules,
    child_modules,
    is_norm,
    strip_wrappers,
)
from functional_optim.config._registries import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PresetOptimizer,
)
from functional_optim.config._registry import RegistryError
from functional_optim.optim_wrapper._errors import ConfigValueError
from functional_optim.optim_wrapper._wrapper import OptimWrapper
from functional_optim.torch_optimizer._optimizer import TransformOptimizer
from functional_optim.torch_optimizer._params import (
    check_no_duplicates,
    materialize_params,
    pairs_of,
)

_logger = logging.getLogger("functional_optim")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DefaultOptimWrapperConstructor:
    """A builder of optimizer wrappers, with settings for each parameter.

    Without `paramwise_cfg` all parameters are in one group. With it each one has its
    own group, with the `lr` and `weight_decay` of the optimizer's config, multiplied by
    these rules:

    - `custom_keys`: a dict from a piece of a name to `lr_mult`, `decay_mult` or both.
      The longest key that a name contains counts, ties by alphabet, and none of the
      rules below. Other options go into the group as they are; one that is spelled
      nearly like these two warns.
    - `lr_mult`, `decay_mult`: for all parameters, times the rules below that apply.
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
      that a name contains, and all rules for its layer.

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
        self.optim_wrapper_cfg: dict[str, Any] = copy_config(optim_wrapper_cfg)
        self.optimizer_cfg: dict[str, Any] = self.optim_wrapper_cfg.pop("optimizer")
        if not isinstance(self.optimizer_cfg, Mapping):
            raise TypeError(
                "optimizer must be a config such as dict(type='SGD', lr=0.01), got "
                f"{self.optimizer_cfg!r}; give an optimizer that is built already to "
                "OptimWrapper"
            )
        self.paramwise_cfg: dict[str, Any] = (
            {} if paramwise_cfg is None else copy_config(paramwise_cfg)
        )
        self.base_lr = self.optimizer_cfg.get("lr")
        self.base_wd = self.optimizer_cfg.get("weight_decay")
        self._matched: dict[str, MatchedRules] = {}
        self._cached_rules: ParamwiseRules | None = None
        self._validate_cfg()

    def _validate_cfg(self) -> None:
        """Validate the rules, and the base values that they multiply."""
        rules = self._rules()
        rules.warn_unread()
        for key, kind, base_name in (
            ("lr", "lr", "base_lr"),
            ("weight_decay", "decay", "base_wd"),
        ):
            base = getattr(self, base_name)
            if base is None and (multiplying := rules.rules_of(kind)):
                raise ValueError(
                    f"{base_name} should not be None: {multiplying[0]} in "
                    f"paramwise_cfg multiplies {key}, which the config of the "
                    f"optimizer lacks; write {key}=... into it"
                )
            check_base_value(key, base, multiplied=bool(self.paramwise_cfg))

    def _rules(self) -> ParamwiseRules:
        # Derived classes may change the config, and have keys of their own in it.
        strict = type(self) is DefaultOptimWrapperConstructor
        return ParamwiseRules(self.paramwise_cfg, strict=strict)

    def _is_in(
        self, param_group: dict[str, Any], param_group_list: list[dict[str, Any]]
    ) -> bool:
        """Whether a parameter of a group is in a list of groups, as in MMEngine."""
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
        rules = self._cached_rules or self._rules()
        in_deformable = bool(is_dcn_module)
        if rules.bypass_duplicate:
            for given in params:  # An override may have put iterators there.
                given.update(materialize_params(given))
        for name, param in module.named_parameters(recurse=False):
            at = ModuleParam(module, name, prefix, in_deformable, param)
            group: dict[str, Any] = {"params": [param]}
            if rules.bypass_duplicate and self._is_in(group, params):
                _logger.warning(
                    "%s is duplicate. It is skipped since bypass_duplicate=True "
                    "(parameter %s)",
                    prefix or at.full_name,
                    at.full_name,
                )
            elif not param.requires_grad:
                _logger.warning(
                    "%s is skipped since its requires_grad=False", at.full_name
                )
            else:
                matched = rules.rules_for(at)
                self._matched[at.full_name] = matched
                settings = self._settings(matched, at.full_name)
                params.append(group | settings)
                self._log(at, settings)
        for child, its_prefix, inside in child_modules(module, prefix, in_deformable):
            self.add_params(params, child, prefix=its_prefix, is_dcn_module=inside)

    def _settings(self, matched: MatchedRules, name: str) -> dict[str, Any]:
        """Multiply the base values for one parameter, and add its other options."""
        settings = {}
        for key, base, multiplier in (
            ("lr", self.base_lr, matched.lr),
            ("weight_decay", self.base_wd, matched.weight_decay),
        ):
            if base is None or multiplier is None:
                continue
            value = settings[key] = base * multiplier
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{key} of {name} would be {base} * {multiplier}, not finite"
                )
        return settings | matched.options

    def _log(self, at: ModuleParam, settings: dict[str, Any]) -> None:
        if at.name == "bias" and not (at.in_deformable or is_norm(at.module)):
            # As in MMEngine's guide, where rules for biases are 1 if not given.
            base = {"lr": self.base_lr, "weight_decay": self.base_wd}
            settings = {k: v for k, v in base.items() if v is not None} | settings
        for key, value in settings.items():
            _logger.info("paramwise_options -- %s:%s=%s", at.full_name, key, value)

    def _groups(self, model: nn.Module) -> list[Any]:
        """Return what `add_params` adds for a model, read once and validated."""
        added: list[Any] = []
        self._cached_rules = self._rules()  # Once, not for each module.
        try:
            self.add_params(added, model)
        finally:
            self._cached_rules = None
        groups = _as_groups(added)
        names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        check_no_duplicates(
            [pairs_of(group, index, names) for index, group in enumerate(groups)],
            names=names,
            remedy="add it once, or let bypass_duplicate=True in paramwise_cfg keep "
            "the first",
        )
        if self._matched:
            self._rules().warn_unused(self._matched.values())
        return groups if added and isinstance(added[0], Mapping) else added

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper for a model.

        Args:
            model: The model, which may be in a parallel wrapper, such as DDP.

        Raises:
            TypeError: it is no module, or an argument in a config is unknown.
            ValueError: a parameter would get into the optimizer twice.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got a {type(model).__name__}"
            )
        model = unwrap_model(model)
        wrapper_cfg = {"type": OptimWrapper.__name__, **self.optim_wrapper_cfg}
        if "type" not in self.optimizer_cfg:
            raise RegistryError(
                f'optimizer must have a "type", such as "SGD", got {self.optimizer_cfg}'
            )
        kind = OPTIMIZERS.resolve(self.optimizer_cfg["type"])
        first = first_argument(kind)
        if first in self.optimizer_cfg:
            raise ValueError(
                f"leave {first} out of optimizer: the parameters are those of the model"
            )
        wrapper_kind = OPTIM_WRAPPERS.resolve(wrapper_cfg["type"])
        check_misplaced_keys(wrapper_cfg, wrapper_kind, self.optimizer_cfg, kind)
        names = {id(p): strip_wrappers(name) for name, p in model.named_parameters()}
        params: list[Any] = list(model.parameters())
        self._matched = {}
        if self.paramwise_cfg:
            params = self._groups(model)
        is_ours = isinstance(kind, type) and issubclass(kind, TransformOptimizer)
        if params and (is_ours or isinstance(kind, PresetOptimizer)):
            params = _add_param_names(_as_groups(params), names)
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, first: params})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            wrapper_cfg, default_args={"optimizer": optimizer}
        )
        if hasattr(wrapper, "parameter_names"):
            wrapper.parameter_names = names
        if hasattr(wrapper, "paramwise_sources"):
            applied = {name: m.applied for name, m in self._matched.items()}
            wrapper.paramwise_sources = {
                name: ", ".join(applied.get(name, ())) for name in names.values()
            }
        return wrapper


@untraced
def build_optim_wrapper(model: nn.Module, cfg: Mapping[str, Any]) -> OptimWrapper:
    """Build an optimizer wrapper from a config.

    Args:
        model: The model, which may be in a parallel wrapper, such as DDP.
        cfg: The config, which is not changed. `optimizer` is the config of the
            optimizer: its `type`, a name in `OPTIMIZERS` or a class, and its arguments.
            All else may be left out: `type`, a name in `OPTIM_WRAPPERS` or a class,
            "OptimWrapper" by default, and its arguments, such as `accumulative_counts`
            and `clip_grad`; `paramwise_cfg` and `constructor`, a name in
            `OPTIM_WRAPPER_CONSTRUCTORS` or a class, see
            `DefaultOptimWrapperConstructor`.

    Returns:
        The wrapper: what the constructor returns.

    Raises:
        TypeError: an argument is unknown, or of a type that means nothing there.
        ValueError: a name is not registered, which is a KeyError, too; a rule is
            misspelt; a number is out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict(dict(backbone=nn.Linear(1, 1), head=nn.Linear(1, 1)))
        >>> wrapper = build_optim_wrapper(
        ...     model,
        ...     dict(
        ...         optimizer=dict(type="SGD", lr=0.1, momentum=0.9),
        ...         paramwise_cfg=dict(custom_keys={"backbone": dict(lr_mult=0.5)}),
        ...     ),
        ... )
        >>> [group["lr"] for group in wrapper.optimizer.param_groups]
        [0.05, 0.05, 0.1, 0.1]

    Source:
        mmengine.optim.build_optim_wrapper 0.10.
    """
    if not isinstance(cfg, Mapping) and hasattr(cfg, "keys"):
        cfg = {key: cfg[key] for key in cfg}  # MMEngine's Config is no Mapping.
    if not isinstance(cfg, Mapping):
        raise TypeError(
            "cfg must be a dict such as dict(optimizer=dict(type='SGD', lr=0.01)), got "
            f"{cfg!r}"
        )
    wrapper_cfg = copy_config(cfg)
    # By name, so that another one registered under it is taken.
    default = DefaultOptimWrapperConstructor.__name__
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        {
            "type": wrapper_cfg.pop("constructor", default),
            "paramwise_cfg": wrapper_cfg.pop("paramwise_cfg", None),
            "optim_wrapper_cfg": wrapper_cfg,
        }
    )
    wrapper: OptimWrapper = constructor(model)
    return wrapper


def _as_groups(added: list[Any]) -> list[dict[str, Any]]:
    """Return groups that can be read again; parameters alone are one group."""
    if not (added and isinstance(added[0], Mapping)):
        return [{"params": added}]
    return [materialize_params(group, index) for index, group in enumerate(added)]


def _add_param_names(
    groups: list[dict[str, Any]], names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return groups with `param_names`: as given, those of the model, or numbers."""
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
