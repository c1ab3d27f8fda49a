"""Train on handwritten digits from configs: a rule for each kind of parameter.

Two configs, as MMEngine's users write them, train the same small network:

1. rules in `paramwise_cfg`: no weight decay on norms and biases, a slower stem;
2. the same, and a learning rate that falls from block to block towards the input, by a
   constructor of our own that is registered and named in the config.

`summary()` prints what came of the rules before anything is trained. It takes a few
seconds.

    pip install functional_optim[examples]
    python examples/from_config.py
    python examples/from_config.py --epochs 20 --blocks 4
"""

from __future__ import annotations

import logging
import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

import functional_optim as fo

ACCUMULATION = 2  # micro-batches in a step
HELD_OUT = 400  # of 1797 pictures

RULES = {
    "norm_decay_mult": 0.0,
    "bias_decay_mult": 0.0,
    "bias_lr_mult": 2.0,
    # The longest key that a name contains decides alone, so the stem's bias decays.
    "custom_keys": {"stem": {"lr_mult": 0.5}, "head.weight": {"decay_mult": 10.0}},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "rules": {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 5e-3, "weight_decay": 0.05},
        "accumulative_counts": ACCUMULATION,
        "clip_grad": {"max_norm": 1.0},
        "paramwise_cfg": RULES,
    },
    "rules and layer decay": {
        "optimizer": {"type": "fo.adamw", "lr": 5e-3, "weight_decay": 0.05},
        "accumulative_counts": ACCUMULATION,
        "clip_grad": {"max_norm": 1.0},
        "paramwise_cfg": {**RULES, "layer_decay": 0.7},
        "constructor": "LayerDecay",
    },
}


@fo.OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecay(fo.DefaultOptimWrapperConstructor):
    """Multiplies learning rates by `layer_decay`, once for each layer above.

    The rules of `paramwise_cfg` stay what they are; this comes on top of them.
    """

    def __call__(self, model: nn.Module) -> fo.OptimWrapper:
        """Build the wrapper, with the layers of this model in their order."""
        self.layers = ["stem", *(f"blocks.{i}" for i in range(len(model.blocks)))]
        return super().__call__(model)

    def add_params(
        self,
        params: list[dict[str, Any]],
        module: nn.Module,
        prefix: str = "",
        is_dcn_module: float | None = None,
    ) -> None:
        """Add the groups of a module, and slow them down if it is a layer."""
        start = len(params)
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix in self.layers:
            above = len(self.layers) - self.layers.index(prefix)
            factor = self.paramwise_cfg["layer_decay"] ** above
            for group in params[start:]:
                group["lr"] = group.get("lr", self.base_lr) * factor


class Block(nn.Module):
    """A residual block: norm, convolution, depthwise convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.mix = nn.Conv2d(width, width, 1)
        self.look = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, width, 8, 8) to the same shape."""
        return x + self.look(F.gelu(self.mix(self.norm(x))))


class Net(nn.Module):
    """Convolutions over a picture, then one layer on their mean."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.head = nn.Linear(4 * width, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Map pictures (batch, 1, 8, 8) to a score for each digit (batch, 10)."""
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(pictures)), 2)
        return self.head(x.flatten(1))


def train(
    model: nn.Module,
    wrapper: fo.OptimWrapper,
    data: tuple[Tensor, Tensor],
    args: Namespace,
) -> None:
    """Train with any wrapper: this loop knows neither optimizer nor rules."""
    pictures, digits = data
    random = torch.Generator().manual_seed(args.seed)
    orders = [torch.randperm(len(digits), generator=random) for _ in range(args.epochs)]
    batches = [batch for order in orders for batch in order.split(args.batch_size)]
    wrapper.initialize_count_status(model, 0, len(batches))  # The last may be alone.
    steps = math.ceil(len(batches) / ACCUMULATION)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        wrapper.optimizer, wrapper.get_lr()["lr"], total_steps=steps
    )
    for batch in batches:
        with wrapper.optim_context(model):
            loss = F.cross_entropy(model(pictures[batch]), digits[batch])
        wrapper.update_params(loss)
        if wrapper.should_update():
            scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of pictures whose digit is recognised."""
    pictures, digits = data
    return (model(pictures).argmax(dim=1) == digits).float().mean().item()


def parse_arguments() -> Namespace:
    """Read the flags."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=10, help="passes over the training pictures")
    add("--batch-size", type=int, default=32, help="pictures in a micro-batch")
    add("--width", type=int, default=32, help="channels; a multiple of 4")
    add("--blocks", type=int, default=2, help="residual blocks")
    add("--seed", type=int, default=0, help="of weights and batches")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--verbose", action="store_true", help="log every setting that a rule makes")
    return parser.parse_args()


def main() -> None:
    """Build, show, train and judge, once for each config."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(format="%(levelname)s - %(message)s", level=level)
    found = load_digits()
    pictures = torch.from_numpy(found.images).float()[:, None] / 16
    digits = torch.from_numpy(found.target).long()
    training = pictures[HELD_OUT:], digits[HELD_OUT:]
    held_out = pictures[:HELD_OUT], digits[:HELD_OUT]

    for name, config in CONFIGS.items():
        torch.manual_seed(args.seed)
        model = Net(args.width, args.blocks)
        wrapper = fo.build_optim_wrapper(model, config)
        print(f"\n{name}, {config['optimizer']['type']}\n")
        wrapper.summary()
        before = accuracy(model, held_out)
        train(model, wrapper, training, args)
        after = accuracy(model, held_out)
        print(
            f"\naccuracy on {HELD_OUT} held-out pictures: {before:.1%} -> {after:.1%}"
        )


if __name__ == "__main__":
    main()
