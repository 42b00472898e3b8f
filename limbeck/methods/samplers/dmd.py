"""Distribution matching distillation: the score difference of data and samples, held in place by regression on the teacher's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Losses
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.pairs import PairStore
from limbeck.methods.samplers.score_base import VariationalDistiller


class DMD(VariationalDistiller):
    r"""Distribution matching distillation of a many-step teacher into a one-step student.

    Pairs :math:`(z_i, y_i, c_i)` of noise and sample are first made by the teacher's ODE. Then each step updates the student
    :math:`x = G_\theta(z, c)` by

    .. math:: \nabla_x L_{KL} = \frac{\hat x_{fake}(x_t) - \hat x_{real}(x_t)}{\mathrm{mean}|x - \hat x_{real}(x_t)|}, \qquad
        L = m\,L_{KL} + \lambda\, d(G_\theta(z_i, c_i), y_i)

    on fresh noise and on a batch of pairs (m = ``matching``, 1, and :math:`\lambda` = ``regression``), and a full copy of the teacher, the fake network, by denoising the student's samples, as the teacher was
    trained. The teacher is guided with w, the fake network is not. The regression keeps modes that the first term alone may lose.

    d is the mean squared difference, or what ``distance`` gives. (The paper uses LPIPS, a network of its own; our decision where there is
    none. So is matching distributions on the fresh samples alone.)

    Args:
        distance: (samples, wanted) -> scalar, e.g. a :class:`~limbeck.losses.perceptual.FeatureDistance`; None: mean squared difference.

    Attributes:
        store: the pairs; :meth:`make_pairs` fills it where no engine does.

    Source: "One-step Diffusion with Distribution Matching Distillation" (2024).
    """

    name = "dmd"

    class Config(VariationalDistiller.Config):
        fake: Literal["lora", "copy", "none"] = Field(
            "copy",
            description="what follows the score of the student's samples: adapters on the teacher, a copy of it, or nothing (score "
            "distillation sampling)",
        )
        weight: Literal["sigma2", "dmd", "uniform"] = Field(
            "dmd",
            description="weight of the difference: share of noise in the variance at t, distribution matching's normaliser, or 1",
        )
        guide_fake: bool = Field(False, description="guide the fake network with the same weight")
        cond_dropout: float = Field(
            0.0, ge=0, le=1, description="share of conditions that the fake network learns without"
        )
        matching: float = Field(1.0, ge=0, description="weight of the score difference; 0: regression alone")
        regression: float = Field(0.25, ge=0, description="weight of the regression on pairs; 0: no pairs are made")
        regression_batch: int = Field(64, ge=1, description="pairs per update")

        presets = {
            "paper": {
                "lr": 5e-5,
                "lr_fake": 5e-5,
                "batch_size": 336,
                "regression_batch": 336,
                "weight_decay": 0.01,
                "optimizer": "adamw",
                "betas": (0.9, 0.999),
                "steps": 300_000,
                "pairs": 100_000,
                "guidance": 1.0,
                "t_init": 80.0,
                "fake_log_mean": -1.2,
                "clip_grad": 10.0,
                "ema": 0.9999,
            }
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
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__(
            teacher, conditions, student, config, shape=shape, seed=seed, fake_denoiser=fake_denoiser, **overrides
        )
        if self.config.matching == 0 == self.config.regression:
            raise InputError("matching and regression are both 0: nothing would be learned")
        if isinstance(distance, nn.Module):
            self.add_frozen("distance", distance)
        else:
            self.distance: Any = F.mse_loss if distance is None else distance
        self.store: PairStore | None = None

    def make_pairs(self, seed: int = 0) -> None:
        """Fill the store with the teacher's pairs at once; the engine does it in a stage of its own."""
        self.store = self.make_store("pairs")
        self.store.fill(self.teacher_sampler(), self.conditions, 0, self.store.count, seed, self.device)

    def generator_losses(self, x: Tensor, cond: Any) -> Losses:
        losses = Losses() if self.config.matching == 0 else self._matching(x, cond)
        if self.config.regression == 0:
            return losses
        if self.store is None or not len(self.store):
            raise InputError("there are no pairs for the regression yet: call make_pairs() first, or set regression=0")
        ids = torch.randint(len(self.store), (self.config.regression_batch,))
        z, wanted, asked = self.store.batch(ids, x.device)
        return losses.add("regression", self.distance(self.generate(asked, z), wanted), self.config.regression)

    def _matching(self, x: Tensor, cond: Any) -> Losses:
        loss, gradient = self.pull(x, cond)
        return Losses(scores=(self.config.matching, loss)).observe(pull=gradient.abs().mean())

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """Pairs, then the loop over the conditions."""
        (main,) = super().stages(train, val, seed=seed)
        if self.config.regression == 0:
            return [main]
        self.store = self.make_store("pairs")
        main.state = {**main.state, "pairs": self.store}
        return [self.pair_stage("pairs", self.store, self.teacher_sampler, mix_seed(seed, 29)), main]
