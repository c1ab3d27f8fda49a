"""Who takes part in the suite: the same chains by this library, torch and TorchOpt."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from interleaved_timing import Step
from parameter_shapes import Shapes, tensors
from suite_device import DEVICE, timed
from torch import Tensor
from torch.nn import Parameter

import functional_optim as fo

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-3, (0.9, 0.999), 1e-8, 0.01, 1.0
SGD_LR, MOMENTUM = 0.1, 0.9
MICRO_STEPS = GROUPS = 4

FUSED, FOREACH, PURE = "torch fused", "torch foreach", "ours, pure"
EAGER, COMPILED, TORCHOPT = "ours, eager", "ours, compiled", "TorchOpt"
FREE = "no step at all"

VARIANTS: dict[str, dict[str, Any]] = {
    EAGER: {},
    COMPILED: {"compile": True},
}
"""What `TransformOptimizer` is given; one whose keywords it refuses is left out."""


class Chain(NamedTuple):
    """A chain of updates that is measured.

    Attributes:
        title: What tables call it.
        transform: Makes it of this library's transforms.
        optimizer: Makes torch's optimizer of groups; what clips stands before it.
        micro_steps: Backwards for one update.
        has_groups: Whether parameters stand in groups with rates of their own.
    """

    title: str
    transform: Callable[[], fo.Transform]
    optimizer: Callable[..., torch.optim.Optimizer]
    micro_steps: int = 1
    has_groups: bool = False


def _adamw() -> fo.Transform:
    adamw = fo.adamw(LR, BETAS, EPS, WEIGHT_DECAY)
    return fo.chain(fo.ClipByGlobalNorm(MAX_NORM), adamw)


def _sgd() -> fo.Transform:
    sgd = fo.sgd(SGD_LR, momentum=MOMENTUM)
    return fo.chain(fo.ClipByGlobalNorm(MAX_NORM), sgd)


_torch_adamw = functools.partial(
    torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
)
_torch_sgd = functools.partial(torch.optim.SGD, lr=SGD_LR, momentum=MOMENTUM)

CHAINS = {
    "adamw": Chain("clip + AdamW", _adamw, _torch_adamw),
    "sgd": Chain("clip + SGD with momentum", _sgd, _torch_sgd),
    "accumulate": Chain(
        f"accumulate {MICRO_STEPS} + clip + AdamW, {GROUPS} groups",
        lambda: fo.chain(fo.Accumulate(MICRO_STEPS), _adamw()),
        _torch_adamw,
        MICRO_STEPS,
        has_groups=True,
    ),
}


class Gradients:
    """Gradients from a real backward that costs little, other ones in every turn.

    Args:
        shapes: The shapes of the parameters.
        dtype: Their dtype.
    """

    offsets = 1024

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        self.sizes = [torch.Size(shape).numel() for shape in shapes]
        generator = torch.Generator().manual_seed(1)
        pool = torch.randn(sum(self.sizes) + self.offsets, generator=generator)
        self.pool = pool.mul_(0.01).to(DEVICE, dtype)

    def backward(
        self, leaves: list[Tensor], turn: int, *, scale: float = 1.0, anew: bool = True
    ) -> None:
        """Run a backward.

        Args:
            leaves: Parameters that get gradients.
            turn: Which gradients.
            scale: What they are multiplied by.
            anew: Whether to forget the gradients that are there.
        """
        if anew:
            for leaf in leaves:
                leaf.grad = None
        parts = self.pool[turn % self.offsets :][: sum(self.sizes)].split(self.sizes)
        losses = [
            (leaf.view(-1) * part).sum()
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        torch.autograd.backward(losses, [losses[0].new_tensor(scale)] * len(losses))


class Contestant:
    """Someone with parameters of its own that take a step in each turn.

    Where a window has several micro-steps, their backwards are part of its time.

    Args:
        params: The parameters.
        gradients: Where gradients come from.
        update: Moves the parameters by their gradients.
        micro_steps: Backwards in a turn.
        sums_in_grad: Whether gradients add up in `.grad`, and one update follows.
    """

    def __init__(
        self,
        params: list[Tensor],
        gradients: Gradients,
        update: Step,
        *,
        micro_steps: int = 1,
        sums_in_grad: bool = False,
    ) -> None:
        self.params, self.update = params, update
        self._gradients, self._micro_steps = gradients, micro_steps
        self._sums_in_grad = sums_in_grad
        self._turn = 0

    def prepare(self) -> None:
        """Get gradients."""
        self._gradients.backward(self.params, self._turn)
        self._turn += 1

    def turn(self) -> float:
        """Take a step and return its milliseconds."""
        if self._micro_steps > 1:
            return timed(self._window)
        self.prepare()
        return timed(self.update)

    def _window(self) -> None:
        if not self._sums_in_grad:
            for _ in range(self._micro_steps):
                self.prepare()
                self.update()
            return
        for index in range(self._micro_steps):
            self._gradients.backward(
                self.params,
                self._turn,
                scale=1 / self._micro_steps,
                anew=index == 0,
            )
            self._turn += 1
        self.update()


class PureContestant(Contestant):
    """Someone whose step makes new parameters.

    Args:
        params: The parameters; a list that the step fills anew.
        gradients: Where gradients come from.
        step: Returns new parameters from gradients and parameters.
    """

    def __init__(
        self,
        params: list[Tensor],
        gradients: Gradients,
        step: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    ) -> None:
        super().__init__(params, gradients, self._step)
        self._pure_step, self._grads = step, [torch.empty(0)]

    def prepare(self) -> None:
        """Get gradients."""
        leaves = [param.detach().requires_grad_() for param in self.params]
        self._gradients.backward(leaves, self._turn)
        self._grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        self._turn += 1

    def _step(self) -> None:
        self.params[:] = self._pure_step(self._grads, self.params)


def values(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    """Return what parameters are at the start."""
    return [p.to(DEVICE, dtype) for p in tensors(shapes, 0.05, 0)]


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    """Return parameters."""
    return [Parameter(p) for p in values(shapes, dtype)]


def groups_of(params: list[Tensor]) -> list[dict[str, Any]]:
    """Return groups of neighbours, each with a rate of its own."""
    size = -(-len(params) // GROUPS)
    return [
        {"params": params[i * size : (i + 1) * size], "lr": LR * (1 + i / 10)}
        for i in range(GROUPS)
    ]


def torch_update(chain: Chain, params: list[Tensor], **options: bool) -> Step:
    """Return clip_grad_norm_ and torch's optimizer."""
    given = groups_of(params) if chain.has_groups else params
    optimizer = chain.optimizer(given, **options)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return update


