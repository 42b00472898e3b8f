r"""Hypergradients: how an outer loss after (or at the end of) inner training depends on what shapes the inner loss.

A bilevel problem has inner parameters :math:`\theta` (a student), outer ones :math:`\omega` (a controller, weights of samples,
synthetic data) and

.. math:: \min_\omega J_{out}(\theta^*(\omega)), \qquad \theta^*(\omega) = \arg\min_\theta J_{in}(\theta, \omega).

All solvers here end in the same product of a vector :math:`v` with mixed second derivatives,

.. math:: M v = \nabla_\omega \langle \nabla_\theta J_{in}(\theta, \omega), v\rangle,

and differ in :math:`v`:

=============  =================================================================================  =================================
``one_step``   :math:`-\eta M\,\nabla J_{out}(\theta')`                                           exact derivative of one SGD step
                                                                                                  :math:`\theta'=\theta-\eta\nabla_\theta J_{in}`
``t1t2``       :math:`-M\,\nabla J_{out}(\theta)`                                                 inverse Hessian taken as identity
``neumann``    :math:`-M\,\eta\sum_{k=0}^{K}(I-\eta H)^k\,\nabla J_{out}(\theta)`                 truncated series of the inverse
                                                                                                  Hessian, :math:`H=\nabla^2_\theta J_{in}`
=============  =================================================================================  =================================

Products come in two forms. ``exact`` differentiates the inner gradient once more. ``finite_difference`` takes central
differences of first-order quantities, :math:`Mv \approx \lVert v\rVert\,\nabla_\omega[J_{in}(\theta^+,\omega) -
J_{in}(\theta^-,\omega)] / 2\epsilon` with :math:`\theta^\pm = \theta \pm \epsilon v/\lVert v\rVert`: two more forward passes,
no second-order graph, so it needs no more memory than an ordinary step, and layers without second derivatives will do.

Sources: "Forward and Reverse Gradient-Based Hyperparameter Optimization" (2017; unrolling), "Scalable Gradient-Based Tuning of
Continuous Regularization Hyperparameters" (2016; T1-T2), "Optimizing Millions of Hyperparameters by Implicit Differentiation"
(2020; Neumann series), "DARTS: Differentiable Architecture Search" (2019; finite differences).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from limbeck.blocks.taps import unwrap
from limbeck.core.errors import InputError, UnknownNameError

Parameters = Mapping[str, Tensor]
Solver = Literal["one_step", "t1t2", "neumann"]
Form = Literal["exact", "finite_difference"]
SOLVERS: tuple[Solver, ...] = ("one_step", "t1t2", "neumann")
FORMS: tuple[Form, ...] = ("exact", "finite_difference")


class Hypergradient(NamedTuple):
    """The result of :func:`hypergradient`.

    Attributes:
        gradient: derivative of the outer loss for each outer parameter, by name; no graph.
        inner: the inner loss at theta, a scalar.
        outer: the outer loss where its gradient was taken (at theta' for ``one_step``), a scalar.
    """

    gradient: dict[str, Tensor]
    inner: Tensor
    outer: Tensor


def hypergradient(
    inner: Callable[[Parameters, Parameters], Tensor],
    outer: Callable[[Parameters], Tensor],
    theta: Parameters,
    omega: Parameters,
    lr: float,
    *,
    solver: Solver = "one_step",
    form: Form = "finite_difference",
    eps: float = 1e-2,
    terms: int = 5,
) -> Hypergradient:
    """The derivative of the outer loss with respect to ``omega``, through inner training.

    Nothing is updated. Random draws (dropout) are the same in every pass, and torch's generator is left as it was.

    Args:
        inner: (theta, omega) -> J_in, a scalar. Whatever should not depend on theta (weights computed from the model's
            outputs, say) must be detached or precomputed by the caller.
        outer: theta -> J_out, a scalar.
        theta: inner parameters by name, see :func:`trainable`; their values are used, their graph is not.
        omega: outer parameters by name.
        lr: step size eta of the virtual step, and of the Neumann series, which needs eta below 2 / largest eigenvalue of H.
        solver, form: see the module.
        eps: norm of the perturbation of theta in the finite-difference form; 1e-2 suits float32, 1e-4 float64.
        terms: K of ``neumann``; 0 gives eta times ``t1t2``.

    Raises:
        InputError: a step size, eps or number of terms out of range; nothing to differentiate; a loss that is no scalar.
        UnknownNameError: no such solver or form.
    """
    _check(theta, omega, lr, eps, terms, solver, form)
    theta = {name: t.detach().requires_grad_() for name, t in theta.items()}
    omega = {name: w.detach().requires_grad_() for name, w in omega.items()}
    device = next(iter(theta.values())).device
    exact = form == "exact"
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        problem = _Inner(inner, theta, omega, device, exact, eps)
        point: Parameters = theta
        if solver == "one_step":
            point = _moved(theta, problem.gradient, -lr)
        value, vector = _value_and_gradient(outer, point, device)
        if solver == "neumann":
            vector = problem.neumann(vector, lr, terms)
        scale = -1.0 if solver == "t1t2" else -lr
        product = problem.mixed_product(vector)
    return Hypergradient({name: scale * g for name, g in product.items()}, problem.value.detach(), value.detach())


class _Inner:
    """The inner loss around one point: its gradient, and products with its second derivatives.

    Args:
        exact: keep the graph of the gradient, for exact products; else they are finite differences.
    """

    def __init__(
        self,
        loss: Callable[[Parameters, Parameters], Tensor],
        theta: Parameters,
        omega: Parameters,
        device: torch.device,
        exact: bool,
        eps: float,
    ) -> None:
        self.loss, self.theta, self.omega, self.device, self.eps = loss, theta, omega, device, eps
        with _same_draws(device):
            self.value = _scalar(loss(theta, omega), "inner")
        found = torch.autograd.grad(self.value, list(theta.values()), create_graph=exact, allow_unused=True)
        self._graph = _filled(theta, found) if exact else None
        self.gradient = {name: g.detach() for name, g in _filled(theta, found).items()}

    def mixed_product(self, vector: Parameters) -> dict[str, Tensor]:
        """d/d omega of <grad_theta J_in, vector>."""
        if self._graph is not None:
            return self._graph_product(vector, self.omega)
        norm = _norm(vector)
        with _same_draws(self.device):
            ahead = self.loss(_moved(self.theta, vector, self.eps / norm), self.omega)
        with _same_draws(self.device):
            behind = self.loss(_moved(self.theta, vector, -self.eps / norm), self.omega)
        difference = (ahead - behind) * (norm / (2 * self.eps))
        if not difference.requires_grad:
            return {name: torch.zeros_like(w) for name, w in self.omega.items()}
        return _filled(self.omega, torch.autograd.grad(difference, list(self.omega.values()), allow_unused=True))

    def hessian_product(self, vector: Parameters) -> dict[str, Tensor]:
        """(d²J_in / d theta²) vector."""
        if self._graph is not None:
            return self._graph_product(vector, self.theta)
        norm = _norm(vector)
        fixed = {name: w.detach() for name, w in self.omega.items()}

        def loss(theta: Parameters) -> Tensor:
            return self.loss(theta, fixed)

        _, ahead = _value_and_gradient(loss, _moved(self.theta, vector, self.eps / norm), self.device)
        _, behind = _value_and_gradient(loss, _moved(self.theta, vector, -self.eps / norm), self.device)
        return {name: (a - behind[name]) * (norm / (2 * self.eps)) for name, a in ahead.items()}

    def neumann(self, vector: Parameters, lr: float, terms: int) -> dict[str, Tensor]:
        """sum_{k=0}^{terms} (I - lr H)^k vector."""
        power = dict(vector)
        total = dict(vector)
        for _ in range(terms):
            product = self.hessian_product(power)
            power = {name: p - lr * product[name] for name, p in power.items()}
            total = {name: t + power[name] for name, t in total.items()}
        return total

    def _graph_product(self, vector: Parameters, by: Parameters) -> dict[str, Tensor]:
        assert self._graph is not None
        dot = torch.stack([(g * vector[name]).sum() for name, g in self._graph.items()]).sum()
        if not dot.requires_grad:
            return {name: torch.zeros_like(t) for name, t in by.items()}
        found = torch.autograd.grad(dot, list(by.values()), retain_graph=True, allow_unused=True)
        return _filled(by, found)


def trainable(model: nn.Module, *, last_layer: bool = False) -> dict[str, nn.Parameter]:
    """The parameters of a model that training moves, by name: those that need gradients.

    Args:
        model: wrappers (DistributedDataParallel, ``torch.compile``) are looked through.
        last_layer: only those of the last module that holds any, for models whose full unrolling is too expensive.
    """
    found = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    if not last_layer or not found:
        return found
    owner = list(found)[-1].rpartition(".")[0]
    return {name: p for name, p in found.items() if name.rpartition(".")[0] == owner}


def stateless(model: nn.Module) -> Callable[[Parameters, Any], Any]:
    """The model as a function (parameters, inputs) -> output, for virtual steps.

    Parameters that are not given keep the model's values, without gradients. Buffers are copies that are thrown away, so that
    running statistics of BatchNorm are not touched (in training mode the batch's own statistics normalise, as always).

    Args:
        model: in the mode in which it is to run; wrappers are looked through.
    """
    inside = unwrap(model)
    fixed = {name: p.detach() for name, p in inside.named_parameters()}
    buffers = dict(inside.named_buffers())

    def run(parameters: Parameters, inputs: Any) -> Any:
        tensors = {**fixed, **{name: b.clone() for name, b in buffers.items()}, **parameters}
        if isinstance(inputs, Mapping):
            return functional_call(inside, tensors, (), dict(inputs))
        return functional_call(inside, tensors, inputs if isinstance(inputs, tuple) else (inputs,))

    return run


def linear_loss(parameters: Parameters, gradient: Parameters) -> Tensor:
    """A scalar whose gradient for the parameters is ``gradient``: what hands a hypergradient to an ordinary optimiser step.

    Args:
        parameters: the real ones, by name.
        gradient: of the same names and shapes; taken as constant.
    """
    parts = [(p * gradient[name].detach().to(p)).sum() for name, p in parameters.items()]
    return torch.stack(parts).sum()


def _value_and_gradient(
    loss: Callable[[Parameters], Tensor], point: Parameters, device: torch.device
) -> tuple[Tensor, dict[str, Tensor]]:
    point = {name: t.detach().requires_grad_() for name, t in point.items()}
    with _same_draws(device):
        value = _scalar(loss(point), "outer")
    if not value.requires_grad:
        raise InputError("the outer loss does not depend on the inner parameters, so there is nothing to learn from it")
    return value, _filled(point, torch.autograd.grad(value, list(point.values()), allow_unused=True))


def _filled(names: Parameters, found: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    pairs = zip(names.items(), found, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def _moved(theta: Parameters, direction: Parameters, by: float | Tensor) -> dict[str, Tensor]:
    """theta + by * direction, without a graph."""
    with torch.no_grad():
        return {name: t + by * direction[name] for name, t in theta.items()}


def _norm(vector: Parameters) -> Tensor:
    """The joint 2-norm, kept away from 0 so that a zero vector gives a zero product."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in vector.values()]))
    return norm.clamp_min(torch.finfo(norm.dtype).tiny ** 0.5)


@contextmanager
def _same_draws(device: torch.device) -> Iterator[None]:
    """What is drawn inside leaves torch's generators as they were, so that the next pass draws the same."""
    on_gpu = device.type == "cuda"
    state, other = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if other is not None:
            torch.cuda.set_rng_state(other, device)


def _scalar(value: Tensor, which: str) -> Tensor:
    if value.ndim != 0:
        raise InputError(f"the {which} loss has shape {tuple(value.shape)}; it must be a scalar: reduce it first")
    return value


def _check(theta: Parameters, omega: Parameters, lr: float, eps: float, terms: int, solver: str, form: str) -> None:
    if solver not in SOLVERS:
        raise UnknownNameError("hypergradient solver", solver, SOLVERS)
    if form not in FORMS:
        raise UnknownNameError("hypergradient form", form, FORMS)
    if not lr > 0 or not eps > 0 or terms < 0:
        raise InputError(f"a hypergradient needs lr > 0, eps > 0 and terms >= 0 (got {lr}, {eps} and {terms})")
    for role, tensors in (("inner", theta), ("outer", omega)):
        if not tensors:
            raise InputError(f"there are no {role} parameters to differentiate: is everything frozen?")
