"""The transformers Trainer trains with a `TransformOptimizer` as with torch's AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import twins
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import functional_optim as fo

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Callable

BATCHES = 15  # The last window of two is short.
TOKENS = 12


class Watch(TrainerCallback):
    """Notes what the optimizer has at the start, and the learning rate of each step."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, torch.Tensor]] = []
        self.rates: list[float] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Note what was loaded."""
        if state.global_step:
            self.loaded = twins.snapshot(kwargs["optimizer"])

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Note the learning rate."""
        self.rates.append(float(kwargs["optimizer"].param_groups[0]["lr"]))


def language_model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16,
        n_positions=TOKENS,
        n_embd=8,
        n_layer=1,
        n_head=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def sentences(count: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": tokens, "labels": tokens}
        for tokens in torch.randint(16, (count, TOKENS), generator=generator)
    ]


def train(
    make: Callable[..., torch.optim.Optimizer],
    folder: pathlib.Path,
    *,
    model: torch.nn.Module | None = None,
    data: Any = None,
    load: pathlib.Path | None = None,
    by_class: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    **options: Any,
) -> twins.Trained:
    """Train for an epoch, with a checkpoint in the middle in `folder`."""
    arguments = {
        "max_grad_norm": twins.MAX_NORM,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": twins.DECAY,
        **options,
    }
    model = language_model() if model is None else model
    watch = Watch()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=twins.UPDATES // 2,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **arguments,
        ),
        train_dataset=sentences(2 * BATCHES) if data is None else data,
        callbacks=[watch],
        optimizers=(None if by_class else make(model.parameters()), None),
        optimizer_cls_and_kwargs=by_class,
    )
    trainer.train(resume_from_checkpoint=str(load) if load else None)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = trainer.optimizer.optimizer
    return twins.Trained(weights, optimizer, watch.loaded, watch.rates)


def test_equals_torch(tmp_path: pathlib.Path) -> None:
    """Clipping, accumulation, warmup and cosine of the host give AdamW's weights."""
    reference = train(twins.theirs, tmp_path / "theirs")
    got = train(twins.ours, tmp_path / "ours")
    assert type(got.optimizer) is fo.TransformOptimizer
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    assert got.rates == reference.rates
    assert len(got.rates) == twins.UPDATES
    assert {int(entry["step"]) for entry in twins.snapshot(got.optimizer)} == {
        twins.UPDATES
    }


def test_clips_itself(tmp_path: pathlib.Path) -> None:
    """A clip inside the optimizer does what `max_grad_norm` does."""
    reference = train(twins.theirs, tmp_path / "theirs")
    got = train(twins.ours_that_clips, tmp_path / "ours", max_grad_norm=0.0)
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64


@pytest.mark.parametrize(
    "without",
    [
        {"max_grad_norm": 0.0},
        {"gradient_accumulation_steps": 1},
        {"lr_scheduler_type": "constant", "warmup_steps": 0},
    ],
    ids=["clip", "accumulation", "schedule"],
)
def test_settings_have_an_effect(
    without: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """What the other tests compare would differ if the host left a setting out."""
    start = {n: p.detach() for n, p in language_model().named_parameters()}
    reference = train(twins.theirs, tmp_path / "with").weights
    assert twins.distance(reference, start) > twins.EFFECT
    other = train(twins.theirs, tmp_path / "without", **without).weights
    assert twins.distance(other, reference) > twins.EFFECT


@pytest.mark.parametrize("make", [twins.theirs, twins.ours, twins.ours_that_clips])
def test_resumes(
    make: Callable[..., torch.optim.Optimizer], tmp_path: pathlib.Path
) -> None:
    """From the checkpoint in the middle training ends with the same bits."""
    straight = train(make, tmp_path)
    middle = tmp_path / f"checkpoint-{twins.UPDATES // 2}"
    resumed = train(make, tmp_path / "again", load=middle)
    twins.assert_resumed(resumed, straight)


def test_class_and_arguments(tmp_path: pathlib.Path) -> None:
    """The host builds it from the class, with decay and without in two groups."""
    options = {"lr": twins.LR, "weight_decay": 0.5}  # The groups say otherwise.
    theirs = (torch.optim.AdamW, dict(options))
    ours = (fo.TransformOptimizer, {"transform": fo.adamw(**options)})
    reference = train(twins.theirs, tmp_path / "theirs", by_class=theirs)
    got = train(twins.ours, tmp_path / "ours", by_class=ours)
    assert type(got.optimizer) is fo.TransformOptimizer
    assert [g["weight_decay"] for g in got.optimizer.param_groups] == [twins.DECAY, 0.0]
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
    middle = tmp_path / "ours" / f"checkpoint-{twins.UPDATES // 2}"
    ours = (fo.TransformOptimizer, {"transform": fo.adamw(**options)})
    resumed = train(twins.ours, tmp_path / "again", by_class=ours, load=middle)
    twins.assert_resumed(resumed, got)


class Lookup(torch.nn.Module):
    """A model of matrices only: the host's group without decay is empty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(16, 16, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        """Return the loss of predicting each token from the one before."""
        logits = self.table(input_ids[:, :-1]).flatten(0, 1)
        wanted = labels[:, 1:].flatten()
        return {"loss": torch.nn.functional.cross_entropy(logits, wanted)}


def test_empty_group(tmp_path: pathlib.Path) -> None:
    """A group without parameters, which the host makes, changes nothing."""

    def run(name: str, *by_class: Any) -> twins.Trained:
        return train(twins.ours, tmp_path / name, model=Lookup(), by_class=by_class)

    reference = run("theirs", torch.optim.AdamW, {"lr": twins.LR})
    got = run("ours", fo.TransformOptimizer, {"transform": fo.adamw(twins.LR)})
    assert [len(g["params"]) for g in got.optimizer.param_groups] == [1, 0]
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64


def test_decay_of_zero(tmp_path: pathlib.Path) -> None:
    """The decay of 0 that the host writes into groups is legal without a decay."""
    theirs = (torch.optim.AdamW, {"lr": twins.LR, "weight_decay": 0.0})
    rule = fo.adamw(twins.LR, weight_decay=0.0)
    ours = (fo.TransformOptimizer, {"transform": rule})
    got, reference = (
        train(twins.ours, tmp_path / str(index), by_class=made, weight_decay=0.0)
        for index, made in enumerate((ours, theirs))
    )
    assert twins.distance(got.weights, reference.weights) <= twins.FLOAT64
