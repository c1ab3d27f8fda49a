"""The table of a pipeline: what it says is what the pipeline does."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from transform_cases import CASES

import functional_optim as fo
from functional_optim import schedules


def small_gpt(layers: int = 2, width: int = 64, device: str = "meta") -> fo.TensorMap:
    """Return the parameters of a GPT, by default without memory."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (1000, width)}
    for i in range(layers):
        shapes[f"h.{i}.ln.weight"] = shapes[f"h.{i}.ln.bias"] = (width,)
        shapes[f"h.{i}.attn.weight"] = (3 * width, width)
        shapes[f"h.{i}.attn.bias"] = (3 * width,)
    return {name: torch.ones(shape, device=device) for name, shape in shapes.items()}


def lines(tx: fo.Transform, params: fo.TensorMap) -> list[str]:
    """Return the table in lines, runs of blanks as one."""
    return [re.sub(" +", " ", line) for line in fo.explain(tx, params).splitlines()]


def test_the_whole_table() -> None:
    """Stages with what stands inside them, bytes of state, and selections."""
    tx = fo.chain(
        fo.Accumulate(4),
        fo.SkipNonfinite(
            fo.chain(
                fo.ClipByGlobalNorm(1.0),
                fo.Partition(
                    {
                        "matrix": fo.adamw(1e-3, mask=fo.exclude("wte.*")),
                        "other": fo.Named("slow", fo.Trace(0.9)),
                    },
                    {"*.bias": "other", "ln.*": "other", "*": "matrix"},
                ),
            )
        ),
    )
    params = {
        "wte.weight": torch.zeros(1024, 256),
        "ln.weight": torch.zeros(256),
        "head.weight": torch.zeros(256, 256),
        "head.bias": torch.zeros(256),
    }
    assert fo.explain(tx, params) == WHOLE


WHOLE = """\
stage                                                         scope          state
Accumulate(4)                                                 elementwise  1.3 MiB
SkipNonfinite(...)                                            elementwise     16 B
  ClipByGlobalNorm(1.0)                                       elementwise      8 B
  Partition(..., {'*.bias': 'other', 'ln.*': 'other', '*'...  elementwise        -
    matrix:                                                   elementwise        -
      ScaleByAdam()                                           elementwise  2.5 MiB
      Masked(..., exclude('wte.*'))                           elementwise        -
        AddDecayedWeights(0.01)                               elementwise        -
      ScaleByLearningRate(0.001)                              elementwise        -
    other: Named('slow', ...)                                 elementwise        -
      Trace(0.9)                                              elementwise  2.0 KiB

parameters  4 tensors, 328,192 numbers, 1.3 MiB
state       3.8 MiB, 3.00 x the parameters

Partition(..., {'*.bias': 'other', 'ln.*': 'other', '*': 'matrix'})
  'matrix' -> 2 of 4 tensors, 327,680 numbers: wte.weight, head.weight
  'other'  -> 2 of 4 tensors,     512 numbers: ln.weight, head.bias

Masked(..., exclude('wte.*'))
  exclude('wte.*') -> 1 of 2 tensors,  65,536 numbers: head.weight
  the rest         -> 1 of 2 tensors, 262,144 numbers: wte.weight"""


def test_bytes_are_those_of_the_state() -> None:
    """The total is that of the tensors in a real state, shared counts once."""
    params = small_gpt(device="cpu")
    tx = fo.chain(fo.Accumulate(2), fo.Masked(fo.adam(1e-3, amsgrad=True), "*.weight"))
    distinct = {
        id(x): x for x in torch.utils._pytree.tree_leaves(tx.init(params))
    }.values()
    total = sum(x.numel() * x.element_size() for x in distinct)
    own = sum(4 * p.numel() for p in params.values())
    assert (
        f"state {total / 2**20:,.1f} MiB, {total / own:.2f} x the parameters"
        in lines(tx, params)
    )


def test_rules_show_what_they_decide() -> None:
    """The first rule that fits takes a name; one that gets nothing shows as 0."""
    tx = fo.MultiplyParamwise({"*.bias": 2.0, "h.0.*.bias": 3.0, "h.0.*": 4.0})
    text = lines(tx, small_gpt(width=2))
    assert (
        " '*.bias': 2.0 -> 4 of 9 tensors, 16 numbers: h.0.ln.bias, h.0.attn.bias, "
        in (f"{text[-4][:75]} ")
    )
    assert " 'h.0.*.bias': 3.0 -> 0 of 9 tensors, 0 numbers" in text
    assert any(line.startswith(" the rest -> 3 of 9 tensors, 2,014") for line in text)


