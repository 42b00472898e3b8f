r"""The score of what is being optimised: networks that learn it on the way, or the exact one of a set of samples.

Score distillation compares the prior's predicted noise with that of the optimised samples' own noised law. The latter may depend on where a
sample was seen from: with a camera it is the score of that view, without one that of all views together.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from limbeck.blocks.camera_embedding import CameraEmbedding
from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.oracles import kernel_density
from limbeck.diffusion.schedules import Schedule


class FakeScore(Protocol):
    """Anything that predicts the noise in noised samples of the optimised law."""

    def eps(
        self, x_t: Tensor, t: Tensor, cond: Condition = None, camera: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Predicted noise (B, ...) at x_t (B, ...) and t (B,).

        Args:
            cond: the plain condition (B, ...).
            camera: (B, 16) camera-to-world matrices, row by row; None: without a camera.
            known: (B,) bool, rows whose camera is told; None: all.
        """


class LearnedScore(nn.Module):
    r"""A denoiser that learns the samples' score, told the camera by an embedding.

    .. math:: \epsilon_\phi(x_t, t, y, c) = f_\phi(x_t, t, y, c) \;[\,+\, \epsilon_\psi(x_t, t, y)\,]

    With ``base`` the denoiser is an addition to the frozen prior :math:`\epsilon_\psi` (its output starts at zero): the way where the prior
    has no weights to adapt.

    Args:
        denoiser: f, trained: a copy of the prior, the prior with adapters, or a network of its own; in the prior's schedule.
        base: the frozen prior, or None.
        camera: embedding hooked into the denoiser's network; None: cameras are ignored.

    Source: "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation" (2023).
    """

    def __init__(self, denoiser: Denoiser, base: Denoiser | None = None, camera: CameraEmbedding | None = None) -> None:
        super().__init__()
        if base is not None and base.schedule != denoiser.schedule:
            raise InputError(
                f"the learned score's schedule is {denoiser.schedule!r}, the prior's {base.schedule!r}: they must be one"
            )
        if base is not None and denoiser.prediction != "eps":
            raise InputError("what is added to a prior's noise must predict noise (eps)")
        self.denoiser, self.camera = denoiser, camera
        self._base = (base,)  # not a sub-module: the prior is not trained with it

    @property
    def base(self) -> Denoiser | None:
        return self._base[0]

    @property
    def space(self) -> str:
        """In which form it learns: as its network predicts."""
        return "eps" if self.denoiser.prediction == "score" else self.denoiser.prediction

    def _asked(
        self, x_t: Tensor, t: Tensor, cond: Condition, camera: Tensor | None, known: Tensor | None, space: str
    ) -> Tensor:
        told = nullcontext() if self.camera is None else self.camera.seeing(camera, known)
        own = cond if self.denoiser.conditional or not isinstance(cond, Tensor) else None
        with told:
            found = self.denoiser.predict(x_t, t, own, space)
        if self.base is None:
            return found
        with torch.no_grad():
            prior = self.base.predict(x_t, t, cond, space)
        return found + prior

    def eps(
        self, x_t: Tensor, t: Tensor, cond: Condition = None, camera: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """See :class:`FakeScore`."""
        return self._asked(x_t, t, cond, camera, known, "eps")

    def loss(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        cond: Condition = None,
        camera: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        r"""Mean squared error of the prediction (of noise, or of the velocity where the network predicts that) on samples x (B, ...).

        Args:
            t: (B,). noise: (B, ...). cond, camera, known: see :meth:`FakeScore.eps`.
        """
        schedule = self.denoiser.schedule
        clean = x.detach()
        x_t = schedule.add_noise(clean, noise, t)
        found = self._asked(x_t, t, cond, camera, known, self.space)
        wanted = noise if self.space == "eps" else self.denoiser.converted_from_x0(clean, self.space, x_t, t)
        return (found.float() - wanted.float()).square().mean()


class SampleScore(nn.Module):
    r"""The exact score of a set of samples, each widened by a Gaussian: no network, no training.

    .. math:: \epsilon(x, t) = \frac{\sigma\,(x - \alpha m)}{\alpha^2 s_0^2 + \sigma^2}, \qquad
              m = \sum_i \mathrm{softmax}_i\Big(\!-\frac{\|x - \alpha X_i\|^2}{2(\alpha^2 s_0^2 + \sigma^2)}\Big) X_i

    It knows no cameras: the samples' law is that of all views together.

    Args:
        count: M, how many samples. shape: of one. std: s_0, in the samples' units. schedule: of the noise.

    Attributes:
        samples: (M, ...), to be set by :meth:`refresh`.
    """

    samples: Tensor

    def __init__(self, count: int, shape: tuple[int, ...], std: float, schedule: Schedule) -> None:
        super().__init__()
        if count < 1 or not std > 0:
            raise InputError(f"a score of samples needs 1 sample or more and a width above 0 (got {count} and {std})")
        self.std, self.schedule = std, schedule
        self.register_buffer("samples", torch.zeros(count, *shape))

    @torch.no_grad()
    def refresh(self, samples: Tensor) -> None:
        """Take other samples (M, ...)."""
        if samples.shape != self.samples.shape:
            raise InputError(f"the samples are {tuple(self.samples.shape)}, not {tuple(samples.shape)}")
        self.samples.copy_(samples)

    def eps(
        self, x_t: Tensor, t: Tensor, cond: Condition = None, camera: Tensor | None = None, known: Tensor | None = None
    ) -> Tensor:
        """Predicted noise (B, ...); condition and camera are not used."""
        exact = kernel_density(self.samples, self.std, self.schedule)
        return exact.to(x_t.device).predict(x_t, t, None, "eps")
