"""Names, observers and readings: what a pipeline has to tell, and how it is fetched."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from comparison import assert_same
from law_examples import example
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transform_cases import CASES

import functional_optim as fo
from functional_optim import schedules
from functional_optim.testing._compare import same_bits, tensors
from functional_optim.testing._law import run

PARAMS = {"a.weight": torch.tensor([[3.0, -4.0]]), "a.bias": torch.tensor([12.0])}


class CountTransfers(TorchDispatchMode):
    """Counts how often the host looks at a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count what reads a value, or copies."""
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "item", "equal", "is_nonzero"}:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


def stepped(tx: fo.Transform, grads: fo.TensorMap = PARAMS):
    """Return the state after one update."""
    return tx.update(grads, tx.init(PARAMS), PARAMS)[1]


# -- Named -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [case for case in CASES if "Named" not in repr(case)], ids=repr
)
def test_a_name_changes_nothing(case) -> None:
    """Updates and states are those of the transform inside, bit for bit."""
    data = example(contexts=case.contexts)
    named = fo.Named("x", case.transform)
    assert named.scope == case.transform.scope
    plain = run(case.transform, data)
    for before, after in zip(plain, run(named, data), strict=True):
        assert_same(before, after, "named")


def test_a_checkpoint_does_not_know_the_name() -> None:
    """A pipeline can be named, or renamed, between saving and loading."""
    old = fo.chain(fo.Trace(0.9))
    new = fo.chain(fo.Named("slow", fo.Trace(0.9)))
    saved = fo.state_dict(stepped(old))
    loaded = fo.load_state_dict(new.init(PARAMS), saved)
    assert_same(stepped(old), loaded, "loaded")


def test_a_name_resolves() -> None:
    """An executor sees the constants inside a name."""
    named = fo.Named("x", fo.Scale({"w": 2.0, "b": 3.0}))
    expected = fo.Named("x", fo.Scale(3.0))
    assert fo.resolve(named, "b", torch.zeros(1)) == expected


# -- Observe -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_default_is_the_norm_of_the_clip(dtype: torch.dtype) -> None:
    """`Observe("grad_norm")` has the bits of the clip and of torch."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 33), (17,), (), (0, 3)]
    grads = {
        str(i): torch.randn(shape, generator=generator).to(dtype)
        for i, shape in enumerate(shapes)
    }
    pipeline = fo.chain(fo.Observe("grad_norm"), fo.ClipByGlobalNorm(1.0))
    out, state = pipeline.update(grads, pipeline.init(grads), grads)
    told = fo.readings(pipeline, state)
    assert same_bits(told["grad_norm"], told["norm"])
    total = torch.nn.utils.get_total_norm(list(grads.values()))
    assert same_bits(told["grad_norm"], total.double())
    assert out.keys() == grads.keys()


