r"""What score distillation shares: a one-step generator, the teacher's score, and the score of the generator's own samples, learned on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from limbeck.blocks.lora import Adapted, LoRA
from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.conditions import drop, rows
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import Weight, denoising_loss, edm_weight
from limbeck.diffusion.onestep import OneStepGenerator
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, expand
from limbeck.diffusion.scores import dmd_gradient, inject_gradient, l1_size, vsd_gradient
from limbeck.diffusion.time_samplers import LogNormal, TimeSampler, spread_times
from limbeck.methods.samplers.base import SamplerDistiller


class ScoreDistiller(SamplerDistiller):
    r"""Base of the methods that pull a generator's samples along the difference of two scores.

    Three denoisers: the frozen teacher (*real*: the score of the data's noised law), the student as a one-step generator
    :math:`x = G(z, c)`, and the *fake* network, which follows the score of the student's own noised law. Each step updates the student
    through :meth:`generator_losses` and the fake network by denoising the student's samples (:meth:`fake_losses`). No images are needed.

    The fake network is the teacher with low-rank adapters (``lora``: no second copy of the weights; off, it is the teacher), a trainable copy of
    the teacher (``copy``), or a denoiser of one's own. It works without dropout always. With gradient checkpointing adapters serve methods whose
    generator step runs the fake network without gradients; the others need ``copy``.

    Without the engine::

        method = SwiftBrush(teacher, labels)
        for cond in batches_of_conditions:
            x = method.generate(cond)
            method.generator_losses(x, cond).total.backward()   # and a step of an optimiser of method.student
            with method.adapted():
                method.fake_losses(x.detach(), cond).total.backward()   # and a step of one of method.fake
            method.follow(0)                                    # the running average

    Args:
        teacher, conditions, student, config, shape, seed: see :class:`~limbeck.methods.samplers.base.SamplerDistiller`.
        fake_denoiser: the fake network, in the teacher's schedule; None: made from the teacher as ``fake`` says.

    Attributes:
        fake: the fake network; None with ``fake="none"``.
        lora: its adapters, or None.
        fake_first: whether a step updates the fake network before the student.
        fresh_samples: whether the fake network learns from samples of their own instead of those that the student was just updated with.

    Raises:
        InputError: a teacher that cannot be copied or adapted, or a fake network of another schedule.
    """

    fake_first: ClassVar[bool] = False
    fresh_samples: ClassVar[bool] = False

    class Config(SamplerDistiller.Config):
        steps: int = Field(500, ge=1, description="updates of the student")
        betas: tuple[float, float] = Field((0.0, 0.999), description="decay of adam's and adamw's two running means")
        schedule: Literal["constant", "cosine", "linear", "poly", "step"] = Field(
            "constant", description="course of the learning rates after warm-up"
        )
        fake: Literal["lora", "copy", "none"] = Field(
            "lora",
            description="what follows the score of the student's samples: adapters on the teacher, a copy of it, or nothing (score "
            "distillation sampling)",
        )
        rank: int = Field(8, ge=1, description="rank of the adapters")
        lora_alpha: float | None = Field(None, gt=0, description="their scale times the rank; none: the rank")
        lora_targets: tuple[str, ...] = Field(
            (), description="endings of the layers' paths that get adapters; none: every linear and convolutional layer"
        )
        lr_fake: float = Field(1e-3, gt=0, description="learning rate of the fake network")
        fake_steps: int = Field(1, ge=1, description="updates of the fake network per update of the student")
        cond_dropout: float = Field(
            0.1, ge=0, le=1, description="share of conditions that the fake network learns without"
        )
        t_init: float | None = Field(
            None, gt=0, description="time at which the student is asked; none: t_max, or noise 2.5 for the schedule edm"
        )
        t_low: float = Field(
            0.02, ge=0, lt=1, description="smallest noise that samples are compared at, as a fraction of the schedule"
        )
        t_high: float = Field(0.98, gt=0, le=1, description="largest one")
        fake_log_mean: float = Field(-0.4, description="schedule edm: mean of ln sigma that the fake network learns at")
        fake_log_std: float = Field(1.2, gt=0, description="its standard deviation")

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
        **overrides: Any,
    ) -> None:
        super().__init__(teacher, conditions, student, config, shape=shape, seed=seed, **overrides)
        if self.config.t_low >= self.config.t_high:
            raise InputError(f"t_low must be below t_high (got {self.config.t_low} and {self.config.t_high})")
        OneStepGenerator(self.student, self.config.t_init)  # a start that cannot be is refused here
        self.fake: Denoiser | None = self._make_fake(fake_denoiser)
        self.generator_times = spread_times(self.teacher.schedule, self.config.t_low, self.config.t_high)
        self.fake_times = self.make_fake_times()

    def _make_fake(self, given: Denoiser | None) -> Denoiser | None:
        if given is not None:
            if given.schedule != self.teacher.schedule:
                raise InputError(
                    f"the fake network's schedule is {given.schedule!r}, the teacher's {self.teacher.schedule!r}: both are asked at "
                    "the same noisy samples"
                )
            return given.requires_grad_(True)
        if self.config.fake == "none":
            return None
        if not any(True for _ in self.teacher.parameters()):
            raise InputError("the teacher has no weights to start the fake network from: give fake_denoiser=…")
        if self.config.fake == "copy":
            return deepcopy(self.teacher).requires_grad_(True)
        lora = LoRA(self.teacher.module, self.config.rank, self.config.lora_alpha, self.config.lora_targets or None)
        lora.enabled = False  # whoever asks the teacher gets the teacher
        return self.teacher.with_module(Adapted(lora))

    # ---- parts -----------------------------------------------------------------------------------------------------------

    @property
    def real(self) -> Denoiser:
        """Whose score the samples are pulled by."""
        return self.teacher

    @property
    def online(self) -> Denoiser:
        """The fake network.

        Raises:
            InputError: there is none.
        """
        if self.fake is None:
            raise InputError(f"{self.name} was made without a fake network (fake='none')")
        return self.fake

    @property
    def lora(self) -> LoRA | None:
        module = None if self.fake is None else self.fake.module
        return module.lora if isinstance(module, Adapted) else None

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Inside, the adapters are on also where the backward pass runs parts of the network again (gradient checkpointing)."""
        lora = self.lora
        if lora is None:
            yield
            return
        before, lora.enabled = lora.enabled, True
        try:
            yield
        finally:
            lora.enabled = before

    @property
    def generator(self) -> OneStepGenerator:
        """The student as ``(z, cond) -> x``."""
        return OneStepGenerator(self.student, self.config.t_init)

    def make_fake_times(self) -> TimeSampler:
        """At which times the fake network learns: all of the schedule evenly; for ``edm`` ln sigma normal."""
        schedule = self.teacher.schedule
        if isinstance(schedule, EDM):
            return LogNormal(self.config.fake_log_mean, self.config.fake_log_std, schedule.t_min, schedule.t_max)
        return spread_times(schedule)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.fake is not None:
            self.fake.eval()
        return self

    # ---- one step --------------------------------------------------------------------------------------------------------

    def generate(self, cond: Any, z: Tensor | None = None, *, count: int | None = None) -> Tensor:
        """Samples of the student (B, ...) for conditions, with gradient.

        Args:
            cond: (B, ...), or None.
            z: unit noise (B, ...); drawn if None.
            count: B, where neither says it.
        """
        if z is None:
            z = self.unit_noise(rows(cond) or count or self.config.batch_size)
        found: Tensor = self.generator(z, cond)
        return found

    def generator_losses(self, x: Tensor, cond: Any) -> Losses:
        """The student's loss on its samples x (B, ...), which carry the gradient."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss of the generator")

    def fake_objective(self) -> tuple[str, Weight | None]:
        """In which space, and with which weight of the times, the fake network learns to denoise: as the teacher was trained, that is."""
        if self.teacher.precond == "edm":
            return "x0", edm_weight(self.teacher.sigma_data)
        prediction = self.online.prediction
        return ("eps" if prediction == "score" else prediction), None

    def fake_losses(self, x: Tensor, cond: Any) -> Losses:
        """Denoising of the student's samples x (B, ...), detached; some conditions are dropped."""
        space, weight = self.fake_objective()
        if self.teacher.conditional:
            cond = drop(cond, self.teacher.null_cond, self.config.cond_dropout)
        t = self.fake_times(len(x), device=x.device)
        return Losses(fake=denoising_loss(self.online, x.detach(), t, cond, space=space, weight=weight))

    def losses(self, batch: Batch) -> Losses:
        """The student's loss on a batch of conditions; the fake network learns by :meth:`fake_losses`."""
        _, cond = self.unpack(batch)
        return self.generator_losses(self.generate(cond, count=len(batch)), cond)

    def update(self, batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
        """One update of the student and ``fake_steps`` of the fake network, in the method's order."""
        assert batch is not None
        _, cond = self.unpack(batch)
        size = len(batch)
        logged: dict[str, Tensor] = {}
        if self.fake_first:
            logged |= self._update_fake(cond, size, None, stepper)
        x = self.generate(cond, count=size)
        losses = self.generator_losses(x, cond)
        stepper.minimise(losses, "student")
        logged |= losses.logged()
        if not self.fake_first:
            logged |= self._update_fake(cond, size, None if self.fresh_samples else x.detach(), stepper)
        return logged

    def _update_fake(self, cond: Any, size: int, x: Tensor | None, stepper: Stepper) -> dict[str, Tensor]:
        if self.fake is None:
            return {}
        logged: dict[str, Tensor] = {}
        for _ in range(self.config.fake_steps):
            if x is None:
                with torch.no_grad():
                    x = self.generate(cond, count=size)
            with self.adapted():
                losses = self.fake_losses(x, cond)
                stepper.minimise(losses, "fake")
            logged = {k: v for k, v in losses.logged().items() if k != "loss"}
            x = None  # every further update sees new samples
        return logged

    # ---- run -------------------------------------------------------------------------------------------------------------

    def score_optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """Those of the student and of the fake network."""
        made = dict(self.optimised(steps))
        if self.fake is not None:
            trained = [p for p in self.fake.parameters() if p.requires_grad]
            made["fake"] = make_optimised(trained, self.config, steps * self.config.fake_steps, lr=self.config.lr_fake)
        return made

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """One loop over the conditions."""
        steps = self.config.steps
        return [
            Stage(
                "distillation",
                steps,
                self.condition_stream(seed),
                update=self.update,
                optimisers=lambda: self.score_optimisers(steps),
                after_step=self.follow,
            )
        ]

    def sampler(self) -> Sampler:
        """The averaged student in one step."""
        return Sampler.one_step(self.averaged, self.config.t_init)


class VariationalDistiller(ScoreDistiller):
    r"""Base of the methods whose gradient is the score difference itself: :math:`\partial L/\partial x \propto \epsilon_{real} - \epsilon_{fake}`.

    It lowers the reverse KL divergence :math:`E_t\,\omega(t)\,KL(q_t^\theta \| p_t)` of the noised laws. Neither network is differentiated.
    Without a fake network the drawn noise takes its place (score distillation sampling).
    """

    class Config(ScoreDistiller.Config):
        guidance: float = Field(1.5, ge=0, description="guidance weight w of the teacher; 1 is none")
        guide_fake: bool = Field(True, description="guide the fake network with the same weight")
        weight: Literal["sigma2", "dmd", "uniform"] = Field(
            "sigma2",
            description="weight of the difference: share of noise in the variance at t, distribution matching's normaliser, or 1",
        )

    def score_gradient(self, x: Tensor, cond: Any) -> Tensor:
        r"""The gradient with respect to samples (B, ...) at one random time each; no graph. NaN becomes 0.

        ``sigma2``: :math:`\frac{\sigma^2}{\alpha^2+\sigma^2}(\epsilon_{real}-\epsilon_{fake})`, which is the published :math:`\sigma_t^2` where the
        schedule keeps the variance, and has no scale elsewhere (our decision). ``dmd``:
        :math:`(\hat x_{fake} - \hat x_{real})/\mathrm{mean}|x - \hat x_{real}|`.
        """
        x, config = x.detach(), self.config
        t = self.generator_times(len(x), device=x.device)
        noise = torch.randn_like(x)
        x_t = self.real.schedule.add_noise(x, noise, t)
        fake_guidance = config.guidance if config.guide_fake else 1.0
        if self.fake is None:
            found = self._without_fake(x, x_t, t, noise, cond)
        elif config.weight == "dmd":
            found = dmd_gradient(
                self.fake, self.real, x, x_t, t, cond, guidance=config.guidance, fake_guidance=fake_guidance
            )
        else:
            found = vsd_gradient(
                self.fake,
                self.real,
                x_t,
                t,
                cond,
                guidance=config.guidance,
                fake_guidance=fake_guidance,
                weight=self._omega,
            )
        return torch.where(torch.isnan(found), 0.0, found)

    @torch.no_grad()
    def _without_fake(self, x: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, cond: Any) -> Tensor:
        """The noise that was added in the place of the fake network's prediction; in x0 that is x itself."""
        if self.config.weight == "dmd":
            clean = self.real.predict(x_t, t, cond, "x0", self.config.guidance)
            return (x - clean) / expand(l1_size(x, clean), x)
        difference = self.real.predict(x_t, t, cond, "eps", self.config.guidance) - noise
        return expand(self._omega(t), x) * difference

    def _omega(self, t: Tensor) -> Tensor:
        if self.config.weight == "uniform":
            return torch.ones_like(t)
        alpha, sigma = self.real.schedule.alpha(t), self.real.schedule.sigma(t)
        return sigma**2 / (alpha**2 + sigma**2)

    def pull(self, x: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        r"""A scalar with gradient ``g / (B D)`` on x (B, ...), D numbers in each sample (as a mean over all elements), and g."""
        gradient = self.score_gradient(x, cond)
        return inject_gradient(x, gradient) / x[0].numel(), gradient

    def generator_losses(self, x: Tensor, cond: Any) -> Losses:
        loss, gradient = self.pull(x, cond)
        return Losses(scores=loss).observe(pull=gradient.abs().mean())
