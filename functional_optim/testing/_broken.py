"""What is reported when a law does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from functional_optim.testing._repro import program

if TYPE_CHECKING:
    from functional_optim.testing._examples import Example
    from functional_optim.testing._law import Law


class ViolationError(AssertionError):
    """What is broken and where, and why that is likely; `Law` makes the report."""

    def __init__(self, what: str, cause: str) -> None:
        super().__init__(what)
        self.what, self.cause = what, cause


def require(condition: object, what: str, cause: str) -> None:
    """Raise a `ViolationError` unless a condition holds."""
    if not condition:
        refuse(what, cause)


def refuse(what: str, cause: str) -> NoReturn:
    """Raise a `ViolationError`."""
    raise ViolationError(what, cause)


class BrokenLawError(AssertionError):
    """A transform breaks a law.

    Attributes:
        law: Name of the law, such as "purity".
        what: What is broken and where.
        cause: What is likely the matter, and the remedy.
        transform: The transform.
        example: The smallest example found.

    Example:
        >>> import functional_optim as fo
        >>> from functional_optim.testing import laws
        >>> class Same:
        ...     scope = fo.Scope.ELEMENTWISE
        ...     init = staticmethod(lambda params: ())
        ...
        ...     def update(self, updates, state, params, *, context=None):
        ...         return updates, state
        >>> try:
        ...     laws.purity(Same())
        ... except BrokenLawError as broken:
        ...     print(broken.what)
        update returned a tensor that it was given: updates['a.weight']
    """

    def __init__(
        self, law: Law, violation: ViolationError, transform: Any, example: Example
    ) -> None:
        self.law, self.statement = law.name, law.statement
        self.what, self.cause = violation.what, violation.cause
        self.transform, self.example = transform, example
        super().__init__(self._report())

    def _report(self) -> str:
        code = program(self.law, self.transform, self.example)
        return "\n".join(
            [
                f"{self.transform!r} breaks the law of {self.law}: {self.statement}",
                "",
                f"What: {self.what}",
                f"Likely cause: {self.cause}",
                "",
                "The smallest case found, to paste and run:",
                "",
                *(f"    {line}".rstrip() for line in code.splitlines()),
            ]
        )
