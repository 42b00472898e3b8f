r"""What score distillation into scenes shares: particles, random cameras, a 2-D prior whose score moves their renders, and who knows the renders' own score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.conditions import Condition, take
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.fake_scores import FakeScore
from limbeck.diffusion.schedules import Schedule, expand
from limbeck.diffusion.scores import inject_gradient
from limbeck.diffusion.time_samplers import TimeSampler, spread_times
from limbeck.methods.fields.base import FieldDistiller
from limbeck.rendering.cameras import Cameras, RandomOrbit
from limbeck.rendering.fields import VolumeField
from limbeck.rendering.particles import REGULARISERS, SceneParticles
from limbeck.rendering.renderers import Renderer, VolumeRenderer
from limbeck.rendering.starts import fresh_scenes
from limbeck.tasks.judging_fields import orbit_pictures, seconds_per_view
from limbeck.tasks.judging_generation import judge_generation
from limbeck.tasks.reference_fields import field_groups
from limbeck.tasks.scenes import SceneSetup, load_scene
from limbeck.tasks.view_priors import PriorSetup, ViewPrior, load_prior

OMEGAS: Mapping[str, Callable[[Schedule, Tensor], Tensor]] = {
    "sigma2": lambda schedule, t: schedule.sigma(t) ** 2,
    "sqrt_a_sigma2": lambda schedule, t: schedule.alpha(t) * schedule.sigma(t) ** 2,
    "alpha": lambda schedule, t: schedule.alpha(t),
    "uniform": lambda schedule, t: torch.ones_like(t),
}


class ViewScoreDistiller(FieldDistiller):
    r"""Base of the methods that move particles so that their renders become likely under a 2-D diffusion model.

    At each step one particle is drawn from B random cameras (bare samples: B of them), x = encode(render), and

    .. math:: x_t = \alpha_t x + \sigma_t \epsilon, \qquad g = \omega(t)\,\big(\epsilon_\psi^w(x_t, t, y^c) - \epsilon_q(x_t, t, c, y)\big),
              \qquad \theta \leftarrow \theta - \eta\, \frac1B \sum_b g_b^T \frac{\partial x_b}{\partial\theta},

    with one time for each image. The prior's condition :math:`y^c` has the view's words; guidance is
    :math:`\epsilon^w = \epsilon_\varnothing + w(\epsilon_y - \epsilon_\varnothing)`, w = 1 being none. Methods differ in :math:`\epsilon_q`, the renders' own
    score: :meth:`own_eps`. Neither network is differentiated; NaN in g counts as 0.

    Times are uniform between two fractions of the schedule; the upper one falls from ``t_high`` to ``t_high_late``, at once after the share
    ``t_switch`` of the steps, or linearly until then.

    Without the engine::

        method = SDS(prior, particles)
        for step in range(500):
            seen = method.look(step)
            loss = method.particle_losses(seen).total
            loss.backward()              # and a step of an optimiser of method.particles
            method.fake_losses(seen)     # VSD and ESD: and a step of one of method.fake

    Args:
        prior: a :class:`~limbeck.tasks.view_priors.ViewPrior`, or any :class:`~limbeck.diffusion.denoisers.Denoiser` for bare samples.
        particles: what is optimised; see :mod:`limbeck.rendering.particles`.
        config: hyper-parameters; or give single ones as keyword arguments.
        cameras: where scenes are seen from; None: as the prior says.
        conditions: one for each bare sample (n, ...); scenes are asked for what the prior says.
        fake_score: the renders' own score, where it is not to be made as the configuration says.
        seed: of the judges.

    Raises:
        InputError: particles that do not fit the prior, settings that contradict each other.
    """

    class Config(FieldDistiller.Config):
        steps: int = Field(400, ge=1, description="updates of the particles")
        batch_size: int = Field(4, ge=1, description="cameras per update (bare samples: samples)")
        lr: float = Field(0.05, gt=0, description="peak learning rate of the particles (of a field's encoding)")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of the learning rates after warm-up"
        )
        betas: tuple[float, float] = Field((0.9, 0.99), description="decay of adam's and adamw's two running means")
        guidance: float = Field(1.0, ge=0, description="guidance weight w of the prior; 1 is none")
        omega: Literal["sigma2", "sqrt_a_sigma2", "alpha", "uniform"] = Field(
            "sigma2", description="weight of the times"
        )
        t_low: float = Field(0.02, ge=0, lt=1, description="smallest noise, as a fraction of the schedule")
        t_high: float = Field(0.98, gt=0, le=1, description="largest noise at first")
        t_high_late: float | None = Field(0.6, gt=0, le=1, description="largest noise later; none: no change")
        t_switch: float = Field(0.4, gt=0, le=1, description="share of the steps after which it is the largest one")
        t_course: Literal["switch", "linear"] = Field("switch", description="how the largest noise falls")
        clip_pull: float | None = Field(
            None, gt=0, description="largest absolute value of the gradient; none: no limit"
        )
        ray_samples: int = Field(24, ge=1, description="samples on each ray")
        sparsity: float = Field(0.0, ge=0, description="weight of the sparsity of opacities")
        opaque: tuple[float, float, float, float] = Field(
            (0.0, 0.0, 0.0, 1.0),
            description="weight of binary opacities: (s0, v0, v1, s1), v0 until step s0, linearly to v1 at s1",
        )
        entropy: float = Field(0.0, ge=0, description="weight of the entropy of the samples' weights")
        orient: float = Field(0.0, ge=0, description="weight of normals that face away from the viewer")
        z_variance: float = Field(0.0, ge=0, description="weight of the variance of depth along rays")
        variation: float = Field(0.0, ge=0, description="weight of the total variation of grids and planes")
        smooth: float = Field(0.0, ge=0, description="weight of smooth normal maps")
        density_noise: float = Field(0.0, ge=0, description="standard deviation of noise on raw densities in training")
        random_background: float = Field(
            0.0, ge=0, le=1, description="share of steps with a random colour behind the field"
        )
        early_size: int | None = Field(None, ge=4, description="side of the renders at first; none: the prior's")
        early_share: float = Field(0.2, ge=0, le=1, description="share of the steps that are drawn at that size")
        judge_views: int = Field(24, ge=2, description="views that results are judged by")

    class Setup(SceneSetup, PriorSetup):
        task: str = Field("faced_sphere", description="an analytic scene whose renders the embedded prior knows")
        view_size: int = Field(16, ge=8, description="side of the renders, in pixels; a pipeline has its own")
        representation: Literal["voxels", "hash", "vm", "mlp", "triplane"] = Field(
            "voxels", description="family of the field"
        )
        resolution: int = Field(24, ge=2, description="of voxels, planes and lines, samples an axis")
        particles: int = Field(1, ge=1, description="scenes that are made side by side")
        subject: Literal["object", "bump", "scene"] = Field(
            "object",
            description="density at the start: an object's blob, a Gaussian bump, or a scene around the cameras",
        )

    def __init__(
        self,
        prior: ViewPrior | Denoiser,
        particles: Any,
        config: Any = None,
        *,
        cameras: RandomOrbit | None = None,
        conditions: Condition = None,
        fake_score: FakeScore | None = None,
        seed: int = 0,
        **overrides: Any,
    ) -> None:
        super().__init__(config, **overrides)
        self.seed = seed
        self.prior = prior if isinstance(prior, ViewPrior) else None
        denoiser = prior.denoiser if isinstance(prior, ViewPrior) else prior
        if not isinstance(denoiser, Denoiser):
            raise InputError(f"the prior is a ViewPrior or a Denoiser, not {type(prior).__name__}")
        self.teacher: Denoiser
        self.add_frozen("teacher", denoiser)
        self.particles = particles
        if particles.seen and self.prior is None:
            raise InputError("scenes need a prior that says how their renders are encoded: give a ViewPrior")
        self.orbit = cameras or (self.prior.orbit if self.prior is not None else None)
        self.conditions = conditions
        if isinstance(conditions, Tensor) and len(conditions) != len(particles):
            raise InputError(f"{len(particles)} particles need as many conditions, not {len(conditions)}")
        _check_times(self.config)
        if particles.seen:
            particles.terms = tuple(
                name
                for name in REGULARISERS
                if _weight(self.config, name, 0) or (name == "opaque" and max(self.config.opaque[1:3]))
            )
            for field in particles.fields:
                field.density_noise = self.config.density_noise
        self.fake: Any = fake_score if fake_score is not None else self.make_fake()

    # ---- what a method defines -------------------------------------------------------------------------------------------

    def make_fake(self) -> FakeScore | None:
        """What predicts the renders' own noise; None: nothing."""
        return None

    def own_eps(self, seen: Seen) -> Tensor:
        r""":math:`\epsilon_q` (B, ...), without gradient."""
        raise NotImplementedError(f"{type(self).__name__} does not say what the renders' own score is")

    # ---- one step --------------------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        return self.teacher.schedule

    def times(self, step: int) -> TimeSampler:
        """Where times are drawn at a step."""
        config = self.config
        high = config.t_high
        if config.t_high_late is not None:
            done = step / max(1.0, config.t_switch * config.steps)
            share = min(1.0, done) if config.t_course == "linear" else float(done >= 1)
            high += share * (config.t_high_late - high)
        return spread_times(self.schedule, config.t_low, high)

    def look(self, step: int = 0, count: int | None = None) -> Seen:
        """Draw particles as they are now, with gradient, and noise them.

        Args:
            step: of the run, for what changes in its course. count: images; None: ``batch_size``.
        """
        config = self.config
        count = config.batch_size if count is None else count
        cameras = None
        if self.particles.seen:
            assert self.orbit is not None and self.prior is not None
            which = torch.randint(len(self.particles), (1,))
            size = self.prior.render_size
            if config.early_size is not None and step < config.early_share * config.steps:
                size = config.early_size
            cameras = self.orbit.sample(count, step=step).resized(size, size).to(self.device)
            background = (
                torch.rand(3) if config.random_background and float(torch.rand(())) < config.random_background else None
            )
            drawn = self.particles.draw(which, cameras, background=background)
            x = self.encoded(drawn.pop("images"))
        else:
            which = (
                torch.randint(len(self.particles), (count,))
                if count < len(self.particles)
                else torch.arange(len(self.particles))
            )
            drawn = self.particles.draw(which.to(self.device), None)
            x = drawn.pop("images")
        of_view, plain = self.asked_for(which, cameras, len(x))
        t = self.times(step)(len(x), device=x.device)
        noise = torch.randn_like(x)
        with torch.no_grad():
            x_t = self.schedule.add_noise(x, noise, t)
        vectors = None if cameras is None else cameras.c2w.flatten(1)
        return Seen(x, x_t, t, noise, of_view, plain, vectors, drawn, step)

    def encoded(self, images: Tensor) -> Tensor:
        """Renders (B, 3, H, W) in [0, 1] in the prior's space, resized where they have another size."""
        assert self.prior is not None
        size = self.prior.render_size
        if images.shape[-1] != size:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        return self.prior.encode(images)

    def asked_for(self, which: Tensor, cameras: Cameras | None, count: int) -> tuple[Any, Any]:
        """The prior's condition with view words, and the plain one."""
        if self.prior is not None and self.conditions is None:
            return self.prior.condition(cameras, count)
        if self.conditions is None:
            return None, None
        own = take(self.conditions, which.expand(count) if len(which) == 1 else which)
        return own, own

    @torch.no_grad()
    def score_gradient(self, seen: Seen) -> Tensor:
        """g (B, ...): what the renders move against."""
        eps = self.teacher.predict(seen.x_t, seen.t, seen.of_view, "eps", self.config.guidance)
        pull = expand(OMEGAS[self.config.omega](self.schedule, seen.t), eps) * (eps - self.own_eps(seen))
        pull = torch.nan_to_num(pull)
        return pull if self.config.clip_pull is None else pull.clamp(-self.config.clip_pull, self.config.clip_pull)

    def particle_losses(self, seen: Seen) -> Losses:
        """A scalar whose gradient is g (a sum over pixels, a mean over images), and the regularisers."""
        pull = self.score_gradient(seen)
        terms = {"scores": inject_gradient(seen.x, pull)}
        for name in REGULARISERS:
            weight = _weight(self.config, name, seen.step)
            if weight and name in seen.terms:
                terms[name] = weight * seen.terms[name]
        return Losses(**terms).observe(pull=pull.abs().mean())

    def losses(self, batch: Batch) -> Losses:
        """The particles' loss at step 0's settings; a batch says nothing but its size."""
        return self.particle_losses(self.look(0))

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One update of the particles."""
        seen = self.look(stepper.step)
        losses = self.particle_losses(seen)
        stepper.minimise(losses, "particles")
        return losses.logged()

    # ---- run -------------------------------------------------------------------------------------------------------------

    def particle_optimiser(self, steps: int, rate: float | None = None) -> Optimised:
        """Fields with their families' proportions of rates; bare samples with one rate (None: ``lr``)."""
        peak = self.config.lr if rate is None else rate
        groups: list[Any] = (
            [group for field in self.particles.fields for group in field_groups(field, peak)]
            if self.particles.seen
            else list(self.particles.parameters())
        )
        return make_optimised(groups, self.config, steps, lr=peak)

    def optimisers(self) -> Mapping[str, Optimised]:
        return {"particles": self.particle_optimiser(self.config.steps)}

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One loop without data."""
        return [Stage("distillation", self.config.steps, update=self.update, optimisers=self.optimisers)]

    # ---- building --------------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> tuple[Self, Any]:
        """A prior, fields, and the scene whose true views stand beside the result."""
        _check_times(config)
        prior = load_prior(setup, setup, progress=progress)
        task = load_scene(SceneSetup.make(**{k: getattr(setup, k) for k in SceneSetup.model_fields}))
        made = cls(prior, cls.fresh(setup, config), config, seed=seed)
        made.on = task
        return made, task

    @classmethod
    def fresh(cls, setup: Any, config: Any) -> SceneParticles:
        """The particles of a run by name."""
        return fresh_scenes(setup.representation, setup.particles, setup.subject, setup.resolution, config.ray_samples)

    @classmethod
    def from_data(cls, data: Data, student: Any, teacher: Any, config: Any, *, seed: int = 0) -> Self:
        """The method on a user's own prior (``teacher``) and particles or field (``student``)."""
        if teacher is None or student is None:
            raise InputError(f"{cls.name} needs teacher=… (a ViewPrior) and student=… (a field, fields, or particles)")
        fields = [student] if isinstance(student, VolumeField) else student
        particles = SceneParticles(fields, config.ray_samples) if isinstance(fields, Sequence) else fields
        return cls(teacher, particles, config, seed=seed)

    # ---- judging and keeping the result -----------------------------------------------------------------------------------

    @property
    def result(self) -> nn.Module:
        found: nn.Module = self.particles
        return found

    def renderers(self) -> dict[str, Renderer]:
        """The first particle; beside it the scene whose renders the prior knows, where there is one."""
        if not self.particles.seen:
            raise InputError("bare samples are not drawn: look at particles.samples")
        found: dict[str, Renderer] = {"student": self.particles.renderers()[0]}
        for number, renderer in enumerate(self.particles.renderers()[1:], 1):
            found[f"particle {number + 1}"] = renderer
        return found

    def seen_from(self, views: Any) -> Cameras | None:
        """Cameras all around, as the prior's images are seen."""
        if self.prior is None:
            return None
        if self.prior.references is not None:
            return self.prior.references.cameras
        return self.orbit.sample(1) if self.orbit is not None else None

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """How near the renders are to the prior's images, how much views and particles differ; and turntables."""
        assert self.prior is not None
        renderers = self.renderers()
        self.eval()
        first = next(iter(renderers.values()))
        row = {"who": "student", **self._judged(list(renderers.values()))}
        cameras = self.seen_from(None)
        assert cameras is not None
        row["seconds_per_view"] = seconds_per_view(first, cameras)
        row["parameters"] = sum(p.numel() for p in first.module.parameters())
        rows = [row]
        shown = dict(renderers)
        truth = None if self.on is None else self.on.truth
        if truth is not None and self.prior.references is not None:
            true = VolumeRenderer(truth, 128)
            rows.append({"who": "the scene itself", **self._judged([true])})
            shown["the scene itself"] = true
        size = max(48, cameras.width)
        return {"rows": rows, "pictures": orbit_pictures(shown, cameras, 8, size)}

    def _judged(self, renderers: list[Renderer]) -> dict[str, Any]:
        """Measures of generated objects, what matters most first."""
        assert self.prior is not None
        found = judge_generation(renderers, self.prior, self.config.judge_views, self.seed)
        return {k: found[k] for k in sorted(found, key=lambda name: name != "nearest_distance")}


class Seen:
    """Renders of one step: ``x`` (B, ...) with gradient, noised ``x_t`` at ``t`` (B,) by ``noise``; the prior's condition ``of_view`` and the plain
    one; ``camera`` (B, 16) or None; the regularisers' ``terms``; the ``step``."""

    def __init__(
        self,
        x: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        of_view: Any = None,
        plain: Any = None,
        camera: Tensor | None = None,
        terms: Mapping[str, Tensor] | None = None,
        step: int = 0,
    ) -> None:
        self.x, self.x_t, self.t, self.noise = x, x_t, t, noise
        self.of_view, self.plain, self.camera, self.terms, self.step = of_view, plain, camera, dict(terms or {}), step


def _weight(config: Any, name: str, step: int) -> float:
    if name == "opaque":
        first, low, high, last = config.opaque
        share = min(1.0, max(0.0, (step - first) / max(1e-9, last - first)))
        return float(low + share * (high - low))
    return float(getattr(config, name, 0.0))


def _check_times(config: Any) -> None:
    for name in ("t_high", "t_high_late"):
        high = getattr(config, name)
        if high is not None and high <= config.t_low:
            raise InputError(f"{name} must be above t_low (got {high} and {config.t_low})")
