"""Expert trajectories: parameters of networks in training, one snapshot per epoch, and which segments of them to match."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import InputError, RunError
from limbeck.core.files import explained, read_json, write_json

ABOUT = "trajectories.json"
"""Written last: a folder that has it is complete."""
_FORMAT = 1


class Segment(NamedTuple):
    """A piece of a trajectory.

    Attributes:
        expert, epoch: where it starts.
        points: (M + 1, P) float32, the snapshots of epochs ``epoch`` to ``epoch + M``.
    """

    expert: int
    epoch: int
    points: Tensor

    @property
    def start(self) -> Tensor:
        return self.points[0]

    @property
    def target(self) -> Tensor:
        return self.points[-1]


class TrajectoryBuffer:
    """Snapshots of K experts at initialisation and after each of E epochs: K arrays (E + 1, P).

    In memory they are tensors. On disk they are one ``.npy`` file for each expert beside a description; a loaded buffer maps
    the files and reads what is asked for, so it may be larger than the memory.

    Args:
        experts: arrays (E + 1, P), all of one shape.
        about: what should be known of them (network, data, training).

    Raises:
        InputError: no experts, no epochs, or shapes that differ.
    """

    def __init__(
        self, experts: Sequence[Tensor | np.ndarray[Any, Any]], about: Mapping[str, Any] | None = None
    ) -> None:
        if not len(experts):
            raise InputError("a trajectory buffer needs at least one expert")
        shapes = {tuple(e.shape) for e in experts}
        if len(shapes) > 1 or len(experts[0].shape) != 2 or experts[0].shape[0] < 2:
            raise InputError(
                f"trajectories must be arrays (epochs + 1, parameters) of one shape (got {', '.join(map(str, sorted(shapes)))})"
            )
        self._experts = list(experts)
        self.about = dict(about or {})

    @property
    def experts(self) -> int:
        """K."""
        return len(self._experts)

    @property
    def epochs(self) -> int:
        """E."""
        return int(self._experts[0].shape[0]) - 1

    @property
    def size(self) -> int:
        """P."""
        return int(self._experts[0].shape[1])

    def __repr__(self) -> str:
        return f"TrajectoryBuffer({self.experts} experts, {self.epochs} epochs, {self.size} parameters)"

    # ---- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self, expert: int, epoch: int) -> Tensor:
        """(P,) float32 parameters of an expert after ``epoch`` epochs (0: at initialisation; -1: the last); a copy.

        Raises:
            InputError: no such expert or epoch.
        """
        return self._points(expert, self.epochs if epoch == -1 else epoch, 0)[0]

    def segment(self, expert: int, epoch: int, length: int) -> Segment:
        """The snapshots of ``length`` epochs from ``epoch`` on, copies.

        Raises:
            InputError: no such expert, or the segment leaves the trajectory.
        """
        return Segment(expert, epoch, self._points(expert, epoch, length))

    def stacked(self, epoch: int) -> Tensor:
        """(K, P) all experts after ``epoch`` epochs (-1: the last)."""
        return torch.stack([self.snapshot(expert, epoch) for expert in range(self.experts)])

    def subset(self, experts: Sequence[int]) -> TrajectoryBuffer:
        """A buffer of some of the experts; nothing is copied."""
        return TrajectoryBuffer([self._experts[n] for n in experts], self.about)

    def _points(self, expert: int, epoch: int, length: int) -> Tensor:
        if not 0 <= expert < self.experts:
            raise InputError(f"there is no expert {expert}: the buffer has {self.experts} (0 to {self.experts - 1})")
        if epoch < 0 or epoch + length > self.epochs:
            raise InputError(
                f"epochs {epoch} to {epoch + length} leave the trajectory, which has {self.epochs}: "
                "train the experts longer, or start earlier"
            )
        found = self._experts[expert][epoch : epoch + length + 1]
        if isinstance(found, Tensor):
            return found.detach().float().clone()
        return torch.from_numpy(np.array(found, dtype=np.float32))  # reads the mapped file

    # ---- on disk -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Write a folder that :meth:`load` reads.

        Args:
            folder: created if needed.
            half: 16-bit numbers, of which each parameter keeps three digits. Late in training, where a network moves by less than
                a hundredth of its parameters in an epoch, the differences between snapshots lose what segments are about.
        """
        writer = TrajectoryWriter(Path(folder), self.experts, self.epochs, self.size, half=half)
        for epoch in range(self.epochs + 1):
            writer.write(epoch, self.stacked(epoch))
        writer.finish(self.about)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a folder; the files are mapped, not read.

        Raises:
            RunError: it holds no complete buffer, or its files are damaged.
        """
        folder = Path(folder)
        if not (folder / ABOUT).exists():
            raise RunError(f"{folder} holds no finished trajectories: it has no {ABOUT}")
        known = read_json(folder / ABOUT)
        if not isinstance(known, dict) or known.get("format") != _FORMAT:
            raise RunError(f"{folder / ABOUT} has another format than this version reads: build the experts anew")
        shape = (known["epochs"] + 1, known["size"])
        experts = [_mapped(expert_file(folder, n), shape) for n in range(known["experts"])]
        return cls(experts, known["about"])


class TrajectoryWriter:
    """Fills a buffer's files epoch by epoch; the same epoch may be written again (after a crash).

    Args:
        folder: created if needed; files of this shape that are there already are written on.
        experts, epochs, size: K, E, P.
        half: 16-bit numbers.

    Raises:
        RunError: no space, or the folder cannot be written.
    """

    def __init__(self, folder: Path, experts: int, epochs: int, size: int, *, half: bool = False) -> None:
        self.folder, self.experts, self.epochs, self.size = folder, experts, epochs, size
        kind = np.dtype("<f2" if half else "<f4")
        self._files: list[Any] = []
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(experts):
                path = expert_file(folder, number)
                self._files.append(_opened(path, (epochs + 1, size), kind))

    def write(self, epoch: int, theta: Tensor) -> None:
        """Keep (K, P) parameters as the snapshots after ``epoch`` epochs; on disk when this returns."""
        values = theta.detach().float().cpu().numpy()
        with explained(self.folder):
            for file, row in zip(self._files, values, strict=True):
                file[epoch] = row
                file.flush()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Say that the buffer is complete."""
        known = {"format": _FORMAT, "experts": self.experts, "epochs": self.epochs, "size": self.size}
        write_json(self.folder / ABOUT, {**known, "about": dict(about)})


