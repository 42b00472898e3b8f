"""DataDAM: spatial attention of every layer and the last representation, matched in networks with random weights."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from limbeck.blocks.taps import Features, Tap
from limbeck.core.batch import Batch, Losses
from limbeck.core.errors import InputError
from limbeck.losses.features import attention_map
from limbeck.losses.matching import mean_matching
from limbeck.methods.datasets.matching_base import FeatureMatching

ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Mish)


class DataDAM(FeatureMatching):
    r"""Dataset distillation with attention matching.

    Every step draws a network with new random weights and taps its L activations. Of a feature map F (B, ch, h, w) with p the
    ``power``,

    .. math:: A(F) = \sum_{k} |F_k|^p \in R^{B \times hw}, \qquad z(F) = A(F) / \lVert A(F) \rVert_2 \text{ per sample}.

    With a real batch :math:`R_c` and all synthetic images :math:`S_c` of class c under the same augmentation, and e the last
    representation (input of the classifier),

    .. math::
        L_{SAM} &= \sum_c \sum_{l=1}^{L-1} \lVert \mathrm{mean}\, z(F_l(R_c)) - \mathrm{mean}\, z(F_l(S_c)) \rVert_2^2 \\
        L_{MMD} &= \sum_c \lVert \mathrm{mean}\, e(R_c) - \mathrm{mean}\, e(S_c) \rVert_2^2 \\
        L &= 100\, (L_{SAM} + \lambda L_{MMD}) .

    The last activation enters by e alone. Gradients go to the synthetic images; networks are never trained, and the whole cost of
    a step is one forward and one backward pass of an untrained network.

    Without the engine: as :class:`~limbeck.methods.datasets.dm.DM`.

    Source: "DataDAM: Efficient Dataset Distillation with Attention Matching" (2023). The paper's table has p = 4, its published
    script p = 1. Our decision: p = 1 by default, which is the steadier one for small networks, and 4 in the ``paper`` preset;
    ``lambda_mmd`` 0 matches attention alone.
    """

    name = "datadam"

    class Config(FeatureMatching.Config):
        power: float = Field(1.0, ge=1, description="exponent p of the activations in the attention maps")
        lambda_mmd: float = Field(
            0.01, ge=0, description="weight of the last representation against the attention maps"
        )
        scale: float = Field(100.0, gt=0, description="factor of the whole loss")
        taps: tuple[str, ...] = Field(
            (), description="paths of the layers whose attention is matched; none: every activation but the last"
        )

        presets = {
            "paper": {
                "steps": 8000,
                "batch_real": 64,
                "power": 4.0,
                "judge_networks": ("convnet-w128-d3",),
                "judge_seeds": 5,
                "judge_lr": 0.01,
                "judge_steps": 1200,
                "judge_batch_size": 256,
            }
        }

    def losses(self, batch: Batch) -> Losses:
        real, real_labels, synthetic, labels = self.views(batch)
        network = self.fresh_network()
        head, layers = self.head(network), self.layers(network)
        with torch.no_grad():
            wanted = self.tapped(network, [*layers, head], real)
        found = self.tapped(network, [*layers, head], synthetic)
        terms = [
            mean_matching(a, real_labels, b, labels, self.num_classes)
            for a, b in zip(self.attention(wanted, layers), self.attention(found, layers), strict=True)
        ]
        out = Losses(attention=(self.config.scale, torch.stack(terms).sum()))
        if self.config.lambda_mmd:
            mmd = mean_matching(wanted[head], real_labels, found[head], labels, self.num_classes)
            out.add("features", mmd, self.config.scale * self.config.lambda_mmd)
        each = {f"attention_{number}": term for number, term in enumerate(terms)}
        return out.observe(**each, **self.range_of_pixels())

    def layers(self, network: nn.Module) -> list[Tap]:
        """The taps whose attention is matched."""
        if self.config.taps:
            return [Tap(path, call="all") for path in self.config.taps]
        found = [path for path, part in network.named_modules() if isinstance(part, ACTIVATIONS)]
        if not found:
            raise InputError(
                f"{type(network).__name__} has no activation modules: say whose attention to match, with taps=…"
            )
        return [Tap(path, call="all") for path in found]

    def attention(self, features: Features, layers: list[Tap]) -> list[Tensor]:
        """Attention maps (B, positions) in the order of the layers; the last activation is left out, unless layers were named."""
        maps = [one for tap in layers for one in features[tap]]
        if not self.config.taps:
            maps = maps[:-1]
        if not maps:
            raise InputError(
                "only one activation in the network, and the last one is not matched: name layers with taps=…"
            )
        return [attention_map(one, self.config.power) for one in maps if one.ndim > 2]
