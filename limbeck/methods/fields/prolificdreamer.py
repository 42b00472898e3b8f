"""ProlificDreamer: variational score distillation, where 3-D scenes are samples and the renders' own score is learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from pydantic import Field

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.scores import inject_gradient
from limbeck.methods.fields.score_base import OMEGAS
from limbeck.methods.fields.variational_base import VariationalViewDistiller
from limbeck.rendering.fields import TexturedField, VolumeField


class ProlificDreamer(VariationalViewDistiller):
    r"""Variational score distillation (VSD).

    The scene is a random variable with law :math:`\mu(\theta|y)`, held as n particles. Its Wasserstein gradient flow lowers
    :math:`E_{t,c}\,(\sigma_t/\alpha_t)\,\omega(t)\,KL(q_t(x_t|c,y) \| p_t(x_t|y^c))`, q being the law of noised renders:

    .. math:: \frac{d\theta_i}{d\tau} = -E_{t,\epsilon,c}\Big[\omega(t)\,\big(\epsilon_\psi^w(x_t,t,y^c) - \epsilon_\phi(x_t,t,c,y)\big)
              \frac{\partial g(\theta_i,c)}{\partial\theta_i}\Big], \qquad x_t = \alpha_t g(\theta_i,c) + \sigma_t\epsilon

    Each step does, in this order: a particle, a camera, a render; one time and noise for each image; the pull above (the prior without
    adapters and camera); an update of :math:`\theta_i`; K updates of :math:`\phi` by denoising the same renders, detached, at times over the whole
    schedule, some cameras replaced by a null vector. With :math:`\epsilon_\phi = \epsilon` it is score distillation sampling.

    ``camera_guidance`` other than 1 mixes the fake network's answers with and without the camera.

    With ``refine`` two stages follow. *Geometry*: the pull of score distillation sampling on view-space normal maps, guided with
    ``geometry_guidance``, with a smooth normal map and grid (``normal_smoothness``, ``laplacian``); colours do not move. *Texture*: densities are frozen,
    colours start from those of the first stage, and the pull is that of this method again.

    See :class:`~limbeck.methods.fields.score_base.ViewScoreDistiller` for arguments and for use without the engine.

    Differences: the published second and third stages work on a tetrahedral mesh; here the surface stays a density (``export`` writes its mesh)
    whose normals are those of the density's gradient, which needs no rasteriser. Our decision: where the prior has no weights (closed
    forms) the fake network is the prior plus a perceptron whose output starts at zero.

    Source: "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation" (2023).
    """

    name = "prolificdreamer"

    class Config(VariationalViewDistiller.Config):
        guidance: float = Field(1.0, ge=0, description="guidance weight w of the prior; 1 is none")
        camera_guidance: float = Field(1.0, ge=0, description="weight of guidance on the camera of the fake network")
        refine: bool = Field(False, description="add the stages of geometry (by normal maps) and of texture")
        geometry_steps: int = Field(200, ge=1, description="updates of the stage of geometry")
        geometry_guidance: float = Field(7.5, ge=0, description="guidance weight of that stage")
        geometry_rate: float = Field(0.02, gt=0, description="peak learning rate of that stage")
        normal_smoothness: float = Field(0.0, ge=0, description="weight of smooth normal maps in the stage of geometry")
        laplacian: float = Field(0.0, ge=0, description="weight of smooth grids in the stage of geometry")
        texture_steps: int = Field(200, ge=1, description="updates of the stage of texture")

        presets = {
            "paper": {
                "steps": 25_000,
                "batch_size": 1,
                "guidance": 7.5,
                "optimizer": "adamw",
                "lr": 0.01,
                "adam_eps": 1e-15,
                "fake": "lora",
                "rank": 4,
                "lora_targets": ("to_q", "to_k", "to_v", "to_out.0"),
                "lr_fake": 1e-4,
                "fake_steps": 1,
                "camera_dropout": 0.1,
                "t_high_late": 0.5,
                "t_switch": 0.2,
                "ray_samples": 512,
                "sparsity": 10.0,
                "opaque": (10_000.0, 0.0, 1000.0, 10_001.0),
                "early_size": 64,
                "early_share": 0.2,
                "refine": True,
                "geometry_steps": 15_000,
                "geometry_guidance": 100.0,
                "geometry_rate": 5e-3,
                "texture_steps": 30_000,
            }
        }

    def camera_weight(self) -> float:
        return float(self.config.camera_guidance)

    # ---- geometry and texture ---------------------------------------------------------------------------------------------

    def geometry_losses(self, step: int = 0) -> Losses:
        """The pull of score distillation sampling on the normal maps of one particle, and how rough they are."""
        config = self.config
        assert self.orbit is not None and self.prior is not None
        which = torch.randint(len(self.particles), (1,))
        size = self.prior.render_size
        cameras = self.orbit.sample(config.batch_size, step=step).resized(size, size).to(self.device)
        drawn = self.particles.draw(which, cameras, normals=True)
        x = self.encoded(drawn["normals"])
        of_view, _ = self.asked_for(which, cameras, len(x))
        t, noise = self.times(step)(len(x), device=x.device), torch.randn_like(x)
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, noise, t)
            eps = self.teacher.predict(x_t, t, of_view, "eps", config.geometry_guidance)
            pull = torch.nan_to_num(expand(OMEGAS[config.omega](self.schedule, t), eps) * (eps - noise))
        terms = {"scores": inject_gradient(x, pull)}
        if config.normal_smoothness:
            maps = drawn["normals"]
            rough = maps.diff(dim=-1).square().mean() + maps.diff(dim=-2).square().mean()
            terms["smooth"] = config.normal_smoothness * rough
        field: Any = self.particles.fields[int(which[0])]
        if config.laplacian:
            if not hasattr(field, "total_variation"):
                raise InputError(f"a {field.family} field has no grid to smooth: leave laplacian at 0")
            terms["laplacian"] = config.laplacian * field.total_variation()
        return Losses(**terms)

    def _geometry_update(self, _: Batch | None, stepper: Stepper) -> Mapping[str, Any]:
        losses = self.geometry_losses(self.config.steps)  # times as at the end of the first stage
        stepper.minimise(losses, "particles")
        return losses.logged()

    def split_fields(self) -> None:
        """Freeze the particles' densities; colours go on from where they are."""
        for number, field in enumerate(self.particles.fields):
            if not isinstance(field, TexturedField):
                assert isinstance(field, VolumeField)
                self.particles.fields[number] = TexturedField(field, deepcopy(field)).train(field.training)

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """The scene; with ``refine`` its geometry and its texture."""
        stages = super().stages(train, val, seed=seed)
        if not self.config.refine:
            return stages
        if not self.particles.seen:
            raise InputError("bare samples have no geometry to refine: leave refine off")
        config = self.config

        def rated(steps: int, rate: float) -> Callable[[], Mapping[str, Optimised]]:
            return lambda: {"particles": self.particle_optimiser(steps, rate)}

        def both() -> Mapping[str, Optimised]:
            trained = [p for p in self.fake.parameters() if p.requires_grad]
            fake = make_optimised(trained, config, config.texture_steps * config.fake_steps, lr=config.lr_fake)
            return {"particles": self.particle_optimiser(config.texture_steps), "fake": fake}

        return [
            *stages,
            Stage(
                "geometry",
                config.geometry_steps,
                update=self._geometry_update,
                optimisers=rated(config.geometry_steps, config.geometry_rate),
            ),
            Stage("texture", config.texture_steps, update=self.update, prepare=self.split_fields, optimisers=both),
        ]
