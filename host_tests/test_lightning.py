"""The Lightning Trainer trains with a `TransformOptimizer` as with torch's AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning
import pytest
import torch
import twins
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks.finetuning import BackboneFinetuning
from lightning.pytorch.plugins import MixedPrecision

import functional_optim as fo

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

BATCHES = 7  # In each of two epochs; the last window of two is short.

pytestmark = [
    # The data fits into this process.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The resumed run saves nothing.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # Lightning uses torch.jit and pytree names that torch no longer likes.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Regression(lightning.LightningModule):
    """A model whose optimizer is made by a function.

    Args:
        make: Makes the optimizer from parameters.
        dtype: Of the parameters. Lightning loads a checkpoint into the module as it was
            made, before "64-true" makes float64 of it.
        cycle: Whether learning rate and momentum follow `OneCycleLR`.
    """

    def __init__(
        self,
        make: Callable[..., torch.optim.Optimizer],
        dtype: torch.dtype,
        *,
        cycle: bool,
    ) -> None:
        super().__init__()
        self.make, self.cycle = make, cycle
        self.backbone, _, self.head = twins.network(dtype)
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def training_step(self, batch: Any) -> torch.Tensor:
        """Return the loss of a batch."""
        x, y = batch
        return torch.nn.functional.mse_loss(self.head(self.backbone(x).tanh()), y)

    def configure_optimizers(self) -> Any:
        """Make the optimizer, and note the learning rate of each step."""
        params = [p for p in self.parameters() if p.requires_grad]
        optimizer = self.make(params)
        optimizer.register_step_pre_hook(
            lambda own, *_: self.rates.append(float(own.param_groups[0]["lr"]))
        )
        if not self.cycle:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=twins.LR, total_steps=twins.UPDATES
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def on_train_start(self) -> None:
        """Note what was loaded."""
        if self.trainer.current_epoch:
            self.loaded = twins.snapshot(self.trainer.optimizers[0])


def train(
    make: Callable[..., torch.optim.Optimizer],
    *,
    kind: Callable[..., Regression] = Regression,
    max_norm: float | None = twins.MAX_NORM,
    every: int = 2,
    cycle: bool = True,
    save: pathlib.Path | None = None,
    load: pathlib.Path | None = None,
    callbacks: tuple[lightning.Callback, ...] = (),
    **options: Any,
) -> twins.Trained:
    """Train for two epochs, in float64 if nothing else is asked for."""
    if not options:
        options["precision"] = "64-true"
    dtype = torch.float64 if options.get("precision") == "64-true" else torch.float32
    module = kind(make, dtype, cycle=cycle)
    if save is not None:
        checkpoints = ModelCheckpoint(save, filename="{epoch}", save_top_k=-1)
        callbacks = (*callbacks, checkpoints)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        gradient_clip_val=max_norm,
        accumulate_grad_batches=every,
        callbacks=list(callbacks),
        enable_checkpointing=save is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    loader = torch.utils.data.DataLoader(twins.examples(4 * BATCHES, dtype), 4)
    trainer.fit(module, loader, ckpt_path=load, weights_only=True if load else None)
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    (optimizer,) = trainer.optimizers
    return twins.Trained(weights, optimizer, module.loaded, module.rates)


def test_equals_torch() -> None:
    """Clipping, accumulation and `OneCycleLR` with betas give AdamW's weights."""
    reference = train(twins.theirs)
    got = train(twins.ours)
    assert type(got.optimizer) is fo.TransformOptimizer
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    assert got.rates == reference.rates
    assert len(got.rates) == twins.UPDATES
    assert [int(entry["step"]) for entry in twins.snapshot(got.optimizer)] == [
        twins.UPDATES
    ] * 4
    (ours,), (theirs,) = (m.optimizer.param_groups for m in (got, reference))
    assert ours["betas"] == theirs["betas"]


def test_clips_itself() -> None:
    """A clip inside the optimizer does what `gradient_clip_val` does."""
    reference = train(twins.theirs)
    got = train(twins.ours_that_clips, max_norm=None)
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64


@pytest.mark.parametrize(
    "without", [{"max_norm": None}, {"every": 1}, {"cycle": False}], ids=str
)
def test_settings_have_an_effect(without: dict[str, Any]) -> None:
    """What the other tests compare would differ if the host left a setting out."""
    reference = train(twins.theirs).weights
    if "every" in without:
        without = {**without, "cycle": False}
        reference = train(twins.theirs, cycle=False).weights
    other = train(twins.theirs, **without).weights
    assert twins.distance(other, reference) > twins.EFFECT