def test_selections_inside_a_partition_range_over_its_names() -> None:
    """A mask sees the names of its branch only."""
    inner = fo.Masked(fo.Scale(2.0), "*.bias")
    tx = fo.Partition({"x": inner, "y": fo.Identity()}, {"h.*": "x", "*": "y"})
    assert any(
        line.startswith(" '*.bias' -> 4 of 8 tensors")
        for line in lines(tx, small_gpt())
    )


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(mask=fo.exclude("*.bias", "*.ln.*")),
        fo.MultiplyParamwise(dict.fromkeys(small_gpt(250), 2.0)),
        fo.adamw(dict.fromkeys(small_gpt(250), 2.0)),
        fo.chain(*(fo.Observe(f"n{i}") for i in range(20))),
    ],
    ids=["mask", "rules", "map", "many stages"],
)
def test_a_large_model_has_a_short_table(tx: fo.Transform) -> None:
    """A thousand parameters, without memory for them, in a screenful."""
    params = small_gpt(250, 4096)
    assert len(params) == 1001
    text = fo.explain(tx, params).splitlines()
    assert len(text) <= 45
    assert max(map(len, text)) <= 110


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_transform_explains(case) -> None:
    """Each has a table without remarks, whatever it selects."""
    names = ["a.weight", "a.bias", "b.weight", "scale", "empty"]
    params = {name: torch.zeros(2, 2, device="meta") for name in names}
    params["scale"] = torch.zeros((), device="meta")
    text = fo.explain(case.transform, params)
    assert text.startswith("stage ")
    assert "remark" not in text
    assert not re.search(" $", text, re.MULTILINE)


class ReadsInInit:
    """A user's plain class whose `init` looks at values."""

    scope = fo.Scope.PER_TENSOR

    def init(self, params):
        """Return the sums."""
        return {name: torch.tensor(float(p.sum())) for name, p in params.items()}

    def update(self, updates, state, params, *, context=None):
        """Return u."""
        return {n: u.clone() for n, u in updates.items()}, state


def test_an_init_that_reads_values() -> None:
    """What cannot run without values is run as it is, and the table says so."""
    params = small_gpt(device="cpu")
    text = lines(fo.chain(fo.ClipByGlobalNorm(1.0), ReadsInInit()), params)
    assert "ReadsInInit per tensor 36 B" in text
    assert text[-1].startswith("remark: init was run on the parameters as they")


def test_a_large_model() -> None:
    """No memory is taken for the parameters, nor for their state."""
    text = lines(fo.adam(), {"w": torch.zeros(2**17, 2**17, device="meta")})
    assert "parameters 1 tensor, 17,179,869,184 numbers, 64.0 GiB" in text
    assert "state 128.0 GiB, 2.00 x the parameters" in text


def test_what_a_user_tells_to_select() -> None:
    """A method `selections` of a user's transform is shown as ours are."""

    class Big(ReadsInInit):
        def selections(self, params: dict[str, Tensor]):
            return [("big ones", [n for n, p in params.items() if p.numel() > 9999])]

    text = lines(Big(), small_gpt(device="cpu"))
    assert any(line.startswith(" big ones -> 3 of 9 tensors, 88,") for line in text)


def test_no_parameters() -> None:
    """Nothing at all has a table too."""
    assert "parameters 0 tensors, 0 numbers, 0 B" in lines(fo.chain(), {})


def test_schedules_print_as_written() -> None:
    """A stage says its hyperparameters, schedules included."""
    text = lines(fo.sgd(schedules.linear(0.1, 0.0, 9)), small_gpt())
    assert "ScaleByLearningRate(linear(0.1, 0.0, 9)) elementwise 8 B" in text


def test_rules_that_do_not_fit_are_an_error() -> None:
    """A rule that matches nothing is the same error as at init."""
    with pytest.raises(ValueError, match="'typo' matches no parameter"):
        fo.explain(fo.adamw(mask="typo"), small_gpt())


def test_a_name_is_no_label() -> None:
    """What stands inside a name, or a mask, has no label of its own."""
    tx = fo.Named("inner", fo.Masked(fo.sgd(0.1), "*"))
    assert "inner: " not in fo.explain(tx, {"w": torch.zeros(2)})


# -- of an optimizer -----------------------------------------------------------------


def _optimizer(transform: fo.Transform) -> fo.TransformOptimizer:
    params = {
        "wide": torch.nn.Parameter(torch.zeros(1024, 1024)),
        "small": torch.nn.Parameter(torch.zeros(100)),
        "bias": torch.nn.Parameter(torch.zeros(28)),
        "half": torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16)),
    }
    return fo.TransformOptimizer(params.items(), transform)


def test_the_plan_of_an_optimizer() -> None:
    """The table of its transform, and what is updated together in how many units."""
    clipped = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(1e-3))
    optimizer = _optimizer(clipped)
    text = fo.explain(optimizer)
    plan = text[text.index("plan") :]
    assert plan.splitlines()[:3] == PLAN
    params = {n: p for p, n in optimizer._groups.names.items()}
    assert text.startswith(fo.explain(clipped, params))


PLAN = """\
plan        3 units of at most 4.0 MiB
  bucket 1  3 tensors, 1,048,704 numbers, float32 on cpu: 1 slice, 1 pool
  bucket 2  1 tensor, 64 numbers, bfloat16 on cpu: 1 slice\
""".splitlines()


def test_whole_tensors_are_told() -> None:
    """A transform that looks at whole tensors is not cut."""
    text = fo.explain(_optimizer(fo.chain(fo.Centralize(), fo.sgd(0.1))))
    assert "float32 on cpu: 2 groups" in text


def test_an_optimizer_has_its_own_parameters() -> None:
    """Parameters beside an optimizer, and a transform without, are told apart."""
    with pytest.raises(TypeError, match="params must be left out for an optimizer"):
        fo.explain(_optimizer(fo.sgd(0.1)), {"w": torch.zeros(1)})
    with pytest.raises(TypeError, match=r"explain\(tx, params\)"):
        fo.explain(fo.sgd(0.1))
