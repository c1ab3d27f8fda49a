"""compile=True: the same numbers, whatever lies where and changes when."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import Parameter

import functional_optim as fo
from functional_optim.execution import _native
from functional_optim.execution.compiled import _inductor
from functional_optim.execution.compiled import _kernels as _codes
from functional_optim.torch_optimizer import _gradients

CHAINS: dict[str, Any] = {
    "clip, AdamW": lambda: fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2)),
    "Adam, clip": lambda: fo.chain(fo.ScaleByAdam(), fo.ClipByGlobalNorm(0.1)),
    "SGD": lambda: fo.sgd(0.1, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "Nesterov": lambda: fo.sgd(0.1, momentum=0.9, nesterov=True),
    "amsgrad": lambda: fo.adam(1e-2, amsgrad=True),
    "largest magnitude": lambda: fo.chain(
        fo.ClipByGlobalNorm(0.5, norm_type=float("inf")), fo.sgd(0.1)
    ),
    "nonfinite steps": lambda: fo.SkipNonfinite(fo.chain(fo.adamw(1e-2))),
    "a schedule": lambda: fo.adamw(fo.schedules.linear(0.1, 0.01, 10)),
    "masked decay": lambda: fo.adamw(1e-2, weight_decay=0.1, mask=fo.exclude("*bias")),
}

# One float32 operation rounds by 2^-24; an update of a dozen of them, contracted or not
# and with another square root, differs by less than 16 roundings of the larger number.
TOLERANCE = {torch.float32: 16 * 2.0**-24, torch.float64: 1e-12}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Small ones, a large one, an empty one and a number."""
    return {
        "a.weight": (7, 5),
        "a.bias": (7,),
        "large.weight": (300, 200),
        "empty": (0, 3),
        "one": (1,),
    }