@pytest.mark.parametrize("make", [twins.theirs, twins.ours, twins.ours_that_clips])
def test_resumes(
    make: Callable[..., torch.optim.Optimizer], tmp_path: pathlib.Path
) -> None:
    """From the checkpoint of the first epoch training ends with the same bits."""
    straight = train(make, save=tmp_path)
    resumed = train(make, load=tmp_path / "epoch=0.ckpt")
    twins.assert_resumed(resumed, straight)


def test_bfloat16() -> None:
    """With autocast to bfloat16, float32 weights and moments are those of AdamW."""
    reference = train(twins.theirs, precision="bf16-mixed")
    got = train(twins.ours, precision="bf16-mixed")
    assert twins.distance(got.weights, reference.weights) <= twins.BFLOAT16
    full = train(twins.theirs, precision="32-true")
    assert twins.distance(full.weights, reference.weights) > 2 * twins.BFLOAT16
    for entry in twins.snapshot(got.optimizer):
        assert entry["exp_avg"].dtype == torch.float32


def test_gradient_scaler() -> None:
    """A gradient scaler and the host's clip, which unscales, give AdamW's weights."""

    def run(make: Callable[..., torch.optim.Optimizer]) -> twins.Trained:
        # A first scale that overflows float16: some steps are skipped.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        got = train(make, cycle=False, plugins=[plugin])
        assert scaler.get_scale() < 2.0**20
        return got

    reference, got = run(twins.theirs), run(twins.ours)
    steps = [
        int(twins.snapshot(made.optimizer)[0]["step"]) for made in (reference, got)
    ]
    assert steps[0] == steps[1]
    assert 0 < steps[0] < twins.UPDATES
    assert twins.distance(got.weights, reference.weights) <= twins.BFLOAT16


class Manual(Regression):
    """The same by hand: the module steps what `self.optimizers()` returns."""

    automatic_optimization = False

    def training_step(self, batch: Any) -> None:
        """Take a step, and compare the wrapper with what it wraps."""
        optimizer: Any = self.optimizers()
        assert isinstance(optimizer, type(self.trainer.optimizers[0]))
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch))
        self.clip_gradients(optimizer, gradient_clip_val=twins.MAX_NORM)
        optimizer.step()
        wrapped, own = optimizer.state_dict(), optimizer.optimizer.state_dict()
        assert wrapped["param_groups"] == own["param_groups"]
        for key, entry in own["state"].items():
            assert all(torch.equal(wrapped["state"][key][k], entry[k]) for k in entry)
        assert repr(optimizer).count("Parameter Group") == 1


def test_manual_optimization() -> None:
    """The wrapper of `self.optimizers()`, of a class made from ours, is as ours."""
    options: dict[str, Any] = {"kind": Manual, "max_norm": None, "every": 1}
    reference = train(twins.theirs, cycle=False, **options)
    got = train(twins.ours, cycle=False, **options)
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    assert len(got.rates) == 2 * BATCHES


def test_parameters_that_come_later() -> None:
    """A group that a callback adds in the second epoch trains as in AdamW."""

    def run(make: Callable[..., torch.optim.Optimizer]) -> twins.Trained:
        late = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        return train(make, cycle=False, callbacks=(late,))

    reference, got = run(twins.theirs), run(twins.ours)
    start = twins.network()[0].weight
    assert (reference.weights["backbone.weight"] - start).abs().max() > twins.EFFECT
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    ours, theirs = (made.optimizer.param_groups for made in (got, reference))
    assert [group["lr"] for group in ours] == [group["lr"] for group in theirs]


def test_parameters_that_came_before_the_break(tmp_path: pathlib.Path) -> None:
    """Groups that a callback assigns to `param_groups` on resuming are those of AdamW.

    Lightning does not make the late parameters trainable again: they stay as they are,
    with torch's AdamW as well.
    """

    def run(make: Callable[..., torch.optim.Optimizer]) -> twins.Trained:
        folder = tmp_path / make.__name__
        for where in ({"save": folder}, {"load": folder / "epoch=0.ckpt"}):
            late = BackboneFinetuning(unfreeze_backbone_at_epoch=0)
            got = train(make, cycle=False, callbacks=(late,), **where)
        return got

    reference, got = run(twins.theirs), run(twins.ours)
    assert len(reference.loaded) == len(got.loaded) == 4
    assert all(entry["exp_avg"].any() for entry in got.loaded)
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
