"""A stage: a resumable loop of steps. A method is one or more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from limbeck.core.batch import Batch, Losses
from limbeck.core.data import Stream
from limbeck.core.errors import InputError
from limbeck.core.optim import Optimised


class Stateful(Protocol):
    """Anything whose state belongs in a checkpoint: memory banks, EMA copies, controllers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class Stepper(Protocol):
    """What a free-form step updates parameters with; the engine provides one."""

    step: int

    def minimise(self, losses: Losses | Tensor, *names: str) -> None:
        """Zero the gradients, differentiate, synchronise over processes, clip, and step the named optimisers (all if none)."""


@dataclass
class Stage:
    """One loop.

    Most stages give ``losses``: the engine differentiates their total and steps every optimiser. A stage that alternates,
    unrolls, or moves something without gradients gives ``update`` instead and does what it likes in it.

    Attributes:
        name: unique within the method; the name in logs and checkpoints.
        steps: how many.
        stream: where batches come from; None for a stage without data.
        losses: batch -> losses.
        update: (batch, stepper) -> named scalars for the log.
        optimisers: called once when the stage is entered; the optimisers by name.
        accumulate: micro-batches per step (with ``losses`` only).
        normalisers: batch -> over how many items the mean of each term goes; needed when it is not the number of samples
            (valid tokens, say), so that accumulated micro-batches weigh as in one big batch.
        after_step: called with the number of the step that has just been done (EMA updates and the like).
        evaluate: named scalars, without side effects on what is trained.
        evaluate_every: steps between evaluations; the end of the stage is always evaluated. 0: only the end.
        prepare: called whenever the stage is entered, also on resuming: structure (add a head), no training state.
        begin: called on a fresh entry only: training state (re-initialise, copy weights).
        end: called after the last step.
        state: further objects to checkpoint.
    """

    name: str
    steps: int
    stream: Stream | None = None
    losses: Callable[[Batch], Losses] | None = None
    update: Callable[[Batch | None, Stepper], Mapping[str, Tensor]] | None = None
    optimisers: Callable[[], Mapping[str, Optimised]] = dict
    accumulate: int = 1
    normalisers: Callable[[Batch], Mapping[str, float]] | None = None
    after_step: Callable[[int], None] | None = None
    evaluate: Callable[[], Mapping[str, float]] | None = None
    evaluate_every: int = 0
    prepare: Callable[[], None] | None = None
    begin: Callable[[], None] | None = None
    end: Callable[[], None] | None = None
    state: Mapping[str, Stateful] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.losses is None) == (self.update is None):
            raise InputError(f"stage '{self.name}' needs either 'losses' or 'update'")
        if self.losses is not None and self.stream is None:
            raise InputError(f"stage '{self.name}' has losses but no stream of batches")
        if self.steps < 1:
            raise InputError(f"stage '{self.name}' must have at least one step (got {self.steps})")
