"""Strict numerics for all tests."""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))

torch.set_num_threads(1)
torch.use_deterministic_algorithms(mode=True)
