"""The one door to hypothesis, which is an extra."""

try:
    import hypothesis
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "functional_optim.testing needs hypothesis: pip install "
        "'functional_optim[testing]'",
        name="hypothesis",
    ) from error

__all__ = ["hypothesis", "st"]