def _params(dtype: torch.dtype = torch.float64) -> list[tuple[str, Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (name, Parameter(torch.randn(shape, dtype=dtype, generator=generator)))
        for name, shape in _shapes().items()
    ]


def _give_gradients(params: list[tuple[str, Parameter]], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, p in params:
        grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        p.grad = grad.to(p.dtype)


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compile=True")
        yield


def _compare(some: Any, others: Any, dtype: torch.dtype) -> None:
    for (name, a), (_, b) in zip(some, others, strict=True):
        scale = float(b.detach().abs().max()) if b.numel() else 0.0
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(a, b, rtol=bound, atol=bound * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_as_without(make: Any, dtype: torch.dtype) -> None:
    plain, code = _params(dtype), _params(dtype)
    one = fo.TransformOptimizer(plain, make())
    two = fo.TransformOptimizer(code, make(), compile=True)
    for step in range(3):
        _give_gradients(plain, step)
        _give_gradients(code, step)
        one.step()
        two.step()
        # From the same numbers: what is rounded otherwise must not add up.
        _compare(code, plain, dtype)
        with torch.no_grad():
            for (_, a), (_, b) in zip(code, plain, strict=True):
                a.copy_(b)
        two.load_transform_state(one.transform_state())
    assert two._engine is not None
    assert all(bucket.kernels for bucket in two._engine.executor.buckets)


def _clip_adamw(params: Any, **options: Any) -> fo.TransformOptimizer:
    tx = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2))
    return fo.TransformOptimizer(params, tx, compile=True, **options)


def test_no_code_is_made_after_the_first_step() -> None:
    """A thousand rates, the last one 0, and units of any length: the same code."""
    params = _params()
    optimizer = _clip_adamw(params)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    _give_gradients(params, 0)
    optimizer.step()
    with (
        mock.patch.object(_codes, "traced", side_effect=AssertionError),
        mock.patch.object(_inductor, "compile_fx", side_effect=AssertionError),
    ):
        for _ in range(1000):
            schedule.step()
            optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_other_lengths_run_the_same_code() -> None:
    params = _params()
    optimizer = _clip_adamw(params)
    _give_gradients(params, 0)
    optimizer.step()
    with mock.patch.object(_inductor, "compile_fx", side_effect=AssertionError):
        for sizes in ((1,), (3, 40_000), (2, 2, 70_001)):
            others = [Parameter(torch.randn(size).double()) for size in sizes]
            for p in others:
                p.grad = torch.ones_like(p)
            before = [p.detach().clone() for p in others]
            _clip_adamw(others).step()
            for p, old in zip(others, before, strict=True):
                assert not torch.equal(p, old)


def test_autograd_sees_that_parameters_were_written() -> None:
    """Small ones, written by an operator, and large ones, written by code."""
    params = [p for _, p in _params() if p.numel()]
    optimizer = fo.TransformOptimizer(params, fo.sgd(0.1), compile=True)
    saved = [(p * p).sum() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for result in saved:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


def test_tensors_anywhere() -> None:
    """Not contiguous, channels_last, gradients that lie otherwise: right numbers."""
    generator = torch.Generator().manual_seed(0)

    def made() -> list[Parameter]:
        generator.manual_seed(0)
        whole = torch.randn(8, 40, 30, 30, generator=generator).double()
        return [
            Parameter(whole.to(memory_format=torch.channels_last)),
            Parameter(torch.randn(300, 200, generator=generator).double().t()),
            Parameter(torch.randn(10, 6, generator=generator).double()[:, ::2]),
            Parameter(torch.randn(4, 5, generator=generator).double().t()),
            Parameter(torch.randn((), generator=generator).double()),
        ]

    some, others = made(), made()
    tx = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2))
    optimizers = (
        fo.TransformOptimizer(some, tx),
        fo.TransformOptimizer(others, tx, compile=True),
    )
    for step in range(3):
        for params in (some, others):
            generator.manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).double()
                if step == 1 and p.ndim == 4:
                    p.grad = p.grad.to(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(others, some, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _odd_gradients() -> dict[str, Any]:
    return {
        "negated view": lambda p: torch.complex(p.detach(), p.detach()).conj().imag,
        "zeros without memory": torch._efficientzerotensor,
        "one number for all": lambda p: p.new_ones(()).expand(p.shape),
        "every second": lambda p: p.new_ones((*p.shape[:-1], 2 * p.shape[-1]))[
            ..., ::2
        ],
    }


@pytest.mark.parametrize("kind", _odd_gradients())
def test_gradients_that_are_no_plain_memory(kind: str) -> None:
    some, others = _params(), _params()
    one = fo.TransformOptimizer(some, fo.adamw(1e-2))
    two = fo.TransformOptimizer(others, fo.adamw(1e-2), compile=True)
    make = _odd_gradients()[kind]
    for params, optimizer in ((some, one), (others, two)):
        for _, p in params:
            is_zero = kind == "zeros without memory"
            p.grad = make(p.shape).double() if is_zero else make(p)
        optimizer.step()
        optimizer.step()
    _compare(others, some, torch.float64)


def test_an_update_of_another_shape_is_refused_as_without() -> None:
    @dataclasses.dataclass(frozen=True)
    class Sum:
        scope = fo.Scope.ELEMENTWISE

        def init(self, params: Any) -> tuple[()]:
            return ()

        def update(self, updates: Any, state: Any, params: Any, *, context: Any) -> Any:
            return {name: u.sum() for name, u in updates.items()}, state

    params = _params()
    optimizer = fo.TransformOptimizer(params, Sum(), compile=True)
    _give_gradients(params, 0)
    before = [p.detach().clone() for _, p in params]
    with (
        pytest.warns(UserWarning, match="must keep its shape"),
        pytest.raises(ValueError, match="must keep the shapes"),
    ):
        optimizer.step()
    assert all(map(torch.equal, [p for _, p in params], before))


def test_gradients_that_are_missing() -> None:
    """Now and then: no decay, no momentum; the others go on with code."""
    some, others = _params(), _params()
    tx = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2))
    one = fo.TransformOptimizer(some, tx)
    two = fo.TransformOptimizer(others, tx, compile=True)
    for step in range(6):
        for params in (some, others):
            _give_gradients(params, step)
            if step in {2, 3}:
                params[step][1].grad = None
        one.step()
        two.step()
        _compare(others, some, torch.float64)
    for (_, a), (_, b) in zip(others, some, strict=True):
        assert torch.equal(two.state[a]["step"], one.state[b]["step"])