def our_update(chain: Chain, params: list[Tensor], **options: Any) -> Step:
    """Return the step of `TransformOptimizer`."""
    given: Any = groups_of(params) if chain.has_groups else params
    return fo.TransformOptimizer(given, chain.transform(), **options).step


@functools.cache
def our_variants() -> dict[str, dict[str, Any]]:
    """Return those variants whose keywords are taken."""
    return {name: given for name, given in VARIANTS.items() if _is_taken(given)}


def _is_taken(options: dict[str, Any]) -> bool:
    try:
        fo.TransformOptimizer([Parameter(torch.ones(2))], fo.sgd(0.1), **options)
    except TypeError:
        return False
    return True


def updates() -> dict[str, Callable[[Chain, list[Tensor]], Step]]:
    """Return all who update in place, by name."""
    return {
        FUSED: functools.partial(torch_update, fused=True),
        FOREACH: functools.partial(torch_update, foreach=True),
        **{
            name: functools.partial(our_update, **options)
            for name, options in our_variants().items()
        },
    }


def pure(chain: Chain, params: list[Tensor], gradients: Gradients) -> Contestant:
    """Return this library's pure update and apply_updates."""
    transform = chain.transform()
    names = [f"p{i}" for i in range(len(params))]
    state = transform.init(dict(zip(names, params, strict=True)))

    def step(grads: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        nonlocal state
        given = dict(zip(names, old, strict=True))
        moved, state = transform.update(
            dict(zip(names, grads, strict=True)), state, given
        )
        return list(fo.apply_updates(given, moved).values())

    return PureContestant(params, gradients, step)


def torchopt(params: list[Tensor], gradients: Gradients) -> Contestant:
    """Return TorchOpt's functional clip and AdamW.

    Raises:
        ImportError: it is not installed.
    """
    library: Any = importlib.import_module("torchopt")
    optimizer = library.chain(
        library.clip.clip_grad_norm(MAX_NORM),
        library.adamw(LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
    )
    state = optimizer.init(tuple(params))

    @torch.no_grad()
    def step(grads: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        nonlocal state
        moved, state = optimizer.update(
            tuple(grads), state, params=tuple(old), inplace=False
        )
        return list(library.apply_updates(tuple(old), moved, inplace=False))

    return PureContestant(params, gradients, step)
