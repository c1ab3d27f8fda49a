"""The one door to hypothesis, which is an extra."""

try:
    import hypothesis
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    msg = (
        "functional_optim.testing needs hypothesis: pip install "
        "'functional_optim[testing]'"
    )
    raise ModuleNotFoundError(msg, name="hypothesis") from error

__all__ = ["hypothesis", "st"]
