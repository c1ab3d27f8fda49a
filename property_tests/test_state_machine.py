"""Whatever is done to an optimizer between steps, it never parts from torch's."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch.nn import Parameter

import functional_optim as fo

numbers = st.floats(-2, 2, width=16)
# torch counts in float32, where these factors are exact.
factors = st.sampled_from([0.5, 1.0, 2.0])
which = st.integers(0, 4)
keys = st.sampled_from(["step", "exp_avg", "exp_avg_sq"])
SHAPES = [(3,), (2, 4), (), (5, 1), (0,)]

# Parameters of the order of 1, and a few roundings of 1e-16 a step.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


class Machine(RuleBasedStateMachine):
    """Our AdamW and torch's, to which the same is done."""

    @initialize(frozen=st.sets(which), clip=st.booleans(), named=st.booleans())
    def begin(self, frozen: set[int], clip: bool, named: bool) -> None:
        """Build both over parameters of which some are frozen."""
        self.saved: Any = None
        made = [[self._made(i, 1.0) for i in range(len(SHAPES))] for _ in range(2)]
        for params in made:
            for index in frozen:
                params[index].requires_grad_(requires_grad=False)
        transform: fo.Transform = fo.adamw(0.1)
        if clip:  # It never bites, and is there: all gradients wait for it.
            transform = fo.chain(fo.ClipByGlobalNorm(1e6), transform)
        ours: Any = made[0]
        if named:
            ours = [(f"p{index}", param) for index, param in enumerate(made[0])]
        self.ours: Any = fo.TransformOptimizer(ours, transform)
        self.theirs: Any = torch.optim.AdamW(made[1], 0.1)
        self.named, self.count = named, len(SHAPES)

    @staticmethod
    def _made(index: int, number: float) -> Parameter:
        shape = SHAPES[index % len(SHAPES)]
        return Parameter(torch.full(shape, number, dtype=torch.float64))

    @property
    def both(self) -> list[Any]:
        """The two optimizers."""
        return [self.ours, self.theirs]

    def _params(self, optimizer: Any) -> list[Parameter]:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def _chosen(self, index: int) -> list[tuple[Any, Parameter]]:
        """Return the same parameter of both."""
        found = []
        for each in self.both:
            params = self._params(each)
            found.append((each, params[index % len(params)]))
        return found

    def _has_state(self, index: int) -> bool:
        return all("step" in each.state.get(p, {}) for each, p in self._chosen(index))

    @rule(given=st.lists(st.none() | numbers, min_size=5, max_size=5))
    def step(self, given: list[float | None]) -> None:
        """Step, with gradients for some of those that need one."""
        for each in self.both:
            count = 0
            for param, number in zip(self._params(each), given * 9, strict=False):
                param.grad = None
                if number is not None and param.requires_grad:
                    param.grad = torch.full_like(param, number)
                    count += 1
            if count:
                each.step()

    @rule(index=which, key=keys, number=factors)
    def write(self, index: int, key: str, number: float) -> None:
        """Multiply an entry in place."""
        if self._has_state(index):
            for each, param in self._chosen(index):
                each.state[param][key].mul_(number)

    @rule(
        index=st.none() | which,
        key=st.none() | keys,
        number=factors,
        how=st.sampled_from(["assign", "data", "set"]),
    )
    def replace(
        self, index: int | None, key: str | None, number: float, how: str
    ) -> None:
        """Put others in the place of entries: of one or all, by key or every key."""
        chosen = range(self.count) if index is None else [index]
        for place in chosen:
            if not self._has_state(place):
                continue
            for each, param in self._chosen(place):
                own = each.state[param]
                for name in ["step", "exp_avg", "exp_avg_sq"] if key is None else [key]:
                    new = own[name] * number
                    if how == "assign":
                        own[name] = new
                    elif how == "data":
                        own[name].data = new
                    else:
                        own[name].set_(new)

    @rule(index=st.none() | which)
    def clear(self, index: int | None) -> None:
        """Take away the state of one parameter, or all."""
        if index is None:
            for each in self.both:
                each.state.clear()
            return
        for each, param in self._chosen(index):
            each.state.pop(param, None)

    @rule(index=which, keep=st.booleans(), number=numbers)
    def renew(self, index: int, keep: bool, number: float) -> None:
        """Put a new parameter in the place of one, with its state or without."""
        for each, param in self._chosen(index):
            new = Parameter(torch.full_like(param, number))
            new.requires_grad_(param.requires_grad)
            for group in each.param_groups:
                group["params"] = [new if p is param else p for p in group["params"]]
            state = each.state.pop(param, None)
            if keep and state:
                each.state[new] = state

    @rule(index=which, rows=st.integers(0, 4))
    def resize(self, index: int, rows: int) -> None:
        """Give a parameter and its state another length."""
        for each, param in self._chosen(index):
            if param.ndim == 0 or not self._has_state(index):
                continue
            shape = (rows, *param.shape[1:])
            size = torch.Size(shape).numel()
            param.grad = None
            param.data = param.data.sum().repeat(size).view(shape)
            own = each.state[param]
            for key in ("exp_avg", "exp_avg_sq"):
                own[key] = own[key].abs().sum().repeat(size).view(shape)

    @rule(index=which, number=numbers)
    def move(self, index: int, number: float) -> None:
        """Put a parameter into other memory."""
        for _, param in self._chosen(index):
            param.data = torch.full_like(param.data, number)

    @rule(index=which)
    def thaw_or_freeze(self, index: int) -> None:
        """Let a parameter need a gradient, or no more."""
        for _, param in self._chosen(index):
            param.requires_grad_(not param.requires_grad)
            param.grad = None

    @precondition(lambda self: self.count < 8)
    @rule(number=numbers, rate=st.none() | st.floats(0, 1, width=16))
    def add(self, number: float, rate: float | None) -> None:
        """Add a group."""
        for each in self.both:
            new: Any = self._made(self.count, number)
            if self.named and each is self.ours:
                new = (f"p{self.count}", new)
            options = {} if rate is None else {"lr": rate}
            each.add_param_group({"params": [new], **options})
        self.count += 1

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        """Go on with copies, of optimizer and parameters together."""
        if how == "deepcopy":
            self.ours, self.theirs = map(copy.deepcopy, self.both)
        else:
            self.ours, self.theirs = (
                pickle.loads(pickle.dumps(each)) for each in self.both
            )
        self.saved = None

    @rule()
    def save(self) -> None:
        """Keep state dicts as they were returned; torch's must be copied."""
        self.saved = (
            self.count,
            [p.shape for p in self._params(self.ours)],
            self.ours.state_dict(),
            copy.deepcopy(self.theirs.state_dict()),
        )

    @precondition(lambda self: self.saved is not None)
    @rule(through=st.booleans())
    def load(self, through: bool) -> None:
        """Go back to what was kept, directly or through a file."""
        count, shapes, ours, theirs = self.saved
        if count != self.count or shapes != [p.shape for p in self._params(self.ours)]:
            return
        if through:
            buffer = io.BytesIO()
            torch.save(ours, buffer)
            buffer.seek(0)
            ours = torch.load(buffer, weights_only=True)
        self.ours.load_state_dict(ours)
        self.theirs.load_state_dict(copy.deepcopy(theirs))

    @invariant()
    def the_same(self) -> None:
        """Parameters and entries agree; ours may have some before the first step."""
        if not hasattr(self, "ours"):
            return
        pairs = zip(*map(self._params, self.both), strict=True)
        for index, (ours, theirs) in enumerate(pairs):
            torch.testing.assert_close(ours, theirs, msg=f"{index}", **CLOSE)
            own = self.theirs.state.get(theirs, {})
            for key in own:
                torch.testing.assert_close(
                    self.ours.state[ours][key].double(), own[key].double(), **CLOSE
                )


def test_machine() -> None:
    """A random walk through all that may be done to an optimizer."""
    case = settings(max_examples=60, stateful_step_count=20)
    run_state_machine_as_test(Machine, settings=case)
