"""Progressive distillation: halve the steps, again and again."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.optim import Schedule
from limbeck.core.stage import Stage
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import squared_errors
from limbeck.diffusion.predictions import LEAST
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.segments import two_step_target
from limbeck.methods.samplers.base import SamplerDistiller

FEW = 2
"""Rounds that end in so many steps, or fewer, get more updates."""


class Progressive(SamplerDistiller):
    r"""Progressive distillation.

    A round makes a student of N steps from a teacher of 2N steps of DDIM. With a noised sample :math:`x_t = \alpha_t x_0 + \sigma_t\epsilon` at a
    random time t of the student's grid, the teacher steps to the middle of the interval and on to its end s, where it is at :math:`x_s`. The student
    must predict the sample that brings it there in one step,

    .. math:: \tilde x = \frac{x_s - (\sigma_s/\sigma_t)\,x_t}{\alpha_s - (\sigma_s/\sigma_t)\,\alpha_t}, \qquad
              L = E\; w(t)\, \|\hat x_\theta(x_t, t) - \tilde x\|^2,

    a mean over dimensions, with :math:`w = \max(\alpha^2/\sigma^2, 1)` (truncated SNR) or :math:`w = \alpha^2/\sigma^2 + 1` (SNR + 1, the squared error of
    v). Then the student becomes the teacher, N is halved, and the next student starts from its weights. Grids are nested, so a round's teacher is asked
    only at times that it was trained at.

    The learning rate falls to 0 in every round. ``steps`` is shared out among the rounds; those that end in two steps or one get ``few_weight`` times as
    much as the others.

    With ``guidance`` the first round's teacher is guided, so guidance is built into the student and later rounds have none. (The two-stage method for
    guided models, "On Distillation of Guided Diffusion Models" (2023), first trains a student that is told w; here w is fixed.)

    Decision of ours: the next teacher is the average of the student's weights. ``ema=0`` takes its last weights, as the paper does.

    Samples of the data are needed; where there are none, the teacher makes them first.

    Without the engine::

        method = Progressive(teacher, labels, start_steps=16, student_steps=4)
        for number in range(method.rounds):
            method.begin_round(number)
            optimizer = torch.optim.Adam(method.trainable_parameters())
            for batch in loader:  # (images, labels)
                loss = method(batch)
                ...
                method.follow(0)
        method.sampler().sample(z, cond)

    Attributes:
        rounds: how many.
        number: of the round, from 0.
        former: the student of the round before, frozen: the teacher from the second round on.

    Raises:
        InputError: ``start_steps`` is not ``student_steps`` times a power of two; a student with another schedule of noise than the teacher's; a network that
            predicts noise where there is no signal.

    Source: "Progressive Distillation for Fast Sampling of Diffusion Models" (2022).
    """

    name = "progressive"
    needs_images = True

    class Config(SamplerDistiller.Config):
        steps: int = Field(3000, ge=1, description="updates of the student in all rounds together")
        schedule: Schedule = Field("linear", description="course of the learning rate in each round")
        start_steps: int = Field(32, ge=2, description="DDIM steps of the first teacher")
        student_steps: int = Field(4, ge=1, description="evaluations of the last student")
        weighting: Literal["truncated-snr", "snr+1"] = Field(
            "truncated-snr", description="weight of squared errors of x0: max(SNR, 1) or SNR + 1"
        )
        few_weight: float = Field(
            2.0, gt=0, description="updates of rounds that end in 1 or 2 steps, relative to others"
        )
        spacing: Literal["own", "uniform", "karras", "nsr"] = Field(
            "own", description="spacing of the first teacher's times; own: as usual with its schedule of noise"
        )

        presets = {
            "paper": {
                "steps": 550_000,
                "batch_size": 128,
                "lr": 1e-4,
                "start_steps": 8192,
                "student_steps": 4,
                "ema": 0.0,
            }
        }

    def __init__(
        self, teacher: Any, conditions: Any = None, student: Denoiser | None = None, config: Any = None, **options: Any
    ) -> None:
        super().__init__(teacher, conditions, student, config, **options)
        config = self.config
        ratio = config.start_steps // config.student_steps
        if ratio < 2 or ratio & (ratio - 1) or ratio * config.student_steps != config.start_steps:
            raise InputError(
                f"start_steps must be student_steps times 2, 4, 8 … (got {config.start_steps} and {config.student_steps})"
            )
        self.rounds = ratio.bit_length() - 1
        if self.rounds > config.steps:
            raise InputError(f"{self.rounds} rounds need at least as many updates (got steps={config.steps})")
        schedule = self.teacher.schedule
        if self.student.schedule != schedule:
            raise InputError("the student's times are the teacher's: give one with the same schedule of noise")
        spacing = {} if config.spacing == "own" else {"spacing": config.spacing}
        self.times = schedule.times(config.start_steps, **spacing)
        signal = float(schedule.alpha(self.times[0]))
        for who, denoiser in (("teacher", self.teacher), ("student", self.student)):
            if denoiser.prediction in ("eps", "score") and signal < 1e-3:
                raise InputError(
                    f"at t = {float(self.times[0]):g} there is no signal left (alpha {signal:.1e}), so the {who} cannot be asked for x0 by way of "
                    f"'{denoiser.prediction}': use a network that predicts v, flow or x0"
                )
        self.number = 0
        self.former = deepcopy(self.student).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.former.eval()
        return self

    # ---- rounds ----------------------------------------------------------------------------------------------------------

    def grid(self, number: int) -> Tensor:
        """Times of the student of a round: (N + 1,) float64, falling to 0."""
        return self.times[:: 2 ** (number + 1)]

    def updates(self) -> list[int]:
        """Of each round; their sum is ``steps``."""
        config = self.config
        sizes = [len(self.grid(r)) - 1 for r in range(self.rounds)]
        weights = torch.tensor([config.few_weight if size <= FEW else 1.0 for size in sizes], dtype=torch.float64)
        ends = (weights.cumsum(0) / weights.sum() * config.steps).round().long()
        done = torch.arange(1, self.rounds + 1)  # each has one at least
        ends = ends.clamp(min=done, max=config.steps - self.rounds + done)
        return [int(n) for n in torch.diff(ends, prepend=ends.new_zeros(1))]

    def begin_round(self, number: int) -> None:
        """Enter a round: from the second on, the averaged student becomes the teacher and the next student starts from it."""
        self.number = number
        if number == 0:
            return
        weights = self.ema.module.state_dict()
        self.student.module.load_state_dict(weights)
        self.former.module.load_state_dict(weights)
        self.ema.updates = 0

    def losses(self, batch: Batch) -> Losses:
        x0, cond = self.unpack(batch)
        assert x0 is not None
        schedule, fine, device = self.student.schedule, self.times[:: 2**self.number], x0.device
        place = 2 * torch.randint((len(fine) - 1) // 2, (len(x0),), device=device)
        fine = fine.to(device, torch.float32)
        t, middle, s = fine[place], fine[place + 1], fine[place + 2]
        x_t = schedule.add_noise(x0, torch.randn_like(x0), t)
        first = self.number == 0
        teacher, weight = (self.teacher, self.config.guidance) if first else (self.former, 1.0)
        target = two_step_target(teacher, x_t, t, middle, s, cond, weight if cond is not None else 1.0)
        self.counters["teacher_evaluations"] += len(x0) * 2 * (1 if weight == 1 or cond is None else 2)
        errors = squared_errors(self.student.predict(x_t, t, cond, "x0"), target)
        return Losses(distillation=(self.error_weight(t) * errors).mean())

    def error_weight(self, t: Tensor) -> Tensor:
        """w(t) for squared errors of x0, (B,)."""
        schedule = self.student.schedule
        snr = (schedule.alpha(t) / schedule.sigma(t).clamp_min(LEAST)) ** 2
        return snr.clamp_min(1) if self.config.weighting == "truncated-snr" else snr + 1

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """A stage for each round; before them samples of the teacher, where there are none of the data."""
        found, stream, state = self.samples_of(train, seed)
        for number, updates in enumerate(self.updates()):
            found.append(self._round(number, updates, stream, state))
        return found

    def _round(self, number: int, updates: int, stream: Any, state: dict[str, Any]) -> Stage:
        def prepare() -> None:
            self.number = number

        return Stage(
            f"{len(self.grid(number)) - 1}-steps",
            updates,
            stream,
            losses=self.losses,
            optimisers=lambda: self.optimised(updates),
            prepare=prepare,
            begin=lambda: self.begin_round(number),
            after_step=self.follow,
            state=state,
        )

    # ---- the result ------------------------------------------------------------------------------------------------------

    def sampler(self) -> Sampler:
        """The averaged student of the last round; its times are those of the last grid."""
        return Sampler(self.averaged, self.grid(self.rounds - 1))

    def contestants(self) -> dict[str, Sampler]:
        """The result, the teacher by DDIM at the same times and at those that it was distilled from, and its fine solution."""
        config, few = self.config, self.config.student_steps
        found = {"student": self.sampler()}
        for times in (self.grid(self.rounds - 1), self.times):
            steps = len(times) - 1
            label = f"teacher, {steps} DDIM step{'s' * (steps > 1)}"
            found[label] = Sampler(self.teacher, times, guidance=config.guidance)
        if config.teacher_nfe != few or config.teacher_solver != "ddim":
            found[f"teacher, {config.teacher_nfe} steps"] = self.teacher_sampler()
        return found
