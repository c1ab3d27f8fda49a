"""Each law rejects a transform that breaks it: a test that cannot fail is a defect."""

from __future__ import annotations

import pytest
from broken_twins import ONLY, TWINS

import functional_optim as fo
from functional_optim.testing import BrokenLawError, Law, check_transform, laws

LAWS = {law.name: law for law in laws.ALL}


IMPLIED = {
    ("omitted_names", "in_place"): "nothing runs for what has no gradient",
    ("scope", "in_place"): "an elementwise transform is cut",
    ("vmapped", "no_graph"): "it is tried under vmap, too",
}
"""(broken law, law that cannot hold either): the reason."""


def _name(twin: object) -> str:
    return getattr(twin, "called", type(twin).__name__)


@pytest.mark.parametrize(
    ("law", "twin"), TWINS, ids=[f"{law}-{_name(twin)}" for law, twin in TWINS]
)
def test_names_the_law(law: str, twin: fo.Transform) -> None:
    """The law that is broken is named, whatever else is broken too."""
    with pytest.raises(BrokenLawError) as found:
        check_transform(twin, smooth=law == "differentiable")
    assert found.value.law == law, str(found.value)
    assert found.value.what
    assert found.value.cause


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize("broken", LAWS)
def test_only_this_law_finds_it(law: Law, broken: str) -> None:
    """For each law there is a transform that all the others accept."""
    [twin] = [twin for _, twin in TWINS if _name(twin) == ONLY[broken]]
    if law.name == broken or (broken, law.name) in IMPLIED:
        with pytest.raises(BrokenLawError):
            law(twin)
    else:
        law(twin)


def test_every_law_has_a_twin() -> None:
    """No law is without a transform that breaks it."""
    assert (
        set(laws.__all__) - {"ALL"}
        == set(LAWS)
        == {law for law, _ in TWINS}
        == set(ONLY)
    )
