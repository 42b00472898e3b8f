r"""Soft assignments of rows to codes, :math:`p_i = \mathrm{softmax}(S_i / \tau)`, compared and measured without holding all similarities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.blocks.vector_quantizer import VectorQuantizer
from limbeck.core.errors import InputError
from limbeck.losses.logits import forward_kl

CHUNK = 1 << 24
"""Similarities of rows to codes held at once."""


def assignment_loss(quantizer: VectorQuantizer, g: Tensor, h: Tensor, temperature: float) -> Tensor:
    r""":math:`\tau^2\,\mathrm{mean}_i\,KL(\mathrm{softmax}(S(h_i)/\tau)\,\|\,\mathrm{softmax}(S(g_i)/\tau))`, a scalar.

    Args:
        quantizer: the codes, constants here.
        g: (m, D) rows that learn. h: (m, D) rows that they should be assigned as; detach them where they must not learn.
        temperature: tau, above 0. Cosines are in [-1, 1]: 0.05 to 0.1 tells codes apart, 1 and more hardly.

    Raises:
        InputError: unequal numbers of rows, none, or a wrong temperature.

    Source: "VQGraph: Rethinking Graph Representation Space for Bridging GNNs and MLPs" (2024).
    """
    if len(g) != len(h) or not len(g):
        raise InputError(f"assignments are compared row by row: {len(g)} and {len(h)} rows do not pair up")

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return forward_kl(quantizer.similarities(a), quantizer.similarities(b), temperature, reduction="sum")

    rows = max(1, CHUNK // quantizer.num_codes)
    if len(g) <= rows:
        total = divergence(g, h)
    else:  # the similarities of a part are made again for its gradient
        parts = zip(g.split(rows), h.split(rows), strict=True)
        found = [checkpoint(divergence, a, b, use_reentrant=False, preserve_rng_state=False) for a, b in parts]
        total = torch.stack(found).sum()
    return temperature**2 / len(g) * total


@torch.no_grad()
def assignment_entropy(quantizer: VectorQuantizer, h: Tensor, temperature: float) -> float:
    r"""The mean entropy, in nats, of the assignments of rows (m, D). Near :math:`\ln M` they say nothing, at 0 they are hard."""
    total = 0.0
    for part in h.split(max(1, CHUNK // quantizer.num_codes)):
        total += float(torch.special.entr(F.softmax(quantizer.similarities(part) / temperature, 1)).sum())
    return total / len(h)