@pytest.mark.parametrize(
    ("observe", "expected"),
    [
        (fo.Observe("x"), 13.0),
        (fo.Observe("x", op=fo.Norm(1.0)), 19.0),
        (fo.Observe("x", op=fo.Norm(math.inf)), 12.0),
        (fo.Observe("x", op="sum"), 11.0),
        (fo.Observe("x", op="max"), 12.0),
        (fo.Observe("x", lambda u, p: -u, op="max"), 4.0),
        (fo.Observe("x", lambda u, p: u == p, op="all"), 1.0),
        (fo.Observe("x", lambda u, p: u > 0, op="all"), 0.0),
        (fo.Observe("x", lambda u, p: u > 0, op="sum"), 2.0),
        (fo.Observe("x", lambda u, p: u > 0, op="max"), 1.0),
        (fo.Observe("x", lambda u, p: u > 0), math.sqrt(2.0)),
        (fo.Observe("x", lambda u, p: 2 * u.int(), op="sum"), 22.0),
        (fo.Observe("x", lambda u, p: 2 * p - u, op="sum"), 11.0),
    ],
    ids=repr,
)
def test_what_is_observed(observe: fo.Observe, expected: float) -> None:
    """Numbers are joined within tensors, then across."""
    value = stepped(observe).value
    assert (value.dtype, value.shape) == (torch.float64, ())
    assert value == expected


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("sum", 0.0),
        ("max", -math.inf),
        ("all", 1.0),
        (fo.Norm(2.0), 0.0),
        (fo.Norm(math.inf), 0.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_nothing_is_observed(op, expected: float, dtype: torch.dtype) -> None:
    """Tensors without elements change no total, and have the total of nothing."""
    observe = fo.Observe("x", lambda u, p: u.to(dtype), op=op)
    empty = {"e": torch.zeros(0, 2)}
    assert observe.update(empty, observe.init(empty), empty)[1].value == expected
    both = empty | {"w": torch.ones(2)}
    alone = {"w": torch.ones(2)}
    values = [observe.update(u, observe.init(u), u)[1].value for u in (both, alone)]
    assert values[0] == values[1]


def test_nans_are_counted_and_seen() -> None:
    """A NaN can be counted, and the largest of some numbers with a NaN is NaN."""
    bad = PARAMS | {"a.bias": torch.tensor([math.nan])}
    count = fo.Observe("nans", lambda u, p: u.isnan(), op="sum")
    largest = fo.Observe("largest", op="max")
    assert count.update(bad, count.init(PARAMS), PARAMS)[1].value == 1
    assert largest.update(bad, largest.init(PARAMS), PARAMS)[1].value.isnan()


def test_counts_beyond_float32() -> None:
    """Sums are in float64: 2**24 + 1 small numbers are all counted."""
    many = {"w": torch.ones(2**24, dtype=torch.float16), "v": torch.ones(1)}
    observe = fo.Observe("n", lambda u, p: u > 0, op="sum")
    assert observe.update(many, observe.init(many), many)[1].value == 2**24 + 1


def test_sums_are_exact_where_float32_is_not() -> None:
    """Within a tensor, too, numbers are added in float64."""
    numbers = {"w": torch.tensor([2.0**24, 1.0, 1.0, 1.0])}
    observe = fo.Observe("total", op="sum")
    _, state = observe.update(numbers, observe.init(numbers), numbers)
    assert state.value == 2**24 + 3


# -- readings ----------------------------------------------------------------------


def test_what_a_pipeline_tells() -> None:
    """Every transform tells under its name, with the names on the way."""
    tx = fo.chain(
        fo.Observe("grad_norm"),
        fo.Named(
            "guard",
            fo.SkipNonfinite(
                fo.Partition(
                    {
                        "matrix": fo.chain(fo.ClipByGlobalNorm(2.5), fo.sgd(0.5)),
                        "other": fo.Named("plain", fo.sgd(0.25)),
                    },
                    {"*.bias": "other", "*": "matrix"},
                )
            ),
        ),
    )
    assert fo.fetch(fo.readings(tx, stepped(tx))) == {
        "grad_norm": 13.0,
        "guard.skipped": 0.0,
        "guard.consecutive": 0.0,
        "guard.matrix.norm": 5.0,
        "guard.matrix.lr": 0.5,
        "guard.other.plain.lr": 0.25,
    }


def test_the_rate_is_that_of_the_next_update() -> None:
    """The reading before an update is what the update then uses."""
    tx = fo.sgd(schedules.linear(1.0, 0.0, 4))
    state = tx.init(PARAMS)
    for _ in range(5):
        rate = fo.readings(tx, state)["lr"]
        out, state = tx.update(PARAMS, state, PARAMS)
        assert out["a.bias"] == -rate.float() * 12.0


@pytest.mark.parametrize(
    ("lr", "told"),
    [
        (0.5, {"lr": 0.5}),
        (torch.tensor(0.5), {"lr": 0.5}),
        (schedules.constant(0.5), {"lr": 0.5}),
        ({"a.weight": 0.5, "a.bias": 0.1}, {}),
    ],
)
def test_rates_of_every_kind(lr, told: dict[str, float]) -> None:
    """A rate that differs by name is not one number, and is not told."""
    tx = fo.ScaleByLearningRate(lr)
    assert fo.fetch(fo.readings(tx, tx.init(PARAMS))) == told


@dataclasses.dataclass
class Loud:
    """A user's transform that tells what it is given."""

    told: object

    scope = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None):
        """Return u."""
        return {name: u.clone() for name, u in updates.items()}, state

    def readings(self, state):
        """Return what was given."""
        return self.told


