r"""Exact teachers: mixtures of Gaussians and kernel densities, whose denoisers are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.diffusion.denoisers import Denoiser
from limbeck.diffusion.schedules import Flow, Schedule, precise


class MixtureNetwork(nn.Module):
    r"""The exact denoiser of a mixture of K isotropic Gaussians, called with times of its schedule.

    .. math:: E[x_0|x_t] = \sum_k r_k \Big(\mu_k + \frac{\alpha s^2}{\alpha^2 s^2 + \sigma^2}(x_t - \alpha\mu_k)\Big), \qquad
              r_k = \mathrm{softmax}\Big(\log w_k - \frac{\|x_t - \alpha\mu_k\|^2}{2(\alpha^2 s^2 + \sigma^2)}\Big)

    Args:
        means: (K, ...). std: s >= 0. weights: (K,) or None for equal ones. labels: (K,) class of each component, or None.
        schedule: whose times it is given.
    """

    means: Tensor
    log_weights: Tensor
    labels: Tensor | None

    def __init__(
        self, means: Tensor, std: float, weights: Tensor | None, labels: Tensor | None, schedule: Schedule
    ) -> None:
        super().__init__()
        if means.ndim < 2 or not len(means):
            raise InputError(f"the means of a mixture are (K, ...), not {tuple(means.shape)}")
        if std < 0:
            raise InputError(f"a standard deviation is 0 or more (got {std})")
        chosen = torch.ones(len(means)) if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        if chosen.shape != (len(means),) or not bool((chosen > 0).all()):
            raise InputError(f"a mixture of {len(means)} components needs as many weights above 0")
        self.register_buffer("means", means.clone())
        self.register_buffer("log_weights", (chosen / chosen.sum()).log())
        self.register_buffer("labels", None if labels is None else labels.clone().long())
        self.std, self.schedule = float(std), schedule

    def log_components(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        """(B, K) log of weight times density, up to what all components share; other classes get minus infinity."""
        means = self.means.flatten(1).to(x_t.dtype)
        alpha, sigma = precise(self.schedule.alpha(t)).to(x_t.dtype), precise(self.schedule.sigma(t)).to(x_t.dtype)
        variance = alpha**2 * self.std**2 + sigma**2
        x = x_t.flatten(1)
        squares = (
            x.square().sum(1, keepdim=True)
            - 2 * alpha[:, None] * (x @ means.T)
            + (alpha**2)[:, None] * means.square().sum(1)
        )
        found = self.log_weights.to(x_t.dtype) - squares.clamp_min(0) / (2 * variance.clamp_min(1e-20))[:, None]
        if self.labels is None or cond is None:
            return found
        other = (cond[:, None] >= 0) & (self.labels[None] != cond[:, None])
        return found.masked_fill(other, -torch.inf)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """E[x0 | x_t], of the shape of x_t."""
        shares = torch.softmax(self.log_components(x_t, t, cond), 1)
        mean = shares @ self.means.flatten(1).to(x_t.dtype)
        alpha, sigma = self.schedule.alpha(t).to(x_t.dtype), self.schedule.sigma(t).to(x_t.dtype)
        gain = (alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2).clamp_min(1e-20))[:, None]
        return (mean + gain * (x_t.flatten(1) - alpha[:, None] * mean)).view_as(x_t)


class Oracle(Denoiser):
    """A denoiser that is exact; it also knows densities and draws samples.

    Class-conditional where the components have labels: the condition is the class (B,), -1 (the null condition) means all.
    """

    module: MixtureNetwork

    def __init__(self, network: MixtureNetwork) -> None:
        null = None if network.labels is None else torch.tensor(-1)
        super().__init__(network, network.schedule, "x0", null_cond=null)

    def raw(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, *, samples: int | None = None) -> Tensor:  # type: ignore[override]
        self.evaluations += 1 if samples is None else len(x_t) // samples
        found: Tensor = self.module(x_t, t, cond)  # it needs the time itself
        return found

    def log_prob(self, x_t: Tensor, t: Tensor | float, cond: Tensor | None = None) -> Tensor:
        """Log density (B,) of the noised law at x_t."""
        times = self.times_like(t, x_t)
        schedule, network = self.schedule, self.module
        variance = schedule.alpha(times) ** 2 * network.std**2 + schedule.sigma(times) ** 2
        size = x_t[0].numel()
        components = network.log_components(x_t, times, cond)
        total = torch.logsumexp(components, 1) - size / 2 * torch.log(2 * math.pi * variance).to(x_t.dtype)
        if network.labels is None or cond is None:
            return total
        own = (cond[:, None] < 0) | (network.labels[None] == cond[:, None])
        shares = network.log_weights.to(x_t.dtype).expand_as(components).masked_fill(~own, -torch.inf)
        return total - torch.logsumexp(shares, 1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Clean samples (count, ...) and their classes (count,), or None."""
        network = self.module
        which = torch.multinomial(network.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn((count, *network.means.shape[1:]), generator=generator)
        return network.means[which] + network.std * noise, None if network.labels is None else network.labels[which]

    def with_module(self, module: nn.Module, **changes: Any) -> Denoiser:
        """Another mixture as an exact denoiser; any other network as an ordinary one with the same conventions."""
        if isinstance(module, MixtureNetwork) and not changes:
            return Oracle(module)
        return super().with_module(module, **changes)

    def in_schedule(self, schedule: Schedule) -> Oracle:
        """The same mixture for another schedule."""
        network = self.module
        return gaussian_mixture(network.means, network.std, network.log_weights.exp(), network.labels, schedule)


def gaussian_mixture(
    means: Tensor,
    std: float,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    schedule: Schedule | None = None,
) -> Oracle:
    """The exact teacher of a Gaussian mixture; see :class:`MixtureNetwork`. Without a schedule: ``flow``."""
    return Oracle(MixtureNetwork(means, std, weights, labels, schedule or Flow()))


def kernel_density(
    points: Tensor, std: float, schedule: Schedule | None = None, labels: Tensor | None = None
) -> Oracle:
    """The exact teacher of a kernel density: an equal Gaussian at each point (N, ...)."""
    return gaussian_mixture(points, std, None, labels, schedule)
