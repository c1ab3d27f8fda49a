"""The table of all settings: what it shows, and that it is aligned."""

from __future__ import annotations

import torch
from torch import nn

import functional_optim as fo
from functional_optim.optim_wrapper._settings import summary_of


def test_table_shows_settings_and_rules() -> None:
    """Names, shapes, rates, what differs between groups, and the rule that decided."""
    model = nn.ModuleDict({"backbone": nn.Linear(3, 2), "norm": nn.LayerNorm(2)})
    cfg = {
        "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.01},
        "paramwise_cfg": {
            "norm_decay_mult": 0.0,
            "custom_keys": {"backbone": {"lr_mult": 0.5, "momentum": 0.9}},
        },
    }
    lines: list[str] = []
    fo.build_optim_wrapper(model, cfg).summary(lines.append)
    assert (
        "\n".join(lines)
        == """\
parameter        shape   lr    weight_decay  lr_mult  momentum  rule
---------------  ------  ----  ------------  -------  --------  -----------------------
backbone.weight  (2, 3)  0.05  0.01          0.5      0.9       custom_keys['backbone']
backbone.bias    (2,)    0.05  0.01          0.5      0.9       custom_keys['backbone']
norm.weight      (2,)    0.1   0.0           -        0         norm_decay_mult
norm.bias        (2,)    0.1   0.0           -        0         norm_decay_mult

4 parameters with 12 numbers in 4 groups, 2 different settings:
lr=0.05 weight_decay=0.01 lr_mult=0.5 momentum=0.9: 2 parameters \
['backbone.weight', 'backbone.bias']
lr=0.1 weight_decay=0.0 lr_mult=- momentum=0: 2 parameters ['norm.weight', 'norm.bias']\
"""
    )


def test_optimizer_without_names_is_shown() -> None:
    """Parameters without a name are numbered; tensors are shown as numbers."""
    params = [nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(1000, 2))]
    optimizer = torch.optim.Adam(params, lr=torch.tensor(0.5))
    assert summary_of(optimizer.param_groups, {}, {}) == (
        "parameter  shape      lr   weight_decay  rule\n"
        "---------  ---------  ---  ------------  ----\n"
        "0          ()         0.5  0\n"
        "1          (1000, 2)  0.5  0\n"
        "\n"
        "2 parameters with 2,001 numbers in 1 group, 1 different setting:\n"
        "lr=0.5 weight_decay=0: 2 parameters ['0', '1']"
    )


def test_state_of_a_transform_is_no_setting() -> None:
    """What a transform keeps in the first group is left out."""
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    groups = [{"params": [param]} for param in params]
    wrapper = fo.OptimWrapper(fo.TransformOptimizer(groups, fo.adamw(0.1)))
    lines: list[str] = []
    wrapper.summary(lines.append)
    head = lines[0].splitlines()[0].split()
    assert head == ["parameter", "shape", "lr", "weight_decay", "rule"]
