"""Inside torch.func and autograd: hypergradients, ensembles, no leaks."""

from __future__ import annotations

import pytest
import torch

import functional_optim as fo

# What forward mode and Inductor import warns of what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PARAMS = {
    "w": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64),
    "b": torch.tensor(0.3, dtype=torch.float64),
}


def _loss(params: fo.TensorMap) -> torch.Tensor:
    return ((params["w"] * params["b"]).exp().sum() - 1.0) ** 2


def _trained(hyper: torch.Tensor, make, *, differentiable: bool) -> torch.Tensor:
    """Return the loss after three steps with a hyperparameter."""
    pipeline = make(hyper)
    params, state = PARAMS, pipeline.init(PARAMS)
    context = fo.Context(differentiable=differentiable)
    for _ in range(3):
        grads = torch.func.grad(_loss)(params)
        updates, state = pipeline.update(grads, state, params, context=context)
        params = fo.apply_updates(params, updates, differentiable=differentiable)
    return _loss(params)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda h: fo.sgd(h, momentum=0.9), 0.01),
        (lambda h: fo.sgd(0.01, momentum=h), 0.5),
        (lambda h: fo.sgd(0.01, momentum=0.5, dampening=h), 0.2),
        (lambda h: fo.adamw(h), 0.01),
        (lambda h: fo.adamw(0.01, weight_decay=h), 0.1),
        (lambda h: fo.adamw(0.01, betas=(h, 0.99)), 0.8),
        (lambda h: fo.adamw(0.01, betas=(0.8, h)), 0.9),
        (lambda h: fo.adamw(0.01, eps=h), 1e-3),
        (lambda h: fo.chain(fo.ClipByGlobalNorm(h), fo.sgd(0.1)), 0.5),
        (lambda h: fo.chain(fo.ClipByNorm(h), fo.sgd(0.1)), 0.5),
        (lambda h: fo.chain(fo.MultiplyParamwise({"b": h}), fo.sgd(0.01)), 0.5),
        (lambda h: fo.chain(fo.SkipNonfinite(fo.adamw(h))), 0.01),
    ],
    ids=[
        "sgd lr",
        "momentum",
        "dampening",
        "adamw lr",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "max_norm",
        "max_norm of each tensor",
        "multiplier",
        "guarded lr",
    ],
)
@pytest.mark.parametrize("way", ["torch.func", "backward"])
def test_hypergradients(make, value: float, way: str) -> None:
    """Derivatives with respect to hyperparameters are those of finite differences."""
    h = torch.tensor(value, dtype=torch.float64)
    if way == "torch.func":
        slope = torch.func.grad(lambda x: _trained(x, make, differentiable=False))(h)
    else:
        leaf = h.clone().requires_grad_()
        _trained(leaf, make, differentiable=True).backward()
        slope = leaf.grad
    step = 1e-6 * value
    after = _trained(h + step, make, differentiable=False)
    before = _trained(h - step, make, differentiable=False)
    # Central differences: truncation (1e-6)^2 relative, rounding 1e-16 / 1e-6.
    assert torch.allclose(slope, (after - before) / (2 * step), rtol=1e-5, atol=1e-8)
    assert slope != 0


def _after_three_steps(lr: torch.Tensor, make) -> torch.Tensor:
    """Return a number after three steps in which one gradient is 0."""
    params = {"w": torch.tensor([1.0, 2.0]).double(), "dead": torch.ones(1).double()}
    pipeline = make(lr)
    state = pipeline.init(params)
    context = fo.Context(differentiable=True)
    for _ in range(3):
        grads = {"w": 2 * params["w"], "dead": 0 * params["dead"]}  # A ReLU at rest.
        updates, state = pipeline.update(grads, state, params, context=context)
        params = fo.apply_updates(params, updates, differentiable=True)
    return sum((p**2).sum() for p in params.values())


