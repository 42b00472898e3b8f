r"""Telling a network the camera: a small network whose output is added where a network embeds its time.

It lives outside of the network and acts through a forward hook, as adapters do (:mod:`limbeck.blocks.lora`), so the network's own tree,
keys and fingerprint stay as they are, and it does nothing outside of :meth:`CameraEmbedding.seeing`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck.blocks.taps import unwrap
from limbeck.core.errors import InputError, nearest

POSE = 16
"""Numbers in a camera-to-world matrix."""


class CameraEmbedding(nn.Module):
    r"""Adds :math:`W_2\,\mathrm{silu}(W_1 c)` to a sub-module's output, c being the camera; or a learned vector where it is unknown.

    :math:`W_2` and the learned vector start at zero, so nothing changes at first. Training, ``.to()``, ``state_dict`` and ``parameters()``
    concern the embedding alone; gradients also flow through it to the cameras.

    ::

        embedding = CameraEmbedding(unet, "time_embedding")
        with embedding.seeing(cameras.c2w.flatten(1)):
            unet(x, t, cond)  # knows where it looks from
        with embedding.seeing(None):
            unet(x, t, cond)  # knows that it does not
        unet(x, t, cond)  # as it was

    A network that is called with k times as many rows as there are cameras (guidance doubles the batch) sees them k times over, one
    whole batch after the other. Copies: ``deepcopy(embedding)`` copies the network with it (``embedding.base`` of the copy). When this object
    is gone, so is its hook.

    Args:
        module: the network; wrappers such as ``torch.compile`` are looked through.
        path: of a sub-module that gives vectors (B, width): ``time_embedding`` in U-Nets of diffusers.
        width: of those vectors; None: that of the last linear layer in the sub-module.
        features: numbers that a camera is told in.

    Raises:
        InputError: no such sub-module, no linear layer to tell its width, sizes below 1.

    Source: camera conditioning of "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation" (2023);
    the learned vector is ours, since a camera's numbers can be near zero.
    """

    def __init__(self, module: nn.Module, path: str, width: int | None = None, features: int = POSE) -> None:
        super().__init__()
        root = unwrap(module)
        known = [name for name, _ in root.named_modules() if name]
        if path not in known:
            near = nearest(path, known)
            tail = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"{type(root).__name__} has no sub-module '{path}' for a camera to be told at{tail}")
        target = root.get_submodule(path)
        size = _width_of(target, path) if width is None else int(width)
        if size < 1 or features < 1:
            raise InputError(f"a camera embedding's width and features are 1 or more (got {size} and {features})")
        self.path, self.features = path, int(features)
        self._base = [root]  # in a list, so that it is no sub-module
        like = next((p for p in target.parameters()), torch.empty(0))
        self.vectors = _CameraVectors(path, size, self.features).to(like.device)
        self._handles: list[Any] = [target.register_forward_hook(self.vectors.add)]
        # Once nobody holds the embedding, the network gets rid of it too.
        weakref.finalize(self, _release, self._handles).atexit = False

    @property
    def base(self) -> nn.Module:
        """The network that the embedding is on."""
        return self._base[0]

    @property
    def width(self) -> int:
        """Of the vectors that it adds to."""
        return len(self.vectors.null)

    def forward(self, cameras: Tensor | None, known: Tensor | None = None, *, rows: int = 1) -> Tensor:
        """What is added: (B, width), or (rows, width) without cameras. Arguments as in :meth:`seeing`."""
        self._check(cameras, known)
        return self.vectors(cameras, known, rows)

    @contextmanager
    def seeing(self, cameras: Tensor | None, known: Tensor | None = None) -> Iterator[nn.Module]:
        """Inside the block the network is told the cameras; afterwards as before, also on errors.

        Args:
            cameras: (B, features), or None: unknown for all rows.
            known: (B,) bool, False where a row's camera is withheld; None: all are known.

        Raises:
            InputError: cameras of another width, or another number of ``known``. Inside: a batch that is no multiple of B.
        """
        self._check(cameras, known)
        before, self.vectors.seen = self.vectors.seen, (cameras, known)
        try:
            yield self.base
        finally:
            self.vectors.seen = before

    def remove(self) -> nn.Module:
        """Take the embedding off the network, which is returned."""
        _release(self._handles)
        return self.base

    def _check(self, cameras: Tensor | None, known: Tensor | None) -> None:
        if cameras is not None and (cameras.ndim != 2 or cameras.shape[1] != self.features or not len(cameras)):
            raise InputError(
                f"cameras are told as (B, {self.features}), flattened camera-to-world matrices as a rule, not {tuple(cameras.shape)}"
            )
        if known is not None:
            if cameras is None:
                raise InputError("which cameras are known can only be said where there are cameras")
            if known.shape != cameras.shape[:1] or known.dtype != torch.bool:
                raise InputError(f"known is ({len(cameras)},) bool, not {tuple(known.shape)} {known.dtype}")


class _CameraVectors(nn.Module):
    """The vectors, and the hook that adds them; apart from the embedding, so that the hook does not keep that alive."""

    def __init__(self, path: str, width: int, features: int) -> None:
        super().__init__()
        self.path = path
        self.inner = nn.Linear(features, width)
        self.outer = nn.Linear(width, width)
        self.null = nn.Parameter(torch.zeros(width))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.seen: tuple[Tensor | None, Tensor | None] | None = None

    def forward(self, cameras: Tensor | None, known: Tensor | None, rows: int) -> Tensor:
        if cameras is None:
            return self.null.expand(rows, -1)
        found: Tensor = self.outer(F.silu(self.inner(cameras.to(self.null))))
        return found if known is None else torch.where(known.to(found.device)[:, None], found, self.null)

    def add(self, target: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        """The forward hook."""
        if self.seen is None:
            return None
        if not isinstance(output, Tensor) or output.ndim != 2 or output.shape[1] != len(self.null):
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"'{self.path}' gives {given}, and the camera's vectors are (B, {len(self.null)})")
        cameras, known = self.seen
        count = len(output) if cameras is None else len(cameras)
        if len(output) % count:
            raise InputError(
                f"the network was called with {len(output)} rows and {count} cameras: rows must be a multiple of cameras"
            )
        vectors: Tensor = self(cameras, known, count)
        return output + vectors.repeat(len(output) // count, 1).to(output.dtype)


def _release(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _width_of(target: nn.Module, path: str) -> int:
    layers = [m for m in target.modules() if isinstance(m, nn.Linear)]
    if not layers:
        raise InputError(f"'{path}' holds no linear layer that tells the width of its output: give width=…")
    return int(layers[-1].out_features)
