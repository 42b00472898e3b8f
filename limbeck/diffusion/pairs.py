"""Pairs of noise and sample that a sampler's ODE joins, in memory or in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.batch import Batch, map_tensors
from limbeck.core.data import Data, mix_seed
from limbeck.core.errors import InputError, RunError
from limbeck.diffusion.conditions import Condition, Conditions, take
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.stored_arrays import stored_array


def noise_of(seed: int, start: int, count: int, shape: Sequence[int]) -> Tensor:
    """Unit noise (count, ...) of a chunk of pairs: a function of the seed and the chunk's first number."""
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(mix_seed(seed, start, 211)))


class PairStore:
    """Noise z, sample x and condition of every pair.

    Args:
        count: number of pairs.
        shape: of one sample.
        folder: keep them in memory-mapped files there, of which a checkpoint only notes how many are there; None: in memory and in
            checkpoints.
        half: 16 bits for samples and noise.

    Attributes:
        done: pairs written so far, from the first.
    """

    def __init__(self, count: int, shape: Sequence[int], folder: Path | None = None, half: bool = False) -> None:
        if count < 1:
            raise InputError(f"a store needs at least one pair (got {count})")
        self.count, self.shape, self.done = count, tuple(shape), 0
        self.folder = None if folder is None else Path(folder)
        self.dtype = torch.float16 if half else torch.float32
        self.z, self.x = (stored_array(self.folder, n, (self.count, *self.shape), self.dtype) for n in ("z", "x"))
        self.cond: Condition = None

    def write(self, start: int, z: Tensor, x: Tensor, cond: Condition = None) -> None:
        """Pairs number ``start`` and on.

        Raises:
            RunError: a sample is not finite.
        """
        if not bool(torch.isfinite(x).all()):
            raise RunError("a generated sample holds NaN or infinity: check the teacher, the times and the guidance")
        end = start + len(x)
        self.z[start:end], self.x[start:end] = z.cpu().to(self.dtype), x.cpu().to(self.dtype)
        if cond is not None:
            if self.cond is None:
                self.cond = map_tensors(cond, lambda v: torch.zeros((self.count, *v.shape[1:]), dtype=v.dtype))
            parts = cond.items() if isinstance(cond, Mapping) else [("", cond)]
            for name, value in parts:
                (self.cond[name] if isinstance(self.cond, Mapping) else self.cond)[start:end] = value.cpu()
        self.done = max(self.done, end)

    def fill(
        self, sampler: Sampler, conditions: Conditions, start: int, count: int, seed: int, device: Any = None
    ) -> None:
        """Make and write ``count`` pairs from number ``start`` on; each chunk is a function of the seed and its place."""
        count = min(count, self.count - start)
        z = noise_of(seed, start, count, self.shape)
        cond = conditions.draw(count, torch.Generator().manual_seed(mix_seed(seed, start, 223)))
        moved = map_tensors(cond, lambda v: v.to(device)) if device is not None else cond
        extra = torch.Generator().manual_seed(mix_seed(seed, start, 227))
        made = sampler.sample(z if device is None else z.to(device), moved, extra)
        self.write(start, z, made.x, cond)

    def batch(self, ids: Tensor, device: Any = None) -> tuple[Tensor, Tensor, Any]:
        """z, x (B, ...) in single precision and the conditions of the pairs with these ids."""
        if int(ids.max()) >= self.done:
            raise InputError(f"pair {int(ids.max())} was not made yet: there are {self.done}")
        z, x, cond = self.z[ids].float(), self.x[ids].float(), take(self.cond, ids)
        if device is None:
            return z, x, cond
        return z.to(device), x.to(device), map_tensors(cond, lambda v: v.to(device))

    def transport_cost(self) -> float:
        """Mean of (z - x)^2 per dimension: reflow never makes it larger, up to the error of the fit."""
        return float((self.z[: self.done].float() - self.x[: self.done].float()).square().mean())

    def __len__(self) -> int:
        return self.done

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"done": self.done, "cond": self.cond}
        return state if self.folder is not None else {**state, "z": self.z, "x": self.x}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.cond = int(state["done"]), state["cond"]
        if "z" in state:
            self.z, self.x = state["z"].to(self.dtype), state["x"].to(self.dtype)


@torch.no_grad()
def straightness(sampler: Sampler, z: Tensor, cond: Condition = None) -> float:
    r"""How far paths of an ODE are from straight lines: :math:`E\int_0^1 \|(x_{t_{max}} - x_0) - u(x_t, t)\|^2 dt` per dimension, 0 for straight ones.

    Args:
        sampler: of kind ``ode``, in the schedule ``flow``; its steps are those of the integral.
        z: (B, ...) unit noise.

    Raises:
        InputError: another schedule or kind: velocities are constant along straight paths of ``flow`` alone.

    Source: "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow" (2022).
    """
    if sampler.kind != "ode" or sampler.denoiser.schedule.name != "flow":
        raise InputError(
            "straightness is that of an ODE in the schedule 'flow': see limbeck.diffusion.transforms.InSchedule"
        )
    found = sampler.sample(z, cond, record=True)
    assert found.states is not None and found.slopes is not None
    chord = found.states[0] - found.x
    gaps = (chord - found.slopes).square().flatten(1).mean(1)
    lengths = (found.times[:-1] - found.times[1:]).to(gaps)
    return float((gaps * lengths).sum())


class PairData(Data):
    """The pairs of a store as a data set: batches of ``{"x0": …, "z": …, "cond": …}``. The store may still be empty when it is made."""

    def __init__(self, pairs: PairStore) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return self.pairs.count

    @property
    def augmented(self) -> bool:
        return False

    def fetch(self, index: Tensor, view: int | None) -> Batch:
        z, x, cond = self.pairs.batch(index)
        inputs: dict[str, Any] = {"x0": x, "z": z}
        return Batch(inputs if cond is None else {**inputs, "cond": cond}, index=index, view=view)
