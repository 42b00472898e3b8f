"""Networks of repeated cells: four nodes, six edges, one of five operations on each edge (the space of NAS-Bench-201)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import relu

from limbeck.core.errors import InputError
from limbeck.networks.base import Network
from limbeck.networks.resnet import BasicBlock

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""What an edge may do, by the benchmark's names; in a network's name they are the digits 1 to 5."""
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
"""Edges (from, to) in the benchmark's order."""


class CellNetwork(Network):
    """A stem, then stages of equal cells; between stages a residual block halves the sides and doubles the width.

    A cell has nodes 0 (its input) to 3 (its output); a node is the sum over its incoming edges of the edge's operation on the node where
    it starts: nothing (zeros), the identity, ReLU and a 1x1 or 3x3 convolution with batch norm, or a 3x3 mean with side 1. The last
    map is batch-normalised and rectified (``last``) before it is pooled.

    Args:
        in_shape: ``(C, H, W)``; works from 8x8 up.
        num_classes: number of logits.
        operations: six digits from 1 to 5, the operations of :data:`EDGES` in turn, as positions in :data:`OPERATIONS` from 1.
        width: channels of the first stage.
        cells: cells in each stage.
        stages: how many.

    Raises:
        InputError: ``operations`` is something else.

    Source: Dong and Yang, "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search" (2020), whose networks are
    ``cell-<digits>-w16-n5-s3``. Its batch norms in the cells learn no scale and shift when searching; ours do, as in its final training.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        num_classes: int,
        *,
        operations: int,
        width: int = 16,
        cells: int = 1,
        stages: int = 3,
    ) -> None:
        super().__init__(in_shape, num_classes)
        chosen = cell_operations(operations)
        widths = [width * 2**stage for stage in range(stages)]
        self.stem = nn.Sequential(nn.Conv2d(self.in_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.stages = nn.ModuleList()
        before = width
        for channels in widths:
            reduction = [] if channels == before else [BasicBlock(before, channels, 2)]
            self.stages.append(nn.Sequential(*reduction, *(Cell(channels, chosen) for _ in range(cells))))
            before = channels
        self.last = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.feature_dim = before
        self.head = nn.Linear(before, self.num_classes)
        self.stage_paths = [f"stages.{n}" for n in range(stages)]

    def embed(self, x: Tensor) -> Tensor:
        """The pooled last map, ``(B, C, H, W) -> (B, feature_dim)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        features: Tensor = self.last(x).mean((2, 3))
        return features


class Cell(nn.Module):
    """``(B, C, H, W) -> (B, C, H, W)``; see :class:`CellNetwork`."""

    def __init__(self, channels: int, operations: Sequence[str]) -> None:
        super().__init__()
        # An edge that carries nothing is left out; a node without edges is zeros.
        self.edges = nn.ModuleDict(
            {
                f"{start}_{end}": _operation(name, channels)
                for (start, end), name in zip(EDGES, operations, strict=True)
                if name != "none"
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        nodes: list[Tensor] = [x]
        for end in (1, 2, 3):
            arriving = [self.edges[f"{n}_{end}"](nodes[n]) for n in range(end) if f"{n}_{end}" in self.edges]
            node = arriving[0] if arriving else x.new_zeros(()).expand_as(x)
            for part in arriving[1:]:
                node = node + part
            nodes.append(node)
        return nodes[-1]


class _Convolution(nn.Sequential):
    """ReLU, convolution, batch norm."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(relu(x))


def _operation(name: str, channels: int) -> nn.Module:
    if name == "skip_connect":
        return nn.Identity()
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return _Convolution(channels, 1 if name == "nor_conv_1x1" else 3)


def cell_operations(digits: int) -> list[str]:
    """The names of the operations that six digits stand for: 444444 is six 3x3 convolutions.

    Raises:
        InputError: not six digits from 1 to 5.
    """
    text = str(digits)
    if len(text) != len(EDGES) or not set(text) <= set("12345"):
        meaning = ", ".join(f"{n} {name}" for n, name in enumerate(OPERATIONS, 1))
        raise InputError(f"the operations of a cell are {len(EDGES)} digits ({meaning}), not {digits}")
    return [OPERATIONS[int(digit) - 1] for digit in text]


def cell_digits(architecture: str) -> int:
    """The digits of an architecture in the benchmark's own notation, ``|nor_conv_3x3~0|+|…~0|…~1|+|…~0|…~1|…~2|``.

    Raises:
        InputError: it cannot be read.
    """
    nodes = [re.findall(r"(\w+)~(\d)", node) for node in architecture.split("+")]
    found = {(int(start), end): name for end, node in enumerate(nodes, 1) for name, start in node}
    if set(found) != set(EDGES) or not set(found.values()) <= set(OPERATIONS):
        raise InputError(f"'{architecture}' is no cell of NAS-Bench-201 with the operations {', '.join(OPERATIONS)}")
    return int("".join(str(OPERATIONS.index(found[edge]) + 1) for edge in EDGES))


def cell_text(digits: int) -> str:
    """The benchmark's own notation of an architecture; the inverse of :func:`cell_digits`."""
    names = dict(zip(EDGES, cell_operations(digits), strict=True))
    return "+".join("|" + "".join(f"{names[start, end]}~{start}|" for start in range(end)) for end in (1, 2, 3))
