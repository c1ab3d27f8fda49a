"""Train a small GAN on handwritten digits, with two wrappers in an OptimWrapperDict.

A generator makes 8x8 pictures of a given digit, a discriminator tells them from real
ones. Each has an optimizer wrapper of its own, built from a config; the dict of both
shows their learning rates in one line and saves their states in one file. Halfway all
objects are thrown away, built anew and loaded from that file: `--sessions 1` trains
without a break and ends in the same bits. It takes about a minute on two cores.

    pip install functional_optim[examples]
    python examples/gan.py
    python examples/gan.py --steps 12000 --width 512
"""

from __future__ import annotations

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.utils.parametrizations import spectral_norm

import functional_optim as fo

DIGITS = 10
NOISE = 32  # numbers that a picture is made of
PIXELS = 64
PER_DIGIT = 2  # pictures of each digit in a row of the figure

CONFIGS: dict[str, dict[str, Any]] = {
    "gen": {
        "optimizer": {"type": "Adam", "lr": 1e-3, "betas": (0.5, 0.99)},
        "clip_grad": {"max_norm": 1.0},
    },
    "disc": {
        "optimizer": {"type": "Adam", "lr": 1e-3, "betas": (0.5, 0.99)},
        "clip_grad": {"max_norm": 1.0},
    },
}


class Generator(nn.Module):
    """Makes a picture from noise and a digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(NOISE + DIGITS, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, PIXELS),
            nn.Sigmoid(),
        )

    def forward(self, noise: Tensor, digits: Tensor) -> Tensor:
        """Map noise (batch, 32) and digits (batch,) to pictures (batch, 64)."""
        return self.layers(torch.cat([noise, F.one_hot(digits, DIGITS)], dim=1))


class Discriminator(nn.Module):
    """Says how real a picture of a digit looks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            spectral_norm(nn.Linear(PIXELS + DIGITS, width)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(width, width)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Linear(width, 1)),
        )

    def forward(self, pictures: Tensor, digits: Tensor) -> Tensor:
        """Map pictures (batch, 64) and digits (batch,) to scores (batch, 1)."""
        return self.layers(torch.cat([pictures, F.one_hot(digits, DIGITS)], dim=1))


