"""Hypergradients against brute force, the closed form for sample weights, and what must stay untouched."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.unroll import Parameters, hypergradient, linear_loss, stateless, trainable
from limbeck.core.errors import InputError, UnknownNameError

LR = 0.3


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Problem:
    """A small network whose samples are weighed by a controller, in float64; smooth, so that differences converge."""

    def __init__(self, norm: bool = False) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.Tanh(), nn.Linear(6, 3)]
        self.model = nn.Sequential(*layers).double()
        self.controller = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.x, self.y = torch.randn(12, 5).double(), torch.arange(12) % 3
        self.soft = torch.softmax(2 * torch.randn(12, 3).double(), -1)
        self.x_val, self.y_val = torch.randn(9, 5).double(), torch.arange(9) % 3
        self.features = torch.randn(12, 3).double()
        self.theta, self.omega = trainable(self.model), trainable(self.controller)
        self.run, self.weigh = stateless(self.model), stateless(self.controller)

    def rows(self, theta: Parameters) -> tuple[Tensor, Tensor]:
        z = self.run(theta, self.x)
        kd = F.kl_div(F.log_softmax(z, -1), self.soft, reduction="none").sum(-1)
        return kd, F.cross_entropy(z, self.y, reduction="none")

    def inner(self, theta: Parameters, omega: Parameters) -> Tensor:
        alpha = torch.sigmoid(self.weigh(omega, self.features)).squeeze(-1)
        kd, ce = self.rows(theta)
        return (alpha * kd + (1 - alpha) * ce).mean()

    def outer(self, theta: Parameters) -> Tensor:
        return F.cross_entropy(self.run(theta, self.x_val), self.y_val)

    def after_a_step(self, omega: Parameters) -> Tensor:
        """J_out(theta'(omega)) by plain autograd, without graph."""
        theta = {k: v.detach().requires_grad_() for k, v in self.theta.items()}
        grads = torch.autograd.grad(self.inner(theta, omega), list(theta.values()))
        with torch.no_grad():
            return self.outer({k: v - LR * g for (k, v), g in zip(theta.items(), grads, strict=True)})


def relative(found: Parameters, expected: Parameters) -> float:
    a = torch.cat([found[k].flatten() for k in expected])
    b = torch.cat([v.flatten() for v in expected.values()])
    return float((a - b).norm() / b.norm())


def brute_force(problem: Problem, step: float = 1e-5) -> dict[str, Tensor]:
    found = {}
    for name, w in problem.omega.items():
        slope = torch.zeros_like(w).flatten()
        for i in range(w.numel()):
            ends = []
            for sign in (1, -1):
                moved = w.detach().clone()
                moved.view(-1)[i] += sign * step
                ends.append(problem.after_a_step({**problem.omega, name: moved}))
            slope[i] = (ends[0] - ends[1]) / (2 * step)
        found[name] = slope.view_as(w).detach()
    return found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_one_step_equals_brute_force_differences(form, norm):
    problem = Problem(norm)
    expected = brute_force(problem)
    found = hypergradient(problem.inner, problem.outer, problem.theta, problem.omega, LR, form=form, eps=1e-4)
    assert relative(found.gradient, expected) < (1e-6 if form == "exact" else 1e-3)
    assert float(found.outer) == pytest.approx(float(problem.after_a_step(problem.omega)), rel=1e-9)
    assert float(found.inner) == pytest.approx(float(problem.inner(problem.theta, problem.omega).detach()), rel=1e-9)
    assert not any(g.requires_grad for g in found.gradient.values())


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
def test_sample_weights_follow_the_alignment_of_their_gradients(form):
    """d J_out / d alpha_n = - eta/B <grad J_out(theta'), grad (KL_n - CE_n)>, computed sample by sample here."""
    problem = Problem()
    alpha = torch.linspace(0.1, 0.9, 12).double()

    def inner(theta: Parameters, omega: Parameters) -> Tensor:
        kd, ce = problem.rows(theta)
        return (omega["alpha"] * kd + (1 - omega["alpha"]) * ce).mean()

    theta = {k: v.detach().requires_grad_() for k, v in problem.theta.items()}
    grads = torch.autograd.grad(inner(theta, {"alpha": alpha}), list(theta.values()))
    after = {k: (v - LR * g).detach().requires_grad_() for (k, v), g in zip(theta.items(), grads, strict=True)}
    direction = torch.cat([g.flatten() for g in torch.autograd.grad(problem.outer(after), list(after.values()))])
    kd, ce = problem.rows(theta)
    expected = torch.stack(
        [
            -LR
            / 12
            * torch.cat([g.flatten() for g in torch.autograd.grad(d, list(theta.values()), retain_graph=True)])
            @ direction
            for d in kd - ce
        ]
    )
    found = hypergradient(inner, problem.outer, problem.theta, {"alpha": alpha}, LR, form=form, eps=1e-4)
    torch.testing.assert_close(found.gradient["alpha"], expected, rtol=1e-4, atol=1e-9)


def quadratic():
    """J_in = 1/2 |A theta - omega|², J_out = 1/2 |theta - t|²: every product is a matrix that can be written down."""
    torch.manual_seed(1)
    a = torch.randn(4, 3).double()
    theta, omega, t = torch.randn(3).double(), torch.randn(4).double(), torch.randn(3).double()

    def inner(p: Parameters, w: Parameters) -> Tensor:
        return 0.5 * (a @ p["theta"] - w["omega"]).square().sum()

    def outer(p: Parameters) -> Tensor:
        return 0.5 * (p["theta"] - t).square().sum()

    return a, theta, omega, t, inner, outer


@pytest.mark.parametrize("form", ["exact", "finite_difference"])
@pytest.mark.parametrize("terms", [0, 3, 400])
def test_neumann_equals_the_matrix_series_and_tends_to_the_inverse_hessian(form, terms):
    a, theta, omega, t, inner, outer = quadratic()
    hessian, mixed, lr = a.T @ a, -a.T, 0.1  # mixed: d²J_in / d theta d omega
    series = lr * sum(torch.linalg.matrix_power(torch.eye(3).double() - lr * hessian, k) for k in range(terms + 1))
    expected = -mixed.T @ (series @ (theta - t))
    found = hypergradient(
        inner, outer, {"theta": theta}, {"omega": omega}, lr, solver="neumann", form=form, terms=terms, eps=1e-3
    )
    torch.testing.assert_close(found.gradient["omega"], expected, rtol=1e-6, atol=1e-9)
    if terms == 400:
        torch.testing.assert_close(
            found.gradient["omega"], -mixed.T @ torch.linalg.solve(hessian, theta - t), rtol=1e-3, atol=1e-6
        )


def test_t1t2_takes_the_inverse_hessian_as_identity_at_the_present_point():
    a, theta, omega, t, inner, outer = quadratic()
    found = hypergradient(inner, outer, {"theta": theta}, {"omega": omega}, 0.1, solver="t1t2", form="exact")
    torch.testing.assert_close(found.gradient["omega"], a @ (theta - t))
    assert float(found.outer) == pytest.approx(float(outer({"theta": theta})))


def test_nothing_that_belongs_to_the_models_moves():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    scale = nn.Parameter(torch.zeros(8))
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = stateless(model)
    state = torch.get_rng_state()

    def inner(theta: Parameters, omega: Parameters) -> Tensor:
        return (torch.sigmoid(omega["scale"]) * F.cross_entropy(run(theta, x), y, reduction="none")).mean()

    def outer(theta: Parameters) -> Tensor:
        return F.cross_entropy(run(theta, x), y)

    for form in ("exact", "finite_difference"):
        found = hypergradient(inner, outer, trainable(model), {"scale": scale}, 0.1, form=form)
        assert float(found.gradient["scale"].abs().sum()) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and scale.grad is None and model.training


def test_dropout_masks_are_the_same_in_all_passes():
    """With other masks ahead and behind, the difference quotient would be noise divided by eps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3)).double()
    x, y, run = torch.randn(8, 5).double(), torch.arange(8) % 3, stateless(model)
    omega = {"w": torch.zeros(8).double()}

    def inner(theta: Parameters, omega: Parameters) -> Tensor:
        return (torch.sigmoid(omega["w"]) * F.cross_entropy(run(theta, x), y, reduction="none")).mean()

    def outer(theta: Parameters) -> Tensor:
        return F.cross_entropy(run(theta, x), y)

    exact, near = (
        hypergradient(inner, outer, trainable(model), omega, 0.1, form=form, eps=1e-4).gradient
        for form in ("exact", "finite_difference")
    )
    assert relative(near, exact) < 1e-5


def saved_bytes(form: str, depth: int) -> int:
    """Bytes that autograd saves for backward passes while one hypergradient is computed."""
    torch.manual_seed(0)
    sizes = [8, *[32] * depth, 3]
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers)
    x, y, run = torch.randn(64, 8), torch.arange(64) % 3, stateless(model)
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    def inner(theta: Parameters, omega: Parameters) -> Tensor:
        return (omega["w"] * F.cross_entropy(run(theta, x), y, reduction="none")).mean()

    def outer(theta: Parameters) -> Tensor:
        return F.cross_entropy(run(theta, x), y)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hypergradient(inner, outer, trainable(model), {"w": torch.ones(64)}, 0.1, form=form)
    return total


def test_finite_differences_keep_two_first_order_graphs_and_no_more():
    """One for the inner gradient and one for the outer; the two passes ahead and behind keep next to nothing."""
    torch.manual_seed(0)
    sizes = [8, *[32] * 6, 3]
    model = nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())])
    once = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal once
        once += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.cross_entropy(model(torch.randn(64, 8)), torch.arange(64) % 3).backward()
    cheap = saved_bytes("finite_difference", 6)
    assert cheap < 2.2 * once
    assert saved_bytes("exact", 6) > 1.5 * cheap


def test_a_linear_loss_has_the_given_gradient():
    model = nn.Linear(3, 2)
    gradient = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    linear_loss(dict(model.named_parameters()), gradient).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name])


def test_only_what_is_trainable_is_unrolled_and_the_last_layer_alone_on_request():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    assert set(trainable(model)) == {"0.weight", "2.weight", "2.bias"}
    assert set(trainable(model, last_layer=True)) == {"2.weight", "2.bias"}
    out = stateless(model)(trainable(model, last_layer=True), torch.randn(2, 3))
    out.sum().backward()
    assert model[2].weight.grad is not None and model[0].weight.grad is None


def test_inputs_may_be_tuples_and_mappings():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.w * (a + 2 * b)

    run, a, b = stateless(Sum()), torch.ones(2), torch.ones(2)
    for inputs in ((a, b), {"b": b, "a": a}):
        assert run({"w": torch.tensor(3.0)}, inputs).tolist() == [9.0, 9.0]


def test_outer_parameters_that_do_not_matter_get_zero():
    a, theta, omega, _, inner, outer = quadratic()
    for form in ("exact", "finite_difference"):
        found = hypergradient(
            inner, outer, {"theta": theta}, {"omega": omega, "idle": torch.ones(2).double()}, 0.1, form=form
        )
        assert found.gradient["idle"].tolist() == [0, 0]
        nothing = hypergradient(
            lambda p, w: 0.5 * (a @ p["theta"]).square().sum(),
            outer,
            {"theta": theta},
            {"omega": omega},
            0.1,
            form=form,
        )
        assert nothing.gradient["omega"].abs().max() == 0


def test_at_the_minimum_of_the_outer_loss_the_gradient_is_zero_and_finite():
    a, _, omega, t, inner, outer = quadratic()
    for form in ("exact", "finite_difference"):
        found = hypergradient(inner, outer, {"theta": t}, {"omega": omega}, 0.1, solver="t1t2", form=form)
        assert float(found.gradient["omega"].abs().max()) == 0
        assert math.isfinite(float(found.inner)) and a.shape == (4, 3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lr": 0.0}, "lr > 0"),
        ({"eps": -1.0}, "eps > 0"),
        ({"terms": -1}, "terms >= 0"),
        ({"theta": {}}, "no inner parameters"),
        ({"omega": {}}, "no outer parameters"),
        ({"inner": lambda p, w: p["theta"] * w["omega"].sum()}, r"inner loss has shape \(3,\).*scalar"),
        ({"outer": lambda p: p["theta"]}, "outer loss has shape"),
        ({"outer": lambda p: torch.zeros(())}, "does not depend on the inner parameters"),
    ],
)
def test_bad_input_is_one_line(changes, line):
    _, theta, omega, _, inner, outer = quadratic()
    given = {"inner": inner, "outer": outer, "theta": {"theta": theta}, "omega": {"omega": omega}, "lr": 0.1, **changes}
    with pytest.raises(InputError, match=line):
        hypergradient(**given)


def test_unknown_names_propose_known_ones():
    _, theta, omega, _, inner, outer = quadratic()
    with pytest.raises(UnknownNameError, match="did you mean neumann"):
        hypergradient(inner, outer, {"theta": theta}, {"omega": omega}, 0.1, solver="neuman")
    with pytest.raises(UnknownNameError, match="did you mean exact"):
        hypergradient(inner, outer, {"theta": theta}, {"omega": omega}, 0.1, form="exakt")
