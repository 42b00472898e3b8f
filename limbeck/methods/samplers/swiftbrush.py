"""SwiftBrush: variational score distillation of a diffusion model into a one-step generator, without images."""

from __future__ import annotations

from pydantic import Field

from limbeck.diffusion.losses import Weight
from limbeck.methods.samplers.score_base import VariationalDistiller


class SwiftBrush(VariationalDistiller):
    r"""Variational score distillation (VSD) of a many-step teacher into a one-step student of the same architecture; image-free.

    With the student :math:`x = G_\theta(z, c)`, the frozen teacher :math:`\epsilon_\psi` and a *LoRA teacher* :math:`\epsilon_\phi`, the teacher
    itself with low-rank adapters, each step does, in this order:

    1. at one time t for each sample, drawn between 2 % and 98 % of the schedule, :math:`x_t = \alpha_t x + \sigma_t\epsilon` and, without
       gradient, :math:`g = \omega(t)\,(\epsilon_\psi^w(x_t, t, c) - \epsilon_\phi^w(x_t, t, c))`, both guided with the same weight w;
       :math:`\theta` moves along :math:`-g\,\partial x/\partial\theta` (a mean over all elements);
    2. on the same samples, detached, at fresh times over the whole schedule, with a tenth of the conditions dropped, the adapters minimise
       :math:`\|\alpha_t(\epsilon_\phi(x_t, t, c) - \epsilon)\|^2`.

    This lowers :math:`E_t\,\omega(t)\,KL(q_t^\theta\|p_t^\psi)`. With ``fake="none"`` the added noise takes the adapters' place, which is score
    distillation sampling (SDS); with adapters that never move the gradient is zero.

    Differences: a teacher that does not predict eps has its own training loss in 2., whose weight suits it (our decision; the paper's
    teachers predict eps); :math:`\omega` is the share of noise in the variance, the paper's :math:`\sigma_t^2` for those teachers.
    Conditions are dropped for each sample by itself, where the published code drops those of a whole batch at once: the same on average.
    The published code guides both sides, which is the default; ``guide_fake=False`` guides the teacher alone, as in 3-D.

    See :class:`~limbeck.methods.samplers.score_base.ScoreDistiller` for use without the engine.

    Source: "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation" (2024).
    """

    name = "swiftbrush"

    class Config(VariationalDistiller.Config):
        lr: float = Field(5e-4, gt=0, description="learning rate of the student")

        presets = {
            "paper": {
                "lr": 1e-6,
                "lr_fake": 1e-3,
                "batch_size": 64,
                "steps": 65_000,
                "guidance": 4.5,
                "rank": 64,
                "lora_alpha": 108.0,
                "lora_targets": ("to_q", "to_v"),
                "betas": (0.9, 0.999),
                "ema": 0.9999,
            }
        }

    def fake_objective(self) -> tuple[str, Weight | None]:
        if self.online.prediction != "eps":
            return super().fake_objective()
        schedule = self.teacher.schedule
        return "eps", lambda t: schedule.alpha(t) ** 2
