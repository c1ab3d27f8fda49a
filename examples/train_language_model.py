"""Train one small language model in three ways, and compare them.

A GPT learns to write Python, byte by byte, from the source of the standard library.
From the same weights and on the same batches it is trained

1. by a plain PyTorch loop: `torch.optim.AdamW`, everything changes in place;
2. by pure updates: gradients from `loss.backward()`, all after that are functions;
3. by functions only: gradients from `torch.func`, the model never changes.

Each way averages the gradients of 4 micro-batches, clips their joint norm, warms the
learning rate up and lets it fall along a cosine, and decays matrices only. So the three
must agree up to rounding; with `--dtype float64` there is hardly any rounding left. It
takes about 90 seconds on two cores.

    pip install functional_optim[examples]
    python examples/train_language_model.py
    python examples/train_language_model.py --steps 5000 --layers 4 --threads 8
"""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F  # noqa: N812 - its usual name
from tqdm import tqdm

import functional_optim as fo
from functional_optim import schedules

ACCUMULATION = 4  # micro-batches in one optimizer step
BETAS = (0.9, 0.99)
MAX_NORM = 1.0
WEIGHT_DECAY = 0.1
VOCABULARY = 128  # ASCII
HEAD_WIDTH = 32  # of attention

Training: TypeAlias = Iterator[tuple[float, fo.TensorMap]]
"""Yields, after every optimizer step, the loss of that step and the parameters."""


# ---------------------------------------------------------------- three ways to train


def train_plain(model: nn.Module, batches: Tensor, args: Namespace) -> Training:
    """Train as usual: model, `.grad` and optimizer change in place."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if is_matrix(name, p)]
    others = [p for name, p in named if not is_matrix(name, p)]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)

    for step, micro_batches in enumerate(batches):
        optimizer.zero_grad()
        total = 0.0
        for text in micro_batches:
            loss = cross_entropy(model(text[:, :-1]), text[:, 1:])
            loss.backward()  # adds to .grad
            total += loss.item()
        for param in model.parameters():
            param.grad /= ACCUMULATION
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        yield total / ACCUMULATION, fo.parameters(model)


def is_matrix(_name: str, param: Tensor) -> bool:
    """Tell what decays: no biases, and no scales of norms."""
    return param.ndim >= 2


def learning_rate(step: int, args: Namespace) -> float:
    """Return the learning rate of the plain loop: warm-up, then half a cosine."""
    warmup = args.steps // 10
    if step < warmup:
        return args.lr * step / warmup
    done = (step - warmup) / (args.steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * done))


def pipeline(args: Namespace) -> fo.Chain:
    """Return all that the plain loop does between gradient and update, as one value."""
    lr = schedules.warmup_cosine(
        args.lr, warmup_steps=args.steps // 10, decay_steps=args.steps
    )
    return fo.chain(
        fo.Accumulate(ACCUMULATION),
        fo.ClipByGlobalNorm(MAX_NORM),
        fo.adamw(lr, BETAS, weight_decay=WEIGHT_DECAY, mask=is_matrix),
    )


def train_pure(model: nn.Module, batches: Tensor, args: Namespace) -> Training:
    """Train with pure updates: the model is written to once a step."""
    tx = pipeline(args)
    params = fo.parameters(model)
    state = tx.init(params)

    for micro_batches in batches:
        total = 0.0
        for text in micro_batches:
            model.zero_grad()  # the chain adds up the micro-batches: .grad must not
            loss = cross_entropy(model(text[:, :-1]), text[:, 1:])
            loss.backward()
            updates, state = tx.update(fo.gradients(model), state, params)
            params = fo.apply_updates(params, updates)  # no updates until the fourth
            total += loss.item()
        fo.load_parameters(model, params)
        yield total / ACCUMULATION, params


def train_functional(model: nn.Module, batches: Tensor, args: Namespace) -> Training:
    """Train with functions only: the model lends its code and never changes."""

    def loss_of(params: fo.TensorMap, text: Tensor) -> Tensor:
        logits = functional_call(model, params, text[:, :-1])
        return cross_entropy(logits, text[:, 1:])

    tx = pipeline(args)
    params = fo.parameters(model)
    state = tx.init(params)

    for micro_batches in batches:
        total = 0.0
        for text in micro_batches:
            grads, loss = grad_and_value(loss_of)(params, text)
            updates, state = tx.update(grads, state, params)
            params = fo.apply_updates(params, updates)  # no updates until the fourth
            total += loss.item()
        yield total / ACCUMULATION, params


# ----------------------------------------------------------------------- data and model


def standard_library(most_bytes: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """Return the source of Python's own library: training bytes, held-out bytes."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    source = source.decode("ascii", errors="ignore").encode()
    # One byte for a level of indentation: there is little to learn from runs of spaces.
    source = source.replace(b" " * 4, b"\t")[:most_bytes]
    text = torch.frombuffer(bytearray(source), dtype=torch.uint8)
    held_out = len(text) // 20
    return text[:-held_out], text[-held_out:]


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return `context` bytes and the one to predict after them, from each start."""
    return text[starts[..., None] + torch.arange(context + 1)].long()


def draw_batches(text: Tensor, args: Namespace) -> Tensor:
    """Draw all batches before training, so that every run sees the same ones.

    Returns:
        Bytes. Shape (steps, micro-batches, batch size, context + 1).
    """
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.steps, ACCUMULATION, args.batch_size)
    starts = torch.randint(len(text) - args.context, shape, generator=generator)
    return windows(text, starts, args.context)


class Block(nn.Module):
    """One layer: attention to the bytes so far, then an MLP on each byte."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        # No bias: attention does not depend on that of the keys, so its gradient is
        # nothing but rounding, which Adam would blow up to full steps.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_WIDTH))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, head width)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A small GPT over bytes."""

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, args.width)
        self.position = nn.Embedding(args.context, args.width)
        self.blocks = nn.Sequential(*[Block(args.width) for _ in range(args.layers)])
        self.norm = nn.LayerNorm(args.width)
        self.head = nn.Linear(args.width, VOCABULARY)
        for param in self.parameters():
            if param.ndim >= 2:
                nn.init.normal_(param, std=0.05)

    def forward(self, text: Tensor) -> Tensor:
        """Map bytes (batch, time) to logits of the next one (batch, time, 128)."""
        x = self.byte(text) + self.position.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, params: fo.TensorMap, text: Tensor) -> float:
    """Return the loss with these parameters on windows of text."""
    logits = functional_call(model, params, text[:, :-1])
    return cross_entropy(logits, text[:, 1:]).item()


