"""The example and the benchmark run, on the smallest settings."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

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


def test_benchmark_measures_everyone() -> None:
    """Every candidate that is installed runs, interleaved, and has a ratio."""
    path = ROOT / "benchmarks" / "update_step.py"
    spec = importlib.util.spec_from_file_location("update_step", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (
        sum(shape.numel() for shape in map(module.torch.Size, module.resnet50_shapes()))
        == 25_557_032
    )
    assert len(module.small_shapes()) == 1000
    rows = module.summary(module.measure([(3, 2), (3,)], rounds=3))
    names = [row["name"] for row in rows]
    assert {"torch foreach", "torch fused", "functional_optim pure"} <= set(names)
    assert rows[0]["ratio"] == 1.0
