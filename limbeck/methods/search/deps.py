"""DepS: a super-network whose sub-networks join late and slowly, taught by the full network of the same step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.later_stream import LaterStream
from limbeck.blocks.search_spaces import Code
from limbeck.blocks.shared_gradients import SharedGradients
from limbeck.blocks.shrinking import Phase, ShrinkingPlan, same_passes
from limbeck.core.batch import Batch, Losses, call_model, logits_of
from limbeck.core.data import Data, Stream, mix_seed
from limbeck.core.errors import InputError
from limbeck.core.method import freeze
from limbeck.core.optim import Optimised, lr_factor, make_optimised
from limbeck.core.stage import Stage
from limbeck.losses.logits import soft_cross_entropy
from limbeck.methods.search.supernet_base import SupernetMethod, check_finite, make_supernet
from limbeck.networks.supernets import SuperNetwork
from limbeck.tasks.base import Task


class DepS(SupernetMethod):
    r"""Delayed epsilon-shrinking: one training gives all sub-networks of a super-network, cheaper than training them all from the start.

    *Warm-up of the full network.* Up to step b only the full network is trained, with cross-entropy on the labels (with label smoothing).

    *Shrinking.* From then on each step runs K networks on the same batch: the full one, the smallest and K - 2 random ones. With logits :math:`z_0`
    (B, C) of the full network, temperature T and :math:`p = \mathrm{sg}\,\mathrm{softmax}(z_0 / T)`,

    .. math:: L = \mathrm{CE}(z_0, y) + \beta(t) \sum_{k=1}^{K-1} T^2 \cdot \mathrm{mean}_i \Big[ - \sum_c p_{ic} \log \mathrm{softmax}(z_k / T)_{ic} \Big]

    Sub-networks see no labels; their teacher is the full network of the same step, in training mode. :math:`\beta` ramps so that their effective
    learning rate rises from 0 to what the full network has at the end of the ramp
    (:class:`~limbeck.blocks.shrinking.ShrinkingPlan`); the full network's rate follows the one schedule throughout.
    Gradients of shared weights are summed (or averaged, :class:`~limbeck.blocks.shared_gradients.SharedGradients`), one optimiser step is taken.

    *Sorting.* When shrinking begins, the middle channels of every block are sorted by the L1 norm of the weights that read them, so that slices keep
    the best; the full network's function stays, and the optimiser's buffers move along.

    *After training.* A sub-network is cut out as a plain module, its batch-norm statistics are estimated on training batches, and an evolutionary
    search finds the best one in each of several budgets.

    Presets train the same super-network in other ways, for comparison: ``bignas`` (all sub-networks from the first step), ``late``, ``no-ramp``,
    ``slimmable`` (all from the first step, each on the labels), ``ofa`` (the full network is trained to its end, then a frozen copy teaches kernels,
    depths and widths opened one after the other, with learning rates of their own) and ``compofa`` (coupled depths and widths, a frozen teacher).

    Without the engine::

        method = DepS(supernet, steps=1000)
        optimizer = torch.optim.SGD(supernet.parameters(), lr=0.05, momentum=0.9)
        method.watch(optimizer)  # its momentum moves with sorted channels
        for batch in loader:
            loss = method(batch)  # each call in training mode is a step
            optimizer.zero_grad(); loss.backward(); optimizer.step()
        small = method.subnetwork(supernet.smallest)

    ``counters['network_passes']`` counts forward passes of all networks, in samples, ``counters['forward_flops']`` their FLOPs.

    Args:
        supernet: see :class:`~limbeck.networks.supernets.SuperNetwork`.
        config: hyper-parameters; or give single ones as keyword arguments.
        most: bounds on the ``parameters`` and ``flops`` of the student that the search chooses.
        rivals: presets, each of which trains a copy of the super-network with as many forward passes, for the picture.

    Source: "DepS: Delayed ε-Shrinking for Faster Once-For-All Training" (2024); the published training code for the ramp, the sums and the
    sorting. Published only for ImageNet with MobileNetV3: where shrinking starts (150 of 270 epochs), and a ramp of 5 epochs. At small scale: half of
    the training and a twelfth of it. ``ofa`` and ``compofa`` are the published schedules in outline, at one learning rate for all phases.
    """

    name = "deps"

    class Config(SupernetMethod.Config):
        epochs: float = Field(24, gt=0, description="passes over the training data")
        optimizer: Literal["adamw", "adam", "sgd"] = Field("sgd", description="update rule")
        lr: float = Field(0.05, gt=0, description="peak learning rate")
        weight_decay: float = Field(
            3e-5, ge=0, description="weight decay of matrices and kernels, not of norms and biases"
        )
        start: float = Field(
            0.5, ge=0, lt=1, description="fraction of training after which sub-networks learn at full speed"
        )
        ramp: float = Field(
            1 / 12, ge=0, lt=1, description="fraction of training before that in which their rate rises"
        )
        networks: int = Field(4, ge=2, description="networks of a step: the full one, the smallest, and random ones")
        sampling: Literal["free", "coupled"] = Field(
            "free", description="random sub-networks: every choice alone, or depths and widths together"
        )
        target: Literal["full", "teacher", "labels"] = Field(
            "full",
            description="what teaches sub-networks: the full network of the step, a frozen copy from when shrinking began, or labels",
        )
        label_weight: float = Field(
            0.0, ge=0, description="weight of the labels' loss beside a teacher's, for sub-networks"
        )
        temperature: float = Field(1.0, gt=0, description="softens both distributions")
        label_smoothing: float = Field(0.1, ge=0, lt=1, description="of the cross-entropy with labels")
        multiplier: float = Field(1.0, gt=0, description="weight of a sub-network's loss after the ramp")
        aggregation: Literal["sum", "avg", "avg_sqrt"] = Field(
            "sum", description="gradients of shared weights: sum, mean over the networks that have them, or between"
        )
        sort: bool = Field(True, description="sort middle channels by importance when shrinking begins")
        shrinking: Literal["together", "progressive"] = Field(
            "together", description="all sub-networks at once, or kernels, then depths, then widths"
        )
        phase_lr: float = Field(
            0.3, gt=0, description="peak rate of the phases of progressive shrinking, in parts of lr"
        )

        presets = {
            "paper": {"epochs": 270, "batch_size": 2048, "lr": 2.6, "start": 150 / 270, "ramp": 5 / 270},
            "bignas": {"start": 0.0, "ramp": 0.0, "sort": False},
            "late": {"start": 0.8, "ramp": 0.0},
            "no-ramp": {"ramp": 0.0},
            "slimmable": {"start": 0.0, "ramp": 0.0, "sort": False, "target": "labels"},
            "ofa": {
                "start": 0.3,
                "ramp": 0.0,
                "target": "teacher",
                "label_weight": 1.0,
                "shrinking": "progressive",
            },
            "compofa": {"ramp": 0.0, "target": "teacher", "label_weight": 1.0, "sampling": "coupled"},
        }

    class Setup(SupernetMethod.Setup):
        """What a run by name builds."""

        rivals: tuple[str, ...] = Field(
            ("bignas", "late"),
            description="presets that train a copy of the super-network with as many forward passes, for the picture",
        )

    steps_done: Tensor

    def __init__(
        self,
        supernet: SuperNetwork,
        config: Any = None,
        *,
        most: Mapping[str, float] | None = None,
        rivals: Sequence[str] = (),
        **overrides: Any,
    ) -> None:
        super().__init__(supernet, config, most=most, **overrides)
        config = self.config
        if config.target == "teacher" and config.start == 0:
            raise InputError("a frozen teacher is the full network when shrinking begins: set start above 0")
        if config.shrinking == "progressive" and config.target == "full":
            raise InputError("progressive shrinking trains no full network on the way: its target is teacher or labels")
        self.prefix, self.seed = "", 0
        self.plan: ShrinkingPlan | None = None
        self.rate: Callable[[int], float] = float
        self.watched: list[torch.optim.Optimizer] = []
        self.teacher: SuperNetwork | None = None
        if config.target == "teacher":
            self.teacher = copy.deepcopy(supernet)
            freeze(self.teacher)
        self.rivals = nn.ModuleDict()
        for name in rivals:
            self.rivals[name] = rival = type(self)(copy.deepcopy(supernet), self._as_preset(name))
            rival.prefix = f"{name}_"
        self._share_counters()
        self.shared = SharedGradients(supernet, config.aggregation)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.long))
        if config.steps is not None:
            self.plan_for(config.steps)

    def _as_preset(self, name: str) -> Any:
        """This config with a preset's way of training, and the defaults' where the preset says nothing of it."""
        config = self.config
        ways = {key for preset, values in config.presets.items() if preset != "paper" for key in values}
        defaults = {key: type(config).model_fields[key].default for key in ways}
        return config.replace(**{**defaults, **type(config).preset_values(name)})

    # ---- the course --------------------------------------------------------------------------------------------------

    def plan_for(self, steps: int, rate: Callable[[int], float] | None = None) -> ShrinkingPlan:
        """Lay out a training of so many steps.

        Args:
            steps: in all.
            rate: step -> learning rate of the full network, up to a factor; None: the config's schedule. The ramp needs it.
        """
        config = self.config
        self.plan = self._plan(steps)
        self.rate = rate or lr_factor(config.schedule, steps, config.warmup, config.milestones)
        return self.plan

    def _plan(self, steps: int) -> ShrinkingPlan:
        config = self.config
        options: dict[str, int] | None = None
        if config.shrinking == "progressive":
            options = {}
            for knob in self.supernet.knobs:
                options[knob.kind] = max(options.get(knob.kind, 1), len(knob.options))
        return ShrinkingPlan.of(
            steps,
            start=config.start,
            ramp=config.ramp,
            networks=config.networks,
            teacher=config.target == "teacher",
            options=options,
        )

    @property
    def planned(self) -> ShrinkingPlan:
        """The plan.

        Raises:
            InputError: nobody said how long training lasts.
        """
        if self.plan is None:
            raise InputError(
                "say how long training lasts, so that shrinking can begin in time: steps=…, or plan_for(steps)"
            )
        return self.plan

    def codes(self, step: int) -> dict[str, Code]:
        """The networks of a step by role; random ones are drawn from the seed and the step, so that all processes agree."""
        config, net, plan = self.config, self.supernet, self.planned
        if step < plan.begins:
            return {"full": net.largest}
        generator = torch.Generator().manual_seed(mix_seed(self.seed, step, 41))
        phase = plan.phase(step)
        fixed = {} if phase else {"full": net.largest, "smallest": net.smallest}
        least: Any = phase.least if phase else None
        drawn = {
            f"random{k + 1}": net.sample(generator, coupled=config.sampling == "coupled", least=least)
            for k in range(config.networks - len(fixed))
        }
        return {**fixed, **drawn}

    # ---- one step ----------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch) -> Losses:
        config, net, step = self.config, self.supernet, int(self.steps_done)
        labels = self.labels(batch)
        weight = config.multiplier * self.planned.weight(step, self.rate)
        out, target = Losses(), None
        self.shared.clear()
        if self.teacher is not None and step >= self.planned.begins:
            with torch.no_grad():
                target = self._soft(self._pass(self.teacher, net.largest, batch))
        for role, code in self.codes(step).items():
            own = 1.0 if role == "full" else weight
            if own == 0:
                continue  # the first step of the ramp
            logits = self._pass(net, code, batch)
            self.shared.add(own)
            if role == "full":
                out.add("ce", self._hard(logits, labels))
                target = self._soft(logits) if config.target == "full" else target
            elif config.target == "labels":
                out.add(f"ce_{role}", self._hard(logits, labels), own)
            else:
                assert target is not None
                soft = soft_cross_entropy(logits, target, config.temperature)
                out.add(f"kd_{role}", soft, own * config.temperature**2)
                if config.label_weight:
                    out.add(f"ce_{role}", self._hard(logits, labels), own * config.label_weight)
        net.set_active(net.largest)
        return out.observe(weight=weight)

    def forward(self, batch: Any) -> Tensor:
        """The loss of one step; in training mode the step counts, and channels are sorted when shrinking begins."""
        if self.training and int(self.steps_done) == self.planned.begins:
            self.begin_shrinking()
        total = super().forward(batch)
        if self.training:
            self.steps_done += 1
        return total

    def watch(self, *optimizers: torch.optim.Optimizer) -> None:
        """Optimisers of the super-network, whose buffers move along when channels are sorted."""
        self.watched = list(optimizers)

    def begin_shrinking(self) -> None:
        """Sort the channels, and freeze the teacher where there is one."""
        if self.planned.begins == 0:
            return
        if self.config.sort:
            self.supernet.sort_channels(self.watched)
        if self.teacher is not None:
            self.teacher.load_state_dict(self.supernet.state_dict())

    def _pass(self, net: SuperNetwork, code: Code, batch: Batch) -> Tensor:
        net.set_active(code)
        logits = logits_of(call_model(net, batch.inputs))
        if self.training:
            self.counters[f"{self.prefix}network_passes"] += len(batch)
            self.counters[f"{self.prefix}forward_flops"] += int(net.costs(code)["flops"]) * len(batch)
        return logits

    def _hard(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def _soft(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.detach() / self.config.temperature, -1)

    # ---- training ----------------------------------------------------------------------------------------------------

    def optimisers(self, steps: int, lr: float | None = None) -> Mapping[str, Optimised]:
        """One optimiser over the super-network; norms and biases do not decay."""
        parameters = [p for p in self.supernet.parameters() if p.requires_grad]
        decayed = {"params": [p for p in parameters if p.ndim > 1]}
        others: dict[str, Any] = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        made = make_optimised([group for group in (decayed, others) if group["params"]], self.config, steps, lr=lr)
        self.watch(made.optimizer)
        return {"main": made}

    def stages(self, train: Data, val: Data | None = None, *, seed: int = 0) -> list[Stage]:
        """Training, the rivals' trainings, and the search where there is validation data."""
        made = self.training_stages(train, val, seed)
        passes = self.planned.passes
        for name, rival in self.rivals.items():
            assert isinstance(rival, DepS)
            steps = same_passes(passes, rival._plan, least=16)
            made += rival.training_stages(train, val, seed, steps=steps, title=name)
        if val is not None and self.config.search:
            made.append(self.search_stage(val, seed))
        return made

    def training_stages(
        self, train: Data, val: Data | None, seed: int, *, steps: int | None = None, title: str = "training"
    ) -> list[Stage]:
        """One stage; progressive shrinking has one for the full network and one for each phase."""
        config, self.seed = self.config, seed
        self.calibrate_on(train, seed)
        stream = Stream(train, config.batch_size, seed=mix_seed(seed, 5), views=config.views)
        plan = self.plan_for(steps or config.total_steps(stream.steps_per_epoch))
        every = max(1, plan.steps // config.evaluations) if config.evaluations else 0
        full: list[Phase] = [Phase("full", 0, plan.phases[0].first, {})] if plan.phases else []
        parts: Sequence[Phase] = (*full, *plan.phases) or (Phase("", 0, plan.steps, {}),)
        return [self._stage(f"{title} {part.name}".strip(), part, stream, val, every) for part in parts]

    def _stage(self, name: str, part: Phase, stream: Stream, val: Data | None, every: int) -> Stage:
        config, steps = self.config, part.end - part.first
        rate = config.lr * config.phase_lr if part.first else config.lr
        return Stage(
            name,
            steps,
            LaterStream(stream, part.first) if part.first else stream,
            losses=self.losses,
            optimisers=lambda: self.optimisers(steps, lr=rate),
            accumulate=config.accumulate,
            after_step=self._count,
            evaluate=None if val is None or not every else lambda: self.quick_metrics(val),
            evaluate_every=every,
        )

    def _count(self, _: int) -> None:
        self.steps_done += 1
        if int(self.steps_done) == self.planned.begins:
            self.begin_shrinking()

    def check(self, batch: Batch) -> None:
        super().check(batch)
        before, counted = self.plan, self.counters.copy()
        if self.plan is None:
            self.plan_for(1000)  # any length will do to see the kinds of steps
        for step in (0, self.planned.steps - 1):
            with self.untouched():
                self.steps_done.fill_(step)
                check_finite(self.losses(batch))
        self.plan = before
        self.counters.clear()
        self.counters.update(counted)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def load_training_state(self, state: dict[str, Any]) -> None:
        super().load_training_state(state)
        self._share_counters()

    def _share_counters(self) -> None:
        for rival in self.rivals.values():
            rival.counters = self.counters  # type: ignore[assignment]

    @classmethod
    def on_task(cls, task: Task, setup: Any, config: Any, *, seed: int = 0, progress: bool = True) -> Self:
        supernet = make_supernet(setup.student, task, seed)
        return cls(supernet, config, most=cls.bounds(setup), rivals=setup.rivals)

    def families(self) -> dict[str, SupernetMethod]:
        rivals = {name: rival for name, rival in self.rivals.items() if isinstance(rival, DepS)}
        return {self.name: self, **rivals}