def test_hyperparameters_written_into_groups() -> None:
    def run(*, is_compiled: bool) -> list[Parameter]:
        params = _params()
        groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
        tx = fo.adamw(1e-2, weight_decay=0.1)
        optimizer = fo.TransformOptimizer(groups, tx, compile=is_compiled)
        for step in range(5):
            _give_gradients(params, step)
            optimizer.param_groups[step % 2]["lr"] = 0.1 * step
            optimizer.param_groups[1]["betas"] = (0.9 - 0.1 * step, 0.99)
            optimizer.param_groups[0]["weight_decay"] = 0.01 * step
            optimizer.step()
        return [p for _, p in params]

    for a, b in zip(run(is_compiled=True), run(is_compiled=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_momentum_that_becomes_zero() -> None:
    """A plain 0 is another kind of transform: the buffer waits, as in torch."""
    params = _params()
    optimizer = fo.TransformOptimizer(params, fo.sgd(0.1, momentum=0.9), compile=True)
    p = params[0][1]
    for step, momentum in enumerate((0.9, 0.0, 0.9)):
        _give_gradients(params, step)
        optimizer.param_groups[0]["momentum"] = momentum
        before = optimizer.state[p]["momentum_buffer"].clone()
        optimizer.step()
        waits = torch.equal(optimizer.state[p]["momentum_buffer"], before)
        assert waits is (momentum == 0.0)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradient_scaler(is_compiled: bool) -> None:
    """An overflow skips the step, and the scale falls."""
    params = _params(torch.float32)
    tx = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-2))
    optimizer = fo.TransformOptimizer(params, tx, compile=is_compiled, amp_scaling=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        _give_gradients(params, step)
        for _, p in params:
            p.grad = torch.full_like(p, 4.0)
        scaler.scale(torch.ones(()))  # Makes the scale.
        if step == 1:
            params[2][1].grad = torch.full_like(params[2][1], float("inf"))
        before = [p.detach().clone() for _, p in params]
        scaler.step(optimizer)
        scaler.update(4.0)
        kept = [torch.equal(p, old) for (_, p), old in zip(params, before, strict=True)]
        assert all(kept) is (step == 1)
    assert int(optimizer.state[params[0][1]]["step"]) == 3


def test_copies_and_checkpoints_go_on() -> None:
    params = _params()
    optimizer = _clip_adamw(params)
    _give_gradients(params, 0)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy.deepcopy([p for _, p in params])
    copied = _clip_adamw([(n, p) for (n, _), p in zip(params, twins, strict=True)])
    copied.load_state_dict(torch.load(file))
    whole = copy.deepcopy(optimizer)
    assert whole._compiles
    for (_, a), b in zip(params, twins, strict=True):
        a.grad = torch.ones_like(a)
        b.grad = torch.ones_like(b)
    optimizer.step()
    copied.step()
    for (_, a), b in zip(params, twins, strict=True):
        assert torch.equal(a, b)


def test_a_parameter_is_added_and_one_frozen() -> None:
    params = _params()
    optimizer = _clip_adamw(params)
    for step in range(4):
        _give_gradients(params, step)
        if step == 1:
            new = Parameter(torch.ones(50, 1000).double())
            optimizer.add_param_group({"params": [("new", new)]})
            params.append(("new", new))
            new.grad = torch.ones_like(new)
        if step == 2:
            params[0][1].requires_grad_(False)
            params[0][1].grad = None
        before = [p.detach().clone() for _, p in params]
        optimizer.step()
        moved = [
            not torch.equal(p, b) for (_, p), b in zip(params, before, strict=True)
        ]
        wanted = [p.numel() > 0 for _, p in params]
        wanted[0] = step < 2 or step == 3
        assert moved == wanted


def test_a_parameter_that_comes_late_in_a_window_begins_with_nothing() -> None:
    """What the last window left is not added to the sum of the next."""
    ends = []
    for compiles in (False, True):
        a, b = (Parameter(torch.zeros(2)) for _ in range(2))
        transform = fo.chain(fo.Accumulate(2), fo.sgd(1.0))
        optimizer = fo.TransformOptimizer([a, b], transform, compile=compiles)
        for one, two in ((1.0, 10.0), (2.0, 20.0), (3.0, None), (4.0, 40.0)):
            a.grad = torch.full((2,), one)
            b.grad = None if two is None else torch.full((2,), two)
            optimizer.step()
        ends.append((a[0].item(), b[0].item()))
    assert ends == [(-5.0, -35.0), (-5.0, -35.0)]


# -- where no code can be made ---------------------------------------------------------


def _failing(*_: Any, **__: Any) -> Any:
    msg = "no C++ compiler was found"
    raise RuntimeError(msg)


@pytest.mark.filterwarnings("ignore:compile=True")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning that says why; the same numbers; nothing is tried at every step."""
    monkeypatch.setattr(_inductor, "_known", {})
    tried = mock.Mock(side_effect=_failing)
    monkeypatch.setattr(_inductor, "compile_fx", tried)
    for module in (_native, _gradients):
        monkeypatch.setattr(
            module, "loaded_operators", lambda: "RuntimeError: no header"
        )
    plain, code = _params(), _params()
    one = fo.TransformOptimizer(plain, fo.adamw(1e-2))
    two = fo.TransformOptimizer(code, fo.adamw(1e-2), compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            _give_gradients(plain, step)
            _give_gradients(code, step)
            one.step()
            two.step()
    told = [str(w.message) for w in caught if "compile=True" in str(w.message)]
    assert len(told) == 1
    assert "no C++ compiler was found" in told[0]
    assert tried.call_count == 1
    _compare(code, plain, torch.float64)
    told = fo.explain(two)
    assert "not compiled (RuntimeError: no C++ compiler was found)" in told
    assert "not compiled: the look at gradients (RuntimeError: no header)" in told


def test_explain_says_what_is_compiled() -> None:
    params = _params(torch.float32)
    optimizer = _clip_adamw(params)
    text = fo.explain(optimizer)
    where = "float32 on cpu: 1 slice, 1 pool, "
    assert f"{where}to be compiled at the first step" in text
    _give_gradients(params, 0)
    optimizer.step()
    assert f"{where}compiled" in fo.explain(optimizer)
    whole = fo.TransformOptimizer(params, fo.chain(fo.Centralize()), compile=True)
    assert "1 group, not compiled (Centralize() looks at whole" in fo.explain(whole)
    assert fo.explain(fo.OptimWrapper(optimizer)) == fo.explain(optimizer)


def test_a_total_may_have_another_dtype_at_another_step() -> None:
    """The widest of the partials that there are: code for float64 reads no float32."""
    dtypes = [torch.float32, torch.float64, torch.float32]
    ours, theirs = (
        [Parameter(torch.ones(3, dtype=dtype)) for dtype in dtypes] for _ in range(2)
    )
    tx = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(0.01))
    compiled = fo.TransformOptimizer(ours, tx, compile=True)
    eager = fo.TransformOptimizer(theirs, tx)
    for given in [(0, 1), (1, 2), (0, 2)]:
        for params in (ours, theirs):
            for index, param in enumerate(params):
                grad = torch.full_like(param, 5.0 + index)
                param.grad = grad if index in given else None
        compiled.step()
        eager.step()
    for one, other in zip(ours, theirs, strict=True):
        # Three steps of at most 0.01: some roundings of float32 each.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
