"""Between weights: variance-preserving mixtures of initialisations, lines and planes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError

State = Mapping[str, Tensor]


def variance_factor(alpha: float) -> float:
    """delta = sqrt(alpha² + (1 - alpha)²): the deviation of (1 - alpha) x + alpha y for independent x, y of deviation 1.

    Raises:
        InputError: ``alpha`` outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be between 0 and 1 (got {alpha})")
    return float((alpha**2 + (1 - alpha) ** 2) ** 0.5)


@torch.no_grad()
def blend_initialisations(model: nn.Module, other: nn.Module, alpha: float) -> list[str]:
    r"""Move an initialised model towards another initialisation of itself, in place, keeping the variance of its weights.

    .. math:: \theta \leftarrow \big((1-\alpha)\,\theta_{other} + \alpha\,\theta\big) / \delta, \qquad
              \delta = \sqrt{\alpha^2 + (1-\alpha)^2}

    Only what was drawn at random is mixed. Entries that are equal in both models are constants of the initialisation (the gain and
    bias of a normalisation, zero biases) and stay: dividing them by delta would change them. Buffers, running statistics among
    them, become those of ``other``. Random entries are taken to have mean 0. Sums are made in double precision and then rounded,
    so in single precision an alpha below about 1e-7 reaches only weights near 0.

    Args:
        model: a fresh initialisation; changed.
        other: another one of the same architecture.
        alpha: in [0, 1]; 0 gives ``other`` and 1 leaves the parameters as they are, both exactly.

    Returns:
        names of the parameters that hold random entries.

    Source: "Random Teachers are Good Teachers" (2023).

    Raises:
        InputError: ``alpha`` out of range, or different architectures.
    """
    delta = variance_factor(alpha)
    own, others = dict(model.named_parameters()), dict(other.named_parameters())
    buffers, other_buffers = dict(model.named_buffers()), dict(other.named_buffers())
    _check_same(own, others)
    _check_same(buffers, other_buffers)
    mixed = []
    for name, parameter in own.items():
        target = others[name].to(parameter)
        random = parameter != target
        if not bool(random.any()):
            continue
        mixed.append(name)
        blend = ((1 - alpha) * target.double() + alpha * parameter.double()) / delta
        parameter.copy_(torch.where(random, blend.to(parameter.dtype), parameter))
    for name, buffer in buffers.items():
        buffer.copy_(other_buffers[name])
    return mixed


@torch.no_grad()
def shuffle_parameters(model: nn.Module) -> None:
    """Another draw of an initialisation of which only one is there: the entries of every parameter change places, in place.

    A tensor whose entries were drawn independently from one distribution keeps that distribution (and mean and variance exactly);
    one that is constant stays as it is. The permutations come from torch's global random state. Tensors with a structure, such as
    orthogonal matrices, lose it.
    """
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel()).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


# ---- lines and planes ----------------------------------------------------------------------------------------------------


def state_of(model: nn.Module | State) -> dict[str, Tensor]:
    """Copies of a model's parameters and buffers by name, without gradients; a mapping of tensors is copied likewise."""
    if isinstance(model, nn.Module):
        model = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in model.items()}


def linear_path(
    start: nn.Module | State, end: nn.Module | State, positions: Sequence[float] | Tensor
) -> dict[str, Tensor]:
    """Weights along the line (1 - t) start + t end.

    Floating-point parameters and buffers move (running statistics too, which is no exact substitute for measuring them anew);
    integer buffers stay those of ``start``.

    Args:
        start, end: models of one architecture, or their states.
        positions: t of each point (P); 0 gives ``start``, 1 ``end``, other values lie outside.

    Returns:
        by name, tensors (P, ...): one slice per point, as :func:`torch.func.vmap` takes them.

    Raises:
        InputError: different architectures, or no position.
    """
    a, b = state_of(start), state_of(end)
    _check_same(a, b)
    t = torch.as_tensor(positions, dtype=torch.float64)
    if t.ndim != 1 or not len(t):
        raise InputError("positions must be a list of at least one number")
    return {name: _combined(x, t, [(1 - t, x), (t, b[name])]) for name, x in a.items()}


@dataclass(frozen=True)
class Plane:
    """The plane through three points of weight space, with an orthonormal basis.

    Attributes:
        origin: the first point.
        first, second: directions by name, of length 1 over all floating-point tensors and at right angles; the second point lies
            on the first axis.
        corners: (3, 2) coordinates of the three points, in the units of the weights.
    """

    origin: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    corners: Tensor

    @classmethod
    def through(cls, a: nn.Module | State, b: nn.Module | State, c: nn.Module | State) -> Self:
        """The plane of three models of one architecture.

        Source of the construction: "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018).

        Raises:
            InputError: different architectures, or three points on a line.
        """
        origin, second, third = state_of(a), state_of(b), state_of(c)
        _check_same(origin, second)
        _check_same(origin, third)
        moving = [name for name, tensor in origin.items() if tensor.is_floating_point()]
        u = {name: second[name].double() - origin[name].double() for name in moving}
        v = {name: third[name].double() - origin[name].double() for name in moving}
        length, other = _norm(u), _norm(v)
        along = _dot(u, v) / length if length > 0 else 0.0
        rest = {name: v[name] - along / length * u[name] for name in moving} if length > 0 else v
        height = _norm(rest)
        if length == 0 or height <= 1e-6 * other:
            raise InputError("three points on a line span no plane: give three different models")
        return cls(
            origin,
            {name: x / length for name, x in u.items()},
            {name: x / height for name, x in rest.items()},
            torch.tensor([[0.0, 0.0], [length, 0.0], [along, height]], dtype=torch.float64),
        )

    def points(self, coordinates: Tensor) -> dict[str, Tensor]:
        """States (P, ...) at coordinates (P, 2); integer buffers are those of the origin."""
        x, y = coordinates.double().unbind(1)
        one = torch.ones_like(x)
        return {
            name: _combined(tensor, x, [(one, tensor), (x, self.first[name]), (y, self.second[name])])
            if name in self.first
            else tensor.expand(len(x), *tensor.shape)
            for name, tensor in self.origin.items()
        }


def _combined(like: Tensor, t: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of weight (P) times tensor, (P, ...) in the type of ``like``; copies of ``like`` where it does not float."""
    if not like.is_floating_point():
        return like.expand(len(t), *like.shape)
    shape = (-1,) + (1,) * like.ndim
    total = torch.zeros((len(t), *like.shape), dtype=torch.float64, device=like.device)
    for weight, tensor in parts:
        total += weight.to(like.device).view(shape) * tensor.double()
    return total.to(like.dtype)


def _check_same(a: State, b: State) -> None:
    for name in [*a, *b]:
        if name not in a or name not in b or a[name].shape != b[name].shape:
            shapes = [tuple(s[name].shape) if name in s else "absent" for s in (a, b)]
            raise InputError(
                f"the models differ in '{name}' ({shapes[0]} and {shapes[1]}): both must have the same architecture"
            )


def _dot(a: State, b: State) -> float:
    return float(sum((a[name] * b[name]).sum() for name in a))


def _norm(a: State) -> float:
    return _dot(a, a) ** 0.5
