"""Human feedback for few-step samplers: rewards with thresholds and a task model's loss train adapters of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.lora import LoRA
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.core.stage import Stage
from limbeck.diffusion.consistency import SegmentSampler
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.solvers import ddim_step
from limbeck.losses.feedback import Reward, perceptual_loss, reward_loss
from limbeck.methods.samplers.consistency_base import inner_network, plain_network
from limbeck.methods.samplers.hyper_sd_base import SegmentedConsistency


class FeedbackBase(SegmentedConsistency):
    """A student with a stage of feedback; see :class:`~limbeck.methods.samplers.hyper_sd.HyperSD`.

    Attributes:
        feedback: the stage's adapters, on the student from that stage on; or None.
    """

    class Config(SegmentedConsistency.Config):
        feedback_steps: int = Field(0, ge=0, description="updates of the feedback stage; 0: none")
        feedback_nfe: int = Field(2, ge=1, description="steps of the samples that are rewarded")
        feedback_rank: int = Field(8, ge=1, description="rank of its adapters")
        lr_feedback: float = Field(1e-3, gt=0, description="its learning rate")
        feedback_weight: float = Field(
            1.0, ge=0, description="weight of the rewards where they come beside other losses"
        )
        perceptual: float = Field(0.1, ge=0, description="weight of the task model's loss")
        reward_threshold: float | None = Field(
            -0.05,
            description="log-probability of the class beyond which the built-in reward does not push; none: no threshold",
        )

    def __init__(
        self,
        teacher: Any,
        conditions: Any = None,
        student: Denoiser | None = None,
        config: Any = None,
        *,
        rewards: Sequence[Reward] = (),
        task_model: Callable[[Tensor], Any] | None = None,
        criterion: Callable[[Any, Any], Tensor] = F.cross_entropy,
        decoder: Callable[[Tensor], Tensor] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(teacher, conditions, student, config, **more)
        self.rewards, self.criterion, self.decoder = list(rewards), criterion, decoder
        self._task_model = [] if task_model is None else [task_model]  # in a list, so that it is no sub-module
        self.feedback: LoRA | None = None

    def check(self, batch: Batch) -> None:
        super().check(batch)
        if self.config.feedback_steps and not self.rewards and not self._task_model:
            raise InputError("feedback needs rewards=[Reward(…)] or task_model=…: what samples are to be liked by")

    # ---- the stage --------------------------------------------------------------------------------------------------------

    def pictured(self, samples: Tensor) -> Tensor:
        """Samples as judges see them: by ``decoder``, or as the family shows them."""
        return super().pictured(samples) if self.decoder is None else self.decoder(samples)

    def attach_feedback(self) -> None:
        """Put the feedback's adapters on the student, which is frozen from then on."""
        if self.feedback is None:
            self.feedback = LoRA(inner_network(self.student.module), self.config.feedback_rank).to(self.device)
            self.student.requires_grad_(False)

    def feedback_losses(self, batch: Batch) -> Losses:
        """Rewards of few-step samples, and the task model's loss on predictions from noised real ones."""
        x0, cond = self.unpack(batch)
        assert x0 is not None
        losses = Losses()
        if self.rewards:
            value, means = reward_loss(
                self.pictured(self.few_step_sample(torch.randn_like(x0), cond)), cond, self.rewards
            )
            losses.add("reward", value, float(self.config.feedback_weight)).observe(**means)
        if self._task_model:
            labels = batch.labels if batch.labels is not None else cond
            if labels is None:
                raise InputError("the perceptual loss needs labels: give (images, labels)")
            t = self.grid[torch.randint(1, len(self.grid), (len(x0),), device=x0.device)]
            x_t = self.teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
            with self.told(self.student.module, torch.zeros_like(t)):
                found = self.student.predict(x_t, t, cond)
            seen = perceptual_loss(self.pictured(found), labels, self._task_model[0], self.criterion)
            losses.add("perceptual", seen, float(self.config.perceptual))
        return losses

    def few_step_sample(self, z: Tensor, cond: Any) -> Tensor:
        """Samples in ``feedback_nfe`` jumps from unit noise; the gradient goes through the last one."""
        times = self.borders(self.config.feedback_nfe).to(z.device)
        x = z * (float(times[0]) if self.teacher.schedule.name == "edm" else self.teacher.schedule.prior_std)
        for number in range(len(times) - 1):
            t, s = times[number].expand(len(z)), times[number + 1].expand(len(z))
            with (
                torch.set_grad_enabled(torch.is_grad_enabled() and number == len(times) - 2),
                self.told(self.student.module, s),
            ):
                x0 = self.student.predict(x, t, cond)
            x = ddim_step(x, x0, t, s, self.teacher.schedule)
        return x

    def feedback_stage(self, stream: Any, kept: Mapping[str, Any]) -> Stage:
        if not self.rewards and not self._task_model:
            raise InputError("feedback needs rewards=[Reward(…)] or task_model=…: what samples are to be liked by")
        steps = self.config.feedback_steps

        def optimisers() -> Mapping[str, Optimised]:
            assert self.feedback is not None
            return {
                "feedback": make_optimised(self.feedback.parameters(), self.config, steps, lr=self.config.lr_feedback)
            }

        def begin() -> None:
            self.student.module.load_state_dict(self.ema.module.state_dict())

        return Stage(
            "feedback",
            steps,
            stream,
            losses=self.feedback_losses,
            optimisers=optimisers,
            prepare=self.attach_feedback,
            begin=begin,
            state=kept,
        )

    def borders(self, steps: int) -> Tensor:
        """(steps + 1,) falling times: the borders of as many segments, at which sampling asks."""
        return self.grid[SegmentSampler(self.config.points, steps).borders().to(self.grid.device)]

    def result(self) -> nn.Module:
        """The trained network, without adapters beside it."""
        if self.feedback is None:
            return plain_network(self.ema.module)
        adapters, network = deepcopy((self.feedback, self.student.module))
        adapters.merge()
        return network.merge() if isinstance(network, LoRA) else network

    # ---- building --------------------------------------------------------------------------------------------------------

    @classmethod
    def on_task(cls, task: Any, teacher: Any, config: Any, *, seed: int = 0, setup: Any = None) -> Self:
        """As in the family; feedback on a task with classes asks a classifier for the class that was asked for."""
        made = super().on_task(task, teacher, config, seed=seed, setup=setup)
        if config.feedback_steps:
            made.rewards = [class_reward(task, config.reward_threshold)]
        return made


