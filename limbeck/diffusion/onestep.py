r"""One-step generators: noise in, sample out, one evaluation, with gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError
from limbeck.diffusion.conditions import Condition
from limbeck.diffusion.denoisers import Denoiser

EDM_START = 2.5
"""Noise that one-step generators of the schedule ``edm`` are asked at, unless said otherwise (as SiD and SIM do)."""


def start_of(denoiser: Denoiser, t_init: float | None = None) -> float:
    """The time a one-step generator is asked at: ``t_max``, or for ``edm`` :data:`EDM_START`.

    Raises:
        InputError: outside of (0, t_max].
    """
    schedule = denoiser.schedule
    found = (
        t_init if t_init is not None else min(EDM_START, schedule.t_max) if schedule.name == "edm" else schedule.t_max
    )
    if not 0 < found <= schedule.t_max:
        raise InputError(f"t_init must lie in (0, {schedule.t_max:g}] for '{schedule.name}' (got {found})")
    return float(found)


def scaled_noise(denoiser: Denoiser, z: Tensor, t_init: float) -> Tensor:
    """Unit noise as the network's input at ``t_init``: scaled by it for ``edm``, as it is elsewhere (alpha is taken for 0)."""
    return z * t_init if denoiser.schedule.name == "edm" else z


class OneStepGenerator(nn.Module):
    r"""``(z, cond) -> x0``: a denoiser asked once, at a fixed time.

    ``edm``: :math:`G(z) = D(\sigma_{init} z; \sigma_{init})`; eps-networks: :math:`G(z) = (z - \sigma_T\,\epsilon(z, T))/\alpha_T`;
    flows: :math:`G(z) = z - u(z, 1)`.

    Args:
        denoiser: the network with its conventions.
        t_init: see :func:`start_of`.

    Raises:
        InputError: an eps- or score-network at a time without signal: the division by alpha is impossible there.
    """

    def __init__(self, denoiser: Denoiser, t_init: float | None = None) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.t_init = start_of(denoiser, t_init)
        alpha = float(denoiser.schedule.alpha(torch.tensor(self.t_init, dtype=torch.float64)))
        if denoiser.prediction in ("eps", "score") and alpha < 1e-3:
            raise InputError(
                f"at t = {self.t_init:g} there is no signal left (alpha {alpha:.1e}), so x0 cannot be had from '{denoiser.prediction}': "
                "start below t_max (t_init=…), or use a network that predicts v, flow or x0"
            )

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """Samples (B, ...) from unit noise (B, ...), with gradient."""
        return self.denoiser.predict(scaled_noise(self.denoiser, z, self.t_init), self.t_init, cond, "x0")

    sample = forward
