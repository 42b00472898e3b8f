"""BD-KD: online distillation whose two divergences are balanced sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised, make_optimised
from limbeck.losses.logits import entropy, forward_kl, reverse_kl
from limbeck.methods.models.base import IGNORED, ModelDistiller, make_network
from limbeck.tasks.base import Task


class BDKD(ModelDistiller):
    r"""Balanced-divergence knowledge distillation: teacher and student learn together from scratch.

    Logits :math:`z_t, z_s` of shape (B, C) come from the same batch and augmentation; :math:`p = \mathrm{softmax}(z/\tau)`,
    :math:`H(p) = -\sum_c p_c \log p_c` and sg() stops gradients. For sample :math:`i`

    .. math::
        g_i &= H(p_t)_i - H(p_s)_i \quad\text{(no gradient)} \\
        w^f_i &= \delta \text{ if } g_i > 0 \text{ else } 1, \qquad w^r_i = 1 \text{ if } g_i > 0 \text{ else } \delta \\
        L_s &= \mathrm{CE}(z_s, y) + \gamma_s \tau^2\,\mathrm{mean}_i\big[w^f_i\,\mathrm{KL}(\mathrm{sg}\,p_t\|p_s)_i
               + w^r_i\,\mathrm{KL}(p_s\|\mathrm{sg}\,p_t)_i\big] \\
        L_t &= \mathrm{CE}(z_t, y) + \gamma_t \tau^2\,\mathrm{mean}_i\,\mathrm{KL}(\mathrm{sg}\,p_s\|p_t)_i

    The forward divergence spreads an over-confident student (:math:`g_i > 0`), the reverse one sharpens an under-confident
    one: the divergence that closes the confidence gap gets the larger weight :math:`\delta`. Both losses come from one forward
    pass of each network, and each network has its own optimiser. With more networks (several teachers, or ``peers`` of the
    student) the divergences of a network are averaged over all others.

    Token-level logits (B, N, C) are taken too: positions with label -100 are padding and count nowhere.

    Args:
        student: the network that is wanted.
        teacher: an untrained network, or several; they are trained along and are not frozen.
        peers: further students.
        config: hyper-parameters.

    Named modes, for comparison: ``dml`` (deep mutual learning: forward divergence only, both ways), ``fr`` (both divergences,
    delta 1), ``rkl`` (the student's reverse divergence only), ``kdcl`` (every network matches the softened mean of all logits),
    ``inverted`` (delta on the wrong side; a control of the mechanism).

    Source: "BD-KD: Balancing the Divergences for Online Knowledge Distillation" (2022). The structure is the paper's; the
    constants are not published in a form we could check, so these are our decisions: delta = 2, gamma_s = gamma_t = 1, and the
    teacher's term KL(p_s || p_t), which the paper names reverse from the student's point of view.
    """

    name = "bd-kd"

    class Config(ModelDistiller.Config):
        mode: Literal["bd-kd", "dml", "fr", "rkl", "kdcl", "inverted"] = Field("bd-kd", description="which divergences")
        temperature: float = Field(3.0, gt=0, description="softens all distributions, entropies too")
        delta: float = Field(2.0, ge=1, description="weight of the divergence that closes the confidence gap")
        gamma_student: float = Field(1.0, ge=0, description="weight of the student's divergences")
        gamma_teacher: float = Field(1.0, ge=0, description="weight of the teacher's divergence; at most gamma_student")
        gate: Literal["hard", "smooth"] = Field(
            "hard", description="weights jump at a zero gap, or follow a sigmoid of it"
        )
        gate_temperature: float = Field(0.1, gt=0, description="width of the smooth gate, in nats")
        teacher_kl: Literal["student_to_teacher", "teacher_to_student"] = Field(
            "student_to_teacher", description="KL(p_s || p_t), or KL(p_t || p_s), in the teacher's loss"
        )
        ramp_steps: int = Field(0, ge=0, description="batches over which both gammas rise linearly from 0")
        teacher_lr: float | None = Field(
            None, gt=0, description="peak learning rate of the teachers; none: the same as lr"
        )

        presets = {
            "paper": {
                "epochs": 240,
                "batch_size": 64,
                "optimizer": "sgd",
                "lr": 0.05,
                "weight_decay": 5e-4,
                "schedule": "step",
                "milestones": (0.625, 0.75, 0.875),
                "temperature": 1.0,
            }
        }

    class Setup(ModelDistiller.Setup):
        """What a run by name builds."""

        teacher: tuple[str, ...] = Field(
            (), description="networks trained along as teachers; none: the task's own teacher"
        )
        peers: tuple[str, ...] = Field((), description="further students that are trained along")

    seen_batches: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Sequence[nn.Module],
        config: Config | None = None,
        *,
        peers: Sequence[nn.Module] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(student, config, **overrides)
        self.trained_teachers = nn.ModuleList([teacher] if isinstance(teacher, nn.Module) else list(teacher))
        self.peers = nn.ModuleList(peers)
        everyone = [*self.students, *self.trained_teachers]
        if len({id(m) for m in everyone}) != len(everyone):
            raise InputError(
                "all networks of online distillation must be different modules: copy.deepcopy the repeated one"
            )
        if len(everyone) < 2:
            raise InputError("online distillation needs a teacher or a peer beside the student")
        for module in self.trained_teachers:
            module.requires_grad_(True)
        if self.config.gamma_teacher > self.config.gamma_student:
            raise InputError(
                f"gamma_teacher {self.config.gamma_teacher} exceeds gamma_student {self.config.gamma_student}: "
                "the weak student would pull the teacher harder than it is pulled"
            )
        self.register_buffer("seen_batches", torch.zeros((), dtype=torch.long))

    @property
    def students(self) -> list[nn.Module]:
        return [self.student, *self.peers]

    # ---- the loss ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        labels, mask = self._flat_labels(batch)
        students = [self._rows(m, batch) for m in self.students]
        teachers = [self._rows(m, batch) for m in self.trained_teachers]
        classes = {z.shape[-1] for z in (*students, *teachers)}
        if len(classes) > 1:
            raise InputError(f"the networks have different numbers of classes: {sorted(classes)}")
        ramp = self._ramp()
        out = Losses()
        for k, own in enumerate(students):
            others = students[:k] + students[k + 1 :] + teachers
            suffix = "" if k == 0 else f"_peer{k}"
            out.add(f"ce{suffix}", F.cross_entropy(own, labels))
            self._add(out, f"balance{suffix}", self.config.gamma_student * ramp, own, others, mask, self._student_pair)
        for k, own in enumerate(teachers):
            others = students + teachers[:k] + teachers[k + 1 :]
            suffix = "" if len(teachers) == 1 else str(k + 1)
            out.add(f"ce_teacher{suffix}", F.cross_entropy(own, labels))
            self._add(
                out, f"mutual_teacher{suffix}", self.config.gamma_teacher * ramp, own, others, mask, self._teacher_pair
            )
        if teachers:
            out.observe(overconfident=self._mean((self.gap(students[0], teachers[0]) > 0).float(), mask))
        return out

    def _add(
        self, out: Losses, name: str, gamma: float, own: Tensor, others: list[Tensor], mask: Any, pair: Any
    ) -> None:
        weight = gamma * self.config.temperature**2
        if self.config.mode == "kdcl":
            consensus = torch.stack([own, *others]).mean(0).detach()
            value = self._mean(forward_kl(own, consensus, self.config.temperature, "none"), mask)
        else:
            value = torch.stack([self._mean(pair(own, other.detach()), mask) for other in others]).mean()
        out.add(name, value, weight)

    def _student_pair(self, own: Tensor, other: Tensor) -> Tensor:
        """(B,) what pulls a student towards another network, whose logits are detached."""
        config = self.config
        temperature = config.temperature
        if config.mode == "dml":
            return forward_kl(own, other, temperature, "none")
        if config.mode == "rkl":
            return reverse_kl(own, other, temperature, "none")
        forward_weight, reverse_weight = self.gate(own, other)
        return forward_weight * forward_kl(own, other, temperature, "none") + reverse_weight * reverse_kl(
            own, other, temperature, "none"
        )

    def _teacher_pair(self, own: Tensor, other: Tensor) -> Tensor:
        """(B,) what regularises a teacher by another network, whose logits are detached."""
        if self.config.teacher_kl == "student_to_teacher" or self.config.mode == "dml":
            return forward_kl(own, other, self.config.temperature, "none")  # KL(p_other || p_own)
        return reverse_kl(own, other, self.config.temperature, "none")

    def gap(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B,) H(p_t) - H(p_s) in nats, without gradient; positive where the student is the more confident one."""
        with torch.no_grad():
            return entropy(teacher, self.config.temperature) - entropy(student, self.config.temperature)

    def gate(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (B,) of the forward and of the reverse divergence, without gradient."""
        config = self.config
        gap = self.gap(student, teacher)
        delta = 1.0 if config.mode == "fr" else config.delta
        if config.gate == "hard":
            over = (gap > 0).to(gap.dtype)
        else:
            over = torch.sigmoid(gap / config.gate_temperature)
        if config.mode == "inverted":
            over = 1 - over
        return 1 + (delta - 1) * over, 1 + (delta - 1) * (1 - over)

    # ---- rows and masks ----------------------------------------------------------------------------------------------

    @staticmethod
    def _rows(model: nn.Module, batch: Batch) -> Tensor:
        logits = logits_of(call_model(model, batch.inputs))
        return logits.flatten(0, -2) if logits.ndim > 2 else logits

    def _flat_labels(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        labels = self.labels(batch)
        if labels.is_floating_point():
            return (labels.flatten(0, -2) if labels.ndim > 2 else labels), None
        if labels.ndim == 1:
            return labels, None
        labels = labels.flatten()
        return labels, labels != IGNORED

    @staticmethod
    def _mean(rows: Tensor, mask: Tensor | None) -> Tensor:
        return rows.mean() if mask is None else (rows * mask).sum() / mask.sum().clamp_min(1)

    def _ramp(self) -> float:
        if self.config.ramp_steps == 0:
            return 1.0
        if self.training:
            self.seen_batches += 1
        return min(1.0, float(self.seen_batches) / self.config.ramp_steps)

    # ---- training and judging ----------------------------------------------------------------------------------------

    def optimisers(self, steps: int) -> Mapping[str, Optimised]:
        """One optimiser for the students and one for the teachers; their gradients never mix."""
        students = [p for m in self.students for p in m.parameters() if p.requires_grad]
        teachers = [p for p in self.trained_teachers.parameters() if p.requires_grad]
        made = {"student": make_optimised(students, self.config, steps)}
        if teachers:
            made["teacher"] = make_optimised(teachers, self.config, steps, lr=self.config.teacher_lr)
        return made

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        student = make_network(setup.student or task.networks["student"], task, seed)
        names = setup.teacher or (task.networks["teacher"],)
        teachers = [make_network(name, task, seed + 1000 * (k + 1)) for k, name in enumerate(names)]
        peers = [make_network(name, task, seed + 1000 * (k + 101)) for k, name in enumerate(setup.peers)]
        return cls(student, teachers, config, peers=peers)

    @classmethod
    def from_modules(cls, student: Any, teacher: Any, config: Any, *, sample: Batch) -> Self:
        cls.require(student=student, teacher=teacher)
        return cls(student, teacher, config)

    def contestants(self) -> dict[str, nn.Module]:
        models = {"student": self.student}
        models.update({f"peer {k + 1}": m for k, m in enumerate(self.peers)})
        single = len(self.trained_teachers) == 1
        models.update({"teacher" if single else f"teacher {k + 1}": m for k, m in enumerate(self.trained_teachers)})
        return models
