"""Clipping, unscaling and accumulation against the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import assert_same
from hypothesis import example, given
from hypothesis import strategies as st

import functional_optim as fo
from functional_optim.testing import strategies

SHAPES = {"a.weight": (3, 2), "a.bias": (2,), "norm": ()}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _parameters(grads: fo.TensorMap) -> dict[str, torch.nn.Parameter]:
    """Return parameters that have these gradients."""
    made = {}
    for name, grad in grads.items():
        made[name] = torch.nn.Parameter(torch.zeros_like(grad))
        made[name].grad = grad.clone()
    return made


def _one_nan(tensors: fo.TensorMap) -> fo.TensorMap:
    """Write every NaN with the same bits: float16 kernels differ in its payload."""
    return {n: torch.where(x.isnan(), math.nan, x) for n, x in tensors.items()}


def _grads(params: dict[str, torch.nn.Parameter]) -> fo.TensorMap:
    return {name: p.grad for name, p in params.items() if p.grad is not None}


@dtypes
@given(data=st.data())
def test_clip_by_global_norm(dtype: torch.dtype, data: st.DataObject) -> None:
    """ClipByGlobalNorm is clip_grad_norm_, also on NaN, infinity and signed zeros."""
    grads = data.draw(
        strategies.tensor_maps(SHAPES, dtype, strategies.hostile), label="grads"
    )
    max_norm = data.draw(st.floats(1e-3, 1e3), label="max_norm")
    norm_type = data.draw(st.sampled_from([2.0, 1.0, 3.0, math.inf]), label="p")
    params = _parameters(grads)
    norm = torch.nn.utils.clip_grad_norm_(params.values(), max_norm, norm_type)
    clip = fo.ClipByGlobalNorm(max_norm, norm_type=norm_type)
    clipped, state = clip.update(grads, clip.init(grads), grads)
    assert_same(_grads(params), clipped, "clipped")
    assert_same(norm.double(), state.norm, "norm")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("foreach", [False, True])
@given(data=st.data())
def test_clip_by_norm(dtype: torch.dtype, foreach: bool, data: st.DataObject) -> None:
    """ClipByNorm is clip_grad_norm_ on each tensor alone, for any kind of max_norm."""
    grads = data.draw(
        strategies.tensor_maps(SHAPES, dtype, strategies.hostile), label="grads"
    )
    # Another dtype in the map must not change how the others round.
    grads["wide"] = torch.tensor([3.0, 0.1], dtype=torch.float64)
    max_norm = data.draw(st.floats(1e-3, 1e3), label="max_norm")
    norm_type = data.draw(st.sampled_from([2.0, 1.0, 3.0, math.inf]), label="p")
    params = _parameters(grads)
    for param in params.values():
        torch.nn.utils.clip_grad_norm_(param, max_norm, norm_type, foreach=foreach)
    kinds: list[fo.Hyperparameter] = [
        max_norm,
        torch.tensor(max_norm, dtype=torch.float64),
        fo.schedules.constant(max_norm),
        dict.fromkeys(grads, max_norm),
    ]
    for kind in kinds:
        clip = fo.ClipByNorm(kind, norm_type=norm_type)
        clipped, _ = clip.update(grads, clip.init(grads), grads)
        assert_same(_one_nan(_grads(params)), _one_nan(clipped), "clipped")


@given(
    grads=strategies.tensor_maps(SHAPES),
    max_norm=st.floats(1e-3, 1e3),
    factor=st.floats(0.1, 10.0),
)
def test_clip_laws(grads: fo.TensorMap, max_norm: float, factor: float) -> None:
    """The norm is bounded, the direction kept, and below the bound nothing changes."""
    clip = fo.ClipByGlobalNorm(max_norm)
    clipped, state = clip.update(grads, clip.init(grads), grads)
    after = torch.cat([g.reshape(-1) for g in clipped.values()])
    before = torch.cat([g.reshape(-1) for g in grads.values()])
    eps = 1e-12  # 9 elements, float64: a few hundred roundings at most
    assert after.norm() <= max_norm * (1 + eps)
    ratio = min(1.0, max_norm / (float(before.norm()) + 1e-6))
    assert torch.allclose(after, before * ratio, rtol=eps, atol=0.0)
    if state.norm + 1e-6 <= max_norm:
        assert torch.equal(after, before)
    again, _ = clip.update(clipped, clip.init(grads), grads)
    twice = torch.cat([g.reshape(-1) for g in again.values()])
    # The 1e-6 in the denominator shrinks once more, by at most 1e-6 / max_norm.
    assert torch.allclose(twice, after, rtol=1e-6 / max_norm + eps, atol=0.0)


@dtypes
@given(data=st.data())
def test_clip_by_value(dtype: torch.dtype, data: st.DataObject) -> None:
    """ClipByValue is clip_grad_value_."""
    grads = data.draw(
        strategies.tensor_maps(SHAPES, dtype, strategies.hostile), label="grads"
    )
    clip_value = data.draw(st.floats(0.0, 100.0), label="clip_value")
    params = _parameters(grads)
    torch.nn.utils.clip_grad_value_(params.values(), clip_value)
    clipped, _ = fo.ClipByValue(clip_value).update(grads, (), grads)
    assert_same(_grads(params), clipped, "clipped")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64], ids=str
)
@given(data=st.data())
def test_unscale(dtype: torch.dtype, data: st.DataObject) -> None:
    """Unscale is GradScaler.unscale_, also for scales that are no powers of two."""
    grads = data.draw(
        strategies.tensor_maps(SHAPES, dtype, strategies.hostile), label="grads"
    )
    scale = data.draw(st.floats(1.0, 2.0**24, width=32), label="scale")
    params = _parameters(grads)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))
    optimizer = torch.optim.SGD(params.values())
    if dtype is torch.float16:  # unscale_ refuses gradients of half parameters.
        given_grads = list(_grads(params).values())
        inverse = torch.tensor(scale).double().reciprocal().float()
        torch._amp_foreach_non_finite_check_and_unscale_(
            given_grads, torch.zeros(1), inverse
        )
    else:
        scaler.unscale_(optimizer)
    unscaled, _ = fo.Unscale(scale).update(grads, (), grads)
    assert_same(_grads(params), unscaled, "unscaled")
    as_tensor, _ = fo.Unscale(torch.tensor(scale)).update(grads, (), grads)
    assert_same(unscaled, as_tensor, "unscaled by a tensor")


@dtypes
@given(data=st.data())
def test_accumulate(dtype: torch.dtype, data: st.DataObject) -> None:
    """Accumulate is the loop that sums in .grad and divides once by the true number."""
    every = data.draw(st.integers(1, 4), label="every")
    count = data.draw(st.integers(1, 9), label="micro-batches")
    values = data.draw(strategies.tensor_maps(SHAPES, dtype), label="params")
    micro = data.draw(
        strategies.gradient_sequences(
            SHAPES, dtype, strategies.hostile, min_size=count, max_size=count
        ),
        label="micro",
    )
    leaves = {name: p.clone().requires_grad_() for name, p in values.items()}
    accumulate = fo.Accumulate(every)
    state = accumulate.init(values)
    inside = 0
    for index, grads in enumerate(micro):
        # A loss whose gradient is exactly these numbers.
        loss = sum((leaves[name] * g).sum() for name, g in grads.items())
        loss.backward()
        inside += 1
        last = index == count - 1
        updates, state = accumulate.update(
            grads, state, values, context=fo.Context(last=last)
        )
        if inside < every and not last:
            assert updates == {}
            continue
        expected = {n: p.grad / inside for n, p in leaves.items() if p.grad is not None}
        assert_same(expected, updates, f"window that ends at {index}")
        inside = 0
        for leaf in leaves.values():
            leaf.grad = None


@given(data=st.data())
def test_accumulate_weighted(data: st.DataObject) -> None:
    """Weighted micro-batches give the mean over all tokens; empty ones do not count."""
    tokens = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5), label="n")
    values = data.draw(strategies.tensor_maps(SHAPES), label="params")
    pools = [
        data.draw(
            st.lists(strategies.tensor_maps(SHAPES), min_size=n, max_size=n),
            label="tokens",
        )
        for n in tokens
    ]
    accumulate = fo.Accumulate(len(tokens))
    state, updates = accumulate.init(values), {}
    for pool in pools:
        # The mean loss of no tokens is 0 / 0.
        mean = {
            name: torch.stack([g[name] for g in pool]).mean(0)
            if pool
            else torch.full(SHAPES[name], math.nan, dtype=torch.float64)
            for name in SHAPES
        }
        updates, state = accumulate.update(
            mean, state, values, context=fo.Context(weight=len(pool))
        )
    every_token = [g for pool in pools for g in pool]
    for name in SHAPES:
        if not every_token:
            assert updates[name].isnan().all()
            continue
        expected = torch.stack([g[name] for g in every_token]).mean(0)
        # At most 25 terms of at most 100: 25 * eps * 100, with room for the weights.
        assert torch.allclose(updates[name], expected, rtol=1e-12, atol=1e-12)


@given(data=st.data())
def test_skip_nonfinite(data: st.DataObject) -> None:
    """Skipping bad steps is never having seen them, bit for bit."""
    params = data.draw(
        strategies.tensor_maps(SHAPES, elements=strategies.finite), label="p"
    )
    grads = data.draw(
        strategies.gradient_sequences(
            SHAPES, elements=strategies.hostile, min_size=5, max_size=5
        ),
        label="grads",
    )
    inner = fo.chain(
        fo.ClipByGlobalNorm(1.0), fo.adamw(fo.schedules.linear(0.1, 0.0, 4))
    )
    guarded = fo.SkipNonfinite(inner)
    state, plain_state = guarded.init(params), inner.init(params)
    ours = plain = params
    skipped = in_a_row = 0
    for step in grads:
        updates, state = guarded.update(step, state, ours)
        ours = fo.apply_updates(ours, updates)
        if not step:
            continue
        if all(g.isfinite().all() for g in step.values()):
            updates, plain_state = inner.update(step, plain_state, plain)
            plain = fo.apply_updates(plain, updates)
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        assert_same(plain, ours, "parameters")
        assert_same(plain_state, state.inner, "inner state")
        assert (state.skipped, state.consecutive) == (skipped, in_a_row)


@dtypes
@given(data=st.data())
def test_centralize(dtype: torch.dtype, data: st.DataObject) -> None:
    """Centralize takes its mean out of every row; vectors and scalars stay."""
    shapes = SHAPES | {"conv": (2, 3, 2), "none": (0, 3), "rows": (3, 0)}
    grads = data.draw(strategies.tensor_maps(shapes, dtype), label="grads")
    out, _ = fo.Centralize().update(grads, (), grads)
    for name, g in grads.items():
        assert out[name].shape == g.shape
        if g.ndim < 2:
            assert_same(g, out[name], name)
            continue
        for row, centred in zip(g, out[name], strict=True):
            # Six numbers at most, of at most 100, summed in another order.
            eps = 10 * torch.finfo(dtype).eps * 100
            if row.numel():
                expected = row - sum(row.flatten()) / row.numel()
                assert torch.allclose(centred, expected, rtol=0.0, atol=eps)
                assert abs(centred.sum()) <= row.numel() * eps


@dtypes
@given(data=st.data())
def test_zero_nans(dtype: torch.dtype, data: st.DataObject) -> None:
    """ZeroNans replaces every NaN, counts it, and keeps the bits of all else."""
    steps = data.draw(
        strategies.gradient_sequences(
            SHAPES, dtype, strategies.hostile, min_size=4, max_size=4
        ),
        label="grads",
    )
    zero_nans = fo.ZeroNans()
    state = zero_nans.init(dict.fromkeys(SHAPES, torch.zeros(1)))
    count = 0
    for grads in steps:
        out, state = zero_nans.update(grads, state, grads)
        for name, g in grads.items():
            count += sum(math.isnan(x) for x in g.flatten())
            plain = [0.0 if math.isnan(x) else x.item() for x in g.flatten()]
            expected = torch.tensor(plain, dtype=dtype).reshape(g.shape)
            assert_same(expected, out[name], name)
        assert state.num_zeroed == count


@dtypes
@given(data=st.data())
def test_set_to_zero(dtype: torch.dtype, data: st.DataObject) -> None:
    """SetToZero freezes: no bit of a parameter changes, signed zeros included."""
    maps = strategies.tensor_maps(SHAPES, dtype, strategies.hostile)
    params, grads = data.draw(maps, label="params"), data.draw(maps, label="grads")
    out, _ = fo.SetToZero().update(grads, (), params)
    moved = fo.apply_updates(params, out)
    assert_same(_one_nan(params), _one_nan(moved), "parameters")
    assert all((u == 0).all() and u.signbit().all() for u in out.values())


# Products of these stay normal numbers: an underflow would not be relative.
factors = st.floats(-8, 8).map(lambda x: x if abs(x) > 1e-100 else 0.0)


@given(grads=strategies.tensor_maps(SHAPES), a=factors, b=factors)
@example(grads={"w": torch.ones(2, dtype=torch.float64)}, a=0.0, b=-0.0)
def test_scaling_composes(grads: fo.TensorMap, a: float, b: float) -> None:
    """Two scales are one with the product, to one rounding of each."""
    two = fo.chain(fo.Scale(a), fo.Scale(b))
    out, _ = two.update(grads, two.init(grads), grads)
    once, _ = fo.Scale(a * b).update(grads, (), grads)
    assert_same(once, out, "scaled twice", rtol=4 * torch.finfo(torch.float64).eps)


@given(
    grads=strategies.gradient_sequences(SHAPES, min_size=6, max_size=6, omit=False),
    momentum=st.floats(0.0, 0.99),
)
def test_trace_is_a_weighted_sum(grads: list[fo.TensorMap], momentum: float) -> None:
    """The buffer is the sum of momentum^age times each update."""
    trace = fo.Trace(momentum)
    state, out = trace.init(grads[0]), {}
    for step in grads:
        out, state = trace.update(step, state, step)
    for name in SHAPES:
        ages = range(len(grads) - 1, -1, -1)
        expected = sum(
            momentum**age * g[name] for age, g in zip(ages, grads, strict=True)
        )
        # Six terms of at most 100, two roundings each.
        assert torch.allclose(out[name], expected, rtol=1e-12, atol=1e-11)


@given(
    grads=strategies.tensor_maps(SHAPES, elements=strategies.finite),
    mask=st.fixed_dictionaries(dict.fromkeys(SHAPES, st.booleans())),
)
def test_masking(grads: fo.TensorMap, mask: dict[str, bool]) -> None:
    """What the mask picks is transformed, the rest keeps its bits."""
    masked = fo.Masked(fo.Scale(3.0), mask)
    out, _ = masked.update(grads, masked.init(grads), grads)
    for name, g in grads.items():
        expected = 3.0 * g if mask[name] else g
        assert_same(expected, out[name], name)


def test_eps_root() -> None:
    """With eps_root Adam's direction is m_hat / (sqrt(v_hat + eps_root) + eps)."""
    b1, b2, eps, eps_root = 0.8, 0.9, 0.1, 0.5
    adam = fo.ScaleByAdam((b1, b2), eps=eps, eps_root=eps_root)
    grads = torch.linspace(-2.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
    state = adam.init({"w": grads[0]})
    m = v = torch.zeros(3, dtype=torch.float64)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        expected = m_hat / ((v_hat + eps_root).sqrt() + eps)
        out, state = adam.update({"w": g}, state, {"w": g})
        # About ten roundings a step; 1 - b1**t loses a digit.
        torch.testing.assert_close(out["w"], expected, rtol=1e-13, atol=0.0)
