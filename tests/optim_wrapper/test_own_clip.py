"""Clipping in a way of one's own: `clip_func`, and `_clip_grad` in a derived class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import functional_optim as fo

WRAPPERS = [fo.OptimWrapper, fo.AmpOptimWrapper]
each_wrapper = pytest.mark.parametrize("kind", WRAPPERS)


class Clip:
    """Halves gradients, and notes how it was called."""

    def __init__(self) -> None:
        self.called: list[Any] = []

    def __call__(self, params: Any, **kwargs: Any) -> torch.Tensor:
        """Halve the gradients, and return a number for the log."""
        params = list(params)
        self.called.append((len(params), kwargs))
        for param in params:
            param.grad.mul_(0.5)
        return torch.tensor(7.0)


def make(kind: type[Any], **options: Any) -> tuple[nn.Parameter, Any]:
    """Return a parameter with a gradient to come, and its wrapper."""
    param = nn.Parameter(torch.zeros(2))
    options.setdefault("clip_grad", {"max_norm": 1.0})
    if issubclass(kind, fo.AmpOptimWrapper):
        options.setdefault("loss_scale", 8.0)
    return param, kind(optimizer=torch.optim.SGD([param], lr=1.0), **options)


def train(param: nn.Parameter, wrapper: Any) -> list[float]:
    """Take a step with the gradient (2, 4), and return what it did."""
    with torch.no_grad():
        param.zero_()
    wrapper.update_params((param * torch.tensor([2.0, 4.0])).sum())
    return [-x for x in param.tolist()]


def norm_of(wrapper: Any) -> float:
    """Return the norm that was logged last."""
    value: float = wrapper.message_hub.get_scalar("train/grad_norm").current()
    return value


@each_wrapper
def test_a_clip_func_that_is_set_is_called(kind: Any) -> None:
    """With what has a gradient and `clip_grad_kwargs`; what it returns is logged."""
    param, wrapper = make(kind)
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    wrapper.optimizer.add_param_group({"params": [frozen]})
    wrapper.clip_func = clip = Clip()
    assert train(param, wrapper) == [1.0, 2.0]
    assert clip.called == [(1, {"max_norm": 1.0})]
    assert norm_of(wrapper) == 7.0
    assert (wrapper.transform, wrapper.readings()) == (None, {})
    wrapper.clip_grad_kwargs["max_norm"] = 2.0
    train(param, wrapper)
    assert clip.called[1:] == [(1, {"max_norm": 2.0})]


@each_wrapper
def test_a_clip_func_may_be_set_and_taken_back_in_training(kind: Any) -> None:
    """The next step goes by what stands there then, in copies as well."""
    param, wrapper = make(kind, clip_grad={"max_norm": 5.0})
    assert train(param, wrapper) == [2.0, 4.0]
    own, wrapper.clip_func = wrapper.clip_func, Clip()
    assert train(param, wrapper) == [1.0, 2.0]
    twin = copy.deepcopy(wrapper)
    (twin_param,) = twin.optimizer.param_groups[0]["params"]
    assert train(twin_param, twin) == [1.0, 2.0]
    wrapper.clip_func, wrapper.clip_grad_kwargs = own, {"max_norm": 1.0}
    assert train(param, wrapper) == pytest.approx([0.2**0.5, 2 * 0.2**0.5])
    assert norm_of(wrapper) == pytest.approx(20**0.5)


@each_wrapper
@pytest.mark.parametrize("where", ["after", "before", "attribute", "method"])
def test_a_derived_class_may_have_its_clip_func(kind: Any, where: str) -> None:
    """Set in `__init__`, or part of the class."""
    clip = Clip()

    class Set(kind):
        def __init__(self, **options: Any) -> None:
            if where == "before":
                self.clip_func = clip
            super().__init__(**options)
            if where == "after":
                self.clip_func = clip

    class Attribute(kind):
        clip_func = staticmethod(clip)

    class Method(kind):
        def clip_func(self, params: Any, max_norm: float) -> Any:
            return clip(params, max_norm=max_norm)

    classes = {"attribute": Attribute, "method": Method}
    param, wrapper = make(classes.get(where, Set))
    assert train(param, wrapper) == [1.0, 2.0]
    assert clip.called == [(1, {"max_norm": 1.0})]
    assert norm_of(wrapper) == 7.0


@each_wrapper
def test_a_clip_func_of_the_class_has_keys_of_its_own(kind: Any) -> None:
    """Keys that torch's functions do not know go to the function that there is."""

    class Own(kind):
        def clip_func(self, params: Any, clipping: float) -> None:
            for param in params:
                param.grad.mul_(clipping)

    param, wrapper = make(Own, clip_grad={"clipping": 0.25})
    assert train(param, wrapper) == [0.5, 1.0]
    with pytest.raises(KeyError):  # It returned no number.
        norm_of(wrapper)
    with pytest.raises(TypeError, match="If `clip_grad` is not None"):
        make(Own, clip_grad={})