def expert_file(folder: Path, number: int) -> Path:
    """Where an expert's snapshots are."""
    return folder / f"expert-{number:04d}.npy"


def _opened(path: Path, shape: tuple[int, int], kind: np.dtype[Any]) -> Any:
    """A file mapped for writing, made if it is not there or is another's."""
    if path.exists():
        try:
            found = np.lib.format.open_memmap(path, mode="r+")
            if found.shape == shape and found.dtype == kind:
                return found
        except ValueError:
            pass  # cut off while it was made: begin it again
    return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)


def _mapped(path: Path, shape: tuple[int, int]) -> Any:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged ({error}): build the experts anew") from None
    if found.shape != shape:
        raise RunError(f"{path} holds an array of shape {found.shape}, not {shape}: build the experts anew")
    return found


@dataclass(frozen=True)
class RangeSchedule:
    r"""At which epochs segments may start: uniformly from ``min_start`` up to, and without, an upper bound that may grow.

    .. math:: ub(it) = \min\big(max,\; cur + \lfloor (max - cur)\, it / end \rfloor\big)

    Early segments teach easy patterns, later ones hard patterns: small synthetic sets should match early ones, large sets later
    ones, and a bound that grows lets the easy come first.

    Args:
        min_start: first epoch at which a segment may start.
        max_start: bound (exclusive) in the end.
        cur_max: bound at the beginning; None: ``max_start``, no growth.
        expand_end: iteration at which the bound has reached ``max_start``; 0: from the beginning.

    Raises:
        InputError: an empty range, or a bound that would shrink.

    Source: "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching" (2024).
    """

    min_start: int
    max_start: int
    cur_max: int | None = None
    expand_end: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_start < self.max_start:
            raise InputError(
                f"segments cannot start from epoch {self.min_start} up to, without, epoch {self.max_start}: the range is empty"
            )
        if self.cur_max is not None and not self.min_start < self.cur_max <= self.max_start:
            raise InputError(
                f"the first bound of starts must be above {self.min_start} and at most {self.max_start} (got {self.cur_max})"
            )
        if self.expand_end < 0:
            raise InputError(f"the bound cannot have grown at iteration {self.expand_end}: 0 or more")

    def upper(self, iteration: int) -> int:
        """The bound (exclusive) at an iteration (from 0)."""
        first = self.max_start if self.cur_max is None else self.cur_max
        if self.expand_end == 0 or first == self.max_start:
            return self.max_start
        return min(self.max_start, first + (self.max_start - first) * iteration // self.expand_end)

    def draw(self, iteration: int, generator: torch.Generator | None = None) -> int:
        """The epoch at which a segment starts."""
        return int(torch.randint(self.min_start, self.upper(iteration), (1,), generator=generator))

    def check(self, epochs: int, length: int) -> None:
        """That segments of ``length`` epochs stay within ``epochs``.

        Raises:
            InputError: the last ones would not.
        """
        if self.max_start - 1 + length > epochs:
            raise InputError(
                f"segments of {length} epochs that start up to epoch {self.max_start - 1} need {self.max_start - 1 + length} "
                f"epochs, but the experts have {epochs}: train them longer, or lower max_start to {max(0, epochs - length + 1)}"
            )

    @classmethod
    def auto(cls, fraction: float, epochs: int, length: int, iterations: int) -> RangeSchedule:
        """The range for a synthetic set of a given size.

        The published ranges, as shares of the experts' epochs, are tabulated by the size of the synthetic set as a share of the
        real one and interpolated on a logarithmic scale. The interpolation is our decision; the published settings are one per
        data set and size.

        Args:
            fraction: synthetic samples per class / real samples per class, above 0.
            epochs, length: of the experts, of a segment.
            iterations: of distillation; the bound has grown after a tenth of them.

        Raises:
            InputError: the experts have fewer epochs than a segment, or ``fraction`` is not above 0.
        """
        if not fraction > 0:
            raise InputError(f"the share of the real data must be above 0 (got {fraction})")
        if length > epochs:
            raise InputError(
                f"a segment of {length} epochs is longer than the experts' {epochs}: train them longer, or shorten it"
            )
        low, first, last = (_interpolated(math.log(fraction), column) for column in (1, 2, 3))
        most = epochs - length + 1
        minimum = min(round(low * epochs), most - 1)
        maximum = min(max(round(last * epochs), minimum + 1), most)
        current = min(max(round(first * epochs), minimum + 1), maximum)
        return cls(minimum, maximum, current, max(1, iterations // 10))


_RANGES = (  # share of the real data; min_start, cur_max and max_start as shares of the epochs
    (0.0002, 0.0, 0.05, 0.05),
    (0.002, 0.0, 0.1, 0.2),
    (0.01, 0.0, 0.2, 0.4),
    (0.1, 0.4, 0.65, 0.65),
)


def _interpolated(log_fraction: float, column: int) -> float:
    at = [math.log(row[0]) for row in _RANGES]
    return float(np.interp(log_fraction, at, [row[column] for row in _RANGES]))
