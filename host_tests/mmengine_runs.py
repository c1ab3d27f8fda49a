"""The same Runner of MMEngine, with its own wrapper and with ours."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

# MMEngine saves objects, which torch does not load by itself since 2.6.
os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
with warnings.catch_warnings():
    # What it imports says at once what will be gone in later versions.
    warnings.simplefilter("ignore")
    from mmengine.hooks import Hook
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

from functional_optim.integrations import mmengine as integration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

THEIRS, OURS = "", "functional_optim."
BATCHES = 8
_experiments = itertools.count()  # Runners of one name would share a message hub.

integration.register()


class Regression(BaseModel):
    """A model with layers of all kinds that rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh())
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, y: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """Return the loss of a batch."""
        assert mode == "loss"
        return {"loss": nn.functional.mse_loss(self.head(self.backbone(x)), y)}


def _examples() -> list[dict[str, Tensor]]:
    """Return inputs of growing size, so that gradients differ from step to step."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4 * BATCHES, 4, generator=generator)
    x *= torch.linspace(0.3, 3, len(x))[:, None]
    return [{"x": row, "y": row.sum(0, keepdim=True).sin()} for row in x]


class Watch(Hook):
    """Notes what each iteration uses.

    Attributes:
        settings: Rates and momenta in each iteration.
        begun: How many iterations were over when training began.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.settings: list[dict[str, Any]] = []
        self.begun = 0

    def before_train(self, runner: Any) -> None:
        """Note where training begins."""
        self.begun = runner.iter

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Note the settings."""
        wrapper = runner.optim_wrapper
        self.settings.append({**wrapper.get_lr(), **wrapper.get_momentum()})


class Trained(NamedTuple):
    """What is left after training.

    Attributes:
        runner: The runner.
        weights: The parameters by name.
        settings: Rates and momenta in each iteration.
        norms: The gradient norms that were noted.
        log: The lines of the log, without what differs from run to run.
    """

    runner: Any
    weights: dict[str, Tensor]
    settings: list[dict[str, Any]]
    norms: list[float]
    log: list[str]


def train(
    folder: pathlib.Path,
    optim_wrapper: Any,
    *,
    model: Callable[[], nn.Module] = Regression,
    schedulers: Any = None,
    by_epoch: bool = True,
    iterations: int = 2 * BATCHES,
    every: int = BATCHES // 2,
    resume: pathlib.Path | None = None,
    **options: Any,
) -> Trained:
    """Train in a Runner on the CPU.

    Args:
        folder: Where the checkpoints go, as `iter_4.pth`.
        optim_wrapper: Config or instance.
        model: Makes the model.
        schedulers: Configs of parameter schedulers.
        by_epoch: Whether the loop is one over epochs.
        iterations: How many batches are seen in all.
        every: How many iterations there are between checkpoints.
        resume: The checkpoint to go on from.
        options: Further arguments of the Runner.
    """
    watch = Watch()
    train_cfg: dict[str, Any] = {"by_epoch": False, "max_iters": iterations}
    sampler = "InfiniteSampler"  # Between epochs that loop waits for two seconds.
    if by_epoch:
        train_cfg = {"by_epoch": True, "max_epochs": iterations // BATCHES}
        sampler = "DefaultSampler"
    with warnings.catch_warnings():
        # Names of torch that are about to go, in MMEngine and below it.
        warnings.simplefilter("ignore")
        runner = Runner(
            model(),
            str(folder),
            train_dataloader={
                "batch_size": 4,
                "dataset": _examples(),
                "sampler": {"type": sampler, "shuffle": False},
                "collate_fn": {"type": "default_collate"},
                "num_workers": 0,
            },
            train_cfg=train_cfg,
            optim_wrapper=optim_wrapper,
            param_scheduler=schedulers,
            default_hooks={
                "logger": {"type": "LoggerHook", "interval": 2},
                "checkpoint": {
                    "type": "CheckpointHook",
                    "by_epoch": False,
                    "interval": every,
                },
            },
            custom_hooks=[watch],
            log_processor={"window_size": 4, "by_epoch": by_epoch},
            experiment_name=f"run{next(_experiments)}",
            randomness={"seed": 0},
            resume=resume is not None,
            load_from=None if resume is None else str(resume),
            **options,
        )
        runner.train()
    assert watch.begun == (0 if resume is None else iterations - len(watch.settings))
    scalars = runner.message_hub.log_scalars
    history = scalars.get("train/grad_norm")
    return Trained(
        runner,
        {name: p.detach().clone() for name, p in runner.model.named_parameters()},
        watch.settings,
        [] if history is None else history.data[0].tolist(),
        _log(runner),
    )


def _log(runner: Any) -> list[str]:
    """Return what the Runner logged of training and of its wrapper."""
    text = pathlib.Path(runner.log_dir, f"{runner.timestamp}.log").read_text()
    lines = re.findall(r"mmengine - \w+ - (.*)", text)
    wanted = re.compile(r"Epoch\(train\)|Iter\(train\)|paramwise_options|Gradient|Res")
    timed = re.compile(r"(eta|time|data_time): [\d.:]+ *")
    return [timed.sub("", line) for line in lines if wanted.match(line)]


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Assert that weights are equal, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
