"""Whatever is called in whatever order, a wrapper never parts from the plain loop."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from plain_loops import Batch, PlainLoop, Setup, batches, bits_of, overflowing, setups

import functional_optim as fo


class Machine(RuleBasedStateMachine):
    """A wrapper and a plain loop that are told the same."""

    dtype: str | None = None
    micro_batches = batches
    setups = setups

    def __init__(self) -> None:
        super().__init__()
        self.saved: Any = None
        self.wrapper: fo.OptimWrapper | None = None

    def _new_wrapper(self, setup: Setup) -> None:
        self.model = setup.model()
        optimizer = setup.optimizer_for(self.model)
        self.schedulers = setup.schedulers_for(optimizer)
        common = {"accumulative_counts": setup.every, "clip_grad": setup.clip}
        if self.dtype is None:
            self.wrapper = fo.OptimWrapper(optimizer, **common)
        else:
            scale = {"init_scale": 1024.0, "growth_interval": 2}
            self.wrapper = fo.AmpOptimWrapper(
                scale, self.dtype, optimizer=optimizer, **common
            )

    def _new_plain(self, setup: Setup) -> None:
        if self.dtype is None:
            self.plain = PlainLoop(setup)
        else:
            scaler = torch.amp.GradScaler("cpu", 1024.0, growth_interval=2)
            self.plain = PlainLoop(setup, scaler, getattr(torch, self.dtype))

    def _loss(self, batch: Batch) -> torch.Tensor:
        assert self.wrapper is not None
        with self.wrapper.optim_context(self.model):
            return batch.loss(self.model, self.setup.loss, self.setup.dtype)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Draw what to train."""
        self.setup = data.draw(type(self).setups)
        self._new_wrapper(self.setup)
        self._new_plain(self.setup)
        if self.setup.end > 0:
            self.wrapper.initialize_count_status(self.model, 0, self.setup.end)

    @rule(data=st.data())
    def update_params(self, data: st.DataObject) -> None:
        """Take a micro-batch."""
        batch = data.draw(type(self).micro_batches)
        self.wrapper.update_params(self._loss(batch))
        self.plain.update(batch)

    @rule(data=st.data())
    def backward(self, data: st.DataObject) -> None:
        """Run a backward alone."""
        batch = data.draw(type(self).micro_batches)
        self.wrapper.backward(self._loss(batch))
        self.plain.backward(self.plain.loss(batch))

    @rule()
    def step(self) -> None:
        """Step, with whatever gradients there are."""
        self.wrapper.step()
        self.plain.step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        """Forget the gradients."""
        self.wrapper.zero_grad(set_to_none=set_to_none)
        self.plain.optimizer.zero_grad(set_to_none=set_to_none)

    @rule()
    def step_schedulers(self) -> None:
        """Let the learning rate change."""
        for scheduler in [*self.schedulers, *self.plain.schedulers]:
            scheduler.step()

    @rule()
    def save(self) -> None:
        """Write a checkpoint, wherever the window stands."""
        file = io.BytesIO()
        ours = {
            "model": self.model.state_dict(),
            "wrapper": self.wrapper.state_dict(),
            "schedulers": [s.state_dict() for s in self.schedulers],
        }
        torch.save(ours, file)
        self.saved = file.getvalue(), self.plain.saved()

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self) -> None:
        """Go on from the checkpoint in a new process, so to speak."""
        file, theirs = self.saved
        # Schedulers of torch save an enum, which weights_only refuses.
        ours = torch.load(io.BytesIO(file), weights_only=False)
        self._new_wrapper(self.setup)
        self._new_plain(self.setup)
        self.model.load_state_dict(ours["model"])
        before = repr(ours["wrapper"])
        self.wrapper.load_state_dict(ours["wrapper"])
        assert repr(ours["wrapper"]) == before
        for scheduler, own in zip(self.schedulers, ours["schedulers"], strict=True):
            scheduler.load_state_dict(own)
        self.plain.load(theirs)

    @invariant()
    def same(self) -> None:
        """Parameters, gradients, state, rates, counts and scale are the same."""
        if self.wrapper is None:
            return
        plain = self.plain
        ours = bits_of(self.model, self.wrapper.optimizer)
        assert ours == bits_of(plain.model, plain.optimizer)
        assert self.wrapper.inner_count == plain.count
        if plain.scaler is not None:
            assert self.wrapper.loss_scaler.state_dict() == plain.scaler.state_dict()


class HalfMachine(Machine):
    """The same in float16, with overflows."""

    dtype = "float16"
    micro_batches = overflowing
    setups = setups.filter(lambda setup: setup.dtype is torch.float32)


def _bounded(machine: type[Machine]) -> Any:
    """Return a test of a machine, under the profile's number of examples."""
    case = machine.TestCase
    case.settings = settings(stateful_step_count=20)
    return pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")(case)


TestMachine = _bounded(Machine)
TestHalfMachine = _bounded(HalfMachine)
