"""The examples and the benchmarks run, on the smallest settings."""

from __future__ import annotations

import importlib
import json
import math
import pathlib
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent


def test_train_language_model(tmp_path: pathlib.Path) -> None:
    """Three ways to train agree, a table is printed, and a picture drawn."""
    flags = (
        "--steps 3 --batch-size 1 --context 16 --layers 1 --width 32 --dtype float64"
    )
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "train_language_model.py"),
            *flags.split(),
            "--dtype",
            "float64",
            "--out",
            str(tmp_path),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    rows = [line.rsplit(maxsplit=4) for line in done.stdout.splitlines()]
    differences = {
        row[0].strip(): float(row[3])
        for row in rows
        if len(row) == 5
        and row[0].strip() in {"plain loop", "pure updates", "torch.func"}
    }
    assert differences["plain loop"] == 0.0
    # Three steps of float64 on weights of about 1.
    assert differences["pure updates"] < 1e-13
    assert differences["torch.func"] < 1e-13


def run_example(name: str, flags: str, *more: str) -> str:
    """Run an example and return what it prints."""
    script = str(ROOT / "examples" / name)
    done = subprocess.run(
        [sys.executable, script, *flags.split(), *more],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_gan(tmp_path: pathlib.Path) -> None:
    """Training in two sessions, from file to file, ends in the bits of one session."""
    ends = []
    for sessions in (1, 2):
        out = tmp_path / str(sessions)
        flags = f"--steps 10 --width 16 --batch-size 8 --sessions {sessions}"
        printed = run_example("gan.py", flags, "--out", str(out))
        assert "gen.lr 0.0005  disc.lr 0.0005" in printed
        assert printed.count("a new session") == sessions - 1
        assert (out / "digits.png").stat().st_size > 10_000
        ends.append(torch.load(out / "checkpoint.pt", weights_only=True))
    for part in ("models", "wrappers", "random"):
        torch.testing.assert_close(ends[0][part], ends[1][part], rtol=0, atol=0)


def test_from_config() -> None:
    """Both configs show their settings before training, and train."""
    printed = run_example("from_config.py", "--epochs 1 --width 8 --blocks 1")
    rules, decay = printed.split("rules and layer decay, fo.adamw")
    for text, stem in ((rules, "0.0025"), (decay, "0.001225")):  # 0.005 * 0.5 * 0.7^2
        row = re.search(r"stem\.weight +\(8, 1, 3, 3\) +(\S+)", text)
        assert row is not None
        assert row[1] == stem
        assert "blocks.0.norm.weight" in text
        assert "accuracy on 400 held-out pictures: " in text


@pytest.fixture
def benchmark_module(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> ModuleType:
    """Import a benchmark as it is when it runs: beside its modules."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module(request.param)


def numel(shapes: list[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("benchmark_module", ["parameter_shapes"], indirect=True)
def test_benchmark_shapes_are_those_of_the_models(benchmark_module: ModuleType) -> None:
    """The shapes have as many elements as the models are known to have parameters."""
    shapes = benchmark_module
    assert numel(shapes.resnet50_shapes()) == 25_557_032
    assert numel(shapes.gpt2_shapes()) == 124_439_808
    assert len(shapes.small_shapes()) == 1000
    assert numel(shapes.tiny_shapes()) == 33 * 64 + 65 * 64 + 65 * 10


@pytest.mark.parametrize("benchmark_module", ["update_step"], indirect=True)
def test_benchmark_measures_everyone(benchmark_module: ModuleType) -> None:
    """Every candidate that is installed runs, interleaved, and has a ratio."""
    module = benchmark_module
    rows = module.summary(module.measure([(3, 2), (3,)], rounds=3))
    names = [row["name"] for row in rows]
    assert {"torch foreach", "torch fused", "functional_optim pure"} <= set(names)
    assert rows[0]["ratio"] == 1.0


def test_optimizer_step_benchmark(tmp_path: pathlib.Path) -> None:
    """The script prints a table for each case, and writes the numbers as JSON."""
    flags = "--cases tiny tiny-unclipped --rounds 2"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "optimizer_step.py"),
            *flags.split(),
            "--out",
            str(tmp_path),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| TransformOptimizer | ") == 2
    results = json.loads((tmp_path / "optimizer_step.json").read_text())
    assert list(results["cases"]) == ["tiny", "tiny-unclipped"]
    rows = {row["name"]: row for row in results["cases"]["tiny-unclipped"]["rows"]}
    assert rows["torch foreach"]["torch_over_this"] == 1.0
    # Two moments of 6922 float32, and a few numbers.
    state = 2 * 4 * 6922 / 2**20
    assert rows["torch for-loop"]["held_mib"] == pytest.approx(state, rel=0.01)
    assert rows["TransformOptimizer"]["held_mib"] >= state


@pytest.mark.parametrize("benchmark_module", ["allocations"], indirect=True)
def test_allocations_are_counted(benchmark_module: ModuleType) -> None:
    """The peak is what lives at once; kept is what lives on."""
    kept = []

    def call() -> None:
        torch.zeros(2**20)
        torch.zeros(2**19)
        kept.append(torch.zeros(2**18))

    assert benchmark_module.allocations(call) == (4 * 2**20, 4 * 2**18)


@pytest.mark.parametrize("benchmark_module", ["optimizer_step"], indirect=True)
def test_optimizer_step_benchmark_compares(benchmark_module: ModuleType) -> None:
    """A contestant that computes something else is not timed."""
    module = benchmark_module

    def forgetful(params: list[torch.nn.Parameter], *, clip: bool) -> object:
        return torch.optim.Adam(params, lr=2e-3).step

    def make(made: object) -> object:
        return module.contestant(made, [(3, 2), (3,)], clip=False)

    base = make(module.CONTESTANTS[module.BASE])
    good = {module.BASE: base, "ours": make(module.our_step)}
    assert module.check_agreement(good)[module.BASE] == 0.0
    with pytest.raises(RuntimeError, match="ours is .* away from torch foreach"):
        module.check_agreement({module.BASE: base, "ours": make(forgetful)})


def test_own_rule() -> None:
    """A line without noise is fitted; test_rule.py has the laws."""
    loss = float(run_example("own_rule.py", "").split()[-1])
    assert loss < 1e-3
