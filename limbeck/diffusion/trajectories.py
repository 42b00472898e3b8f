r"""States that a guided sampler passes through, with the guided prediction at each: what guidance is distilled from.

For a condition c, a scale w and noise :math:`x_T`, the sampler runs as usual, and at every step
:math:`(x_t,\ p_w(x_t, t, c),\ t)` is kept beside (c, w), p being what the network predicts. These states differ from
:math:`\alpha_t x_0 + \sigma_t \epsilon` of data, above all at large w.

Source: "Efficient Distillation of Classifier-Free Guidance using Adapters" (2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.data import Data
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.conditions import Condition, take
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import expand
from limbeck.diffusion.solvers import check_times, ddim_step
from limbeck.diffusion.stored_arrays import stored_array


class Recorded(NamedTuple):
    """A piece of trajectories.

    Attributes:
        states: (K, B, ...) at the first K times of the grid.
        predictions: (K, B, ...), what the network predicts there with guidance.
        end: (B, ...) at the last time; None where no sampler ran.
    """

    states: Tensor
    predictions: Tensor
    end: Tensor | None


@torch.no_grad()
def record_guided(denoiser: Denoiser, x: Tensor, times: Tensor, cond: Condition, guidance: float | Tensor) -> Recorded:
    """Run DDIM with guidance and keep every step, before any rescaling.

    Args:
        denoiser: the teacher; each step takes two of its evaluations per sample.
        x: (B, ...) at ``times[0]``.
        times: (K + 1,) falling.
        cond: (B, ...) conditions.
        guidance: w, a number or (B,).

    Raises:
        InputError: times that do not fall or leave the schedule; no null condition.
    """
    grid = check_times(times, denoiser.schedule)
    states, predictions = [], []
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        now = denoiser.times_like(t, x)
        found = denoiser.guided(x, now, cond, guidance, None)
        states.append(x)
        predictions.append(found)
        x = ddim_step(x, denoiser.converted(found, "x0", x, now), t, s, denoiser.schedule)
    return Recorded(torch.stack(states), torch.stack(predictions), x)


@torch.no_grad()
def record_diffused(
    denoiser: Denoiser,
    x0: Tensor,
    times: Tensor,
    cond: Condition,
    guidance: float | Tensor,
    generator: torch.Generator | None = None,
) -> Recorded:
    """The guided prediction at noised data instead: states alpha x0 + sigma eps with fresh noise at each of the first K times.

    This is what guidance was distilled from before; the same arguments as :func:`record_guided` otherwise.

    Source: "On Distillation of Guided Diffusion Models" (2023).
    """
    grid = check_times(times, denoiser.schedule)[:-1]
    where = x0.device if generator is None else generator.device
    states, predictions = [], []
    for t in grid.tolist():
        now = denoiser.times_like(t, x0)
        eps = torch.randn(x0.shape, generator=generator, device=where, dtype=x0.dtype).to(x0.device)
        alpha, sigma = expand(denoiser.schedule.alpha(now), x0), expand(denoiser.schedule.sigma(now), x0)
        states.append((alpha * x0 + sigma * eps).to(x0.dtype))
        predictions.append(denoiser.guided(states[-1], now, cond, guidance, None))
    return Recorded(torch.stack(states), torch.stack(predictions), None)


class TrajectoryStore:
    """N trajectories of K steps each: states and predictions (N, K, ...), and for each trajectory w and the condition.

    Args:
        count: N.
        times: (K + 1,) the grid of all of them; the last time has no state.
        shape: of one sample.
        folder: keep states and predictions in memory-mapped files there, of which a checkpoint only notes how many are done; None: in
            memory and in checkpoints.
        half: 16 bits for states and predictions.

    Attributes:
        done: trajectories written so far, from the first.

    Raises:
        InputError: no trajectory, or fewer than two times.
        RunError: the folder holds something else.
    """

    def __init__(
        self, count: int, times: Tensor, shape: Sequence[int], folder: Path | None = None, half: bool = False
    ) -> None:
        self.times = torch.as_tensor(times, dtype=torch.float64).cpu().flatten()
        if count < 1 or len(self.times) < 2:
            raise InputError(f"a store needs a trajectory and two times at least (got {count} and {len(self.times)})")
        self.count, self.steps, self.shape, self.done = count, len(self.times) - 1, tuple(shape), 0
        self.folder = None if folder is None else Path(folder)
        self.dtype = torch.float16 if half else torch.float32
        size = (self.count, self.steps, *self.shape)
        self.states, self.predictions = (
            stored_array(self.folder, name, size, self.dtype) for name in ("states", "predictions")
        )
        self.w = torch.zeros(count)
        self.cond: Condition = None

    def __len__(self) -> int:
        """Number of states that there is room for, N K."""
        return self.count * self.steps

    @property
    def nbytes(self) -> int:
        """Of states and predictions."""
        return 2 * self.states.numel() * self.states.element_size()

    def write(self, start: int, recorded: Recorded, cond: Condition, guidance: float | Tensor) -> None:
        """Trajectories number ``start`` and on.

        Raises:
            InputError: more trajectories or other steps than there is room for.
            RunError: a value is not finite, or not in 16 bits.
        """
        steps, rows = recorded.states.shape[:2]
        end = start + rows
        if steps != self.steps or end > self.count:
            raise InputError(
                f"trajectories {start} to {end - 1} of {steps} steps do not fit into a store of {self.count} of {self.steps}"
            )
        for name, kept, value in (
            ("states", self.states, recorded.states),
            ("predictions", self.predictions, recorded.predictions),
        ):
            moved = value.transpose(0, 1).cpu()
            if not bool(torch.isfinite(moved).all()):
                raise RunError(
                    f"the {name} of a guided trajectory hold NaN or infinity: check the teacher, the times and the scales"
                )
            moved = moved.to(self.dtype)
            if not bool(torch.isfinite(moved).all()):
                raise RunError(f"the {name} of a guided trajectory do not fit into 16 bits: keep them in 32")
            kept[start:end] = moved
        self.w[start:end] = torch.as_tensor(guidance, dtype=torch.float32).cpu()
        if cond is not None:
            if self.cond is None:
                self.cond = map_tensors(cond, lambda v: torch.zeros((self.count, *v.shape[1:]), dtype=v.dtype))
            parts = cond.items() if isinstance(cond, Mapping) else [("", cond)]
            for part, value in parts:
                (self.cond[part] if isinstance(self.cond, Mapping) else self.cond)[start:end] = value.cpu()
        self.done = max(self.done, end)

    def batch(self, ids: Tensor) -> dict[str, Any]:
        """States by number: ``x_t`` and ``prediction`` (B, ...) in single precision, ``t`` and ``w`` (B,), ``cond`` if there is one.

        State number i is step i % K of trajectory i // K.

        Raises:
            InputError: it was not recorded yet.
        """
        row, step = ids // self.steps, ids % self.steps
        if int(row.max()) >= self.done:
            raise InputError(f"trajectory {int(row.max())} was not recorded yet: there are {self.done}")
        found: dict[str, Any] = {
            "x_t": self.states[row, step].float(),
            "prediction": self.predictions[row, step].float(),
            "t": self.times[step].float(),
            "w": self.w[row],
        }
        cond = take(self.cond, row)
        return found if cond is None else {**found, "cond": cond}

    def draw(self, count: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """``count`` states drawn evenly over trajectories and steps, with replacement."""
        return self.batch(torch.randint(self.done * self.steps, (count,), generator=generator))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"done": self.done, "w": self.w, "cond": self.cond}
        return state if self.folder is not None else {**state, "states": self.states, "predictions": self.predictions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.w, self.cond = int(state["done"]), state["w"], state["cond"]
        if "states" in state:
            self.states, self.predictions = state["states"].to(self.dtype), state["predictions"].to(self.dtype)


class TrajectoryData(Data):
    """The states of a store as a data set: batches as of :meth:`TrajectoryStore.batch`. The store may still be empty when it is made."""

    def __init__(self, store: TrajectoryStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    @property
    def augmented(self) -> bool:
        return False

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        return Batch(self.store.batch(index), index=index, view=view)
