r"""The best K times to ask a network at, found from its own fine trajectories by a shortest path.

Anchors :math:`a_0 > a_1 > \dots > a_M` are a fine grid. From the states :math:`X_i` of fine trajectories, :math:`C_{ij}` is the mean squared
error of jumping from anchor i to anchor j in one step of DDIM (the step of Euler in ``flow`` and ``edm``). The schedule for K steps is the path
from 0 to M with exactly K edges of least total cost; one matrix serves every K. The total is what the search minimises, no forecast of the
error of sampling: every jump starts at the teacher's own state, so errors do not propagate in it.

Source: "Bellman Optimal Step-size Straightening of Flow-Matching Models" (2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.batch import map_tensors
from limbeck.core.data import mix_seed
from limbeck.core.errors import InputError, RunError, UnknownNameError
from limbeck.core.files import atomic_path
from limbeck.core.method import fingerprint
from limbeck.diffusion.conditions import Conditions, take
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.predictions import convert
from limbeck.diffusion.samplers import Sampler
from limbeck.diffusion.schedules import EDM, Flow, Schedule, VPDiscrete, expand
from limbeck.diffusion.solvers import check_times

Distance = Callable[[Tensor, Tensor], Tensor]
"""``(made (B, ...), wanted (B, ...)) -> (B,)``, 0 or more."""
CHUNK = 2**24
"""Numbers in the trajectories that are held at once, unless said otherwise."""


@dataclass(frozen=True)
class StepSchedule:
    """Times for K steps.

    Attributes:
        times: (K + 1,) float64, falling.
        indices: (K + 1,) int64, the same among the anchors; compare these, not floating-point times.
        predicted_cost: sum of the jumps' costs: what was minimised, and not the error of sampling.
        costs: the matrix it came from.
    """

    times: Tensor
    indices: Tensor
    predicted_cost: float
    costs: JumpCosts

    @property
    def steps(self) -> int:
        """K."""
        return len(self.times) - 1

    @property
    def step_sizes(self) -> Tensor:
        """(K,) float64, above 0."""
        return self.times[:-1] - self.times[1:]

    def with_steps(self, steps: int) -> StepSchedule:
        """The best schedule for another number of steps, from the same matrix."""
        return self.costs.schedule(steps)

    def sampler(self, denoiser: Denoiser, solver: str = "ddim", guidance: float = 1.0) -> Sampler:
        """A network sampled at these times."""
        return Sampler(denoiser, self.times, "ode", solver, guidance)


@dataclass(frozen=True)
class JumpCosts:
    """What one-step jumps between anchors cost.

    Attributes:
        anchors: (M + 1,) float64, falling.
        values: (M + 1, M + 1) float64; ``[i, j]`` is the mean cost of the jump from anchor i to anchor j > i, infinite elsewhere. Jumps
            to the next anchor are the fine trajectory itself and cost 0.
        probes: over how many trajectories.

    Raises:
        InputError: shapes that do not fit, costs that are NaN or negative.
    """

    anchors: Tensor
    values: Tensor
    probes: int

    def __post_init__(self) -> None:
        size = len(self.anchors)
        if self.values.shape != (size, size):
            raise InputError(
                f"a matrix of costs for {size} anchors is ({size}, {size}), not {tuple(self.values.shape)}"
            )
        forward = self.values[torch.ones(size, size, dtype=torch.bool).triu(1)]
        if bool(forward.isnan().any()) or bool((forward < 0).any()):
            raise InputError(
                "the costs of jumps must be 0 or more, not NaN: check the teacher, the anchors and the guidance"
            )

    @property
    def intervals(self) -> int:
        """M, the largest number of steps."""
        return len(self.anchors) - 1

    def schedule(self, steps: int) -> StepSchedule:
        """The best schedule for ``steps`` steps.

        Raises:
            InputError: fewer than one, or more than there are intervals.
        """
        best, paths = bellman_paths(self.values, steps)
        indices = paths[-1]
        return StepSchedule(self.anchors[indices], indices, float(best[-1]), self)

    def least(self, most: int) -> Tensor:
        """(most,) float64: the least total costs with 1, 2, … ``most`` steps. They need not fall all the way to M: a path has exactly K edges."""
        return bellman_paths(self.values, most)[0]

    def joined(self, other: JumpCosts) -> JumpCosts:
        """The mean over the probes of both.

        Raises:
            InputError: other anchors.
        """
        if not torch.equal(self.anchors, other.anchors):
            raise InputError("costs of jumps between different anchors cannot be joined")
        total = self.probes + other.probes
        values = (self.values * self.probes + other.values * other.probes) / total
        return JumpCosts(self.anchors, values, total)

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, anchors=self.anchors.numpy(), values=self.values.numpy(), probes=np.int64(self.probes))

    @classmethod
    def load(cls, path: Path) -> JumpCosts:
        """Read what :meth:`save` wrote.

        Raises:
            RunError: no such file, or damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as found:
                anchors, values = torch.from_numpy(found["anchors"]), torch.from_numpy(found["values"])
                return cls(anchors, values, int(found["probes"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise RunError(f"{path} does not hold costs of jumps ({error}): remove it") from None


def bellman_paths(values: Tensor, most: int) -> tuple[Tensor, list[Tensor]]:
    r"""Shortest paths from the first to the last anchor with exactly 1, 2, …, ``most`` edges.

    :math:`V_1(j) = C_{jM}`, :math:`V_k(j) = \min_{j<h<M} C_{jh} + V_{k-1}(h)`; of equal paths the one with the earliest anchors.

    Args:
        values: (M + 1, M + 1), costs above the diagonal; the rest is not read.
        most: 1 … M.

    Returns:
        (most,) float64 costs :math:`V_k(0)`, and the paths, (k + 1,) int64 indices each.

    Raises:
        InputError: ``most`` out of range.
    """
    last = len(values) - 1
    if not 1 <= most <= last:
        raise InputError(f"a schedule on {last} intervals between anchors has 1 to {last} steps (got {most})")
    cost = values.double().cpu()
    cost = cost.masked_fill(torch.ones(cost.shape, dtype=torch.bool).tril(), torch.inf)
    value = torch.full((last + 1,), torch.inf, dtype=torch.float64)
    value[last] = 0
    choices, best = [], []
    for _ in range(most):
        value, choice = (cost + value).min(1)
        choices.append(choice)
        best.append(value[0])
    paths = []
    for edges in range(1, most + 1):
        path = [0]
        for left in range(edges - 1, -1, -1):
            path.append(int(choices[left][path[-1]]))
        paths.append(torch.tensor(path))
    return torch.stack(best), paths


def jump_cost_matrix(
    states: Tensor, slopes: Tensor, anchors: Tensor, schedule: Schedule, cost: str | Distance = "l2", chunk: int = CHUNK
) -> Tensor:
    r"""Costs of all jumps between anchors, from trajectories.

    ``l2``: :math:`C_{ij} = \frac1N \sum_n \|X^n_j - \alpha_j \hat x^n_{0,i} - \sigma_j \hat\epsilon^n_i\|^2 / (\alpha_j + \sigma_j)^2`, the sum being
    over all dimensions. In ``flow`` that is :math:`\|X_j - X_i - (a_j - a_i) U_i\|^2`. Dividing by :math:`\alpha_j + \sigma_j` takes every schedule
    to the coordinates of a rectified flow: in those of ``edm`` errors at high noise would count too much (the authors' code wraps such networks as
    flows; for others it is our decision). The jump is linear in :math:`(\alpha_j, \sigma_j)`, so all pairs follow from matrix products, in double
    precision.

    Args:
        states: (M + 1, N, ...) at the anchors.
        slopes: (M, N, ...) dx/dt at all but the last.
        anchors: (M + 1,) float64, falling.
        schedule: of the times.
        cost: ``l2``, or a distance, called in the same coordinates with at most ``chunk`` numbers at once.

    Returns:
        (M + 1, M + 1) float64 on the CPU.
    """
    if isinstance(cost, str) and cost != "l2":
        raise UnknownNameError("cost of a jump", cost, ("l2",), hint="Or give a function (made, wanted) -> (B,).")
    x = states.double()
    times = anchors.to(x.device)
    clean = convert(slopes.double(), "flow", "x0", x[:-1], times[:-1], schedule)
    noise = convert(slopes.double(), "flow", "eps", x[:-1], times[:-1], schedule)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    unit = alpha + sigma
    x, alpha, sigma = x / expand(unit, x), alpha / unit, sigma / unit
    if isinstance(cost, str):
        found = _squared(x.flatten(1), clean.flatten(1), noise.flatten(1), alpha, sigma) / x.shape[1]
    else:
        kind = states.dtype
        found = _measured(x.to(kind), clean.to(kind), noise.to(kind), alpha, sigma, cost, chunk)
    size = len(anchors)
    full = torch.full((size, size), torch.inf, dtype=torch.float64)
    full[:-1] = found.cpu()
    full.masked_fill_(torch.ones(size, size, dtype=torch.bool).tril(), torch.inf)
    full.diagonal(1).zero_()  # the fine trajectory goes exactly there; what is left is rounding
    return full


def _squared(x: Tensor, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(M, M + 1) sums of squares; rows of the arguments are anchors, columns probes times dimensions."""
    squares = x.square().sum(1) - 2 * (clean @ x.T * alpha + noise @ x.T * sigma)
    own = [(a * b).sum(1)[:, None] for a, b in ((clean, clean), (clean, noise), (noise, noise))]
    squares = squares + own[0] * alpha**2 + 2 * own[1] * (alpha * sigma) + own[2] * sigma**2
    return squares.clamp_min(0)


def _measured(
    x: Tensor, clean: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, cost: Distance, chunk: int
) -> Tensor:
    """(M, M + 1) means of a distance; the jumps from one anchor to all later ones are made together."""
    size, count = len(x), x.shape[1]
    found = torch.zeros(size - 1, size, dtype=torch.float64)
    together = max(1, chunk // max(1, x[0].numel()))
    for i in range(size - 1):
        for j in torch.arange(i + 1, size).split(together):
            a, s = alpha[j].to(x.dtype), sigma[j].to(x.dtype)
            made = expand(a, x) * clean[i] + expand(s, x) * noise[i]
            value = cost(made.flatten(0, 1), x[j].flatten(0, 1))
            if value.shape != (len(j) * count,):
                raise InputError(f"a cost gives one number per sample, ({len(j) * count},), not {tuple(value.shape)}")
            found[i, j] = value.double().view(len(j), count).mean(1).cpu()
    return found


@torch.no_grad()
def jump_costs(
    denoiser: Denoiser,
    noise: Tensor,
    anchors: int | Sequence[float] | Tensor = 100,
    *,
    cond: Any = None,
    cost: str | Distance = "l2",
    guidance: float = 1.0,
    chunk: int = CHUNK,
) -> JumpCosts:
    """Costs of jumps along the trajectories from these noises; M evaluations per noise (guided ones count two).

    Args:
        denoiser: the teacher.
        noise: (N, ...) unit noise, on the teacher's device.
        anchors: M for the schedule's own grid (shifted for a shifted flow, rho = 7 for ``edm``), or (M + 1,) falling times.
        cond: (N, ...) conditions, kept along a trajectory.
        cost: see :func:`jump_cost_matrix`.
        guidance: w of the trajectories and so of the jumps.
        chunk: numbers in the trajectories that are held at once; it changes memory, not the result.

    Raises:
        InputError: times that do not fall, trajectories that are not finite.
    """
    schedule = denoiser.schedule
    grid = schedule.times(anchors) if isinstance(anchors, int) else check_times(torch.as_tensor(anchors), schedule)
    sampler = Sampler(denoiser, grid, guidance=guidance)
    each = max(1, chunk // (len(grid) * max(1, noise[0].numel())))
    whole: JumpCosts | None = None
    for ids in torch.arange(len(noise)).split(each):
        found = sampler.sample(noise[ids], take(cond, ids), record=True)
        assert found.states is not None and found.slopes is not None
        if not bool(torch.isfinite(found.states).all()):
            raise InputError(
                "a trajectory of the teacher holds NaN or infinity: check the teacher, the anchors and the guidance"
            )
        values = jump_cost_matrix(found.states, found.slopes, grid, schedule, cost, chunk)
        part = JumpCosts(grid, values, len(ids))
        whole = part if whole is None else whole.joined(part)
    if whole is None:
        raise InputError("the costs of jumps need at least one probe")
    return whole


def bellman_schedule(
    denoiser: Denoiser,
    steps: int,
    shape: Sequence[int] | None = None,
    *,
    anchors: int | Sequence[float] | Tensor = 100,
    probes: int = 100,
    conditions: Any = None,
    cost: str | Distance = "l2",
    guidance: float = 1.0,
    cost_matrix: JumpCosts | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    chunk: int = CHUNK,
) -> StepSchedule:
    """The best times for ``steps`` steps of a network, without training it.

    ::

        schedule = bellman_schedule(denoiser, 6, shape=(3, 64, 64))
        schedule.sampler(denoiser).sample(z)
        schedule.with_steps(4)  # from the same matrix

    Any schedule of noise (flow, EDM, variance preserving) and any conditions. The schedule was made for first-order steps; it may be used with
    ``heun`` as well.

    Args:
        denoiser: the network.
        steps: K, 1 … M.
        shape: of one sample; not needed with ``cost_matrix``.
        anchors: M or the grid itself, see :func:`jump_costs`. Too few bias towards short steps, as jumps to the next anchor count as free.
        probes: N, trajectories.
        conditions: what conditions of probes are drawn from (see :meth:`~limbeck.diffusion.conditions.Conditions.of`); None: unconditional.
        cost: ``l2`` or a distance.
        guidance: w; the guided velocity counts.
        cost_matrix: costs that are known already; the arguments about probes are then not used.
        seed: of the probes.
        cache: folder where matrices are kept by teacher (a hash of its weights), anchors, probes, conditions, guidance and cost.
        chunk: see :func:`jump_costs`.

    Raises:
        InputError: settings out of range; a cache with a cost that has no name.
    """
    if cost_matrix is not None:
        return cost_matrix.schedule(steps)
    if shape is None:
        raise InputError("a search for step sizes needs shape=… (of one sample), or cost_matrix=…")
    if probes < 1:
        raise InputError(f"a search for step sizes needs at least one probe (got {probes})")
    grid = (
        denoiser.schedule.times(anchors)
        if isinstance(anchors, int)
        else check_times(torch.as_tensor(anchors), denoiser.schedule)
    )
    if not 1 <= steps < len(grid):
        raise InputError(
            f"a schedule on {len(grid) - 1} intervals between anchors has 1 to {len(grid) - 1} steps (got {steps})"
        )
    noise, cond = probe_noise(shape, probes, seed), probe_conditions(conditions, probes, seed)
    file = None
    if cache is not None:
        file = Path(cache) / f"jump-costs-{_key(denoiser, grid, noise, cond, cost, guidance)}.npz"
        if file.exists():
            return JumpCosts.load(file).schedule(steps)
    where = device_of(denoiser)
    moved = map_tensors(cond, lambda v: v.to(where))
    costs = jump_costs(denoiser, noise.to(where), grid, cond=moved, cost=cost, guidance=guidance, chunk=chunk)
    if file is not None:
        costs.save(file)
    return costs.schedule(steps)


def probe_noise(shape: Sequence[int], probes: int, seed: int) -> Tensor:
    """Unit noise (probes, ...) of a search."""
    return torch.randn((probes, *shape), generator=torch.Generator().manual_seed(mix_seed(seed, 541)))


def probe_conditions(conditions: Any, probes: int, seed: int) -> Any:
    """Conditions (probes, ...) of a search, or None."""
    if conditions is None:
        return None
    return Conditions.of(conditions).draw(probes, torch.Generator().manual_seed(mix_seed(seed, 547)))


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a network is; the CPU where it has no tensors."""
    found = next(iter(module.parameters()), next(iter(module.buffers()), None))
    return torch.device("cpu") if found is None else found.device


def _key(denoiser: Denoiser, grid: Tensor, noise: Tensor, cond: Any, cost: str | Distance, guidance: float) -> str:
    name = cost if isinstance(cost, str) else getattr(cost, "name", None)
    if not isinstance(name, str):
        raise InputError("a cost of your own needs an attribute 'name' to be cached: give it one, or leave cache out")
    digest = hashlib.sha256(f"{fingerprint(denoiser)};{denoiser.describe()};{name};{float(guidance)}".encode())
    digest.update(grid.numpy().tobytes() + noise.numpy().tobytes())
    map_tensors(cond, lambda v: digest.update(v.contiguous().cpu().numpy().tobytes()))
    return digest.hexdigest()[:24]


def to_diffusers(
    schedule: StepSchedule | Tensor, noise_schedule: Schedule, *, shift: float | None = None
) -> dict[str, Any]:
    r"""The times as arguments of ``set_timesteps`` of diffusers' schedulers (and of pipelines that pass them on).

    ``flow``: ``sigmas`` for FlowMatchEulerDiscreteScheduler. It shifts what it is given, so these are unshifted,
    :math:`t / (s - (s - 1) t)`. ``vp-discrete``: ``timesteps``, whole indices (anchors between them are rounded). ``edm``: ``sigmas`` for
    EDMEulerScheduler with its Karras schedule, which takes places on its grid from 0 (most noise) to 1. All end at clean data by themselves;
    EDMEulerScheduler needs ``final_sigmas_type="zero"``, its default.

    Args:
        schedule: times, the last being 0.
        noise_schedule: of the times.
        shift: s of the scheduler, where it is not that of ``noise_schedule`` (exp(mu) for a dynamic one).

    Raises:
        InputError: a schedule that diffusers has not; times that do not end at 0; two times at one index.
    """
    times = schedule.times if isinstance(schedule, StepSchedule) else schedule
    times = check_times(times, noise_schedule)
    if float(times[-1]) != 0:
        raise InputError(
            f"schedulers of diffusers end at clean data, these times at {float(times[-1]):g}: use anchors that end in 0"
        )
    asked = times[:-1]
    if isinstance(noise_schedule, Flow):
        s = noise_schedule.shift if shift is None else float(shift)
        return {"sigmas": (asked / (s - (s - 1) * asked)).tolist()}
    if isinstance(noise_schedule, EDM):
        bend = 1 / noise_schedule.rho
        first, last = noise_schedule.t_max**bend, noise_schedule.t_min**bend
        return {"sigmas": (asked**bend - first) / (last - first)}
    if isinstance(noise_schedule, VPDiscrete):
        index = (asked * noise_schedule.steps - 1).round().long().clamp_min(0)
        if bool((index[1:] >= index[:-1]).any()):
            raise InputError(
                f"two times fall on one of {noise_schedule.steps} indices: use anchors (k + 1)/{noise_schedule.steps}"
            )
        return {"timesteps": index.tolist()}
    raise InputError(f"diffusers has no scheduler for the schedule '{noise_schedule.name}'")
