r"""Segments of a teacher's trajectories: what a student learns to cross in one step.

A segment goes from :math:`(x_t, t)` to :math:`(x_s, s)`. For one step of DDIM to cross it, the network must predict :func:`step_target`.
:class:`SegmentStore` keeps the segments of many trajectories, for several numbers of steps at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.data import Data
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.conditions import Condition, take
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import Schedule, expand
from limbeck.diffusion.solvers import ddim_step
from limbeck.diffusion.step_sizes import StepSchedule
from limbeck.diffusion.stored_arrays import stored_array


class SegmentStore:
    """States of trajectories at the times of one or several schedules, in memory or in a file.

    Args:
        count: trajectories.
        shape: of one sample.
        steps: numbers of steps K to harvest, all from the same trajectories.
        folder: keep the states in a memory-mapped file there, of which a checkpoint only notes how many are there; None: in memory and in
            checkpoints.
        half: 16 bits for the states.

    Attributes:
        done: trajectories written so far, from the first.
        times: (K + 1,) float64 by K; empty until :meth:`plan`.

    Raises:
        InputError: no trajectories, no or repeated numbers of steps.
    """

    def __init__(
        self, count: int, shape: Sequence[int], steps: Sequence[int], folder: Path | None = None, half: bool = False
    ) -> None:
        if count < 1:
            raise InputError(f"a store of segments needs at least one trajectory (got {count})")
        if not steps or min(steps) < 1 or len(set(steps)) != len(steps):
            raise InputError(f"numbers of steps to harvest must be different and at least 1 (got {list(steps)})")
        self.count, self.shape, self.steps = count, tuple(shape), tuple(steps)
        self.done, self.cond = 0, None
        self.times: dict[int, Tensor] = {}
        self.indices: dict[int, Tensor] = {}
        self.folder = None if folder is None else Path(folder)
        self.dtype = torch.float16 if half else torch.float32
        # The two ends belong to every schedule; what is between them is kept for each by itself.
        self.columns: dict[int, Tensor] = {}
        last = 1 + sum(k - 1 for k in self.steps)
        used = 1
        for k in self.steps:
            self.columns[k] = torch.tensor([0, *range(used, used + k - 1), last])
            used += k - 1
        self.states = stored_array(self.folder, "states", (count, last + 1, *self.shape), self.dtype)

    cond: Condition

    def plan(self, schedules: Mapping[int, StepSchedule]) -> None:
        """Say which anchors and times the schedules have; they begin and end at the same anchors.

        Raises:
            InputError: a number of steps that the store was not made for, or none for one that it was.
        """
        if set(schedules) != set(self.steps) or any(schedules[k].steps != k for k in schedules):
            raise InputError(f"the store is for {list(self.steps)} steps, the schedules are for {sorted(schedules)}")
        ends = {(float(p.times[0]), float(p.times[-1])) for p in schedules.values()}
        if len(ends) != 1:
            raise InputError("schedules that share trajectories must begin and end at the same times")
        self.times = {k: schedules[k].times.clone() for k in self.steps}
        self.indices = {k: schedules[k].indices.clone() for k in self.steps}

    def write(self, start: int, states: Tensor, cond: Condition = None) -> None:
        """Trajectories number ``start`` and on, as a solver recorded them: (M + 1, n, ...) at all anchors.

        Raises:
            RunError: a state is not finite.
            InputError: no plan yet.
        """
        if not self.indices:
            raise InputError("the store has no plan yet: call plan(schedules) first")
        if not bool(torch.isfinite(states).all()):
            raise RunError(
                "a trajectory of the teacher holds NaN or infinity: check the teacher, the anchors and the guidance"
            )
        end = start + states.shape[1]
        for k in self.steps:
            kept = states[self.indices[k].to(states.device)].transpose(0, 1)
            self.states[start:end, self.columns[k]] = kept.cpu().to(self.dtype)
        if cond is not None:
            if self.cond is None:
                self.cond = map_tensors(cond, lambda v: torch.zeros((self.count, *v.shape[1:]), dtype=v.dtype))
            parts = cond.items() if isinstance(cond, Mapping) else [("", cond)]
            for name, value in parts:
                (self.cond[name] if isinstance(self.cond, Mapping) else self.cond)[start:end] = value.cpu()
        self.done = max(self.done, end)

    def segments(self, steps: int) -> Segments:
        """The pool for K steps.

        Raises:
            InputError: K was not harvested.
        """
        if steps not in self.steps:
            raise InputError(f"{steps} steps were not harvested: there are {', '.join(map(str, self.steps))}")
        return Segments(self, steps)

    def __len__(self) -> int:
        return self.done

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the states only where they are in memory."""
        known: dict[str, Any] = {"done": self.done, "cond": self.cond, "times": self.times, "indices": self.indices}
        return known if self.folder is not None else {**known, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.cond = int(state["done"]), state["cond"]
        self.times, self.indices = dict(state["times"]), dict(state["indices"])
        if "states" in state:
            self.states = state["states"].to(self.dtype)


class Segments(Data):
    """All segments of all trajectories for one number of steps, pooled: sample i is segment ``i % K`` of trajectory ``i // K``.

    A pass over the pool shows every segment of every trajectory once. Batches have inputs ``x_t``, ``x_s`` (B, ...), ``t``, ``s`` (B,) float64,
    and ``cond`` where there are conditions.
    """

    def __init__(self, store: SegmentStore, steps: int) -> None:
        self.store, self.steps = store, steps

    def __len__(self) -> int:
        return self.store.count * self.steps

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        store = self.store
        path, place = index.cpu() // self.steps, index.cpu() % self.steps
        if int(path.max()) >= store.done:
            raise InputError(f"trajectory {int(path.max())} was not made yet: there are {store.done}")
        columns, times = store.columns[self.steps], store.times[self.steps]
        inputs: dict[str, Any] = {
            "x_t": store.states[path, columns[place]].float(),
            "x_s": store.states[path, columns[place + 1]].float(),
            "t": times[place],
            "s": times[place + 1],
        }
        if store.cond is not None:
            inputs["cond"] = take(store.cond, path)
        return Batch(inputs, index=index, view=view)


def step_target(x_t: Tensor, x_s: Tensor, t: Tensor | float, s: Tensor | float, schedule: Schedule) -> Tensor:
    r"""The clean sample that a network must predict at :math:`(x_t, t)` for one step of DDIM to arrive at :math:`x_s`.

    :math:`\tilde x = \frac{x_s - (\sigma_s/\sigma_t)\,x_t}{\alpha_s - (\sigma_s/\sigma_t)\,\alpha_t}`; at s = 0 it is x_s. As a velocity in ``flow``
    it is the slope :math:`(x_s - x_t)/(s - t)`. Computed in double precision, as the denominator is small for short steps.

    Args:
        x_t, x_s: (B, ...). t, s: numbers, () or (B,); s < t.

    Source: "Progressive Distillation for Fast Sampling of Diffusion Models" (2022).
    """
    t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device)
    s = torch.as_tensor(s, dtype=torch.float64, device=x_t.device)
    ratio = schedule.sigma(s) / schedule.sigma(t)
    scale = 1 / (schedule.alpha(s) - ratio * schedule.alpha(t))
    found = expand(scale, x_t) * (x_s.double() - expand(ratio, x_t) * x_t.double())
    return found.to(x_t.dtype)


def two_step_target(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    middle: Tensor,
    s: Tensor,
    cond: Any = None,
    guidance: float | Tensor = 1.0,
) -> Tensor:
    """The clean sample that makes one step of DDIM from t to s arrive where the denoiser's two steps by way of ``middle`` do.

    Args:
        x_t: (B, ...). t, middle, s: (B,) falling.

    Source: "Progressive Distillation for Fast Sampling of Diffusion Models" (2022).
    """
    with torch.no_grad():
        half = ddim_step(x_t, denoiser.predict(x_t, t, cond, "x0", guidance), t, middle, denoiser.schedule)
        whole = ddim_step(half, denoiser.predict(half, middle, cond, "x0", guidance), middle, s, denoiser.schedule)
        return step_target(x_t, whole, t, s, denoiser.schedule)
