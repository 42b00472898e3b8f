"""Score distillation sampling (DreamFusion): a 2-D diffusion model's score moves a scene's renders."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from limbeck.methods.fields.score_base import Seen, ViewScoreDistiller


class SDS(ViewScoreDistiller):
    r"""Score distillation sampling.

    .. math:: g = \omega(t)\,\big(\epsilon_\psi^w(x_t, t, y^c) - \epsilon\big), \qquad x_t = \alpha_t x + \sigma_t\epsilon,

    with :math:`\epsilon` the very noise that was added: the score of a law that is all at x, known exactly. A step lowers
    :math:`E_t[\omega(t)\,(\sigma_t/\alpha_t)\,KL(N(\alpha_t x, \sigma_t^2) \| p_t)]`, the negative log-likelihood of x under the prior, smoothed; it seeks
    modes: at small w renders are blurred means, so w is large (about 100 with latent diffusion), and colours saturate.

    See :class:`~limbeck.methods.fields.score_base.ViewScoreDistiller` for the rest.

    Differences: no shading and no view-dependent lighting of the original; its regularisers (orientation, sparsity of opacity) are there and
    are 0 at small scale.

    Source: "DreamFusion: Text-to-3D using 2D Diffusion" (2023).
    """

    name = "sds"

    class Config(ViewScoreDistiller.Config):
        guidance: float = Field(7.5, ge=0, description="guidance weight w of the prior; 1 is none")

        presets = {
            "paper": {
                "steps": 10_000,
                "batch_size": 1,
                "guidance": 101.0,
                "lr": 0.01,
                "betas": (0.9, 0.99),
                "adam_eps": 1e-15,
                "t_low": 0.02,
                "t_high": 0.98,
                "t_high_late": None,
                "ray_samples": 512,
                "sparsity": 1.0,
                "orient": 10.0,
            }
        }

    def own_eps(self, seen: Seen) -> Tensor:
        return seen.noise
