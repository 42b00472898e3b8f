"""Published accuracies of 64 residual networks, against which scores of untrained networks can be held without training any."""

from __future__ import annotations

from collections.abc import Mapping

DEPTHS = (1, 3, 5, 7)
"""Blocks that each of the three stages may have."""

_DISTILLED = """
61.87 69.01 71.50 72.36 65.95 70.85 72.77 73.31 68.05 71.91 72.88 74.11 69.22 72.18 73.56 74.12
63.49 70.01 72.27 73.18 66.64 70.76 72.89 73.79 68.71 71.84 73.26 74.44 70.24 72.63 73.56 74.42
64.61 70.45 72.42 73.16 66.97 71.25 73.18 73.47 69.10 72.73 73.94 74.86 70.56 72.86 73.37 74.53
65.39 71.01 72.02 73.69 67.44 71.63 73.36 73.97 69.67 72.58 73.34 74.23 70.85 72.70 73.92 74.44
"""
_ALONE = """
60.20 67.26 69.41 70.64 64.50 68.90 70.21 70.77 66.97 69.93 70.60 71.72 68.50 70.77 71.59 71.76
62.40 68.31 70.01 70.81 65.31 69.57 70.27 71.40 67.38 70.46 71.39 71.58 68.96 69.98 71.87 72.45
62.71 68.38 70.09 71.06 66.39 70.28 70.95 72.14 68.34 70.75 72.09 71.93 69.27 70.63 72.28 72.39
64.27 69.13 70.63 71.20 67.02 70.66 72.04 71.65 68.39 70.78 71.69 72.27 69.48 71.34 71.89 72.56
"""


def _table(text: str) -> dict[tuple[int, int, int], float]:
    names = [(a, b, c) for a in DEPTHS for b in DEPTHS for c in DEPTHS]
    return dict(zip(names, map(float, text.split()), strict=True))


DISTILLED: Mapping[tuple[int, int, int], float] = _table(_DISTILLED)
"""Top-1 accuracy in percent on CIFAR-100 after distillation from a ResNet-110, by the depths of the stages (widths 16, 32, 64: ``stageresnet-a-b-c``).

Source: ``exps/s1-gt-kd.txt`` beside the code of "DisWOT: Student Architecture Search for Distillation WithOut Training" (2023), Apache-2.0.
"""
ALONE: Mapping[tuple[int, int, int], float] = _table(_ALONE)
"""The same after training on labels alone; ``exps/s1-gt-cls.txt`` there."""
