"""Apply transforms to some of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias, final

from torch import Tensor

from functional_optim._messages import format_names
from functional_optim.algebra._tensor_map import TensorMap, subset
from functional_optim.core._chain import validate_transform
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, resolve, value_class
from functional_optim.core._selection import (
    Rules,
    Selection,
    check_rules_match,
    check_selection_matches,
    first_match,
    matches,
    select_names,
    validate_rules,
    validate_selection,
)
from functional_optim.core._transform import Scope, Transform
from functional_optim.core._traversal import Label
from functional_optim.core._validation import (
    check_names,
    check_parameters,
    check_states,
    within_model,
)
from functional_optim.core._value_class import format_value


@final
@value_class
class Masked:
    """Apply a transform to the selected parameters, pass the others through.

        u <- inner(u) where mask, u elsewhere

    `inner` sees only the selected names, and a norm in it is theirs; maps may name all.

    Args:
        inner: The transform.
        mask: Which parameters, any selection: a glob, a regex, a predicate, a map, ...

    State:
        The state of `inner`, over the selected names.

    Shapes:
        As `inner`; what is passed through is copied.

    Raises:
        TypeError: `inner` is no transform, `mask` is no selection.
        ValueError: at `init`: part of `mask` matches no parameter.

    Example:
        >>> import torch
        >>> from functional_optim.transforms import Scale
        >>> updates = {"a.weight": torch.ones(1), "a.bias": torch.ones(1)}
        >>> Masked(Scale(3.0), "*.bias").update(updates, (), updates)[0]
        {'a.weight': tensor([1.]), 'a.bias': tensor([3.])}

    Source:
        optax.masked.
    """

    inner: Transform = checked(check=validate_transform)
    mask: Selection = checked(check=validate_selection)

    consumes_state: ClassVar[bool] = True

    def resolved(self, name: str, param: Tensor) -> Masked:
        """Return the transform for one parameter, inside the mask or outside."""
        inside = matches(self.mask, name, param)
        inner = resolve(self.inner, name, param) if inside else self.inner
        return Masked(inner, inside)

    @property
    def scope(self) -> Scope:
        """The scope of the inner transform."""
        return self.inner.scope

    def init(self, params: TensorMap) -> Any:
        """Return the inner state over the selected parameters."""
        check_parameters(params)
        check_selection_matches(self.mask, params, "mask")
        names = select_names(self.mask, params, list(params))
        with within_model(params):
            return self.inner.init(subset(params, names))

    def update(
        self,
        updates: TensorMap,
        state: Any,
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, Any]:
        """Return inner(u) where selected, u elsewhere."""
        check_names(updates, params)
        names = select_names(self.mask, params, list(params))
        selected = set(names)
        inside = {name: u for name, u in updates.items() if name in selected}
        if inside:
            inner_params = subset(params, names)
            inside, state = self.inner.update(
                inside, state, inner_params, context=(context or Context()).child(0)
            )
        outside = {n: u.clone() for n, u in updates.items() if n not in selected}
        return subset(inside | outside, params), state

    def children(self) -> dict[Label, Transform]:
        """Return the inner transform."""
        return {0: self.inner}

    def with_children(self, children: Mapping[Label, Transform]) -> Masked:
        """Return the mask around another transform."""
        return Masked(children[0], self.mask)

    def route(self, name: str, param: Tensor) -> int | None:
        """Return 0 for a selected parameter, None for another."""
        return 0 if matches(self.mask, name, param) else None

    def split_state(self, state: Any) -> dict[Label, Any]:
        """Return the state of the inner transform."""
        return {0: state}

    def selections(self, params: TensorMap) -> list[tuple[str, list[str]]]:
        """Return the mask, and the names that it selects."""
        return [
            (format_value(self.mask), select_names(self.mask, params, list(params)))
        ]


Labels: TypeAlias = Rules[str] | Callable[[str, Tensor], str] | str
"""Which parameter has which label: rules, a function, or one label for all."""


def _checked_label(name: str, label: Any) -> str:
    if not isinstance(label, str):
        raise TypeError(f"{name} must be a label (a string), got {label!r}")
    return label


def _checked_inners(name: str, inners: Any) -> dict[str, Transform]:
    if not isinstance(inners, Mapping):
        raise TypeError(f"{name} must be a map from label to transform, got {inners!r}")
    if not inners:
        raise ValueError(f"{name} must have at least one label, got an empty map")
    return {
        _checked_label(f"a key of {name}", label): validate_transform(
            f"{name}[{label!r}]", transform
        )
        for label, transform in inners.items()
    }


def _checked_labels(name: str, labels: Any) -> Any:
    return labels if callable(labels) else validate_rules(name, labels, _checked_label)


def _label_of(labels: Any, name: str, param: Tensor) -> str:
    """Return the label of one parameter."""
    label = (
        labels(name, param)
        if callable(labels)
        else first_match(labels, name, param, None)
    )
    if label is None:
        raise ValueError(
            f"labels give {name!r} no label; add a last rule for the rest, such as "
            '"*": "default"'
        )
    return str(label)


@final
@value_class
class Partition:
    """Apply a different transform to each group of parameters.

        u <- inner[label(name)](u)

    Each transform sees only the names with its label; its maps and masks may name all.
    A group whose transform holds, or which got no updates, leaves out its names.

    Args:
        inner: A map from label to transform.
        labels: Which parameter has which label: a function of name and tensor, or
            rules, `{"*.bias": "plain", "*": "decayed"}`; the first rule that fits wins.

    State:
        A tuple: the states of the transforms, in the order of `inner`.

    Shapes:
        As the inner transforms.

    Raises:
        TypeError: `inner` is no map from string to transform, `labels` are no rules.
        ValueError: `inner` is empty; at `init`: a parameter has no label, a label has
            no transform or no parameter, a rule matches no parameter.

    Example:
        >>> import torch
        >>> from functional_optim.transforms import Scale
        >>> inner = {"up": Scale(2.0), "down": Scale(0.5)}
        >>> both = Partition(inner, {"a": "up", "*": "down"})
        >>> updates = {"a": torch.ones(1), "b": torch.ones(1)}
        >>> both.update(updates, both.init(updates), updates)[0]
        {'a': tensor([2.]), 'b': tensor([0.5000])}

    Source:
        optax.partition.
    """

    inner: Mapping[str, Transform] = checked(check=_checked_inners)
    labels: Labels = checked(check=_checked_labels)

    consumes_state: ClassVar[bool] = True

    def resolved(self, name: str, param: Tensor) -> Partition:
        """Return the transform for one parameter: one label, its child resolved.

        The other transforms stay, so that the state keeps its structure.
        """
        label = self.route(name, param)
        inner = {**self.inner, label: resolve(self.inner[label], name, param)}
        return Partition(inner, label)

    def route(self, name: str, param: Tensor) -> str:
        """Return the label of one parameter.

        Args:
            name: Its name.
            param: The parameter.

        Raises:
            ValueError: no rule gives it one, or `inner` does not have it.
        """
        label = _label_of(self.labels, name, param)
        if label not in self.inner:
            raise ValueError(
                f"labels give {name!r} the label {label!r}, which inner does not "
                f"have; its labels are {format_names(self.inner)}"
            )
        return label

    @property
    def scope(self) -> Scope:
        """The widest scope of the inner transforms."""
        return max(transform.scope for transform in self.inner.values())

    def init(self, params: TensorMap) -> tuple[Any, ...]:
        """Return the inner states, each over the parameters with its label."""
        check_parameters(params)
        check_rules_match(self.labels, params, "labels")
        groups = self._groups(params)
        for label, names in groups.items():
            if params and not names:
                raise ValueError(
                    f"no parameter has the label {label!r}; the names are "
                    f"{format_names(params)}. Leave it out of inner, or change labels"
                )
        with within_model(params):
            return tuple(
                t.init(subset(params, groups[label])) for label, t in self.inner.items()
            )

    def update(
        self,
        updates: TensorMap,
        state: tuple[Any, ...],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, tuple[Any, ...]]:
        """Return inner[label(name)](u)."""
        check_names(updates, params)
        check_states(state, len(self.inner), "label")
        groups = self._groups(params)
        moved: TensorMap = {}
        new_state = list(state)
        for index, (label, transform) in enumerate(self.inner.items()):
            inside = subset(updates, groups[label])
            if inside:
                out, new_state[index] = transform.update(
                    inside,
                    state[index],
                    subset(params, groups[label]),
                    context=(context or Context()).child(label),
                )
                moved |= out
        return subset(moved, params), tuple(new_state)

    def children(self) -> dict[str, Transform]:
        """Return the inner transforms by label."""
        return dict(self.inner)

    def with_children(self, children: Mapping[Label, Transform]) -> Partition:
        """Return the labels with other transforms."""
        return Partition({str(label): t for label, t in children.items()}, self.labels)

    def split_state(self, state: Any) -> dict[Label, Any]:
        """Return the inner states by label."""
        check_states(state, len(self.inner), "label")
        return dict(zip(self.inner, state, strict=True))

    def selections(self, params: TensorMap) -> list[tuple[str, list[str]]]:
        """Return the labels, and the names that have them."""
        return [(repr(label), n) for label, n in self._groups(params).items()]

    def _groups(self, params: TensorMap) -> dict[str, list[str]]:
        """Return the names with each label, in the order of the parameters."""
        groups: dict[str, list[str]] = {label: [] for label in self.inner}
        for name, param in params.items():
            groups[self.route(name, param)].append(name)
        return groups
