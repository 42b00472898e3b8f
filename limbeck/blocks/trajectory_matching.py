r"""How far training on synthetic data ends from where training on real data ended, and the gradient of that distance.

From :math:`\theta_0`, a snapshot of a network trained on real data, :math:`T` steps of gradient descent on synthetic images
:math:`S` with labels :math:`Y` and step size :math:`\beta` are taken,

.. math:: g_i = \nabla_\theta\,\ell\big(f_{\theta_i}(x_i), y_i\big),\quad v_{i+1} = \mu v_i + g_i,\quad
          \theta_{i+1} = \theta_i - \beta v_{i+1},\qquad (x_i, y_i) = \mathrm{present}(S_{b_i}, Y_{b_i}, i),

and compared with later snapshots :math:`\theta^*_m` of the same real training, each after a number of steps :math:`m`:

.. math:: L = \sum_m w_m \frac{\lVert\theta_m - \theta^*_m\rVert^2}{\lVert\theta_0 - \theta^*_m\rVert^2}.

The derivatives of :math:`L` for :math:`S`, :math:`Y` and :math:`\beta` come in three ways:

===========  ===================================================================================================================
``adjoint``  exact. A first pass keeps the parameters :math:`\theta_i` and no graph; a second one goes back through the steps and
             builds the graph of one step at a time. With :math:`a = \partial L/\partial\theta_{i+1}` and
             :math:`c = \mu\,q` of the step before (0 at the end): :math:`q = c - \beta a`, :math:`h = \langle q, g_i\rangle`,
             :math:`\mathrm dS_{b_i} \mathrel{+}= \nabla_S h`, :math:`\mathrm dY_{b_i} \mathrel{+}= \nabla_Y h`,
             :math:`\mathrm d\beta \mathrel{-}= \langle a, v_{i+1}\rangle`, :math:`a \mathrel{+}= \nabla_\theta h`.
``tesla``    the same without the last of these: each :math:`\theta_i` counts as a constant, so what a step does to the
             gradients of later ones is left out. Cheaper by one product, exact for one step only, and ever further from the
             gradient as :math:`\beta T` grows.
``unroll``   exact, by automatic differentiation through the graph of all steps.
===========  ===================================================================================================================

Memory beyond the parameters :math:`\theta_i` does not depend on :math:`T` with the first two; it grows with it in the third.

Sources: "Dataset Distillation by Matching Training Trajectories" (2022; the distance, by unrolling), "Scaling Up Dataset
Distillation to ImageNet-1K with Constant Memory" (2023; the second form, for SGD without momentum). The adjoint is reverse-mode
differentiation with stored states, as in optimal control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import InputError, UnknownNameError

Mode = Literal["adjoint", "unroll", "tesla"]
MODES: tuple[Mode, ...] = ("adjoint", "unroll", "tesla")
Network = Callable[[Tensor, Tensor], Tensor]
Criterion = Callable[[Tensor, Tensor], Tensor]
Present = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Target(NamedTuple):
    """A snapshot that training on synthetic data should pass.

    Attributes:
        point: (P,) parameters.
        step: after how many of the T steps, 1 to T; None: after the last.
        weight: of its distance in the loss.
    """

    point: Tensor
    step: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Match:
    """What :func:`match_trajectory` found. No tensor has a graph.

    Attributes:
        loss: (), the weighted sum of distances.
        distances: (targets,), in the order given; 1 means no nearer than the start was.
        images, labels, step_size: derivatives of the loss; ``labels`` is None for class indices.
        end: (P,), the parameters after the last step.
    """

    loss: Tensor
    distances: Tensor
    images: Tensor
    labels: Tensor | None
    step_size: Tensor
    end: Tensor


def soft_cross_entropy(logits: Tensor, label_logits: Tensor) -> Tensor:
    """Cross-entropy with the distribution softmax(label_logits), both (B, C), mean over the batch; for trained soft labels."""
    return F.cross_entropy(logits, label_logits.softmax(-1))


def match_trajectory(
    network: Network,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    start: Tensor,
    targets: Tensor | Sequence[Target],
    batches: Tensor | Sequence[Tensor],
    *,
    mode: Mode = "adjoint",
    present: Present | None = None,
    criterion: Criterion = F.cross_entropy,
    momentum: float = 0.0,
    checkpointing: bool = False,
) -> Match:
    """The loss and its gradients, see the module.

    Args:
        network: (theta (P,), inputs) -> logits; a :class:`limbeck.blocks.flat.FlatNetwork`.
        images: (N, ...) synthetic inputs S. Values are read; ``grad`` fields are not touched.
        labels: (N,) class indices, or a floating-point (N, ...) tensor Y, which is differentiated too: probabilities for the
            default criterion, logits for :func:`soft_cross_entropy`.
        step_size: beta, a scalar tensor.
        start: theta_0, (P,).
        targets: the snapshot to be reached at the end, (P,), or several.
        batches: for each step the ids of the images that it sees, (T, b) or T tensors; see :func:`draw_batches`.
        present: (images, labels, step) -> what the network is shown. Adds mirror images, augments. It is called once or more
            for each step and must do the same every time; random draws from torch's generators are replayed.
        criterion: (logits, shown labels) -> scalar loss of a step.
        momentum: mu, heavy-ball.
        checkpointing: keep only every sqrt(T)-th theta_i and compute the others again (for big networks; ``adjoint`` and
            ``tesla``). Costs one more forward pass.

    Raises:
        UnknownNameError: no such mode.
        InputError: no step or target, a target's step beyond T, a start that coincides with a target (the expert did not move),
            lengths that do not fit, a step size that is not a number.
    """
    problem = _Problem(network, images, labels, step_size, start, targets, batches, present, criterion, momentum)
    if mode not in MODES:
        raise UnknownNameError("gradient mode", mode, MODES, hint=f"Known: {', '.join(MODES)}.")
    with torch.enable_grad(), torch.autocast(start.device.type, enabled=False):
        if mode == "unroll":
            return _unroll(problem)
        return _sweep(problem, exact=mode == "adjoint", every=math.isqrt(problem.steps) if checkpointing else None)


def follow(
    network: Network,
    images: Tensor,
    labels: Tensor,
    step_size: Tensor,
    start: Tensor,
    batches: Tensor | Sequence[Tensor],
    *,
    present: Present | None = None,
    criterion: Criterion = F.cross_entropy,
    momentum: float = 0.0,
) -> Tensor:
    """Where training on synthetic data ends, (P,): the steps of :func:`match_trajectory` without its gradients."""
    problem = _Problem(network, images, labels, step_size, start, (), batches, present, criterion, momentum)
    with torch.enable_grad(), torch.autocast(start.device.type, enabled=False):
        state = _State(problem.start, None)
        for number in range(problem.steps):
            state = problem.advance(state, number)
    return state.theta


def draw_batches(count: int, size: int, steps: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Ids for ``steps`` batches of ``size`` of ``count`` samples: shuffled passes, the last batch of a pass may be smaller."""
    chunks: list[Tensor] = []
    while len(chunks) < steps:
        chunks.extend(torch.randperm(count, generator=generator).split(size))
    return chunks[:steps]


