"""Entropic score distillation: views of a scene are pushed apart by the score of all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised
from limbeck.core.stage import Stepper
from limbeck.diffusion.fake_scores import FakeScore, SampleScore
from limbeck.methods.fields.score_base import Seen
from limbeck.methods.fields.variational_base import VariationalViewDistiller


class ESD(VariationalViewDistiller):
    r"""Entropic score distillation.

    The law of all renders together, :math:`q_t(x_t|y) = \int q_t(x_t|c, y)\,p(c)\,dc`, has an entropy that is maximised with weight
    :math:`\lambda`; up to constants

    .. math:: J(\theta) = \lambda\,KL(q_t(\cdot|y) \| p_t) + (1-\lambda)\,E_c\,KL(q_t(\cdot|c,y) \| p_t), \qquad
              g = \omega(t)\,\big(\epsilon_\psi^w(x_t,t,y^c) - \lambda\,\epsilon_q(x_t,t,y) - (1-\lambda)\,\epsilon_q(x_t,t,c,y)\big)

    With one particle the second law is a single point, whose score pulls every view to its nearest mode by itself: several fronts. The score of
    all views together points from a view to where the others are; subtracting it drives them apart until the views cover the prior's modes in
    the right shares. :math:`\lambda = 0` is variational score distillation, 1 matches the marginal alone.

    Where the scores come from (``marginal``):

    - ``network``: the camera-conditioned network of variational score distillation, learned on the way, asked with and without the camera. The
      bracket is guidance on the camera with weight :math:`w_c = 1 - \lambda`. The branch without camera carries the method, so more cameras are
      dropped in its training than there.
    - ``renders``: in closed form. :math:`\epsilon_q(x_t,t,c,y) = \epsilon`, the noise that was added (the exact score of one point), and
      :math:`\epsilon_q(x_t,t,y)` is that of a kernel density over M renders from random cameras, drawn anew every few steps. No network.

    With several particles the marginal is over cameras and particles, so that particles, too, are driven apart.

    See :class:`~limbeck.methods.fields.score_base.ViewScoreDistiller` for arguments and for use without the engine.

    The theorem is stated from the published code and what is known of the paper (unverified); :math:`\lambda > 1` is refused as unstable.

    Source: "Taming Mode Collapse in Score Distillation for Text-to-3D Generation" (2024).
    """

    name = "esd"

    class Config(VariationalViewDistiller.Config):
        lam: float = Field(
            1.0, ge=0, le=1, description="weight of the entropy of all views; 0: variational score distillation"
        )
        marginal: Literal["renders", "network"] = Field(
            "renders", description="where the score of all views comes from"
        )
        kept_renders: int = Field(32, ge=2, description="renders in the closed form (M)")
        kept_width: float = Field(0.05, gt=0, description="width of the kernel around each of them (s0)")
        refresh: int = Field(10, ge=1, description="steps between drawing them anew")
        camera_dropout: float = Field(
            0.5, ge=0, le=1, description="share of cameras that the fake network learns without"
        )

        presets = {
            "paper": {
                "steps": 25_000,
                "batch_size": 1,
                "guidance": 7.5,
                "lam": 0.5,
                "marginal": "network",
                "lr": 0.01,
                "adam_eps": 1e-15,
                "lr_fake": 1e-4,
                "rank": 4,
                "lora_targets": ("to_q", "to_k", "to_v", "to_out.0"),
                "camera_dropout": 0.1,
                "t_high_late": 0.5,
                "t_switch": 0.2,
                "ray_samples": 512,
                "sparsity": 10.0,
                "opaque": (10_000.0, 0.0, 1000.0, 10_001.0),
            }
        }

    def make_fake(self) -> FakeScore:
        if self.config.marginal == "network":
            return super().make_fake()
        if self.config.buffer:
            raise InputError("marginal='renders' learns no network: a buffer serves marginal='network'")
        shape = tuple(self.particles.samples.shape[1:]) if self.prior is None else self.prior.shape
        return SampleScore(self.config.kept_renders, shape, self.config.kept_width, self.schedule)

    def camera_weight(self) -> float:
        return 1 - float(self.config.lam)

    def own_eps(self, seen: Seen) -> Tensor:
        if self.config.marginal == "network":
            return super().own_eps(seen)
        lam = self.config.lam
        if lam == 0:
            return seen.noise
        return lam * self.fake.eps(seen.x_t, seen.t) + (1 - lam) * seen.noise

    @torch.no_grad()
    def refresh_renders(self, step: int = 0) -> None:
        """Draw the renders of the closed form anew, a batch at a time."""
        if not isinstance(self.fake, SampleScore):  # a score of one's own knows the renders by itself
            return
        wanted, parts = self.config.kept_renders, list[Tensor]()
        some = min(16, max(1, wanted // len(self.particles))) if self.particles.seen else wanted
        while sum(map(len, parts)) < wanted:
            parts.append(self.look(step, some).x)
        self.fake.refresh(torch.cat(parts)[:wanted])

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        if self.config.marginal == "network":
            return super().update(batch, stepper)
        if self.config.lam > 0 and stepper.step % self.config.refresh == 0:
            self.refresh_renders(stepper.step)
        losses = self.particle_losses(self.look(stepper.step))
        stepper.minimise(losses, "particles")
        return losses.logged()

    def optimisers(self) -> Mapping[str, Optimised]:
        if self.config.marginal == "network":
            return super().optimisers()
        found: dict[str, Any] = {"particles": self.particle_optimiser(self.config.steps)}
        return found
