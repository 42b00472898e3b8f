"""Consistency distillation and latent consistency models, the baseline of few-step samplers."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Data
from limbeck.core.errors import InputError
from limbeck.core.stage import Stage
from limbeck.diffusion.boundary import ConsistencyDenoiser
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.extra_time import GuidanceScale, embedding_width
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.scores import PseudoHuber
from limbeck.methods.samplers.consistency_base import ConsistencyBase, inner_network, plain_network

Distance = Callable[[Tensor, Tensor], Tensor]


class Consistency(ConsistencyBase):
    r"""Consistency distillation: all points of a trajectory of the teacher's ODE are mapped to its end.

    On a grid of times :math:`t_1 = t_{min} < \dots < t_N = t_{max}`, with x0 from the data, noise :math:`\epsilon`, an index n and a step
    of k points, the teacher makes one step from :math:`x_{t_{n+k}}` to :math:`\hat x_{t_n}`, and

    .. math:: L = E\, d\big(f_\theta(x_{t_{n+k}}, t_{n+k}),\; f_{\theta^-}(\hat x_{t_n}, t_n)\big),

    f being a consistency function (:class:`~limbeck.diffusion.boundary.ConsistencyDenoiser`: f is the identity at :math:`t_{min}`) and
    :math:`\theta^-` a slow average of :math:`\theta`. No gradient flows through the target or the teacher's step. Samples are made in a few
    steps: predict x0, add noise of the next time, again.

    ``form`` chooses between two published recipes: ``cm`` has 18 points spaced as in EDM, Heun's rule, k = 1 and the boundary condition of
    EDM; ``lcm`` has an even grid of many points, DDIM, jumps over k of them (skipping steps), guidance in the teacher's step and the
    boundary condition of latent consistency models. With ``guidance_range`` the guidance w is drawn for every sample and the network is
    told it, so that it can be chosen when sampling. A start nearer than k points to the data goes to :math:`t_1` (the published code does so
    for :math:`t_0`; else points below k would never be trained).

    Source: "Consistency Models" (2023); "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference" (2023);
    ``paper`` holds the settings of the first for CIFAR-10, ``lcm`` those of the second (whose guidance of 2 to 14 is w - 1 here); the growing
    grid and its decay are those of consistency training in the first, the pseudo-Huber distance is from "Improved Techniques for
    Training Consistency Models" (2023). Squared distances are averaged over dimensions here.
    """

    name = "consistency"

    class Config(ConsistencyBase.Config):
        form: Literal["cm", "lcm"] = Field(
            "cm", description="recipe where nothing else is said: consistency models or latent ones"
        )
        points: int | None = Field(None, ge=2, description="N, points of the grid; none: 18 for cm, 64 for lcm")
        skip: int | None = Field(
            None, ge=1, description="k, points that a step of the teacher jumps over; none: 1 for cm, 4 for lcm"
        )
        spacing: Literal["auto", "karras", "uniform"] = Field(
            "auto", description="of the grid; auto: karras for cm, uniform for lcm"
        )
        boundary: Literal["auto", "edm", "lcm"] = Field(
            "auto", description="boundary condition; auto: that of the form"
        )
        sigma_data: float | None = Field(
            None, gt=0, description="standard deviation in the boundary condition; none: the teacher's"
        )
        timestep_scaling: float = Field(10.0, gt=0, description="factor of times in the boundary condition of lcm")
        distance: Literal["l2", "l1", "pseudo-huber"] = Field("l2", description="between prediction and target")
        huber_c: float | None = Field(
            None, gt=0, description="of pseudo-huber; none: 0.00054 times the root of the dimension"
        )
        discretisation: Literal["constant", "growing"] = Field(
            "constant", description="growing: from points_start to the grid's points, with a decay to match"
        )
        points_start: int = Field(4, ge=2, description="points at the start of a growing grid")
        guidance_range: tuple[float, float] | None = Field(
            None, description="draw the teacher's guidance between these and tell the student; none: always --guidance"
        )
        time_layer: str | None = Field(
            None, description="layer that embeds the time, for guidance_range; none: by its usual names"
        )
        sampling_steps: int = Field(2, ge=1, description="steps of the resulting sampler")

        presets = {
            "paper": {
                "steps": 800_000,
                "batch_size": 512,
                "optimizer": "adamw",
                "lr": 4e-4,
                "schedule": "constant",
                "ema": 0.9999,
                "target_ema": 0.0,
                "points": 18,
                "sampling_steps": 1,
            },
            "lcm": {
                "form": "lcm",
                "steps": 100_000,
                "batch_size": 72,
                "optimizer": "adamw",
                "lr": 8e-6,
                "schedule": "constant",
                "points": 1000,
                "skip": 20,
                "distance": "pseudo-huber",
                "huber_c": 0.001,
                "target_ema": 0.999943,
                "ema": 0.999943,
                "guidance_range": (3.0, 15.0),
                "guidance": 8.0,
                "sampling_steps": 4,
            },
        }

    updates: Tensor

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        metric: Distance | None = None,
        **more: Any,
    ) -> None:
        """``metric``: (a, b) (B, ...) -> (B,), a perceptual distance say, in the place of ``distance``."""
        super().__init__(teacher, conditions, student, config, **more)
        self.metric = metric
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))
        self._grids: dict[int, Tensor] = {}
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            if not 0 <= low < high:
                raise InputError(f"guidance_range must rise from 0 or more (got {low} and {high})")
            if not self.teacher.conditional:
                raise InputError("guidance_range needs a teacher with conditions: leave it out")
        if self.skip >= self.points(0):
            raise InputError(f"skip must be less than the {self.points(0)} points of the grid (got {self.skip})")

    def dress_student(self) -> None:
        config = self.config
        if config.guidance_range is not None:
            x, t, cond = self.sample_call()
            call = (x, self.student.schedule.to_model_time(t), cond)
            width = embedding_width(self.student.module, call, config.time_layer)
            told = GuidanceScale(self.student.module, width, config.time_layer, config.guidance)
            self.student = self.student.with_module(told.to(self.device))
        self.student = ConsistencyDenoiser(
            self.student, self.boundary, sigma_data=config.sigma_data, timestep_scaling=config.timestep_scaling
        )

    # ---- the recipe ------------------------------------------------------------------------------------------------------

    @property
    def boundary(self) -> str:
        chosen: str = self.config.boundary
        return ("edm" if self.config.form == "cm" else "lcm") if chosen == "auto" else chosen

    @property
    def skip(self) -> int:
        chosen = self.config.skip
        return (1 if self.config.form == "cm" else 4) if chosen is None else int(chosen)

    def points(self, update: int) -> int:
        r"""N at an update: constant, or :math:`\lceil\sqrt{\frac{k}{K}((s_1+1)^2 - s_0^2) + s_0^2} - 1\rceil + 1`."""
        last = (18 if self.config.form == "cm" else 64) if self.config.points is None else int(self.config.points)
        if self.config.discretisation == "constant":
            return last
        first = min(int(self.config.points_start), last)
        part = min(1.0, update / self.config.steps)
        # In the paper's notation s1 intervals are reached at the end, which makes s1 + 1 points.
        grown = math.ceil(math.sqrt(part * (last**2 - first**2) + first**2) - 1) + 1
        return max(2, min(grown, last))

    def decay(self, update: int) -> float:
        r"""Decay of the target: constant, or with a growing grid :math:`\exp(s_0 \log\mu_0 / N)`."""
        wanted = float(self.config.target_ema)
        if self.config.discretisation == "constant" or wanted == 0:
            return wanted
        return math.exp(self.config.points_start * math.log(wanted) / self.points(update))

    def grid(self, points: int) -> Tensor:
        """(N,) rising times from t_min to t_max."""
        if points not in self._grids:
            schedule = self.teacher.schedule
            spacing = self.config.spacing
            if spacing == "auto":
                spacing = "karras" if self.config.form == "cm" else "uniform"
            if spacing == "karras":
                falling = schedule.times(points, "karras")[:-1]
            else:
                falling = torch.linspace(schedule.t_max, schedule.t_min, points, dtype=torch.float64)
            self._grids[points] = falling.flip(0).float()
        return self._grids[points].to(self.device)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) distances of predictions from targets."""
        if self.metric is not None:
            return self.metric(a, b)
        gap = (a - b).float()
        if self.config.distance == "l2":
            return gap.square().flatten(1).mean(1)
        if self.config.distance == "l1":
            return gap.abs().flatten(1).mean(1)
        c = 0.00054 * math.sqrt(gap[0].numel()) if self.config.huber_c is None else float(self.config.huber_c)
        return PseudoHuber(c).value(gap)

    @property
    def solver_rule(self) -> str:
        return "heun" if self.config.solver == "auto" and self.config.form == "cm" else super().solver_rule

    # ---- the loss --------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        x0, cond = self.unpack(batch)
        assert x0 is not None
        count, grid = len(x0), self.grid(self.points(int(self.updates)))
        start = torch.randint(1, len(grid), (count,), device=x0.device)
        t, s = grid[start], grid[(start - self.skip).clamp_min(0)]
        x_t = self.teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
        guidance: float | Tensor = self.config.guidance
        if self.config.guidance_range is not None:
            low, high = self.config.guidance_range
            guidance = low + (high - low) * torch.rand(count, device=x0.device)
        with torch.no_grad():
            ahead = self.teacher_step(self.teacher, x_t, t, s, cond, 1.0 if cond is None else guidance)
            with self.told(self.target.module, guidance):
                target = self.slow.predict(ahead, s, cond)
        with self.told(self.student.module, guidance):
            found = self.student.predict(x_t, t, cond)
        return Losses(consistency=self.distance(found, target).mean()).observe(points=float(len(grid)))

    @staticmethod
    def told(module: torch.nn.Module, guidance: float | Tensor) -> AbstractContextManager[None]:
        """Inside, a network that takes the guidance is told it."""
        network = inner_network(module)
        if isinstance(network, GuidanceScale) and isinstance(guidance, Tensor):
            return network.told(guidance)
        return nullcontext()

    # ---- the run ---------------------------------------------------------------------------------------------------------

    def follow(self, step: int) -> None:
        self.updates.fill_(step)
        self.ema.update(self.student.module)
        self.target.update(self.student.module, self.decay(step))

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        before, stream, kept = self.samples_of(train, seed)
        steps = self.config.steps
        stage = Stage(
            "consistency",
            steps,
            stream,
            losses=self.losses,
            optimisers=lambda: self.optimised(steps),
            after_step=self.follow,
            state=kept,
        )
        return [*before, stage]

    def sampler(self, steps: int | None = None, *, guidance: float | None = None) -> Sampler:
        """Predict x0, add noise, again.

        Args:
            steps: None: ``sampling_steps``.
            guidance: what the network is told, where it takes one; None: the configured one.
        """
        count = self.config.sampling_steps if steps is None else steps
        network = plain_network(self.ema.module)
        if isinstance(network, GuidanceScale):
            network = network.at(self.config.guidance if guidance is None else guidance)
        elif guidance is not None:
            raise InputError("this student was trained at one guidance: give guidance_range to choose it afterwards")
        denoiser = self.student.with_module(network)
        return Sampler(denoiser, self.teacher.schedule.times(count, "uniform"), "renoise")

    def contestants(self) -> dict[str, Sampler]:
        found = dict(super().contestants())
        more = {f"student, {k} step{'s' * (k > 1)}": self.sampler(k) for k in (1, 4) if k != self.config.sampling_steps}
        first, *rest = found.items()
        return dict([first, *more.items(), *rest])