class Twice:
    """A user's combinator: it tells what it is made of."""

    scope = fo.Scope.ELEMENTWISE

    def __init__(self, inner):
        self.inner = inner

    def init(self, params):
        """Return both states."""
        return self.inner.init(params), self.inner.init(params)

    def update(self, updates, state, params, *, context=fo.Context()):
        """Return inner(inner(u))."""
        first, second = state
        at = context.child("first"), context.child("second")
        updates, first = self.inner.update(updates, first, params, context=at[0])
        updates, second = self.inner.update(updates, second, params, context=at[1])
        return updates, (first, second)

    def children(self):
        """Return the same transform twice."""
        return {"first": self.inner, "second": self.inner}

    def with_children(self, children):
        """Return two runs of the first."""
        return Twice(children["first"])

    def split_state(self, state):
        """Return both states."""
        return dict(zip(("first", "second"), state, strict=True))


def test_users_transforms_tell_too() -> None:
    """A plain class with `readings` and a combinator take part."""
    tx = fo.chain(Twice(fo.ClipByGlobalNorm(6.5)), Loud({"level": 3}))
    told = fo.readings(tx, stepped(tx))
    expected = {"first.norm": 13.0, "second.norm": 6.5, "level": 3.0}
    assert fo.fetch(told) == pytest.approx(expected, rel=1e-6)  # of the clip
    assert fo.state_of(tx, stepped(tx), "second").norm == told["second.norm"]


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ([1.0], TypeError, "readings must return a dict by name, got"),
        ({"x": "1"}, TypeError, "reading 'x' of .* must be a 0-dim tensor or a number"),
        ({"x": torch.ones(2)}, ValueError, r"got shape \(2,\); for stacked states use"),
    ],
)
def test_wrong_readings_of_a_user(told, error, message: str) -> None:
    """What nobody could log is refused, and the transform is named."""
    with pytest.raises(error, match=message):
        fo.readings(Loud(told), ())


def test_two_readings_with_one_name() -> None:
    """Both transforms and the remedy are named; the remedy works."""
    first, second = fo.ClipByGlobalNorm(1.0), fo.ClipByGlobalNorm(2.0)
    tx = fo.chain(first, second)
    with pytest.raises(
        ValueError,
        match=r"name 'norm', of ClipByGlobalNorm\(1.0\) and of ClipByGlobalNorm\(2.0\)"
        r".*Named\(\"...\", ClipByGlobalNorm\(2.0\)\)",
    ):
        fo.readings(tx, tx.init(PARAMS))
    tx = fo.chain(first, fo.Named("second", second))
    assert list(fo.readings(tx, tx.init(PARAMS))) == ["norm", "second.norm"]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_telling_reads_nothing_on_the_host(case) -> None:
    """Readings of every transform are 0-dim tensors on the device of the state."""
    data = example(contexts=case.contexts)
    meta = {name: p.to("meta") for name, p in data.params.items()}
    state = case.transform.init(meta)
    held = [x for _, x in tensors(state)]
    with CountTransfers() as transfers:
        told = fo.readings(case.transform, state)
    assert not transfers.calls
    for value in told.values():
        assert value.ndim == 0
        assert value.device.type == ("meta" if held else "cpu")


def test_readings_under_vmap_and_compile() -> None:
    """An ensemble tells a number for each member; a compiled step tells too."""
    tx = fo.chain(fo.Observe("norm_before"), fo.adamw(schedules.linear(1.0, 0.0, 4)))
    members = {name: torch.stack([p, 2 * p]) for name, p in PARAMS.items()}

    def step(grads, params):
        _, state = tx.update(grads, tx.init(params), params)
        return fo.readings(tx, state)

    told = torch.func.vmap(step)(members, members)
    assert told["norm_before"].tolist() == [13.0, 26.0]
    assert told["lr"].tolist() == [0.75, 0.75]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(step(PARAMS, PARAMS), compiled(PARAMS, PARAMS), "compiled")


