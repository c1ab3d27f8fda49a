"""`check_transform` on what users write: right ones pass, wrong input is explained."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch

import functional_optim as fo
from functional_optim.testing import BrokenLawError, Example, check_transform, laws


class Double:
    """u <- 2 u, with no state and no use of the context."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return 2 u."""
        return {name: 2 * u for name, u in updates.items()}, state


class EmaState(NamedTuple):
    """What `Ema` remembers."""

    mean: fo.TensorMap


@dataclasses.dataclass(frozen=True)
class Ema:
    """m <- decay m + (1 - decay) u; u <- m."""

    decay: float = 0.9
    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> EmaState:
        """Return zeros."""
        return EmaState({name: torch.zeros_like(p) for name, p in params.items()})

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return the new mean."""
        new = {
            name: self.decay * state.mean[name] + (1 - self.decay) * u
            for name, u in updates.items()
        }
        out = {name: m.clone() for name, m in new.items()}
        return out, EmaState({**state.mean, **new})


class NormalizeEach:
    """u <- u / (||u|| + 1): every tensor by itself."""

    scope = fo.Scope.PER_TENSOR

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return u / (||u|| + 1)."""
        return {name: u / (u.norm() + 1) for name, u in updates.items()}, state


class Normalize:
    """u <- u / (||all u|| + 1): the joint norm through the context."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=fo.Context()) -> Any:
        """Return u / (||all u|| + 1)."""
        if not updates:
            return {}, state
        partial = torch.stack([u.norm() for u in updates.values()])
        norm = context.reduce(partial, fo.Norm(2.0))
        return {name: u / (norm + 1) for name, u in updates.items()}, state


class Window:
    """Holds every second update: a user's own use of Static."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params: fo.TensorMap) -> fo.Static[bool]:
        """Return that the next update is emitted."""
        return fo.Static(False)

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return u or hold, in turns."""
        if not updates:
            return {}, state
        if state.value:
            return {}, fo.Static(False)
        return {name: u.clone() for name, u in updates.items()}, fo.Static(True)


class Whiten:
    """u <- u (u^T u + 1)^-1: needs matrices."""

    scope = fo.Scope.PER_TENSOR

    def init(self, params: fo.TensorMap) -> tuple[()]:
        """Refuse what is no matrix."""
        for name, p in params.items():
            rows, columns = p.shape
            assert rows
            assert columns, name
        return ()

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return the whitened matrices."""
        out = {}
        for name, u in updates.items():
            one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
            out[name] = torch.linalg.solve(u.mT @ u + one, u.mT).mT.contiguous()
        return out, state


RIGHT = [Double(), Ema(), NormalizeEach(), Normalize(), Window()]


@pytest.mark.parametrize("transform", RIGHT, ids=lambda t: type(t).__name__)
def test_accepts_right_ones(transform: fo.Transform) -> None:
    """What is written from the documentation alone passes."""
    check_transform(transform, smooth=True)


def test_accepts_right_ones_in_a_chain() -> None:
    """So does what is built of them."""
    check_transform(fo.chain(*RIGHT[:4], fo.sgd(0.1, momentum=0.9)))


def test_needs_matrices() -> None:
    """The shapes that work and those that do not are told, and how to pass others."""
    with pytest.raises(ValueError, match="not enough values to unpack") as found:
        check_transform(Whiten())
    text = str(found.value)
    assert "It works on 'a.weight' of shape (3, 2); it fails on 'a.bias'" in text
    assert "pass parameters of that kind: check_transform(transform, params=" in text
    check_transform(Whiten(), params={"a": torch.zeros(4, 3), "b": torch.zeros(2, 2)})


def test_params_give_names_and_dtypes() -> None:
    """Rules by name, and parameters in another dtype, are tried as they are meant."""
    params = {"w": torch.zeros(2, 2), "b": torch.zeros(2)}
    check_transform(fo.Scale({"w": 2.0, "b": 0.5}), params, max_examples=20)
    with pytest.raises(ValueError, match=r"Scale.*unknown(.|\n)*pass parameters"):
        check_transform(fo.Scale({"w": 2.0, "b": 0.5}))
    seen = set()

    class Spy(Double):
        def update(self, updates, state, params, *, context=None) -> Any:
            seen.update((name, tuple(u.shape), u.dtype) for name, u in updates.items())
            return super().update(updates, state, params)

    laws.purity(Spy(), params={"w": torch.zeros(3, 1, dtype=torch.bfloat16)})
    assert seen == {("w", (3, 1), torch.bfloat16)}


