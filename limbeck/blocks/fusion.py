"""The ratio between a soft loss (teacher) and a hard loss (label), sample by sample: what it can be computed from, and by.

A ratio of 1 trusts the teacher alone, 0 the label alone.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from limbeck.core.errors import InputError, UnknownNameError

FeatureSet = Literal["option3", "vertices", "edges", "angles_vertices", "edges_angles", "all", "intra", "sg_tg"]
FEATURE_SETS: tuple[FeatureSet, ...] = get_args(FeatureSet)

# Parts by name: vertices S, T, G, O; squared edges such as ST; angles at S, towards T and G or towards O and G.
_VERTICES = ("S", "T", "G", "O")
_STUDENT_EDGES = ("SO", "SG", "ST")
_ANGLES = ("TSG", "OSG")
_PARTS: dict[str, tuple[str, ...]] = {
    "option3": (*_VERTICES, *_STUDENT_EDGES, "TG", "OG"),
    "vertices": _VERTICES,
    "edges": _STUDENT_EDGES,
    "angles_vertices": (*_VERTICES, *_ANGLES),
    "edges_angles": (*_STUDENT_EDGES, *_ANGLES),
    "all": (*_VERTICES, *_STUDENT_EDGES, *_ANGLES),
    "intra": ("S", "T", "G", "SG", "ST", "TG"),
    "sg_tg": ("SG", "TG"),
}


def feature_parts(kind: str) -> int:
    """How many vectors of C numbers a feature set has.

    Raises:
        UnknownNameError: no such set.
    """
    if kind not in _PARTS:
        raise UnknownNameError("feature set", kind, FEATURE_SETS)
    return len(_PARTS[kind])


def trilateral_features(student: Tensor, teacher: Tensor, truth: Tensor, mean: Tensor, kind: str = "option3") -> Tensor:
    r"""The geometry between what student (S), teacher (T), label (G) and the teacher's class mean (O) say about each sample.

    S, T and G span a triangle within the sample; S, O and G one between samples. Their edges enter as element-wise squares such
    as :math:`(T-S)^2`, angles at S as element-wise products :math:`(T-S)(G-S)` and :math:`(O-S)(G-S)`.

    ``option3``: S, T, G, O, (O-S)², (G-S)², (T-S)², (T-G)², (O-G)² (9 C numbers). ``vertices``: S, T, G, O (4 C). ``edges``: the
    three that meet in S (3 C). ``angles_vertices`` (6 C), ``edges_angles`` (5 C) and ``all`` (vertices, edges at S, angles; 9 C)
    are what they say. ``intra`` leaves out whatever has O (6 C); ``sg_tg`` is (G-S)², (T-G)² alone (2 C).

    Args:
        student, teacher, truth, mean: probabilities (B, C).
        kind: which parts.

    Returns:
        (B, k C).

    Source: "Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation" (2024).

    Raises:
        UnknownNameError: no such set.
        InputError: shapes that differ.
    """
    feature_parts(kind)
    points = {"S": student, "T": teacher, "G": truth, "O": mean}
    if len({p.shape for p in points.values()}) > 1:
        raise InputError(
            "student, teacher, labels and class means must have the same shape, not "
            + ", ".join(str(tuple(p.shape)) for p in points.values())
        )
    return torch.cat([_part(name, points) for name in _PARTS[kind]], -1)


def _part(name: str, points: dict[str, Tensor]) -> Tensor:
    if len(name) == 1:
        return points[name]
    if len(name) == 2:
        return (points[name[1]] - points[name[0]]).square()
    apex = points[name[1]]
    return (points[name[0]] - apex) * (points[name[2]] - apex)


class RatioController(nn.Module):
    """Features (B, F) in, ratios (B,) in [margin, 1 - margin] out: layers of 32, 16 and 1 units, LeakyReLU between them, a sigmoid.

    The last bias starts at 0, so that ratios start around one half. The sigmoid is scaled into its range rather than clipped: a
    clipped ratio would get no gradient any more.

    Args:
        features: F.
        margin: in [0, 0.5); how far ratios stay from 0 and 1.
    """

    def __init__(self, features: int, margin: float = 0.01) -> None:
        super().__init__()
        self.margin = margin
        self.layers = nn.Sequential(
            nn.Linear(features, 32), nn.LeakyReLU(), nn.Linear(32, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        score: Tensor = self.layers(features).squeeze(-1)
        return self.margin + (1 - 2 * self.margin) * torch.sigmoid(score)


def weighted_soft_label_ratio(student_ce: Tensor, teacher_ce: Tensor) -> Tensor:
    """1 - exp(-CE_s / CE_t): near 1 where the teacher is much better than the student at the label, near 0 where it is worse.

    Args:
        student_ce, teacher_ce: cross-entropies (B,) on the labels, non-negative.

    Source: "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective" (2021).
    """
    return 1 - torch.exp(-student_ce / teacher_ce.clamp_min(1e-6))
