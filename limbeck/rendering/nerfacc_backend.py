"""Compositing weights by nerfacc's kernels, over packed samples, where it is installed and the rays are on a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from limbeck.core.errors import InputError


def use_nerfacc(backend: str, device: torch.device) -> bool:
    """Whether weights of rays on a device are to be computed by nerfacc.

    Args:
        backend: ``torch``, ``nerfacc``, or ``auto``: nerfacc where its kernels run.

    Raises:
        InputError: another name; nerfacc asked for where it is not installed, on a CPU, or without kernels that run.
    """
    if backend not in ("auto", "torch", "nerfacc"):
        raise InputError(f"a backend of volume rendering is auto, torch or nerfacc, not '{backend}'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    reason = _obstacle(str(device))
    if reason and backend == "nerfacc":
        raise InputError(f"backend='nerfacc' {reason}, or use backend='torch'")
    return not reason


@functools.cache
def _obstacle(device: str) -> str:
    """What keeps nerfacc from running on a device, or nothing; its kernels are compiled at their first use, which may fail."""
    if importlib.util.find_spec("nerfacc") is None:
        return "needs nerfacc: pip install nerfacc"
    if not device.startswith("cuda"):
        return "needs rays on a GPU: move field and cameras there"
    one = torch.ones(1, 1, device=device)
    try:
        nerfacc_weights(one, one, one > 0)
    except Exception as error:
        return (
            f"cannot run its kernels ({' '.join(str(error).split())[:80]}): install a build for this version of torch"
        )
    return ""


def nerfacc_weights(sigma: Tensor, delta: Tensor, asked: Tensor) -> Tensor:
    """Weights (R, S) of samples, accumulated over those asked only.

    Args:
        sigma, delta: (R, S). asked: (R, S) bool; elsewhere the density is 0 and so is the weight.
    """
    from nerfacc import render_weight_from_density

    lengths, sigmas = delta[asked].float(), sigma[asked].float()  # the kernels are in single precision
    if not len(lengths):
        return torch.zeros_like(sigma)
    weights, _, _ = render_weight_from_density(
        torch.zeros_like(lengths), lengths, sigmas, ray_indices=asked.nonzero()[:, 0], n_rays=len(asked)
    )
    return torch.zeros_like(sigma).masked_scatter(asked, weights.to(sigma))
