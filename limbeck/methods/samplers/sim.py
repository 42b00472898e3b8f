"""Score implicit matching: a one-step generator by a distance of scores whose gradient is exact, without images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Losses
from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.scores import Distance, Huber, Lp, PseudoHuber, SquaredL2, inject_gradient, sid_loss, sim_loss
from limbeck.methods.samplers.score_base import ScoreDistiller


class SIM(ScoreDistiller):
    r"""Score implicit matching (SIM) of a many-step teacher into a one-step student; needs conditions only.

    What falls is a distance of scores over all noise levels, :math:`\int w(t)\,E\,d(s_\theta(x_t) - s_q(x_t))\,dt`, where d may be any
    differentiable distance with d(0) = 0. The score :math:`s_\theta` of the student's noised law depends on the student in a way that nobody can
    differentiate; but as :math:`E[h(x_t)^T(s_\theta(x_t) - \nabla\log q(x_t|x_0))] = 0` for every h, the gradient is that of

    .. math:: L = -E\,w(t)\;d'(Y)^T\,(D_\psi(x_t) - x_0), \qquad Y = D_\psi(x_t) - D_q(x_t), \qquad
              x_0 = G_\theta(z, c), \qquad x_t = \alpha x_0 + \sigma\epsilon

    with the *online* network :math:`D_\psi` in the place of the unknown score and the teacher :math:`D_q` (guided, if asked for). The parameters of
    both stand still, but the gradient goes through the inputs of both: L with detached inputs is another loss, and a wrong one. Each step
    updates first the online network by denoising fresh samples of the student, then the student on other fresh ones.

    ``divergence`` chooses d: ``pseudo-huber`` :math:`d' = Y/\sqrt{\|Y\|^2 + c^2}` (the size of each sample's pull is bounded, far from the target as
    near it), ``l2`` :math:`2Y`, ``huber``, ``lp``; ``sid`` is the loss of score identity distillation,
    :math:`(D_q - D_\psi)^T\big((D_q - x_0) - a(D_q - D_\psi)\big) / \mathrm{mean}|x_0 - D_q|`. Norms are over all numbers of a sample.

    Our decisions, as the paper gives no training code: the loop and its constants are those of SiD; d acts on denoised samples with w = 1
    (scores differ from them by :math:`\alpha/\sigma^2`, which would leave the smallest noise alone to count), and c is 0.03 per root of
    dimension; schedules other than ``edm`` have times evenly below ``t_high``. A sample whose gradient is not finite is left out.

    Args:
        teacher, conditions, student, config, shape, seed, fake_denoiser: see
            :class:`~limbeck.methods.samplers.score_base.ScoreDistiller`, where use without the engine is shown, too.
        distance: a distance of one's own, with ``value`` and ``derivative``, in the place of ``divergence``.
        weight: w, a function of the times (B,) -> (B,); None: 1.

    Raises:
        InputError: no online network, or a distance of one's own together with ``divergence="sid"``.

    Sources: "One-Step Diffusion Distillation through Score Implicit Matching" (2024); "Score identity Distillation: Exponentially Fast
    Distillation of Pretrained Diffusion Models for One-Step Generation" (2024).
    """

    name = "sim"
    fake_first = True
    fresh_samples = True

    class Config(ScoreDistiller.Config):
        steps: int = Field(1000, ge=1, description="updates of the student")
        fake: Literal["lora", "copy", "none"] = Field(
            "copy", description="the online network: a copy of the teacher, or adapters on it (which learn less)"
        )
        cond_dropout: float = Field(
            0.0, ge=0, le=1, description="share of conditions that the fake network learns without"
        )
        t_low: float = Field(
            0.0, ge=0, lt=1, description="smallest noise that samples are compared at, as a fraction of the schedule"
        )
        t_high: float = Field(0.8, gt=0, le=1, description="largest one; the published 800 of 1000")
        clip_grad: float | None = Field(None, gt=0, description="largest gradient norm; none: no clipping")
        divergence: Literal["pseudo-huber", "l2", "huber", "lp", "sid"] = Field(
            "pseudo-huber", description="distance of the two denoised samples"
        )
        huber_c: float | None = Field(
            None,
            gt=0,
            description="where pseudo-huber and huber turn from quadratic to linear, in units of the data; none: 0.03 times the root of a "
            "sample's size",
        )
        lp_exponent: float = Field(1.5, ge=1, description="exponent of the distance lp")
        sid_alpha: float = Field(1.2, description="a of score identity distillation; 1 makes it the distance l2")

        presets = {
            name: {
                "lr": 1e-5,
                "lr_fake": 1e-5,
                "batch_size": 256,
                "steps": 1_000_000,
                "fake_log_mean": -1.2,
                "fake_log_std": 1.2,
                "t_init": 2.5,
                "ema": 0.99964,
                **more,
            }
            for name, more in {"paper": {}, "sid": {"divergence": "sid"}}.items()
        }

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        shape: Sequence[int] | None = None,
        seed: int = 0,
        fake_denoiser: Denoiser | None = None,
        distance: Distance | None = None,
        weight: Callable[[Tensor], Tensor] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(
            teacher, conditions, student, config, shape=shape, seed=seed, fake_denoiser=fake_denoiser, **overrides
        )
        if self.fake is None:
            raise InputError(
                "sim compares the teacher with an online network: fake must be 'copy' or 'lora', not 'none'"
            )
        if distance is not None and self.config.divergence == "sid":
            raise InputError("divergence='sid' is a loss of its own: it takes no distance=…")
        self.distance = self._named_distance() if distance is None else distance
        self.time_weight = weight

    def _named_distance(self) -> Distance | None:
        config = self.config
        c = config.huber_c or 0.03 * math.sqrt(math.prod(self.shape))
        made: dict[str, Distance] = {
            "pseudo-huber": PseudoHuber(c),
            "l2": SquaredL2(),
            "huber": Huber(c),
            "lp": Lp(config.lp_exponent),
        }
        return made.get(config.divergence)  # sid has none

    def divergences(self, x: Tensor, t: Tensor, noise: Tensor, cond: Any) -> Tensor:
        """The loss of each sample (B,), with gradient to x (B, ...) along all its ways and to nothing else."""
        networks = (self.online, self.real, x, t, noise, cond)
        if self.distance is None:
            found = sid_loss(*networks, alpha=self.config.sid_alpha, guidance=self.config.guidance)
            return found if self.time_weight is None else self.time_weight(t) * found
        return sim_loss(*networks, distance=self.distance, guidance=self.config.guidance, weight=self.time_weight)

    def generator_losses(self, x: Tensor, cond: Any) -> Losses:
        """The mean of :meth:`divergences` at one random time each.

        The gradient on the samples is found first and handed to the student then: so samples whose gradient is not finite can be left
        out, and the graphs of both networks are gone before that of the student is gone through.
        """
        leaf = x.detach().requires_grad_()
        t = self.generator_times(len(x), device=x.device)
        with torch.enable_grad():
            each = self.divergences(leaf, t, torch.randn_like(leaf), cond)
            (gradient,) = torch.autograd.grad(each.sum(), leaf)
        each = each.detach()
        sizes = gradient.flatten(1).norm(dim=1)
        fine = torch.isfinite(each) & torch.isfinite(sizes)
        share = fine.sum().clamp_min(1) / len(x)
        gradient = torch.where(fine.view(-1, *(1,) * (x.ndim - 1)), gradient, 0.0) / share
        carrier = inject_gradient(x, gradient)
        value = torch.where(fine, each, 0.0).mean() / share
        pull = torch.where(fine, sizes, 0.0).mean() / share
        return Losses(scores=value + carrier - carrier.detach()).observe(pull=pull, left_out=(~fine).float().mean())
