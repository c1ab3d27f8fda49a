"""Parameters, gradients and sums in different dtypes."""

from __future__ import annotations

import pytest
import torch

import functional_optim as fo

NARROW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_accumulate_sums_16_bit_in_float32(dtype: torch.dtype) -> None:
    """300 ones sum to 300 where 16-bit sums stop at 256 or lose the small ones."""
    params = {"w": torch.zeros(2, dtype=dtype)}
    ones = {"w": torch.tensor([1.0, 2.0**-6], dtype=dtype)}
    accumulate = fo.Accumulate(300, mean=False)
    state, out = accumulate.init(params), {}
    for _ in range(300):
        out, state = accumulate.update(ones, state, params)
    assert out["w"].dtype is torch.float32
    assert out["w"].tolist() == [300.0, 300 * 2.0**-6]


def test_apply_updates_adds_wide_and_casts_once() -> None:
    """A wide update is not rounded before it is added."""
    params = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    # 1 + 2^-8 + 2^-16 rounds up to 1 + 2^-7; the update alone rounds down to 2^-8,
    # and the tie 1 + 2^-8 goes to even, 1.
    updates = {"w": torch.tensor([2.0**-8 + 2.0**-17])}
    new = fo.apply_updates(params, updates)
    assert new["w"].dtype is torch.bfloat16
    assert new["w"].item() == 1 + 2.0**-7


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("grad_dtype", [*NARROW, torch.float32], ids=str)
def test_states_keep_their_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """Moments have the parameter's dtype whatever the gradient's is."""
    params = {"w": torch.ones(3, dtype=dtype), "s": torch.ones((), dtype=dtype)}
    grads = {n: torch.full_like(p, 0.5, dtype=grad_dtype) for n, p in params.items()}
    pipeline = fo.chain(
        fo.Trace(0.9, dampening=0.1),
        fo.ScaleByAdam((0.9, fo.schedules.linear(0.9, 0.99, 9)), amsgrad=True),
        fo.AddDecayedWeights(0.1),
        fo.ScaleByLearningRate(torch.tensor(0.1)),
    )
    state = pipeline.init(params)
    for _ in range(3):
        updates, state = pipeline.update(grads, state, params)
        for name in params:
            wide = torch.promote_types(dtype, grad_dtype)
            assert updates[name].dtype is wide
            assert state[0].momentum_buffer[name].dtype is dtype
            for field in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                assert getattr(state[1].state, field)[name].dtype is dtype
        assert fo.apply_updates(params, updates)["w"].dtype is dtype


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_beta_as_tensor_is_not_rounded_to_16_bit(dtype: torch.dtype) -> None:
    """A tensor or scheduled beta gives the moments of the number."""
    params = {"w": torch.linspace(-1, 1, 7, dtype=dtype)}
    results = []
    for beta in (0.999, torch.tensor(0.999, dtype=torch.float64)):
        adam = fo.ScaleByAdam((beta, 0.9))
        state = adam.init(params)
        for _ in range(3):
            _, state = adam.update(params, state, params)
        results.append(state.exp_avg["w"])
    assert torch.equal(*results)


def test_float64_and_float32_in_one_map() -> None:
    """Each parameter is updated in its own dtype."""
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}
    pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
    updates, _ = pipeline.update(params, pipeline.init(params), params)
    new = fo.apply_updates(params, updates)
    assert [p.dtype for p in new.values()] == [torch.float32, torch.float64]


def test_a_0_dim_parameter_rounds_like_any_other() -> None:
    """torch promotes 0-dim by 0-dim; a scalar parameter must not notice."""
    pipeline = fo.chain(
        fo.ClipByGlobalNorm(0.7),
        fo.adamw(fo.schedules.linear(0.1, 0.0, 9), (torch.tensor(0.9), 0.99)),
    )
    results = []
    for shape in ((), (1,)):
        params = {"w": torch.full(shape, 0.3), "v": torch.ones(3)}
        state = pipeline.init(params)
        for _ in range(3):
            grads = {name: 0.7 * p for name, p in params.items()}
            updates, state = pipeline.update(grads, state, params)
            params = fo.apply_updates(params, updates)
        results.append(params["w"].reshape(1))
        assert params["w"].shape == shape
    assert torch.equal(*results)


def test_predicates_see_the_parameter() -> None:
    """A mask by dtype asks for that of the parameter, whatever the gradient has."""
    params = {"w": torch.ones(2, dtype=torch.bfloat16), "v": torch.ones(2)}
    grads = {name: torch.zeros(2) for name in params}
    decay = fo.Masked(
        fo.AddDecayedWeights(0.5), lambda name, p: p.dtype is torch.bfloat16
    )
    out, _ = decay.update(grads, decay.init(params), params)
    assert out["w"].tolist() == [0.5, 0.5]
    assert out["v"].tolist() == [0.0, 0.0]


def test_narrow_hyperparameters_are_subtracted_from_1_in_float64() -> None:
    """A float32 tensor is the number that it holds: 1 - 0.1 is not rounded to it."""
    params = {"w": torch.tensor([1.0, -3.0], dtype=torch.float64)}
    narrow = torch.tensor(0.1)
    results = []
    for dampening in (narrow, narrow.item()):
        trace = fo.Trace(0.5, dampening=dampening)
        _, state = trace.update(params, trace.init(params), params)
        results.append(trace.update(params, state, params)[0]["w"])
    # A few roundings of float64; one of float32 would be 3e-8.
    torch.testing.assert_close(*results, rtol=1e-15, atol=0.0)
