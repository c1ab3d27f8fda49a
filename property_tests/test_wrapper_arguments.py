"""Arguments of wrappers: right ones do what torch does, wrong ones are never taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import functional_optim as fo

above = st.floats(1e-3, 1e3) | st.integers(1, 100)
norm_types = st.sampled_from([1, 2, 2.0, 3.5, math.inf, "inf"])
norm_clips = st.fixed_dictionaries(
    {"max_norm": above},
    optional={
        "type": st.just("norm"),
        "norm_type": norm_types,
        "error_if_nonfinite": st.booleans(),
    },
)
value_clips = st.fixed_dictionaries({"type": st.just("value"), "clip_value": above})
clips = norm_clips | value_clips
scales = (
    st.just("dynamic")
    | above
    | st.fixed_dictionaries(
        {},
        optional={
            "init_scale": above,
            "growth_factor": st.floats(1.5, 4.0),
            "backoff_factor": st.floats(0.1, 0.9),
            "growth_interval": st.integers(1, 5),
            "enabled": st.booleans(),
        },
    )
)
# What stands for a number in no place.
no_numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3).filter(lambda text: text != "inf"),
    st.lists(st.floats(), max_size=2),
    st.sampled_from([math.nan, -1.0, -math.inf, b"1", {}, object()]),
)
gradients = st.lists(st.floats(-100.0, 100.0, width=32), min_size=3, max_size=3)


def _pushed(gradient: list[float]) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.tensor(gradient)
    return param


@given(clip=clips, gradient=gradients)
def test_a_right_clip_is_torchs(clip: dict[str, Any], gradient: list[float]) -> None:
    """Bit for bit, and the caller's dict stays as it is."""
    param, twin = _pushed(gradient), _pushed(gradient)
    kept = copy.deepcopy(clip)
    fo.OptimWrapper(torch.optim.SGD([param]), clip_grad=clip).step()
    assert clip == kept
    if kept.pop("type", "norm") == "value":
        nn.utils.clip_grad_value_([twin], **kept)
    else:
        order = float(kept.pop("norm_type", 2.0))
        nn.utils.clip_grad_norm_([twin], norm_type=order, **kept)
    assert torch.equal(param.grad, twin.grad)


@given(clip=clips, key=st.data(), value=no_numbers, gradient=gradients)
def test_no_wrong_clip_is_taken(
    clip: dict[str, Any], key: st.DataObject, value: Any, gradient: list[float]
) -> None:
    """A key that is missing, misspelt or senseless is named."""
    keys = [k for k in clip if k != "error_if_nonfinite"]
    chosen = key.draw(st.sampled_from(keys))
    change = key.draw(st.sampled_from(["drop", "misspell", "replace"]))
    wrong = dict(clip)
    old = wrong.pop(chosen)
    needed = chosen in {"max_norm", "clip_value"} or clip.get("type") == "value"
    if change == "drop" and needed:
        pass
    elif change == "misspell":
        wrong[chosen[:-1]] = old
    else:
        wrong[chosen] = value
    kept = repr(wrong)
    with pytest.raises(AssertionError, match="If `clip_grad` is not None") as caught:
        fo.OptimWrapper(torch.optim.SGD([_pushed(gradient)]), clip_grad=wrong)
    assert isinstance(caught.value, (ValueError, TypeError))
    assert repr(wrong) == kept


@given(scale=scales, dtype=st.sampled_from([None, "float16", torch.bfloat16]))
def test_a_right_scale_is_a_grad_scalers(scale: Any, dtype: Any) -> None:
    """Its arguments arrive, and the caller's dict stays as it is."""
    kept = copy.deepcopy(scale)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    wrapper = fo.AmpOptimWrapper(scale, dtype, optimizer=optimizer)
    assert scale == kept
    if isinstance(scale, dict):
        theirs = torch.amp.GradScaler("cpu", **scale)
    elif scale == "dynamic":
        theirs = torch.amp.GradScaler("cpu", enabled=dtype is not torch.bfloat16)
    else:
        theirs = torch.amp.GradScaler("cpu", float(scale))
    assert wrapper.loss_scaler.state_dict() == theirs.state_dict()


@given(scale=scales, key=st.data(), value=no_numbers)
def test_no_wrong_scale_is_taken(scale: Any, key: st.DataObject, value: Any) -> None:
    """Neither in the place of the whole nor inside a dict."""
    wrong = value
    if isinstance(scale, dict) and scale:
        chosen = key.draw(st.sampled_from(sorted(scale)))
        wrong = dict(scale)
        if key.draw(st.booleans()):
            wrong[chosen[:-1]] = wrong.pop(chosen)
        elif not (chosen == "enabled" and isinstance(value, bool)):
            wrong[chosen] = value
        else:
            wrong = value
    if wrong == {}:
        wrong = None
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(AssertionError, match="loss_scale") as caught:
        fo.AmpOptimWrapper(wrong, optimizer=optimizer)
    assert isinstance(caught.value, (ValueError, TypeError))


@given(counts=no_numbers | st.floats() | st.integers(max_value=0))
def test_no_wrong_count_is_taken(counts: Any) -> None:
    """Whole numbers from 1 on."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(AssertionError, match="accumulative_counts"):
        fo.OptimWrapper(optimizer, counts)
