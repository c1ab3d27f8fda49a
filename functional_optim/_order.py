"""The orders of a chain that cannot be right."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from functional_optim.core._transform import Role, Transform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class _Judged(NamedTuple):
    """A transform whose role counts, and the member of the chain that it stands in."""

    transform: Transform
    member: Transform


def check_order(members: Sequence[Transform]) -> None:
    """Refuse the orders that cannot be right, and say which one is.

    A member with the attribute `stands_for`, a tuple of transforms, is judged as these
    one after another: so the order is seen through names and the chains in them.

    Args:
        members: The members of a chain.

    Raises:
        ValueError: naming both transforms and the right order.
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
            msg = (
                f"two learning rates in one chain, {before[role].member!r} and "
                f"{late!r}, would multiply; keep one, or write Scale(factor) for a "
                "plain factor"
            )
            raise ValueError(msg)
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