@torch.no_grad()
def sample(model: nn.Module, params: fo.TensorMap, prompt: str, context: int) -> str:
    """Let the model continue a text by 400 bytes."""
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt.encode())])
    for _ in range(400):
        logits = functional_call(model, params, text[:, -context:])[:, -1]
        chances = torch.softmax(logits / 0.8, dim=-1)  # likely ones still likelier
        text = torch.cat([text, chances.multinomial(1, generator=generator)], dim=1)
    return bytes(text[0].tolist()).decode().expandtabs(4)


# ----------------------------------------------------------------- recording, reporting


@dataclass
class Run:
    """What came of one way to train."""

    losses: list[float] = field(default_factory=list)  # of each step, in nats per byte
    seconds: list[float] = field(default_factory=list)  # duration of each step
    snapshots: dict[int, fo.TensorMap] = field(default_factory=dict)  # by step


def follow(training: Training, args: Namespace) -> Run:
    """Carry a training out behind a progress bar, and record it."""
    run = Run()
    tokens = ACCUMULATION * args.batch_size * args.context
    every = max(1, args.steps // 30)  # enough for a curve, and memory stays small
    bar = tqdm(training, total=args.steps, unit="step", ncols=88, mininterval=0.5)
    start = time.perf_counter()
    for step, (loss, params) in enumerate(bar, start=1):
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss)
        if step % every == 0 or step == args.steps:
            run.snapshots[step] = {name: p.clone() for name, p in params.items()}
        speed = tokens * step / sum(run.seconds)
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        start = time.perf_counter()
    return run


def difference(first: fo.TensorMap, second: fo.TensorMap) -> float:
    """Return the largest absolute difference of two numbers at the same place."""
    return max((first[name] - second[name]).abs().max().item() for name in first)