class _State(NamedTuple):
    """theta_i, and v_i (None is zero)."""

    theta: Tensor
    velocity: Tensor | None


class _Problem:
    """The arguments, checked, and one inner step."""

    def __init__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        step_size: Tensor,
        start: Tensor,
        targets: Tensor | Sequence[Target],
        batches: Tensor | Sequence[Tensor],
        present: Present | None,
        criterion: Criterion,
        momentum: float,
    ) -> None:
        self.network, self.present, self.criterion, self.momentum = network, present, criterion, momentum
        self.images, self.labels, self.beta = images.detach(), labels.detach(), step_size.detach()
        self.soft = labels.is_floating_point()
        self.start = start.detach()
        self.batches = list(batches)
        self.steps = len(self.batches)
        if self.steps == 0:
            raise InputError("matching a trajectory needs at least one inner step: give batches for it")
        if len(images) != len(labels):
            raise InputError(f"{len(images)} synthetic images but {len(labels)} labels: they must be as many")
        if step_size.ndim != 0 or not bool(torch.isfinite(self.beta)):
            raise InputError(f"the step size must be one finite number, as a scalar tensor (got {step_size.tolist()})")
        listed = (Target(targets),) if isinstance(targets, Tensor) else tuple(targets)
        self.targets = [self._checked(t) for t in listed]
        self.scales = [(self.start - t.point).square().sum() for t in self.targets]
        for scale in self.scales:
            if not bool(scale > 0):
                raise InputError(
                    "start and target of a segment are the same point, so a distance cannot be measured by it: "
                    "train the experts longer, or with a larger rate"
                )
        self._random: dict[int, list[Tensor]] = {}

    def _checked(self, target: Target) -> Target:
        step = self.steps if target.step is None else target.step
        if not 1 <= step <= self.steps:
            raise InputError(f"a target after step {step} cannot be reached with {self.steps} steps: 1 to {self.steps}")
        if target.point.shape != self.start.shape:
            raise InputError(
                f"start {tuple(self.start.shape)} and target {tuple(target.point.shape)} must have one shape"
            )
        return Target(target.point.detach(), step, target.weight)

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor, number: int, create_graph: bool) -> Tensor:
        """g_i for the images and labels of batch ``number``."""
        with self._replayed(number):
            if self.present is not None:
                x, y = self.present(x, y, number)
            loss = self.criterion(self.network(theta, x), y)
        return torch.autograd.grad(loss, theta, create_graph=create_graph)[0]

    def advance(self, state: _State, number: int) -> _State:
        """One inner step without a graph."""
        at = self.batches[number].to(self.images.device)
        theta = state.theta.detach().requires_grad_()
        step = self.gradient(theta, self.images[at], self.labels[at], number, create_graph=False)
        if self.momentum and state.velocity is not None:
            step = torch.add(step, state.velocity, alpha=self.momentum)
        return _State(theta.detach() - self.beta * step, step if self.momentum else None)

    def reached(self, number: int) -> Iterator[tuple[int, Target, Tensor]]:
        """Position, target and squared distance from the start of those that belong after ``number`` steps."""
        for position, (target, scale) in enumerate(zip(self.targets, self.scales, strict=True)):
            if target.step == number:
                yield position, target, scale

    @contextmanager
    def _replayed(self, number: int) -> Iterator[None]:
        """The first time, remember torch's random state; later, put it back for the block."""
        if number not in self._random:
            self._random[number] = self._random_state()
            yield
            return
        now = self._random_state()
        self._set_random_state(self._random[number])
        try:
            yield
        finally:
            self._set_random_state(now)

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.start.is_cuda:
            states.append(torch.cuda.get_rng_state(self.start.device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.start.is_cuda:
            torch.cuda.set_rng_state(states[1], self.start.device)


def _unroll(problem: _Problem) -> Match:
    images, beta = problem.images.clone().requires_grad_(), problem.beta.clone().requires_grad_()
    labels = problem.labels.clone().requires_grad_(problem.soft)
    theta = problem.start.clone().requires_grad_()
    velocity: Tensor | None = None
    distances: dict[int, Tensor] = {}
    for number, ids in enumerate(problem.batches):
        at = ids.to(images.device)
        step = problem.gradient(theta, images[at], labels[at], number, create_graph=True)
        velocity = step if velocity is None else problem.momentum * velocity + step
        theta = theta - beta * velocity
        if not problem.momentum:
            velocity = None
        for position, target, scale in problem.reached(number + 1):
            distances[position] = (theta - target.point).square().sum() / scale
    ordered = torch.stack([distances[n] for n in range(len(problem.targets))])
    loss = (_weights(problem, ordered) * ordered).sum()
    wanted = [images, beta, *([labels] if problem.soft else [])]
    found = torch.autograd.grad(loss, wanted, materialize_grads=True)
    return Match(
        loss.detach(), ordered.detach(), found[0], found[2] if problem.soft else None, found[1], theta.detach()
    )


def _sweep(problem: _Problem, exact: bool, every: int | None) -> Match:
    """Forwards with stored states, then backwards with one graph at a time."""
    every = problem.steps if every is None else every
    kept, states, distances, residuals, end = _forwards(problem, every)
    images, beta = torch.zeros_like(problem.images), torch.zeros_like(problem.beta)
    labels = torch.zeros_like(problem.labels) if problem.soft else None
    a = torch.zeros_like(problem.start)
    c: Tensor | None = None
    for first in reversed(kept):
        if states[0] != first:  # the last segment is still there
            states = (first, _segment(problem, kept[first], first, min(first + every, problem.steps))[0])
        for number, state in reversed(list(enumerate(states[1], first))):
            for residual in residuals.get(number + 1, ()):
                a = a + residual
            q = -problem.beta * a if c is None else c - problem.beta * a
            at = problem.batches[number].to(images.device)
            theta = state.theta.detach().requires_grad_()
            x = problem.images[at].requires_grad_()
            y = problem.labels[at].requires_grad_(problem.soft)
            step = problem.gradient(theta, x, y, number, create_graph=True)
            wanted = [x, *([y] if problem.soft else []), *([theta] if exact else [])]
            found = _products(step, q, wanted)
            images.index_add_(0, at, found[0])
            if labels is not None:
                labels.index_add_(0, at, found[1])
            velocity = step.detach()
            if problem.momentum:
                if state.velocity is not None:
                    velocity = torch.add(velocity, state.velocity, alpha=problem.momentum)
                c = problem.momentum * q
            beta = beta - (a * velocity).sum()
            if exact:
                a = a + found[-1]
            del step, found  # nor the graph, before the next one is built
    loss = (_weights(problem, distances) * distances).sum()
    return Match(loss, distances, images, labels, beta, end)


def _forwards(
    problem: _Problem, every: int
) -> tuple[dict[int, _State], tuple[int, list[_State]], Tensor, dict[int, list[Tensor]], Tensor]:
    """States at the beginning of each segment, all states of the last one, distances, their derivatives by step, the end."""
    kept: dict[int, _State] = {}
    states: tuple[int, list[_State]] = (0, [])
    distances: dict[int, Tensor] = {}
    residuals: dict[int, list[Tensor]] = {}
    state = _State(problem.start, None)
    for first in range(0, problem.steps, every):
        kept[first] = state
        passed, state = _segment(problem, state, first, min(first + every, problem.steps))
        for number, after in enumerate([*passed[1:], state], first + 1):
            for position, target, scale in problem.reached(number):
                gap = after.theta - target.point
                distances[position] = gap.square().sum() / scale
                residuals.setdefault(number, []).append(gap * (2 * target.weight / scale))
        states = (first, passed)
    ordered = torch.stack([distances[n] for n in range(len(problem.targets))])
    return kept, states, ordered, residuals, state.theta


def _segment(problem: _Problem, state: _State, first: int, last: int) -> tuple[list[_State], _State]:
    """The states before steps ``first`` to ``last - 1``, and the one after them."""
    passed = []
    for number in range(first, last):
        passed.append(state)
        state = problem.advance(state, number)
    return passed, state


def _products(step: Tensor, q: Tensor, wanted: list[Tensor]) -> tuple[Any, ...]:
    """Derivatives of <q, g_i>."""
    if not step.requires_grad:
        return tuple(torch.zeros_like(w) for w in wanted)
    return torch.autograd.grad(step, wanted, q, materialize_grads=True)


def _weights(problem: _Problem, like: Tensor) -> Tensor:
    return torch.tensor([t.weight for t in problem.targets], dtype=like.dtype, device=like.device)