@pytest.mark.parametrize(
    "make",
    [
        fo.adam,
        fo.adamw,
        lambda lr: fo.adam(lr, weight_decay=0.1, amsgrad=True),
        lambda lr: fo.SkipNonfinite(fo.adamw(lr)),
        lambda lr: fo.adamw(lr, eps_root=1e-16),
        lambda lr: fo.adamw(lr, eps_root=torch.tensor(1e-16).double()),
        lambda lr: fo.SkipNonfinite(fo.adamw(lr, eps_root=lambda step: 1e-16)),
        lambda lr: fo.adamw(lr, eps_root={"w": 0.0, "dead": 1e-16}),
    ],
    ids=[
        "adam",
        "adamw",
        "amsgrad",
        "guarded",
        "eps_root",
        "tensor",
        "guarded schedule",
        "by name",
    ],
)
@pytest.mark.parametrize("way", ["torch.func", "backward"])
def test_meta_gradients_where_a_gradient_is_0(make, way: str) -> None:
    """The derivative through Adam is finite there, and that of differences."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    if way == "torch.func":
        slope = torch.func.grad(_after_three_steps)(lr, make)
    else:
        leaf = lr.clone().requires_grad_()
        _after_three_steps(leaf, make).backward()
        slope = leaf.grad
    after, before = (
        _after_three_steps(lr + 1e-6, make),
        _after_three_steps(lr - 1e-6, make),
    )
    assert torch.allclose(slope, (after - before) / 2e-6, rtol=1e-7)


class PlainRms:
    """A user's u <- u / sqrt(v), in plain torch: its root has no derivative at 0."""

    scope = fo.Scope.ELEMENTWISE

    def __init__(self, decay) -> None:
        self.decay = decay

    def init(self, params):
        """Return v = 0."""
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(self, updates, state, params, *, context=None):
        """Return u / (sqrt(v) + 1e-8)."""
        v = {
            name: self.decay * state[name] + (1 - self.decay) * u.square()
            for name, u in updates.items()
        }
        return {n: u / (v[n].sqrt() + 1e-8) for n, u in updates.items()}, state | v


@pytest.mark.parametrize("grad_mode", [False, True])
@pytest.mark.parametrize("way", ["jvp", "jacfwd", "dual_level"])
def test_forward_mode_needs_no_grad_mode(way: str, grad_mode: bool) -> None:
    """Forward derivatives through Adam are finite where a gradient is 0."""

    def after(lr: torch.Tensor) -> torch.Tensor:
        params = {"w": torch.ones(2).double()}
        pipeline = fo.adam(lr)
        state = pipeline.init(params)
        for _ in range(2):
            grads = {"w": torch.tensor([1.0, 0.0]).double() * params["w"]}
            updates, state = pipeline.update(grads, state, params)
            params = fo.apply_updates(params, updates)
        return params["w"].sum()

    lr = torch.tensor(0.1, dtype=torch.float64)
    with torch.set_grad_enabled(grad_mode):
        if way == "jvp":
            slope = torch.func.jvp(after, (lr,), (torch.ones_like(lr),))[1]
        elif way == "jacfwd":
            slope = torch.func.jacfwd(after)(lr)
        else:
            forward_ad = torch.autograd.forward_ad
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(lr, torch.ones_like(lr))
                slope = forward_ad.unpack_dual(after(dual)).tangent
    expected = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    assert torch.allclose(slope, expected, rtol=1e-7)


SKIPPED = [(True, False, False), (False, True, False), (True, True, False)]


