r"""What variational score distillation into scenes shares: a network that learns the renders' own score, told the camera."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.camera_embedding import CameraEmbedding
from limbeck.blocks.lora import Adapted, LoRA
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stepper
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.fake_scores import FakeScore, LearnedScore
from limbeck.diffusion.recent_samples import RecentSamples
from limbeck.diffusion.time_samplers import spread_times
from limbeck.methods.fields.score_base import Seen, ViewScoreDistiller
from limbeck.networks.diffusion_mlp import DiffusionMLP
from limbeck.networks.view_unet import ViewUNet


class VariationalViewDistiller(ViewScoreDistiller):
    r"""Base of the methods that learn the renders' own score.

    The fake network :math:`\epsilon_\phi` sees the plain condition and the camera; it learns by denoising the renders of the step (detached) at
    fresh times over the whole schedule, K times a step, with a share of the cameras replaced by a learned null vector:

    .. math:: \min_\phi E_{t, \epsilon, c}\,\|\epsilon_\phi(\alpha_t x + \sigma_t\epsilon, t, c, y) - \epsilon\|^2, \qquad x = sg(g(\theta, c))

    and gives :math:`\epsilon_q = \epsilon_\phi(\cdot, \varnothing) + w_c\,(\epsilon_\phi(\cdot, c) - \epsilon_\phi(\cdot, \varnothing))`: guidance on the camera with
    weight :meth:`camera_weight`.
    """

    class Config(ViewScoreDistiller.Config):
        fake: Literal["auto", "lora", "residual", "copy", "unet"] = Field(
            "auto",
            description="the network: adapters on the prior, a perceptron added to it, a copy of it, or a small one of its own; auto: "
            "adapters where the prior has layers for them, else the perceptron",
        )
        rank: int = Field(4, ge=1, description="rank of the adapters")
        lora_targets: tuple[str, ...] = Field(
            (), description="endings of the layers' paths that get adapters; none: every linear and convolutional layer"
        )
        fake_width: int = Field(256, ge=8, description="width of the perceptron, or of the small network")
        lr_fake: float = Field(1e-3, gt=0, description="learning rate of the fake network")
        fake_steps: int = Field(1, ge=1, description="updates of the fake network per update of the particles (K)")
        camera_dropout: float = Field(
            0.1, ge=0, le=1, description="share of cameras that the fake network learns without"
        )
        buffer: int = Field(
            0, ge=0, description="recent renders that the fake network learns from; 0: those of the step alone"
        )

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.config.buffer
        self.past: RecentSamples | None = None
        if size and self.fake is not None:
            assert self.prior is not None or not self.particles.seen
            shape = self.prior.shape if self.prior is not None else tuple(self.particles.samples.shape[1:])
            self.past = RecentSamples(size, shape)

    def make_fake(self) -> FakeScore:
        """The network that ``config.fake`` names."""
        config, prior = self.config, self.teacher
        kind = config.fake
        layers = any(isinstance(m, nn.Linear | nn.Conv2d) for m in prior.module.modules())
        if kind == "auto":
            kind = "lora" if layers else "residual"
        if kind in ("lora", "copy") and not layers:
            raise InputError(
                f"the prior has no layers to adapt or copy: fake='residual' adds a perceptron to it (got '{kind}')"
            )
        if kind == "lora":
            module = prior.module
            lora = LoRA(module, config.rank, None, config.lora_targets or None)
            lora.enabled = False
            return LearnedScore(prior.with_module(Adapted(lora)), camera=self._camera(module))
        if kind == "copy":
            copy = deepcopy(prior).requires_grad_(True)
            return LearnedScore(copy, camera=self._camera(copy.module))
        shape = self.prior.shape if self.prior is not None else tuple(self.particles.samples.shape[1:])
        classes = _classes_of(prior, self.conditions)
        null = None if classes is None else torch.tensor(classes)
        scale = 1e-3 if float(self.schedule.to_model_time(torch.tensor([0.5]))) > 2 else 1.0
        if kind == "residual":
            net = DiffusionMLP(shape, config.fake_width, 2, classes, time_scale=scale)
            own = Denoiser(net, self.schedule, "eps", null_cond=null)
            return LearnedScore(own, base=prior, camera=self._camera(net, "time"))
        unet = ViewUNet(shape, min(config.fake_width, 64), classes)
        own = Denoiser(unet, self.schedule, prior.prediction, null_cond=null)
        return LearnedScore(own, camera=self._camera(unet, "time_embedding"))

    def _camera(self, module: nn.Module, path: str | None = None) -> CameraEmbedding | None:
        if not self.particles.seen:
            return None
        where = path or (None if self.prior is None else self.prior.camera_path)
        return None if where is None else CameraEmbedding(module, where)

    # ---- the renders' own score --------------------------------------------------------------------------------------------

    def camera_weight(self) -> float:
        """w_c, the weight of guidance on the camera."""
        return 1.0

    def own_eps(self, seen: Seen) -> Tensor:
        weight = self.camera_weight()
        if weight == 1 or seen.camera is None:
            return self.fake.eps(seen.x_t, seen.t, seen.plain, seen.camera)
        without = self.fake.eps(seen.x_t, seen.t, seen.plain, None)
        if weight == 0:
            return without
        return without + weight * (self.fake.eps(seen.x_t, seen.t, seen.plain, seen.camera) - without)

    def fake_losses(self, seen: Seen) -> Losses:
        """Denoising of the step's renders, detached, at fresh times over the whole schedule; some cameras are left out."""
        x, camera, plain = seen.x.detach(), seen.camera, seen.plain
        if self.past is not None:
            x, camera, plain = self.past.draw(len(x))
        t = spread_times(self.schedule)(len(x), device=x.device)
        known = None if camera is None else torch.rand(len(x), device=x.device) >= self.config.camera_dropout
        return Losses(fake=self.fake.loss(x, t, torch.randn_like(x), plain, camera, known))

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One update of the particles, then ``fake_steps`` of the fake network on the same renders (or on recent ones)."""
        seen = self.look(stepper.step)
        losses = self.particle_losses(seen)
        stepper.minimise(losses, "particles")
        logged = dict(losses.logged())
        if self.past is not None:
            self.past.add(seen.x, seen.camera, seen.plain)
        for _ in range(self.config.fake_steps):
            fake = self.fake_losses(seen)
            stepper.minimise(fake, "fake")
            logged["fake"] = fake.total.detach()
        return logged

    def optimisers(self) -> Mapping[str, Optimised]:
        config = self.config
        trained = [p for p in self.fake.parameters() if p.requires_grad]
        updates = config.steps * config.fake_steps
        return {**super().optimisers(), "fake": make_optimised(trained, config, updates, lr=config.lr_fake)}


def _classes_of(prior: Denoiser, conditions: Any) -> int | None:
    """How many classes the prior's condition has, where it is a class."""
    null = prior.null_cond
    if not isinstance(null, Tensor) or null.ndim:
        return None
    if int(null) >= 0:
        return int(null)
    return int(conditions.max()) + 1 if isinstance(conditions, Tensor) and not conditions.is_floating_point() else None
