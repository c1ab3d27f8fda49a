"""The public surface: sorted, complete, documented, and in the table of cases."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import inspect
import pickle
import re
import subprocess
import sys

import pytest
from transform_cases import CASES

import functional_optim as fo
from functional_optim import optimizers, schedules, testing, transforms
from functional_optim.core._traversal import walk

MODULES = [fo, transforms, optimizers, schedules, testing, testing.strategies]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_is_sorted_and_exact(module) -> None:
    """`__all__` is sorted, without repeats, and every name exists."""
    # Constants first, as ruff sorts.
    names = sorted(set(module.__all__), key=lambda name: (not name.isupper(), name))
    assert module.__all__ == names
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_is_there_in_a_fresh_process(module) -> None:
    """No name exists only because something else has imported it."""
    name = module.__name__
    program = f"import {name} as m; [getattr(m, name) for name in m.__all__]"
    subprocess.run([sys.executable, "-c", program], check=True)


def _instances(transform: object) -> list[object]:
    return [node.transform for node in walk(transform)]


def test_every_transform_is_in_the_table() -> None:
    """A public transform that no law looks at is a failure."""
    seen = {type(t) for case in CASES for t in _instances(case.transform)}
    public = {
        value
        for name in transforms.__all__
        if hasattr(value := getattr(transforms, name), "update")
    }
    assert len(public) >= 18
    assert public <= seen, f"missing in transform_cases: {public - seen}"


def test_top_level_has_every_transform_and_preset() -> None:
    """`fo.X` works for all transforms and presets; state types stay one level down."""
    states = {name for name in transforms.__all__ if name.endswith("State")}
    names = set(transforms.__all__) - states - {"Scheduled"}
    assert names | set(optimizers.__all__) <= set(fo.__all__)


def _public_objects() -> list[object]:
    found = []
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                found.append(value)
    return sorted(set(found), key=lambda value: value.__name__)


@pytest.mark.parametrize("value", _public_objects(), ids=lambda v: v.__name__)
def test_docstring_has_the_agreed_form(value) -> None:
    """A public name says what it computes, its arguments, errors, and an example."""
    text = inspect.getdoc(value)
    assert text
    assert ">>>" in text, "no example"
    if value.__name__.endswith("State"):
        assert "Attributes:" in text
        return
    if value is not fo.Chain:
        for name, parameter in inspect.signature(value).parameters.items():
            if parameter.kind is not parameter.VAR_POSITIONAL and not (
                inspect.isclass(value) and not dataclasses.is_dataclass(value)
            ):
                documented = re.search(
                    rf"^    [\w, ]*\b{name}\b[\w, ]*:", text, re.MULTILINE
                )
                assert documented, f"argument {name} is not documented"
    if hasattr(value, "update") and value not in {fo.Transform, fo.Chain}:
        assert "Shapes:" in text
        assert "Source:" in text
        for method in ("init", "update"):
            assert inspect.getdoc(getattr(value, method))
        stateless = {fo.Centralize, fo.Identity, fo.MultiplyParamwise, fo.SetToZero}
        stateless |= {fo.AddDecayedWeights, fo.ClipByNorm, fo.ClipByValue, fo.Scale}
        stateless |= {fo.ScaleByLearningRate, fo.Unscale}
        assert ("State:" in text) == (value not in stateless)


def test_transforms_take_one_positional_argument() -> None:
    """First argument positional, the rest keyword-only; combinators may have two."""
    two = {fo.Masked, fo.Named, fo.Observe, fo.Partition}
    for name in transforms.__all__:
        value = getattr(transforms, name)
        if hasattr(value, "update"):
            fields = [f for f in dataclasses.fields(value) if not f.kw_only]
            assert len(fields) <= (2 if value in two else 1), name


def test_values_are_final() -> None:
    """Transforms are final: tweak by wrapping, not by inheriting."""
    for name in transforms.__all__:
        value = getattr(transforms, name)
        if hasattr(value, "update"):
            # typing.final leaves its mark from Python 3.11 on.
            assert getattr(value, "__final__", sys.version_info < (3, 11))
            assert value.__mro__[1:] in {(object,), (fo.Rule, object)}


def test_the_import_leaves_the_compiler_out() -> None:
    """Importing the library does not import torch's compiler, which takes a second."""
    code = "import functional_optim, sys; print('torch._dynamo' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("module", "wrong", "right"),
    [
        (fo, "AdamW", "'adamw'"),
        (fo, "Adam", "'adam'"),
        (fo, "SGD", "'sgd'"),
        (fo, "clip_by_global_norm", "'ClipByGlobalNorm'"),
        (fo, "OptimWraper", "'OptimWrapper'"),
        (fo, "transform", "'transforms'"),
        (transforms, "ScalebyAdam", "'ScaleByAdam'"),
        (optimizers, "AdamW", "'adamw'"),
        (schedules, "cosine_decai", "'cosine_decay'"),
        (testing, "check_transforms", "'check_transform'"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_misspelt_name_suggests_the_near_one(module, wrong: str, right: str) -> None:
    """The error of a wrong name, or of torch's name, has the name that was meant."""
    with pytest.raises(AttributeError, match=f"no attribute '{wrong}'; did.* {right}"):
        getattr(module, wrong)
    assert not hasattr(module, wrong)


def test_a_name_that_is_near_to_nothing_is_plainly_missing() -> None:
    """Names that Python asks for by itself, and far ones, get no advice."""
    for name in ("RMSprop", "__wrapped__", "_chains", "__deepcopy__"):
        with pytest.raises(AttributeError) as caught:
            getattr(fo, name)
        assert (
            str(caught.value) == f"module 'functional_optim' has no attribute {name!r}"
        )
    with pytest.raises(ImportError, match="cannot import name 'AdamW'"):
        from functional_optim import AdamW  # noqa: F401 - it is not there


def test_modules_pickle_and_import_as_before() -> None:
    """Star import, submodules, pickles by name and doctests find what they did."""
    names: dict[str, object] = {}
    exec("from functional_optim import *", names)
    assert set(fo.__all__) <= set(names)
    assert pickle.loads(pickle.dumps([fo.adamw, fo.Scale])) == [fo.adamw, fo.Scale]
    assert importlib.import_module("functional_optim.integrations").__name__
    assert doctest.DocTestFinder().find(fo.chain)
    assert inspect.getmembers(fo)