def differences(run: Run, plain: Run) -> list[float]:
    """Return the difference of a run to the plain loop at every snapshot."""
    return [difference(p, plain.snapshots[step]) for step, p in run.snapshots.items()]


def print_table(runs: dict[str, Run], validation: dict[str, float]) -> None:
    """Print how each run ended; the train loss is the mean of the last 20 steps."""
    head = (
        f"{'train loss':>12}{'validation':>12}{'largest difference':>20}{'ms/step':>9}"
    )
    print(f"\n{'':14}{head}")
    for name, run in runs.items():
        loss = statistics.fmean(run.losses[-20:])
        apart = differences(run, runs["plain loop"])[-1]
        milliseconds = 1000 * statistics.median(run.seconds)
        row = f"{loss:12.6f}{validation[name]:12.6f}{apart:20.1e}{milliseconds:9.1f}"
        print(f"{name:14}{row}")


def plot(runs: dict[str, Run], start: fo.TensorMap, path: Path) -> None:
    """Draw the losses, and how far the parameters are from those of the plain loop."""
    plain = runs["plain loop"]
    steps = len(plain.losses)
    window = min(10, steps)
    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    # The curves coincide: a thinner one on top of a wider one shows both.
    styles = [
        {"color": "#9ecae1", "linewidth": 8},
        {"color": "#d95f02", "linewidth": 3},
        {"color": "black", "linewidth": 1.2, "linestyle": (0, (5, 4))},
    ]
    for (name, run), style in zip(runs.items(), styles, strict=True):
        means = torch.tensor(run.losses).unfold(0, window, 1).mean(dim=1)
        left.plot(range(window, steps + 1), means, label=name, **style)
        if run is not plain:
            apart = differences(run, plain)
            right.plot(
                list(run.snapshots), apart, label=f"{name} - plain loop", **style
            )
    moved = [difference(p, start) for p in plain.snapshots.values()]
    scale = "for scale: plain loop - its own start"
    right.plot(list(plain.snapshots), moved, color="gray", label=scale)
    left.set(title=f"Training loss, mean of {window} steps", ylabel="nats per byte")
    right.set(title="Largest difference of any parameter", ylabel="absolute difference")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set(xlabel="optimizer steps", xlim=(0, steps))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best" if axes is left else "center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def parse_arguments() -> Namespace:
    """Read the flags."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch-size", type=int, default=4, help="windows in a micro-batch")
    add("--context", type=int, default=64, help="bytes in a window")
    add("--layers", type=int, default=2, help="layers of the model")
    add("--width", type=int, default=96, help="of the model; a multiple of 32")
    add("--lr", type=float, default=3e-3, help="peak of the learning rate")
    add("--dtype", default="float32", choices=["float32", "float64"], help="of weights")
    add("--seed", type=int, default=0, help="of weights and batches")
    # More threads help larger models; on a busy machine they wait for each other.
    add("--threads", type=int, default=1, help="threads of torch")
    add("--out", type=Path, default=Path("runs/language_model"), help="output folder")
    return parser.parse_args()


def main() -> None:
    """Train in all three ways, and report."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    text, held_out = standard_library()
    batches = draw_batches(text, args)
    spread = torch.linspace(0, len(held_out) - args.context - 1, 256).long()
    held_out = windows(held_out, spread, args.context)
    model = GPT(args).to(getattr(torch, args.dtype))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(text):,} bytes of Python to learn from")

    ways = {
        "plain loop": train_plain,
        "pure updates": train_pure,
        "torch.func": train_functional,
    }
    runs, validation = {}, {}
    for name, train in ways.items():
        print(f"\n{name}", flush=True)
        runs[name] = follow(train(copy.deepcopy(model), batches, args), args)
        params = runs[name].snapshots[args.steps]
        validation[name] = evaluate(model, params, held_out)

    print_table(runs, validation)
    plot(runs, fo.parameters(model), args.out / "curves.png")
    print(f"\ncurves: {args.out / 'curves.png'}\n\na sample of what it writes:\n")
    print(sample(model, params, "def ", args.context))


if __name__ == "__main__":
    main()
