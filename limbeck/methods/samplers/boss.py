"""BOSS: the best steps for a small budget of evaluations, then the network straightened along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.blocks.ema import EMA
from limbeck.blocks.lora import LoRA
from limbeck.core.batch import Batch, Losses, map_tensors
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage, Stateful, Stepper
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.losses import squared_errors
from limbeck.diffusion.pairs import noise_of
from limbeck.diffusion.predictions import LEAST
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.segments import SegmentStore, step_target
from limbeck.diffusion.step_sizes import (
    CHUNK,
    Distance,
    JumpCosts,
    StepSchedule,
    jump_costs,
    probe_conditions,
    probe_noise,
)
from limbeck.methods.samplers.base import SamplerDistiller

MOST_AT_ONCE = 512
"""Trajectories that are made together, at most."""


class BOSS(SamplerDistiller):
    r"""Bellman-optimal step-size straightening.

    Time t is 1 at noise and 0 at data in a flow (the paper runs it the other way). With anchors :math:`a_0 > \dots > a_M = 0`:

    1. *Schedule*, without training: ``probes`` trajectories of the teacher over all anchors give the costs :math:`C_{ij}` of jumping from anchor i
       to anchor j in one step; the schedule :math:`\tau_0 > \dots > \tau_K` is the path with K edges of least total cost, see
       :mod:`limbeck.diffusion.step_sizes`. ``straighten=False`` ends here.
    2. *Trajectories*: ``pairs`` more, of which the states at the times of the schedule are kept. ``harvest`` keeps those of schedules with other
       numbers of steps as well, from the same pass (see :attr:`segments`).
    3. *Straightening*, from the teacher's weights: on segments of all trajectories and all places, pooled and shuffled,

       .. math:: L = E \Big\| u_\theta(x_{\tau_k}, \tau_k) - \frac{x_{\tau_{k+1}} - x_{\tau_k}}{\tau_{k+1} - \tau_k} \Big\|^2,

       a mean over dimensions. Inputs are the teacher's states and not the student's own; targets are constants.

    In schedules other than ``flow`` the same loss is taken in the coordinates of a rectified flow, :math:`(1 + \alpha/\sigma)^2\,\|\hat x_0 - \tilde x\|^2` with
    the target :math:`\tilde x` that makes one step of DDIM cross the segment; for ``edm`` that is what the authors' code does by wrapping networks as
    flows, for others our decision. With ``guidance`` trajectories and costs are guided ones (the paper leaves it open), and the trained student needs no
    guidance any more. ``lora_rank`` trains adapters on all linear and convolutional layers instead of the weights.

    Schedules alone are a free function, :func:`limbeck.diffusion.step_sizes.bellman_schedule`, and its times go to diffusers by
    :func:`limbeck.diffusion.step_sizes.to_diffusers`.

    Without the engine::

        method = BOSS(teacher, labels, student_steps=4)
        method.find_schedule()
        method.make_segments()
        stream = Stream(method.segments.segments(4), 128)
        for step in range(1000):
            loss = method(stream.batch(step))
            ...
            method.follow(step)
        method.sampler().sample(z, cond)

    Args:
        cost: distance of two batches of samples, per sample, for step 1; None: squared error.
        cost_matrix: costs that are known already; step 1 then takes no evaluations.

    Attributes:
        costs: of jumps, once found.
        segments: states of trajectories by number of steps.
        lora: the adapters, or None.

    Raises:
        InputError: more steps than anchors; a student with another schedule of noise than the teacher's.

    Source: "Bellman Optimal Step-size Straightening of Flow-Matching Models" (2024).
    """

    name = "boss"

    class Config(SamplerDistiller.Config):
        student_steps: int = Field(4, ge=1, description="evaluations of the student, K")
        anchors: int = Field(100, ge=2, description="steps of the fine trajectories, M")
        probes: int = Field(100, ge=1, description="trajectories for the costs of jumps")
        straighten: bool = Field(True, description="train on the schedule; false: the schedule alone")
        pairs: int = Field(2000, ge=1, description="trajectories for the training")
        harvest: tuple[int, ...] = Field((), description="further numbers of steps whose segments are kept")
        half: bool = Field(False, description="keep states in 16 bits")
        lora_rank: int | None = Field(None, ge=1, description="rank of adapters to train; none: all weights")
        lora_alpha: float | None = Field(None, gt=0, description="numerator of the adapters' scale; none: their rank")

        presets = {
            "paper": {
                "student_steps": 6,
                "pairs": 5000,
                "steps": 12_000,
                "batch_size": 15,
                "lr": 2e-4,
                "schedule": "constant",
                "warmup": 5000 / 12_000,
                "ema": 0.999999,
            }
        }

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        cost: Distance | None = None,
        cost_matrix: JumpCosts | None = None,
        **options: Any,
    ) -> None:
        super().__init__(teacher, conditions, student, config, **options)
        config = self.config
        if self.student.schedule != self.teacher.schedule:
            raise InputError("the student's times are the teacher's: give one with the same schedule of noise")
        self.cost: str | Distance = "l2" if cost is None else cost
        self.costs = cost_matrix
        self.anchors = (
            self.teacher.schedule.times(config.anchors) if cost_matrix is None else cost_matrix.anchors.clone()
        )
        self.kept = tuple(sorted({config.student_steps, *config.harvest}))
        if self.kept[0] < 1 or self.kept[-1] >= len(self.anchors):
            most = len(self.anchors) - 1
            raise InputError(
                f"student_steps and harvest must lie between 1 and the {most} intervals between anchors (got {self.kept})"
            )
        self.lora: LoRA | None = None
        if config.lora_rank is not None:
            self.lora = LoRA(self.student.module, config.lora_rank, config.lora_alpha)
            self.ema = EMA(self.lora, config.ema)
        self.segments = SegmentStore(
            config.pairs if config.straighten else 1, self.shape, self.kept, self._folder(), config.half
        )

    def _folder(self) -> Path | None:
        asked = self.config.pair_folder
        return None if asked is None or not self.config.straighten else Path(asked).expanduser() / "segments"

    # ---- 1: the schedule -------------------------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Trajectories that are made together."""
        size = len(self.anchors) * max(1, int(torch.Size(self.shape).numel()))
        return max(1, min(MOST_AT_ONCE, CHUNK // size))

    def find_schedule(self) -> StepSchedule:
        """Follow all probes and return the best schedule for ``student_steps``."""
        for start in range(0, self.config.probes, self.chunk):
            self.probe(start)
        return self.step_schedule()

    def probe(self, start: int) -> None:
        """Follow a chunk of probes, from number ``start`` on, and count them into the costs."""
        config = self.config
        ids = slice(start, min(start + self.chunk, config.probes))
        noise = probe_noise(self.shape, config.probes, self.seed)[ids].to(self.device)
        cond = probe_conditions(self.conditions, config.probes, self.seed)
        cond = map_tensors(cond, lambda v: v[ids].to(self.device))
        found = jump_costs(self.teacher, noise, self.anchors, cond=cond, cost=self.cost, guidance=config.guidance)
        self.costs = found if self.costs is None or start == 0 else self.costs.joined(found)

    def step_schedule(self, steps: int | None = None) -> StepSchedule:
        """The best schedule for ``steps`` (None: ``student_steps``).

        Raises:
            InputError: the costs are not known yet.
        """
        if self.costs is None:
            raise InputError("the schedule is not known yet: run the method, or call find_schedule() first")
        return self.costs.schedule(self.config.student_steps if steps is None else steps)

    # ---- 2: trajectories -------------------------------------------------------------------------------------------------

    def make_segments(self) -> None:
        """Make all trajectories."""
        self.plan()
        for start in range(0, self.segments.count, self.chunk):
            self.trace(start)

    def plan(self) -> None:
        """Tell the store which states to keep."""
        self.segments.plan({k: self.step_schedule(k) for k in self.kept})

    def trace(self, start: int) -> None:
        """Make a chunk of trajectories, from number ``start`` on; they are a function of the seed and their place."""
        count = min(self.chunk, self.segments.count - start)
        z = noise_of(mix_seed(self.seed, 557), start, count, self.shape)
        cond = self.conditions.draw(count, torch.Generator().manual_seed(mix_seed(self.seed, start, 563)))
        moved = map_tensors(cond, lambda v: v.to(self.device))
        sampler = Sampler(self.teacher, self.anchors, guidance=self.config.guidance)
        found = sampler.sample(z.to(self.device), moved, record=True)
        assert found.states is not None
        self.segments.write(start, found.states, cond)
        self.counters["trajectories"] += count

    # ---- 3: straightening ------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        x_t, x_s, t, s, cond = self.segment(batch)
        schedule = self.student.schedule
        target = step_target(x_t, x_s, t, s, schedule)
        found = self.student.predict(x_t, t, cond, "x0")
        # The velocity of a rectified flow is eps - x0, and an error of x0 is one of eps times -alpha / sigma.
        weight = (1 + schedule.alpha(t) / schedule.sigma(t).clamp_min(LEAST)) ** 2
        return Losses(straightening=(squared_errors(found, target) * weight.float()).mean())

    @staticmethod
    def segment(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
        """Start, end, their times and the condition of a batch of segments.

        Raises:
            InputError: the batch holds no segments.
        """
        inputs = batch.inputs
        if not isinstance(inputs, Mapping) or not {"x_t", "x_s", "t", "s"} <= inputs.keys():
            raise InputError(
                "BOSS learns from segments: batches are {'x_t', 'x_s', 't', 's', 'cond'}, as method.segments gives them"
            )
        return inputs["x_t"], inputs["x_s"], inputs["t"], inputs["s"], inputs.get("cond")

    def follow(self, _: int) -> None:
        self.ema.update(self.student.module if self.lora is None else self.lora)

    def optimised(self, steps: int, *, lr: float | None = None) -> Mapping[str, Optimised]:
        """Of the student's weights, or of the adapters."""
        return {"student": make_optimised(self.trainable_parameters(), self.config, steps, lr=lr)}

    # ---- stages ----------------------------------------------------------------------------------------------------------

    def stages(self, train: Data | None = None, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """Schedule, trajectories, straightening."""
        config = self.config
        found = []
        state: dict[str, Stateful] = {"costs": Costs(self), "segments": self.segments}

        def follow_probes(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            self.probe(stepper.step * self.chunk)
            assert self.costs is not None
            return {"probes": torch.tensor(float(self.costs.probes))}

        def follow_trajectories(_: Batch | None, stepper: Stepper) -> Mapping[str, Tensor]:
            self.trace(stepper.step * self.chunk)
            return {"trajectories": torch.tensor(float(self.segments.done))}

        if self.costs is None:
            steps = -(-config.probes // self.chunk)
            found.append(Stage("schedule", steps, update=follow_probes, state={"costs": state["costs"]}))
        if config.straighten:
            steps = -(-self.segments.count // self.chunk)
            found.append(Stage("trajectories", steps, update=follow_trajectories, begin=self.plan, state=state))
            pool = self.segments.segments(config.student_steps)
            found.append(
                Stage(
                    "straighten",
                    config.steps,
                    Stream(pool, config.batch_size, seed=mix_seed(seed, 5)),
                    losses=self.losses,
                    optimisers=lambda: self.optimised(config.steps),
                    after_step=self.follow,
                    state=state,
                )
            )
        return found

    # ---- the result ------------------------------------------------------------------------------------------------------

    @property
    def averaged(self) -> Denoiser:
        if self.lora is None:
            return super().averaged
        adapted = self.ema.module
        assert isinstance(adapted, LoRA)
        return self.student.with_module(adapted.merged().to(self.device).eval())

    def sampler(self) -> Sampler:
        """The straightened network, or without training the teacher, at the times of the schedule."""
        schedule = self.step_schedule()
        if self.config.straighten:
            return schedule.sampler(self.averaged)
        return schedule.sampler(self.teacher, guidance=self.config.guidance)

    def contestants(self) -> dict[str, Sampler]:
        """The result, the teacher in as many steps on the schedule and on its usual grid, and its fine solution."""
        config, steps = self.config, self.config.student_steps
        label = f"{steps} step{'s' * (steps > 1)}"
        untrained = self.step_schedule().sampler(self.teacher, guidance=config.guidance)
        found = {"student": self.sampler()} if config.straighten else {}
        found[f"teacher, {label} of the schedule"] = untrained
        found[f"teacher, {label} of its grid"] = Sampler.ode(self.teacher, steps, "ddim", config.guidance)
        found[f"teacher, {config.teacher_nfe} steps"] = self.teacher_sampler()
        return found

    def evaluate(self, test: Data, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """As in the family, and the schedule."""
        schedule = self.step_schedule()
        about = {
            "times": schedule.times.tolist(),
            "indices": schedule.indices.tolist(),
            "predicted_cost": schedule.predicted_cost,
        }
        return {**super().evaluate(test, class_names), "step_schedule": about}

    def save_artifact(self, folder: Path, description: dict[str, Any]) -> None:
        """The sampler, and beside it the matrix of costs, from which schedules for other numbers of steps follow."""
        super().save_artifact(folder, description)
        if self.costs is not None:
            self.costs.save(folder / "jump-costs.npz")


class Costs:
    """The costs of a method's jumps as a part of checkpoints."""

    def __init__(self, method: BOSS) -> None:
        self.method = method

    def state_dict(self) -> dict[str, Any]:
        costs = self.method.costs
        return {} if costs is None else {"anchors": costs.anchors, "values": costs.values, "probes": costs.probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.costs = JumpCosts(**state) if state else None
