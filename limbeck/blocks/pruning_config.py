"""Settings of a training that prunes: how much goes, in which pattern, when, and which weights."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from limbeck.blocks.one_shot_pruning import Pattern
from limbeck.blocks.sparsity_schedules import SparsitySchedule, stages
from limbeck.core.config import Config

TARGETS = (0.50, 0.67, 0.75, 0.80, 0.83, 0.86, 0.88, 0.90)
"""Published sparsities of successive cycles, see :class:`limbeck.methods.compression.squarehead.SquareHead`."""


class PruningConfig(Config):
    """What is pruned, how and when."""

    sparsity: float = Field(0.8, ge=0, lt=1, description="share of the weights that go, in every layer")
    pattern: str | None = Field(
        None, description="n:m, such as 2:4: n of every m consecutive weights stay; instead of sparsity"
    )
    growth: Literal["one-shot", "staged", "linear", "cubic"] = Field(
        "one-shot",
        description="at once, in cycles of pruning and training whose learning rate starts anew, or little by little",
    )
    targets: tuple[float, ...] = Field(
        (), description="sparsities of the cycles when staged; none: the published ones below --sparsity, and it"
    )
    prunings: int = Field(8, ge=2, description="prunings when sparsity grows linearly or cubically")
    growth_end: float = Field(0.6, gt=0, le=1, description="fraction of training over which it grows then")
    pruner: Literal["magnitude", "obc"] = Field("magnitude", description="which weights go: the smallest, or by OBC")
    calibration: int = Field(512, ge=1, description="training samples that OBC looks at")
    damp: float = Field(1.0, gt=0, description="damping of OBC, relative to the mean of the diagonal")
    columns: int = Field(128, ge=1, description="columns that OBC decides on together")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.pattern is not None and not Pattern.parse(self.pattern).structured:
            raise ValueError(f"pattern is n:m, such as 2:4 (got {self.pattern}); a share is sparsity")
        if self.pattern is not None and self.growth != "one-shot":
            raise ValueError(f"n:m sparsity comes at once: growth must be one-shot (got {self.growth})")
        if self.targets and stages(self.targets) and self.growth != "staged":
            raise ValueError(f"targets are for growth staged (got {self.growth})")
        return self

    def cut(self) -> Pattern:
        """What each layer ends with."""
        return Pattern.parse(self.pattern or self.sparsity)

    def cycles(self) -> tuple[float, ...]:
        """The sparsity that each cycle of training ends with; one but when staged."""
        if self.growth != "staged":
            return (self.cut().sparsity,)
        return stages(self.targets or (*(t for t in TARGETS if t < self.sparsity), self.sparsity))

    def events(self, target: float, steps: int) -> dict[int, float]:
        """Within a cycle, after which of its steps weights are pruned (0: before the first), and to what sparsity."""
        growth = self.growth if self.growth in ("linear", "cubic") else "constant"
        return SparsitySchedule(target, growth, end=self.growth_end).events(steps, self.prunings)