def test_a_clip_func_that_sees_infinities_is_followed_by_a_skip() -> None:
    """Gradients are unscaled before; a step with infinities is skipped as before."""
    param, wrapper = make(fo.AmpOptimWrapper)
    wrapper.clip_func = clip = Clip()
    wrapper.update_params((param * torch.tensor([2.0, float("inf")])).sum())
    assert len(clip.called) == 1
    assert wrapper.skipped
    assert param.tolist() == [0.0, 0.0]


@each_wrapper
def test_nothing_is_clipped_without_gradients(kind: Any) -> None:
    """As in MMEngine, a function is not called with no parameters at all."""
    param, wrapper = make(kind)
    wrapper.clip_func = clip = Clip()
    wrapper.step()
    assert clip.called == []
    assert param.tolist() == [0.0, 0.0]


@each_wrapper
def test_clip_grad_may_be_overridden(kind: Any) -> None:
    """`_clip_grad(self)` takes nothing, in all wrappers alike."""

    class Own(kind):
        def _clip_grad(self) -> None:
            groups = self.optimizer.param_groups
            params = [p for g in groups for p in g["params"] if p.grad is not None]
            norm = self.clip_func(params, **self.clip_grad_kwargs)
            self.message_hub.update_scalar(f"train/{self.grad_name}", float(norm))

    param, wrapper = make(Own)
    plain_param, plain = make(kind)
    assert train(param, wrapper) == pytest.approx(train(plain_param, plain))
    assert norm_of(wrapper) == pytest.approx(20**0.5)


@each_wrapper
def test_clip_grad_may_be_extended(kind: Any) -> None:
    """An override that calls ours and has keys of its own beside."""

    class Own(kind):
        factor = 1.0

        def _clip_grad(self) -> None:
            super()._clip_grad()
            for param in self.optimizer.param_groups[0]["params"]:
                param.grad.mul_(self.factor)

    param, wrapper = make(Own)
    wrapper.factor = 2.0
    plain_param, plain = make(kind)
    doubled = [2 * x for x in train(plain_param, plain)]
    assert train(param, wrapper) == pytest.approx(doubled)
    assert repr(wrapper.transform) == repr(plain.transform)

    class Percentile(kind):
        def _clip_grad(self) -> None:
            for param in self.optimizer.param_groups[0]["params"]:
                param.grad.mul_(self.clip_grad_kwargs["percentile"])

    param, wrapper = make(Percentile, clip_grad={"percentile": 0.5})
    assert train(param, wrapper) == [1.0, 2.0]


def test_a_step_written_as_mmengines_clips_and_skips() -> None:
    """Unscaling, clipping and stepping by hand in a derived class."""

    class Own(fo.AmpOptimWrapper):
        def step(self, **kwargs: Any) -> None:
            self.loss_scaler.unscale_(self.optimizer)
            self._clip_grad()
            self.loss_scaler.step(self.optimizer, **kwargs)
            self.loss_scaler.update(self._scale_update_param)

    transform = fo.Observe("norm", op=fo.Norm(2.0))
    for options in ({}, {"clip_grad": None, "transform": transform}):
        param, wrapper = make(Own, **options)
        train(param, wrapper)
        kept = param.tolist()
        wrapper.update_params((param * float("nan")).sum())
        assert param.tolist() == kept


def test_a_limit_in_a_dict_that_is_kept_is_followed() -> None:
    """Whoever sets `clip_grad_kwargs` may write into the dict later."""
    param, wrapper = make(fo.OptimWrapper)
    wrapper.clip_grad_kwargs = kept = {"max_norm": 2.0}
    seen = []
    for limit in (2.0, 1.0, 0.5):
        kept["max_norm"] = limit
        seen.append(sum(x * x for x in train(param, wrapper)) ** 0.5)
    assert seen == pytest.approx([2.0, 1.0, 0.5])
