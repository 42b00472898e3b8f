"""How one set of anchors is trained: an optimiser of its own with falling rates, growing and pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.optim import OptimiserConfig, lr_factor, make_optimised
from limbeck.rendering.anchor_growing import AnchorGrowing, GrowingRule
from limbeck.rendering.anchors import Anchors, Drawn
from limbeck.rendering.views import View


@dataclass(frozen=True)
class AnchorRates:
    """Learning rates of what anchors carry, and what fraction of the offsets' one is left at the end."""

    features: float = 7.5e-3
    offsets: float = 1e-2
    log_scales: float = 7e-3
    offsets_end: float = 0.01


class decayed:
    """Multiplier of a rate at a step: a schedule, times an exponential that ends at ``end``."""

    def __init__(self, config: OptimiserConfig, steps: int, end: float = 1.0) -> None:
        self.steps, self.end = steps, end
        self.factor = lr_factor(config.schedule, steps, config.warmup, config.milestones)

    def __call__(self, step: int) -> float:
        return self.factor(step) * self.end ** min(1.0, step / max(1, self.steps))


class AnchorTraining:
    """The state of one set's training, which a checkpoint keeps.

    Args:
        anchors: what is trained. config: update rule and schedule. rates: of the parameters. steps: of this set.
        rule: of growing; None: the anchors stay as many as they are. begin, end: steps between which they change.
    """

    def __init__(
        self,
        anchors: Anchors,
        config: OptimiserConfig,
        rates: AnchorRates,
        steps: int,
        rule: GrowingRule | None = None,
        begin: int = 0,
        end: int = 0,
    ) -> None:
        self.anchors, self.config = anchors, config
        self.rates = {name: getattr(rates, name) for name in ("features", "offsets", "log_scales")}
        groups = [{"params": [getattr(anchors, name)], "lr": lr, "name": name} for name, lr in self.rates.items()]
        self.optimizer = make_optimised(groups, config, steps).optimizer
        self.factors = {
            name: decayed(config, steps, rates.offsets_end if name == "offsets" else 1.0) for name in self.rates
        }
        self.growing = None if rule is None else AnchorGrowing(anchors, rule)
        self.begin, self.end = begin, end

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, number: int, found: Drawn | None = None, view: View | None = None) -> None:
        """One update, after the backward pass; ``number`` of this set's earlier ones. With a picture, anchors may come and go."""
        for group in self.optimizer.param_groups:
            name = group["name"]
            group["lr"] = self.rates[name] * self.factors[name](number)
        if self.config.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.anchors.parameters(), self.config.clip_grad)
        changing = self.growing is not None and found is not None and number < self.end
        if changing:
            assert self.growing is not None and found is not None and view is not None
            self.growing.record(found, view)
        self.optimizer.step()
        if changing and number + 1 > self.begin and (number + 1) % self.growing.rule.every == 0:  # type: ignore[union-attr]
            self.growing.change(self.anchors, self.optimizer)  # type: ignore[union-attr]

    def to(self, device: torch.device) -> None:
        """Move anchors and running means, so that sets that wait need no memory of the accelerator."""
        if self.anchors.positions.device == device:
            return
        self.anchors.to(device)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    state[key] = value.to(device)
        if self.growing is not None:
            self.growing.load_state_dict({k: v.to(device) for k, v in self.growing.state_dict().items()}, device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "growing": None if self.growing is None else self.growing.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.growing is not None and state["growing"] is not None:
            self.growing.load_state_dict(state["growing"])
