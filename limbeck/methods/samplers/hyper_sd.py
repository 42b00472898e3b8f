"""Hyper-SD: trajectory-segmented consistency, human feedback, and score distillation for one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from limbeck.core.batch import Batch, Losses, map_tensors
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stepper
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import denoising_loss
from limbeck.diffusion.onestep import scaled_noise
from limbeck.diffusion.pairs import PairStore
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.scores import dmd_gradient, inject_gradient
from limbeck.diffusion.time_samplers import Uniform
from limbeck.losses.feedback import reward_loss
from limbeck.methods.samplers.consistency_base import adapted_copy, on_grid, plain_network
from limbeck.methods.samplers.feedback_base import FeedbackBase


class HyperSD(FeedbackBase):
    r"""Hyper-SD: one student that samples in 1 to 8 steps, from three parts that can be had by themselves.

    **Trajectory-segmented consistency.** On a grid :math:`0 = t_0 < \dots < t_N = T`, in stages of k = 8, 4, 2, 1 segments of
    m = floor(N / k) points, with :math:`\Psi(x, \hat x_0, t \to s)` the step of DDIM, n uniform in 1 … N, the segment's border
    :math:`b = \lfloor (n-1)/m \rfloor m` and the end e uniform in b … n - 1:

    .. math:: p = \Psi(x_{t_n}, \hat x_0^\theta, t_n \to t_e), \qquad
              y = \Psi(\tilde x, \hat x_0^{\theta^-}(\tilde x, t_{n-1}), t_{n-1} \to t_e), \qquad \tilde x = \mathrm{teacher}(x_{t_n}, t_n \to t_{n-1})

    .. math:: L = \lambda_{mse}(k)\,\lVert p - y \rVert^2 + \lambda_{adv}(k)\,\mathrm{softplus}(-D(p, t_e | x_{t_n}, t_n))

    (mean over dimensions); at e = n - 1 the target is :math:`\tilde x` itself, and no gradient flows into targets. Each stage goes on from the
    last one's weights with a new slow average :math:`\theta^-`. The student gets no further input (``s_embedding`` tells it :math:`t_e`).
    ``segments=(1,)`` is consistency trajectory distillation done directly, ``ends="boundary"`` phased consistency, ``segments=(1,)`` with
    ``ends="zero"`` and ``gamma=1`` latent consistency.

    **One step** (``one_step_steps``). With probability ``one_step_share`` a sample is x = G(z), the prediction from pure noise, and its loss

    .. math:: \mathrm{mean}(sg(d)\, x) + \lambda_r \lVert G(z') - x' \rVert^2 + L_{aes}(x), \qquad
              d = \frac{\hat x_0^{fake}(x_t) - \hat x_0^{real}(x_t)}{\mathrm{mean}|x - \hat x_0^{real}|}

    with a fake score network fitted to the student's samples, and pairs (z', x') of the student's own few-step sampler before this stage;
    the other samples keep the loss above (unified training, so that the same weights serve more steps). Without ``s_embedding`` one
    prediction at T cannot both end at the sample and lead along the trajectory to a time between, so more steps want new noise in each
    (``gamma=1``, as published for these weights) afterwards.

    **Feedback** (``feedback_steps``). Low-rank adapters of their own are trained by
    :math:`\sum_d \mathrm{mean}\,\mathrm{ReLU}(a_d - r_d(x', c)) + \lambda\, L(m(x''), y)`, x' being a few-step sample with gradient through its last
    step alone, x'' the prediction from a noised real sample with labels y; then they are merged.

    What the paper leaves open, and our decisions: weights by stage, and a small weight of the adversary; feedback comes last, so that its
    adapters are learned on the very model they are merged with; noise on the input (``input_noise_std``) reaches the network and not
    the jump; the teacher's original ODE is followed in all stages (``solver_teacher``); discriminator and its optimiser's moments: one
    discriminator through all stages, new moments in each; rounds of half one-step samples.

    Source: "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis" (2024); parts from "Consistency Trajectory
    Models" (2023), "SDXL-Lightning" (2024), "Phased Consistency Models" (2024), "Trajectory Consistency Distillation" (2024, the
    sampler) and "One-step Diffusion with Distribution Matching Distillation" (2024).

    Args:
        rewards: what feedback asks for, see :class:`~limbeck.losses.feedback.Reward`; their functions get decoded samples and conditions.
        task_model, criterion: of the perceptual loss: m, and (output, labels) -> scalar; labels are the batch's.
        decoder: latents -> images with gradient, for both; None: the pipeline's own, or samples as they are.
    """

    name = "hyper-sd"

    class Config(FeedbackBase.Config):
        sampling_steps: int | None = Field(
            None,
            ge=1,
            description="steps of the resulting sampler; none: segments of the last stage, or 1 after one-step training",
        )
        gamma: float | None = Field(
            None,
            ge=0,
            le=1,
            description="noise of the resulting sampler: 0 none, 1 all of it anew in each step; none: 1 after one-step training, else 0",
        )
        one_step_steps: int = Field(0, ge=0, description="updates of the stage for one step; 0: none")
        one_step_share: float = Field(
            0.5, gt=0, le=1, description="share of one-step samples in a batch there; 1: they alone"
        )
        one_step_start: float = Field(
            1.0, gt=0, le=1, description="time of one-step sampling as a share of t_max (0.8 for SDXL)"
        )
        lr_one_step: float | None = Field(None, gt=0, description="learning rate of that stage; none: a tenth of --lr")
        lr_fake: float = Field(5e-4, gt=0, description="learning rate of the fake score network")
        fake_updates: int = Field(1, ge=1, description="its updates for each of the student's")
        dmd: float = Field(0.25, ge=0, description="weight of the distribution-matching gradient")
        segment_weight: float = Field(
            4.0,
            ge=0,
            description="weight of the segments' loss beside that of one step, times the last stage's weights",
        )
        regression: float = Field(
            0.25, ge=0, description="weight of the squared error to few-step samples from the same noise"
        )
        pair_steps: int = Field(4, ge=1, description="steps of the sampler that makes those")
        time_low: float = Field(0.02, ge=0, lt=1, description="lowest time of the scores, as a share of t_max")
        time_high: float = Field(0.98, gt=0, le=1, description="highest time of the scores, as a share of t_max")
        presets = {
            "paper": {
                "steps": 200_000,
                "batch_size": 512,
                "optimizer": "adamw",
                "lr": 1e-6,
                "schedule": "constant",
                "points": 50,
                "guidance": 7.5,
                "lora_rank": 64,
                "one_step_steps": 20_000,
                "one_step_start": 0.8,
            },
            "ctm": {"segments": (1,), "adversary": "none"},
            "pcm": {
                "ends": "boundary",
                "adversary": "levels",
                "adversarial_weights": (1.0,),
                "adversarial": 0.1,
                "lr_discriminator": 1e-5,
            },
        }

        @model_validator(mode="after")
        def _times(self) -> Any:
            if self.time_low >= self.time_high:
                raise ValueError(f"time_low must be below time_high (got {self.time_low} and {self.time_high})")
            return self

    def __init__(
        self, teacher: Any, conditions: Any = None, student: Denoiser | None = None, config: Any = None, **more: Any
    ) -> None:
        super().__init__(teacher, conditions, student, config, **more)
        self.fake: Denoiser | None = None
        if self.config.one_step_steps:
            self.fake = adapted_copy(self.teacher, self.config.lora_rank, self.config.lora_alpha)
            if float(
                self.teacher.schedule.alpha(torch.tensor(self.one_step_time))
            ) < 1e-3 and self.student.prediction in ("eps", "score"):
                raise InputError(
                    f"at t = {self.one_step_time:g} there is no signal left, so x0 cannot be had from '{self.student.prediction}': lower "
                    "one_step_start, or take a teacher that predicts v, flow or x0"
                )

    # ---- one step --------------------------------------------------------------------------------------------------------

    @property
    def one_step_time(self) -> float:
        return float(self.config.one_step_start * self.teacher.schedule.t_max)

    def generate(self, z: Tensor, cond: Any) -> Tensor:
        """G(z): the student's prediction from unit noise alone (B, ...), with gradient."""
        t = torch.full((len(z),), self.one_step_time, device=z.device)
        with self.told(self.student.module, torch.zeros_like(t)):
            return self.student.predict(scaled_noise(self.student, z, self.one_step_time), t, cond)

    def score_times(self, count: int) -> Tensor:
        """(count,) times at which scores are compared and fitted."""
        schedule = self.teacher.schedule
        if schedule.name == "edm":  # even in time would mean noise almost everywhere
            low, high = (1e-3 + (1 - 2e-3) * e for e in (self.config.time_low, self.config.time_high))
            part = low + (high - low) * torch.rand(count, device=self.device)
            bend = 1 / 7
            return (schedule.t_min**bend + part * (schedule.t_max**bend - schedule.t_min**bend)) ** 7
        return Uniform(self.config.time_low * schedule.t_max, self.config.time_high * schedule.t_max)(
            count, device=self.device
        )

    def matching_losses(self, z: Tensor, cond: Any) -> tuple[Losses, Tensor]:
        """The one-step loss on unit noise (B, ...), and the samples. Gradients go to the student alone."""
        assert self.fake is not None
        made = self.generate(z, cond)
        t = self.score_times(len(z))
        x_t = self.teacher.schedule.add_noise(made.detach(), torch.randn_like(made), t)
        weight = 1.0 if cond is None else self.teacher_guidance
        gradient = dmd_gradient(self.fake, self.teacher, made.detach(), x_t, t, cond, guidance=weight)
        # The library's gradients are summed over dimensions; all terms here are means over them.
        losses = Losses(dmd=(float(self.config.dmd), inject_gradient(made, gradient) / made[0].numel()))
        if self.rewards and self.config.feedback_weight:
            value, means = reward_loss(self.pictured(made), cond, self.rewards)
            losses.add("reward", value, float(self.config.feedback_weight)).observe(**means)
        return losses, made

    def fake_losses(self, made: Tensor, cond: Any) -> Losses:
        """The fake score network's denoising loss on the student's samples (B, ...)."""
        assert self.fake is not None
        t = self.score_times(len(made))
        return Losses(fake=denoising_loss(self.fake, made.detach(), t, cond, space=self.fake.prediction))

    def one_step_update(self, store: PairStore | None) -> Callable[[Batch | None, Stepper], Mapping[str, Tensor]]:
        def update(batch: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            assert batch is not None
            x0, cond = self.unpack(batch)
            assert x0 is not None
            ones = max(1, round(self.config.one_step_share * len(x0)))
            first = map_tensors(cond, lambda v: v[:ones])
            losses, made = self.matching_losses(torch.randn_like(x0[:ones]), first)
            if store is not None:
                z, wanted, asked = store.batch(torch.randint(store.done, (ones,)), self.device)
                losses.add(
                    "regression", (self.generate(z, asked) - wanted).square().mean(), float(self.config.regression)
                )
            if ones < len(x0):
                jump = self.draw(x0[ones:], map_tensors(cond, lambda v: v[ones:]))
                wanted, leapt = self.aim(jump), self.leap(jump)
                for name, value in self.jump_losses(jump, leapt, wanted).items():
                    losses.add(name, value, float(self.config.segment_weight) * self.jump_weight(name))
            logged = losses.logged()
            stepper.minimise(losses, "student")
            if ones < len(x0) and self.adversarial_weight > 0:
                stepper.minimise(self.discriminator_losses(jump, leapt, wanted), "discriminator")
            for _ in range(self.config.fake_updates):
                fake = self.fake_losses(made, first)
                stepper.minimise(fake, "fake")
            return {**logged, "fake": fake["fake"].detach()}

        return update

    def jump_weight(self, name: str) -> float:
        """The weight of a term of :meth:`jump_losses`."""
        return self.stage_weight(self.config.mse_weights) if name == "mse" else self.adversarial_weight

    def own_few_step(self) -> Sampler:
        """What makes the pairs: the student before this stage, without guidance of its own."""
        return self.few_step(self.config.pair_steps, self.ema.module, guided=False, gamma=0.0)

    def one_step_stages(self, stream: Any, kept: Mapping[str, Any], seed: int) -> list[Stage]:
        """Pairs of the student's own few-step sampler, then the stage itself."""
        steps, last = self.config.one_step_steps, len(self.config.segments) - 1
        assert self.fake is not None
        fake = self.fake
        rate = self.config.lr / 10 if self.config.lr_one_step is None else self.config.lr_one_step

        def optimisers() -> Mapping[str, Optimised]:
            parts = dict(self.segment_optimisers(steps))
            parts["student"] = self.optimised(steps, lr=rate)["student"]
            parts["fake"] = make_optimised(
                fake.parameters(), self.config, steps * self.config.fake_updates, lr=self.config.lr_fake
            )
            return parts

        stages, state, store = [], dict(kept), None
        if self.config.regression > 0:
            store = self.make_store("few-step")
            stages.append(self.pair_stage("few-step", store, self.own_few_step, mix_seed(seed, 29)))
            state["few-step"] = store
        stages.append(
            Stage(
                "one-step",
                steps,
                stream,
                update=self.one_step_update(store),
                optimisers=optimisers,
                prepare=lambda: self.enter(last),
                begin=self.restart_averages,
                after_step=self.follow,
                state=state,
            )
        )
        return stages

    # ---- the run ---------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        before, stream, kept = self.samples_of(train, seed)
        found = [*before, *self.segment_stages(stream, kept)]
        if self.config.one_step_steps:
            found += self.one_step_stages(stream, kept, seed)
        if self.config.feedback_steps:
            found.append(self.feedback_stage(stream, kept))
        return found

    # ---- the result ------------------------------------------------------------------------------------------------------

    def few_step(
        self, steps: int, network: nn.Module | None = None, *, guided: bool = True, gamma: float | None = None
    ) -> Sampler:
        """A sampler in so many steps on the borders of as many segments.

        Args:
            network: None: the result.
            guided: apply guidance where it was preserved.
            gamma: None: the usual one.
        """
        times = self.borders(steps).double().cpu()
        if steps == 1:
            times[0] = self.one_step_time
        made = on_grid(self.result() if network is None else network, times)
        preserved = guided and self.config.guidance_mode == "preserved"
        return Sampler(
            self.student.with_module(made),
            times,
            "tcd",
            guidance=float(self.config.guidance) if preserved else 1.0,
            gamma=self.usual_gamma if gamma is None else gamma,
        )

    @property
    def usual_gamma(self) -> float:
        if self.config.gamma is not None:
            return float(self.config.gamma)
        return 1.0 if self.config.one_step_steps else 0.0

    @property
    def usual_steps(self) -> int:
        if self.config.sampling_steps is not None:
            return int(self.config.sampling_steps)
        return 1 if self.config.one_step_steps else int(self.config.segments[-1])

    def sampler(self) -> Sampler:
        return self.few_step(self.usual_steps)

    def stage_sampler(self, segments: int, steps: int | None = None) -> Sampler:
        """The student as it was at the end of a stage, in as many steps as the stage has segments (or ``steps``).

        Raises:
            InputError: the stage does not exist, or its weights were not kept.
        """
        if str(segments) not in self.kept:
            raise InputError(
                f"there is no stage of {segments} segments whose weights were kept: see segments and keep_stages"
            )
        held: Any = self.kept[str(segments)]
        return self.few_step(steps or segments, plain_network(held.module), gamma=float(self.config.gamma or 0.0))

    def contestants(self) -> dict[str, Sampler]:
        """The result, every stage's student in its own number of steps, and the teacher in as many."""
        first, *rest = super().contestants().items()
        stages = {
            f"stage {k}, {k} step{'s' * (k > 1)}": self.stage_sampler(k)
            for k in self.config.segments
            if str(k) in self.kept
        }
        few = {f"teacher, {k} step{'s' * (k > 1)}": self.teacher_sampler(k) for k in self.config.segments}
        return dict([first, *stages.items(), *few.items(), *rest])