@pytest.mark.parametrize("skipped", SKIPPED, ids=str)
@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda h: fo.adamw(0.1, betas=(0.8, h)), 0.9),
        (lambda h: fo.adamw(0.1, betas=(h, 0.9)), 0.8),
        (lambda h: fo.adam(0.1, betas=(0.8, h), amsgrad=True), 0.9),
        (lambda h: fo.adamw(h, betas=(0.8, 0.9)), 0.1),
        (lambda h: fo.adamw(0.1, betas=(0.8, 0.9), eps=h), 1e-3),
        (lambda h: fo.chain(fo.ClipByGlobalNorm(h), fo.adamw(0.1)), 0.5),
        (lambda h: fo.chain(fo.ClipByNorm(h), fo.sgd(0.1, momentum=0.9)), 0.5),
        (lambda h: fo.chain(PlainRms(h), fo.sgd(0.1)), 0.9),
    ],
    ids=[
        "beta2",
        "beta1",
        "amsgrad",
        "lr",
        "eps",
        "max_norm",
        "of each tensor",
        "a user's rule",
    ],
)
def test_a_skipped_step_has_a_derivative(make, value: float, skipped) -> None:
    """A step that is skipped depends on no hyperparameter, whenever it comes."""
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def after(h: torch.Tensor, context: fo.Context | None = None) -> torch.Tensor:
        params, pipeline = {"w": start}, fo.SkipNonfinite(make(h))
        state = pipeline.init(params)
        for skip in skipped:
            bad = torch.tensor([float("nan"), float("inf")]).double()
            grads = {"w": bad if skip else 2 * params["w"]}
            updates, state = pipeline.update(grads, state, params, context=context)
            params = fo.apply_updates(
                params, updates, differentiable=context is not None
            )
        return params["w"].sum()

    h = torch.tensor(value, dtype=torch.float64)
    difference = (after(h + 1e-6) - after(h - 1e-6)) / 2e-6
    slope = torch.func.grad(after)(h)
    leaf = h.clone().requires_grad_()
    after(leaf, fo.Context(differentiable=True)).backward()
    # Central differences leave (1e-6)^2 and 1e-16 / 1e-6.
    assert torch.allclose(slope, difference, rtol=1e-6, atol=1e-9)
    assert torch.allclose(leaf.grad, difference, rtol=1e-6, atol=1e-9)


def test_presets_have_eps_root() -> None:
    """It is that of ScaleByAdam, in optimizers and configs, too; 0 changes nothing."""
    assert fo.adam(0.1, eps_root=1e-8)[0] == fo.ScaleByAdam(eps_root=1e-8)
    assert fo.adamw(0.1, eps_root=1e-8)[0] == fo.ScaleByAdam(eps_root=1e-8)
    assert fo.adamw(0.1, eps_root=0.0) == fo.adamw(0.1)
    with pytest.raises(ValueError, match="eps_root must be finite and >= 0, got -1"):
        fo.adamw(0.1, eps_root=-1.0)
    model = torch.nn.Linear(1, 1)
    config = {"optimizer": {"type": "fo.adamw", "lr": 0.1, "eps_root": 1e-8}}
    optimizer = fo.build_optim_wrapper(model, config).optimizer
    assert optimizer.param_groups[0]["eps_root"] == 1e-8


def test_ensemble_with_a_learning_rate_each() -> None:
    """vmap with a hyperparameter for each member equals the loop over members."""
    lrs = torch.tensor([0.1, 0.01, 0.001], dtype=torch.float64)
    stacked = {name: torch.stack([p, 2 * p, -p]) for name, p in PARAMS.items()}

    def step(lr, params, state):
        grads = torch.func.grad(_loss)(params)
        updates, state = fo.adamw(lr).update(grads, state, params)
        return fo.apply_updates(params, updates), state

    state = torch.func.vmap(fo.adamw().init)(stacked)
    together = stacked
    for _ in range(3):
        together, state = torch.func.vmap(step)(lrs, together, state)
    for index, lr in enumerate(lrs):
        params = {name: p[index] for name, p in stacked.items()}
        alone = fo.adamw().init(params)
        for _ in range(3):
            params, alone = step(lr, params, alone)
        for name in params:
            # The same operations; sums in exp() may differ in order.
            assert torch.allclose(together[name][index], params[name], rtol=1e-12)


def test_a_long_loop_keeps_no_graph() -> None:
    """Nothing that a step hands to the next one holds on to a graph."""
    model = torch.nn.Linear(3, 1)
    pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.adamw(0.1))
    params = dict(model.named_parameters())
    state = pipeline.init(params)
    for _ in range(20):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        out = torch.func.functional_call(model, leaves, torch.ones(2, 3))
        grads = dict(
            zip(leaves, torch.autograd.grad(out.sum(), leaves.values()), strict=True)
        )
        updates, state = pipeline.update(grads, state, leaves)
        params = fo.apply_updates(leaves, updates)
        kept = torch.utils._pytree.tree_leaves((params, updates, state))
        assert not any(x.requires_grad or x.grad_fn for x in kept)


