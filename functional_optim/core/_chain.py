"""Chain transforms, and refuse orders that cannot be right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, final

from functional_optim._messages import format_names
from functional_optim.algebra._buffers import Donated
from functional_optim.algebra._tensor_map import TensorMap, copied
from functional_optim.core._apply import recording
from functional_optim.core._context import Context
from functional_optim.core._hyperparameters import checked, value_class
from functional_optim.core._rule import Rule
from functional_optim.core._transform import Role, Scope, Transform, missing_members
from functional_optim.core._traversal import Label
from functional_optim.core._validation import (
    check_parameters,
    check_states,
    check_updates,
    describe_state,
    within_model,
)


def _checked_members(name: str, members: Sequence[Any]) -> tuple[Transform, ...]:
    flat: list[Transform] = []
    for index, member in enumerate(members):
        transform = validate_transform(f"{name}[{index}]", member)
        flat.extend(transform.members if isinstance(transform, Chain) else [transform])
    return tuple(flat)


@final
@value_class
class Chain:
    """Transforms one after another: each gets what the one before returned.

    Made by `chain`. If a member returns an empty map, it holds: the chain stops there,
    and everything downstream keeps its state.

    Args:
        members: The transforms, the one that sees the gradients first; chains among
            them are flattened.

    State:
        A tuple: the members' states in order.

    Raises:
        TypeError, ValueError: see `chain` (at construction) and `update`.

    Example:
        >>> from functional_optim.transforms import ClipByValue, ScaleByLearningRate
        >>> chain(ClipByValue(1.0), ScaleByLearningRate(0.1)).members[0]
        ClipByValue(1.0)
    """

    members: tuple[Transform, ...] = checked(check=_checked_members)

    consumes_state: ClassVar[bool] = True

    def _check(self) -> None:
        """Refuse orders that cannot be right."""
        check_order(self.members)

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.members))})"

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Transform:
        return self.members[index]

    @property
    def stands_for(self) -> tuple[Transform, ...]:
        """The transforms whose roles count in a chain around this one: the members."""
        return self.members

    @property
    def scope(self) -> Scope:
        """The widest scope of the members."""
        # Not max(..., default=...), which torch.compile does not trace.
        return max([Scope.ELEMENTWISE, *(member.scope for member in self.members)])

    def init(self, params: TensorMap) -> tuple[Any, ...]:
        """Return the members' states before the first update.

        Args:
            params: Parameters by name; `parameters(model)` makes such a map.

        Raises:
            TypeError: not a map from name to tensor; integer, complex, sparse tensors.
            ValueError: parameters on several devices, or a rule that matches nothing.
        """
        check_parameters(params)
        with recording(differentiable=False), within_model(params):
            return tuple(member.init(params) for member in self.members)

    def update(
        self,
        updates: TensorMap,
        state: tuple[Any, ...],
        params: TensorMap,
        *,
        context: Context | None = None,
    ) -> tuple[TensorMap, tuple[Any, ...]]:
        """Pass updates through the members in order.

        Args:
            updates: Gradients by name; a name that is missing keeps its state.
            state: What `init` or the previous `update` returned.
            params: Current parameters by name.
            context: What the training loop knows; None is an empty one.

        Returns:
            The updates to add to the parameters, and the new state. An empty map means
            hold.

        Raises:
            ValueError: updates, state and parameters do not fit each other.
            TypeError: not maps from name to dense floating-point tensor.
        """
        check_updates(updates, params)
        check_states(state, len(self.members), "member")
        context = context or Context()
        with recording(differentiable=context.differentiable):
            if not self.members:
                return copied(updates), ()
            new_state = list(state)
            for index, member in enumerate(self.members):
                if not updates:
                    break
                before = self.members[index - 1] if index else None
                if isinstance(before, Rule) and isinstance(member, Rule):
                    # What a rule returns is new, and nobody else has it.
                    updates = Donated(updates)
                result = member.update(
                    updates, state[index], params, context=context.child(index)
                )
                updates, new_state[index] = _checked_result(member, result, params)
        return updates, tuple(new_state)

    def children(self) -> dict[Label, Transform]:
        """Return the members by position."""
        return dict(enumerate(self.members))

    def with_children(self, children: Mapping[Label, Transform]) -> Chain:
        """Return a chain of other members."""
        return Chain(tuple(children.values()))

    def split_state(self, state: Any) -> dict[Label, Any]:
        """Return the states of the members by position."""
        check_states(state, len(self.members), "member")
        return dict(enumerate(state))


def chain(*transforms: Transform) -> Chain:
    """Chain transforms: each gets what the one before returned.

    Chains among the arguments are flattened, so that `chain(a, chain(b, c))` equals
    `chain(a, b, c)`. Without arguments it is the identity. Some orders cannot be right
    and are refused: `Unscale` after a clip or a guard, `Accumulate` after a learning
    rate or a moment or inside a guard, two learning rates, anything after a guard.

    Args:
        transforms: Transforms, the one that sees the gradients first.

    Returns:
        One transform: immutable, printed as written, equal by value, picklable.

    Raises:
        TypeError: an argument is no transform.
        ValueError: an order of the above.

    Example:
        >>> import functional_optim as fo
        >>> fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.1, momentum=0.9))
        chain(ClipByGlobalNorm(1.0), Trace(0.9), ScaleByLearningRate(0.1))
    """
    return Chain(transforms)


def as_chain(transform: Transform) -> Chain:
    """Return a transform as a chain; one that is none becomes its only member."""
    return transform if isinstance(transform, Chain) else chain(transform)


def validate_transform(name: str, transform: Any) -> Transform:
    """Validate a transform, with a remedy for what is none."""
    if isinstance(transform, type):
        raise TypeError(
            f"{name} must be a transform, got the class {transform.__name__}; write "
            f"{transform.__name__}(...)"
        )
    if isinstance(transform, (list, tuple)):
        kind = type(transform).__name__
        raise TypeError(
            f"{name} must be a transform, got a {kind}; write chain(*transforms)"
        )
    missing = missing_members(transform)
    if missing and callable(transform):
        called = getattr(transform, "__name__", type(transform).__name__)
        raise TypeError(
            f"{name} must be a transform, got a function; write {called}(...)"
        )
    if missing:
        raise TypeError(
            f"{name} must be a transform with init, update and scope, got "
            f"{_short(transform)} without {' and '.join(missing)}"
        )
    if not isinstance(transform.scope, Scope):
        raise TypeError(
            f"{name}.scope must be one of {', '.join(map(str, Scope))}, got "
            f"{transform.scope!r}"
        )
    checked: Transform = transform
    return checked


def _short(value: object) -> str:
    """Format a value, or only its type if it prints long."""
    text = repr(value)
    return (
        text if len(text) < 60 else f"a {type(value).__module__}.{type(value).__name__}"
    )


def _checked_result(
    member: Transform, result: Any, params: TensorMap
) -> tuple[TensorMap, Any]:
    """Validate the result of an `update`, which may be a user's."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"{member!r}.update must return (updates, state), got "
            f"{describe_state(result)}"
        )
    updates = result[0]
    if not isinstance(updates, dict):
        kind = type(updates).__name__
        raise TypeError(
            f"{member!r}.update must return updates as a dict by name, got {kind}"
        )
    if not updates.keys() <= params.keys():
        unknown = [name for name in updates if name not in params]
        raise ValueError(
            f"{member!r}.update returned names that no parameter has: "
            f"{format_names(unknown)}"
        )
    return updates, result[1]