def test_a_skipped_step_keeps_what_was_observed_inside() -> None:
    """In front of the guard an observer sees the bad step, inside it does not."""
    inside = fo.SkipNonfinite(fo.chain(fo.Observe("inside"), fo.sgd(0.1)))
    tx = fo.chain(fo.Observe("front"), inside)
    bad = PARAMS | {"a.bias": torch.tensor([math.inf])}
    state = tx.update(bad, stepped(tx), PARAMS)[1]
    told = fo.fetch(fo.readings(tx, state))
    assert (told["front"], told["inside"], told["skipped"]) == (math.inf, 13.0, 1.0)


# -- fetch -------------------------------------------------------------------------


def test_fetch_makes_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many readings: one stack, one `tolist`, no look at single values."""
    told: dict[str, Tensor] = {str(i): torch.tensor(float(i)) for i in range(50)}
    told |= {"count": torch.tensor(3), "flag": torch.tensor(True)}
    lists = []
    tolist = Tensor.tolist
    monkeypatch.setattr(
        Tensor, "tolist", lambda self: lists.append(self.shape) or tolist(self)
    )
    with CountTransfers() as transfers:
        got = fo.fetch(told)
    assert not transfers.calls
    assert lists == [(52,)]
    with CountTransfers() as transfers:  # The slow way, to see that this can count.
        assert got == {name: float(value) for name, value in told.items()}
    assert len(transfers.calls) == 52
    assert got["49"] == 49.0
    assert (got["count"], got["flag"]) == (3.0, 1.0)
    assert all(type(value) is float for value in got.values())


def test_fetch_of_nothing() -> None:
    """A pipeline that tells nothing gives an empty dict, without a transfer."""
    assert fo.fetch(fo.readings(fo.Identity(), ())) == {}


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"x": torch.ones(2)}, ValueError, r"readings\['x'\] must be .* shape \(2,\)"),
        (
            {"x": 1.0},
            TypeError,
            r"readings\['x'\] must be a real 0-dim tensor, got 1.0",
        ),
        ({"x": torch.tensor(1j)}, TypeError, "got torch.complex64"),
        ([torch.ones(())], TypeError, "readings must be a map from name to tensor"),
    ],
)
def test_fetch_refuses(told, error, message: str) -> None:
    """What is no 0-dim tensor is refused by name."""
    with pytest.raises(error, match=message):
        fo.fetch(told)


# -- state_of ----------------------------------------------------------------------


def nested() -> fo.Transform:
    """Return a pipeline with names at several depths."""
    return fo.chain(
        fo.Named("first", fo.Trace(0.5)),
        fo.SkipNonfinite(
            fo.Partition(
                {
                    "x": fo.Named("direction", fo.ScaleByAdam()),
                    "y": fo.chain(fo.Named("direction", fo.Trace(0.9))),
                },
                {"*.bias": "x", "*": "y"},
            )
        ),
    )


def test_state_by_name() -> None:
    """Names and labels are found at any depth, alone or with those on the way."""
    tx = nested()
    state = stepped(tx)
    assert fo.state_of(tx, state, "first") is state[0]
    assert fo.state_of(tx, state, "y") is state[1].inner[1]
    assert fo.state_of(tx, state, "x.direction") is state[1].inner[0]
    assert list(fo.state_of(tx, state, "x.direction").exp_avg) == ["a.bias"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "typo",
            r"no part has the name 'typo'; the names are \['first', 'x', 'x.dir",
        ),
        ("direction", "2 parts have the name 'direction'.* the names on the way too"),
        ("", "no part has the name ''"),
    ],
)
def test_state_of_no_name(name: str, message: str) -> None:
    """Unknown and repeated names are refused, and the known ones listed."""
    tx = nested()
    with pytest.raises(ValueError, match=message):
        fo.state_of(tx, tx.init(PARAMS), name)


@pytest.mark.parametrize("look", [fo.readings, lambda tx, s: fo.state_of(tx, s, "x")])
@pytest.mark.parametrize(
    "tx",
    [
        fo.chain(fo.Scale(1.0)),
        fo.Partition({"y": fo.Scale(1.0)}, "y"),
        fo.SkipNonfinite(fo.Scale(1.0)),
    ],
    ids=repr,
)
def test_state_of_another_transform(look, tx: fo.Transform) -> None:
    """Looking into a state that is not the transform's is refused."""
    with pytest.raises(ValueError, match="make it with this transform's init"):
        look(tx, fo.Trace(0.9).init(PARAMS))
