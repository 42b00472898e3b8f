"""A teacher's labels for every augmented view of a small data set, stored once and read back.

A :class:`SoftLabelStore` holds, for a number of epochs, what a teacher said about every view, together with everything that makes
the view: crop, flip, partner, share, box. It is a labeler like those of :mod:`limbeck.blocks.view_labelers`, and shows the same
views as an online labeler of the same policy.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from limbeck.blocks.view_labelers import OnlineLabeler, ViewPlan, ViewPolicy, check_images
from limbeck.blocks.views import FLIP
from limbeck.core.errors import InputError, RunError
from limbeck.core.files import atomic_path, read_json, write_json

ABOUT = "labels.json"
FORMAT = 1


class SoftLabelStore:
    """Stored labels of a number of epochs, in shards of several epochs each: safetensors files and one ``labels.json``.

    Per epoch and image a shard holds the box of the crop (4 float32), the flip (uint8), the shift if there is any (2 int16),
    with mixing the partner (int32) and the share or the box (1 or 4 float32), and the logits (float16). The shares of CutMix
    follow from the boxes and are not stored.

    Args:
        folder: written by :func:`write_labels`.
        images: the images that the labels belong to.

    Raises:
        RunError: no store there, damaged, or of other images.

    Source: "A Fast Knowledge Distillation Framework for Visual Recognition" (FKD, 2022), as used by "Squeeze, Recover and
    Relabel" (2023).
    """

    def __init__(self, folder: str | Path, images: Tensor) -> None:
        check_images(images)
        self.folder, self.images = Path(folder), images
        about = read_json(self.folder / ABOUT)
        if about.get("format") != FORMAT:
            raise RunError(f"{self.folder / ABOUT} is no label store of the format {FORMAT}: write the labels anew")
        if about["images"] != _mark(images):
            raise RunError(
                f"the labels in {self.folder} belong to other images ({about['count']} of them): write the labels anew"
            )
        self.about = about
        self.epochs: int = about["epochs"]
        self.policy = ViewPolicy.from_description(about["policy"])
        self._open: tuple[int, dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        """Number of epochs."""
        return self.epochs

    @property
    def nbytes(self) -> int:
        """Size of all files of the store on disk."""
        shards = -(-self.epochs // self.about["epochs_per_shard"])
        paths = [self.folder / ABOUT, *(_shard_path(self.folder, k) for k in range(shards))]
        return sum(p.stat().st_size for p in paths)

    def plan(self, epoch: int) -> ViewPlan:
        """What was shown in an epoch.

        Raises:
            InputError: there are not so many epochs.
            RunError: the shard is missing or damaged.
        """
        row = self._rows(epoch)
        n = len(self.images)
        shift = row["shift"].float() if "shift" in row else torch.zeros(n, 2)
        views = torch.cat([row["crop"], row["flip"].float()[:, None], shift], 1)
        box = row.get("box", torch.zeros(n, 4))
        share = row.get("share", 1 - (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]))
        partner = row["partner"].long() if "partner" in row else torch.arange(n)
        return ViewPlan(views, partner, share, box)

    def fetch(self, epoch: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Labeler`.

        Raises:
            InputError: there are not so many epochs.
            RunError: the shard is missing or damaged.
        """
        logits = self._rows(epoch)["logits"][index].float()
        return self.policy.show(self.images, self.plan(epoch), index), logits.to(self.images.device)

    def _rows(self, epoch: int) -> dict[str, Tensor]:
        if not 0 <= epoch < self.epochs:
            raise InputError(
                f"epoch {epoch} has no stored labels: the store holds {self.epochs}; train no longer, or label online"
            )
        number, row = divmod(epoch, self.about["epochs_per_shard"])
        if self._open is None or self._open[0] != number:
            path = _shard_path(self.folder, number)
            try:
                self._open = (number, load_file(path))
            except (FileNotFoundError, SafetensorError) as error:
                raise RunError(f"the label store's {path} is missing or damaged: write the labels anew") from error
        return {name: value[row] for name, value in self._open[1].items()}