class _Judged(NamedTuple):
    """A transform with a role, and the member of the chain that contains it."""

    transform: Transform
    member: Transform


def check_order(members: Sequence[Transform]) -> None:
    """Refuse an order that cannot be right, with the one that is.

    A member with the attribute `stands_for`, a tuple of transforms, is judged as these
    one after another: so the order is seen through names and the chains in them.
    """
    before: dict[Role, _Judged] = {}
    for judged in _seen_through(members):
        late = judged.member
        role = getattr(judged.transform, "role", None)
        if Role.GUARD in before:
            transform, guard = before[Role.GUARD]
            inner = type(transform).__name__
            msg = (
                f"{late!r} stands after the guard {guard!r}, which must be last: a "
                "guard can only undo what is inside it. Write "
                f"{inner}(chain(..., {late!r}))"
            )
            if role is Role.UNSCALE:
                msg = _moved(late, guard, "a guard judges true gradients")
            raise ValueError(msg)
        if role is Role.UNSCALE and Role.CLIP in before:
            why = "a threshold is meant for true gradients, not for scaled ones"
            raise ValueError(_moved(late, before[Role.CLIP].member, why))
        if role is Role.ACCUMULATE:
            for earlier, why in (
                (Role.MOMENT, "a moment must see one gradient a window"),
                (Role.LEARNING_RATE, "a learning rate must apply once a window"),
            ):
                if earlier in before:
                    raise ValueError(_moved(late, before[earlier].member, why))
        if role is Role.LEARNING_RATE and role in before:
            raise ValueError(
                f"two learning rates in one chain, {before[role].member!r} and "
                f"{late!r}, would multiply; keep one, or write Scale(factor) for a "
                "plain factor"
            )
        if role is not None:
            before.setdefault(role, judged)


def _seen_through(members: Sequence[Transform]) -> Iterator[_Judged]:
    for member in members:
        inner = getattr(member, "stands_for", None)
        if inner is None:
            yield _Judged(member, member)
        else:
            # What the reader must move is the member, with its name.
            yield from (_Judged(j.transform, member) for j in _seen_through(inner))


def _moved(late: Transform, early: Transform, why: str) -> str:
    return (
        f"{late!r} stands after {early!r}, but {why}. Write chain({late!r}, ..., "
        f"{early!r}, ...)"
    )
