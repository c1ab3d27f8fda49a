"""Other libraries, each in a process of its own with torch fused to compare with.

They bring threads, compilers and allocators of their own, and may take for ever to
compile: who has not taken its first steps within the limit is reported as that.

    python benchmarks/suite_visitors.py NAME FILE ROUNDS THREADS

reads shapes from a JSON file and writes its row there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from interleaved_timing import in_turns, timed
from parameter_shapes import Shapes
from suite_agreement import Turning, checked
from suite_contestants import (
    BETAS,
    CHAINS,
    EPS,
    FUSED,
    LR,
    MAX_NORM,
    WEIGHT_DECAY,
    Contestant,
    Gradients,
    parameters,
    torch_update,
    values,
)
from suite_device import DEVICE
from suite_rows import Row, rows_of
from torch import Tensor

LIMIT_S = 120
"""For the first steps, in which they compile."""
_WARM_UP = 5


class Visitor(NamedTuple):
    """A library that is measured in a process of its own.

    Attributes:
        make: Makes a contestant of shapes and gradients.
        tolerance: How far it may be from torch fused; see `suite_step.Case`.
        is_slow: Whether it compiles for so long that it takes part on few models.
    """

    make: Callable[[Shapes, Gradients], Turning]
    tolerance: float = 2e-4
    is_slow: bool = False


def compiled_torch(shapes: Shapes, gradients: Gradients) -> Contestant:
    """Return clip_grad_norm_ and AdamW(foreach=True) inside torch.compile."""
    params = parameters(shapes, torch.float32)
    update = torch_update(CHAINS["adamw"], params, foreach=True)
    return Contestant(params, gradients, torch.compile(update))


def heavyball(shapes: Shapes, gradients: Gradients) -> Contestant:
    """Return HeavyBall's AdamW with its clip by global norm, compiled as by default."""
    library: Any = importlib.import_module("heavyball")
    params = parameters(shapes, torch.float32)
    optimizer = library.AdamW(
        params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        gradient_clipping=functools.partial(
            library.utils.global_l2norm_clip, clip_at=MAX_NORM
        ),
    )
    return Contestant(params, gradients, optimizer.step)


class Optax:
    """optax under jit: parameters and state are donated, so updated in place.

    Args:
        shapes: The shapes of the parameters.
        gradients: What gradients are made of.
    """

    def __init__(self, shapes: Shapes, gradients: Gradients) -> None:
        jax: Any = importlib.import_module("jax")
        optax: Any = importlib.import_module("optax")
        if DEVICE.type == "cuda" and jax.default_backend() != "gpu":
            msg = "the installed jax has no GPU"
            raise RuntimeError(msg)
        transform = optax.chain(
            optax.clip_by_global_norm(MAX_NORM),
            optax.adamw(LR, *BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
        )

        def loss(params: list[Any], pool: Any, turn: Any) -> Any:
            start, total = 0, 0.0
            given = jax.lax.dynamic_slice(pool, (turn,), (sum(gradients.sizes),))
            for param, size in zip(params, gradients.sizes, strict=True):
                total += (param.ravel() * given[start : start + size]).sum()
                start += size
            return total

        def step(params: list[Any], state: Any, grads: list[Any]) -> Any:
            moved, state = transform.update(grads, state, params)
            return optax.apply_updates(params, moved), state

        self._jax, self._turn = jax, 0
        self._gradients = jax.jit(jax.grad(loss))
        self._step = jax.jit(step, donate_argnums=(0, 1))
        self._pool = jax.numpy.array(gradients.pool.cpu().numpy())
        starts = values(shapes, torch.float32)
        self._params = [jax.numpy.array(p.cpu().numpy()) for p in starts]
        self._state = jax.jit(transform.init)(self._params)

    @property
    def params(self) -> list[Tensor]:
        """The parameters, as torch sees them."""
        found = self._jax.device_get(self._params)
        return [torch.from_numpy(p.copy()).to(DEVICE) for p in found]

    def turn(self) -> float:
        """Take a step and return its milliseconds."""
        grads = self._gradients(self._params, self._pool, self._turn)
        self._jax.block_until_ready(grads)
        self._turn += 1

        def update() -> None:
            self._params, self._state = self._step(self._params, self._state, grads)
            self._jax.block_until_ready((self._params, self._state))

        return timed(update)


VISITORS = {
    "torch.compile, foreach": Visitor(compiled_torch, is_slow=True),
    "optax, jit": Visitor(Optax),
    # Its AdamW takes the larger of sqrt(v) and eps where torch takes the sum.
    "HeavyBall": Visitor(heavyball, tolerance=0.02),
}


def visitor_row(name: str, shapes: Shapes, rounds: int, threads: int) -> Row:
    """Measure a visitor in a process of its own; if that fails the row says why."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "shapes.json"
        path.write_text(json.dumps(shapes))
        command = [sys.executable, __file__, name, path, str(rounds), str(threads)]
        child = subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        _, errors = child.communicate()
        with contextlib.suppress(ProcessLookupError):  # Compilers that it started.
            os.killpg(child.pid, signal.SIGKILL)
        if child.returncode == -signal.SIGALRM:
            return {"name": name, "note": f"over {LIMIT_S} s to compile"}
        if child.returncode:
            last = [line for line in errors.splitlines() if line.strip()][-1:]
            return {"name": name, "note": f"failed: {''.join(last)[:200]}"}
        row: Row = json.loads(path.read_text())
        return row


def measure(name: str, shapes: Shapes, rounds: int) -> Row:
    """Check and time a visitor against torch fused."""
    visitor = VISITORS[name]
    gradients = Gradients(shapes, torch.float32)
    params = parameters(shapes, torch.float32)
    fused = torch_update(CHAINS["adamw"], params, fused=True)
    signal.alarm(LIMIT_S)  # Ends the process, whatever it is at.
    start = time.perf_counter()
    contestants: dict[str, Turning] = {
        FUSED: Contestant(params, gradients, fused),
        name: visitor.make(shapes, gradients),
    }
    starts = values(shapes, torch.float32)
    differences = checked(contestants, starts, visitor.tolerance)
    first_s = time.perf_counter() - start
    signal.alarm(0)
    turns = {key: one.turn for key, one in contestants.items()}
    in_turns(turns, _WARM_UP, lambda turn: turn())
    rows = rows_of(in_turns(turns, rounds, lambda turn: turn()), FUSED, None)
    own = {row["name"]: row for row in rows}
    return {
        **own[name],
        "apart": differences[name],
        "first_steps_s": first_s,
        "fused_ms": own[FUSED]["ms"],
    }


def main(name: str, file: str, rounds: str, threads: str) -> None:
    """Measure in this process."""
    torch.set_num_threads(int(threads))
    path = pathlib.Path(file)
    shapes = [tuple(shape) for shape in json.loads(path.read_text())]
    path.write_text(json.dumps(measure(name, shapes, int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