def _ensemble() -> tuple[torch.nn.Module, fo.TensorMap, torch.Tensor]:
    """Return a model, the stacked parameters of three, and inputs for each."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 4).double() for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    return models[0], params, torch.randn(3, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("applied", ["inside", "outside"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_ensemble_of_leaves_keeps_no_graph(applied: str, compiled: bool) -> None:
    """Stacked modules, which require gradients, train under vmap without a graph."""
    model, params, inputs = _ensemble()
    assert all(p.requires_grad for p in params.values())  # What torch's call returns.
    pipeline = fo.chain(
        fo.Accumulate(2), fo.SkipNonfinite(fo.chain(fo.ClipByNorm(1.0), fo.adamw(0.1)))
    )

    def update(params, state, x):
        def loss(p):
            return torch.func.functional_call(model, p, (x,)).pow(2).mean()

        updates, state = pipeline.update(torch.func.grad(loss)(params), state, params)
        if applied == "inside":
            return updates, state, fo.apply_updates(params, updates)
        return updates, state, params

    step = torch.func.vmap(update)
    if compiled:
        torch.compiler.reset()
        step = torch.compile(step, fullgraph=True, backend="aot_eager")
    start, state = params, torch.func.vmap(pipeline.init)(params)
    for _ in range(4):
        updates, state, new = step(params, state, inputs)
        if applied == "outside":
            new = fo.apply_updates(params, updates)
        if updates:  # While a window is open the parameters are the very same tensors.
            params = new
            kept = torch.utils._pytree.tree_leaves((params, updates, state))
            assert not any(x.requires_grad or x.grad_fn for x in kept)
    assert params["weight"].ne(start["weight"]).all()


def _after_two_steps(lr: torch.Tensor, p: torch.Tensor, *, batched: bool):
    """Return parameters after two steps, of each row by itself if batched."""

    def trained(p: torch.Tensor) -> torch.Tensor:
        params = {"w": p}
        pipeline = fo.chain(fo.ClipByGlobalNorm(1.0), fo.sgd(lr, momentum=0.9))
        state = pipeline.init(params)
        for _ in range(2):
            grads = {"w": params["w"] ** 3}
            updates, state = pipeline.update(grads, state, params)
            params = fo.apply_updates(params, updates)
        return params["w"]

    return torch.func.vmap(trained)(p) if batched else trained(p)


DERIVATIVES = {
    "vmap in grad": lambda f, lr: torch.func.grad(lambda x: f(x).sum())(lr),
    "vmap in jvp": lambda f, lr: torch.func.jvp(f, (lr,), (torch.ones_like(lr),))[1],
    "vmap in jacrev": lambda f, lr: torch.func.jacrev(f)(lr),
    "vmap in jacfwd": lambda f, lr: torch.func.jacfwd(f)(lr),
    "vmap in vjp": lambda f, lr: torch.func.vjp(f, lr)[1](torch.ones(2, 3).double()),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", DERIVATIVES)
def test_derivatives_of_an_ensemble(kind: str, compiled: bool) -> None:
    """Every derivative of torch.func sees through vmap, as differences do."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    rows = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.1, -0.2]], dtype=torch.float64)

    def after(lr: torch.Tensor) -> torch.Tensor:
        return _after_two_steps(lr, rows, batched=True)

    def derivative(lr: torch.Tensor) -> torch.Tensor:
        return DERIVATIVES[kind](after, lr)

    if compiled:
        torch.compiler.reset()
        derivative = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    got = derivative(lr)
    got = got[0] if isinstance(got, tuple) else got
    slope = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    expected = slope.sum() if got.ndim == 0 else slope
    assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert got.abs().max() > 1e-3


