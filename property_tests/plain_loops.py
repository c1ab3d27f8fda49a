"""Training loops as one writes them without a wrapper, for comparison with wrappers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

NUM_INPUTS, NUM_HIDDEN = 2, 3
NUM_NUMBERS = (NUM_INPUTS + 1) * NUM_HIDDEN + NUM_HIDDEN + 1

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": nn.functional.mse_loss,
    "l1": nn.functional.l1_loss,
    "smooth": nn.functional.smooth_l1_loss,
}
OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.1, "weight_decay": 0.01}),
    (torch.optim.Adam, {"weight_decay": 0.1}),
    (torch.optim.Adam, {"amsgrad": True}),
    (torch.optim.AdamW, {"weight_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
]
SCHEDULERS: list[Callable[[Any], Any] | None] = [
    None,
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=40
    ),
]
CLIPS: list[dict[str, Any] | None] = [
    None,
    {"max_norm": 0.5},
    {"max_norm": 1, "norm_type": "inf"},
    {"type": "norm", "max_norm": 0.01, "norm_type": 1.0},
    {"type": "value", "clip_value": 0.05},
]


class Model(nn.Module):
    """Two layers, the second of which may be left out of a forward."""

    def __init__(self, numbers: list[float], dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, NUM_HIDDEN)
        self.second = nn.Linear(NUM_HIDDEN, 1)
        self.to(dtype)
        left = torch.tensor(numbers, dtype=dtype)
        with torch.no_grad():
            for param in self.parameters():
                own, left = left[: param.numel()], left[param.numel() :]
                param.copy_(own.view_as(param))

    def forward(self, x: Tensor, *, whole: bool = True) -> Tensor:
        """Return one number for each row, without the second layer if not whole."""
        hidden = self.first(x).tanh()
        return self.second(hidden) if whole else hidden.sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    inputs: list[float]
    target: float
    factor: float
    whole: bool

    def loss(self, model: nn.Module, kind: str, dtype: torch.dtype) -> Tensor:
        """Return the loss of a model on it."""
        x = torch.tensor([self.inputs], dtype=dtype)
        found = model(x, whole=self.whole)
        target = torch.full_like(found, self.target)
        return LOSSES[kind](found, target) * self.factor


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training run is made of."""

    numbers: list[float]
    dtype: torch.dtype
    loss: str
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    lr: float
    split: bool
    every: int
    end: int
    clip: dict[str, Any] | None
    scheduler: Callable[[Any], Any] | None

    def model(self) -> Model:
        """Return a new model, always the same."""
        return Model(self.numbers, self.dtype)

    def optimizer_for(self, model: Model) -> torch.optim.Optimizer:
        """Return a new optimizer, with two groups if split."""
        kind, options = self.optimizer
        groups: Any = list(model.parameters())
        if self.split:
            groups = [
                {"params": list(model.first.parameters())},
                {"params": list(model.second.parameters()), "lr": self.lr / 2},
            ]
        return kind(groups, lr=self.lr, **options)

    def schedulers_for(self, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Return the scheduler, if there is one."""
        return [] if self.scheduler is None else [self.scheduler(optimizer)]


numbers_ = st.floats(-2.0, 2.0, width=32)
batches = st.builds(
    Batch,
    inputs=st.lists(numbers_, min_size=NUM_INPUTS, max_size=NUM_INPUTS),
    target=numbers_,
    factor=st.sampled_from([1.0, 0.5, 100.0]),
    whole=st.booleans(),
)
overflowing = st.builds(
    Batch,
    inputs=st.lists(numbers_, min_size=NUM_INPUTS, max_size=NUM_INPUTS),
    target=numbers_,
    factor=st.sampled_from([1.0, 1.0, 1e4, math.inf, math.nan]),
    whole=st.booleans(),
)
setups = st.builds(
    Setup,
    numbers=st.lists(numbers_, min_size=NUM_NUMBERS, max_size=NUM_NUMBERS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    loss=st.sampled_from(sorted(LOSSES)),
    optimizer=st.sampled_from(OPTIMIZERS),
    lr=st.floats(1e-4, 0.5),
    split=st.booleans(),
    every=st.integers(1, 4),
    end=st.sampled_from([-1, 1, 2, 3, 5, 6, 7]),
    clip=st.sampled_from(CLIPS),
    scheduler=st.sampled_from(SCHEDULERS),
)


def ends_of_windows(every: int, end: int, most: int = 100) -> list[int]:
    """Return after how many micro-batches there is a step, one by one."""
    return [count for count in range(1, most) if count % every == 0 or count == end]


class PlainLoop:
    """A loop over micro-batches with torch alone.

    Args:
        setup: What to train.
        scaler: A gradient scaler, or None.
        autocast: The dtype of autocast, or None for none.
        static: What the scale is set to after each step, or None to let it move.
    """

    def __init__(
        self,
        setup: Setup,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        static: float | None = None,
    ) -> None:
        self.setup, self.scaler, self.autocast = setup, scaler, autocast
        self.static = static
        self.model = setup.model()
        self.optimizer = setup.optimizer_for(self.model)
        self.schedulers = setup.schedulers_for(self.optimizer)
        self.count = 0
        self.norm: Tensor | None = None

    def loss(self, batch: Batch) -> Tensor:
        """Run the forward."""
        if self.autocast is None:
            return batch.loss(self.model, self.setup.loss, self.setup.dtype)
        with torch.autocast("cpu", dtype=self.autocast):
            return batch.loss(self.model, self.setup.loss, self.setup.dtype)

    def backward(self, loss: Tensor) -> None:
        """Run the backward of a loss as it is."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        loss.backward()
        self.count += 1

    def update(self, batch: Batch) -> bool:
        """Take one micro-batch; tell whether there was a step."""
        ends = [0, *ends_of_windows(self.setup.every, self.setup.end)]
        after = next(i for i, stop in enumerate(ends) if stop > self.count)
        length = ends[after] - ends[after - 1]
        loss = self.loss(batch)
        self.backward(loss / length if self.setup.every > 1 else loss)
        if self.count not in ends:
            return False
        self.step()
        self.optimizer.zero_grad()
        return True

    def step(self) -> None:
        """Unscale, clip, step."""
        grads = [p for p in self.model.parameters() if p.grad is not None]
        scaler = self.scaler if grads else None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        self._clip(grads)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update(self.static)

    def _clip(self, params: list[nn.Parameter]) -> None:
        clip = dict(self.setup.clip or {})
        if not clip or not params:
            return
        if clip.pop("type", "norm") == "value":
            nn.utils.clip_grad_value_(params, **clip)
        else:
            clip["norm_type"] = float(clip.get("norm_type", 2.0))
            self.norm = nn.utils.clip_grad_norm_(params, **clip)

    def saved(self) -> dict[str, Any]:
        """Return everything that this loop is at, as one saves it by hand."""
        params = self.model.parameters()
        found = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedulers": [s.state_dict() for s in self.schedulers],
            "grads": [p.grad for p in params],
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "count": self.count,
        }
        return copy.deepcopy(found)

    def load(self, saved: dict[str, Any]) -> None:
        """Go on, in a new loop, from what was saved."""
        saved = copy.deepcopy(saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for scheduler, own in zip(self.schedulers, saved["schedulers"], strict=True):
            scheduler.load_state_dict(own)
        for param, grad in zip(self.model.parameters(), saved["grads"], strict=True):
            param.grad = grad
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
            self.scaler.scale(torch.zeros(()))  # It makes its scale when first used.
        self.count = saved["count"]


def bits(tensor: Tensor) -> Any:
    """Return the bits of a tensor, so that NaN equals NaN."""
    return tensor.shape, tensor.dtype, tensor.detach().contiguous().numpy().tobytes()


def bits_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return everything that training changes, bit for bit."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        found[name] = bits(param)
        found[f"{name}.grad"] = None if param.grad is None else bits(param.grad)
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{name}.{key}"] = bits(value) if isinstance(value, Tensor) else value
    for index, group in enumerate(optimizer.param_groups):
        for key in ("lr", "momentum", "betas", "weight_decay"):
            found[f"{index}.{key}"] = group.get(key)
    return found