class LabelWriter:
    """Writes a :class:`SoftLabelStore` shard by shard; shards that are there already are kept, so it can be interrupted.

    Args:
        folder: created if needed. It must hold no store of other labels.
        labeler: says what is stored.
        epochs: how many.
        epochs_per_shard: how many go into one file.
        key: what the labels depend on besides images and policy, for instance the teacher's fingerprint.
        batch_size: views per forward pass.

    Raises:
        InputError: fewer than one epoch.
        RunError: the folder holds other labels, or cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        labeler: OnlineLabeler,
        epochs: int,
        *,
        epochs_per_shard: int = 50,
        key: str = "",
        batch_size: int = 512,
    ) -> None:
        if min(epochs, epochs_per_shard, batch_size) < 1:
            raise InputError(
                f"a label store needs at least one of each: epochs {epochs}, epochs per shard {epochs_per_shard}, batch size {batch_size}"
            )
        self.folder, self.labeler, self.batch_size = Path(folder), labeler, batch_size
        self.about: dict[str, Any] = {
            "format": FORMAT,
            "count": len(labeler.images),
            "images": _mark(labeler.images),
            "epochs": epochs,
            "epochs_per_shard": epochs_per_shard,
            "policy": labeler.policy.describe(),
            "key": key,
        }
        self.shards = -(-epochs // epochs_per_shard)
        if (self.folder / ABOUT).exists():
            if read_json(self.folder / ABOUT) != self.about:
                raise RunError(f"{self.folder} holds other labels: delete it, or write into another folder")
        else:
            write_json(self.folder / ABOUT, self.about)

    def write(self, shard: int) -> None:
        """Write shard number ``shard`` (from 0), unless it is there."""
        path = _shard_path(self.folder, shard)
        if path.exists():
            return
        first = shard * self.about["epochs_per_shard"]
        last = min(self.about["epochs"], first + self.about["epochs_per_shard"])
        rows = [self._epoch(epoch) for epoch in range(first, last)]
        with atomic_path(path) as temporary:
            save_file({name: torch.stack([r[name] for r in rows]) for name in rows[0]}, temporary)

    def _epoch(self, epoch: int) -> dict[str, Tensor]:
        labeler, policy = self.labeler, self.labeler.policy
        everyone = torch.arange(len(labeler.images))
        logits = torch.cat([labeler.fetch(epoch, part)[1].half().cpu() for part in everyone.split(self.batch_size)])
        if not bool(torch.isfinite(logits).all()):
            raise RunError("the teacher's logits do not fit into float16: check its inputs and weights")
        plan = labeler.plan(epoch)
        rows = {"logits": logits, "crop": plan.views[:, :FLIP].clone(), "flip": plan.views[:, FLIP].to(torch.uint8)}
        if policy.view.jitter:
            rows["shift"] = plan.views[:, FLIP + 1 :].to(torch.int16)
        if policy.mix != "none":
            rows["partner"] = plan.partner.to(torch.int32)
            rows["box" if policy.mix == "cutmix" else "share"] = plan.box if policy.mix == "cutmix" else plan.share
        return rows


def write_labels(folder: str | Path, labeler: OnlineLabeler, epochs: int, **options: Any) -> SoftLabelStore:
    """Store the labels of ``epochs`` epochs, all at once. ``options``: see :class:`LabelWriter`."""
    writer = LabelWriter(folder, labeler, epochs, **options)
    for shard in range(writer.shards):
        writer.write(shard)
    return SoftLabelStore(folder, labeler.images)


def label_bytes(epochs: int, count: int, classes: int, policy: ViewPolicy) -> int:
    """Bytes of stored labels without file headers: what a store of so many epochs would take."""
    per_view = 2 * classes + 4 * 4 + 1 + (4 if policy.view.jitter else 0)
    per_view += {"none": 0, "cutmix": 4 + 16, "mixup": 4 + 4}[policy.mix]
    return epochs * count * per_view


def _mark(images: Tensor) -> str:
    """A hash of the images (hex, 16 digits)."""
    return hashlib.sha256(images.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"labels-{number:05d}.safetensors"