def test_grad_in_vmap() -> None:
    """Each member of a batch has the derivative that it has alone."""
    rows = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.1, -0.2]], dtype=torch.float64)
    lrs = torch.tensor([0.1, 0.02], dtype=torch.float64)

    def total(lr: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return _after_two_steps(lr, p, batched=False).sum()

    slopes = torch.func.vmap(torch.func.grad(total))(lrs, rows)
    for slope, lr, p in zip(slopes, lrs, rows, strict=True):
        difference = (total(lr + 1e-6, p) - total(lr - 1e-6, p)) / 2e-6
        assert torch.allclose(slope, difference, rtol=1e-6)


def test_hessian_of_an_ensemble() -> None:
    """The second derivative through vmap is the difference of the first."""
    lr = torch.tensor(0.1, dtype=torch.float64)
    rows = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.1, -0.2]], dtype=torch.float64)

    def total(lr: torch.Tensor) -> torch.Tensor:
        return _after_two_steps(lr, rows, batched=True).pow(2).sum()

    slope = torch.func.grad(total)
    difference = (slope(lr + 1e-6) - slope(lr - 1e-6)) / 2e-6
    assert torch.allclose(torch.func.hessian(total)(lr), difference, rtol=1e-6)


def test_a_graph_that_is_asked_for_in_an_ensemble() -> None:
    """With differentiable=True autograd sees through vmap, too."""
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[0.5, -1.0, 2.0], [1.5, 0.1, -0.2]], dtype=torch.float64)

    def stepped(p: torch.Tensor) -> torch.Tensor:
        pipeline = fo.sgd(lr)
        context = fo.Context(differentiable=True)
        params = {"w": p}
        updates, _ = pipeline.update(
            {"w": p**3}, pipeline.init(params), params, context=context
        )
        return fo.apply_updates(params, updates, differentiable=True)["w"]

    torch.func.vmap(stepped)(rows).sum().backward()
    assert torch.allclose(lr.grad, -(rows**3).sum(), rtol=1e-12)


class ByLoss:
    """A user's transform: u <- loss * u."""

    scope = fo.Scope.ELEMENTWISE

    def init(self, params):
        """Return the empty state."""
        return ()

    def update(self, updates, state, params, *, context=None):
        """Return loss * u."""
        return {name: context.loss * u for name, u in updates.items()}, state


@pytest.mark.parametrize("kind", [int, float, torch.tensor])
@pytest.mark.parametrize("made", ["outside", "inside"])
def test_numbers_of_the_context_do_not_recompile(kind, made: str) -> None:
    """Ten different weights and losses are one graph for each place in a window."""
    pipeline = fo.chain(fo.Accumulate(2), ByLoss(), fo.sgd(0.1))
    grads = {"w": torch.ones(3, dtype=torch.float64)}

    def told(number) -> fo.Context:
        return fo.Context(weight=number, loss=number)

    def inside(state, number):
        return pipeline.update(grads, state, grads, context=told(number))

    def outside(state, context):
        return pipeline.update(grads, state, grads, context=context)

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    function = inside if made == "inside" else outside
    step = torch.compile(function, fullgraph=True, backend="aot_eager")
    state = eager = pipeline.init(grads)
    for tokens in (100, 80, 120, 60, 90, 70, 110, 50, 40, 30):
        number = kind(tokens)
        given = number if made == "inside" else told(number)
        got, state = step(state, given)
        expected, eager = function(eager, given)
        assert got.keys() == expected.keys()
        if got:
            assert torch.allclose(got["w"], expected["w"], rtol=1e-12)
            assert torch.allclose(got["w"], torch.tensor(-0.1 * tokens).double())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_inductor_compiles_the_whole_training_step() -> None:
    """Gradient, clip, AdamW and apply in one graph equal eager, schedule included."""
    pipeline = fo.chain(
        fo.ClipByGlobalNorm(1.0), fo.adamw(fo.schedules.linear(0.1, 0.0, 9))
    )

    def step(params, state):
        grads, loss = torch.func.grad_and_value(_loss)(params)
        updates, state = pipeline.update(grads, state, params)
        return fo.apply_updates(params, updates), state, loss

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True)
    eager, eager_state = PARAMS, pipeline.init(PARAMS)
    fast, fast_state = PARAMS, pipeline.init(PARAMS)
    for _ in range(6):
        eager, eager_state, loss = step(eager, eager_state)
        fast, fast_state, fast_loss = compiled(fast, fast_state)
        # Six steps of float64; Inductor contracts nothing but orders sums anew.
        assert torch.allclose(loss, fast_loss, rtol=1e-10)
    for name, p in eager.items():
        assert torch.allclose(p, fast[name], rtol=1e-10)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
