"""The example and the benchmarks run, on the smallest settings."""

from __future__ import annotations

import importlib
import math
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

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