class Session:
    """All that training needs; a checkpoint holds its state.

    Attributes:
        models: Generator and discriminator.
        wrappers: Their optimizer wrappers.
        schedulers: What lets their learning rates fall.
    """

    def __init__(self, args: Namespace) -> None:
        torch.manual_seed(args.seed)
        self.models = nn.ModuleDict(
            {"gen": Generator(args.width), "disc": Discriminator(args.width)}
        )
        self.wrappers = fo.OptimWrapperDict(
            **{
                name: fo.build_optim_wrapper(model, CONFIGS[name])
                for name, model in self.models.items()
            }
        )
        self.schedulers = {
            name: torch.optim.lr_scheduler.LinearLR(
                wrapper.optimizer, 1.0, 0.0, total_iters=args.steps
            )
            for name, wrapper in self.wrappers.items()
        }
        self.random = torch.Generator().manual_seed(args.seed)

    def train_step(self, pictures: Tensor, digits: Tensor) -> dict[str, Tensor]:
        """Let the discriminator learn from a batch, then the generator."""
        gen, disc = self.models["gen"], self.models["disc"]
        noise = torch.randn(len(digits), NOISE, generator=self.random)
        made = gen(noise, digits)

        real, fake = disc(pictures, digits), disc(made.detach(), digits)
        disc_loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.wrappers["disc"].update_params(disc_loss)

        gen_loss = -disc(made, digits).mean()
        self.wrappers["gen"].update_params(gen_loss)
        self.wrappers["disc"].zero_grad()  # The generator's loss went through it.

        for scheduler in self.schedulers.values():
            scheduler.step()
        return {"gen": gen_loss.detach(), "disc": disc_loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.load` reads with weights_only=True."""
        return {
            "models": self.models.state_dict(),
            "wrappers": self.wrappers.state_dict(),
            "schedulers": {k: s.state_dict() for k, s in self.schedulers.items()},
            "random": self.random.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on where the state was saved."""
        self.models.load_state_dict(saved["models"])
        self.wrappers.load_state_dict(saved["wrappers"])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(saved["schedulers"][name])
        self.random.set_state(saved["random"])


# -------------------------------------------------------------------------- what to see


def sheet() -> tuple[Tensor, Tensor]:
    """Return noise and digits of a row of the figure, the same for all rows."""
    noise = torch.randn(
        PER_DIGIT * DIGITS, NOISE, generator=torch.Generator().manual_seed(0)
    )
    return noise, torch.arange(DIGITS).repeat_interleave(PER_DIGIT)


def real_row(pictures: Tensor, digits: Tensor) -> Tensor:
    """Return the first pictures of each digit."""
    return torch.cat([pictures[digits == d][:PER_DIGIT] for d in range(DIGITS)])


@torch.no_grad()
def judge(gen: nn.Module, pictures: Tensor, digits: Tensor) -> tuple[float, float]:
    """Judge 1000 generated pictures by the real ones.

    Returns:
        The share that the nearest real pictures say are the digit that was asked for;
        and the spread of pictures of one digit, as a share of the real spread.
    """
    judged = KNeighborsClassifier(5).fit(pictures.numpy(), digits.numpy())
    asked = torch.arange(DIGITS).repeat_interleave(100)
    noise = torch.randn(len(asked), NOISE, generator=torch.Generator().manual_seed(1))
    made = gen(noise, asked)
    right = judged.score(made.numpy(), asked.numpy())
    spread = torch.stack([made[asked == d].std(dim=0).norm() for d in range(DIGITS)])
    real = torch.stack([pictures[digits == d].std(dim=0).norm() for d in range(DIGITS)])
    return right, (spread / real).mean().item()


def plot(rows: dict[str, Tensor], path: Path) -> None:
    """Draw rows of pictures with their names, each digit in columns of its own."""
    figure = Figure(figsize=(10, 0.62 * len(rows) + 0.5), dpi=100)
    grid = figure.subplots(len(rows), PER_DIGIT * DIGITS, squeeze=False)
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axis, picture in zip(axes, pictures, strict=True):
            axis.imshow(picture.view(8, 8), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#dddddd")
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle("Digits that the generator makes of the same noise, in training")
    figure.subplots_adjust(0.1, 0.02, 0.99, 1 - 0.4 / (0.62 * len(rows) + 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_arguments() -> Namespace:
    """Read the flags."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=5000, help="steps of both optimizers")
    add("--batch-size", type=int, default=128, help="pictures in a batch")
    add("--width", type=int, default=256, help="of both models")
    add("--sessions", type=int, default=2, help="parts of training, from file to file")
    add("--seed", type=int, default=0, help="of weights, noise and batches")
    # With such small models several threads wait for each other.
    add("--threads", type=int, default=1, help="threads of torch")
    add("--out", type=Path, default=Path("runs/gan"), help="output folder")
    return parser.parse_args()


def main() -> None:
    """Train, session after session, and draw what was learnt."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    data = load_digits()
    pictures = torch.from_numpy(data.data).float() / 16
    digits = torch.from_numpy(data.target).long()
    print(f"{len(digits)} pictures of 8x8 from sklearn's digits")

    rows: dict[str, Tensor] = {}
    shown = {round(args.steps * part) for part in (0, 0.01, 0.03, 0.1, 0.3, 1)}
    logged = {round(args.steps * part / 10) for part in range(1, 11)}
    ends = [args.steps * (i + 1) // args.sessions for i in range(args.sessions)]
    start, began = 0, time.perf_counter()
    for session_number, end in enumerate(ends, start=1):
        session = Session(args)
        if session_number > 1:
            session.load_state_dict(torch.load(checkpoint, weights_only=True))
            print(f"a new session, loaded from {checkpoint}")
        gen = session.models["gen"]
        for step in range(start, end + 1):
            if step in shown:
                with torch.no_grad():
                    rows[f"step {step}"] = gen(*sheet())
            if step == end:
                break
            batch = torch.randint(
                len(digits), (args.batch_size,), generator=session.random
            )
            losses = session.train_step(pictures[batch], digits[batch])
            if step + 1 in logged:
                right, spread = judge(gen, pictures, digits)
                rates = session.wrappers.get_lr()
                print(
                    f"step {step + 1:5}",
                    *(f"{name} {value:.4f}" for name, (value,) in rates.items()),
                    *(f"{name} loss {loss:6.3f}" for name, loss in losses.items()),
                    f"recognised {right:4.0%}  spread {spread:4.0%} of the real one",
                    sep="  ",
                    flush=True,
                )
        torch.save(session.state_dict(), checkpoint)
        start = end

    rows["real"] = real_row(pictures, digits)
    plot(rows, args.out / "digits.png")
    print(f"{time.perf_counter() - began:.0f} s; pictures: {args.out / 'digits.png'}")


if __name__ == "__main__":
    main()