def test_large_parameters_are_refused() -> None:
    """hypothesis draws small examples; nobody needs to wait for large ones."""
    with pytest.raises(
        ValueError, match="at most 10,000 numbers in all, got 1,000,000"
    ):
        check_transform(Double(), {"w": torch.zeros(1000, 1000)})
    with pytest.raises(ValueError, match="params must have a parameter"):
        check_transform(Double(), {})
    with pytest.raises(TypeError, match="must be a dict from parameter name"):
        check_transform(Double(), [torch.zeros(2)])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (3, "must be a transform with init, update and scope, got 3"),
        (Double, r"got the class Double; write Double\(...\)"),
        (torch.nn.Linear(1, 1), "got a function; write Linear"),
        ([Double()], r"got a list; write chain\(\*transforms\)"),
        (None, "without init and update and scope"),
    ],
)
def test_refuses_what_is_no_transform(what: Any, message: str) -> None:
    """What is missing is told, for a law by itself as well."""
    with pytest.raises(TypeError, match=message):
        check_transform(what)
    with pytest.raises(TypeError, match=message):
        laws.purity(what)


def test_update_without_context_is_explained() -> None:
    """An update that does not take `context` cannot stand in a chain."""

    class Old(Double):
        def update(self, updates, state, params) -> Any:
            return updates, state

    with pytest.raises(TypeError, match=r"update must take .* context=None"):
        check_transform(Old())


def test_same_answer_every_time() -> None:
    """The examples are the same in every run, unless a seed asks for others."""
    found = []
    for seed in (None, None, 1):
        with pytest.raises(BrokenLawError) as broken:
            laws.purity(InPlace(), seed=seed)
        found.append(repr(broken.value.example))
    assert found[0] == found[1]


