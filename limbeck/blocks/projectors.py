"""Projectors: learned maps from a student's feature to the shape of a teacher's, chosen by the two shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import InputError

Grid = tuple[int, int]

_KINDS = {2: "vector", 3: "tokens", 4: "map"}


class Projector(nn.Module):
    """Projects a student's feature to the teacher's width, then brings it to the teacher's layout and size.

    The learned part works on the student's own layout: a 1x1 convolution for a map, a linear layer for tokens (each
    one alone) and for vectors. What follows has no parameters:

    ============  ===============  ==========================================================================
    student       teacher          after the projection
    ============  ===============  ==========================================================================
    (B, C)        (B, C')          nothing
    (B, C, H, W)  (B, C', H', W')  resize: average pooling where an axis shrinks, bilinear where it grows
    (B, N, D)     (B, N', D')      resize of the token grid, if N differs; prefix tokens are left out of it
    (B, C, H, W)  (B, N, D)        resize to the teacher's token grid, rows first
    (B, N, D)     (B, C, H, W)     prefix tokens dropped, token grid resized to the map
    map, tokens   (B, C)           mean over places (without prefix tokens), taken *before* the linear layer
    ============  ===============  ==========================================================================

    Convolutions start as Kaiming normal with unit gain (nothing rectifies the result; a hidden layer has the gain of
    a ReLU), linear layers as a truncated normal of standard deviation 0.02, biases at 0. All draws are from the
    global random state. Made by :func:`make_projector`.

    Attributes:
        student_shape, teacher_shape: the shapes it was made for; only the student's width, and its token count if the
            token grid is resized, bind the input. Maps may come in any size; the output has the teacher's.
        project: the learned part, ``nn.Identity`` if there is none.
    """

    def __init__(
        self,
        student_shape: Sequence[int],
        teacher_shape: Sequence[int],
        *,
        hidden: int | None = None,
        batch_norm: bool = True,
        bias: bool | None = None,
        prefix_tokens: tuple[int, int] = (0, 0),
        grid: Grid | tuple[Grid, Grid] | None = None,
        identity_if_equal: bool = False,
    ) -> None:
        super().__init__()
        self.student_shape, self.teacher_shape = tuple(student_shape), tuple(teacher_shape)
        self.source, self.target = _kind("student", self.student_shape), _kind("teacher", self.teacher_shape)
        if self.source == "vector" != self.target:
            raise InputError(
                f"a vector {_show(student_shape)} has no places to fill the teacher's {self.target} "
                f"{_show(teacher_shape)}: tap an earlier layer of the student, or a pooled feature of the teacher."
            )
        if hidden is not None and hidden < 1:
            raise InputError(f"hidden must be at least 1, got {hidden}.")
        self.student_prefix, self.teacher_prefix = self._prefixes(prefix_tokens)
        self.resized = self._needs_resize()
        student_grid, teacher_grid = self._grids(grid)
        self.student_grid, self.size = student_grid, teacher_grid
        width, out = _width(self.student_shape), _width(self.teacher_shape)
        self.project: nn.Module
        if identity_if_equal and width == out and hidden is None:
            self.project = nn.Identity()
        elif self.source == "map" and self.target != "vector":
            self.project = _convolutions(width, out, hidden, batch_norm, bias)
        else:
            self.project = _linears(width, out, hidden, bias is not False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) in the student's shape -> (B, ...) in the teacher's.

        Raises:
            InputError: ``x`` has another number of dimensions or another width than the projector was made for.
        """
        if x.dim() != len(self.student_shape) or _width(x.shape) != _width(self.student_shape):
            raise InputError(f"this projector takes {_show(self.student_shape)}, got {_show(x.shape)}.")
        if self.target == "vector":
            return self.project(self._pooled(x))
        x = self.project(x)
        if not self.resized:
            return x[:, self.student_prefix - self.teacher_prefix :]
        if self.source == "map":
            x = _resize(x, self.size)
            return x if self.target == "map" else x.flatten(2).transpose(1, 2)
        prefix, patches = x[:, : self.student_prefix], x[:, self.student_prefix :]
        height, width = self.student_grid
        if patches.shape[1] != height * width:
            raise InputError(
                f"this projector takes {height * width} tokens and {self.student_prefix} prefix tokens, "
                f"got {x.shape[1]}."
            )
        maps = _resize(patches.transpose(1, 2).unflatten(2, (height, width)), self.size)
        if self.target == "map":
            return maps
        patches = maps.flatten(2).transpose(1, 2)
        return torch.cat([prefix, patches], dim=1) if self.teacher_prefix else patches

    def extra_repr(self) -> str:
        return f"{_show(self.student_shape)} -> {_show(self.teacher_shape)}"

    def _pooled(self, x: Tensor) -> Tensor:
        if self.source == "map":
            return x.mean(dim=(2, 3))
        return x[:, self.student_prefix :].mean(dim=1) if self.source == "tokens" else x

    def _prefixes(self, prefix_tokens: tuple[int, int]) -> tuple[int, int]:
        prefixes = []
        for who, shape, kind, count in (
            ("student", self.student_shape, self.source, prefix_tokens[0]),
            ("teacher", self.teacher_shape, self.target, prefix_tokens[1]),
        ):
            if count and kind != "tokens":
                raise InputError(f"the {who}'s {kind} {_show(shape)} has no prefix tokens: give 0 in prefix_tokens.")
            if count < 0 or (count and count >= shape[1]):
                raise InputError(
                    f"prefix_tokens: the {who} has {shape[1]} tokens, so {count} of them cannot be prefix tokens."
                )
            prefixes.append(count)
        student, teacher = prefixes
        if teacher and teacher != student:
            raise InputError(
                f"the teacher has {teacher} prefix tokens and the student {student}: they must be equal in number; "
                f"or drop the teacher's with Tap(..., pick=lambda y: y[:, {teacher}:]), and its prefix is 0."
            )
        return student, teacher

    def _needs_resize(self) -> bool:
        if self.target == "vector":
            return False
        if self.source == self.target == "tokens":
            return self.student_shape[1] - self.student_prefix != self.teacher_shape[1] - self.teacher_prefix
        return True  # a map may come in any size

    def _grids(self, grid: Grid | tuple[Grid, Grid] | None) -> tuple[Grid, Grid]:
        """The student's token grid and the size to reach, (0, 0) where there is nothing to resize or reshape."""
        counts = {
            who: shape[1] - prefix
            for who, kind, shape, prefix in (
                ("student", self.source, self.student_shape, self.student_prefix),
                ("teacher", self.target, self.teacher_shape, self.teacher_prefix),
            )
            if kind == "tokens"
        }
        given = _given_grids(grid, counts)
        if not self.resized:
            return (0, 0), (0, 0)
        grids = {who: given.get(who) or _square(who, count) for who, count in counts.items()}
        size = grids["teacher"] if self.target == "tokens" else (self.teacher_shape[2], self.teacher_shape[3])
        return grids.get("student", (0, 0)), size


def make_projector(
    student_shape: Sequence[int],
    teacher_shape: Sequence[int],
    *,
    hidden: int | None = None,
    batch_norm: bool = True,
    bias: bool | None = None,
    prefix_tokens: tuple[int, int] = (0, 0),
    grid: Grid | tuple[Grid, Grid] | None = None,
    identity_if_equal: bool = False,
) -> Projector:
    """A projector from a student's feature to a teacher's, as their shapes ask; the table is at :class:`Projector`.

    Args:
        student_shape, teacher_shape: shapes as captured, with the batch dimension (its size does not matter): (B, C)
            vectors, (B, N, D) tokens, (B, C, H, W) maps.
        hidden: width of a hidden layer with GELU; None projects linearly.
        batch_norm: normalise after each convolution. Vectors and tokens are never normalised.
        bias: None gives linear layers one, and convolutions only where no BatchNorm follows.
        prefix_tokens: how many class or register tokens lead the student's and the teacher's tokens. Equal numbers
            are projected and kept; if the teacher has none, the student's are dropped.
        grid: (height, width) of the token grid, for tokens that form no square; it serves the sides that it fits. Two
            such pairs name the student's and the teacher's. A sequence is the grid (1, N).
        identity_if_equal: learn nothing where the widths are equal and no ``hidden`` is asked; sizes are still adapted.

    Raises:
        InputError: a vector cannot become a map or tokens; a token count is no square and has no ``grid``; the prefix
            tokens do not match; a shape is none of the three kinds.
    """
    return Projector(
        student_shape,
        teacher_shape,
        hidden=hidden,
        batch_norm=batch_norm,
        bias=bias,
        prefix_tokens=prefix_tokens,
        grid=grid,
        identity_if_equal=identity_if_equal,
    )


def _kind(who: str, shape: tuple[int, ...]) -> str:
    if len(shape) not in _KINDS or min(shape[1:]) < 1:
        raise InputError(
            f"the {who}'s feature {_show(shape)} is neither (B, C), (B, N, D) nor (B, C, H, W): tap another layer, "
            "or reshape it with pick=."
        )
    return _KINDS[len(shape)]


def _width(shape: Sequence[int]) -> int:
    return shape[2] if len(shape) == 3 else shape[1]


def _show(shape: Sequence[int]) -> str:
    return f"({', '.join(['B', *map(str, shape[1:])])})"


def _given_grids(grid: Grid | tuple[Grid, Grid] | None, counts: dict[str, int]) -> dict[str, Grid]:
    if grid is None:
        return {}
    if not counts:
        raise InputError("grid is for tokens, and neither feature has tokens: drop it.")
    first, second = grid
    if isinstance(first, int) and isinstance(second, int):
        fitting = {who: (first, second) for who, count in counts.items() if first * second == count}
        if not fitting:
            raise InputError(f"grid {first}x{second} fits no token count: {_listed(counts)} (without prefix tokens).")
        return fitting
    if isinstance(first, int) or isinstance(second, int):
        raise InputError(f"grid must be (height, width) or two such pairs, got {grid!r}.")
    pairs = {who: pair for who, pair in (("student", first), ("teacher", second)) if who in counts}
    for who, (height, width) in pairs.items():
        if height * width != counts[who]:
            raise InputError(
                f"grid {height}x{width} does not fit: {_listed({who: counts[who]})} (without prefix tokens)."
            )
    return pairs


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"the {who} has {count}" for who, count in counts.items())


def _square(who: str, count: int) -> Grid:
    side = math.isqrt(count)
    if side * side != count:
        raise InputError(
            f"the {who}'s {count} tokens form no square: give grid=(height, width), grid=(1, {count}) for a sequence, "
            "or prefix_tokens if class tokens are among them."
        )
    return side, side


def _resize(x: Tensor, size: Grid) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W): average pooling along the axes that shrink, then bilinear along those that grow."""
    smaller = (min(x.shape[2], size[0]), min(x.shape[3], size[1]))
    if smaller != x.shape[2:]:
        x = F.adaptive_avg_pool2d(x, smaller)
    return x if smaller == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _linears(width: int, out: int, hidden: int | None, bias: bool) -> nn.Module:
    if hidden is None:
        return _linear(width, out, bias)
    return nn.Sequential(_linear(width, hidden, bias), nn.GELU(), _linear(hidden, out, bias))


def _linear(width: int, out: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(width, out, bias=bias)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _convolutions(width: int, out: int, hidden: int | None, batch_norm: bool, bias: bool | None) -> nn.Module:
    layers: list[nn.Module] = []
    if hidden is not None:
        layers += [*_convolution(width, hidden, "relu", batch_norm, bias), nn.GELU()]
        width = hidden
    layers += _convolution(width, out, "linear", batch_norm, bias)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _convolution(
    width: int, out: int, gain: Literal["relu", "linear"], batch_norm: bool, bias: bool | None
) -> list[nn.Module]:
    bias = not batch_norm if bias is None else bias
    layer = nn.Conv2d(width, out, kernel_size=1, bias=bias)
    nn.init.kaiming_normal_(layer.weight, nonlinearity=gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return [layer, nn.BatchNorm2d(out)] if batch_norm else [layer]