def class_reward(
    task: Any,
    threshold: float | None,
    *,
    odds: bool = False,
    network: str | None = None,
    seed: int = 11,
    progress: bool = True,
) -> Reward:
    """The log-probability that a classifier gives to the class that was asked for.

    The classifier is another one (of another architecture and seed) than that by which results are judged.

    Args:
        threshold: beyond which the reward does not push; None: no threshold.
        odds: the log-odds log p - log(1 - p) instead, which go on growing where p is near 1.
        network: the classifier's name; None: the task's small one.

    Raises:
        InputError: the task has no images with classes.
    """
    from limbeck.tasks.generation import Judge, statistics_of
    from limbeck.tasks.teachers import reference_teacher

    images = getattr(task, "images", None)
    if images is None or task.num_classes is None:
        raise InputError("feedback by name needs images with classes: choose such a task, or give rewards=[Reward(…)]")
    trained = reference_teacher(images, network or images.networks["student"], seed=seed, progress=progress)
    judge = Judge(trained, *statistics_of(images.train)).eval()

    def judged(samples: Tensor, cond: Tensor) -> Tensor:
        logits = judge.to(samples.device)(samples)
        own = logits.gather(1, cond[:, None])[:, 0]
        if not odds:
            return own - logits.logsumexp(1)
        return own - logits.scatter(1, cond[:, None], -torch.inf).logsumexp(1)

    return Reward(judged, threshold, name="class_reward")