class InPlace(Double):
    """Writes into its input."""

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return 2 u, and leave it behind."""
        return {name: u.mul_(2).clone() for name, u in updates.items()}, state


def test_report_can_be_pasted_and_run(tmp_path) -> None:
    """The program in the report fails in the same way in a process of its own."""
    (tmp_path / "mine.py").write_text(
        "import functional_optim as fo\n"
        "class Mean:\n"
        "    scope = fo.Scope.ELEMENTWISE\n"
        "    def init(self, params): return ()\n"
        "    def update(self, updates, state, params, *, context=None):\n"
        "        return {n: u - u.mean() for n, u in updates.items()}, state\n"
    )
    code = "import mine; from functional_optim.testing import check_transform as c; "

    def run(program: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        return done.stderr

    report = run(code + "c(mine.Mean())")
    assert "breaks the law of scope" in report
    program = report.split("to paste and run:\n\n")[1]
    program = "\n".join(line.removeprefix("    ") for line in program.splitlines())
    assert "from mine import Mean" in program
    again = run(program)
    assert "What: " in again, again
    what = re.compile(r"^What: .*$", re.MULTILINE)
    assert what.findall(again) == what.findall(report)


def test_example_prints_as_code() -> None:
    """An example is equal to what its repr makes, NaN, -0.0 and contexts included."""
    one = Example(
        {"w": torch.tensor([[1.0, -0.0]]), "e": torch.zeros(0, 2).double()},
        [{"w": torch.tensor([[float("nan"), float("-inf")]]).bfloat16()}],
        [fo.Context(weight=torch.tensor(0.5), last=True)],
    )
    space = {"torch": torch, "Example": Example, "Context": fo.Context}
    again = eval(repr(one), space)
    assert repr(again) == repr(one)
    assert again.updates[0]["w"].dtype == torch.bfloat16
    assert re.search(r"weight=torch.tensor\(0.5\), last=True", repr(one))


def test_without_hypothesis_the_extra_is_named() -> None:
    """The library itself works without hypothesis; the kit says what to install."""
    program = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import functional_optim\n"
        "import functional_optim.testing"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "line 3, in <module>" in done.stderr
    assert "pip install 'functional_optim[testing]'" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_no_mistake(dtype: torch.dtype) -> None:
    """Totals over parts may round in another way, also with 16-bit parameters."""
    params = {"w": torch.zeros(4, 3, dtype=dtype), "b": torch.zeros(3, dtype=dtype)}
    check_transform(fo.ClipByGlobalNorm(1.0), params, max_examples=20)
    check_transform(fo.adamw(), params, max_examples=20)


def test_masks_get_all_names() -> None:
    """A mask that needs certain names is tried on parameters that have them."""
    decay = fo.adamw(mask=fo.exclude("*bias"))
    check_transform(fo.chain(fo.Accumulate(2), decay), max_examples=20)


def test_surroundings_do_not_matter() -> None:
    """Grad mode, inference mode and the default dtype of the caller change nothing."""
    with torch.no_grad():
        check_transform(Double(), max_examples=5)
    with torch.inference_mode():
        check_transform(Double(), max_examples=5)
    state = torch.get_rng_state()
    check_transform(Ema(), max_examples=5)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"params": {"a": 3}}, TypeError, "parameter of 'a' must be a tensor, got 3"),
        ({"params": {1: torch.ones(1)}}, TypeError, "names must be strings, got 1"),
        ({"params": {"a": torch.ones(1).int()}}, TypeError, "only real floating-point"),
        ({"contexts": [3]}, TypeError, r"contexts must be a list of Context\(...\)"),
        ({"contexts": fo.Context()}, TypeError, "contexts must be a list of Context"),
        ({"max_examples": 0}, ValueError, "max_examples must be >= 1, got 0"),
    ],
)
def test_refuses_arguments(arguments: Any, error: type, message: str) -> None:
    """Arguments that cannot say how examples shall be are refused by name."""
    with pytest.raises(error, match=message):
        check_transform(Double(), **arguments)


def test_a_typo_is_no_matter_of_shapes() -> None:
    """An error in the code of a transform is told with its line, and no advice."""

    class Typo(Double):
        def update(self, updates, state, params, *, context=None) -> Any:
            return dict.fromkeys(updates, 2 * uu), state  # noqa: F821 - the typo

    with pytest.raises(ValueError, match=r"name 'uu' is not defined.*line \d+\)") as e:
        check_transform(Typo())
    assert "certain names or shapes" not in str(e.value)


def test_contexts_reach_every_law() -> None:
    """A rule that needs the loss is checked with it, held steps included."""

    class ByLoss(Double):
        def update(self, updates, state, params, *, context=None) -> Any:
            factor = context.loss.clamp(max=1.0)
            return {n: (factor * u).to(u.dtype) for n, u in updates.items()}, state

    contexts = [fo.Context(loss=torch.tensor(0.5, dtype=torch.float64))]
    check_transform(ByLoss(), contexts=contexts, smooth=True, max_examples=20)
    weights = [fo.Context(weight=2.0), fo.Context(weight=3.0)]
    check_transform(fo.Accumulate(2), contexts=weights, max_examples=20)
    with pytest.raises(ValueError, match=r"pass contexts=\[Context\(loss=...\)\]"):
        check_transform(NeedsLoss())


class NeedsLoss(Double):
    """Fails without a loss in a way that may have to do with anything."""

    def update(self, updates, state, params, *, context=None) -> Any:
        """Return u * loss."""
        loss = torch.as_tensor(context.loss)
        return {name: loss * u for name, u in updates.items()}, state


def test_late_changes_need_longer_runs() -> None:
    """What goes wrong after many steps is found with max_steps."""

    class Late(Double):
        def init(self, params: fo.TensorMap) -> Any:
            """Return a count."""
            return Count(torch.zeros((), dtype=torch.float64, device="cpu"))

        def update(self, updates, state, params, *, context=None) -> Any:
            count = state.count + bool(updates)
            late = count > 9
            out = {n: torch.where(late, u - u.mean(), u) for n, u in updates.items()}
            return out, Count(count)

    laws.scope(Late())
    with pytest.raises(BrokenLawError):
        laws.scope(Late(), max_steps=20)


class Count(NamedTuple):
    """How many updates there were."""

    count: torch.Tensor
